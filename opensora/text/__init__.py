"""Captions to embeddings: cleaning, and T5 encoders of any size."""
