"""Converts networks to ONNX graphs in fp32, fp16 and int8, and opens sessions that run them."""
