"""Convert networks to ONNX graphs in fp32, fp16 and int8, and open sessions that run them."""
