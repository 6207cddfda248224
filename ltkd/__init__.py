"""Train, certify and serve classifiers that look after the tail of long-tailed data."""

__version__ = "0.1.0"
