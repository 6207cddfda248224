import json
import os
from pathlib import Path

import pytest

from ltkd.contract.records import VersionedRecord, read_record, write_record, write_whole
from ltkd.errors import RunError


class Note(VersionedRecord):
    schema_version: int = 2
    text: str


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "note.json"


def test_a_record_comes_back_as_it_was_written(path: Path) -> None:
    write_record(path, Note(text="Größe"))
    assert read_record(path, Note, RunError) == Note(text="Größe")


def test_an_older_schema_is_still_read(path: Path) -> None:
    path.write_text('{"schema_version": 1, "text": "a"}')
    assert read_record(path, Note, RunError).schema_version == 1


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"text": "a", "txet": "b"}', "not valid: txet: Extra inputs are not permitted; make it again"),
        (b"{}", "not valid: text: Field required"),
        (b'["a"]', "not valid: the whole file: Input should be a valid dictionary"),
        (b'{"schema_version": 3, "other": 1}', "schema version 3, this ltkd reads up to 2; install a newer ltkd"),
        (b'{"text": "a"', "not readable JSON"),
        (b"", "not readable JSON"),
        (b'{"text": "\xff"}', "not readable JSON"),
        (b"[" * 100_000, "not readable JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_one_line(path: Path, content: bytes, said: str) -> None:
    path.write_bytes(content)
    with pytest.raises(RunError) as error:
        read_record(path, Note, RunError)
    assert str(error.value).startswith(f"{path} ")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_folder_in_its_place_are_said(path: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"does not exist; is .* the right folder"):
        read_record(path, Note, RunError)
    with pytest.raises(RunError, match="not readable JSON"):
        read_record(tmp_path, Note, RunError)


def test_a_full_disk_leaves_the_old_content_and_no_part(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_record(path, Note(text="old"))

    def no_space(file: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert json.loads(path.read_text())["text"] == "old"
    assert [file.name for file in path.parent.iterdir()] == ["note.json"]
