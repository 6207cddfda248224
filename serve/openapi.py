"""How the API describes itself: the three forms of a body and the problems, with examples."""

from typing import Any  # OpenAPI fragments are plain JSON, and FastAPI types them so

from serve.bodies import ANY_BYTES, JSON, MULTIPART, ImagesBody
from serve.problems import MEDIA_TYPE, problem_of

EXAMPLE_PNG = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"  # one red pixel
)
_BYTES = {"schema": {"type": "string", "format": "binary"}}

CLASSIFY_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One image as it is, or several in a form or in JSON.",
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
            JSON: {"schema": ImagesBody.model_json_schema(), "example": {"images": [EXAMPLE_PNG]}},
        },
    }
}

_EXAMPLES = {
    400: "query top_k is 'five': Input should be a valid integer.",
    408: "the body did not arrive within 10 s; send less, or over a faster line.",
    413: "the body is larger than 20,971,520 bytes; send fewer or less.",
    415: "not a JPEG, PNG or WebP image (it begins with b'hello'); convert it to one.",
    422: "the image is damaged or truncated (image file is truncated); send the whole file.",
    429: "32 requests are in hand, at most 32 are taken; try again.",
    500: "the service has a defect; its log has the cause under request 0f3c.",
    503: "the service is not ready; try again.",
}


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The problems of a route, each with an example."""
    return {
        status: {
            "description": problem_of(status, "").title,
            "content": {
                MEDIA_TYPE: {
                    "schema": {"$ref": "#/components/schemas/Problem"},
                    "example": problem_of(status, _EXAMPLES[status]).model_dump(),
                }
            },
        }
        for status in statuses
    }
