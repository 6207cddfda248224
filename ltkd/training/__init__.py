"""Training a network into a run folder: the loop, checkpoints, distributed training, progress."""
