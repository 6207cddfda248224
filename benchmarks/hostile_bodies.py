"""Attacks by what requests contain: bombs of every format, forged feedback, wrong keys, mutated requests.

Each function makes one attempt; hostile_clients.py repeats it. The bodies are made once (``prepare``).
"""

import asyncio
import base64
import io
import json
import secrets
import struct
import zlib
from collections.abc import Mapping
from functools import cache

import numpy as np
from PIL import Image

from benchmarks.hostile_clients import CLOSED, REJECTED, HostileClient, Reply

ANY_ANSWER = ("200", *REJECTED)
OVER_BUDGET = ("200", "4xx", "504", CLOSED)  # admitted up to the budget of pixels, so it may also be late
MIB = 2**20
NUM_LISTED, NESTING = 4_500_000, 200_000
_FEEDBACK = "/v1/feedback"


def _encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@cache
def large_png() -> bytes:
    """A PNG of 25 MP, which is the largest that is accepted."""
    return _encoded(Image.new("RGB", (5000, 5000), (90, 120, 30)), "PNG", compress_level=1)


@cache
def large_webp(side_px: int = 5000) -> bytes:
    """A WebP of one colour: a few kilobytes."""
    return _encoded(Image.new("RGB", (side_px, side_px), (90, 120, 30)), "WEBP", lossless=True, method=0)


@cache
def large_jpeg(side_px: tuple[int, int] = (8160, 6120)) -> bytes:
    """A JPEG of 50 MP, as phones take them."""
    return _encoded(Image.new("RGB", side_px, (90, 120, 30)), "JPEG", quality=85)


def _png_chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _png(width: int, height: int, rows: bytes, before: bytes = b"", bits: int = 8, colour: int = 2) -> bytes:
    header = _png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + before + rows + _png_chunk(b"IEND", b"")


@cache
def image_bombs() -> Mapping[str, bytes]:
    """Small files that are expensive or impossible to decode, by name."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 8 * 3 + 1), dtype=np.uint8)
    noise[:, 0] = 0
    rows = _png_chunk(b"IDAT", zlib.compress(noise.tobytes()))
    gigabyte = zlib.compress(bytes(64 * MIB)) + zlib.compress(bytes(64 * MIB)) * 8
    progressive = _encoded(Image.new("L", (4000, 4000), 90), "JPEG", progressive=True)
    last_scan = progressive[progressive.rindex(b"\xff\xda") : -2]
    jpeg = bytearray(large_jpeg((64, 64)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65500, 65500)
    webp = bytearray(large_webp(64))
    webp[21:25] = struct.pack("<I", 0x0FFFFFFF)  # 16,384 x 16,384
    return {
        "PNG of 400 MP": _png(
            20_000, 20_000, _png_chunk(b"IDAT", zlib.compress(bytes(2501 * 20_000), 9)), bits=1, colour=0
        ),
        "PNG of 2^31 x 2^31": _png(2**31 - 1, 2**31 - 1, rows),
        "PNG with 100,000 chunks": _png(8, 8, rows, _png_chunk(b"tEXt", b"a\0b") * 100_000),
        "PNG with 100,000 empty IDAT": _png(8, 8, _png_chunk(b"IDAT", b"") * 100_000 + rows),
        "PNG whose text unfolds to 64 MB": _png(
            8, 8, rows, _png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(64 * MIB)))
        ),
        "PNG whose profile unfolds to 64 MB": _png(
            8, 8, rows, _png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(64 * MIB)))
        ),
        "PNG whose rows unfold to 0.6 GB": _png(8, 8, _png_chunk(b"IDAT", gigabyte)),
        "JPEG that says 65,500 x 65,500": bytes(jpeg),
        "JPEG with 300 scans": progressive[:-2] + last_scan * 300 + b"\xff\xd9",
        "JPEG with 50,000 comments": progressive[:2] + b"\xff\xfe\x00\x03a" * 50_000 + progressive[2:],
        "WebP that says 16,384 x 16,384": bytes(webp),
        "WebP of 50 MP": large_webp(7071),
    }


async def image_bomb(client: HostileClient) -> None:
    """Images that unfold: dimensions, chunks, scans, comments and compressed texts."""
    what = client.random.choice(sorted(image_bombs()))
    content = client.target.post("/v1/classify", image_bombs()[what], "image/png")
    client.note(what, await client.talk(content), allowed=ANY_ANSWER)


def _form(images: list[bytes]) -> tuple[bytes, str]:
    part = b"--edge\r\nContent-Disposition: form-data; name=image; filename=a\r\nContent-Type: image/png\r\n\r\n"
    body = b"".join(part + image + b"\r\n" for image in images) + b"--edge--\r\n"
    return body, "multipart/form-data; boundary=edge"


@cache
def webps_body() -> bytes:
    """64 copies of a WebP of 7071 x 7071 pixels, as JSON."""
    return json.dumps({"images": [base64.b64encode(large_webp(7071)).decode()] * 64}).encode()


async def many_large_webps(client: HostileClient) -> None:
    """64 copies of a 2 KB WebP of 50 MP in one request."""
    content = client.target.post("/v1/classify", webps_body())
    client.note("64 WebP of 50 MP", await client.talk(content, wait_s=30), allowed=OVER_BUDGET)


def largest_images() -> tuple[bytes, ...]:
    """The largest images that are accepted, of each format."""
    return large_png(), large_webp(), large_jpeg()


async def largest_requests(client: HostileClient) -> None:
    """Two clients that send the largest admitted requests, one after the other without end: 4 images of 25 MP."""
    image = client.random.choice(largest_images())
    content = client.target.post("/v1/classify", *_form([image] * 4))
    replies = await client.talk(content, wait_s=30)
    client.note("100 MP", replies, allowed=OVER_BUDGET)
    if replies and replies[-1].status == "429":
        await asyncio.sleep(1.0)  # until it is admitted


def _gzip(begin: bytes, repeated: bytes, times: int) -> bytes:
    """A gzip stream without an end, of some bytes and then others very often."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS + 16)
    first = packer.compress(begin) + packer.flush(zlib.Z_FULL_FLUSH)
    block = packer.compress(repeated) + packer.flush(zlib.Z_FULL_FLUSH)
    return first + block * times


@cache
def gzip_bombs() -> Mapping[str, bytes]:
    """Compressed bodies, by what they unfold to."""
    return {
        "2 GB of zeros": _gzip(b"", bytes(MIB), 2000),
        "2 GB of spaces": _gzip(b'{"images": [', b" " * MIB, 2000),
        "100 MB of images": _gzip(b'{"images": ["a"', b',"a"' * 2**18, 100),
    }


async def gzip_bomb(client: HostileClient) -> None:
    """Compressed bodies of 2 MB or less that unfold to gigabytes."""
    what = client.random.choice(sorted(gzip_bombs()))
    paths = ("/v1/classify", f"/v2/models/{client.target.model}/infer", _FEEDBACK)
    path = client.random.choice(paths)
    media_type = "image/png" if (what, path) == ("2 GB of zeros", "/v1/classify") else "application/json"
    content = client.target.post(path, gzip_bombs()[what], media_type, headers="Content-Encoding: gzip\r\n")
    client.note(f"{what} to {path}", await client.talk(content, wait_s=30))


@cache
def list_of_images(num: int) -> bytes:
    """Millions of texts instead of images, compressed to some kilobytes with an end."""
    return zlib.compress(b'{"images": ["a"' + b',"a"' * num + b"]}", 9)


@cache
def nested(depth: int) -> bytes:
    """Lists in lists."""
    return b'{"images": ' + b"[" * depth + b"]" * depth + b"}"


async def json_bomb(client: HostileClient) -> None:
    """JSON: millions of images that are none, compressed or not, and lists in lists in lists."""
    kind = client.random.randrange(4)
    if kind == 0:
        content = client.target.post(
            "/v1/classify", list_of_images(NUM_LISTED), headers="Content-Encoding: deflate\r\n"
        )
    elif kind == 1:
        content = client.target.post("/v1/classify", b'{"images": ["a"' + b',"a"' * 1_000_000 + b"]}")
    else:
        content = client.target.post("/v1/classify" if kind == 2 else _FEEDBACK, nested(NESTING))
    client.note(f"JSON, kind {kind}", await client.talk(content, wait_s=30))


@cache
def large_records() -> tuple[bytes, bytes]:
    """30 MB of JSON: one long text, and many numbers."""
    return (
        b'{"answer_id": "a", "label": "' + b"a" * (30 * MIB) + b'"}',
        b'{"answer_id": [' + b"1," * (15 * MIB) + b'1], "label": "a"}',
    )


async def large_feedback(client: HostileClient) -> None:
    """30 MB of JSON to the feedback route, with a key, with a wrong key and without one."""
    key = client.random.choice(["labeller", "camera", "stranger", None])
    content = client.target.post(_FEEDBACK, client.random.choice(large_records()), key=key)
    client.note(f"30 MB of feedback from {key}", await client.talk(content, wait_s=30))


@cache
def hostile_forms() -> Mapping[str, tuple[bytes, str]]:
    """Multipart bodies, each with its media type."""
    part = b"--edge\r\nContent-Disposition: form-data; name=image; filename=a\r\n\r\n\r\n"
    return {
        "100,000 parts": (part * 100_000 + b"--edge--\r\n", "multipart/form-data; boundary=edge"),
        "a boundary that never comes": (b"a" * (10 * MIB), "multipart/form-data; boundary=edge"),
        "a boundary of 8 KB": (b"--" + b"e" * 8000 + b"\r\n", "multipart/form-data; boundary=" + "e" * 8000),
        "no boundary": (part, "multipart/form-data"),
        "a part whose header never ends": (b"--edge\r\nX: " + b"a" * (2 * MIB), "multipart/form-data; boundary=edge"),
        "a part with 50,000 headers": (
            b"--edge\r\n" + b"X: a\r\n" * 50_000 + b"\r\n", "multipart/form-data; boundary=edge"
        ),
        "almost boundaries": (b"\r\n--edg" * 500_000, "multipart/form-data; boundary=edge"),
    }  # fmt: skip


async def multipart(client: HostileClient) -> None:
    """Multipart: 100,000 parts, a boundary that never comes, endless part headers."""
    what = client.random.choice(sorted(hostile_forms()))
    content = client.target.post("/v1/classify", *hostile_forms()[what])
    client.note(f"a form with {what}", await client.talk(content))


def _infer(
    client: HostileClient, tensor: dict[str, object], binary: bytes = b"", header_bytes: int | None = None
) -> bytes:
    text = json.dumps({"inputs": [tensor]}).encode()
    size = len(text) if header_bytes is None else header_bytes
    headers = f"Inference-Header-Content-Length: {size}\r\n" if binary or header_bytes is not None else ""
    path = f"/v2/models/{client.target.model}/infer"
    return client.target.post(
        path, text + binary, "application/octet-stream" if headers else "application/json", headers=headers
    )


async def tensors(client: HostileClient) -> None:
    """/v2: shapes of 2^63, BYTES whose lengths lie, negative and huge header lengths, deep data."""
    lie = struct.pack("<I", 0xFFFFFFFF) + b"abc"
    tensor: dict[str, object] = {"name": "image", "shape": [1], "datatype": "BYTES"}
    raw: dict[str, object] = {"name": "image", "datatype": "UINT8"}
    size = {"parameters": {"binary_data_size": len(lie)}}
    content = client.random.choice([
        _infer(client, {**raw, "shape": [2**63, 8, 8, 3], "data": []}),
        _infer(client, {**raw, "shape": [10**9, 224, 224, 3], "data": [1, 2, 3]}),
        _infer(client, {**raw, "shape": [-1, 8, 8, 3], "data": [0] * 192}),
        _infer(client, {**raw, "shape": [1] * 10_000, "data": [0]}),
        _infer(client, {**raw, "shape": [1, 8, 8, 3], "data": [[[["a"]]]]}),
        _infer(client, {**tensor, **size}, lie),
        _infer(client, {**tensor, "shape": [10**6], **size}, lie),
        _infer(client, {**tensor, "parameters": {"binary_data_size": 2**62}}, lie),
        _infer(client, {**tensor, **size}, lie, header_bytes=2**62),
        _infer(client, {**tensor, **size}, lie, header_bytes=-1),
        _infer(client, {**tensor, "data": ["a"] * 1_000_000, "shape": [1_000_000]}),
        client.target.post(f"/v2/models/{client.target.model}/infer", nested(NESTING)),
        client.target.post("/v2/models/../../etc/infer", b"{}"),
    ])  # fmt: skip
    client.note("a tensor", await client.talk(content))


async def forged_feedback(client: HostileClient) -> None:
    """Feedback on another key's answers, on guessed ids, and roles that do not allow the request."""
    (answer,) = await client.talk(client.target.classify("labeller"))
    client.note("the labeller's image", [answer], allowed=("200", "429"))
    if answer.status != "200":
        return
    content = json.loads(answer.body)
    request_id = answer.head.partition(b"\r\nx-request-id: ")[2].partition(b"\r\n")[0].decode("latin-1")
    answer_id, label = str(content["results"][0]["answer_id"]), client.target.label
    guesses = [
        answer_id,
        request_id,
        answer_id[:-1] + client.random.choice("0123456789abcdef_-"),
        secrets.token_hex(8),
        "0",
    ]
    bodies: list[dict[str, object]] = [{"answer_id": guess, "label": label} for guess in guesses]
    bodies.append({"request_id": request_id, "image": 0, "label": label})  # the way of before
    for who, body in [
        *(("camera", body) for body in bodies),
        *((who, bodies[0]) for who in ("scraper", "stranger", None)),
    ]:
        content_sent = client.target.post(_FEEDBACK, json.dumps(body).encode(), key=who)
        client.note(f"feedback from {who} with {'/'.join(body)}", await client.talk(content_sent))
    own = client.target.post(_FEEDBACK, json.dumps(bodies[0]).encode(), key="labeller")
    client.note("the labeller's own feedback", await client.talk(own), allowed=("200", "204"))
    for who, path in (("camera", "/metrics"), ("scraper", "/v2"), ("stranger", "/metrics"), (None, "/v1/groups")):
        client.note(f"{path} by {who}", await client.talk(client.target.get(path, who)))
    for who in ("camera", "labeller", "scraper", None):
        client.note(f"reload by {who}", await client.talk(client.target.post("/v1/admin/reload", b"", key=who)))


async def wrong_keys(client: HostileClient) -> None:
    """Twenty guessed keys on one connection; every answer is 401."""
    requests = [
        client.target.classify().replace(
            client.target.keys["camera"].encode(), f"ltkd_{secrets.token_urlsafe(32)}".encode()
        )
        for _ in range(20)
    ]
    client.note("a guessed key", await client.talk(*requests, answers=20), allowed=("401", CLOSED))


async def mutated_requests(client: HostileClient) -> None:
    """Valid requests of every kind with some bytes changed."""
    target, random = client.target, client.random
    tensor: dict[str, object] = {
        "name": "image",
        "shape": [1],
        "datatype": "BYTES",
        "data": [base64.b64encode(target.image).decode()],
    }
    content = bytearray(
        random.choice([
            target.classify(),
            target.post("/v1/classify", *_form([target.image] * 2)),
            target.post("/v1/classify", json.dumps({"images": [base64.b64encode(target.image).decode()]}).encode()),
            target.post(_FEEDBACK, b'{"answer_id": "a", "label": "b"}', key="labeller"),
            target.post("/v1/classify", zlib.compress(target.image), headers="Content-Encoding: deflate\r\n"),
            _infer(client, tensor),
            target.get("/v1/model"),
        ])
    )  # fmt: skip
    for _ in range(random.randrange(1, 9)):
        place = random.randrange(len(content) if random.random() < 0.5 else content.index(b"\r\n\r\n"))
        content[place : place + random.randrange(3)] = random.randbytes(random.randrange(3))
        if b"\r\n\r\n" not in content:
            break
    replies = await client.talk(bytes(content))
    replies = [Reply("200") if reply.status == "204" else reply for reply in replies]
    client.note(f"the mutated request {bytes(content[:300])!r}", replies, allowed=ANY_ANSWER)


def prepare() -> None:
    """Make all bodies, so that this does not happen during a measurement."""
    for make in (image_bombs, webps_body, largest_images, large_records, hostile_forms, gzip_bombs):
        make()
    list_of_images(NUM_LISTED)
    nested(NESTING)
