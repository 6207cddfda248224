"""API keys: authentication of clients, with one role for classification and one for administration.

A key is 256 random bits; the key file has its SHA-256. A slow, salted hash (scrypt, argon2) protects passwords, which
can be guessed. 256 random bits cannot be guessed, and a slow hash would make every request slower and would let clients
overload the service with wrong keys.

    # name:role:sha256 of the key
    camera-3:classify:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08

Without a key file classification needs no key and administration is disabled.
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
from serve.problems import ProblemError, make_problem

Role = Literal["classify", "admin"]
"""``admin`` includes ``classify`` and allows administration, such as reloading."""

_PREFIX = "ltkd_"  # lets scanners for leaked secrets recognise a key
_LINE = re.compile(r"([A-Za-z0-9._-]{1,64}):(classify|admin):([0-9a-f]{64})")
_CHALLENGE = 'Bearer realm="ltkd"'
_BEARER = "bearer "
_SCHEME = HTTPBearer(auto_error=False, description="Required if the service was started with a key file.")


@dataclass(frozen=True)
class Key:
    """The entry of a key in the key file. It has the hash of the key, not the key itself."""

    name: str
    role: Role
    sha256: bytes


class Keys:
    """The valid keys, and the check of a request's key against them.

    Args:
        path: The key file. With None classification needs no key and administration is disabled.

    Raises:
        UsageError: The file cannot be read, is empty or has a malformed line.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._keys = read_keys(path) if path else ()

    def reload(self) -> None:
        """Read the key file again. If that fails, the previous keys stay valid.

        Raises:
            UsageError: The file cannot be read, is empty or has a malformed line.
        """
        if self._path:
            self._keys = read_keys(self._path)

    def authorise(self, authorization: str, role: Role) -> str:
        """Check the key of a request.

        Args:
            authorization: The request's ``Authorization`` header; empty if it has none.
            role: The role that the route requires.

        Returns:
            The name of the key; empty if no key is needed.

        Raises:
            ProblemError: 401 if the key is missing or invalid, 403 if its role does not allow the request.
        """
        if not self._path:
            if role == "classify":
                return ""
            detail = "administration is disabled because the service has no key file; start it with --key-file."
            raise ProblemError(make_problem(403, detail))
        if authorization[: len(_BEARER)].lower() != _BEARER:
            detail = "this route needs an API key; send the header 'Authorization: Bearer KEY'."
            raise ProblemError(make_problem(401, detail), {"WWW-Authenticate": _CHALLENGE})
        key = self._find(authorization[len(_BEARER) :].strip())
        if key is None:
            challenge = {"WWW-Authenticate": f'{_CHALLENGE}, error="invalid_token"'}
            detail = "the API key is not valid; ask the operator of the service for a valid one."
            raise ProblemError(make_problem(401, detail), challenge)
        if role == "admin" and key.role != "admin":
            detail = f"the key {key.name} has the role {key.role}; this route needs a key with the role {role}."
            raise ProblemError(make_problem(403, detail))
        return key.name

    def requires(self, role: Role) -> Callable[..., Awaitable[str]]:
        """Return a FastAPI dependency for routes that need this role; its value is the name of the key."""

        async def authorised(
            request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_SCHEME)]
        ) -> str:
            return self.authorise(request.headers.get("authorization", ""), role)

        return authorised

    def _find(self, presented: str) -> Key | None:
        """Find the entry of a key. It is compared with every entry, each time in constant time."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def make_key(name: str, role: Role) -> tuple[str, str]:
    """Create a key and its line for the key file.

    Returns:
        The key, which is not stored anywhere, and the line.

    Raises:
        UsageError: The name has characters that are not allowed in the key file, or the role does not exist.
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
    """Read a key file. Empty lines and lines that begin with ``#`` are ignored.

    Raises:
        UsageError: The file cannot be read, has no keys, has a malformed line or has a name twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as reason:
        why = reason.strerror if isinstance(reason, OSError) else "it is not text"
        raise UsageError(f"the key file {path} cannot be read ({why}); create a key with: ltkd key NAME") from None
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        parts = _LINE.fullmatch(line.strip())
        if not parts:  # the message does not quote the line, which may be the key itself
            detail = f"line {number} of the key file {path} is not name:role:sha256"
            raise UsageError(f"{detail}; create a line with: ltkd key NAME")
        name, role, digest = parts.groups()
        if name in keys:
            raise UsageError(
                f"line {number} of the key file {path} repeats the name {name}; give each key its own name."
            )
        keys[name] = Key(name, "admin" if role == "admin" else "classify", bytes.fromhex(digest))
    if not keys:
        raise UsageError(
            f"the key file {path} has no keys, so no client could use the service; create a line with: ltkd key NAME"
        )
    return tuple(keys.values())
