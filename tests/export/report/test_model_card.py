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


def test_the_front_matter_is_what_hugging_face_reads() -> None:
    data = ModelCard(card()).data
    assert (data.library_name, data.pipeline_tag, data.metrics) == ("onnx", "image-classification", ["accuracy"])
    assert data.model_name == "cifar100-student"
    rows = [row for candidate in report_of(100, "int8").candidates[:2] for row in candidate.groups]
    assert [result.metric_value for result in data.eval_results] == [
        round(row.candidate_accuracy or 0, 6) for row in rows
    ]
    assert data.eval_results[2].metric_name == "accuracy, fp32, tail"
    assert data.eval_results[0].dataset_name == "the 10,000 test images of cifar100"


def test_it_says_everything_that_a_stranger_has_to_know() -> None:
    text = card()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == [
        "Intended use",
        "Data",
        "Accuracy by group",
        "What confidence means",
        "How it was certified",
        "Limits",
        "Files",
        "Serve and verify",
    ]
    row = report_of(100, "int8").candidates[1].groups[2]
    assert row.candidate_accuracy is not None and row.reference_accuracy is not None
    shown = [row.reference_accuracy, row.candidate_accuracy, row.loss_upper_limit, 0.01]
    figures = " | ".join(f"{100 * value:.2f}" for value in shown)
    assert f"| fp16 | tail | {row.num_images:,} | {figures} |" in section(text, "Accuracy by group")
    assert "| tail | 4 | 40 | 5 to 17 |" in section(text, "Data")
    assert "no guarantee of 90" in section(text, "What confidence means")
    assert "1,000 of the certification images are random views" in section(text, "How it was certified")
    assert "not independent images" in section(text, "Limits")
    assert "`model.fp16.onnx` | 570,000 bytes" in section(text, "Files")


def test_what_did_not_pass_is_named_and_nothing_is_claimed_of_it() -> None:
    text = card()
    assert "Tried and not certified, so not in this bundle: int8." in text
    assert "model.int8.onnx" not in text and "| int8 |" not in text
    assert "model.int8.onnx" in card(report=report_of(100))


def test_a_new_measurement_of_speed_gives_the_same_card() -> None:
    report = report_of(100)
    candidates = tuple(candidate.model_copy(update={"latency": ()}) for candidate in report.candidates)
    assert card(report=report.model_copy(update={"candidates": candidates})) == card(report=report)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "a | b", "![x](http://x)", "two\nlines", "**bold** `code`"]
)
def test_names_are_text_whatever_they_hold(name: str) -> None:
    task = TASK.model_copy(update={"class_names": (name, *TASK.class_names[1:])})
    report = passing(report_of(12), None).model_copy(update={"name": name, "reference": name})
    front, _, body = card(task, report).removeprefix("---\n").partition("\n---\n")
    assert yaml.safe_load(front)["model-index"][0]["name"] == name
    assert name not in body
    assert not re.search(r"(?<!\\)<", body)
    rows = [line for line in body.splitlines() if line.startswith("|")]
    assert all(line.endswith("|") for line in rows)
    assert json.dumps(name) in front


def test_a_thousand_classes_stay_a_page() -> None:
    text = model_card(task_of(1000), SOURCE, report_of(100))
    assert "and 240 more." in text
    assert len(text) < 20_000
