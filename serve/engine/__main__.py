"""The entry point of an engine process: ``python -m serve.engine DESCRIPTOR CONFIG``.

For some seconds the new process loads libraries, verifies the model and warms it up. On a single core it would take
half of the time of a process that is serving requests, and those requests would be late or rejected. So the start runs
at a low priority. A thread can lower its priority but not raise it again, so the serving thread is created first.
"""

import gc
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable

_START_NICENESS = 10  # about a tenth of the processor time while another process uses the rest


def main() -> None:
    """Prepare the engine in this thread, then serve requests in another."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they are sent to all processes; the server process decides when to end
    gc.disable()  # until the end of the start (ltkd.contract.resources)
    ready: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()

    def serve() -> None:
        ready.get()()

    serving = threading.Thread(target=serve, name="serving")
    serving.start()
    try:
        from ltkd.contract.resources import num_cores  # noqa: PLC0415 - imported after the thread is created

        if sys.platform == "linux" and num_cores() == 1:  # with more cores, the threads of the session would inherit it
            os.nice(_START_NICENESS)  # applies to this thread only, relative to the priority of the service
        from serve.engine.message_loop import prepare  # noqa: PLC0415 - the slowest part of the start

        ready.put(prepare(int(sys.argv[1]), sys.argv[2]))
    except BaseException:
        ready.put(lambda: None)
        raise
    serving.join()


if __name__ == "__main__":
    main()
