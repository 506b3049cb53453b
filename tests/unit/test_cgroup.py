"""Cgroups without a host's: texts captured from v1 and v2 kernels, and a v2 tree of plain files."""

from pathlib import Path

import pytest

from alveole.host.cgroup import Cgroups, Layout, layout_of
from alveole.host.cgroup_usage import (
    ProcessMemory,
    Usage,
    oom_kills_v1,
    parse_flat,
    parse_io_v1,
    parse_io_v2,
    parse_rollups,
    usage_v1,
    usage_v2,
)
from alveole.host.mountinfo import parse_mountinfo
from alveole.model.error import AlveoleError, ErrorCode

HYBRID = """31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,release_agent=/lib/systemd/agent,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
42 31 0:32 /docker/1 /var/lib/other/memory rw - cgroup cgroup rw,memory
"""
UNIFIED = "29 22 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
IO_V2 = """254:0 rbytes=1916928 wbytes=4096 rios=12 wios=1 dbytes=0 dios=0
7:3 rbytes=1000 wbytes=2000 rios=1 wios=1 dbytes=0 dios=0
"""
IO_V1 = "254:0 Read 1916928\n254:0 Write 4096\n254:0 Sync 4096\n254:0 Total 1921024\nTotal 1921024\n"
MEMORY_EVENTS = "low 0\nhigh 0\nmax 37\noom 3\noom_kill 2\noom_group_kill 0\n"


def test_hybrid_layout_names_each_controller_once_and_ignores_views_of_a_part() -> None:
    layout = layout_of(parse_mountinfo(HYBRID))
    assert layout.name == "hybrid"
    assert layout.v2 == Path("/sys/fs/cgroup/unified")
    assert layout.v1 == {
        "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "cpuacct": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "memory": Path("/sys/fs/cgroup/memory"),
        "name=systemd": Path("/sys/fs/cgroup/systemd"),
    }
    assert len(layout.mounts) == 4


def test_v2_and_v1_layouts() -> None:
    assert layout_of(parse_mountinfo(UNIFIED)) == Layout(v2=Path("/sys/fs/cgroup"))
    assert layout_of(parse_mountinfo(UNIFIED)).name == "v2"
    only_v1 = layout_of(entry for entry in parse_mountinfo(HYBRID) if entry.filesystem != "cgroup2")
    assert only_v1.name == "v1"


def test_io_is_summed_over_devices() -> None:
    assert parse_io_v2(IO_V2) == (1917928, 6096)
    assert parse_io_v1(IO_V1) == (1916928, 4096)
    assert parse_io_v2("") == (0, 0)


def test_flat_files_skip_what_is_no_pair() -> None:
    assert parse_flat("oom_kill_disable 0\nsome avg10=0.00 total=1\noom_kill 2\n") == {
        "oom_kill_disable": 0,
        "oom_kill": 2,
    }


def _write(directory: Path, files: dict[str, str]) -> None:
    directory.mkdir(parents=True)
    for name, text in files.items():
        (directory / name).write_text(text)


def test_usage_v2_leaves_out_cache_that_could_go_and_knows_no_limit(tmp_path: Path) -> None:
    _write(
        tmp_path / "a",
        {
            "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\n",
            "memory.current": "10000\n",
            "memory.stat": "anon 4000\ninactive_file 3000\n",
            "memory.max": "max\n",
            "pids.current": "7\n",
            "io.stat": IO_V2,
        },
    )
    assert usage_v2(tmp_path / "a") == Usage(
        cpu_s=2.5, memory_bytes=7000, pids=7, io_read_bytes=1917928, io_write_bytes=6096
    )


def test_usage_v1_takes_the_hierarchy_into_account_and_knows_no_limit(tmp_path: Path) -> None:
    _write(
        tmp_path / "memory/a",
        {
            "memory.usage_in_bytes": "10000",
            "memory.stat": "inactive_file 1\ntotal_inactive_file 3000\n",
            "memory.limit_in_bytes": "9223372036854771712",
        },
    )
    _write(tmp_path / "cpuacct/a", {"cpuacct.usage": "2276912000"})
    usage = usage_v1({"memory": tmp_path / "memory", "cpuacct": tmp_path / "cpuacct"}, "a")
    assert usage == Usage(cpu_s=2.276912, memory_bytes=7000)


def test_what_v1_cannot_tell_is_taken_from_v2() -> None:
    v1, v2 = Usage(cpu_s=0.0, pids=3), Usage(cpu_s=9.0, io_read_bytes=5)
    assert v1.or_else(v2) == Usage(cpu_s=0.0, pids=3, io_read_bytes=5)


def rollup(**kib: int) -> str:
    """As the kernel writes it, of which not all is looked at."""
    head = "55c53f9ec000-7ffdd070b000 ---p 00000000 00:00 0                          [rollup]\n"
    return head + "".join(f"{name + ':':<16}{number:>8} kB\n" for name, number in {"Rss": 99999, **kib}.items())


def test_memory_is_divided_into_what_is_an_instances_own_and_its_part_of_the_rest() -> None:
    clone = rollup(Pss=700, Pss_Anon=500, Shared_Clean=400, Private_Clean=20, Private_Dirty=500)
    assert parse_rollups([clone]) == ProcessMemory(own_bytes=520 << 10, shared_bytes=180 << 10)
    workers = [rollup(Pss=60, Pss_Anon=50, Shared_Dirty=80, Private_Clean=1, Private_Dirty=9)] * 2
    both = parse_rollups(workers)  # what a process has in common with those it forked is the instance's alone
    assert (both.own_bytes, both.shared_bytes, both.pss_bytes) == (100 << 10, 20 << 10, 120 << 10)
    assert parse_rollups(["", clone]) == parse_rollups([clone])  # one has ended
    assert parse_rollups([]).pss_bytes == 0
    assert parse_rollups([rollup(Pss=7, Private_Clean=8)]).shared_bytes == 0  # Pss is rounded down


def test_oom_kills_are_read_from_either_version(tmp_path: Path) -> None:
    _write(tmp_path / "a", {"memory.events": MEMORY_EVENTS, "memory.oom_control": "under_oom 0\noom_kill 4\n"})
    assert Cgroups(Layout(v2=tmp_path)).oom_kills("a") == 2
    assert Cgroups(Layout(v2=tmp_path, v1={"memory": tmp_path})).oom_kills("a") == 4
    assert Cgroups(Layout(v2=tmp_path)).oom_kills("missing") == 0
    assert oom_kills_v1(tmp_path / "missing") is None


@pytest.fixture
def v2_tree(tmp_path: Path) -> Path:
    for directory in (tmp_path, tmp_path / "alveole-1"):
        directory.mkdir(exist_ok=True)
        (directory / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids rdma misc\n")
        (directory / "cgroup.subtree_control").write_text("memory\n")
    return tmp_path


def test_prepare_enables_only_wanted_and_missing_controllers_on_v2(v2_tree: Path) -> None:
    Cgroups(Layout(v2=v2_tree)).prepare("alveole-1")
    for directory in (v2_tree, v2_tree / "alveole-1"):
        assert (directory / "cgroup.subtree_control").read_text() == "+cpu +io +pids"


def test_processes_are_those_of_all_hierarchies_and_never_zero(tmp_path: Path) -> None:
    """Pid 0 stands for a process of another pid namespace; killing "it" would kill our own group."""
    _write(tmp_path / "two/a", {"cgroup.procs": "11\n0\n"})
    _write(tmp_path / "two/a/below", {"cgroup.procs": "12\n"})
    _write(tmp_path / "one/a", {"cgroup.procs": "11\n13\n"})
    cgroups = Cgroups(Layout(v2=tmp_path / "two", v1={"pids": tmp_path / "one"}))
    assert cgroups.processes("a") == {11, 12, 13}
    assert cgroups.processes("missing") == frozenset()


async def test_remove_takes_nested_cgroups_away_everywhere_and_again(tmp_path: Path) -> None:
    (tmp_path / "two/a/b/c").mkdir(parents=True)
    (tmp_path / "one/a").mkdir(parents=True)
    cgroups = Cgroups(Layout(v2=tmp_path / "two", v1={"pids": tmp_path / "one"}))
    await cgroups.remove("a")
    await cgroups.remove("a")
    assert not list(tmp_path.glob("*/a"))


async def test_remove_refuses_a_cgroup_with_processes(tmp_path: Path) -> None:
    _write(tmp_path / "a", {"cgroup.procs": "11\n"})
    with pytest.raises(AlveoleError) as caught:
        await Cgroups(Layout(v2=tmp_path)).remove("a")
    assert caught.value.code is ErrorCode.CONFLICT
    assert (tmp_path / "a").exists()


def test_a_host_without_cgroups_is_told_so() -> None:
    with pytest.raises(AlveoleError) as caught:
        Cgroups(Layout()).prepare("alveole-1")
    assert caught.value.code is ErrorCode.UNSUPPORTED
