import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ltkd.contract import image_decoding
from ltkd.contract.image_decoding import decode_image, image_size_px, load_crop, load_image, save_image
from ltkd.contract.preprocessing import JpegScaling, Preprocessing
from ltkd.errors import ImageDecodeError, ImageError, ImageTypeError

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
RAMP = np.arange(16, dtype=np.uint8) * 16
SMOOTH = np.dstack(
    np.broadcast_arrays(RAMP[:, None], RAMP[None, :], np.uint8(100))
)  # gradients, which lossy formats preserve


def whole(size_px: int) -> Preprocessing:
    """The preprocessing of the first bundles: JPEG is decoded in full, the centre square is resized bilinearly."""
    return Preprocessing(input_px=size_px, jpeg_scaling="none")


def scaled(size_px: int) -> Preprocessing:
    """The same, with the JPEG decoder scaling down as far as the size allows."""
    return Preprocessing(input_px=size_px, jpeg_scaling="once")


def encoded(image: Image.Image | NDArray[np.uint8] | NDArray[np.uint16], kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(file, kind, **options)
    return file.getvalue()


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """Build a PNG file chunk by chunk, for variants that Pillow cannot write."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in parts
    )


def grey_16_bit(*chunks: tuple[bytes, bytes]) -> bytes:
    """A 16-bit grey PNG with eight columns from black to white."""
    row = b"\0" + (np.arange(8) * 9362).astype(">u2").tobytes()
    return png(8, 8, 16, 0, row * 8, *chunks)


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True})])
def test_an_image_of_the_target_size_is_not_changed(kind: str, options: dict[str, object]) -> None:
    decoded = decode_image(encoded(PIXELS, kind, **options), whole(16))
    assert decoded.pixels_SS3.dtype == np.uint8
    assert np.array_equal(decoded.pixels_SS3, PIXELS)
    assert decoded.warnings == ()


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_the_pixels_of_a_lossy_image_are_close_to_the_original(kind: str) -> None:
    decoded = decode_image(encoded(SMOOTH, kind, quality=95), whole(16)).pixels_SS3
    # quality 95 with halved colour resolution, on a gradient of 16 per pixel: errors stay below one step of the
    # gradient, while swapped channels would give much larger ones
    assert np.abs(decoded.astype(int) - SMOOTH).mean() < 8


def test_the_centre_square_of_an_image_is_cropped() -> None:
    wide = np.zeros((64, 192, 3), np.uint8)
    wide[:, 64:128] = (0, 255, 0)
    for image in (wide, wide.transpose(1, 0, 2)):
        pixels = decode_image(encoded(np.ascontiguousarray(image)), whole(8)).pixels_SS3
        assert (pixels[1:-1, 1:-1] == (0, 255, 0)).all()  # the outermost pixels blend with the surrounding image


def test_scaling_down_averages_pixels_instead_of_sampling_them() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    # a triangle filter over 16 stripes gives their mean, 127.5 up to rounding; at the border the filter is truncated
    np.testing.assert_allclose(decode_image(encoded(stripes), whole(8)).pixels_SS3[:, 1:-1], 127.5, atol=2)


STORED_AS = {
    1: lambda upright: upright,
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: upright.transpose(1, 0, 2)[::-1],
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: upright.transpose(1, 0, 2)[:, ::-1],
}


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_exif_orientation_gives_the_upright_pixels(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED_AS[orientation](PIXELS))
    decoded = decode_image(encoded(stored, kind, exif=exif, lossless=True), whole(16))
    assert np.array_equal(decoded.pixels_SS3, PIXELS)
    assert decoded.warnings == (() if orientation == 1 else ("the EXIF orientation was applied",))


def test_transparent_pixels_are_blended_with_white() -> None:
    rgba = np.zeros((2, 2, 4), np.uint8)
    rgba[0, 0], rgba[0, 1], rgba[1, 0], rgba[1, 1] = (9, 9, 9, 0), (200, 0, 0, 255), (0, 0, 0, 51), (0, 255, 0, 0)
    decoded = decode_image(encoded(rgba), whole(2))
    assert decoded.pixels_SS3.tolist() == [[[255] * 3, [200, 0, 0]], [[204] * 3, [255] * 3]]  # 51 of 255 is a fifth
    assert decoded.warnings == ("transparent pixels were blended with white",)


def test_an_opaque_alpha_channel_gives_no_warning() -> None:
    decoded = decode_image(encoded(np.dstack([PIXELS, np.full((16, 16), 255, np.uint8)])), whole(16))
    assert np.array_equal(decoded.pixels_SS3, PIXELS)
    assert decoded.warnings == ()


@pytest.mark.parametrize("transparency", [1, b"\xff\x00"])
def test_a_palette_becomes_rgb_and_its_transparent_entry_white(transparency: int | bytes) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 10, 20, 30, 40, 50])
    image.putdata([0, 1])
    opaque = decode_image(encoded(image.resize((2, 2), Image.Resampling.NEAREST)), whole(2))
    assert (opaque.pixels_SS3[0].tolist(), opaque.warnings) == ([[200, 10, 20], [30, 40, 50]], ())
    decoded = decode_image(encoded(image.resize((2, 2), Image.Resampling.NEAREST), transparency=transparency), whole(2))
    assert decoded.pixels_SS3[0].tolist() == [[200, 10, 20], [255, 255, 255]]
    assert decoded.warnings == ("transparent pixels were blended with white",)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    decoded = decode_image(grey_16_bit(), whole(8))
    assert decoded.pixels_SS3[0].tolist() == [[level] * 3 for level in (0, 36, 72, 109, 145, 182, 218, 254)]
    assert decoded.warnings == ("16-bit grey was scaled to 8 bit",)


def test_16_bit_grey_with_a_transparent_level_is_scaled_and_blended_with_white() -> None:
    decoded = decode_image(grey_16_bit((b"tRNS", struct.pack(">H", 9362))), whole(8))
    assert decoded.pixels_SS3[0, :, 0].tolist() == [0, 255, 72, 109, 145, 182, 218, 254]
    assert decoded.warnings == ("16-bit grey was scaled to 8 bit", "transparent pixels were blended with white")


@pytest.mark.parametrize(
    ("mode", "colour", "kind", "expected"),
    [
        ("1", 1, "PNG", (255, 255, 255)),
        ("L", 77, "PNG", (77, 77, 77)),
        ("L", 77, "JPEG", (77, 77, 77)),
        ("LA", (100, 0), "PNG", (255, 255, 255)),
        ("CMYK", (0, 255, 255, 0), "JPEG", (255, 0, 0)),
    ],
)
def test_other_colour_modes_become_rgb(mode: str, colour: object, kind: str, expected: tuple[int, int, int]) -> None:
    pixels = decode_image(encoded(Image.new(mode, (8, 8), colour), kind), whole(8)).pixels_SS3  # type: ignore[arg-type]
    np.testing.assert_allclose(pixels, np.full((8, 8, 3), expected), atol=2)  # JPEG rounds twice


def test_16_bit_colour_keeps_its_high_bytes() -> None:
    row = b"\0" + np.array([0x1234, 0x5678, 0x9ABC] * 2, ">u2").tobytes()
    assert decode_image(png(2, 2, 16, 2, row * 2), whole(2)).pixels_SS3[1, 1].tolist() == [0x12, 0x56, 0x9A]


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_only_the_first_frame_of_an_animation_is_used(kind: str) -> None:
    other_frames = [Image.fromarray(PIXELS[::-1]), Image.fromarray(PIXELS.T[:3].transpose(1, 2, 0).copy())]
    content = encoded(Image.fromarray(PIXELS), kind, save_all=True, append_images=other_frames, lossless=True)
    decoded = decode_image(content, whole(16))
    assert np.array_equal(decoded.pixels_SS3, PIXELS)
    assert decoded.warnings == ("the image is animated; only the first frame was used",)


@pytest.mark.parametrize("size", [(1, 30_000), (30_000, 1), (1, 1)])
def test_extreme_shapes_are_decoded(size: tuple[int, int]) -> None:
    assert (decode_image(encoded(Image.new("RGB", size, (1, 2, 3))), whole(8)).pixels_SS3 == (1, 2, 3)).all()


# above Pillow's error limit, between its warning and error limits, below both, just above the limit of pixels
@pytest.mark.parametrize("side_px", [20_000, 10_000, 8_000, 5_001])
def test_a_decompression_bomb_is_rejected_from_its_header_without_allocating_pixels(side_px: int) -> None:
    bomb = png(side_px, side_px, 1, 0, bytes(1_000_000))
    assert len(bomb) < 4_000
    Image.core.reset_stats()
    with pytest.raises(ImageDecodeError, match=r"pixels \(the limit is 25,000,000\); scale it down"):
        decode_image(bomb, whole(32))
    assert Image.core.get_stats()["new_count"] == 0
    decode_image(encoded(PIXELS), whole(16))
    assert Image.core.get_stats()["new_count"] > 0  # shows that the count works


def test_an_image_with_exactly_the_maximum_number_of_pixels_is_accepted() -> None:
    content = encoded(Image.new("1", (40, 25)))
    assert decode_image(content, whole(8), max_pixels=1000).pixels_SS3.shape == (8, 8, 3)
    with pytest.raises(ImageDecodeError, match=r"40 x 25 pixels \(the limit is 999\)"):
        decode_image(content, whole(8), max_pixels=999)


@pytest.mark.parametrize("content", [b"hello, I am a text", b"GIF89a" + bytes(50), b"BM" + bytes(50), b"RIFF1234WAVE"])
def test_an_unsupported_file_type_is_a_type_error(content: bytes) -> None:
    with pytest.raises(ImageTypeError, match="the file is not a JPEG, PNG or WebP image"):
        decode_image(content, whole(8))


def test_an_empty_file_is_a_type_error() -> None:
    with pytest.raises(ImageTypeError, match=r"empty \(0 bytes\)"):
        decode_image(b"", whole(8))


@pytest.mark.parametrize("start", [b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF\x04\0\0\0WEBP"])
def test_the_error_for_a_file_with_only_a_valid_signature_is_readable(start: bytes) -> None:
    with pytest.raises(ImageDecodeError, match=r"damaged or truncated \(no readable header\); send the whole file"):
        decode_image(start + b"hello", whole(8))


def exif_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a description"
    return encoded(PIXELS, "JPEG", exif=exif)


IMAGE = Image.fromarray(PIXELS)
VALID_FILES = {
    "PNG": encoded(PIXELS),
    "palette PNG": encoded(IMAGE.quantize(16), transparency=3),
    "palette PNG with alpha": encoded(IMAGE.quantize(16), transparency=bytes(range(16))),
    "grey PNG with alpha": encoded(IMAGE.convert("LA")),
    "1-bit PNG": encoded(IMAGE.convert("1").resize((64, 64))),
    "16-bit PNG": grey_16_bit(),
    "animated PNG": encoded(IMAGE, save_all=True, append_images=[Image.new("RGB", (16, 16))]),
    "JPEG": exif_jpeg(),
    "progressive JPEG": encoded(PIXELS, "JPEG", progressive=True),
    "grey JPEG": encoded(IMAGE.convert("L"), "JPEG"),
    "CMYK JPEG": encoded(IMAGE.convert("CMYK"), "JPEG"),
    "two images in one JPEG": encoded(IMAGE, "MPO", save_all=True, append_images=[IMAGE]),
    "WebP": encoded(PIXELS, "WEBP"),
    "lossless WebP": encoded(IMAGE.convert("RGBA"), "WEBP", lossless=True),
    "animated WebP": encoded(IMAGE, "WEBP", save_all=True, append_images=[Image.new("RGB", (16, 16))]),
}


def damaged(valid: bytes, rng: random.Random) -> bytes:
    """Damage a file at random, like a faulty connection, a faulty disk or an attacker."""
    content = bytearray(valid)
    kind = rng.choice(("flipped", "cut", "overwritten", "spliced", "flipped and cut"))
    if "flipped" in kind:
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    if "cut" in kind:
        del content[rng.randrange(len(content)) :]
    elif kind == "overwritten":
        start = rng.randrange(len(content))
        content[start : start + rng.randint(0, 20)] = rng.randbytes(rng.randint(0, 20))
    elif kind == "spliced":
        other = VALID_FILES[rng.choice(sorted(VALID_FILES))]
        content[rng.randrange(len(content)) :] = other[rng.randrange(len(other)) :]
    return bytes(content)


@pytest.mark.filterwarnings(
    "ignore::UserWarning"
)  # Pillow's warnings about damage that it ignores; the service does not raise them
@pytest.mark.parametrize("name", VALID_FILES)
def test_damage_never_raises_anything_but_an_image_error(name: str) -> None:
    num_rejected, rng = 0, random.Random(name)
    for _ in range(600):
        try:
            decoded = decode_image(damaged(VALID_FILES[name], rng), scaled(8), max_pixels=1_000_000)
        except ImageError as error:
            num_rejected += 1
            assert str(error).endswith((".", ";")) and "\n" not in str(error) and len(str(error)) < 200
            assert any(hint in str(error) for hint in ("send ", "convert it", "scale it down", "save it again"))
        else:
            assert decoded.pixels_SS3.shape == (8, 8, 3)
    assert num_rejected > 120  # shows that the damage is severe enough


@pytest.mark.parametrize("name", sorted(VALID_FILES.keys() - {"two images in one JPEG"}))
def test_a_truncated_file_is_rejected(name: str) -> None:
    with pytest.raises(ImageDecodeError):
        decode_image(VALID_FILES[name][: len(VALID_FILES[name]) // 2], scaled(8))


def png_with(chunk: bytes, times: int, before: bytes = b"IDAT") -> bytes:
    position = VALID_FILES["PNG"].index(before) - 4
    return VALID_FILES["PNG"][:position] + chunk * times + VALID_FILES["PNG"][position:]


def png_chunk(name: bytes, content: bytes = b"") -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def jpeg_with(inserted: bytes, times: int) -> bytes:
    return VALID_FILES["JPEG"][:2] + inserted * times + VALID_FILES["JPEG"][2:]


def scan_bomb(times: int) -> bytes:
    """A progressive JPEG whose last scan is repeated; decoding each scan visits every pixel of the image."""
    content = encoded(Image.new("L", (64, 64)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * times + content[-2:]


PROFILE = png_chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(1_000_000)))
BOMBS = {
    "chunks before the pixels": png_with(png_chunk(b"teSt"), 100_000),
    "chunks after the pixels": png_with(png_chunk(b"teSt"), 100_000, b"IEND"),
    "empty pixel chunks": png_with(png_chunk(b"IDAT"), 100_000),
    "colour profiles": png_with(PROFILE, 100),
    "comments": jpeg_with(b"\xff\xfe\0\2", 100_000),
    "comments after an end marker": jpeg_with(b"\xff\xd9" + b"\xff\xfe\0\2" * 1000, 100),
    "start markers": jpeg_with(b"\xff\xd8", 100_000),
    "fill bytes": jpeg_with(b"\xff", 100_000),
    "zeros between segments": jpeg_with(b"\xff\xfe\0\2" + bytes(100_000), 1),
    "only fill bytes": VALID_FILES["JPEG"][:3] + b"\xff" * 100_000,
    "scans": scan_bomb(100),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_with_too_many_parts_is_rejected_before_it_is_decoded(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the decoder was called")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(ImageDecodeError, match=r"which no encoder writes; save it again with an image editor\.$"):
        decode_image(BOMBS[name], scaled(8))


def test_files_with_as_many_parts_as_encoders_write_are_accepted() -> None:
    def pixels(content: bytes) -> list[int]:
        return decode_image(content, whole(8)).pixels_SS3.ravel().tolist()

    assert pixels(png_with(png_chunk(b"teSt"), 5000)) == pixels(VALID_FILES["PNG"])
    assert pixels(png_with(PROFILE, 1)) == pixels(VALID_FILES["PNG"])
    assert pixels(jpeg_with(b"\xff\xfe\0\2", 5000)) == pixels(VALID_FILES["JPEG"])
    assert pixels(scan_bomb(10)) == pixels(scan_bomb(0))
    video = b"\xff\xda" * 1000  # phones append a video to a photograph, and it can contain any bytes
    for name in ("JPEG", "progressive JPEG"):
        assert pixels(VALID_FILES[name] + video) == pixels(VALID_FILES[name])


def tiff_with_orientation(kind: int, count: int, value: bytes) -> bytes:
    """EXIF data with one orientation entry, which may be invalid."""
    return b"Exif\0\0" + struct.pack("<2sHIHHHI4sI", b"II", 42, 8, 1, 0x0112, kind, count, value, 0)


SHORT, ASCII = 3, 2
INVALID_ORIENTATIONS = {
    "none": (SHORT, 1, b"\0\0"),
    "nine": (SHORT, 1, b"\x09\0"),
    "the largest": (SHORT, 1, b"\xff\xff"),
    "a word": (ASCII, 2, b"6\0"),
}


@pytest.mark.parametrize("name", INVALID_ORIENTATIONS)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_with_an_invalid_orientation_is_treated_as_upright(kind: str, name: str) -> None:
    plain = decode_image(encoded(PIXELS, kind), whole(16))
    invalid = decode_image(encoded(PIXELS, kind, exif=tiff_with_orientation(*INVALID_ORIENTATIONS[name])), whole(16))
    assert np.array_equal(invalid.pixels_SS3, plain.pixels_SS3)
    assert invalid.warnings == ()
    rotated = decode_image(encoded(PIXELS, kind, exif=tiff_with_orientation(SHORT, 1, b"\6\0")), whole(16))
    assert rotated.warnings == ("the EXIF orientation was applied",)  # shows that the entry is read


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_an_image_with_unreadable_exif_data_is_accepted_with_a_warning(kind: str) -> None:
    unreadable_exif = tiff_with_orientation(SHORT, 1, b"\6\0").replace(b"II", b"XX")
    decoded = decode_image(encoded(PIXELS, kind, exif=unreadable_exif), whole(16))
    assert np.array_equal(decoded.pixels_SS3, decode_image(encoded(PIXELS, kind), whole(16)).pixels_SS3)
    # Pillow ignores unreadable EXIF data of a JPEG when it reads the resolution from it
    warnings = () if kind == "JPEG" else ("the EXIF data cannot be read; the image was treated as upright",)
    assert decoded.warnings == warnings


POLYGLOTS = {
    "a page before an image": (b"<html><script>" + VALID_FILES["PNG"], False),
    "a GIF before an image": (b"GIF89a" + VALID_FILES["JPEG"], False),
    "a document before an image": (b"%PDF-1.7\n" + VALID_FILES["JPEG"], False),
    "an archive after an image": (VALID_FILES["JPEG"] + b"PK\3\4" + bytes(100), True),
    "a page after an image": (VALID_FILES["PNG"] + b"<html><script>alert(1)</script>", True),
    "a page in a comment": (jpeg_with(b"\xff\xfe\0\x10<html><script>", 1), True),
    "another image after an image": (VALID_FILES["PNG"] + VALID_FILES["JPEG"], True),
    "the signature of another type": (VALID_FILES["PNG"][:8] + VALID_FILES["JPEG"], False),
    "a wave file": (b"RIFF\x24\0\0\0WAVEfmt " + bytes(100), False),
}


@pytest.mark.parametrize("name", POLYGLOTS)
def test_a_file_of_two_types_is_rejected_or_read_as_the_type_of_its_first_bytes(name: str) -> None:
    content, accepted = POLYGLOTS[name]
    if not accepted:
        with pytest.raises(ImageError):
            decode_image(content, whole(8))
        return
    valid = VALID_FILES["PNG" if content.startswith(b"\x89PNG") else "JPEG"]
    assert np.array_equal(decode_image(content, whole(8)).pixels_SS3, decode_image(valid, whole(8)).pixels_SS3)


def test_a_saved_image_is_loaded_with_the_same_pixels(tmp_path: Path) -> None:
    save_image(PIXELS, tmp_path / "a.png")
    assert np.array_equal(load_image(tmp_path / "a.png", whole(16)), PIXELS)
    assert image_size_px(tmp_path / "a.png") == (16, 16)


def test_errors_name_the_file(tmp_path: Path) -> None:
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "half.png").write_bytes(VALID_FILES["PNG"][:200])
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ImageTypeError, match=r"text\.png: the file is not a JPEG"):
        load_image(tmp_path / "text.png", whole(8))
    with pytest.raises(ImageDecodeError, match=r"half\.png: the image is damaged"):
        load_image(tmp_path / "half.png", whole(8))
    with pytest.raises(ImageDecodeError, match=r"folder\.png: the file cannot be read \(Is a directory\)"):
        load_image(tmp_path / "folder.png", whole(8))
    with pytest.raises(ImageDecodeError, match=r"text\.png: the file has no readable .* header"):
        image_size_px(tmp_path / "text.png")


def photograph(path: Path, size_px: tuple[int, int], orientation: int = 1) -> Path:
    """Write an image with smooth gradients, which JPEG preserves almost exactly."""
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    coarse.resize(size_px, Image.Resampling.BICUBIC).save(path, exif=exif, quality=95)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_full_decoding_is_pillows_fit_of_the_upright_image_bit_for_bit(
    tmp_path: Path, kind: str, orientation: int
) -> None:
    path = photograph(tmp_path / f"a.{kind}", (403, 301), orientation)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened.convert("RGB"))
    expected = ImageOps.fit(upright, (32, 32), Image.Resampling.BILINEAR)
    decoded = decode_image(path.read_bytes(), whole(32))
    assert np.array_equal(decoded.pixels_SS3, np.asarray(expected))
    assert decoded.decoded_pixels == 403 * 301


SCALED_SIZES = {  # 800 x 600 pixels to 32: 600 are 18 times that side
    ("none", 1.0): (800, 600),
    ("twice", 1.0): (100, 75),
    ("once", 1.0): (100, 75),
    ("twice", 0.5): (200, 150),
    ("once", 0.5): (100, 75),
    ("twice", 0.25): (400, 300),
    ("twice", 0.1): (800, 600),
}


@pytest.mark.parametrize(("jpeg_scaling", "crop_ratio"), SCALED_SIZES)
@pytest.mark.parametrize("orientation", [1, 6])
def test_the_jpeg_decoder_keeps_the_stated_multiple_of_the_side_in_the_crop(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    jpeg_scaling: JpegScaling,
    crop_ratio: float,
    orientation: int,
) -> None:
    sizes: list[tuple[int, int]] = []
    decode_upright = image_decoding._decode_upright

    def recording(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
        sizes.append(image.size)
        return decode_upright(image)

    monkeypatch.setattr(image_decoding, "_decode_upright", recording)
    path = photograph(tmp_path / "a.jpg", (800, 600), orientation)
    preprocessing = Preprocessing(input_px=32, jpeg_scaling=jpeg_scaling, crop_ratio=crop_ratio)
    decoded = decode_image(path.read_bytes(), preprocessing)
    width, height = SCALED_SIZES[jpeg_scaling, crop_ratio]
    assert sizes == [(width, height)]
    assert decoded.decoded_pixels == max(width * height, 800 * 600 // 8)
    assert np.array_equal(load_image(path, preprocessing), decoded.pixels_SS3)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_scaled_jpeg_is_upright_and_close_to_the_whole_image(tmp_path: Path, orientation: int) -> None:
    content = photograph(tmp_path / "a.jpg", (1030, 770), orientation).read_bytes()
    full, twice = decode_image(content, whole(32)), decode_image(content, Preprocessing(input_px=32))
    # the decoder rounds 770 / 8 up, which shifts the image by a few hundredths of a pixel of the result; an image that
    # is rotated the wrong way differs by about 60 levels
    assert 0 < np.abs(full.pixels_SS3.astype(int) - twice.pixels_SS3).mean() < 3
    assert twice.warnings == full.warnings


@pytest.mark.parametrize("name", ["grey JPEG", "CMYK JPEG", "progressive JPEG", "two images in one JPEG"])
def test_every_kind_of_jpeg_is_scaled(tmp_path: Path, name: str) -> None:
    with Image.open(photograph(tmp_path / "a.jpg", (800, 600))) as opened:
        image = opened.convert({"grey JPEG": "L", "CMYK JPEG": "CMYK"}.get(name, "RGB"))
    options = {
        "progressive JPEG": {"progressive": True},
        "two images in one JPEG": {"save_all": True, "append_images": [image]},
    }
    content = encoded(image, "MPO" if name.startswith("two") else "JPEG", quality=95, **options.get(name, {}))
    full, once = decode_image(content, whole(32)), decode_image(content, scaled(32))
    assert 0 < np.abs(full.pixels_SS3.astype(int) - once.pixels_SS3).mean() < 5  # another filter than the resizing
    # the decoder of a progressive JPEG holds all pixels as coefficients, so they all count
    assert once.decoded_pixels == (800 * 600 if name == "progressive JPEG" else 800 * 600 // 8)


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_other_formats_are_not_scaled_by_their_decoders(tmp_path: Path, kind: str) -> None:
    content = photograph(tmp_path / f"a.{kind.lower()}", (800, 600)).read_bytes()
    full, once = decode_image(content, whole(32)), decode_image(content, scaled(32))
    assert np.array_equal(full.pixels_SS3, once.pixels_SS3)
    assert once.decoded_pixels == full.decoded_pixels == 800 * 600


def test_a_crop_ratio_and_bicubic_give_what_pretrained_networks_were_trained_with() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((1024, 768), Image.Resampling.BICUBIC)
    resized = image.resize((320, 240), Image.Resampling.BICUBIC)  # the usual order: resize the whole, then crop
    cropped = resized.crop((55, 15, 265, 225))
    preprocessing = Preprocessing(input_px=210, interpolation="bicubic", crop_ratio=210 / 240)
    found = decode_image(encoded(image), preprocessing).pixels_SS3.astype(int)
    assert np.abs(found - np.asarray(cropped)).max() <= 1  # the crop has the same pixels, up to the rounding of its box
    bilinear = decode_image(encoded(image), preprocessing.model_copy(update={"interpolation": "bilinear"})).pixels_SS3
    assert np.abs(bilinear.astype(int) - np.asarray(cropped)).max() > 1


def test_an_image_of_the_target_size_is_cropped_if_the_crop_ratio_says_so() -> None:
    image = np.zeros((16, 16, 3), np.uint8)
    image[4:12, 4:12] = 255
    half = Preprocessing(input_px=16, crop_ratio=0.5)
    assert decode_image(encoded(image), half).pixels_SS3.mean() > 200  # white, except that the border blends
    assert decode_image(encoded(image), Preprocessing(input_px=16)).pixels_SS3.mean() == 255 / 4


def with_size(content: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header states another size; it can be opened and not decoded."""
    frame = next(content.find(marker) for marker in (b"\xff\xc0", b"\xff\xc2") if marker in content)
    return content[: frame + 5] + struct.pack(">HH", height, width) + content[frame + 9 :]


BASELINE, PROGRESSIVE = (encoded(PIXELS, "JPEG", progressive=progressive) for progressive in (False, True))
SCAN = BASELINE.index(b"\xff\xda")
LARGE_IMAGES = {
    "WebP": encoded(Image.new("1", (7071, 7071)), "WEBP", lossless=True, quality=0, method=0),
    "PNG": png(7071, 7071, 1, 0, bytes(1_000_000)),
    "progressive JPEG": with_size(PROGRESSIVE, 8160, 6120),
    "JPEG whose colours are in separate scans": with_size(
        BASELINE[:SCAN] + b"\xff\xda\0\x08\1\1\0\0\x3f\0" + BASELINE[SCAN + 14 :], 8160, 6120
    ),
    "lossless JPEG": with_size(BASELINE, 8160, 6120).replace(b"\xff\xc0", b"\xff\xc3"),
    "long JPEG": with_size(BASELINE, 65_000, 400),
    "JPEG with more pixels than any image may have": with_size(BASELINE, 10_000, 10_000),
}


@pytest.mark.parametrize("name", LARGE_IMAGES)
def test_an_image_that_takes_too_many_pixels_to_decode_is_rejected_from_its_header(name: str) -> None:
    Image.core.reset_stats()
    with pytest.raises(ImageDecodeError, match=r"pixels \(the limit is 25,000,000\); scale it down"):
        decode_image(LARGE_IMAGES[name], Preprocessing(input_px=224))
    assert Image.core.get_stats()["new_count"] == 0


def test_a_jpeg_of_50_megapixels_counts_the_pixels_that_its_decoder_makes() -> None:
    content = encoded(Image.new("L", (8160, 6120), 77), "JPEG")
    Image.core.reset_stats()
    with pytest.raises(ImageDecodeError, match=r"8160 x 6120 pixels \(the limit is 25,000,000\)"):
        decode_image(content, whole(224))
    with pytest.raises(ImageDecodeError, match=r"8160 x 6120 pixels \(the limit is 6,242,399\)"):
        decode_image(content, Preprocessing(input_px=224), max_pixels=6_242_399)  # what is left of a request's budget
    assert Image.core.get_stats()["new_count"] == 0
    decoded = decode_image(content, Preprocessing(input_px=224))
    assert (decoded.pixels_SS3 == 77).all()
    assert decoded.decoded_pixels == 8160 * 6120 // 8  # an eighth, because the codes of all pixels are read


def test_a_draft_is_close_to_the_whole_image_and_finds_the_same_damage(tmp_path: Path) -> None:
    path = photograph(tmp_path / "large.jpg", (1030, 770))
    full, draft = load_image(path, whole(64)), load_image(path, scaled(64))
    # the decoder uses another filter and rounds 770 / 8 up; the gradients span all levels within 200 pixels
    assert np.abs(full.astype(int) - draft).mean() < 3
    assert not np.array_equal(full, draft)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ImageDecodeError, match=r"large\.jpg: the image is damaged or truncated"):
        load_image(path, scaled(64))


def test_a_draft_of_another_format_or_of_a_small_jpeg_is_the_whole_image(tmp_path: Path) -> None:
    for name, size_px in (("a.png", (1030, 770)), ("a.webp", (1030, 770)), ("a.jpg", (126, 90))):
        path = photograph(tmp_path / name, size_px)
        np.testing.assert_array_equal(load_image(path, scaled(64)), load_image(path, whole(64)))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_box_is_cropped_from_the_upright_image(tmp_path: Path, kind: str, orientation: int) -> None:
    path = photograph(tmp_path / f"rotated.{kind}", (403, 301), orientation)
    sizes: list[tuple[int, int]] = []

    def choose_box(width: int, height: int) -> tuple[int, int, int, int]:
        sizes.append((width, height))
        return 10, 20, 200, 160

    crop = load_crop(path, 32, choose_box)
    with Image.open(path) as opened:
        upright = ImageOps.exif_transpose(opened.convert("RGB"))
    assert sizes == [upright.size] == [(301, 403) if orientation > 4 else (403, 301)]
    exact = np.asarray(upright.crop((10, 20, 210, 180)).resize((32, 32), Image.Resampling.BILINEAR))
    if kind == "png":
        np.testing.assert_array_equal(crop, exact)
    else:
        # the decoder scales down by 4 and rounds 403 / 4 up, so a rotated box is shifted by up to one pixel of the
        # result; a box that is rotated the wrong way differs by about 60 levels
        assert np.abs(crop.astype(int) - exact).mean() < 8


def test_a_crop_keeps_its_resolution_when_the_decoder_scales_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = photograph(tmp_path / "large.jpg", (800, 600))
    decoded: list[tuple[int, int]] = []
    decode_upright = image_decoding._decode_upright

    def recording(image: Image.Image) -> tuple[Image.Image, tuple[str, ...]]:
        rgb, warnings = decode_upright(image)
        decoded.append(rgb.size)
        return rgb, warnings

    monkeypatch.setattr(image_decoding, "_decode_upright", recording)
    for side_px in (32, 63, 64, 127, 128, 255, 256, 599):
        box = (0, 0, side_px, side_px)
        load_crop(path, 32, lambda width, height, box=box: box)  # type: ignore[misc]
    # a box of 128 pixels can be scaled to a quarter, but one of 127 pixels only to a half
    assert decoded == [(800, 600), (800, 600), (400, 300), (400, 300), (200, 150), (200, 150), (100, 75), (100, 75)]


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (300, 1), (3000, 7)])
@pytest.mark.parametrize("kind", ["jpg", "png"])
def test_a_box_of_extreme_shape_is_cropped(tmp_path: Path, size: tuple[int, int], kind: str) -> None:
    path = photograph(tmp_path / f"thin.{kind}", size)
    assert load_crop(path, 16, lambda width, height: (0, 0, width, height)).shape == (16, 16, 3)
    assert load_crop(path, 16, lambda width, height: (width - 1, height - 1, 1, 1)).shape == (16, 16, 3)


def test_the_error_for_cropping_a_damaged_file_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(ImageTypeError, match=r"a\.png: the file is not a JPEG"):
        load_crop(tmp_path / "a.png", 8, lambda width, height: (0, 0, width, height))
