import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from export_toys import TAIL_CLASSES, TASK, coloured_images, damaged, toy
from numpy.typing import NDArray
from safetensors.torch import save_file

from export import bundling as bundling_module
from export.bundling import Export, export_run
from export.certification import certify as certify_module
from export.certification.accuracy_margins import margins_for
from export.certification.candidate import assess_candidate
from export.certification.certify import Certification, ExportRequirements, certify
from export.certification.reference import reference_of, spread_over_groups
from export.certification.splits import Splits, split_test_images
from export.conversion.fp32 import to_onnx
from export.schema import EXIT_CODES, ParityReport
from export.verify import verify_bundle
from ltkd.config import DataConfig, Execution, MethodConfig, Recipe, RunConfig
from ltkd.contract.bundle import open_bundle
from ltkd.contract.records import read_record, sha256_of, write_record
from ltkd.data.datasets import Dataset
from ltkd.data.image_files import LabelledImages
from ltkd.errors import BundleError, DataError, DeviceError, RunError, UsageError
from ltkd.models.registry import build_network

FP32 = margins_for("fp32", {}, TASK.groups)
LOOSE = ExportRequirements(
    ("fp32",), {"head": 0.05, "medium": 0.05, "tail": 0.05, "all": 0.05}
)  # some 60 images per group are enough


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run folder of a small network with random weights."""
    path = tmp_path_factory.mktemp("runs") / "tiny"
    path.mkdir()
    write_record(
        path / "config.json",
        RunConfig(
            data=DataConfig(name="glyphs"),
            model="resnet8",
            method=MethodConfig(name="ce", parameters={}),
            recipe=Recipe(name="one", epochs=1, peak_learning_rate=0.1, schedule="one-cycle"),
            seed=0,
            execution=Execution(device="cpu"),
            versions={},
        ),
    )
    write_record(path / "task.json", TASK)
    (path / "metrics.jsonl").write_text('{"epoch": 1, "loss": 1.0, "accuracy_all": 0.5}\n')
    save_file(build_network("resnet8", 6, 0).state_dict(), path / "weights.safetensors")
    return path


def data_of(images_per_class: int) -> Dataset:
    images, labels = coloured_images([images_per_class] * 6, seed=2)
    return Dataset(TASK, images[:0], labels[:0], images, labels, mirror=False)


def toy_splits(num_images: int = 10_000) -> Splits:
    images, labels = toy().images[:num_images], toy().labels[:num_images]
    return split_test_images(Dataset(TASK, images[:0], labels[:0], images, labels, mirror=False), FP32)


@pytest.fixture(scope="module")
def exported(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export_run(run_dir, tmp_path_factory.mktemp("bundles") / "tiny", LOOSE, data_of(80))


@pytest.fixture(scope="module")
def all_precisions() -> Certification:
    """The toy network in every precision that this machine can certify."""
    return certify(toy().network, TASK, toy_splits(), "toy", "toys")


@pytest.fixture
def reuse_onnx(exported: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the ONNX file from the bundle instead of converting again, which saves seconds per test."""
    assert exported.bundle is not None
    content = (exported.bundle / "model.onnx").read_bytes()
    monkeypatch.setattr(certify_module, "to_onnx", lambda network, task: content)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_network_is_certified_in_every_precision_at_the_default_margins(all_precisions: Certification) -> None:
    report = all_precisions.report
    assert all_precisions.contents["fp32"] == toy().candidate
    assert [(candidate.precision, candidate.verdict) for candidate in report.candidates[:2]] == [
        ("fp32", "PASS"),
        ("int8", "PASS"),
    ]
    for candidate in report.candidates:
        assert [row.group for row in candidate.groups] == ["head", "medium", "tail", "all"]
        assert [latency.batch for latency in candidate.latency] == [1, 32]
        assert candidate.certificate is not None
    # the toy network makes errors, so parity is not trivial
    assert 0.6 < (report.candidates[0].groups[-1].reference_accuracy or 0) < 0.995
    assert [gate.name[:2] for gate in report.candidates[0].gates] == ["G0", "G1", "G2", "G3", "G4", "G5"]
    assert [gate.name[:2] for gate in report.candidates[1].gates] == ["G0", "G2", "G3", "G4", "G5"]


def test_the_int8_configuration_is_chosen_by_its_worst_group_and_every_trial_is_reported(
    all_precisions: Certification,
) -> None:
    trials = all_precisions.report.candidates[1].quantisation
    (chosen,) = [trial for trial in trials if trial.chosen]
    assert len(trials) > 1
    assert chosen.worst_group_loss <= min(trial.worst_group_loss for trial in trials if not trial.float_layers)


def test_images_that_influenced_a_candidate_do_not_certify_it(all_precisions: Certification) -> None:
    splits = toy_splits()
    record = {part.name: part for part in all_precisions.report.data.splits}
    assert set(record) == {"quantisation", "selection", "confidence", "certify"}
    data = all_precisions.report.data
    assert sum(part.num_images for part in record.values()) + data.num_duplicates == 10_000 + data.num_views
    shared = dataclasses.replace(splits, quantisation=splits.certify)
    report = certify(toy().network, TASK, shared, "toy", "toys", LOOSE).report
    task = next(gate for gate in report.candidates[0].gates if gate.name == "G3 task")
    assert task.verdict == "FAIL"
    assert "are also in the quantisation split" in task.findings[0]


def test_a_candidate_that_fails_gate_g0_is_not_run_through_other_gates() -> None:
    splits = toy_splits(600)
    reference = reference_of(toy().network, TASK, splits, None)
    report = assess_candidate(b"no model", "model.onnx", "fp32", reference, FP32).report
    assert (report.verdict, len(report.gates), report.groups) == ("FAIL", 1, ())


def test_the_report_of_a_failing_candidate_names_the_layer_in_which_the_difference_arises() -> None:
    reference = reference_of(toy().network, TASK, toy_splits(), toy().candidate)

    def damage(bias_C: NDArray[np.float32]) -> NDArray[np.float32]:
        bias_C[TAIL_CLASSES] -= 100
        return bias_C

    candidate = damaged(toy().candidate, "network.classifier.bias", damage)
    report = assess_candidate(
        candidate, "model.onnx", "fp32", reference, margins_for("fp32", {"all": 0.2}, TASK.groups)
    ).report
    assert report.verdict == "FAIL"
    assert {row.group: row.verdict for row in report.groups} == {
        "head": "PASS", "medium": "PASS", "tail": "FAIL", "all": "PASS",
    }  # fmt: skip
    failed = [gate for gate in report.gates if gate.verdict == "FAIL"]
    assert all("the difference arises in" in gate.findings[-1] for gate in failed)


def test_a_run_that_passes_becomes_a_bundle_that_verifies(exported: Export, run_dir: Path) -> None:
    assert exported.report.verdict == "PASS"
    assert exported.bundle is not None and exported.rejected is None
    assert set(content_of(exported.bundle)) == {
        "model.onnx", "manifest.json", "parity.json", "parity.html", "README.md", "golden.npz",
    }  # fmt: skip
    manifest = verify_bundle(exported.bundle).manifest
    assert (manifest.name, manifest.task) == ("tiny", TASK)
    assert manifest.certified_on == "the 480 test images of glyphs"
    assert manifest.source.weights_sha256 == sha256_of(run_dir / "weights.safetensors")
    assert [group.group for group in manifest.precisions["fp32"].calibration] == ["head", "medium", "tail"]
    assert read_record(exported.bundle / "parity.json", ParityReport, BundleError) == exported.report


def test_golden_images_come_from_every_group(exported: Export) -> None:
    assert exported.bundle is not None
    golden = open_bundle(exported.bundle).golden()
    groups = TASK.groups.index[golden.labels_M]
    assert np.bincount(groups).tolist() == [4, 4, 4]
    assert len(set(golden.labels_M.tolist())) == 6


def test_exporting_twice_gives_the_same_bytes_but_for_measured_times(
    exported: Export, run_dir: Path, tmp_path: Path
) -> None:
    again = export_run(run_dir, tmp_path / "tiny", LOOSE, data_of(80))
    assert exported.bundle is not None and again.bundle is not None
    first, second = content_of(exported.bundle), content_of(again.bundle)
    for name in ("model.onnx", "golden.npz", "README.md"):
        assert first[name] == second[name]
    reports = [export.report.model_dump() for export in (exported, again)]
    for report in reports:
        for candidate in report["candidates"]:
            del candidate["latency"]
    assert reports[0] == reports[1]


@pytest.mark.usefixtures("reuse_onnx")
def test_with_too_few_images_there_is_no_bundle_but_a_rejected_candidate_with_its_report(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = split_test_images(
        data_of(80), margins_for("fp32", LOOSE.margins, TASK.groups)
    )  # enough for loose margins only
    monkeypatch.setattr(bundling_module, "split_test_images", lambda data, margins: few)
    export = export_run(run_dir, tmp_path / "tiny", data=data_of(80))
    assert export.report.verdict == "INCONCLUSIVE"
    assert (export.bundle, export.rejected) == (None, tmp_path / "rejected" / "tiny")
    assert set(content_of(tmp_path / "rejected" / "tiny")) == {"candidate.fp32.onnx", "parity.json", "parity.html"}
    assert [path.name for path in tmp_path.iterdir()] == ["rejected"]


def test_if_there_are_too_few_images_views_are_added_and_reported(run_dir: Path, tmp_path: Path) -> None:
    export = export_run(run_dir, tmp_path / "tiny", ExportRequirements(("fp32",)), data_of(40))
    assert export.report.verdict == "PASS"
    assert export.report.data.num_views > 1_000
    assert export.report.data.splits[-1].num_images >= 3 * 539


def test_a_failing_gate_leaves_the_earlier_bundle_untouched(
    exported: Export, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exported.bundle is not None
    out = Path(shutil.copytree(exported.bundle, tmp_path / "tiny"))
    before = content_of(out)
    monkeypatch.setattr(certify_module, "to_onnx", lambda network, task: toy().candidate)  # another network's file
    export = export_run(run_dir, out, LOOSE, data_of(80))
    assert export.report.verdict == "FAIL"
    assert content_of(out) == before
    assert not list(tmp_path.rglob("rejected/**/model*.onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rejected", "tiny"]


@pytest.mark.usefixtures("reuse_onnx")
def test_a_precision_that_fails_is_left_out_of_the_bundle(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fp32: bytes, *others: object) -> tuple[bytes, tuple[()]]:
        return b"no model", ()

    monkeypatch.setattr(certify_module, "search_int8", broken)
    margins = {**LOOSE.margins, "tail": 0.04}
    export = export_run(run_dir, tmp_path / "tiny", ExportRequirements(None, margins), data_of(80))
    assert export.report.verdict == "PASS"
    assert export.bundle is not None and export.rejected is not None
    assert list(verify_bundle(export.bundle).manifest.precisions) == ["fp32"]
    assert "candidate.int8.onnx" in content_of(export.rejected)
    assert "model.int8.onnx" not in content_of(export.bundle)


def test_requirements_that_cannot_be_met_are_rejected_before_the_export_starts(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify_module, "cuda_works", lambda: False)
    with pytest.raises(DeviceError, match="fp16 is certified on CUDA"):
        export_run(tmp_path / "no run", tmp_path / "tiny", ExportRequirements(("fp16",)))
    with pytest.raises(UsageError, match="tial"):
        export_run(run_dir, tmp_path / "tiny", ExportRequirements(("fp32",), {"tial": 0.1}), data_of(1))
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        export_run(tmp_path / "no run", tmp_path)
    assert content_of(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_data_set_that_changed_since_training_is_rejected(run_dir: Path, tmp_path: Path) -> None:
    other = data_of(1)
    other_task = TASK.model_copy(update={"train_counts": (1, 2, 3, 4, 5, 6)})
    changed = Dataset(other_task, other.train_images, other.train_labels, other.test_images, other.test_labels, False)
    with pytest.raises(RunError, match="trained with different images"):
        export_run(run_dir, tmp_path / "tiny", LOOSE, changed)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 9, 9, 3), np.uint8), np.zeros(2, np.int64), "expected uint8"),
        (np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, np.int64), "expected uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int64), "at least"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 6]), "classes 0 to 5"),
    ],
)
def test_images_that_do_not_fit_the_task_are_rejected(
    images: NDArray[np.uint8], labels: NDArray[np.int64], message: str
) -> None:
    part = LabelledImages(images, labels)
    with pytest.raises(DataError, match=message):
        certify(toy().network, TASK, Splits(part, part, part, part, 0, 0), "toy", "toys")


def test_a_reference_with_logits_that_are_not_finite_is_rejected() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6))
    torch.nn.init.constant_(network[1].weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"not finite \(image 0\)"):
        reference_of(network, TASK, toy_splits(600), to_onnx(network, TASK))


def test_samples_are_spread_over_groups_and_their_classes() -> None:
    labels = np.array([0] * 100 + [1] * 100 + [4] * 3)
    chosen = spread_over_groups(labels, TASK.groups, 4)
    assert labels[chosen].tolist() == [0, 0, 1, 1, 4, 4, 4]
    assert len(set(chosen.tolist())) == 7


def test_every_verdict_has_an_exit_code_of_its_own() -> None:
    assert EXIT_CODES == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
