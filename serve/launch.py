"""Starting an engine process, with one end of a line in its hands."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ltkd.errors import UsageError
from serve.wire import Orders

_LINE_BYTES = 2**20  # so that neither side waits for the other to read while it has work


@dataclass(frozen=True)
class Launched:
    """An engine process that was started.

    Attributes:
        line: Our end of the line.
        kill: Ends it at once; harmless when it has ended.
        pid: Its number.
    """

    line: socket.socket
    kill: Callable[[], None]
    pid: int


def launch(orders: Orders) -> Launched:
    """Start an engine process.

    Raises:
        UsageError: This system cannot hand a socket to another process.
    """
    if sys.platform == "win32":
        raise UsageError("the service needs Linux or macOS; on Windows, run it in WSL or a container.")
    ours, theirs = connected_lines()
    with theirs:
        process = subprocess.Popen(  # noqa: S603 - this very interpreter, and arguments of our own
            [sys.executable, "-P", "-m", "serve.start", str(theirs.fileno()), orders.model_dump_json()],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    threading.Thread(target=process.wait, name=f"wait-{process.pid}", daemon=True).start()  # leaves no zombie
    return Launched(ours, process.kill, process.pid)


def connected_lines() -> tuple[socket.socket, socket.socket]:
    """Two ends of a line."""
    ends = socket.socketpair()
    for end in ends:
        for size in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, size, _LINE_BYTES)
    return ends
