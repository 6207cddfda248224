"""The published JSON schemas of the files in a bundle.

To update them: PYTHONPATH=tests python tests/export/test_schema.py
"""

import json
from pathlib import Path

import jsonschema_rs
import pytest
from report_toys import idle_bundle, report_of

from export.schema import ParityReport
from ltkd.contract.bundle import Manifest
from ltkd.contract.records import VersionedRecord, json_schema, write_atomically, write_record

DOCS = Path(__file__).parents[2] / "docs"
PUBLISHED: dict[str, type[VersionedRecord]] = {"parity.schema.json": ParityReport, "manifest.schema.json": Manifest}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schema_matches_the_records(name: str) -> None:
    assert (DOCS / name).read_text() == json_schema(PUBLISHED[name]), (
        "run: PYTHONPATH=tests python tests/export/test_schema.py"
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_schema_is_valid_and_has_no_id(name: str) -> None:
    schema = json.loads((DOCS / name).read_text())
    jsonschema_rs.meta.validate(schema)
    assert "$id" not in schema
    assert schema["additionalProperties"] is False
    assert set(schema["required"]) == set(PUBLISHED[name].model_fields)


@pytest.mark.parametrize("failing", [None, "fp32", "int8"])
def test_a_real_report_is_valid_and_a_damaged_one_is_not(failing: str | None, tmp_path: Path) -> None:
    validator = jsonschema_rs.validator_for(json.loads((DOCS / "parity.schema.json").read_text()))
    write_record(tmp_path / "parity.json", report_of(12, failing))  # type: ignore[arg-type]
    report = json.loads((tmp_path / "parity.json").read_text())
    validator.validate(report)
    for damaged in ({**report, "verdict": "MAYBE"}, {**report, "notes": ""}, {**report, "candidates": [{}]}):
        assert not validator.is_valid(damaged)


def test_a_real_manifest_is_valid(tmp_path: Path) -> None:
    validator = jsonschema_rs.validator_for(json.loads((DOCS / "manifest.schema.json").read_text()))
    validator.validate(json.loads((idle_bundle(tmp_path / "student") / "manifest.json").read_text()))


if __name__ == "__main__":
    for name, kind in PUBLISHED.items():
        write_atomically(DOCS / name, json_schema(kind).encode())
