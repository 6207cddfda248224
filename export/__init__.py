"""Turn a trained network into ONNX, and certify that every group of classes kept its accuracy."""
