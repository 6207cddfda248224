"""Metrics, drift detection, feedback, logs and traces."""
