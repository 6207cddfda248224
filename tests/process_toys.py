"""The command ``ltkd`` in processes of their own, on toys, and ways for it to meet its end.

A process learns what is in store for it from variables:

    TOY_END=SIGKILL:step:7    it gets this signal at the seventh step of the optimiser, or at a ``write``, when a file's
                              content is on the disk and its name is not yet there; several with commas between them
    TOY_SAVE_EVERY_S=0        seconds between two checkpoints within an epoch
    TOY_PAUSE_S=0             seconds of rest after every step, for signals from outside
"""

import itertools
import multiprocessing
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import nn

import ltkd.config
import ltkd.training.run as run_module
from ltkd.cli.main import main
from ltkd.config import Recipe
from ltkd.training.distributed import Distributed, init_distributed

Given = ParamSpec("Given")
Result = TypeVar("Result")

RECIPE = Recipe(name="toy", epochs=3, batch_size=8, peak_learning_rate=0.1, schedule="one-cycle", eval_every=1)
STEPS_PER_EPOCH, STEPS = 5, 15  # of the 37 images of training_toys.write_tree
PATIENCE_S = 120.0  # the machine may be busy with other things

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["process_toys", "ltkd.training.plots", "ltkd.evaluation.compare", "torch.distributed", "torch._dynamo"]
)


def net(num_classes: int) -> nn.Module:
    """A network that draws from the random state while it learns, and has everything that a checkpoint must keep."""
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, num_classes),
    )


def plain_net(num_classes: int) -> nn.Module:
    """A network without batch norm or chance: on several ranks it learns what it learns on one."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, num_classes))


@dataclass
class Ended:
    """A process that is no more.

    Attributes:
        code: Its exit code; negative where a signal ended it.
        said: Everything it wrote to stdout and stderr.
    """

    code: int
    said: str


class Started:
    """A command in a process of its own that has imported everything already."""

    def __init__(self, folder: Path, words: tuple[object, ...], variables: Mapping[str, str]) -> None:
        self._log = folder / f".said-{os.urandom(4).hex()}"
        self._process: ForkServerProcess = _processes.Process(
            target=_child, args=(folder, [str(word) for word in words], dict(variables), self._log)
        )
        self._process.start()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def ended(self) -> Ended:
        """Wait for its end."""
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise TimeoutError(self._log.read_text())
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        said = self._log.read_text()
        self._log.unlink()
        return Ended(code, said)


def start(folder: Path, *words: object, **variables: str) -> Started:
    """Start a command."""
    return Started(folder, words, variables)


def ltkd_(folder: Path, *words: object, **variables: str) -> Ended:
    """Give a command and wait for its end."""
    return start(folder, *words, **variables).ended()


def rank_variables(size: int) -> list[dict[str, str]]:
    """What torchrun tells each of the processes that it starts."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    everyone = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **everyone} for rank in range(size)]


def ltkd_on_ranks(folder: Path, *words: object, of_ranks: Mapping[int, Mapping[str, str]] | None = None) -> list[Ended]:
    """Give a command to two ranks, with variables for some of them, and wait for the end of both."""
    started = [
        start(folder, *words, **variables, **(of_ranks or {}).get(rank, {}))
        for rank, variables in enumerate(rank_variables(2))
    ]
    return [each.ended() for each in started]


def on_ranks(
    function: Callable[Concatenate[Distributed, Given], Result], *arguments: Given.args, **options: Given.kwargs
) -> list[Result]:
    """What a function gives on each of two ranks that have joined."""
    waiting: list[tuple[ForkServerProcess, Connection]] = []
    for variables in rank_variables(2):
        here, there = _processes.Pipe()
        process = _processes.Process(target=_answer, args=(there, variables, function, arguments, options))
        process.start()
        there.close()
        waiting.append((process, here))
    answers: list[Result] = []
    for process, here in waiting:
        if here.poll(PATIENCE_S):
            answers.append(pickle.loads(here.recv_bytes()))
        process.kill()
        process.join()
        here.close()
    assert len(answers) == 2
    return answers


def _answer(
    there: Connection,
    variables: dict[str, str],
    function: Callable[..., Result],
    arguments: tuple[object, ...],
    options: dict[str, object],
) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    with init_distributed("cpu") as ranks:
        # pickled here: multiprocessing would share tensors, and this process ends before they are read
        there.send_bytes(pickle.dumps(function(ranks, *arguments, **options)))
        ranks.barrier()


def _child(folder: Path, words: list[str], variables: dict[str, str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ |= variables
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["ltkd", *words]
    drive()


def drive() -> None:
    """The command line of this process, with toys in place of recipes."""
    ltkd.config.RECIPES["toy"] = lambda: RECIPE
    run_module.SAVE_EVERY_S = float(os.environ.get("TOY_SAVE_EVERY_S", "0"))
    run_module.AGREE_EVERY = 1
    # too large at first, so that the scale is soon another one and steps are left out
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**20)  # type: ignore[misc, assignment]
    torch.set_num_threads(1)
    pause_s = float(os.environ.get("TOY_PAUSE_S", "0"))
    if pause_s:
        _after(torch.optim.SGD, "step", lambda: time.sleep(pause_s))
    for end in filter(None, os.environ.get("TOY_END", "").split(",")):
        name, where, number = end.split(":")
        _prepare_the_end(signal.Signals[name], where, int(number))
    main()


def _prepare_the_end(what: signal.Signals, where: str, number: int) -> None:
    calls = itertools.count(1)

    def count() -> None:
        if next(calls) == number:
            signal.raise_signal(what)

    owner, name = {"step": (torch.optim.SGD, "step"), "write": (os, "fsync")}[where]
    _after(owner, name, count)


def _after(owner: object, name: str, do: Callable[[], None]) -> None:
    """Have every call of a function followed by something."""
    function = getattr(owner, name)

    def call(*arguments: object, **options: object) -> object:
        answer = function(*arguments, **options)
        do()
        return answer

    setattr(owner, name, call)


if __name__ == "__main__":
    drive()
