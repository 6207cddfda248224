"""How the API describes itself: bodies, problems and headers, with an example of each.

FastAPI derives what it can from the routes; what it cannot know is added here, and ``describe`` puts the two together.
"""

from typing import Any

from fastapi import FastAPI
from pydantic.json_schema import models_json_schema

from serve.api.v2_tensors import FILES, LOGITS, InferBody, InferReply
from serve.http.bodies import ANY_BYTES, JSON, MULTIPART, ImagesBody
from serve.problems import MEDIA_TYPE, Problem, problem_of

EXAMPLE_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"  # one red pixel
)
EXAMPLE_TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_COMPONENTS = "#/components/schemas/{model}"

CLASSIFY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One image as it is, or several in a form or in JSON; gzip or deflate by Content-Encoding.",
        "content": {
            "image/jpeg": _BYTES,
            "image/png": _BYTES,
            "image/webp": _BYTES,
            ANY_BYTES: _BYTES,
            MULTIPART: {
                "schema": {
                    "type": "object",
                    "required": ["image"],
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

INFER_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "JSON, or JSON with the tensor's bytes behind it; gzip or deflate by Content-Encoding.",
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
        "description": "The output, in JSON or behind it",
        "headers": {
            "Inference-Header-Content-Length": {
                "description": "How much of the body is JSON, if not all of it",
                "schema": {"type": "integer", "minimum": 0},
            }
        },
        "content": {
            JSON: {
                "schema": {"$ref": _COMPONENTS.format(model=InferReply.__name__)},
                "example": {
                    "model_name": "birds",
                    "model_version": "1",
                    "outputs": [{"name": LOGITS, "datatype": "FP32", "shape": [1, 3], "data": [4.5, 0.25, -1.0]}],
                },
            },
            ANY_BYTES: _BYTES,
        },
    }
}

_EXAMPLES = {
    400: "query top_k is 'five': Input should be a valid integer.",
    401: "the request has no key; send one as: Authorization: Bearer KEY",
    403: "the key camera-3 may classify, not give orders.",
    404: "there is no model bird; there are: birds.",
    408: "the body did not arrive within 10 s; send less, or over a faster line.",
    409: "image 0 of request order-4711 was told already; the first label counts.",
    413: "the body is larger than 20,971,520 bytes; send fewer or less.",
    415: "not a JPEG, PNG or WebP image (it begins with b'hello'); convert it to one.",
    422: "the image is damaged or truncated (image file is truncated); send the whole file.",
    429: "32 requests are in hand, at most 32 are taken; try again.",
    500: "the service has a defect; its log has the cause under request 0f3c.",
    503: "the service is not ready; try again.",
    504: "the deadline passed before the image was answered; send fewer at a time, or allow more time.",
}

_REQUEST_HEADERS = {
    "X-Request-ID": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "The caller's name for the request, given back; one that is not plain is replaced",
        "schema": {"type": "string"},
        "example": "order-4711",
    },
    "traceparent": {
        "name": "traceparent",
        "in": "header",
        "description": "W3C Trace Context: the trace that the request belongs to; it is in the log",
        "schema": {"type": "string"},
        "example": EXAMPLE_TRACE,
    },
}
_RESPONSE_HEADERS = {
    "X-Request-ID": {
        "description": "The name of the request, in the log and for feedback",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,128}$"},
    },
    "Retry-After": {
        "description": "Seconds after which it is worth trying again",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Server-Timing": {
        "description": "Milliseconds in each stage",
        "schema": {"type": "string"},
        "example": "decode;dur=0.31, queue;dur=1.20, infer;dur=4.05",
    },
}
_HEADERS_OF = {"429": ("X-Request-ID", "Retry-After"), "503": ("X-Request-ID", "Retry-After")}


def problem_responses(*statuses: int, media_type: str = MEDIA_TYPE) -> dict[int | str, dict[str, Any]]:
    """The problems of a route, each with an example."""
    return {
        status: {
            "description": problem_of(status, "").title,
            "content": {
                media_type: {
                    "schema": {"$ref": _COMPONENTS.format(model=Problem.__name__)},
                    "example": problem_of(status, _EXAMPLES[status]).model_dump(),
                }
            },
        }
        for status in statuses
    }


def describe(app: FastAPI) -> None:
    """Complete the description that the app gives of itself at ``/openapi.json``."""
    derived = app.openapi

    def described() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = complete(derived())
        return app.openapi_schema

    app.openapi = described  # type: ignore[method-assign] # as FastAPI's documentation has it


def complete(schema: dict[str, Any]) -> dict[str, Any]:
    """A description with the parts that FastAPI cannot derive."""
    _, written = models_json_schema(
        [
            (Problem, "serialization"),
            (ImagesBody, "validation"),
            (InferBody, "validation"),
            (InferReply, "serialization"),
        ],
        ref_template=_COMPONENTS,
    )
    components = schema.setdefault("components", {})
    components["schemas"] = dict(sorted((components.get("schemas", {}) | written["$defs"]).items()))
    components["headers"], components["parameters"] = _RESPONSE_HEADERS, _REQUEST_HEADERS
    for methods in schema["paths"].values():
        for operation in methods.values():
            _complete_operation(operation)
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own form; ours is the Problem
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
