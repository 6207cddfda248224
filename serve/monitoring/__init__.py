"""Metrics, drift detection, feedback and logs."""
