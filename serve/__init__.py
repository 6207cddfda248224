"""The HTTP service: loads an exported bundle, classifies images and reports the class group of each answer.

The package never imports torch.
"""

import os

# ONNX Runtime 1.29 and later send data about models and machine to Microsoft unless this is set before the import.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
