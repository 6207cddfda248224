"""Metrics, drift, feedback and logs."""
