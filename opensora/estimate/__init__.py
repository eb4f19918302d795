"""What training and sampling take, before anything is bought or waited for: memory, operations and seconds.

Models run on paper, on the meta device, and what is alive there is counted; nothing is downloaded or computed.
"""
