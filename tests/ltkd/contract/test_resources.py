import os
from pathlib import Path

from ltkd.contract.resources import num_cores, quota_cores


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_machine_without_control_groups_has_no_quota(tmp_path: Path) -> None:
    assert quota_cores(tmp_path) > 1000
    assert 1 <= num_cores(tmp_path) <= (os.cpu_count() or 1)


def test_the_quota_of_a_container_with_control_groups_version_2_is_used(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/\n")
    write(tmp_path / "sys/fs/cgroup/cpu.max", "150000 100000\n")
    assert quota_cores(tmp_path) == 1.5
    assert num_cores(tmp_path) == 1


def test_the_smallest_quota_of_a_group_and_its_parents_is_used(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "0::/a.slice/b.service\n")
    write(tmp_path / "sys/fs/cgroup/a.slice/cpu.max", "200000 100000\n")
    write(tmp_path / "sys/fs/cgroup/a.slice/b.service/cpu.max", "max 100000\n")
    assert quota_cores(tmp_path) == 2


def test_the_quota_of_control_groups_version_1_is_used(tmp_path: Path) -> None:
    write(tmp_path / "proc/self/cgroup", "3:cpu,cpuacct:/box\n")
    write(tmp_path / "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    write(tmp_path / "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "300000\n")
    write(tmp_path / "sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000\n")
    assert quota_cores(tmp_path) == 3


def test_a_quota_below_one_core_counts_as_one_core(tmp_path: Path) -> None:
    write(tmp_path / "sys/fs/cgroup/cpu.max", "20000 100000\n")
    assert num_cores(tmp_path) == 1
