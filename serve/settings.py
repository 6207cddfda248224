"""The settings of the service, read from the command line and from ``LTKD_`` environment variables."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ltkd.contract.bundle import Precision
from ltkd.contract.image_decoding import MAX_HEADER_PIXELS, MAX_PIXELS
from ltkd.errors import UsageError
from serve.engine.devices import DEVICE_CHOICES, parse_device

PREFIX = "LTKD_"


class Settings(BaseModel):
    """Settings of the service; each can also be set with the environment variable ``LTKD_<NAME>``.

    Attributes:
        host: Address to listen on; the default is reachable from this machine only.
        port: TCP port; 0 chooses a free one.
        device: ``cuda`` runs on all visible GPUs, ``cuda:1`` on one of them, ``cpu`` on none. ``auto`` is ``cuda`` if
            it works, else ``cpu``.
        precision: ``fp32``, ``int8`` or ``fp16``; by default the fastest one that is certified and suits the device.
        processes: Engine processes per model version; they share the cores. By default one for each GPU, or one on a
            CPU; on several GPUs, a multiple of their number.
        max_batch: Images in one run of the network.
        max_wait_ms: How long an image waits for others to fill its batch; by default 0 on a CPU and 1 on a GPU.
        max_body_bytes: Larger request bodies are rejected with 413 while they arrive.
        max_pixels: Decoded pixels of an image; one with more is rejected from its header. A JPEG that is scaled down
            while it is decoded counts the pixels that remain, but at least an eighth of its own; a progressive JPEG
            counts in full. No image may have more than 89,478,485 pixels of its own.
        max_request_pixels: Decoded pixels of all images of a request; the images beyond are rejected.
        max_images: Images per request.
        max_queue_images: Images that are queued or running; requests beyond this limit are rejected with 429.
        max_queue_bytes: Bytes of request bodies in memory, as received and decompressed; requests beyond this limit are
            rejected with 429.
        max_queue_seconds: A request whose expected time in the queue is longer is rejected with 429, as is one that
            would miss a shorter deadline of its own.
        max_connections: Open connections. A further one replaces one that has been idle for over a second. If there is
            none, only health checks are answered on it, and other requests get 503.
        max_header_bytes: Size of the request line and headers together.
        max_headers: Number of header lines.
        header_seconds: Request line and headers must arrive within this time of the first byte.
        body_seconds: A request body must arrive within this time.
        idle_seconds: A connection without a request is closed after this time.
        write_seconds: A connection is closed if the client does not read its response for this time.
        timeout_seconds: A request that is not answered within this time gets 504; a request may set a shorter time.
        stall_seconds: An engine process that has requests but decodes no image and runs no batch for this time is
            killed and replaced. It must be longer than the longest run of the network, and than 10 s, which one large
            image may take.
        delay_seconds: Time after SIGTERM in which the service is not ready but still accepts connections, so that load
            balancers can send requests elsewhere.
        drain_seconds: Time after that delay in which accepted requests are answered. Then the process ends, whatever it
            is doing. The two together must be shorter than the time that the container gets to stop: 10 s with
            ``docker stop``, 30 s in Kubernetes.
        top_k: Classes listed per answer if the request does not set a number.
        default_model: The model for requests that name none; not needed if only one model is served.
        key_file: File with the API keys. Without it administration is disabled, and everything else needs no key.
        window_images: Predictions in the rolling window of each model.
        feedback_images: Most recent answers that are kept for their true labels. If there are more, the API key with
            the most answers loses its oldest.
        log_format: ``plain`` or ``json``.
        log_level: ``debug``, ``info`` (log one line per request), ``warning`` or ``error``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    device: str = "auto"
    precision: Precision | None = None
    processes: int | None = Field(default=None, gt=0, le=256)
    max_batch: int = Field(default=32, gt=0, le=1024)
    max_wait_ms: float | None = Field(default=None, ge=0, le=1000)
    max_body_bytes: int = Field(default=20 * 2**20, gt=0)
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, le=MAX_HEADER_PIXELS)
    max_request_pixels: int = Field(default=100_000_000, gt=0)
    max_images: int = Field(default=64, gt=0, le=10_000)
    max_queue_images: int = Field(default=1024, gt=0)
    max_queue_bytes: int = Field(default=128 * 2**20, gt=0)
    max_queue_seconds: float = Field(default=1.0, gt=0)
    max_connections: int = Field(default=1000, gt=0)
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    max_headers: int = Field(default=100, gt=0)
    header_seconds: float = Field(default=10, gt=0)
    body_seconds: float = Field(default=10, gt=0)
    idle_seconds: float = Field(default=75, gt=0)
    write_seconds: float = Field(default=10, gt=0)
    timeout_seconds: float = Field(default=10, gt=0)
    stall_seconds: float = Field(default=30, gt=0)
    delay_seconds: float = Field(default=0.5, ge=0)
    drain_seconds: int = Field(default=8, gt=0)
    top_k: int = Field(default=5, gt=0)
    default_model: str | None = None
    key_file: Path | None = None
    window_images: int = Field(default=10_000, gt=0)
    feedback_images: int = Field(default=10_000, gt=0)
    log_format: Literal["plain", "json"] = "plain"
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    @field_validator("device")
    @classmethod
    def _check_device(cls, device: str) -> str:
        try:
            parse_device(device)
        except UsageError:
            raise ValueError(f"choose {DEVICE_CHOICES}") from None
        return device

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        if self.max_body_bytes > self.max_queue_bytes:
            raise ValueError(
                f"max_queue_bytes ({self.max_queue_bytes:,}) is less than max_body_bytes ({self.max_body_bytes:,}): "
                "the largest allowed body would always be rejected; raise the first or lower the second"
            )
        if self.max_images > self.max_queue_images:
            raise ValueError(
                f"max_queue_images ({self.max_queue_images:,}) is less than max_images ({self.max_images:,}): "
                "the largest allowed request would always be rejected; raise the first or lower the second"
            )
        if self.max_pixels > self.max_request_pixels:
            raise ValueError(
                f"max_request_pixels ({self.max_request_pixels:,}) is less than max_pixels ({self.max_pixels:,}): "
                "the largest allowed image would always be rejected; raise the first or lower the second"
            )
        if self.device == "cpu" and self.precision == "fp16":
            raise ValueError("precision fp16 needs CUDA, but device is cpu; use int8 or fp32")
        return self


def read_settings(given: Mapping[str, str | int | float | Path | None]) -> Settings:
    """Read the settings. The command line takes precedence over the environment, the environment over the defaults.

    Args:
        given: Field name to value from the command line; None means not given.

    Raises:
        UsageError: A value is out of range, two settings contradict each other, or a variable is not a setting.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    variables = {name: value for name, value in sorted(os.environ.items()) if name.upper().startswith(PREFIX)}
    for variable in variables:
        if variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), known, 1) or sorted(known)
            raise UsageError(f"the variable {variable} is not a setting; did you mean {' or '.join(near)}? Unset it.")
    values: dict[str, object] = {name.upper().removeprefix(PREFIX).lower(): value for name, value in variables.items()}
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise UsageError(
                f"the settings contradict each other: {first['msg'].removeprefix('Value error, ')}."
            ) from None
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"the setting {name} ({PREFIX}{name.upper()}) is {first['input']!r}: "
            f"{first['msg'].removeprefix('Value error, ')}."
        ) from None
