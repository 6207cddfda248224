"""JSON records on disk: strict, versioned, and written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ltkd.errors import LtkdError


class Record(BaseModel):
    """A frozen record that refuses fields it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VersionedRecord(Record):
    """A record with a file of its own; the schema version rises when a reader would misunderstand."""

    schema_version: int = 1


MAX_RECORD_BYTES = 2**27
"""The largest file of JSON that is read; the report of ten thousand classes has some ten million bytes."""

AnyVersionedRecord = TypeVar("AnyVersionedRecord", bound=VersionedRecord)


def read_record(path: Path, kind: type[AnyVersionedRecord], error: type[LtkdError]) -> AnyVersionedRecord:
    """Read one JSON record.

    Args:
        path: The file.
        kind: What it must hold; its default ``schema_version`` is the newest one understood.
        error: Raised, with what was seen and what to do, when the file is missing, of a newer schema or invalid.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_RECORD_BYTES + 1)
        if len(text) > MAX_RECORD_BYTES:
            raise error(f"{path} has more than {MAX_RECORD_BYTES:,} bytes, which no record has; make it again.")
        content = json.loads(text)
    except FileNotFoundError:
        raise error(f"{path} does not exist; is {path.parent} the right folder?") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} is not readable JSON ({reason}); make it again.") from None
    known = kind.model_fields["schema_version"].default
    seen = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(seen, int) and seen > known:
        raise error(f"{path} has schema version {seen}, this ltkd reads up to {known}; install a newer ltkd.")
    try:
        return kind.model_validate(content)
    except ValidationError as reason:
        first = reason.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise error(f"{path} is not valid: {field}: {first['msg']}; make it again.") from None


def json_schema(kind: type[VersionedRecord]) -> str:
    """The JSON schema of a record's file, as it is published: every field is there, whether or not it has a default."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema(mode="serialization")}
    for part in (schema, *schema["$defs"].values()):
        if "properties" in part:
            part["required"] = list(part["properties"])
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write_record(path: Path, record: Record) -> None:
    """Write one record as indented JSON, whole or not at all."""
    write_whole(path, (record.model_dump_json(indent=2) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it: readers see the old content or the new, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
