"""Distributed training on two ranks gives the results of one process, and both ranks end together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from process_toys import RECIPE, TIMEOUT_S, on_ranks, plain_net, run_ltkd, run_ltkd_on_ranks
from torch import Tensor, nn
from training_toys import CPU, ToyNet, toy_data, write_tree

from ltkd.config import Parameter
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.records import sha256_of
from ltkd.data.batches import Shard, make_batches
from ltkd.errors import TrainingError
from ltkd.methods.losses import GroupIndex, LTKDLoss, ltkd_loss
from ltkd.methods.registry import build_method, method_config
from ltkd.models.registry import seeded
from ltkd.training.distributed import Distributed, init_distributed
from ltkd.training.loop import Student, TrainState, evaluate, train
from ltkd.training.teacher import Teacher

GROUPS = groups_by_share((50, 20, 10, 5, 2, 1))
COMMAND = ("train", "--data", "photos", "--model", "process_toys:net", "--recipe", "toy", "--device", "cpu", "--out")
ALL_METHODS: tuple[tuple[str, dict[str, Parameter]], ...] = (
    ("ce", {"logit_adjustment": 1.0, "reweight_after": 0.5}),
    ("kd", {}),
    ("dkd", {}),
    ("bkd", {}),
    ("ltkd", {}),
    ("ltkd_plus", {}),
)


def random_logits() -> tuple[Tensor, Tensor]:
    """Student and teacher logits for 64 images of 6 classes."""
    random = torch.Generator().manual_seed(0)
    student_NC, teacher_NC = 3 * torch.randn(2, 64, 6, generator=random, dtype=torch.float64)
    return student_NC, teacher_NC


def gradients(distributed: Distributed, momentum: float, summed_over_ranks: bool = True) -> Tensor:
    """The gradients of this rank's images at the third step."""
    if not summed_over_ranks:
        pytest.MonkeyPatch().setattr(torch.distributed, "is_initialized", lambda: False)
    loss = LTKDLoss(GROUPS, momentum=momentum).double()
    for number in range(3):
        student_NC, teacher_NC = (
            logits.roll(number, 1)[distributed.rank :: distributed.size] for logits in random_logits()
        )
        student_NC = student_NC.clone().requires_grad_()
        value = loss(student_NC, teacher_NC) if momentum else ltkd_loss(student_NC, teacher_NC, GroupIndex(GROUPS))
        (gradient_NC,) = torch.autograd.grad(value, student_NC)
    return gradient_NC


def in_order_of_one_process(rank_gradients: list[Tensor]) -> Tensor:
    """The gradients of both ranks in the order of one process, scaled for the mean over the ranks."""
    return torch.stack(rank_gradients, dim=1).flatten(0, 1) / len(rank_gradients)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_ranks_with_32_images_give_the_gradients_of_one_with_64(momentum: float) -> None:
    whole = gradients(Distributed(), momentum)
    # float64 sums of 64 terms: rounding is near 1e-16, the gradients near 1e-2; the running average is float32
    atol = 1e-7 if momentum else 1e-13
    torch.testing.assert_close(in_order_of_one_process(on_ranks(gradients, momentum)), whole, atol=atol, rtol=1e-10)
    separate = in_order_of_one_process(on_ranks(gradients, momentum, summed_over_ranks=False))
    assert (separate - whole).abs().max() > 1e-3  # without the sum over the ranks, each rank balances its own half


def trained(distributed: Distributed, batch_size: int) -> dict[str, tuple[dict[str, Tensor], float]]:
    """For every method, the weights after two epochs of 37 images and the loss of the last one."""
    data, results = toy_data(), {}
    with seeded(1):
        teacher = ToyNet().eval()
    recipe = RECIPE.model_copy(update={"epochs": 2, "batch_size": batch_size})
    for name, parameters in ALL_METHODS:
        with seeded(0):
            student = Student(plain_net(3))
        state = TrainState(
            student,
            torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9),
            torch.amp.GradScaler("cpu", enabled=False),
        )
        reports = list(
            train(
                state,
                data,
                make_batches(
                    data,
                    batch_size=batch_size,
                    seed=0,
                    device=torch.device("cpu"),
                    shard=Shard(distributed.rank, distributed.size),
                ),
                build_method(method_config(name, parameters)),
                recipe,
                teacher=Teacher(teacher, CPU),
                execution=CPU,
                distributed=distributed,
            )
        )
        results[name] = student.state_dict(), reports[-1].loss
    return results


# with batches of 8 the last batch has 5 images, 3 for one rank and 2 for the other; with batches of 7 all are uneven
@pytest.mark.parametrize("batch_size", [8, 7])
def test_two_ranks_train_the_weights_of_one_process_by_every_method(batch_size: int) -> None:
    whole, rank_results = trained(Distributed(), batch_size), on_ranks(trained, batch_size)
    for name, (weights, loss) in whole.items():
        for found, found_loss in (result[name] for result in rank_results):
            # float32, ten to twelve steps: sums in another order differ by about 1e-7 for weights near 1
            torch.testing.assert_close(found, weights, atol=2e-6, rtol=1e-5, msg=name)
            assert found_loss == pytest.approx(loss, rel=1e-5)
        first, second = (result[name][0] for result in rank_results)
        assert all(torch.equal(first[key], second[key]) for key in first), "the ranks have different weights"


def evaluated(distributed: Distributed) -> dict[str, float]:
    """Accuracy on 15 images of a network whose running statistics differ between the ranks."""
    with seeded(3):
        network = ToyNet()
    assert isinstance(network.bn, nn.BatchNorm1d) and network.bn.running_mean is not None
    network.bn.running_mean += 5 * distributed.rank
    return evaluate(network, toy_data(num_test=5), torch.device("cpu"), distributed)


def test_two_ranks_evaluate_an_odd_number_of_images_exactly_as_one_process() -> None:
    whole = evaluated(Distributed())
    assert on_ranks(evaluated) == [whole, whole]
    assert 0 < whole["all"] < 1


def shared_values(distributed: Distributed) -> tuple[list[int], bool, bool, float]:
    return (
        distributed.all_gather(10 * distributed.rank),
        distributed.any_rank(distributed.rank == 1),
        distributed.any_rank(False),
        distributed.all_reduce_mean(torch.tensor(float(distributed.rank))),
    )


def test_collective_operations_give_every_rank_the_same_values() -> None:
    assert on_ranks(shared_values) == [([0, 10], True, False, 0.5)] * 2


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed("cpu") as distributed:
        assert distributed == Distributed()
        assert shared_values(distributed) == ([0], False, False, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_tree(folder / "photos", num_test=5)
    return folder


@pytest.fixture(scope="module")
def uninterrupted(folder: Path) -> dict[str, object]:
    """The contents of a run of two ranks that was never interrupted."""
    for result in run_ltkd_on_ranks(folder, *COMMAND, "uninterrupted"):
        assert result.code == 0, result.output
    return run_contents(folder / "uninterrupted")


def run_contents(run: Path) -> dict[str, object]:
    """The contents of a complete run, without the measured times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_s"]
    return {
        "weights": sha256_of(run / "weights.safetensors"),
        "metrics": lines,
        "files": sorted(path.name for path in run.iterdir()),
    }


def test_only_rank_0_writes_and_prints(folder: Path, uninterrupted: dict[str, object]) -> None:
    assert uninterrupted["files"] == ["config.json", "curves.png", "metrics.jsonl", "task.json", "weights.safetensors"]
    assert len(uninterrupted["metrics"]) == RECIPE.epochs  # type: ignore[arg-type]
    first, second = run_ltkd_on_ranks(folder, *COMMAND, "uninterrupted")
    assert (first.code, second.code) == (0, 0)
    assert "uninterrupted is already complete" in first.output
    assert second.output == ""


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5, 8, 15])
def test_ranks_that_are_killed_in_mid_epoch_resume_to_the_same_bits(
    folder: Path, uninterrupted: dict[str, object], step: int
) -> None:
    kill = {"TOY_SIGNAL": f"SIGKILL:step:{step}"}
    killed = run_ltkd_on_ranks(folder, *COMMAND, f"killed {step}", rank_options={0: kill, 1: kill})
    assert [result.code for result in killed] == [-signal.SIGKILL] * 2
    first, second = run_ltkd_on_ranks(folder, *COMMAND, f"killed {step}")
    assert (first.code, second.code) == (0, 0), first.output + second.output
    assert "resuming after" in first.output or step == 1
    assert second.output == ""
    assert run_contents(folder / f"killed {step}") == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("signalled", [(0, 1), (0,), (1,)])
def test_a_signal_to_any_rank_stops_all_ranks_after_the_same_step_with_one_message(
    folder: Path, uninterrupted: dict[str, object], signalled: tuple[int, ...]
) -> None:
    out = f"stopped {signalled}"
    stop = {"TOY_SIGNAL": "SIGTERM:step:8", "TOY_SAVE_EVERY_S": "1000"}
    results = run_ltkd_on_ranks(folder, *COMMAND, out, rank_options=dict.fromkeys(signalled, stop))
    assert [result.code for result in results] == [143, 143]
    output = "".join(result.output for result in results)
    assert output.count("stopped in") == 1
    assert f"stopped in {out} after epoch 1 of 3 and 3 of 5 steps; a checkpoint was saved. Run the same" in output
    assert "Traceback" not in output
    first, second = run_ltkd_on_ranks(folder, *COMMAND, out)
    assert (first.code, second.code) == (0, 0)
    assert "resuming after 8 steps" in first.output
    assert run_contents(folder / out) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_loses_the_other_ends_with_an_error_of_one_line(
    folder: Path, uninterrupted: dict[str, object], lost: int
) -> None:
    results = run_ltkd_on_ranks(folder, *COMMAND, f"lost {lost}", rank_options={lost: {"TOY_SIGNAL": "SIGKILL:step:7"}})
    remaining = results[1 - lost]
    assert results[lost].code == -signal.SIGKILL
    assert remaining.code == 2
    assert "Traceback" not in remaining.output
    if lost == 1:  # rank 0 hosts the store, which shows that no other rank has reported an error
        assert "error: rank 0 of 2 lost the connection to another rank (" in remaining.output
    assert [result.code for result in run_ltkd_on_ranks(folder, *COMMAND, f"lost {lost}")] == [0, 0]
    assert run_contents(folder / f"lost {lost}") == uninterrupted


def test_a_run_of_two_processes_is_not_resumed_by_one(folder: Path) -> None:
    kill = {"TOY_SIGNAL": "SIGKILL:step:7"}
    run_ltkd_on_ranks(folder, *COMMAND, "of two", rank_options={0: kill, 1: kill})
    result = run_ltkd(folder, *COMMAND, "of two")
    assert result.code == 2
    assert result.output == (
        "error: of two has a run of another configuration (execution.num_devices is 2, requested 1); "
        "give another --out.\n"
    )


@pytest.mark.parametrize("words", [("--seed", "4"), ("--set", "logit_adjustment=2")])
def test_an_error_on_rank_0_ends_both_ranks_and_is_printed_once(
    folder: Path, uninterrupted: dict[str, object], words: tuple[str, ...]
) -> None:
    results = run_ltkd_on_ranks(folder, *COMMAND, "uninterrupted", *words)
    assert [result.code for result in results] == [2, 2]
    output = "".join(result.output for result in results)
    assert output.count("\n") == 1 and output.startswith("error: uninterrupted has a run of another configuration")


def error_of_a_non_finite_loss(distributed: Distributed) -> str:
    """The error message on this rank when the loss is not finite on rank 1 only."""
    data = toy_data()
    student = Student(plain_net(3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    state = TrainState(student, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    method = build_method(method_config("ce"))
    batches = make_batches(
        data, batch_size=40, seed=0, device=torch.device("cpu"), shard=Shard(distributed.rank, distributed.size)
    )

    class Poisoned(type(method)):  # type: ignore[misc]
        def __call__(self, batch: object) -> Tensor:
            loss = super().__call__(batch)
            return loss * float("nan") if distributed.rank == 1 else loss  # type: ignore[no-any-return]

    try:
        list(train(state, data, batches, Poisoned(), RECIPE, teacher=None, execution=CPU, distributed=distributed))
    except TrainingError as error:
        return str(error)
    return "no error"


def test_a_loss_that_is_not_finite_on_one_rank_is_an_error_on_all() -> None:
    first, second = on_ranks(error_of_a_non_finite_loss)
    assert first == second
    assert first.startswith("the loss became nan in epoch 1, step 1")


class Torchrun:
    """The command under torchrun, which starts every worker in its own session."""

    def __init__(self, folder: Path, out: str, **variables: str) -> None:
        program = Path(__file__).parents[2] / "process_toys.py"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(program)]
        self._log = folder / f"{out}.log"
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*words, *COMMAND, out],
                cwd=folder,
                env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
                stdout=log,
                stderr=log,
            )

    def workers(self) -> Iterator[int]:
        """The process ids of the ranks."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for child in map(int, children):
            if b"process_toys" in Path(f"/proc/{child}/cmdline").read_bytes():
                yield child

    def await_file(self, path: Path) -> None:
        """Wait until a file exists; the files show how far the training has come."""
        end = time.monotonic() + TIMEOUT_S
        while not path.exists() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert path.exists(), self.output()

    def output(self) -> str:
        """Everything that was printed so far."""
        return self._log.read_text()

    def wait(self) -> int:
        """Wait until torchrun and its workers have ended, and return the exit code of torchrun."""
        try:
            return self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            for worker in self.workers():
                os.kill(worker, signal.SIGKILL)
            self.process.kill()
            raise


@pytest.mark.slow
def test_under_torchrun_a_training_resumes_after_sigkill_and_sigterm(
    folder: Path, uninterrupted: dict[str, object]
) -> None:
    first = Torchrun(folder, "torchrun", TOY_PAUSE_S="0.2")
    first.await_file(folder / "torchrun" / "metrics.jsonl")
    for pid in (*first.workers(), first.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert not (folder / "torchrun" / "weights.safetensors").exists()

    second = Torchrun(folder, "torchrun", TOY_PAUSE_S="0.2")
    before = (folder / "torchrun" / "checkpoint" / "state.safetensors").stat().st_mtime_ns
    while (folder / "torchrun" / "checkpoint" / "state.safetensors").stat().st_mtime_ns == before:
        assert second.process.poll() is None, second.output()
        time.sleep(0.01)
    second.process.send_signal(signal.SIGTERM)
    assert second.wait() != 0
    assert second.output().count("stopped in torchrun after epoch") == 1, second.output()
    assert not (folder / "torchrun" / "weights.safetensors").exists()

    third = Torchrun(folder, "torchrun")
    assert third.wait() == 0, third.output()
    assert "resuming after" in third.output()
    assert run_contents(folder / "torchrun") == uninterrupted
