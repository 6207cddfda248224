import multiprocessing
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ltkd.contract import staging
from ltkd.contract.staging import restore, staged

FILES = ("a", "b", "c", "d")
# a child runs nothing but these few lines of Python, so the threads that other tests have started do not matter to it
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
FORKS = multiprocessing.get_context("fork")


def anything(_: Path) -> None:
    """Every place may be replaced."""


def write(out: Path, content: str) -> None:
    """A directory whose files all say the same, so that a mixture would be seen."""
    with staged(out, anything) as stage:
        for name in FILES:
            (stage / name).write_text(content)


def content_of(out: Path) -> str:
    (content,) = {(out / name).read_text() for name in FILES}
    assert sorted(path.name for path in out.iterdir()) == list(FILES)
    return content


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(params=["exchange", "two renames"])
def exchanging(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the kernel's exchange of two directories, and as on systems that have none."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_exchanged", lambda one, other: False)
        return False
    return True


def killed(out: Path, owner: object, function: str, number: int, after: bool) -> bool:
    """Write in a process that kills itself before or after the given call of a function; whether it got there."""

    def child() -> None:
        calls = [0]
        original = getattr(owner, function)

        def counted(*arguments: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = original(*arguments, **options)
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        setattr(owner, function, counted)
        write(out, "new")

    process = FORKS.Process(target=child)
    process.start()
    process.join(60)
    code = process.exitcode
    process.close()
    assert code in (0, -signal.SIGKILL)
    return code != 0


STEPS: list[tuple[object, str]] = [
    (Path, "mkdir"),
    (Path, "write_text"),
    (os, "fsync"),
    (Path, "rename"),
    (staging, "_exchanged"),
    (staging, "_publish"),
    (shutil, "rmtree"),
    (os, "unlink"),
]


@pytest.mark.slow
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("owner", "function"), STEPS, ids=[name for _, name in STEPS])
@pytest.mark.parametrize("first", [False, True], ids=["replacing", "first"])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_directory_whole(
    tmp_path: Path, exchanging: bool, owner: object, function: str, after: bool, first: bool
) -> None:
    out, kills = tmp_path / "toy", 0
    for number in range(1, 30):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if not first:
            write(out, "old")
        if not killed(out, owner, function, number, after):
            break
        kills += 1
        restore(out)  # what every reader does
        if first:
            assert not out.exists() or content_of(out) == "new"
        else:
            assert content_of(out) in ("old", "new")
        write(out, "next")
        assert content_of(out) == "next"
        assert names_in(tmp_path) == ["toy"]
    expected_to_be_met = not (first and function in ("_exchanged", "unlink")) and not (
        exchanging and function in ("rename", "rmtree") and not first
    )
    assert kills or not expected_to_be_met


def test_without_the_exchange_a_kill_between_the_renames_is_mended_by_the_next_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_exchanged", lambda one, other: False)
    out = tmp_path / "toy"
    write(out, "old")
    assert killed(out, Path, "rename", 1, after=True)
    assert not out.exists()  # the fault is there
    restore(out)
    assert content_of(out) == "old"


def test_the_exchange_leaves_no_moment_without_a_directory(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    write(out, "old")
    assert killed(out, staging, "_exchanged", 1, after=True)
    assert content_of(out) == "new"  # and the old one lies beside it
    (left,) = [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    assert content_of(left) == "old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a file system of its own can only be mounted by root: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("free_pages", range(8))
def test_a_full_disk_leaves_the_old_directory_and_nothing_else(small_disk: Path, free_pages: int) -> None:
    out = small_disk / "toy"
    write(out, "old")
    (small_disk / "ballast").touch()
    free = shutil.disk_usage(small_disk).free - 4096 * free_pages
    (small_disk / "ballast").write_bytes(bytes(free))
    with pytest.raises(OSError, match="No space left"):
        write(out, "new" * 10_000)
    assert content_of(out) == "old"
    assert names_in(small_disk) == ["ballast", "toy"]
    (small_disk / "ballast").unlink()
    write(out, "new")
    assert content_of(out) == "new"


def in_processes(*work: Callable[[], None]) -> list[int | None]:
    """The exit codes of several things done at once."""
    processes = [FORKS.Process(target=each) for each in work]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_many_writers_at_one_place_each_end_whole_and_readers_always_see_one_of_them(
    tmp_path: Path, exchanging: bool
) -> None:
    out = tmp_path / "toy"
    write(out, "0")

    def writer(name: str) -> None:
        for _ in range(15):
            write(out, name)

    def reader() -> None:
        for _ in range(2000):
            restore(out)
            try:
                folder = os.open(out, os.O_RDONLY)
            except FileNotFoundError:  # only between the two renames, and over when restore comes back
                assert not exchanging
                continue
            try:
                seen = {Path(f"/proc/self/fd/{folder}/{name}").read_text() for name in FILES}
            except FileNotFoundError:  # an old directory is removed under its reader
                continue
            finally:
                os.close(folder)
            assert len(seen) == 1

    codes = in_processes(lambda: writer("1"), lambda: writer("2"), lambda: writer("3"), reader)
    assert codes == [0, 0, 0, 0]
    assert content_of(out) in ("1", "2", "3")
    assert names_in(tmp_path) == ["toy"]


def test_the_one_that_ends_later_stays(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    with staged(out, anything) as later:
        for name in FILES:
            (later / name).write_text("later")
        write(out, "sooner")
        assert content_of(out) == "sooner"
        assert later.is_dir()  # the other one did not take it for a leftover
    assert content_of(out) == "later"
    assert names_in(tmp_path) == ["toy"]


def test_what_came_to_the_place_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "toy"

    def empty(place: Path) -> None:
        if place.exists():
            raise ValueError("somebody's work")

    with pytest.raises(ValueError, match="somebody's work"), staged(out, empty) as stage:
        (stage / "a").write_text("new")
        out.mkdir()
        (out / "thesis").write_text("years")
    assert (out / "thesis").read_text() == "years"
    assert names_in(tmp_path) == ["toy"]


def test_a_neighbour_with_a_longer_name_is_left_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "toy.v2", anything) as stage:
        write(tmp_path / "toy", "1")
        assert stage.is_dir()
        (stage / "a").write_text("2")
    assert names_in(tmp_path) == ["toy", "toy.v2"]


def test_everything_is_on_the_disk_before_it_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "toy"
    write(out, "old")
    order: list[str] = []
    publish, fsync = staging._publish, os.fsync

    def noted_fsync(descriptor: int) -> None:
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def noted_publish(stage: Path, place: Path) -> None:
        order.append("published")
        publish(stage, place)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(staging, "_publish", noted_publish)
    write(out, "new")
    at = order.index("published")
    assert sorted(order[: at - 1]) == list(FILES)
    assert order[at - 1].endswith(".part")
    assert order[at + 1 :] == [tmp_path.name]


def test_a_link_keeps_pointing_at_its_directory(tmp_path: Path) -> None:
    write(tmp_path / "toy", "old")
    (tmp_path / "current").symlink_to("toy")
    write(tmp_path / "current", "new")
    assert (tmp_path / "current").is_symlink()
    assert content_of(tmp_path / "toy") == "new"
