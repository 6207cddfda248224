"""Turn a trained network into ONNX, and certify that every group of classes kept its accuracy."""

import os

# ONNX Runtime 1.29 and later report models and machine to its makers unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
