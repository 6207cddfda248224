"""Two processes that share every batch do what one does, and end together."""

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
from process_toys import PATIENCE_S, RECIPE, ltkd_, ltkd_on_ranks, on_ranks, plain_net
from torch import Tensor, nn
from training_toys import CPU, ToyNet, toy_data, write_tree

from ltkd.config import Parameter
from ltkd.contract.class_groups import groups_by_share
from ltkd.contract.records import sha256_of
from ltkd.data.batches import Shard, batches_of
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


def gradients(ranks: Distributed, momentum: float, together: bool = True) -> Tensor:
    """Those of this rank's images, at the third step."""
    if not together:
        pytest.MonkeyPatch().setattr(torch.distributed, "is_initialized", lambda: False)
    loss = LTKDLoss(GROUPS, momentum=momentum).double()
    for number in range(3):
        student_NC, teacher_NC = (logits.roll(number, 1)[ranks.rank :: ranks.size] for logits in random_logits())
        student_NC = student_NC.clone().requires_grad_()
        value = loss(student_NC, teacher_NC) if momentum else ltkd_loss(student_NC, teacher_NC, GroupIndex(GROUPS))
        (gradient_NC,) = torch.autograd.grad(value, student_NC)
    return gradient_NC


def of_one_process(of_ranks: list[Tensor]) -> Tensor:
    """The gradients of both ranks in the order of one process; data-parallel training takes the mean over the ranks."""
    return torch.stack(of_ranks, dim=1).flatten(0, 1) / len(of_ranks)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_two_ranks_with_32_images_give_the_gradients_of_one_with_64(momentum: float) -> None:
    whole = gradients(Distributed(), momentum)
    # float64 sums of 64 terms: rounding is near 1e-16, the gradients near 1e-2; the running average is float32
    atol = 1e-7 if momentum else 1e-13
    torch.testing.assert_close(of_one_process(on_ranks(gradients, momentum)), whole, atol=atol, rtol=1e-10)
    apart = of_one_process(on_ranks(gradients, momentum, together=False))
    assert (apart - whole).abs().max() > 1e-3  # without the sum over the ranks each would balance its own half


def trained(ranks: Distributed, batch_size: int) -> dict[str, tuple[dict[str, Tensor], float]]:
    """For every method, the weights after two epochs of 37 images and the loss of the last one."""
    data, found = toy_data(), {}
    with seeded(1):
        teacher = ToyNet().eval()
    recipe = RECIPE.model_copy(update={"epochs": 2, "batch_size": batch_size})
    for name, parameters in ALL_METHODS:
        with seeded(0):
            student = Student(plain_net(3))
        learner = TrainState(
            student,
            torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9),
            torch.amp.GradScaler("cpu", enabled=False),
        )
        reports = list(
            train(
                learner,
                data,
                batches_of(
                    data,
                    batch_size=batch_size,
                    seed=0,
                    device=torch.device("cpu"),
                    shard=Shard(ranks.rank, ranks.size),
                ),
                build_method(method_config(name, parameters)),
                recipe,
                teacher=Teacher(teacher, CPU),
                execution=CPU,
                ranks=ranks,
            )
        )
        found[name] = student.state_dict(), reports[-1].loss
    return found


# batches of 8 leave one of 5 images, 3 for one rank and 2 for the other; of 7, every one is uneven
@pytest.mark.parametrize("batch_size", [8, 7])
def test_two_ranks_train_the_weights_of_one_process_by_every_method(batch_size: int) -> None:
    whole, of_ranks = trained(Distributed(), batch_size), on_ranks(trained, batch_size)
    for name, (weights, loss) in whole.items():
        for found, found_loss in (each[name] for each in of_ranks):
            # float32, ten to twelve steps: sums in another order differ by some 1e-7 of weights near 1
            torch.testing.assert_close(found, weights, atol=2e-6, rtol=1e-5, msg=name)
            assert found_loss == pytest.approx(loss, rel=1e-5)
        first, second = (each[name][0] for each in of_ranks)
        assert all(torch.equal(first[key], second[key]) for key in first), "the ranks drift apart"


def evaluated(ranks: Distributed) -> dict[str, float]:
    """Accuracy on 15 images of a network whose running statistics differ between the ranks."""
    with seeded(3):
        network = ToyNet()
    assert isinstance(network.bn, nn.BatchNorm1d) and network.bn.running_mean is not None
    network.bn.running_mean += 5 * ranks.rank
    return evaluate(network, toy_data(num_test=5), torch.device("cpu"), ranks)


def test_two_ranks_measure_an_odd_number_of_images_exactly_as_one() -> None:
    whole = evaluated(Distributed())
    assert on_ranks(evaluated) == [whole, whole]
    assert 0 < whole["all"] < 1


def shared(ranks: Distributed) -> tuple[list[int], bool, bool, float]:
    return (
        ranks.all_gather(10 * ranks.rank),
        ranks.any_rank(ranks.rank == 1),
        ranks.any_rank(False),
        ranks.all_reduce_mean(torch.tensor(float(ranks.rank))),
    )


def test_ranks_share_values() -> None:
    assert on_ranks(shared) == [([0, 10], True, False, 0.5)] * 2


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with init_distributed("cpu") as ranks:
        assert ranks == Distributed()
        assert shared(ranks) == ([0], False, False, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    write_tree(folder / "photos", num_test=5)
    return folder


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> dict[str, object]:
    """What two ranks leave that were never interrupted."""
    for ended in ltkd_on_ranks(folder, *COMMAND, "undisturbed"):
        assert ended.code == 0, ended.said
    return remains(folder / "undisturbed")


def remains(run: Path) -> dict[str, object]:
    """Everything of a complete run that does not depend on the time of day."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        del line["images_per_s"]
    return {
        "weights": sha256_of(run / "weights.safetensors"),
        "metrics": lines,
        "files": sorted(path.name for path in run.iterdir()),
    }


def test_only_rank_0_writes_and_prints(folder: Path, undisturbed: dict[str, object]) -> None:
    assert undisturbed["files"] == ["config.json", "curves.png", "metrics.jsonl", "task.json", "weights.safetensors"]
    assert len(undisturbed["metrics"]) == RECIPE.epochs  # type: ignore[arg-type]
    first, second = ltkd_on_ranks(folder, *COMMAND, "undisturbed")
    assert (first.code, second.code) == (0, 0)
    assert "undisturbed is complete already" in first.said
    assert second.said == ""


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 5, 8, 15])
def test_ranks_that_are_killed_in_mid_epoch_end_with_the_same_bits(
    folder: Path, undisturbed: dict[str, object], step: int
) -> None:
    end = {"TOY_END": f"SIGKILL:step:{step}"}
    killed = ltkd_on_ranks(folder, *COMMAND, f"killed {step}", of_ranks={0: end, 1: end})
    assert [each.code for each in killed] == [-signal.SIGKILL] * 2
    first, second = ltkd_on_ranks(folder, *COMMAND, f"killed {step}")
    assert (first.code, second.code) == (0, 0), first.said + second.said
    assert "going on after" in first.said or step == 1
    assert second.said == ""
    assert remains(folder / f"killed {step}") == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("told", [(0, 1), (0,), (1,)])
def test_a_signal_to_any_rank_stops_all_of_them_after_the_same_step_and_one_says_so(
    folder: Path, undisturbed: dict[str, object], told: tuple[int, ...]
) -> None:
    out = f"stopped {told}"
    stop = {"TOY_END": "SIGTERM:step:8", "TOY_SAVE_EVERY_S": "1000"}
    ended = ltkd_on_ranks(folder, *COMMAND, out, of_ranks=dict.fromkeys(told, stop))
    assert [each.code for each in ended] == [143, 143]
    said = "".join(each.said for each in ended)
    assert said.count("stopped in") == 1
    assert f"stopped in {out} after epoch 1 of 3 and 3 of 5 steps; saved. The same command goes on from there." in said
    assert "Traceback" not in said
    first, second = ltkd_on_ranks(folder, *COMMAND, out)
    assert (first.code, second.code) == (0, 0)
    assert "going on after 8 steps" in first.said
    assert remains(folder / out) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_loses_the_other_ends_with_one_line(
    folder: Path, undisturbed: dict[str, object], lost: int
) -> None:
    ended = ltkd_on_ranks(folder, *COMMAND, f"lost {lost}", of_ranks={lost: {"TOY_END": "SIGKILL:step:7"}})
    left = ended[1 - lost]
    assert ended[lost].code == -signal.SIGKILL
    assert left.code == 2
    assert "Traceback" not in left.said
    if lost == 1:  # the rank that holds the store is there to hear that nobody else has said anything
        assert "error: rank 0 of 2 has lost another one (" in left.said
    assert [each.code for each in ltkd_on_ranks(folder, *COMMAND, f"lost {lost}")] == [0, 0]
    assert remains(folder / f"lost {lost}") == undisturbed


def test_a_run_of_two_processes_is_not_continued_by_one(folder: Path) -> None:
    end = {"TOY_END": "SIGKILL:step:7"}
    ltkd_on_ranks(folder, *COMMAND, "of two", of_ranks={0: end, 1: end})
    done = ltkd_(folder, *COMMAND, "of two")
    assert done.code == 2
    assert done.said == (
        "error: of two holds a run of another configuration (execution.num_devices is 2, asked for 1); "
        "give another --out.\n"
    )


@pytest.mark.parametrize("words", [("--seed", "4"), ("--set", "logit_adjustment=2")])
def test_an_error_that_rank_0_finds_ends_both_ranks_and_is_said_once(
    folder: Path, undisturbed: dict[str, object], words: tuple[str, ...]
) -> None:
    ended = ltkd_on_ranks(folder, *COMMAND, "undisturbed", *words)
    assert [each.code for each in ended] == [2, 2]
    said = "".join(each.said for each in ended)
    assert said.count("\n") == 1 and said.startswith("error: undisturbed holds a run of another configuration")


def exploding(ranks: Distributed) -> str:
    """What each rank says of a loss that is not finite on rank 1 alone."""
    data = toy_data()
    student = Student(plain_net(3))
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    learner = TrainState(student, optimizer, torch.amp.GradScaler("cpu", enabled=False))
    method = build_method(method_config("ce"))
    batches = batches_of(data, batch_size=40, seed=0, device=torch.device("cpu"), shard=Shard(ranks.rank, ranks.size))

    class Poisoned(type(method)):  # type: ignore[misc]
        def __call__(self, batch: object) -> Tensor:
            loss = super().__call__(batch)
            return loss * float("nan") if ranks.rank == 1 else loss  # type: ignore[no-any-return]

    try:
        list(train(learner, data, batches, Poisoned(), RECIPE, teacher=None, execution=CPU, ranks=ranks))
    except TrainingError as error:
        return str(error)
    return "nothing"


def test_a_loss_that_is_not_finite_on_one_rank_is_an_error_on_all() -> None:
    first, second = on_ranks(exploding)
    assert first == second
    assert first.startswith("the loss became nan in epoch 1, step 1")


class Torchrun:
    """The command under torchrun, which starts every worker in a session of its own."""

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
        """Wait until a file is there, which tells how far the training is."""
        end = time.monotonic() + PATIENCE_S
        while not path.exists() and self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        assert path.exists(), self.said()

    def said(self) -> str:
        """Everything said so far."""
        return self._log.read_text()

    def ended(self) -> int:
        """The exit code of torchrun, when it and all of its workers are gone."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            for worker in self.workers():
                os.kill(worker, signal.SIGKILL)
            self.process.kill()
            raise


@pytest.mark.slow
def test_under_torchrun_a_training_survives_sigkill_and_sigterm(folder: Path, undisturbed: dict[str, object]) -> None:
    first = Torchrun(folder, "torchrun", TOY_PAUSE_S="0.2")
    first.await_file(folder / "torchrun" / "metrics.jsonl")
    for pid in (*first.workers(), first.process.pid):
        os.kill(pid, signal.SIGKILL)
    assert first.ended() == -signal.SIGKILL
    assert not (folder / "torchrun" / "weights.safetensors").exists()

    second = Torchrun(folder, "torchrun", TOY_PAUSE_S="0.2")
    before = (folder / "torchrun" / "checkpoint" / "state.safetensors").stat().st_mtime_ns
    while (folder / "torchrun" / "checkpoint" / "state.safetensors").stat().st_mtime_ns == before:
        assert second.process.poll() is None, second.said()
        time.sleep(0.01)
    second.process.send_signal(signal.SIGTERM)
    assert second.ended() != 0
    assert second.said().count("stopped in torchrun after epoch") == 1, second.said()
    assert not (folder / "torchrun" / "weights.safetensors").exists()

    third = Torchrun(folder, "torchrun")
    assert third.ended() == 0, third.said()
    assert "going on after" in third.said()
    assert remains(folder / "torchrun") == undisturbed
