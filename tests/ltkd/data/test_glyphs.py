import numpy as np
import pytest
from numpy.typing import NDArray

from ltkd.data import glyphs

LABELS, NUMBERS = np.arange(47), np.arange(47) % 5


@pytest.fixture(scope="module")
def images() -> NDArray[np.uint8]:
    return glyphs.render_glyphs(LABELS, NUMBERS, split=0)


def test_a_glyph_has_the_same_pixels_alone_and_in_any_order(images: NDArray[np.uint8]) -> None:
    assert images.shape == (47, 24, 24, 3)
    again = glyphs.render_glyphs(LABELS[::-1], NUMBERS[::-1], split=0)
    assert again[::-1].tobytes() == images.tobytes()
    alone = glyphs.render_glyphs(LABELS[7:8], NUMBERS[7:8], split=0)
    assert alone.tobytes() == images[7:8].tobytes()


def test_splits_classes_and_numbers_differ(images: NDArray[np.uint8]) -> None:
    test = glyphs.render_glyphs(LABELS, NUMBERS, split=1)
    later = glyphs.render_glyphs(LABELS, NUMBERS + 1, split=0)
    everything = [image.tobytes() for image in np.concatenate([images, test, later])]
    assert len(set(everything)) == len(everything)


def test_the_47_class_names_stay_distinct_on_a_file_system_without_case() -> None:
    names = glyphs.class_names()
    assert len({name.casefold() for name in names}) == len(names) == len(glyphs.CHARACTERS) == 47
    assert all(name.isascii() and name.isidentifier() for name in names)


def test_every_glyph_has_enough_contrast(images: NDArray[np.uint8]) -> None:
    light = images.mean(axis=3).reshape(47, -1)
    low, high = np.percentile(light, [2, 98], axis=1)
    # ink and paper differ by 0.4 in lightness, 102 of 255; blur, saturation and thin strokes take up to half of it
    assert (high - low).min() > 40
