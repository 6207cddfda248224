"""What it saves and changes to let the JPEG decoder scale down: time, pixels, accuracy by group and parity.

    python -m benchmarks.decoding [--rounds 7] [--per-class 60] [--seeds 1]

The images are rendered: discs of all sizes that hide each other, which have the statistics of photographs at every
scale ("dead leaves"), slightly blurred and with sensor noise, as JPEGs of quality 90. For the accuracy, each also shows
a letter on a disc, and a small network is trained on a long tail of them for each way of decoding. For the parity, the
networks that were trained on images decoded in full are run on images that were decoded otherwise.
"""

import argparse
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from rich.console import Console

from benchmarks.run_metadata import run_metadata
from export.certification.reference import torch_logits
from export.parity import ComparedModel, compare_models
from ltkd.config import Execution
from ltkd.contract.image_decoding import MAX_HEADER_PIXELS, decode_image
from ltkd.contract.preprocessing import JpegScaling, Preprocessing, Resizing
from ltkd.data.datasets import Dataset, data_config, load_dataset
from ltkd.data.image_files import Images, pixel_hashes
from ltkd.methods.registry import method_config
from ltkd.recipes import find_recipe
from ltkd.training.run import run_config, train_run
from ltkd.training.run_folder import Run

SCALINGS: tuple[JpegScaling, ...] = get_args(JpegScaling)
SIZES = {"12 MP": (4000, 3000), "1.2 MP": (1280, 960)}
INPUT_PX, SMALL_INPUT_PX = 224, 64
NUM_SCENES = 6
LETTERS = "AEHKMRSX"
NUM_DISCS, NUM_DISCS_BEHIND_A_LETTER = 1500, 400
GAMMA = 10.0
MARGIN = 0.03  # 120 images in a group cannot show less
LARGE = (8160, 6120)
LARGE_FILES: dict[str, tuple[str, dict[str, object]]] = {
    "JPEG": ("JPEG", {}),
    "JPEG, progressive": ("JPEG", {"progressive": True}),
    "JPEG, progressive, colours at full resolution": ("JPEG", {"progressive": True, "subsampling": 0}),
    "PNG": ("PNG", {"compress_level": 1}),
    "WebP": ("WEBP", {"method": 0}),
}
DECODE = f"""
import json, sys, time
from pathlib import Path
from ltkd.contract.image_decoding import MAX_HEADER_PIXELS, decode_image
from ltkd.contract.preprocessing import Preprocessing

def peak_mib():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1024

content, before, begin = Path(sys.argv[1]).read_bytes(), peak_mib(), time.process_time()
decode_image(content, Preprocessing(input_px={INPUT_PX}), MAX_HEADER_PIXELS)
print(json.dumps([1000 * (time.process_time() - begin), peak_mib() - before]))
"""


def scene(random: np.random.Generator, size: tuple[int, int], letter: str | None = None) -> bytes:
    """Render a scene and encode it as a JPEG.

    Args:
        random: Determines everything that is not given.
        size: Width and height in pixels.
        letter: A letter that the scene shows somewhere in its middle.
    """
    (width, height), num_discs = size, NUM_DISCS_BEHIND_A_LETTER if letter else NUM_DISCS
    image = Image.new("RGB", size, (128, 128, 128))
    draw = ImageDraw.Draw(image)
    smallest, largest = 2.0, height / 2
    # radii with a density of r^-3 make an image whose statistics do not depend on the scale
    radius_D = 1 / np.sqrt(random.uniform(1 / largest**2, 1 / smallest**2, num_discs))
    radius_D[: num_discs // 5] = random.uniform(largest / 20, largest, num_discs // 5)
    for radius, x, y, colour_3 in zip(
        radius_D,
        random.uniform(0, width, num_discs),
        random.uniform(0, height, num_discs),
        random.integers(0, 256, (num_discs, 3)).tolist(),
        strict=True,
    ):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=tuple(colour_3))
    if letter is not None:
        x, y = width / 2 + random.normal(0, 40), height / 2 + random.normal(0, 40)
        ink, paper = random.integers(0, 100, 3).tolist(), random.integers(156, 256, 3).tolist()
        draw.ellipse((x - 300, y - 300, x + 300, y + 300), fill=tuple(paper))
        font = ImageFont.load_default(float(random.uniform(360, 500)))
        draw.text((x, y), letter, fill=tuple(ink), font=font, anchor="mm")
    blurred_HW3 = np.asarray(image.filter(ImageFilter.GaussianBlur(0.7))).astype(np.float32)
    noise_HW3 = random.standard_normal((height, width, 3), dtype=np.float32) * 5
    file = io.BytesIO()
    Image.fromarray((blurred_HW3 + noise_HW3).clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def time_and_pixels(rounds: int) -> list[str]:
    """The rows of the table of times and differences."""
    rows = [
        "| image | JPEG scaling | file | decoded px | ms (CPU) | mean difference | largest |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, size in SIZES.items():
        files = [scene(np.random.default_rng((0, number)), size) for number in range(NUM_SCENES)]
        full: list[NDArray[np.uint8]] = []
        for scaling in SCALINGS:
            preprocessing = Preprocessing(input_px=INPUT_PX, jpeg_scaling=scaling)
            times_ms = []
            for _ in range(rounds):
                begin = time.process_time()
                images = [decode_image(content, preprocessing) for content in files]
                times_ms.append(1000 * (time.process_time() - begin) / len(files))
            pixels = [image.pixels_SS3 for image in images]
            full = full or pixels
            difference = np.abs(np.stack(pixels).astype(int) - np.stack(full))
            rows.append(
                f"| {name} | {scaling} | {sum(map(len, files)) / len(files) / 1e6:.1f} MB | "
                f"{images[0].decoded_pixels:,} | {statistics.median(times_ms):.1f} | {difference.mean():.2f} | "
                f"{difference.max()} |"
            )
    return rows


def cost_of_50_megapixels(rounds: int) -> list[str]:
    """The rows of the table of what an image of one colour with 50 megapixels costs; a bomb has such an image."""
    rows = ["| file | decoded px that count | ms (CPU) | peak of memory |", "|---|---|---|---|"]
    preprocessing, image = Preprocessing(input_px=INPUT_PX), Image.new("RGB", LARGE, (90, 120, 60))
    with tempfile.TemporaryDirectory() as folder:
        for name, (kind, options) in LARGE_FILES.items():
            path = Path(folder) / "image"
            image.save(path, kind, **options)
            decoded_pixels = decode_image(path.read_bytes(), preprocessing, MAX_HEADER_PIXELS).decoded_pixels
            figures = [
                json.loads(
                    subprocess.run([sys.executable, "-c", DECODE, str(path)], capture_output=True, check=True).stdout
                )
                for _ in range(rounds)
            ]
            ms, mib = (statistics.median(values) for values in zip(*figures, strict=True))
            rows.append(f"| {name} | {decoded_pixels:,} | {ms:.0f} | {mib:.0f} MiB |")
    return rows


def write_tree(root: Path, per_class: int) -> None:
    """Write ``per_class`` training and as many test images of each letter."""
    for split, part in enumerate(("train", "test")):
        for label, letter in enumerate(LETTERS):
            (root / part / letter).mkdir(parents=True)
            for number in range(per_class):
                content = scene(np.random.default_rng((1, split, label, number)), SIZES["1.2 MP"], letter)
                (root / part / letter / f"{number}.jpg").write_bytes(content)


def load(root: Path, scaling: JpegScaling) -> Dataset:
    """The long-tailed images, decoded in one of the ways."""
    config = data_config(str(root), GAMMA, "share", SMALL_INPUT_PX)
    return load_dataset(config.model_copy(update={"resizing": Resizing(jpeg_scaling=scaling)}))


def train(root: Path, data: Dataset, scaling: JpegScaling, seed: int) -> Run:
    """Train a small network on images that are decoded in one of the ways."""
    config = data_config(str(root), GAMMA, "share", SMALL_INPUT_PX)
    config = config.model_copy(update={"resizing": data.task.resizing})
    recipe = find_recipe("demo").model_copy(update={"epochs": 40, "eval_every": 40, "batch_size": 16})
    run = run_config(config, "resnet8", method_config("ce", {}), recipe, seed=seed, execution=Execution())
    return train_run(run, data, root / f"run-{scaling}-{seed}", Console(quiet=True), scaling)


def verdict(run: Run, full: Dataset, other: Dataset) -> str:
    """Whether the accuracy of a network in every group is kept if images are decoded in another way."""
    row_of = {pixels: row for row, pixels in enumerate(pixel_hashes(full.test_images))}
    network = run.load_network()

    def compared(images_of: Dataset) -> ComparedModel:
        def logits(images: Images) -> NDArray[np.floating]:
            rows_N = np.array([row_of[pixels] for pixels in pixel_hashes(images)])
            return torch_logits(network, run.task, images_of.test_images[rows_N], torch.float32)

        return ComparedModel("", "", "", 0, None, "fp32", logits)

    margins = dict.fromkeys(full.task.groups.names, MARGIN)
    return compare_models(compared(full), compared(other), full, margins).verdict


def accuracies(per_class: int, seeds: Sequence[int]) -> list[str]:
    """The rows of the table of accuracies by group, and of verdicts."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_tree(root, per_class)
        data = {scaling: load(root, scaling) for scaling in SCALINGS}
        groups = [*data["none"].task.groups.names, "all"]
        rows = [f"| JPEG scaling | {' | '.join(groups)} | parity with none |", "|---" * (len(groups) + 2) + "|"]
        found: dict[JpegScaling, list[Run]] = {
            scaling: [train(root, data[scaling], scaling, seed) for seed in seeds] for scaling in SCALINGS
        }
        for scaling, runs in found.items():
            cells = []
            for group in groups:
                values = [100 * run.accuracy()[group] for run in runs]
                cells.append(f"{statistics.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})")
            verdicts = [verdict(run, data["none"], data[scaling]) for run in found["none"]]
            rows.append(f"| {scaling} | {' | '.join(cells)} | {', '.join(verdicts)} |")
    return rows


def main() -> None:
    """Measure and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--per-class", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(run_metadata("python -m benchmarks.decoding", ["pillow", "torch"]))
    print("\n".join(time_and_pixels(options.rounds)), flush=True)
    print("\n".join(cost_of_50_megapixels(options.rounds)), flush=True)
    print("\n".join(accuracies(options.per_class, range(options.seeds))))


if __name__ == "__main__":
    main()
