"""Parts of the sampler: reading what a prompt asks for, and measuring what answering it costs."""
