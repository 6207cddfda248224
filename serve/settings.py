"""The settings of the service: one place, from the command line or from ``LTKD_`` variables."""

import difflib
import os
from collections.abc import Mapping

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from ltkd.errors import UsageError
from ltkd.images import MAX_PIXELS
from serve.engine import Device

PREFIX = "LTKD_"
PILLOW_MAX_PIXELS = 89_478_485


class Settings(BaseSettings):
    """How the service listens and what it takes; each field is also ``LTKD_<NAME>``.

    Attributes:
        host: Address to listen on; only this machine reaches the default.
        port: TCP port; 0 takes a free one.
        device: ``auto``, ``cpu`` or ``cuda``.
        max_body_bytes: Larger request bodies are refused while they arrive.
        max_pixels: Images with more pixels are refused from their header. Pillow's own guard ends at its limit.
        max_images: Images in one request.
        max_requests: Classify requests in hand at one time; beyond them the answer is 429.
        body_seconds: A request body must have arrived within this time.
        drain_seconds: What accepted requests are given after SIGTERM; shorter than the 10 s of ``docker stop``.
        top_k: Classes listed in an answer when the request does not say.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="forbid", frozen=True)

    host: str = Field(default="127.0.0.1", min_length=1)
    port: int = Field(default=8000, ge=0, le=65535)
    device: Device = "auto"
    max_body_bytes: int = Field(default=20 * 2**20, gt=0)
    max_pixels: int = Field(default=MAX_PIXELS, gt=0, le=PILLOW_MAX_PIXELS)
    max_images: int = Field(default=64, gt=0)
    max_requests: int = Field(default=32, gt=0)
    body_seconds: float = Field(default=10, gt=0)
    drain_seconds: int = Field(default=8, gt=0)
    top_k: int = Field(default=5, gt=0)


def read_settings(given: Mapping[str, str | int | float | None]) -> Settings:
    """The settings of this start: what was given on the command line, then the environment, then the defaults.

    Args:
        given: Field name to value; None means not given.

    Raises:
        UsageError: A value is out of range, or an ``LTKD_`` variable names no setting.
    """
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    for variable in sorted(name for name in os.environ if name.upper().startswith(PREFIX)):
        if variable.upper() not in known:
            near = difflib.get_close_matches(variable.upper(), known, 1) or sorted(known)
            raise UsageError(f"the variable {variable} is no setting; did you mean {' or '.join(near)}? Unset it.")
    try:
        return Settings.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"the setting {name} ({PREFIX}{name.upper()}) is {first['input']!r}: {first['msg']}."
        ) from None
