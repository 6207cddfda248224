"""Which images of which requests are decoded, in which order, and within which limits."""

import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from serve_toys import encoded, toy_engine, toy_pixels

from ltkd.contract.image_decoding import DecodedImage, decode_image
from ltkd.contract.preprocessing import Preprocessing
from serve.engine import classifier as classifier_module
from serve.engine.classifier import Classifier
from serve.engine.decode_queue import PixelLimits, header_pixels
from serve.engine.large_images import DecoderKilledError
from serve.engine.messages import EngineRequest, EngineResponse, ImageResult, OutputKind

SMALL = encoded(toy_pixels(3))
LARGE = encoded(Image.new("L", (600, 500)))
LIMITS = PixelLimits(per_image=400_000, per_request=1_000_000)


class Recorded:
    """A classifier whose responses and defects are kept.

    Attributes:
        responses: Those that were sent, in order.
        num_signs: How often it has shown progress.
    """

    def __init__(self, limits: PixelLimits = LIMITS) -> None:
        self.responses: list[EngineResponse] = []
        self.num_signs = 0
        self.classifier = Classifier(toy_engine(), limits, 0.0, self.responses.extend, self.fail, self.count_sign)

    def fail(self, reason: Exception) -> None:
        raise reason

    def count_sign(self) -> None:
        self.num_signs += 1

    def accept(self, number: int, contents: Sequence[bytes]) -> None:
        self.classifier.accept(EngineRequest(number, time.monotonic() + 60, OutputKind.ANSWERS, 1, list(contents)))

    def statuses(self) -> list[list[int]]:
        """The statuses of the images of each response, after all images were decoded and run."""
        self.classifier.large.close()
        while self.classifier.ordinary:
            self.classifier.decode_waiting()
        while self.classifier.decode_large(decode_image):
            pass
        self.classifier.close()
        return [[result.status for result in response.results] for response in self.responses]


def test_a_request_of_many_images_does_not_delay_another_one_behind_all_of_them() -> None:
    recorded = Recorded()
    recorded.accept(1, [SMALL] * 200)
    recorded.accept(2, [SMALL])
    while not recorded.responses:
        recorded.classifier.decode_waiting()
        recorded.classifier.batcher.run_one()
    assert [response.number for response in recorded.responses] == [2]


def test_large_images_are_decoded_one_of_each_request_in_turn_and_never_before_ordinary_ones() -> None:
    recorded = Recorded(PixelLimits(400_000, 10_000_000))
    order: list[bytes] = []
    files = {name: encoded(Image.new("L", (600, 500), shade)) for shade, name in enumerate("abc")}

    def decode(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> DecodedImage:
        order.append(content)
        return decode_image(content, preprocessing, max_pixels)

    recorded.accept(1, [files["a"]] * 5)
    recorded.accept(2, [files["b"]] * 2)
    recorded.accept(3, [files["c"], SMALL])
    recorded.classifier.decode_waiting()
    recorded.classifier.batcher.run_one()
    assert order == []
    assert recorded.classifier.batcher.num_waiting == 0  # the ordinary image was run
    for _ in range(8):
        recorded.classifier.decode_large(decode)
    name_of = {content: name for name, content in files.items()}
    assert [name_of[content] for content in order] == ["a", "b", "c", "a", "b", "a", "a", "a"]


def test_the_images_of_a_request_beyond_its_limit_are_rejected_in_their_places_and_the_others_answered() -> None:
    recorded = Recorded()
    recorded.accept(1, [LARGE, LARGE, SMALL, LARGE, LARGE, SMALL])
    recorded.accept(2, [LARGE])
    assert sorted(recorded.statuses()) == [[0], [0, 0, 0, 0, 422, 0]]
    (beyond,) = [result for response in recorded.responses for result in response.results if result.status]
    assert beyond.payload.decode() == (
        "the images of one request may have 1,000,000 pixels together, and 99,872 were left for this image, "
        "which has more; send it in another request."
    )


def test_ordinary_images_beyond_the_limit_of_a_request_are_rejected_too() -> None:
    recorded = Recorded(PixelLimits(150, 150))
    recorded.accept(1, [SMALL, SMALL, SMALL, b"junk"])
    assert recorded.statuses() == [[0, 0, 422, 415]]


def test_an_image_above_the_limit_of_an_image_is_rejected_with_that_limit() -> None:
    recorded = Recorded()
    recorded.accept(1, [encoded(Image.new("L", (700, 700))), LARGE])
    assert recorded.statuses() == [[422, 0]]
    assert b"700 x 700 pixels (the limit is 400,000)" in recorded.responses[0].results[0].payload


@pytest.mark.parametrize(("height_px", "status"), [(500, 0), (700, 422)])
def test_an_image_that_is_larger_than_its_first_header_says_has_the_limit_of_a_large_one(
    height_px: int, status: int
) -> None:
    second = encoded(Image.new("L", (600, height_px)))
    content = SMALL[:33] + second[8:]  # its signature and header, and then the other header
    assert header_pixels(content) < 600 * height_px
    recorded = Recorded()
    recorded.accept(1, [content, LARGE, SMALL])
    recorded.classifier.decode_waiting()
    assert recorded.statuses() == [[status, 0, 0]]
    if status:
        assert b"600 x 700 pixels (the limit is 400,000)" in recorded.responses[0].results[0].payload


def test_an_image_whose_decoder_was_killed_may_be_sent_again() -> None:
    recorded = Recorded()

    def killed(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> DecodedImage:
        raise DecoderKilledError("the decoder was killed; try again.")

    recorded.accept(1, [LARGE])
    recorded.classifier.decode_large(killed)
    assert recorded.responses[0].results == [ImageResult(503, b"the decoder was killed; try again.")]


def test_the_limit_of_a_request_counts_pixels_as_they_were_decoded() -> None:
    recorded = Recorded()

    def scaled(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> DecodedImage:
        side_px = preprocessing.input_px
        return DecodedImage(np.zeros((side_px, side_px, 3), np.uint8), 100_000, ())  # a JPEG scaled down in the DCT

    recorded.accept(1, [LARGE] * 11)
    left = []
    for _ in range(10):
        left.append(recorded.classifier.large._turns[0][0].pixels_left)
        recorded.classifier.decode_large(scaled)
    assert left == [1_000_000 - 100_000 * num for num in range(10)]
    assert recorded.statuses() == [[0] * 10 + [422]]


def test_large_images_of_a_cancelled_or_late_request_are_not_decoded() -> None:
    recorded = Recorded()

    def decode(content: bytes, preprocessing: Preprocessing, max_pixels: int) -> DecodedImage:
        raise AssertionError("it was decoded")

    recorded.accept(1, [LARGE, LARGE])
    recorded.classifier.cancel(1)
    recorded.classifier.accept(EngineRequest(2, time.monotonic(), OutputKind.ANSWERS, 1, [LARGE]))
    for _ in range(3):
        recorded.classifier.decode_large(decode)
    assert sorted((one.number, len(one.results)) for one in recorded.responses) == [(1, 0), (2, 1)]


def test_every_decoded_image_and_every_batch_shows_progress_at_most_every_quarter_of_a_second(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(classifier_module, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    recorded = Recorded()
    classifier = recorded.classifier
    steps: list[Callable[[], object]] = [
        classifier.decode_waiting,
        classifier.batcher.run_one,
        lambda: classifier.decode_large(decode_image),
    ]
    for number in range(3):
        recorded.accept(number, [SMALL, LARGE])
    signs = []
    for seconds in (0.3, 0.0, 0.2):
        for step in steps:
            clock[0] += seconds
            step()
            signs.append(recorded.num_signs)
    assert signs == [1, 2, 3, 3, 3, 3, 3, 4, 4]
