import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from training_toys import toy_data

from ltkd.data import batches as batches_module
from ltkd.data.augmentation import augment, mix_seeds
from ltkd.data.batches import Batches, Shard, default_workers, make_batches
from ltkd.data.datasets import Dataset, data_config, load_dataset
from ltkd.data.image_files import FileImages
from ltkd.errors import DataError, UsageError

CPU, ALONE = torch.device("cpu"), Shard()


def in_memory(
    data: Dataset | None = None,
    *,
    batch_size: int = 8,
    seed: int = 3,
    shard: Shard = ALONE,
    views: int | None = None,
) -> Batches:
    return make_batches(data or toy_data(), batch_size=batch_size, seed=seed, device=CPU, shard=shard, views=views)


def by_row(batches: Batches, epoch: int) -> dict[int, bytes]:
    """Each augmented image of an epoch, by its row."""
    return {
        int(row): image.numpy().tobytes()
        for pixels, rows in batches.epoch(epoch)
        for image, row in zip(pixels, rows, strict=True)
    }


def same(ours: list[tuple[Tensor, Tensor]], theirs: list[tuple[Tensor, Tensor]]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(ours, theirs, strict=True)
    )


def reference_augment(pixels: Tensor, mirror: bool, random: torch.Generator) -> Tensor:
    """A simple version of the augmentation, with draws and pixels together; results must be equal to the bit."""
    batch, size_px = pixels.shape[:2]
    border = size_px // 8
    top, left = torch.randint(0, 2 * border + 1, (2, batch), generator=random)
    mirrored = torch.rand((batch, 1), generator=random) < 0.5 if mirror else torch.zeros((batch, 1), dtype=torch.bool)
    padded = torch.nn.functional.pad(pixels, (0, 0, border, border, border, border))
    crops = [padded[n, top[n] : top[n] + size_px, left[n] : left[n] + size_px] for n in range(batch)]
    return torch.stack([image.flip(1) if mirrored[n] else image for n, image in enumerate(crops)])


@pytest.mark.parametrize("mirror", [False, True])
def test_one_process_gets_the_batches_of_the_reference_loop_to_the_bit(mirror: bool) -> None:
    data = toy_data()
    data = Dataset(data.task, data.train_images, data.train_labels, data.test_images, data.test_labels, mirror)
    images = torch.from_numpy(data.train_images)
    batches = in_memory(data)
    for epoch in (0, 5):
        random = torch.Generator().manual_seed(3 * 1_000_003 + epoch)
        order = torch.randperm(len(images), generator=random)
        expected = [(reference_augment(images[rows], mirror, random), rows) for rows in torch.split(order, 8)]
        assert same(list(batches.epoch(epoch)), expected)
        assert len(expected) == batches.steps_per_epoch


def test_every_epoch_has_each_image_once_in_a_new_order_and_with_new_crops() -> None:
    batches = in_memory()
    first, second = by_row(batches, 0), by_row(batches, 1)
    assert sorted(first) == sorted(second) == list(range(37))
    assert list(first) != list(second)
    assert first != second
    assert by_row(in_memory(seed=4), 0) != first


@pytest.mark.parametrize("views", [None, 2])
def test_a_resumed_epoch_gives_the_remaining_batches(views: int | None) -> None:
    batches = in_memory(views=views)
    whole = list(batches.epoch(2))
    for first_step in range(len(whole) + 1):
        assert same(list(in_memory(views=views).epoch(2, first_step)), whole[first_step:])


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("views", [None, 2])
def test_ranks_together_train_on_the_images_of_one_process(world_size: int, views: int | None) -> None:
    batches_of_ranks = [in_memory(shard=Shard(rank, world_size), views=views) for rank in range(world_size)]
    whole = list(in_memory(views=views).epoch(1))
    if world_size > 5:  # the last batch has 5 images: too few for 8 ranks, so every rank leaves it out
        whole.pop()
    assert {batches.steps_per_epoch for batches in batches_of_ranks} == {len(whole)}
    parts = [list(batches.epoch(1)) for batches in batches_of_ranks]
    assert {len(part) for part in parts} == {len(whole)}
    for step, (pixels, rows) in enumerate(whole):
        for rank, part in enumerate(parts):
            assert torch.equal(part[step][0], pixels[rank::world_size])
            assert torch.equal(part[step][1], rows[rank::world_size])
            assert len(rows[rank::world_size])


def test_fixed_views_repeat_while_the_order_changes() -> None:
    batches = in_memory(views=3)
    epochs = [by_row(batches, epoch) for epoch in range(6)]
    assert epochs[0] == epochs[3]
    assert epochs[2] == epochs[5]
    assert list(epochs[0]) != list(epochs[3])  # the order differs
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert by_row(in_memory(views=3, seed=4), 0) != epochs[0]


def test_the_first_epochs_are_the_same_with_and_without_fixed_views() -> None:
    with_views, without = in_memory(views=3), in_memory()
    assert all(same(list(with_views.epoch(epoch)), list(without.epoch(epoch))) for epoch in range(3))
    assert not same(list(with_views.epoch(3)), list(without.epoch(3)))


def test_drawing_batches_does_not_change_the_random_state_of_the_caller() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    list(in_memory().epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_too_small_for_a_border_are_not_changed() -> None:
    data = toy_data()
    tiny = np.ascontiguousarray(data.train_images[:][:, :7, :7])  # the border has 7 // 8 = 0 pixels
    batches = in_memory(Dataset(data.task, tiny, data.train_labels, data.test_images, data.test_labels, mirror=False))
    assert by_row(batches, 0) == {row: image.tobytes() for row, image in enumerate(tiny)}


def test_more_ranks_than_images_in_a_batch_and_less_than_one_view_are_rejected() -> None:
    with pytest.raises(UsageError, match="9 processes cannot share batches of 8 images; start fewer"):
        in_memory(shard=Shard(0, 9))
    with pytest.raises(UsageError, match="8 processes cannot share batches of 6 images"):
        in_memory(toy_data(train_counts=(3, 2, 1)), shard=Shard(0, 8), batch_size=64)
    with pytest.raises(UsageError, match="number of views must be at least 1, got 0"):
        in_memory(views=0)


@pytest.mark.parametrize("mirror", [False, True])
def test_augmentation_crops_from_a_black_border_and_mirrors_half_if_allowed(mirror: bool) -> None:
    pixels = torch.randint(1, 255, (16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    out = augment(pixels.expand(400, 16, 16, 3).contiguous(), mirror, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(pixels, (0, 0, 2, 2, 2, 2))
    crops = {padded[top : top + 16, left : left + 16].numpy().tobytes() for top in range(5) for left in range(5)}
    plain = [image.numpy().tobytes() for image in out if image.numpy().tobytes() in crops]
    mirrored = [image for image in out.flip(2) if image.contiguous().numpy().tobytes() in crops]
    assert len(plain) + len(mirrored) == 400
    assert set(plain) == crops
    # 400 fair coins: five standard deviations are 50
    assert abs(len(mirrored) - 200) < 50 if mirror else not mirrored


PX = 128  # too large to be held in memory


def save_photograph(path: Path, size_px: tuple[int, int], number: int, orientation: int = 1) -> None:
    """Save an image with shapes, shades and a little noise, which compresses like a photograph."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 255, (9, 9, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize(size_px, Image.Resampling.BICUBIC)).astype(int)
    image = Image.fromarray((smooth + random.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif)


def photographs(root: Path, counts: tuple[int, int, int] = (9, 5, 2), size_px: tuple[int, int] = (150, 140)) -> Path:
    for label, name in enumerate("abc"):
        for number in range(counts[label]):
            suffix = ".png" if number % 2 else ".jpg"
            save_photograph(root / "train" / name / f"{number:03}{suffix}", size_px, 100 * label + number)
        save_photograph(root / "test" / name / "0.jpg", size_px, 1000 + label)
    return root


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    root = photographs(tmp_path_factory.mktemp("photographs"))
    return load_dataset(data_config(str(root), None, "share", PX))


def on_disk(data: Dataset, *, workers: int = 0, batch_size: int = 4, shard: Shard = ALONE, seed: int = 3) -> Batches:
    return make_batches(data, batch_size=batch_size, seed=seed, device=CPU, shard=shard, workers=workers)


def test_large_images_stay_on_disk_and_every_epoch_has_each_once(streamed: Dataset) -> None:
    assert isinstance(streamed.train_images, FileImages)
    batches = on_disk(streamed)
    loaded = list(batches.epoch(0))
    assert len(loaded) == batches.steps_per_epoch == 4
    assert {(pixels.dtype, *pixels.shape[1:]) for pixels, _ in loaded} == {(torch.uint8, PX, PX, 3)}
    assert [len(rows) for _, rows in loaded] == [4, 4, 4, 4]
    first, second = by_row(batches, 0), by_row(batches, 1)
    assert sorted(first) == sorted(second) == list(range(16))
    assert list(first) != list(second)
    assert not any(first[row] == second[row] for row in first)
    assert by_row(on_disk(streamed, seed=4), 0) != first


def test_crops_of_large_images_do_not_depend_on_workers_ranks_or_the_first_step(streamed: Dataset) -> None:
    expected = list(on_disk(streamed).epoch(1))
    with_workers = on_disk(streamed, workers=2)
    assert same(list(with_workers.epoch(1)), expected)
    assert same(list(with_workers.epoch(1, first_step=3)), expected[3:])
    assert by_row(on_disk(streamed, batch_size=7), 1) == by_row(on_disk(streamed), 1)
    for rank in range(3):
        part = list(on_disk(streamed, shard=Shard(rank, 3)).epoch(1))
        assert same(part, [(pixels[rank::3], rows[rank::3]) for pixels, rows in expected])


def test_a_large_image_is_cropped_as_by_torchvision(streamed: Dataset) -> None:
    from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, RandomResizedCrop

    assert streamed.train_files
    reference = Compose([RandomResizedCrop(PX, scale=(0.25, 1.0), antialias=True), RandomHorizontalFlip()])
    for pixels, rows in on_disk(streamed).epoch(2):
        for image, row in zip(pixels, rows.tolist(), strict=True):
            torch.manual_seed(mix_seeds(3, 2, row))
            with Image.open(streamed.train_files[row]) as opened:  # too small to be decoded at a lower resolution
                np.testing.assert_array_equal(image.numpy(), np.asarray(reference(opened.convert("RGB"))))


@pytest.mark.parametrize("workers", [0, 1])
def test_loading_large_images_does_not_change_the_random_state_of_the_caller(streamed: Dataset, workers: int) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    batches = on_disk(streamed, workers=workers).epoch(0)
    next(batches)
    assert torch.equal(torch.get_rng_state(), before)
    list(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_survive_an_epoch_and_exit_when_one_is_abandoned(streamed: Dataset) -> None:
    others = {process.pid for process in multiprocessing.active_children()}

    def workers() -> set[int | None]:
        return {process.pid for process in multiprocessing.active_children()} - others

    batches = on_disk(streamed, workers=1)
    list(batches.epoch(0))
    first = workers()
    assert len(first) == 1
    abandoned = batches.epoch(1)
    next(abandoned)
    assert workers() == first
    del abandoned
    assert not workers()
    list(batches.epoch(1))
    assert len(workers()) == 1
    del batches
    assert not workers()


SIGNALLED = """
import multiprocessing, signal, sys, time
import torch
from ltkd.data.batches import make_batches
from ltkd.data.datasets import data_config, load_dataset

if __name__ == "__main__":
    received = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: received.append(number))
    data = load_dataset(data_config(sys.argv[1], None, "share", 128))
    batches = make_batches(data, batch_size=2, seed=0, device=torch.device("cpu"), workers=1).epoch(0)
    next(batches)
    print("ready", multiprocessing.active_children()[0].pid, flush=True)
    while len(received) < 2:
        time.sleep(0.01)
    print(len(list(batches)))
"""


@pytest.fixture
def signalled(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """A training in its own process group, after its first batch, and the process id of its worker."""
    script = tmp_path / "signalled.py"
    script.write_text(SIGNALLED)
    command = [sys.executable, str(script), str(photographs(tmp_path / "photographs"))]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True) as training:
        assert training.stdout
        ready, worker = training.stdout.readline().split()
        assert ready == "ready"
        yield training, int(worker)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="process groups of POSIX")
def test_signals_to_the_process_group_do_not_stop_the_remaining_batches(
    signalled: tuple[subprocess.Popen[str], int],
) -> None:
    training, _ = signalled
    for number in (signal.SIGINT, signal.SIGTERM):
        os.killpg(training.pid, number)
    stdout, stderr = training.communicate()
    assert (stdout, training.returncode) == ("7\n", 0)
    assert "Traceback" not in stderr


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL of POSIX")
def test_workers_exit_when_the_training_is_killed(signalled: tuple[subprocess.Popen[str], int]) -> None:
    training, worker = signalled
    training.kill()
    training.wait()
    with pytest.raises(ProcessLookupError):
        for _ in range(1000):  # ten seconds
            os.kill(worker, 0)
            time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL of POSIX")
def test_an_epoch_whose_worker_is_killed_gives_the_same_images_and_a_warning(streamed: Dataset) -> None:
    others = {process.pid for process in multiprocessing.active_children()}
    whole = list(on_disk(streamed, batch_size=1).epoch(0))
    batches = on_disk(streamed, batch_size=1, workers=1)
    epoch = batches.epoch(0)
    loaded = [next(epoch)]
    (worker,) = (process for process in multiprocessing.active_children() if process.pid not in others)
    os.kill(worker.pid or 0, signal.SIGKILL)
    with pytest.warns(RuntimeWarning, match=r"a worker process ended \(.*\); the last \d+ batches of this epoch are"):
        loaded += epoch
    assert same(loaded, whole)
    assert same(list(batches.epoch(0)), whole)  # from a new worker


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanished_after_the_check_is_named_in_an_error_of_one_line(tmp_path: Path, workers: int) -> None:
    data = load_dataset(data_config(str(photographs(tmp_path)), None, "share", PX))
    (tmp_path / "train" / "b" / "003.png").unlink()
    with pytest.raises(DataError, match=r"train/b/003\.png: the file cannot be read") as error:
        list(on_disk(data, workers=workers).epoch(0))
    assert "\n" not in str(error.value)


def test_fixed_views_of_large_images_are_rejected(streamed: Dataset) -> None:
    with pytest.raises(UsageError, match="images of 128 px are read from disk; train without fixed views"):
        make_batches(streamed, batch_size=4, seed=0, device=CPU, views=2)


def test_memory_stays_flat_over_many_large_images(tmp_path: Path) -> None:
    root = photographs(tmp_path, counts=(2, 1, 1), size_px=(512, 512))
    for number in range(296):  # 300 hard links to the same few files
        suffix = ".jpg" if number % 2 else ".png"
        os.link(
            root / "train" / "a" / f"00{'0' if number % 2 else '1'}{suffix}",
            root / "train" / "a" / f"n{number}{suffix}",
        )
    tracemalloc.start()
    data = load_dataset(data_config(str(root), None, "share", PX))
    assert len(data.train_labels) == 300
    for _ in on_disk(data, batch_size=8).epoch(0):
        pass
    for start in range(0, 300, 8):
        data.train_images[start : start + 8]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # NumPy arrays and file contents are traced. 300 decoded images are 14 MB at 128 px and 236 MB at 512 px. Memory may
    # hold a batch of 8 and a few files of up to 0.5 MB each
    assert peak < 5_000_000


def test_the_ranks_share_the_cores_and_each_leaves_one_for_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    for cores, world_size, expected in ((1, 1, 1), (2, 1, 1), (6, 1, 5), (64, 1, 8), (16, 4, 3), (16, 16, 1)):
        monkeypatch.setattr(batches_module, "num_cores", lambda cores=cores: cores)
        assert default_workers(Shard(0, world_size)) == expected
