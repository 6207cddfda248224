"""The OpenAPI description: bodies, problems and headers, with an example of each.

FastAPI derives a description from the routes. This module has the parts that it cannot derive, and ``describe`` adds
them.
"""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from serve.api.v2_tensors import FILES, LOGITS, InferBody, InferReply
from serve.http.bodies import ANY_BYTES, JSON, MULTIPART, ImagesBody
from serve.monitoring.feedback import FeedbackBody
from serve.problems import MEDIA_TYPE, Problem, make_problem

EXAMPLE_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"  # one red pixel
)
EXAMPLE_ANSWER_ID = "6f1c0d2b9a7e4f5386b1d0c94e2a7f35"
EXAMPLE_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_COMPONENTS = "#/components/schemas/{model}"

CLASSIFY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One image as raw bytes, or several in a form or in JSON. Content-Encoding: gzip or deflate.",
        "content": {
            "image/jpeg": _BYTES,
            "image/png": _BYTES,
            "image/webp": _BYTES,
            ANY_BYTES: _BYTES,
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["image"],
                    "additionalProperties": False,
                    "properties": {"image": {"type": "array", "minItems": 1, "items": _BYTES["schema"]}},
                },
            },
            JSON: {
                "schema": {"$ref": _COMPONENTS.format(model=ImagesBody.__name__)},
                "example": {"images": [EXAMPLE_PNG]},
            },
        },
    },
}

FEEDBACK_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "At most 4 KiB.",
        "content": {
            JSON: {
                "schema": {"$ref": _COMPONENTS.format(model=FeedbackBody.__name__)},
                "example": {"answer_id": EXAMPLE_ANSWER_ID, "label": "crow"},
            },
        },
    },
}

INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "JSON, or JSON followed by the bytes of the tensor. Content-Encoding: gzip or deflate.",
        "content": {
            JSON: {
                "schema": {"$ref": _COMPONENTS.format(model=InferBody.__name__)},
                "example": {"inputs": [{"name": FILES, "datatype": "BYTES", "shape": [1], "data": [EXAMPLE_PNG]}]},
            },
            ANY_BYTES: _BYTES,
        },
    },
}

INFER_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The output, in the JSON or as binary data after it",
        "headers": {
            "Inference-Header-Content-Length": {
                "description": "Number of bytes of JSON at the start of the body; absent if the whole body is JSON",
                "schema": {"type": "integer", "minimum": 0},
            }
        },
        "content": {
            JSON: {
                "schema": {"$ref": _COMPONENTS.format(model=InferReply.__name__)},
                "example": {
                    "model_name": "birds",
                    "model_version": "1",
                    "parameters": {"answer_ids": EXAMPLE_ANSWER_ID},
                    "outputs": [{"name": LOGITS, "datatype": "FP32", "shape": [1, 3], "data": [4.5, 0.25, -1.0]}],
                },
            },
            ANY_BYTES: _BYTES,
        },
    }
}

KEY_STATUSES = (401, 403, 429)
"""The problems of every route that needs a key: without a valid one, without the role, and above the key's limit."""

_EXAMPLES = {
    400: "query top_k is 'five': Input should be a valid integer.",
    401: "this route needs an API key; send the header 'Authorization: Bearer KEY'.",
    403: "the key camera-3 has the role classify; this route needs a key with the role admin.",
    404: "there is no model bird; there is: birds version 1.",
    408: "the body did not arrive within 10 s; send a smaller body or use a faster connection.",
    409: f"the answer {EXAMPLE_ANSWER_ID} already has a true label; the first label counts.",
    413: "the body is larger than 20,971,520 bytes; send a smaller one.",
    415: "the file is not a JPEG, PNG or WebP image (it begins with b'hello'); convert it to one.",
    422: "the image is damaged or truncated (image file is truncated); send the whole file.",
    429: "the key camera-3 is limited to 20 requests a second; try again in 1 s.",
    500: "an internal error occurred; the log of the service has the cause under request id 0f3c.",
    503: "the service is not ready; try again.",
    504: "the deadline passed before the image was answered; send fewer at a time, or allow more time.",
}

_REQUEST_HEADERS = {
    "X-Request-ID": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "The client's id for the request. The response repeats it; an invalid id is replaced.",
        "schema": {"type": "string"},
        "example": "order-4711",
    },
    "traceparent": {
        "name": "traceparent",
        "in": "header",
        "description": "W3C Trace Context: the trace of the request; it is written to the log",
        "schema": {"type": "string"},
        "example": EXAMPLE_TRACE,
    },
}
_RESPONSE_HEADERS = {
    "X-Request-ID": {
        "description": "The id of the request, used in the log",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Retry-After": {
        "description": "Seconds to wait before the next attempt",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Server-Timing": {
        "description": "Milliseconds spent in each stage",
        "schema": {"type": "string"},
        "example": "decode;dur=0.31, queue;dur=1.20, infer;dur=4.05",
    },
}
_HEADERS_OF = {"429": ("X-Request-ID", "Retry-After"), "503": ("X-Request-ID", "Retry-After")}


def problem_responses(*statuses: int, media_type: str = MEDIA_TYPE) -> dict[int | str, dict[str, Any]]:
    """The problem responses of a route, each with an example."""
    return {
        status: {
            "description": make_problem(status, "").title,
            "content": {
                media_type: {
                    "schema": {"$ref": _COMPONENTS.format(model=Problem.__name__)},
                    "example": make_problem(status, _EXAMPLES[status]).model_dump(),
                }
            },
        }
        for status in statuses
    }


def describe(app: FastAPI) -> None:
    """Complete the description that the application serves at ``/openapi.json``."""
    derived = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(derived())
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign] # the way that FastAPI documents


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """Add the parts that FastAPI cannot derive to a description."""
    _, definitions = models_json_schema(
        [
            (Problem, "serialization"),
            (ImagesBody, "validation"),
            (FeedbackBody, "validation"),
            (InferBody, "validation"),
            (InferReply, "serialization"),
        ],
        ref_template=_COMPONENTS,
    )
    components = schema.setdefault("components", {})
    components["schemas"] = dict(sorted((components.get("schemas", {}) | definitions["$defs"]).items()))
    components["headers"], components["parameters"] = _RESPONSE_HEADERS, _REQUEST_HEADERS
    for methods in schema["paths"].values():
        for operation in methods.values():
            _complete_operation(operation)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own error format; this API uses Problem
        components["schemas"].pop(name, None)
    return schema


def _complete_operation(operation: dict[str, Any]) -> None:
    references = [{"$ref": f"#/components/parameters/{name}"} for name in _REQUEST_HEADERS]
    operation["parameters"] = operation.get("parameters", []) + references
    responses = operation["responses"]
    if "HTTPValidationError" in str(responses.get("422")):
        del responses["422"]
    for status, response in responses.items():
        headers = _HEADERS_OF.get(status, ("X-Request-ID",))
        if status == "200" and "requestBody" in operation and "Inference-Header-Content-Length" not in str(response):
            headers = (*headers, "Server-Timing")
        response.setdefault("headers", {}).update({name: {"$ref": f"#/components/headers/{name}"} for name in headers})
