"""The main loop of an engine process: it opens a bundle, reports that it is ready, and then serves requests.

``serve.pool.engine_process`` starts it as ``python -m serve.engine DESCRIPTOR CONFIG``. It ends when the server process
closes its end of the socket or dies. It never imports FastAPI, so it starts fast and uses little memory.
"""

import contextlib
import io
import socket
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence

from PIL import Image

from ltkd.contract.bundle import open_bundle
from ltkd.contract.image_decoding import FORMATS, decode_image
from ltkd.contract.preprocessing import Preprocessing
from ltkd.contract.resources import num_cores, trim_memory
from ltkd.errors import LtkdError
from serve.engine.classifier import Classifier
from serve.engine.decode_queue import PixelLimits
from serve.engine.large_images import Decode, large_image_decoder
from serve.engine.messages import (
    ALIVE,
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
    unpack_number,
    unpack_request,
)
from serve.engine.session import CPU, Engine, open_engine

_MAX_WAIT_SECONDS_ON_A_GPU = 0.001
_MAX_LARGE_IMAGES = 4  # decoded at the same time; each may need 0.6 GB

LargeDecoder = Callable[[], contextlib.AbstractContextManager[Decode]]
"""Starts something that decodes one large image at a time."""


def prepare(descriptor: int, config_json: str) -> Callable[[], object]:
    """Open, verify and warm up an engine.

    Args:
        descriptor: The file descriptor of the socket to the server process.
        config_json: An ``EngineConfig``.

    Returns:
        A function that serves requests until the other end of the socket is closed. If the engine cannot be opened, the
        function only sends the error.
    """
    connection = socket.socket(fileno=descriptor)
    config = EngineConfig.model_validate_json(config_json)
    warnings.simplefilter("error", Image.DecompressionBombWarning)  # rejected like any image with too many pixels
    num_threads = max(1, num_cores() // config.processes)
    try:
        bundle = open_bundle(config.bundle)
        engine = open_engine(bundle, config.device, config.precision, num_threads, config.max_batch)
    except LtkdError as error:
        failed = Failed(error=type(error).__name__, message=str(error)).model_dump_json()
        return lambda: _send(connection, [pack_text(Kind.FAILED, failed)])
    trim_memory()
    default_wait = 0.0 if engine.provider == CPU else _MAX_WAIT_SECONDS_ON_A_GPU
    max_wait = default_wait if config.max_wait_ms is None else config.max_wait_ms / 1000
    limits = PixelLimits(config.max_pixels, config.max_request_pixels)
    return lambda: serve_connection(connection, engine, limits, max_wait, num_threads)


def serve_connection(
    connection: socket.socket,
    engine: Engine,
    limits: PixelLimits,
    max_wait: float,
    num_threads: int,
    large_decoder: LargeDecoder = large_image_decoder,
) -> None:
    """Send ``EngineReady``, then serve requests until the other end of the socket is closed.

    Args:
        connection: A connected stream socket.
        engine: Verified and warm.
        limits: Images with more decoded pixels are rejected from their header.
        max_wait: How long an image may wait for more images, in seconds.
        num_threads: How many images are decoded at the same time; at most four of them are large.
        large_decoder: Decodes the large ones.
    """
    sending = threading.Lock()

    def send(*messages: bytes) -> None:
        with sending:
            is_sent = _send(connection, messages)
        if not is_sent:  # nobody waits for the results
            classifier.cancel_all()

    def respond(responses: Sequence[EngineResponse]) -> None:
        send(*[pack_response(response) for response in responses])

    def report(reason: Exception) -> None:
        send(pack_text(Kind.LOG, "".join(traceback.format_exception(reason))))

    engine_ready = EngineReady(
        manifest=engine.manifest,
        precision=engine.precision,
        provider=engine.provider,
        nodes=engine.nodes,
        seconds_of=dict(engine.seconds_of),
    )
    _warm_decoders()
    classifier = Classifier(engine, limits, max_wait, respond, report, lambda: send(ALIVE))
    send(pack_text(Kind.READY, engine_ready.model_dump_json()))
    with _large_images_decoded(classifier, large_decoder, min(num_threads, _MAX_LARGE_IMAGES)):
        if num_threads == 1 and not max_wait:
            _serve_in_one_thread(connection, classifier)
        else:
            _serve_in_threads(connection, classifier, num_threads)
    classifier.close()
    connection.close()


def _serve_in_one_thread(connection: socket.socket, classifier: Classifier) -> None:
    """Read, decode, run and respond in this thread: on one core, several threads would only wait for each other."""
    reader, ordinary, batcher = MessageReader(), classifier.ordinary, classifier.batcher
    while (data := read_some(connection, wait=not ordinary and not batcher.num_waiting)) != b"":
        if data:
            _accept(classifier, reader, data)
        elif ordinary and batcher.num_waiting < batcher.max_size:
            classifier.decode_waiting()
        else:
            batcher.run_one()
    while ordinary:
        classifier.decode_waiting()


def _serve_in_threads(connection: socket.socket, classifier: Classifier, num_threads: int) -> None:
    """Read in this thread, decode in ``num_threads`` others, run and respond in the batcher's thread."""
    reader = MessageReader()

    def decode() -> None:
        while classifier.decode_next():
            pass

    classifier.batcher.start()
    threads = [threading.Thread(target=decode, name=f"decode-{n}", daemon=True) for n in range(num_threads)]
    for thread in threads:
        thread.start()
    while data := read_some(connection):
        _accept(classifier, reader, data)
    classifier.ordinary.close()
    for thread in threads:
        thread.join()


@contextlib.contextmanager
def _large_images_decoded(classifier: Classifier, large_decoder: LargeDecoder, num: int) -> Iterator[None]:
    """Decode large images, ``num`` at a time, and at the end all that are queued.

    Each is decoded elsewhere while a thread waits for it. If the batcher has no thread, that thread runs the image.
    """

    def decode() -> None:
        with large_decoder() as decode_one:
            while classifier.decode_large(decode_one):
                if not classifier.batcher.has_thread:
                    classifier.batcher.run_one()

    threads = [threading.Thread(target=decode, name=f"large-{n}", daemon=True) for n in range(num)]
    for thread in threads:
        thread.start()
    yield
    classifier.large.close()
    for thread in threads:
        thread.join()


def _accept(classifier: Classifier, reader: MessageReader, data: bytes) -> None:
    for kind, message in reader.feed(data):
        if kind == Kind.REQUEST:
            classifier.accept(unpack_request(message))
        elif kind == Kind.CANCEL:
            classifier.cancel(unpack_number(message))


def _send(connection: socket.socket, messages: Sequence[bytes]) -> bool:
    """Send messages; False if the server process has ended. The reading thread finds the socket closed."""
    try:
        send_all(connection, messages)
    except OSError:
        return False
    return True


def _warm_decoders() -> None:
    """Decode one image of each type, because Pillow loads a codec on its first use."""
    for image_format in FORMATS:
        file = io.BytesIO()
        Image.new("RGB", (1, 1)).save(file, image_format)
        decode_image(file.getvalue(), Preprocessing(input_px=1))
