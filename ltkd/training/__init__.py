"""Training a network into a run folder: the loop, checkpoints, several processes, progress."""
