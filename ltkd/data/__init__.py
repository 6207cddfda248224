"""Data sets, long-tailed sampling, augmentation and batches."""
