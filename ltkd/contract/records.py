"""JSON records on disk. Unknown fields are rejected, files have a schema version, and writes are atomic."""

import hashlib
import json
import os
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from ltkd.errors import LtkdError


class Record(BaseModel):
    """A frozen record that rejects unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class VersionedRecord(Record):
    """A record with its own file; the schema version increases when older readers would misread the file."""

    schema_version: int = 1


MAX_RECORD_BYTES = 2**27
"""The largest JSON file that is read. The report for ten thousand classes has about ten million bytes."""

AnyVersionedRecord = TypeVar("AnyVersionedRecord", bound=VersionedRecord)


def read_record(path: Path, kind: type[AnyVersionedRecord], error: type[LtkdError]) -> AnyVersionedRecord:
    """Read one JSON record.

    Args:
        path: The file.
        kind: The type of the record; its default ``schema_version`` is the newest one that can be read.
        error: The error to raise if the file is missing, invalid or has a newer schema version.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_RECORD_BYTES + 1)
        if len(text) > MAX_RECORD_BYTES:
            raise error(f"{path} has more than {MAX_RECORD_BYTES:,} bytes, the limit for a record; create it again.")
        content = json.loads(text)
    except FileNotFoundError:
        raise error(f"{path} does not exist; check that {path.parent} is the right folder.") from None
    except (OSError, ValueError, RecursionError) as reason:
        raise error(f"{path} is not readable JSON ({reason}); create it again.") from None
    newest = kind.model_fields["schema_version"].default
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > newest:
        raise error(
            f"{path} has schema version {version}, but this ltkd reads versions up to {newest}; install a newer ltkd."
        )
    try:
        return kind.model_validate(content)
    except ValidationError as reason:
        first = reason.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise error(f"{path} is not valid: {field}: {first['msg']}; create it again.") from None


def json_schema(kind: type[VersionedRecord]) -> str:
    """The published JSON schema of a record's file. Every field is required, because defaults are written too."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **kind.model_json_schema(mode="serialization")}
    for part in (schema, *schema["$defs"].values()):
        if "properties" in part:
            part["required"] = list(part["properties"])
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"


def write_record(path: Path, record: Record) -> None:
    """Write one record atomically as indented JSON."""
    write_atomically(path, (record.model_dump_json(indent=2) + "\n").encode())


def write_atomically(path: Path, content: bytes) -> None:
    """Write a temporary file and rename it, so that readers see either the old or the new content."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
