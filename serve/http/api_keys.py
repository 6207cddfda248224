"""API keys: who may classify, and who may give the service orders.

A key is 256 random bits, and its file holds its SHA-256. A slow hash with a salt (scrypt, argon2) protects what people
think up and others can guess; 256 random bits cannot be guessed at any speed, and a hash that is made slow would be
paid by each request, or be a way to exhaust the service with wrong keys.

    # name:role:sha256 of the key
    camera-3:classify:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08

Without a key file everybody may classify, and nobody may give orders.
"""

import hashlib
import hmac
import re
import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from ltkd.errors import UsageError
from serve.problems import ProblemError, problem_of

Role = Literal["classify", "admin"]
"""``admin`` may do all that ``classify`` may, and give orders."""

_PREFIX = "ltkd_"  # scanners that look for leaked secrets find a key by it
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):(classify|admin):([0-9a-f]{64})")
_CHALLENGE = 'Bearer realm="ltkd"'
_BEARER = "bearer "
_SCHEME = HTTPBearer(auto_error=False, description="Asked for where the service was started with a key file.")


@dataclass(frozen=True)
class Key:
    """What the service knows of a key: not the key."""

    name: str
    role: Role
    sha256: bytes


class Keys:
    """The keys that are known; read again at each reload.

    Args:
        path: Their file; None leaves classification open and refuses orders.

    Raises:
        UsageError: The file cannot be read, is empty or has a line that is no key.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known = read_keys(path) if path else ()

    def read_again(self) -> None:
        """Take in the file as it is now; where that fails, the keys stay as they were.

        Raises:
            UsageError: As at the start.
        """
        if self._path:
            self._known = read_keys(self._path)

    def authorise(self, authorization: str, role: Role) -> str:
        """Let a request pass, and say whose it is.

        Args:
            authorization: The request's ``Authorization`` header, empty if it has none.
            role: What the route asks for.

        Returns:
            The name of the key; empty where classification is open.

        Raises:
            ProblemError: 401 for no key or one that is not known, 403 for one that may not do this.
        """
        if not self._path:
            if role == "classify":
                return ""
            raise ProblemError(problem_of(403, "orders need a key, and none is configured; start with --key-file."))
        if authorization[: len(_BEARER)].lower() != _BEARER:
            detail = "this needs a key; send the header 'Authorization: Bearer KEY'."
            raise ProblemError(problem_of(401, detail), {"WWW-Authenticate": _CHALLENGE})
        key = self._find(authorization[len(_BEARER) :].strip())
        if key is None:
            challenge = {"WWW-Authenticate": f'{_CHALLENGE}, error="invalid_token"'}
            raise ProblemError(
                problem_of(401, "the key is not known; ask whoever runs the service for one."), challenge
            )
        if role == "admin" and key.role != "admin":
            detail = f"the key {key.name} may {key.role}; this needs a key with the role {role}."
            raise ProblemError(problem_of(403, detail))
        return key.name

    def requires(self, role: Role) -> Callable[..., Awaitable[str]]:
        """A dependency for the routes that need a key; its value is the key's name."""

        async def authorised(
            request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_SCHEME)]
        ) -> str:
            return self.authorise(request.headers.get("authorization", ""), role)

        return authorised

    def _find(self, presented: str) -> Key | None:
        """The key with this text; every known one is compared, and each in constant time."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._known:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def make_key(name: str, role: Role) -> tuple[str, str]:
    """A new key, and the line that makes it known.

    Returns:
        The key, which is shown once and kept by nobody here, and the line for the key file.

    Raises:
        UsageError: The name has characters that its line cannot hold, or there is no such role.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{name}:{role}:{hashlib.sha256(key.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise UsageError(
            f"a key's name has 1 to 64 letters, digits, dots, dashes and underscores, and its role is one of "
            f"{', '.join(get_args(Role))}; got {name!r} and {role!r}."
        )
    return key, line


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; empty lines and lines that begin with ``#`` do not count.

    Raises:
        UsageError: The file cannot be read, holds no key, or has a line that is no key or a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        told = reason.strerror if isinstance(reason, OSError) else "it is not text"
        raise UsageError(f"the key file {path} cannot be read ({told}); make keys with: ltkd key NAME") from None
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = _LINE.fullmatch(line.strip())
        if not parts:  # the line is not shown: somebody may have pasted the key itself
            raise UsageError(f"line {number} of the key file {path} is not name:role:sha256; make one: ltkd key NAME")
        name, role, digest = parts.groups()
        if name in keys:
            raise UsageError(f"line {number} of the key file {path} names {name} again; names must differ.")
        keys[name] = Key(name, "admin" if role == "admin" else "classify", bytes.fromhex(digest))
    if not keys:
        raise UsageError(
            f"the key file {path} holds no key, so nobody could use the service; add a line: ltkd key NAME"
        )
    return tuple(keys.values())
