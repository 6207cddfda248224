"""API keys: who sends a request, what this client may do, and how many requests a second it may send.

A key is 256 random bits; the key file has its SHA-256. A slow, salted hash (scrypt, argon2) protects passwords, which
can be guessed. 256 random bits cannot be guessed, and a slow hash would make every request slower and would let clients
overload the service with wrong keys.

    # name:role[,role...]:sha256 of the key[:limit in requests a second]
    camera-3:classify:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08:20

    classify   classify images, and report the true labels of the answers to this key
    feedback   report the true label of any answer
    metrics    read /metrics and /v1/groups
    admin      reload bundles and keys; includes all other roles

Without a key file administration is disabled, and everything else needs no key.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Annotated, Literal, Protocol, get_args

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from ltkd.errors import UsageError
from serve.problems import ProblemError, make_problem

Role = Literal["classify", "feedback", "metrics", "admin"]
ROLES: tuple[Role, ...] = get_args(Role)

_PREFIX = "ltkd_"  # lets scanners for leaked secrets recognise a key
_ROLE, _LIMIT = f"(?:{'|'.join(ROLES)})", r"(?=[0-9.]*[1-9])[0-9]{1,5}(?:\.[0-9]{1,3})?"
_LINE = re.compile(f"([A-Za-z0-9._-]{{1,64}}):({_ROLE}(?:,{_ROLE})*):([0-9a-f]{{64}})(?::({_LIMIT}))?")
_FORM = "name:role[,role...]:sha256[:limit]"
_ROUNDING = 1e-6  # tokens; more than the rounding errors of the time
_CHALLENGE = 'Bearer realm="ltkd"'
_BEARER = "bearer "
_SCHEME = HTTPBearer(auto_error=False, description="Required if the service was started with a key file.")


@dataclass(frozen=True)
class Key:
    """The entry of a key in the key file. It has the hash of the key, not the key itself.

    Attributes:
        name: Identifies the client in the log and the metrics; empty if the service has no key file.
        roles: What the key allows; all roles if the file has ``admin``.
        sha256: The hash of the key.
        limit: The number of requests a second that are accepted; None for any number.
    """

    name: str
    roles: frozenset[Role]
    sha256: bytes
    limit: float | None = None


ANYONE = Key("", frozenset(ROLES) - {"admin"}, b"")
"""The client of every request if the service has no key file."""


class Identified(Protocol):
    """A request whose key the check has found; see ``RequestContext`` in serve/http/service.py.

    Attributes:
        key: The name of the key.
        over_limit: Whether the request was rejected because the key has sent too many.
    """

    key: str
    over_limit: bool


class Keys:
    """The valid keys, and the check of a request's key against them.

    Args:
        path: The key file; None for a service without keys.
        clock: The time in seconds.

    Raises:
        UsageError: The file cannot be read, is empty or has a malformed line.
    """

    def __init__(self, path: Path | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._keys = read_keys(path) if path else ()
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # tokens, and when there were so many

    def reload(self) -> None:
        """Read the key file again. If that fails, the previous keys stay valid. A reload does not refill the buckets.

        Raises:
            UsageError: The file cannot be read, is empty or has a malformed line.
        """
        if self._path:
            self._keys = read_keys(self._path)

    def authorise(self, authorization: str, *roles: Role, context: Identified | None = None) -> Key:
        """Check the key of a request, and count the request against the limit of the key.

        Args:
            authorization: The request's ``Authorization`` header; empty if it has none.
            roles: The key needs one of these roles. With none given, any valid key is accepted.
            context: Receives the name of the key, also if the request is rejected.

        Raises:
            ProblemError: 401 if the key is missing or invalid, 403 if its roles do not allow the request, 429 if the
                key has sent more requests than its limit.
        """
        if not self._path:
            if not roles or not ANYONE.roles.isdisjoint(roles):
                return ANYONE
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
        if context:
            context.key = key.name
        if wait := ceil(self._take(key)):
            if context:
                context.over_limit = True
            detail = f"the key {key.name} is limited to {key.limit:g} requests a second; try again in {wait} s."
            raise ProblemError(make_problem(429, detail), {"Retry-After": str(wait)})
        if roles and key.roles.isdisjoint(roles):
            own = " and ".join(role for role in ROLES if role in key.roles)
            detail = (
                f"the key {key.name} has the role {own}; this route needs a key with the role {' or '.join(roles)}."
            )
            raise ProblemError(make_problem(403, detail))
        return key

    def requires(self, *roles: Role) -> Callable[..., Awaitable[Key]]:
        """Return a FastAPI dependency that calls ``authorise`` for the request."""

        async def authorised(
            request: Request, _: Annotated[HTTPAuthorizationCredentials | None, Security(_SCHEME)]
        ) -> Key:
            context: Identified | None = getattr(request.state, "context", None)
            return self.authorise(request.headers.get("authorization", ""), *roles, context=context)

        return authorised

    def _take(self, key: Key) -> float:
        """Take a token from the bucket of a key.

        A bucket holds the requests of one second, at least one request. It belongs to the name of a key, so it stays as
        it is if a reload changes the key or its limit.

        Returns:
            0, or the seconds until there is a token.
        """
        if not key.limit:
            return 0.0
        now, size = self._clock(), max(1.0, key.limit)
        tokens, then = self._buckets.get(key.name, (size, now))
        tokens = min(size, tokens + (now - then) * key.limit)
        if tokens < 1 - _ROUNDING:
            return (1 - tokens) / key.limit
        self._buckets[key.name] = tokens - 1, now
        return 0.0

    def _find(self, presented: str) -> Key | None:
        """Find the entry of a key. It is compared with every entry, each time in constant time."""
        digest = hashlib.sha256(presented.encode("utf-8", "surrogateescape")).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def make_key(name: str, *roles: Role, limit: float | None = None) -> tuple[str, str]:
    """Create a key and its line for the key file.

    Args:
        name: Name of the client.
        roles: What the key allows.
        limit: The number of requests a second that are accepted; None for any number.

    Returns:
        The key, which is not stored anywhere, and the line.

    Raises:
        UsageError: The name has characters that are not allowed in the key file, a role does not exist, or the limit is
            out of range.
    """
    key = _PREFIX + secrets.token_urlsafe(32)
    line = f"{name}:{','.join(roles)}:{hashlib.sha256(key.encode()).hexdigest()}"
    if limit is not None:
        line += ":" + f"{limit:.3f}".rstrip("0").rstrip(".")
    if not _LINE.fullmatch(line):
        raise UsageError(
            "a key's name has 1 to 64 letters, digits, dots, dashes and underscores, its roles are from "
            f"{', '.join(ROLES)}, and its limit is from 0.001 to 99999 requests a second; got {name!r}, "
            f"{','.join(roles)!r} and {limit}."
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
            detail = f"line {number} of the key file {path} is not {_FORM}"
            raise UsageError(f"{detail}; create a line with: ltkd key NAME")
        name, roles, digest, limit = parts.groups()
        if name in keys:
            raise UsageError(
                f"line {number} of the key file {path} repeats the name {name}; give each key its own name."
            )
        keys[name] = Key(name, _roles(roles.split(",")), bytes.fromhex(digest), float(limit) if limit else None)
    if not keys:
        raise UsageError(
            f"the key file {path} has no keys, so no client could use the service; create a line with: ltkd key NAME"
        )
    return tuple(keys.values())


def _roles(names: Sequence[str]) -> frozenset[Role]:
    return frozenset(role for role in ROLES if role in names or "admin" in names)
