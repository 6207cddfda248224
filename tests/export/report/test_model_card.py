import json
import re

import pytest
import yaml
from huggingface_hub import ModelCard
from report_toys import SOURCE, passing, report_of, task_of

from export.report.model_card import model_card
from export.schema import ParityReport
from ltkd.contract.task import Task

TASK = task_of(12)


def card(task: Task = TASK, report: ParityReport | None = None) -> str:
    return model_card(task, SOURCE, report or report_of(100, "int8"))


def section(text: str, heading: str) -> str:
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_hugging_face_can_read_the_front_matter() -> None:
    data = ModelCard(card()).data
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("onnx", "image-classification", ["accuracy"])
    assert data.model_name == "cifar100-student"
    rows = [row for candidate in report_of(100, "int8").candidates[:2] for row in candidate.groups]
    assert [result.metric_value for result in data.eval_results] == [
        round(row.candidate_accuracy or 0, 6) for row in rows
    ]
    assert data.eval_results[2].metric_name == "accuracy, fp32, tail"
    assert data.eval_results[0].dataset_name == "the 10,000 test images of cifar100"


def test_the_card_has_all_sections_and_their_figures() -> None:
    text = card()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Intended use",
        "Data",
        "Accuracy by group",
        "Calibrated confidence",
        "How it was certified",
        "Limits",
        "Files",
        "Serve and verify",
    ]
    row = report_of(100, "int8").candidates[1].groups[2]
    assert row.candidate_accuracy is not None and row.reference_accuracy is not None
    fractions = [row.reference_accuracy, row.candidate_accuracy, row.loss_upper_limit, 0.01]
    figures = " | ".join(f"{100 * value:.2f}" for value in fractions)
    assert f"| fp16 | tail | {row.num_images:,} | {figures} |" in section(text, "Accuracy by group")
    assert "| tail | 4 | 40 | 5 to 17 |" in section(text, "Data")
    assert "no guarantee of 90" in section(text, "Calibrated confidence")
    assert "1,000 of the certification images are random augmented views" in section(text, "How it was certified")
    assert "not independent images" in section(text, "Limits")
    assert "`model.fp16.onnx` | 570,000 bytes" in section(text, "Files")


def test_a_precision_that_did_not_pass_is_named_without_results() -> None:
    text = card()
    assert "Not certified and therefore not in this bundle: int8." in text
    assert "model.int8.onnx" not in text and "| int8 |" not in text
    assert "model.int8.onnx" in card(report=report_of(100))


def test_the_card_does_not_depend_on_measured_latency() -> None:
    report = report_of(100)
    candidates = tuple(candidate.model_copy(update={"latency": ()}) for candidate in report.candidates)
    assert card(report=report.model_copy(update={"candidates": candidates})) == card(report=report)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a | b", "![x](http://x)", "two\nlines", "**bold** `code`"]
)
def test_names_cannot_inject_markup(name: str) -> None:
    task = TASK.model_copy(update={"class_names": (name, *TASK.class_names[1:])})
    report = passing(report_of(12), None).model_copy(update={"name": name, "reference": name})
    front, _, body = card(task, report).removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["model-index"][0]["name"] == name
    assert name not in body
    assert not re.search(r"(?<!\\)<", body)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert json.dumps(name) in front


def test_a_card_of_a_thousand_classes_stays_short() -> None:
    text = model_card(task_of(1000), SOURCE, report_of(100))
    assert "and 240 more." in text
    assert len(text) < 20_000
