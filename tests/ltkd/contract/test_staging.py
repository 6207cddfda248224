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
# a child process runs only a few lines of Python, so threads that other tests have started cannot affect it
pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
FORKS = multiprocessing.get_context("fork")


def allow_any(_: Path) -> None:
    """Allow every path to be replaced."""


def write(out: Path, content: str) -> None:
    """Write a directory whose files have the same content, so that a mixture of two directories is detected."""
    with staged(out, allow_any) as stage:
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
    """Run a test with the kernel's exchange of two directories and without it; returns whether it is available."""
    if request.param == "two renames":
        monkeypatch.setattr(staging, "_exchanged", lambda one, other: False)
        return False
    return True


def killed(out: Path, owner: object, function: str, number: int, after: bool) -> bool:
    """Write in a process that kills itself before or after the given call of a function; returns whether it did."""

    def child() -> None:
        calls = [0]
        original = getattr(owner, function)

        def counted(*arguments: object, **options: object) -> object:
            calls[0] += 1
            if calls[0] == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*arguments, **options)
            if calls[0] == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

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
def test_a_kill_at_any_call_leaves_the_complete_old_or_new_directory(
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
        restore(out)  # every reader calls this
        if first:
            assert not out.exists() or content_of(out) == "new"
        else:
            assert content_of(out) in ("old", "new")
        write(out, "next")
        assert content_of(out) == "next"
        assert names_in(tmp_path) == ["toy"]
    call_expected = not (first and function in ("_exchanged", "unlink")) and not (
        exchanging and function in ("rename", "rmtree") and not first
    )
    assert kills or not call_expected


def test_without_the_exchange_the_next_reader_restores_a_directory_after_a_kill_between_the_renames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "_exchanged", lambda one, other: False)
    out = tmp_path / "toy"
    write(out, "old")
    assert killed(out, Path, "rename", 1, after=True)
    assert not out.exists()  # the directory is missing
    restore(out)
    assert content_of(out) == "old"


def test_the_directory_always_exists_during_an_exchange(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    write(out, "old")
    assert killed(out, staging, "_exchanged", 1, after=True)
    assert content_of(out) == "new"  # the old directory is beside it
    (leftover,) = [path for path in tmp_path.iterdir() if path.suffix == ".part"]
    assert content_of(leftover) == "old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"only root can mount a separate file system: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("free_pages", range(8))
def test_a_full_disk_keeps_the_old_directory_and_leaves_no_other_files(small_disk: Path, free_pages: int) -> None:
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


def run_in_processes(*functions: Callable[[], None]) -> list[int | None]:
    """Run functions in parallel processes and return their exit codes."""
    processes = [FORKS.Process(target=function) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


def test_readers_always_see_a_complete_directory_while_many_processes_write_it(
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
            except FileNotFoundError:  # only between the two renames, before restore is called again
                assert not exchanging
                continue
            try:
                contents = {Path(f"/proc/self/fd/{folder}/{name}").read_text() for name in FILES}
            except FileNotFoundError:  # an old directory is removed while it is being read
                continue
            finally:
                os.close(folder)
            assert len(contents) == 1

    codes = run_in_processes(lambda: writer("1"), lambda: writer("2"), lambda: writer("3"), reader)
    assert codes == [0, 0, 0, 0]
    assert content_of(out) in ("1", "2", "3")
    assert names_in(tmp_path) == ["toy"]


def test_the_directory_of_the_last_writer_to_finish_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "toy"
    with staged(out, allow_any) as later:
        for name in FILES:
            (later / name).write_text("later")
        write(out, "sooner")
        assert content_of(out) == "sooner"
        assert later.is_dir()  # the other writer did not remove it as a leftover
    assert content_of(out) == "later"
    assert names_in(tmp_path) == ["toy"]


def test_content_that_appears_at_the_path_while_writing_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "toy"

    def check_absent(path: Path) -> None:
        if path.exists():
            raise ValueError("the path exists")

    with pytest.raises(ValueError, match="the path exists"), staged(out, check_absent) as stage:
        (stage / "a").write_text("new")
        out.mkdir()
        (out / "thesis").write_text("years")
    assert (out / "thesis").read_text() == "years"
    assert names_in(tmp_path) == ["toy"]


def test_the_temporary_directory_of_a_neighbour_with_a_longer_name_is_not_removed(tmp_path: Path) -> None:
    with staged(tmp_path / "toy.v2", allow_any) as stage:
        write(tmp_path / "toy", "1")
        assert stage.is_dir()
        (stage / "a").write_text("2")
    assert names_in(tmp_path) == ["toy", "toy.v2"]


def test_all_files_are_flushed_to_the_disk_before_the_directory_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "toy"
    write(out, "old")
    events: list[str] = []
    publish, fsync = staging._publish, os.fsync

    def recorded_fsync(descriptor: int) -> None:
        events.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    def recorded_publish(stage: Path, path: Path) -> None:
        events.append("published")
        publish(stage, path)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(staging, "_publish", recorded_publish)
    write(out, "new")
    published = events.index("published")
    assert sorted(events[: published - 1]) == list(FILES)
    assert events[published - 1].endswith(".part")
    assert events[published + 1 :] == [tmp_path.name]


def test_a_symbolic_link_still_points_to_its_directory(tmp_path: Path) -> None:
    write(tmp_path / "toy", "old")
    (tmp_path / "current").symlink_to("toy")
    write(tmp_path / "current", "new")
    assert (tmp_path / "current").is_symlink()
    assert content_of(tmp_path / "toy") == "new"
