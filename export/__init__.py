"""Convert a trained network to ONNX, and certify that every class group kept its accuracy.

``bundling``, ``parity``, ``verify`` and ``triton`` are the entry points, one for each task of the command line. They
use the sub-packages ``conversion``, ``certification`` and ``report``; ``schema`` defines the content of parity.json.
"""

import os

# ONNX Runtime 1.29 and later sends telemetry about models and machine unless this is set before it is imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
