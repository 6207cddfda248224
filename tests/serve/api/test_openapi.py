"""The OpenAPI description is complete and frozen, and generated requests get only responses that it describes."""

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from schemathesis.specs.openapi.checks import positive_data_acceptance
from serve_toys import encoded, running, toy_app, toy_pixels

from serve.http.api_keys import make_key
from serve.http.bodies import BASE64
from serve.settings import Settings

FROZEN = Path(__file__).parents[3] / "docs" / "openapi.json"
DESCRIBED: dict[str, Any] = toy_app().openapi()
IMAGES = st.sampled_from([encoded(toy_pixels(seed), kind) for seed in range(2) for kind in ("PNG", "JPEG", "WEBP")])

# a schema cannot express that bytes are an image
for media_type in ("image/png", "image/jpeg", "image/webp", "application/octet-stream"):
    schemathesis.openapi.media_type(media_type, IMAGES)
schemathesis.openapi.format(BASE64, IMAGES.map(lambda image: base64.b64encode(image).decode()))


def operations() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in DESCRIBED["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with running(toy_app()) as client:
        yield client


DESCRIPTION_TEXT = json.dumps(DESCRIBED, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def test_the_description_equals_the_frozen_file() -> None:
    command = "PYTHONPATH=tests python tests/serve/api/test_openapi.py"
    hint = f"the API has changed: add it to CHANGELOG.md, and update the file with: {command}"
    assert FROZEN.read_text(encoding="utf-8") == DESCRIPTION_TEXT, hint


def test_the_service_serves_the_description(client: httpx.Client) -> None:
    assert client.get("/openapi.json").json() == DESCRIBED


def test_every_reference_in_the_description_exists() -> None:
    text = json.dumps(DESCRIBED)
    for kind, name in set(re.findall(r'"#/components/(\w+)/([\w-]+)"', text)):
        assert name in DESCRIBED["components"][kind], f"{kind}/{name}"
    assert "HTTPValidationError" not in text


@pytest.mark.parametrize(
    ("method", "path", "operation"), list(operations()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_operation_is_described_with_its_problems(method: str, path: str, operation: dict[str, Any]) -> None:
    assert operation["summary"]
    headers = {parameter.get("$ref", "").rpartition("/")[2] for parameter in operation["parameters"]}
    assert {"X-Request-ID", "traceparent"} <= headers
    for status, response in operation["responses"].items():
        assert "X-Request-ID" in response["headers"]
        if status == "200":
            continue
        (content,) = response["content"].values()
        assert content["example"]["status"] == int(status)
        assert ("Retry-After" in response["headers"]) == (status in ("429", "503"))
    if path.endswith(("classify", "infer")):
        assert set(operation["responses"]) == {
            "200", "400", "401", "403", "404", "408", "413", "415", "422", "429", "500", "503", "504",
        }  # fmt: skip
        assert "application/json" in operation["requestBody"]["content"]


@pytest.mark.parametrize("path", ["/v1/classify", "/v2/models/{model}/infer"])
def test_the_json_example_of_a_body_is_answered(client: httpx.Client, path: str) -> None:
    example = DESCRIBED["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
    response = client.post(path.format(model="toy"), json=example)
    assert response.status_code == 200, response.text


api = schemathesis.openapi.from_dict(DESCRIBED)
KEY, KEY_LINE = make_key("tester", "admin")


@api.auth()
class Authorization:
    """Adds the key to requests; schemathesis replaces it to test a missing or a wrong key."""

    def get(self, _: schemathesis.Case, __: schemathesis.AuthContext) -> str:
        return f"Bearer {KEY}"

    def set(self, case: schemathesis.Case, data: str, _: schemathesis.AuthContext) -> None:
        case.headers["Authorization"] = data


@pytest.fixture(scope="module")
def service_with_key(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service that requires a key."""
    key_file = tmp_path_factory.mktemp("keys") / "keys"
    key_file.write_text(KEY_LINE + "\n")
    with running(toy_app(settings=Settings(key_file=key_file))) as client:
        yield str(client.base_url)


@pytest.mark.slow
@pytest.mark.timeout(300)
@api.parametrize()
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
def test_generated_requests_get_only_described_responses(case: schemathesis.Case, service_with_key: str) -> None:
    case.headers.pop("X-Request-Timeout", None)  # a short timeout gives 504, which is correct
    # a schema cannot express that the shape of a tensor fits its data, how much of a body is JSON, or a model's classes
    excluded = [positive_data_acceptance] if case.path.endswith(("/infer", "/feedback")) else []
    case.call_and_validate(base_url=service_with_key, excluded_checks=excluded)


if __name__ == "__main__":
    FROZEN.write_text(DESCRIPTION_TEXT, encoding="utf-8")
