import json
import os
from pathlib import Path

import pytest

from ltkd.contract.records import VersionedRecord, read_record, write_atomically, write_record
from ltkd.errors import RunError


class Note(VersionedRecord):
    schema_version: int = 2
    text: str


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "note.json"


def test_a_record_is_read_as_it_was_written(path: Path) -> None:
    write_record(path, Note(text="Größe"))
    assert read_record(path, Note, RunError) == Note(text="Größe")


def test_a_record_with_an_older_schema_version_can_be_read(path: Path) -> None:
    path.write_text('{"schema_version": 1, "text": "a"}')
    assert read_record(path, Note, RunError).schema_version == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a", "txet": "b"}', "not valid: txet: Extra inputs are not permitted; create it again"),
        (b"{}", "not valid: text: Field required"),
        (b'["a"]', "not valid: the whole file: Input should be a valid dictionary"),
        (
            b'{"schema_version": 3, "other": 1}',
            "schema version 3, but this ltkd reads versions up to 2; install a newer",
        ),
        (b'{"text": "a"', "not readable JSON"),
        (b"", "not readable JSON"),
        (b'{"text": "\xff"}', "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
    ],
)
def test_the_error_for_an_invalid_file_names_the_problem_in_one_line(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(RunError) as error:
        read_record(path, Note, RunError)
    assert str(error.value).startswith(f"{path} ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_in_its_place_are_errors(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"does not exist; check that .* is the right folder"):
        read_record(path, Note, RunError)
    with pytest.raises(RunError, match="not readable JSON"):
        read_record(tmp_path, Note, RunError)


def test_a_full_disk_keeps_the_old_content_and_leaves_no_temporary_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_record(path, Note(text="old"))

    def no_space(file: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, b"new")
    assert json.loads(path.read_text())["text"] == "old"
    assert [file.name for file in path.parent.iterdir()] == ["note.json"]
