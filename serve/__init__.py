"""The serve room: a bundle in, answers that say which group they fell in out. Never imports torch."""

import os

# ONNX Runtime 1.29 and later report models and machine to its makers unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
