"""Runs the command ``ltkd`` in separate processes with a toy recipe, and interrupts it at a chosen moment.

The environment variables of a process control it:

    TOY_SIGNAL=SIGKILL:step:7    raise this signal at the seventh step of the optimiser; ``write`` in place of ``step``
                                 counts files whose content is on the disk but which are not renamed yet; several
                                 entries are separated by commas
    TOY_SAVE_EVERY_S=0           seconds between two checkpoints within an epoch
    TOY_PAUSE_S=0                seconds to sleep after every step, so that a test can send signals
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

import ltkd.recipes
import ltkd.training.run as run_module
from ltkd.cli.main import main
from ltkd.config import Recipe
from ltkd.training.distributed import Distributed, init_distributed

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

RECIPE = Recipe(name="toy", epochs=3, batch_size=8, peak_learning_rate=0.1, schedule="one-cycle", eval_every=1)
STEPS_PER_EPOCH, STEPS = 5, 15  # of the 37 images of training_toys.write_tree
TIMEOUT_S = 120.0  # the machine may be busy

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    ["process_toys", "ltkd.training.plots", "ltkd.evaluation.compare", "torch.distributed", "torch._dynamo"]
)


def net(num_classes: int) -> nn.Module:
    """A network with dropout and batch norm, so that a checkpoint needs the random state and running statistics."""
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
    """A network without batch norm and dropout, so that training on several ranks gives the same weights as on one."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 6), nn.Tanh(), nn.Linear(6, num_classes))


@dataclass
class CommandResult:
    """The result of a command that has ended.

    Attributes:
        code: Exit code; negative if a signal ended the process.
        output: Everything that the process wrote to stdout and stderr.
    """

    code: int
    output: str


class RunningCommand:
    """A command in a separate process, forked from a server that has already imported the packages."""

    def __init__(self, folder: Path, words: tuple[object, ...], variables: Mapping[str, str]) -> None:
        self._log = folder / f".output-{os.urandom(4).hex()}"
        self._process: ForkServerProcess = _processes.Process(
            target=_run_command, args=(folder, [str(word) for word in words], dict(variables), self._log)
        )
        self._process.start()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def wait(self) -> CommandResult:
        """Wait until the process ends."""
        self._process.join(TIMEOUT_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise TimeoutError(self._log.read_text())
        code = self._process.exitcode
        assert code is not None
        self._process.close()
        output = self._log.read_text()
        self._log.unlink()
        return CommandResult(code, output)


def start(folder: Path, *words: object, **variables: str) -> RunningCommand:
    """Start ``ltkd`` with these arguments and environment variables."""
    return RunningCommand(folder, words, variables)


def run_ltkd(folder: Path, *words: object, **variables: str) -> CommandResult:
    """Run ``ltkd`` and wait until it ends."""
    return start(folder, *words, **variables).wait()


def rank_variables(size: int) -> list[dict[str, str]]:
    """The environment variables that torchrun sets for each of its processes."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    shared = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(size)]


def run_ltkd_on_ranks(
    folder: Path, *words: object, rank_options: Mapping[int, Mapping[str, str]] | None = None
) -> list[CommandResult]:
    """Run ``ltkd`` on two ranks, with environment variables for some of them, and wait until both end."""
    commands = [
        start(folder, *words, **variables, **(rank_options or {}).get(rank, {}))
        for rank, variables in enumerate(rank_variables(2))
    ]
    return [command.wait() for command in commands]


def on_ranks(
    function: Callable[Concatenate[Distributed, Parameters], Result],
    *arguments: Parameters.args,
    **options: Parameters.kwargs,
) -> list[Result]:
    """Call a function on two ranks of one process group and return the results."""
    started: list[tuple[ForkServerProcess, Connection]] = []
    for variables in rank_variables(2):
        receiver, sender = _processes.Pipe()
        process = _processes.Process(target=_call_on_rank, args=(sender, variables, function, arguments, options))
        process.start()
        sender.close()
        started.append((process, receiver))
    results: list[Result] = []
    for process, receiver in started:
        if receiver.poll(TIMEOUT_S):
            results.append(pickle.loads(receiver.recv_bytes()))
        process.kill()
        process.join()
        receiver.close()
    assert len(results) == 2
    return results


def _call_on_rank(
    sender: Connection,
    variables: dict[str, str],
    function: Callable[..., Result],
    arguments: tuple[object, ...],
    options: dict[str, object],
) -> None:
    os.environ |= variables
    torch.set_num_threads(1)
    with init_distributed("cpu") as distributed:
        # pickled, because Connection.send shares the tensors' memory, and this process ends before they are read
        sender.send_bytes(pickle.dumps(function(distributed, *arguments, **options)))
        distributed.barrier()


def _run_command(folder: Path, words: list[str], variables: dict[str, str], log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.chdir(folder)
    os.environ |= variables
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["ltkd", *words]
    run_main()


def run_main() -> None:
    """Run the command line of this process with the toy recipe and the settings from the environment variables."""
    ltkd.recipes.RECIPES["toy"] = lambda: RECIPE
    run_module.SAVE_EVERY_S = float(os.environ.get("TOY_SAVE_EVERY_S", "0"))
    run_module.AGREE_EVERY = 1
    # initially too large, so that the scale changes soon and steps are skipped
    torch.amp.GradScaler = partial(torch.amp.GradScaler, init_scale=2.0**20)  # type: ignore[misc, assignment]
    torch.set_num_threads(1)
    pause_s = float(os.environ.get("TOY_PAUSE_S", "0"))
    if pause_s:
        _after(torch.optim.SGD, "step", lambda: time.sleep(pause_s))
    for entry in filter(None, os.environ.get("TOY_SIGNAL", "").split(",")):
        name, event, number = entry.split(":")
        _raise_at(signal.Signals[name], event, int(number))
    main()


def _raise_at(signal_number: signal.Signals, event: str, number: int) -> None:
    """Raise a signal at the given occurrence of an event, counted from 1."""
    calls = itertools.count(1)

    def count() -> None:
        if next(calls) == number:
            signal.raise_signal(signal_number)

    owner, name = {"step": (torch.optim.SGD, "step"), "write": (os, "fsync")}[event]
    _after(owner, name, count)


def _after(owner: object, name: str, callback: Callable[[], None]) -> None:
    """Patch a function so that the callback runs after every call."""
    function = getattr(owner, name)

    def call(*arguments: object, **options: object) -> object:
        result = function(*arguments, **options)
        callback()
        return result

    setattr(owner, name, call)


if __name__ == "__main__":
    run_main()
