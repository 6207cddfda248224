"""An engine process: opens a bundle, proves and warms it, says so, and then answers what comes down the line.

It is started by ``serve.pool.engine_process`` as ``python -m serve.engine DESCRIPTOR ORDERS`` and ends when the other
end of the line is closed, whatever ended the front. It never imports FastAPI, so it starts fast and stays small.
"""

import contextlib
import io
import queue
import signal
import socket
import threading
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Sequence

from PIL import Image

from ltkd.contract.bundle import open_bundle
from ltkd.contract.image_decoding import FORMATS, decode_image
from ltkd.contract.resources import num_cores, trim_memory
from ltkd.errors import LtkdError
from serve.engine.classifier import Classifier, Job
from serve.engine.messages import (
    EngineConfig,
    EngineReady,
    EngineResponse,
    Failed,
    Kind,
    MessageReader,
    pack_response,
    pack_text,
    read_some,
    send_all,
    unpack_cancel,
    unpack_request,
)
from serve.engine.session import CPU, Engine, open_engine

_MAX_WAIT_SECONDS_ON_A_GPU = 0.001


def prepared(descriptor: int, orders_json: str) -> Callable[[], None]:
    """Open, prove and warm what a line's orders say; what comes back serves the line to its end.

    Args:
        descriptor: Of the line.
        orders_json: An ``EngineConfig``.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # a terminal or a supervisor sends them to all; the front decides
    line = socket.socket(fileno=descriptor)
    orders = EngineConfig.model_validate_json(orders_json)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # refused like any image with too many pixels
    num_threads = max(1, num_cores() // orders.processes)
    try:
        bundle = open_bundle(orders.bundle)
        engine = open_engine(bundle, orders.device, orders.precision, num_threads, orders.max_batch)
    except LtkdError as error:
        failed = Failed(error=type(error).__name__, message=str(error)).model_dump_json()
        return lambda: _send(line, [pack_text(Kind.FAILED, failed)])
    trim_memory()
    default_wait = 0.0 if engine.provider == CPU else _MAX_WAIT_SECONDS_ON_A_GPU
    max_wait = default_wait if orders.max_wait_ms is None else orders.max_wait_ms / 1000
    return lambda: serve_line(line, engine, orders.max_pixels, max_wait, num_threads)


def serve_line(line: socket.socket, engine: Engine, max_pixels: int, max_wait: float, num_threads: int) -> None:
    """Say hello, and answer what comes down a line until its other end is closed.

    Args:
        line: A connected stream socket.
        engine: Proved and warm.
        max_pixels: Images with more pixels are refused from their header.
        max_wait: How long an image may wait for others, in seconds.
        num_threads: How many images are decoded at one time.
    """
    sending = threading.Lock()

    def send(done: Sequence[EngineResponse]) -> None:
        with sending:
            _send(line, [pack_response(one) for one in done])

    def report(reason: Exception) -> None:
        with sending:
            _send(line, [pack_text(Kind.LOG, "".join(traceback.format_exception(reason)))])

    hello = EngineReady(
        manifest=engine.manifest,
        precision=engine.precision,
        provider=engine.provider,
        seconds_of=dict(engine.seconds_of),
    )
    _warm_decoders()
    _send(line, [pack_text(Kind.HELLO, hello.model_dump_json())])
    classifier = Classifier(engine, max_pixels, max_wait, send, report)
    if num_threads == 1 and not max_wait:
        _do_everything(line, classifier)
    else:
        _read_for_others(line, classifier, num_threads)
    classifier.close()
    line.close()


def _do_everything(line: socket.socket, classifier: Classifier) -> None:
    """Read, decode, run and answer in one thread: on one core others would only wait for each other."""
    inbox, batcher = MessageReader(), classifier.batcher
    jobs: deque[Job] = deque()
    while (data := read_some(line, wait=not jobs and not batcher.num_waiting)) != b"":
        if data:
            jobs.extend(_jobs(classifier, inbox, data))
        elif jobs and batcher.num_waiting < batcher.max_size:
            classifier.decode(jobs)
        else:
            batcher.run_one()
    while jobs:
        classifier.decode(jobs)


def _read_for_others(line: socket.socket, classifier: Classifier, num_threads: int) -> None:
    """Read in this thread, decode in some, run and answer in the batcher's own."""
    inbox = MessageReader()
    waiting: queue.SimpleQueue[Job | None] = queue.SimpleQueue()

    def decode() -> None:
        while (job := waiting.get()) is not None:
            classifier.decode(deque([job]))

    classifier.batcher.start()
    threads = [threading.Thread(target=decode, name=f"decode-{n}", daemon=True) for n in range(num_threads)]
    for thread in threads:
        thread.start()
    while data := read_some(line):
        for job in _jobs(classifier, inbox, data):
            waiting.put(job)
    for _ in threads:
        waiting.put(None)
    for thread in threads:
        thread.join()


def _jobs(classifier: Classifier, inbox: MessageReader, data: bytes) -> list[Job]:
    jobs: list[Job] = []
    for kind, message in inbox.feed(data):
        if kind == Kind.WORK:
            jobs += classifier.accept(unpack_request(message))
        elif kind == Kind.CANCEL:
            classifier.cancel(unpack_cancel(message))
    return jobs


def _send(line: socket.socket, messages: Sequence[bytes]) -> None:
    with contextlib.suppress(OSError):  # the front is gone, which whoever reads the line sees too
        send_all(line, messages)


def _warm_decoders() -> None:
    """Decode one image of each type: Pillow loads its codecs when they are first needed."""
    for form in FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, form)
        decode_image(file.getvalue(), 1)
