"""Networks to ONNX graphs in fp32, fp16 and int8, and sessions that run them."""
