"""Reading clips, choosing their sizes, and handing them out in an order that can be resumed."""
