"""The beginning of an engine process: it gets ready with what the others leave of the processor.

A process that starts loads libraries, proves the model and warms it, for some seconds. On a core where another process
answers meanwhile, that one would lose half of its time, and its requests would be late or refused. A thread may give
its priority away but not take it back, so the thread that will answer is there before anything else is.
"""

import gc
import os
import queue
import sys
import threading
from collections.abc import Callable

_LESS_URGENT = 10  # a tenth of the time of those who answer, and all that they do not need


def main() -> None:
    """Get ready in this thread, then answer in another."""
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_BATCH:  # the front's (serve/server.py)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    gc.disable()  # until the start is over (ltkd.contract.resources)
    ready: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()

    def answer() -> None:
        ready.get()()

    answering = threading.Thread(target=answer, name="answering")
    answering.start()
    try:
        from ltkd.contract.resources import num_cores  # noqa: PLC0415 - after the thread

        if sys.platform == "linux" and num_cores() == 1:  # the threads of a session would keep the low priority
            os.nice(_LESS_URGENT)  # of this thread alone, whatever priority the service was given
        from serve.engine.message_loop import prepared  # noqa: PLC0415 - most of the work

        ready.put(prepared(int(sys.argv[1]), sys.argv[2]))
    except BaseException:
        ready.put(lambda: None)
        raise
    answering.join()


if __name__ == "__main__":
    main()
