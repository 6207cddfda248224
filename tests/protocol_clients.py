"""Calls a server with tritonclient and kserve, and prints the results as JSON.

tests/serve/api/test_clients.py runs it in an environment that has both clients:

    python protocol_clients.py HOST:PORT PIXELS.npy FILE...
"""

import asyncio
import base64
import json
import sys
from pathlib import Path

import kserve
import numpy as np
import tritonclient.http as triton
from kserve.inference_client import RESTConfig
from kserve.protocol.infer_type import RequestedOutput
from tritonclient.utils import InferenceServerException

MODEL = "toy"


def with_triton(address: str, pixels: np.ndarray, files: list[bytes]) -> dict[str, object]:
    """Make all calls of tritonclient that a user of a model needs."""
    client = triton.InferenceServerClient(address, concurrency=4)

    def tensor(name: str, array: np.ndarray, datatype: str, binary: bool) -> triton.InferInput:
        result = triton.InferInput(name, list(array.shape), datatype)
        result.set_data_from_numpy(array, binary_data=binary)
        return result

    def logits(tensor: triton.InferInput, binary: bool | None = None, **options: object) -> list[list[float]]:
        outputs = None if binary is None else [triton.InferRequestedOutput("logits", binary_data=binary)]
        return client.infer(MODEL, [tensor], outputs=outputs, **options).as_numpy("logits").tolist()

    encoded = np.array(files, dtype=object)
    in_base64 = np.array([base64.b64encode(file).decode() for file in files], dtype=object)
    classified = client.infer(
        MODEL, [tensor("image", pixels, "UINT8", True)], outputs=[triton.InferRequestedOutput("logits", class_count=3)]
    ).as_numpy("logits")
    classified_in_json = client.infer(
        MODEL,
        [tensor("image", pixels, "UINT8", True)],
        outputs=[triton.InferRequestedOutput("logits", binary_data=False, class_count=3)],
    ).as_numpy("logits")
    both_forms = [
        client.infer(MODEL, [tensor("image", pixels, "UINT8", True)], outputs=[output]).get_response()
        for output in (
            triton.InferRequestedOutput("logits", binary_data=True),
            triton.InferRequestedOutput("logits", binary_data=False, class_count=1),
        )
    ]
    requests = [client.async_infer(MODEL, [tensor("image", pixels, "UINT8", True)]) for _ in range(3)]
    asynchronous = [request.get_result().as_numpy("logits").tolist() for request in requests]
    try:
        client.infer("other", [tensor("image", pixels, "UINT8", True)])
        error = ""
    except InferenceServerException as raised:
        error = f"{raised.status()} {raised.message()}"
    return {
        "live": client.is_server_live(),
        "ready": client.is_server_ready(),
        "model_ready": client.is_model_ready(MODEL),
        "other_ready": client.is_model_ready("other"),
        "server": client.get_server_metadata(),
        "index": client.get_model_repository_index(),
        "metadata": client.get_model_metadata(MODEL),
        "metadata_of_version": client.get_model_metadata(MODEL, "1"),
        "config": client.get_model_config(MODEL),
        "classification": [[text.decode() for text in row] for row in classified.tolist()],
        "classification_in_json": classified_in_json.tolist(),
        "error": error,
        "answer_ids": [name for response in both_forms for name in response["parameters"]["answer_ids"].split(",")],
        "logits": {
            "binary in and out": logits(tensor("image", pixels, "UINT8", True), True),
            "JSON in and out": logits(tensor("image", pixels, "UINT8", False), False),
            "binary in, JSON out": logits(tensor("image", pixels, "UINT8", True), False),
            "outputs not specified": logits(tensor("image", pixels, "UINT8", True)),
            "files": logits(tensor("image_bytes", encoded, "BYTES", True), True),
            "files as a column": logits(tensor("image_bytes", encoded[:, None], "BYTES", True), True),
            "files in JSON": logits(tensor("image_bytes", in_base64, "BYTES", False), False),
            "gzip": logits(tensor("image", pixels, "UINT8", True), True, request_compression_algorithm="gzip"),
            "deflate": logits(
                tensor("image", pixels, "UINT8", True),
                True,
                request_compression_algorithm="deflate",
                response_compression_algorithm="gzip",
            ),
            "a version": logits(tensor("image", pixels, "UINT8", True), True, model_version="1", request_id="mine"),
            "asynchronous": asynchronous[-1],
        },
    }


async def with_kserve(address: str, pixels: np.ndarray, files: list[bytes]) -> dict[str, object]:
    """Make the same calls with kserve's REST client, which has no calls for the index and metadata."""
    url = f"http://{address}"
    client = kserve.InferenceRESTClient(RESTConfig(protocol="v2"))

    async def logits(name: str, array: np.ndarray, datatype: str, *, binary: bool, binary_out: bool) -> object:
        tensor = kserve.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array, binary_data=binary)
        request = kserve.InferRequest(
            MODEL, [tensor], request_outputs=[RequestedOutput("logits", {"binary_data": binary_out})]
        )
        response = await client.infer(url, request, model_name=MODEL)
        return response.outputs[0].as_numpy().tolist()

    in_base64 = np.array([base64.b64encode(file).decode() for file in files], dtype=object)
    try:
        await client.infer(url, {"inputs": []}, model_name=MODEL)
        error = ""
    except Exception as raised:
        error = str(raised)
    plain = await client.infer(
        url,
        {"inputs": [{"name": "image", "datatype": "UINT8", "shape": pixels.shape, "data": pixels.tolist()}]},
        model_name=MODEL,
    )
    results = {
        "live": await client.is_server_live(url),
        "ready": await client.is_server_ready(url),
        "model_ready": await client.is_model_ready(url, MODEL),
        "other_ready": await client.is_model_ready(url, "other"),
        "error": error,
        "answer_ids": plain.parameters["answer_ids"].split(","),
        "logits": {
            "a dictionary": plain.outputs[0].as_numpy().tolist(),
            "JSON in and out": await logits("image", pixels, "UINT8", binary=False, binary_out=False),
            "binary in and out": await logits("image", pixels, "UINT8", binary=True, binary_out=True),
            "files": await logits("image_bytes", np.array(files, dtype=object), "BYTES", binary=True, binary_out=True),
            "files in JSON": await logits("image_bytes", in_base64, "BYTES", binary=False, binary_out=False),
        },
    }
    await client.close()
    return results


if __name__ == "__main__":
    address, pixels, *files = sys.argv[1:]
    images, contents = np.load(pixels), [Path(file).read_bytes() for file in files]
    all_results = {
        "tritonclient": with_triton(address, images, contents),
        "kserve": asyncio.run(with_kserve(address, images, contents)),
    }
    sys.stdout.write(json.dumps(all_results) + "\n")
