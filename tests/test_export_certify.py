import io
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from export_toys import TASK, coloured_images, damaged, toy
from numpy.typing import NDArray
from rich.console import Console
from safetensors.torch import save_file

from export import certify as certify_module
from export.certify import Export, certify, export_run, judge, spread_over_groups
from export.convert import to_onnx
from export.gates import Margins
from export.parity import EXIT_CODES, ParityReport, parity_table
from export.verify import verify_bundle
from ltkd.bundle import Manifest, open_bundle, record_of
from ltkd.config import DataConfig, Execution, MethodConfig, Recipe, RunConfig
from ltkd.data import ImageData
from ltkd.errors import BundleError, DataError, RunError
from ltkd.networks import build_network
from ltkd.records import read_record, sha256_of, write_record

LOOSE = Margins(overall=0.05, group=0.05)  # 60 images of a group certify it


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete run of a small network, as training leaves it; its weights are random."""
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


def data_of(images_per_class: int) -> ImageData:
    images, labels = coloured_images([images_per_class] * 6, seed=2)
    return ImageData(TASK, images[:0], labels[:0], images, labels, mirror=False)


@pytest.fixture(scope="module")
def made(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Export:
    return export_run(run_dir, tmp_path_factory.mktemp("bundles") / "tiny", LOOSE, data_of(40))


def copy_of(bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle, tmp_path / "copy"))


def bias_of(bundle: Path) -> str:
    """Name of the classifier's bias, the one weight with an entry a class."""
    model = onnx.load_model(bundle / "model.onnx")
    (name,) = [tensor.name for tensor in model.graph.initializer if list(tensor.dims) == [6]]
    return str(name)


def forge(bundle: Path, model: bytes) -> None:
    """Replace the model and make every hash agree, as somebody with a text editor could."""
    (bundle / "model.onnx").write_bytes(model)
    record = record_of(bundle / "model.onnx")
    report = read_record(bundle / "parity.json", ParityReport, BundleError)
    write_record(bundle / "parity.json", report.model_copy(update={"candidate_sha256": record.sha256}))
    update = {"precisions": {"fp32": record}, "parity": record_of(bundle / "parity.json")}
    write_record(bundle / "manifest.json", open_manifest(bundle).model_copy(update=update))


def open_manifest(bundle: Path) -> Manifest:
    return read_record(bundle / "manifest.json", Manifest, BundleError)


@pytest.fixture
def convert_no_more(made: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same network gives the same bytes, so they are taken from the bundle; it saves seconds a test."""
    content = (made.path / "model.onnx").read_bytes()
    monkeypatch.setattr(certify_module, "to_onnx", lambda network, task: content)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_any_module_can_be_certified_at_the_strict_margins() -> None:
    content, report = certify(toy().network, TASK, toy().images, toy().labels, "toys")
    assert content == toy().candidate
    assert report.verdict == "PASS"
    assert [gate.verdict for gate in report.gates] == ["PASS"] * 4
    assert [row.group for row in report.groups] == ["head", "medium", "tail", "all"]
    assert 0.6 < report.groups[-1].reference_accuracy < 0.995  # the toy errs, so parity is not trivial


def test_a_candidate_that_fails_the_structure_is_asked_nothing_more() -> None:
    report = judge(b"no model", toy().network, TASK, toy().images[:5], toy().labels[:5], "toys")
    assert (report.verdict, len(report.gates), report.groups) == ("FAIL", 1, ())


def test_a_run_that_passes_becomes_a_bundle_that_verifies(made: Export, run_dir: Path) -> None:
    assert made.report.verdict == "PASS"
    assert set(content_of(made.path)) == {"model.onnx", "manifest.json", "parity.json", "golden.npz"}
    bundle = verify_bundle(made.path)
    assert bundle.manifest.name == "tiny"
    assert bundle.manifest.task == TASK
    assert bundle.manifest.certified_on == "the 240 test images of glyphs"
    assert bundle.manifest.source.weights_sha256 == sha256_of(run_dir / "weights.safetensors")
    assert read_record(made.path / "parity.json", ParityReport, BundleError) == made.report


def test_golden_samples_come_from_every_group(made: Export) -> None:
    golden = open_bundle(made.path).golden()
    groups = TASK.groups.index[golden.labels_M]
    assert np.bincount(groups).tolist() == [4, 4, 4]
    assert len(set(golden.labels_M.tolist())) == 6


def test_exporting_twice_gives_the_same_bundle(made: Export, run_dir: Path, tmp_path: Path) -> None:
    again = export_run(run_dir, tmp_path / "tiny", LOOSE, data_of(40))
    assert content_of(again.path) == content_of(made.path)


@pytest.mark.usefixtures("convert_no_more")
def test_too_few_images_leave_no_bundle_but_the_candidate_and_its_report(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certify_module, "topped_up", lambda data, margins: (data.test_images, data.test_labels, 0))
    export = export_run(run_dir, tmp_path / "tiny", data=data_of(40))
    assert export.report.verdict == "INCONCLUSIVE"
    assert export.path == tmp_path / "rejected" / "tiny"
    assert set(content_of(export.path)) == {"candidate.onnx", "parity.json"}
    assert [path.name for path in tmp_path.iterdir()] == ["rejected"]


def test_too_few_images_are_topped_up_with_views_and_the_report_says_so(run_dir: Path, tmp_path: Path) -> None:
    export = export_run(run_dir, tmp_path / "tiny", data=data_of(40))
    assert export.report.verdict == "PASS"
    assert "the 240 test images of glyphs, too few to certify alone, and 1," in export.report.data.description
    assert export.report.data.num_images >= 3 * 539


def test_a_failing_gate_leaves_the_earlier_bundle_untouched(
    made: Export, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(made.path, tmp_path / "tiny"))
    before = content_of(out)
    monkeypatch.setattr(certify_module, "to_onnx", lambda network, task: toy().candidate)  # another network's file
    export = export_run(run_dir, out, LOOSE, data_of(40))
    assert export.report.verdict == "FAIL"
    assert content_of(out) == before
    assert not list(tmp_path.rglob("rejected/**/model*.onnx"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rejected", "tiny"]


def test_a_directory_that_is_no_bundle_is_refused_before_anything_else(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="is not a bundle"):
        export_run(tmp_path / "no run", tmp_path)
    assert content_of(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_data_set_that_changed_since_training_is_refused(run_dir: Path, tmp_path: Path) -> None:
    other = data_of(1)
    other_task = TASK.model_copy(update={"train_counts": (1, 2, 3, 4, 5, 6)})
    changed = ImageData(other_task, other.train_images, other.train_labels, other.test_images, other.test_labels, False)
    with pytest.raises(RunError, match="trained on other images"):
        export_run(run_dir, tmp_path / "tiny", LOOSE, changed)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 9, 9, 3), np.uint8), np.zeros(2, np.int64), "expected uint8"),
        (np.zeros((2, 8, 8, 3), np.float32), np.zeros(2, np.int64), "expected uint8"),
        (np.zeros((0, 8, 8, 3), np.uint8), np.zeros(0, np.int64), "at least one"),
        (np.zeros((2, 8, 8, 3), np.uint8), np.array([0, 6]), "classes 0 to 5"),
    ],
)
def test_images_that_do_not_fit_the_task_are_refused(
    images: NDArray[np.uint8], labels: NDArray[np.int64], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        judge(toy().candidate, toy().network, TASK, images, labels, "toys")


def test_a_reference_that_is_broken_itself_is_refused() -> None:
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 6))
    torch.nn.init.constant_(network[1].weight, float("nan"))  # type: ignore[arg-type]
    with pytest.raises(RunError, match=r"not finite \(image 0\)"):
        judge(to_onnx(network, TASK), network, TASK, toy().images[:20], toy().labels[:20], "toys")


def test_a_changed_byte_is_noticed(made: Export, tmp_path: Path) -> None:
    copied = copy_of(made.path, tmp_path)
    content = bytearray((copied / "model.onnx").read_bytes())
    content[-1] ^= 1
    (copied / "model.onnx").write_bytes(content)
    with pytest.raises(BundleError, match="was changed after export"):
        verify_bundle(copied)


def test_a_model_that_no_longer_answers_like_its_golden_samples_is_noticed(made: Export, tmp_path: Path) -> None:
    copied = copy_of(made.path, tmp_path)
    forge(copied, damaged((copied / "model.onnx").read_bytes(), bias_of(copied), lambda bias: bias + 0.1))
    with pytest.raises(BundleError, match=r"answers its golden images with logits that are 0\.1 off"):
        verify_bundle(copied)


def test_a_report_of_another_model_is_noticed(made: Export, tmp_path: Path) -> None:
    copied = copy_of(made.path, tmp_path)
    write_record(copied / "parity.json", made.report.model_copy(update={"verdict": "FAIL"}))
    write_record(
        copied / "manifest.json", open_manifest(copied).model_copy(update={"parity": record_of(copied / "parity.json")})
    )
    with pytest.raises(BundleError, match="says FAIL"):
        verify_bundle(copied)


def test_a_bundle_with_a_broken_model_is_one_clear_line(made: Export, tmp_path: Path) -> None:
    copied = copy_of(made.path, tmp_path)
    forge(copied, b"no model")
    with pytest.raises(BundleError, match="no ONNX model") as error:
        verify_bundle(copied)
    assert "\n" not in str(error.value)


def test_samples_are_spread_over_groups_and_their_classes() -> None:
    labels = np.array([0] * 100 + [1] * 100 + [4] * 3)
    picked = spread_over_groups(labels, TASK.groups, 4)
    assert labels[picked].tolist() == [0, 0, 1, 1, 4, 4, 4]
    assert len(set(picked.tolist())) == 7


def test_the_table_shows_a_row_a_group_in_per_cent(made: Export) -> None:
    console = Console(width=140, record=True, file=io.StringIO())
    console.print(parity_table(made.report))
    text = console.export_text()
    tail = next(line for line in text.splitlines() if "tail" in line)
    assert " 5.00 " in tail
    assert tail.split()[-1] == "PASS"
    assert "G3 task PASS" in text


def test_every_verdict_has_an_exit_code_of_its_own() -> None:
    assert EXIT_CODES == {"PASS": 0, "FAIL": 1, "INCONCLUSIVE": 3}
