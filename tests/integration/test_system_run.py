"""Each flag of `run`, its effect seen from inside the instance, behind both walls."""

import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.daemon import Daemon

pytestmark = pytest.mark.root

CAP_NET_RAW, CAP_CHOWN, CAP_SYS_TIME = 1 << 13, 1 << 0, 1 << 25
Inside = Callable[..., str]


@pytest.fixture
def inside(daemon: Daemon, isolation: str) -> Inside:
    """The output of a shell line run with these flags."""

    def run(script: str, *flags: str) -> str:
        return daemon.ok("run", "--rm", "--isolation", isolation, *flags, "busybox", "sh", "-c", script)

    return run


def test_environment(inside: Inside, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--env wins over --env-file; KEY alone takes the caller's; values keep =, spaces and quotes."""
    monkeypatch.setenv("MINE", "from here")
    file = tmp_path / "env"
    file.write_text("# comment\nA=file\nB=x = 'y'\n\n")
    said = inside('echo "$A|$B|$MINE|$PATH|$HOME"', "--env-file", str(file), "-e", "A=flag", "-e", "MINE")
    assert said == "flag|x = 'y'|from here|/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin|/root"


def test_workdir_user_and_hostname(inside: Inside) -> None:
    said = inside(
        "pwd; id -u; id -g; id -G; hostname; cat /etc/hostname; echo $HOME",
        *("--workdir", "/var", "--user", "user", "--hostname", "box-7"),
    )
    assert said.splitlines() == ["/var", "1000", "1000", "1000 2000", "box-7", "box-7", "/home/user"]


def test_user_by_number(inside: Inside) -> None:
    """Ids that the image does not know work, and files made carry them."""
    assert inside("touch /tmp/f; stat -c %u:%g /tmp/f", "--user", "4242:4343") == "4242:4343"


def test_a_missing_workdir_is_made(inside: Inside) -> None:
    assert inside("pwd", "--workdir", "/srv/new/place") == "/srv/new/place"


def test_entrypoint(daemon: Daemon, isolation: str) -> None:
    said = daemon.ok("run", "--rm", "--isolation", isolation, "--entrypoint", "echo", "busybox", "a  b", "c")
    assert said == "a  b c"


def test_memory_limit_kills(daemon: Daemon, isolation: str) -> None:
    """What exceeds --memory is killed, and the reason says why."""
    command = ("busybox", "dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1")
    daemon.cli("run", "--isolation", isolation, "--name", "eater", "-m", "128m", *command)
    status = daemon.wait_phase("eater", "exited")["status"]
    assert status["reason"] == "out of memory"
    assert status["exit_code"] == 137


def test_cpu_limit_holds(daemon: Daemon, isolation: str) -> None:
    """A busy loop with --cpus 0.2 gets about a fifth of a processor."""
    loop = ("busybox", "sh", "-c", "while :; do :; done")
    daemon.ok("run", "-d", "--isolation", isolation, "--name", "busy", "--cpus", "0.2", *loop)
    time.sleep(0.3)
    began, before = time.monotonic(), _cpu_s(daemon)
    time.sleep(2.0)
    used = (_cpu_s(daemon) - before) / (time.monotonic() - began)
    assert 0.05 < used < 0.3


def _cpu_s(daemon: Daemon) -> float:
    return float(daemon.api("GET", "/v1/instances/busy/stats")[1]["cpu_s"])


def test_pids_limit_refuses_forks(daemon: Daemon) -> None:
    forks = "for i in 1 2 3 4 5 6 7 8 9 10; do sleep 5 & done; echo all"
    done = daemon.cli("run", "--rm", "--pids-limit", "6", "busybox", "sh", "-c", forks)
    assert "can't fork" in done.stderr
    assert "all" not in done.stdout


def test_capabilities(inside: Inside) -> None:
    """By default the usual set without SYS_TIME; --cap-add and --cap-drop change it."""
    read = "grep -E '^Cap(Eff|Bnd)' /proc/self/status | cut -f2"
    default = {int(line, 16) for line in inside(read).split()}
    changed = {int(line, 16) for line in inside(read, "--cap-add", "sys_time", "--cap-drop", "NET_RAW").split()}
    (usual,), (mine,) = default, changed
    assert usual & CAP_CHOWN
    assert not usual & CAP_SYS_TIME
    assert mine == (usual | CAP_SYS_TIME) & ~CAP_NET_RAW


def test_dropping_all_capabilities(inside: Inside) -> None:
    read = "grep ^CapBnd /proc/self/status | cut -f2"
    assert int(inside(read, "--cap-drop", "ALL"), 16) == 0
    assert int(inside(read, "--cap-drop", "ALL", "--cap-add", "CHOWN"), 16) == CAP_CHOWN


def test_an_unprivileged_user_has_no_effective_capability(inside: Inside) -> None:
    assert int(inside("grep ^CapEff /proc/self/status | cut -f2", "--user", "user"), 16) == 0


def test_read_only_root(inside: Inside) -> None:
    """Nothing can be written but what is mounted to be."""
    said = inside("touch /x 2>&1; touch /etc/x 2>&1; echo ok > /tmp/y && cat /tmp/y", "--read-only", "--tmpfs", "/tmp")
    assert said.count("Read-only file system") == 2
    assert said.endswith("ok")


def test_tmpfs_holds_its_size(inside: Inside) -> None:
    said = inside("dd if=/dev/zero of=/t/f bs=1M count=8 2>&1; stat -c %s /t/f", "--tmpfs", "/t:size=4m")
    assert "No space left" in said
    assert int(said.splitlines()[-1]) <= 4 << 20


def test_sys_is_read_only_and_low_ports_can_be_bound(inside: Inside) -> None:
    """What a container's root may and may not do."""
    said = inside("touch /sys/x 2>&1; echo 1 2>&1 >/sys/kernel/x; nc -l -p 80 & sleep 0.3; netstat -ltn")
    assert "Read-only file system" in said or "Permission denied" in said
    assert ":80 " in said


def test_sys_is_mounted_read_only(daemon: Daemon) -> None:
    mounts = daemon.ok("run", "--rm", "busybox", "cat", "/proc/mounts")
    (line,) = [line for line in mounts.splitlines() if line.split()[1] == "/sys"]
    assert line.split()[3].split(",")[0] == "ro"


def test_root_inside_is_nobody_outside(daemon: Daemon) -> None:
    """The process of a container has ids of the daemon's window on the host, and another range than its neighbour."""
    for name in ("one", "two"):
        daemon.ok("run", "-d", "--name", name, "busybox", "sleep", "60")
    uids = [Path("/proc", str(daemon.instance(name)["status"]["pid"])).stat().st_uid for name in ("one", "two")]
    assert min(uids) >= 1 << 28
    assert uids[0] >> 16 != uids[1] >> 16
    assert daemon.ok("exec", "one", "id", "-u") == "0"


def test_kernel_surface_is_masked(inside: Inside) -> None:
    """What would tell or change the host is neither readable nor writable."""
    said = inside(
        "cat /proc/kcore 2>/dev/null | head -c 10 | wc -c; echo 1 2>&1 >/proc/sys/kernel/panic && echo new; :"
    )
    assert said.splitlines()[0] == "0"
    assert "new" not in said


@pytest.mark.parametrize("flag", ["-v", "--mount"])
def test_bind_mount(daemon: Daemon, isolation: str, tmp_path: Path, flag: str) -> None:
    """What root writes inside is root's on the host, and the other way round."""
    (tmp_path / "from-host").write_text("hello")
    value = f"{tmp_path}:/data" if flag == "-v" else f"type=bind,source={tmp_path},target=/data"
    script = "stat -c %u /data/from-host; cat /data/from-host; echo back > /data/from-inside"
    said = daemon.ok("run", "--rm", "--isolation", isolation, flag, value, "busybox", "sh", "-c", script)
    assert said.splitlines() == ["0", "hello"]
    made = tmp_path / "from-inside"
    assert made.read_text() == "back\n"
    assert (made.stat().st_uid, made.stat().st_gid) == (0, 0)


@pytest.mark.parametrize("flag", ["-v", "--mount"])
def test_read_only_bind_mount(daemon: Daemon, isolation: str, tmp_path: Path, flag: str) -> None:
    value = f"{tmp_path}:/data:ro" if flag == "-v" else f"type=bind,source={tmp_path},target=/data,readonly"
    done = daemon.cli("run", "--rm", "--isolation", isolation, flag, value, "busybox", "touch", "/data/x")
    assert done.returncode == 1
    assert "Read-only file system" in done.stderr
    assert not list(tmp_path.iterdir())


def test_bind_mount_of_one_file(daemon: Daemon, isolation: str, tmp_path: Path) -> None:
    file = tmp_path / "conf"
    file.write_text("setting")
    flags = ("-v", f"{file}:/etc/app/conf:ro", "--isolation", isolation)
    assert daemon.ok("run", "--rm", *flags, "busybox", "cat", "/etc/app/conf") == "setting"


def test_a_machine_refuses_files_that_it_could_not_share(daemon: Daemon, tmp_path: Path) -> None:
    """It gets a copy of a single file; what that cannot mean is refused by name."""
    file = tmp_path / "conf"
    file.write_text("setting")
    flags = ("run", "--rm", "--isolation", "vm")
    assert "what it writes would be lost" in daemon.fails(*flags, "-v", f"{file}:/conf", "busybox", "true")
    file.write_bytes(bytes(2 << 20))
    assert "is larger than the 1 MiB" in daemon.fails(*flags, "-v", f"{file}:/conf:ro", "busybox", "true")


def test_tmpfs_by_mount_flag(inside: Inside) -> None:
    said = inside("grep ' /t ' /proc/mounts; df -k /t | tail -1", "--mount", "type=tmpfs,target=/t,tmpfs-size=4m")
    assert "tmpfs" in said
    assert "4096" in said


def test_labels_and_filters(daemon: Daemon) -> None:
    daemon.ok("create", "--name", "a", "-l", "tier=web", "-l", "blue", "busybox", "true")
    daemon.ok("create", "--name", "b", "-l", "tier=db", "--isolation", "sandbox", "busybox", "true")

    def found(*filters: str) -> list[str]:
        flags = [word for text in filters for word in ("--filter", text)]
        return [item["name"] for item in json.loads(daemon.ok("ls", "--format", "json", *flags))]

    assert found("label=tier=web") == ["a"]
    assert found("label=tier") == ["a", "b"]
    assert found("label=blue", "label=tier=db") == []
    assert found("isolation=sandbox") == ["b"]
    assert found("phase=created") == ["a", "b"]
    assert daemon.instance("a")["spec"]["labels"] == {"tier": "web", "blue": ""}
    assert "nonsense" in daemon.fails("ls", "--filter", "nonsense=1")


def test_names_ids_and_prefixes(daemon: Daemon) -> None:
    """A reference is a name, an id, or a prefix that only one has."""
    identifier = daemon.ok("create", "--name", "web-one", "busybox", "true")
    daemon.ok("create", "--name", "web-two", "busybox", "true")
    for ref in ("web-one", "web-o", identifier, identifier[:9]):
        assert json.loads(daemon.ok("inspect", "--format", "json", ref))[0]["id"] == identifier
    assert "web-one, web-two" in daemon.fails("inspect", "web")
    assert "does not exist" in daemon.fails("inspect", "other")


def test_rm_leaves_nothing(daemon: Daemon, isolation: str) -> None:
    """--rm removes the record, the files and the run directory."""
    daemon.ok("run", "--rm", "--name", "short", "--isolation", isolation, "busybox", "true")
    assert daemon.names("instances") == []
    assert not list((daemon.state / "instances").iterdir())
    assert not list((daemon.run_dir / "i").iterdir())


@pytest.mark.parametrize("code", [0, 3, 255])
def test_exit_codes_are_carried(daemon: Daemon, isolation: str, code: int) -> None:
    done = daemon.cli("run", "--name", "ender", "--isolation", isolation, "busybox", "sh", "-c", f"exit {code}")
    assert done.returncode == code
    status = daemon.wait_phase("ender", "exited")["status"]
    assert (status["exit_code"], status["reason"]) == (code, "exited")


def test_death_by_signal_is_128_and_more(daemon: Daemon, isolation: str) -> None:
    daemon.ok("run", "-d", "--name", "killed", "--isolation", isolation, "busybox", "sleep", "60")
    daemon.ok("kill", "killed")
    status = daemon.wait_phase("killed", "exited")["status"]
    assert status["exit_code"] == 137
    assert "SIGKILL" in status["reason"]


def test_isolated_processes(inside: Inside) -> None:
    """An instance sees its own processes only."""
    pids = inside("ls /proc | grep -c '^[0-9]'")
    assert int(pids) < 6


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--io-write-bps", "of=/d/f oflag=direct"), ("--io-read-bps", "if=/d/f iflag=direct of=/dev/null")],
)
def test_io_limits_hold(daemon: Daemon, flag: str, words: str, tmp_path: Path) -> None:
    """2 MiB at 1 MiB a second; without the limit it takes a fraction of that. Direct: v1 limits nothing else."""
    (tmp_path / "f").write_bytes(bytes(2 << 20))
    source = "if=/dev/zero " if "of=/d" in words else ""
    command = ("sh", "-c", f"time dd {source}{words} bs=65536 count=32")
    took_s = []
    for limit in ((), (flag, "1m")):
        said = daemon.cli("run", "--rm", "-v", f"{tmp_path}:/d", *limit, "busybox", *command)
        assert said.returncode == 0, said.stderr
        minutes, seconds = re.findall(r"real\s+(\d+)m ([\d.]+)s", said.stderr)[0]
        took_s.append(60 * int(minutes) + float(seconds))
    assert took_s[0] < 1 < took_s[1]


def test_a_sandbox_refuses_io_limits_by_name(daemon: Daemon) -> None:
    said = daemon.fails("run", "--rm", "--isolation", "sandbox", "--io-write-bps", "1m", "busybox", "true")
    assert "the disk I/O of a sandbox cannot be limited" in said
