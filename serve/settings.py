"""The settings of the service: one place, from the command line or from ``LTKD_`` variables."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ltkd.contract.bundle import Precision
from ltkd.contract.image_decoding import MAX_PIXELS
from ltkd.errors import UsageError
from serve.engine.messages import Device

PREFIX = "LTKD_"
PILLOW_MAX_PIXELS = 89_478_485


class Settings(BaseModel):
    """How the service listens and what it takes; each field is also ``LTKD_<NAME>``.

    Attributes:
        host: Address to listen on; only this machine reaches the default.
        port: TCP port; 0 takes a free one.
        device: ``auto``, ``cpu`` or ``cuda``.
        precision: ``fp32``, ``int8`` or ``fp16``; by default the fastest that is certified, of those for the device.
        processes: Engine processes for each model version; they share the cores.
        max_batch: Images in one run of the network.
        max_wait_ms: How long an image waits for others to fill its batch; by default 0 on a CPU and 1 on a GPU.
        max_body_bytes: Larger request bodies are refused while they arrive.
        max_pixels: Images with more pixels are refused from their header. Pillow's own guard ends at its limit.
        max_images: Images in one request.
        max_queue_images: Images in hand at one time, decoded or not; beyond them the answer is 429.
        max_queue_bytes: Encoded bytes in hand at one time, likewise.
        max_queue_seconds: A request that would wait longer for its turn, at the measured rate, is answered 429; by
            default ten times what the model needs for one image, at least 0.05.
        max_connections: Open connections; one more is answered 503 and closed.
        max_header_bytes: Request line and headers together.
        max_headers: Header lines.
        header_seconds: Request line and headers must have arrived within this time of the first byte.
        body_seconds: A request body must have arrived within this time.
        idle_seconds: A connection without a request is closed after this time.
        write_seconds: A client that does not read its answer for this time is cut off.
        timeout_seconds: A request that is not answered within this time gets 504; a request may ask for less.
        stall_seconds: An engine process that has work and says nothing for this time is killed and replaced.
        delay_seconds: After SIGTERM readiness is false for this time before connections are refused, so that
            load balancers can look elsewhere.
        drain_seconds: What accepted requests are given after that; with the delay shorter than the 10 s of
            ``docker stop``.
        top_k: Classes listed in an answer when the request does not say.
        default_model: Which model answers a request that names none; not needed where there is one.
        key_file: Who may use the service, and give it orders; without it everybody may use it and nobody orders.
        window_images: Predictions in the rolling window of each model.
        feedback_images: Answers that are remembered until somebody tells their true label.
        log_format: ``plain`` or ``json``.
        log_level: ``debug``, ``info`` (one line a request), ``warning`` or ``error``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    device: Device = "auto"
    precision: Precision | None = None
    processes: int = Field(default=1, gt=0, le=256)
    max_batch: int = Field(default=32, gt=0, le=1024)
    max_wait_ms: float | None = Field(default=None, ge=0, le=1000)
    max_body_bytes: int = Field(default=20 * 2**20, gt=0)
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, le=PILLOW_MAX_PIXELS)
    max_images: int = Field(default=64, gt=0, le=10_000)
    max_queue_images: int = Field(default=1024, gt=0)
    max_queue_bytes: int = Field(default=128 * 2**20, gt=0)
    max_queue_seconds: float | None = Field(default=None, gt=0)
    max_connections: int = Field(default=1000, gt=0)
    max_header_bytes: int = Field(default=32 * 2**10, ge=1024)
    max_headers: int = Field(default=100, gt=0)
    header_seconds: float = Field(default=10, gt=0)
    body_seconds: float = Field(default=10, gt=0)
    idle_seconds: float = Field(default=75, gt=0)
    write_seconds: float = Field(default=10, gt=0)
    timeout_seconds: float = Field(default=10, gt=0)
    stall_seconds: float = Field(default=10, gt=0)
    delay_seconds: float = Field(default=0.5, ge=0)
    drain_seconds: int = Field(default=8, gt=0)
    top_k: int = Field(default=5, gt=0)
    default_model: str | None = None
    key_file: Path | None = None
    window_images: int = Field(default=10_000, gt=0)
    feedback_images: int = Field(default=10_000, gt=0)
    log_format: Literal["plain", "json"] = "plain"
    log_level: Literal["debug", "info", "warning", "error"] = "warning"

    @model_validator(mode="after")
    def _agree(self) -> Self:
        if self.max_body_bytes > self.max_queue_bytes:
            raise ValueError(
                f"max_queue_bytes ({self.max_queue_bytes:,}) is less than max_body_bytes ({self.max_body_bytes:,}): "
                "the largest body allowed could never be taken"
            )
        if self.max_images > self.max_queue_images:
            raise ValueError(
                f"max_queue_images ({self.max_queue_images:,}) is less than max_images ({self.max_images:,}): "
                "the largest request allowed could never be taken"
            )
        if self.device == "cpu" and self.precision == "fp16":
            raise ValueError("precision fp16 is for CUDA and device is cpu: take int8 or fp32")
        return self


def read_settings(given: Mapping[str, str | int | float | Path | None]) -> Settings:
    """The settings of this start: what was given on the command line, then the environment, then the defaults.

    Args:
        given: Field name to value; None means not given.

    Raises:
        UsageError: A value is out of range, two contradict each other, or an ``LTKD_`` variable names no setting.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    variables = {name: value for name, value in sorted(os.environ.items()) if name.upper().startswith(PREFIX)}
    for variable in variables:
        if variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), known, 1) or sorted(known)
            raise UsageError(f"the variable {variable} is no setting; did you mean {' or '.join(near)}? Unset it.")
    wanted: dict[str, object] = {name.upper().removeprefix(PREFIX).lower(): value for name, value in variables.items()}
    wanted |= {name: value for name, value in given.items() if value is not None}
    try:
        return Settings.model_validate(wanted)
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise UsageError(
                f"the settings contradict each other: {first['msg'].removeprefix('Value error, ')}."
            ) from None
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"the setting {name} ({PREFIX}{name.upper()}) is {first['input']!r}: {first['msg']}."
        ) from None
