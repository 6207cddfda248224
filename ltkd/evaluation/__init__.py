"""Evaluating runs on the test images, and comparing methods."""
