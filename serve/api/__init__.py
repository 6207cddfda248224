"""The HTTP routes: /v1, /v2 (Open Inference Protocol) and operations, and the OpenAPI description."""
