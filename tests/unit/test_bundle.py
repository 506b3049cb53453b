"""One cell -> one OCI specification: what is written, and what is never written."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Resources
from alveole.runtime.base import Cell, CellMount, Ids, Process
from alveole.runtime.bundle import HostLimits, bundle
from alveole.runtime.capabilities import DEFAULT, KNOWN, capabilities
from alveole.runtime.crun import Crun
from alveole.runtime.runsc import Runsc
from alveole.runtime.seccomp import load_profile, resolve

LIMITS = HostLimits(open_files=20_000, swap_limit=True)
PROCESS = Process(args=("sh",), env={"A": "b"}, workdir="/", uid=1, gid=2, groups=(3,), capabilities=("CAP_CHOWN",))
CELL = Cell(
    id="c",
    directory=Path("/d"),
    run_directory=Path("/r"),
    log_path=Path("/l"),
    hostname="h",
    process=PROCESS,
    root=Path("/root"),
    read_only=True,
    ids=Ids(base=1 << 28),
    user_namespace=Path("/ns/user"),
    network_namespace=Path("/ns/net"),
    cgroup="parent/c",
)
SECCOMP = {"linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}}}


def of(cell: Cell, limits: HostLimits = LIMITS, files: frozenset[Path] = frozenset()) -> dict[str, Any]:
    return bundle(cell, Crun.bundle, limits, SECCOMP, files)


def mount(config: dict[str, Any], target: str) -> dict[str, Any]:
    return next(entry for entry in config["mounts"] if entry["destination"] == target)


def test_the_process_has_its_capabilities_and_cannot_gain_more() -> None:
    process = of(CELL)["process"]
    assert process["capabilities"] == {kind: ["CAP_CHOWN"] for kind in ("bounding", "effective", "permitted")}
    assert process["noNewPrivileges"] is True
    assert process["user"] == {"uid": 1, "gid": 2, "additionalGids": [3]}
    assert process["env"] == ["A=b"]


def test_namespaces_made_ahead_are_joined_and_ids_mapped() -> None:
    linux = of(CELL)["linux"]
    assert {"type": "user", "path": "/ns/user"} in linux["namespaces"]
    assert {"type": "network", "path": "/ns/net"} in linux["namespaces"]
    assert linux["uidMappings"] == linux["gidMappings"] == [{"containerID": 0, "hostID": 1 << 28, "size": 65536}]


def test_the_hosts_network_is_shared_by_leaving_its_namespace_out() -> None:
    config = of(replace(CELL, network_namespace=None))
    assert "network" not in {namespace["type"] for namespace in config["linux"]["namespaces"]}
    assert mount(config, "/sys")["options"] == ["rbind", "nosuid", "noexec", "nodev", "rro"]


@given(user=st.booleans(), network=st.booleans())
def test_sys_is_read_only_whatever_the_namespaces(user: bool, network: bool) -> None:
    cell = replace(
        CELL,
        user_namespace=CELL.user_namespace if user else None,
        network_namespace=CELL.network_namespace if network else None,
    )
    for flavour in (Crun.bundle, Runsc.bundle):
        options = mount(bundle(cell, flavour, LIMITS, {}, ()), "/sys")["options"]
        assert {"ro", "rro"} & set(options)


@given(hard=st.integers(1, 1 << 22))
def test_never_more_open_files_than_the_host_allows(hard: int) -> None:
    (limit,) = of(CELL, HostLimits(open_files=hard, swap_limit=True))["process"]["rlimits"]
    assert limit["soft"] == limit["hard"] <= hard


def test_limits_are_written_in_the_engines_units() -> None:
    wanted = Resources(memory_bytes=64 << 20, cpus=1.5, pids=10, io_read_bps=1000, io_write_bps=2000)
    resources = of(replace(CELL, resources=wanted, block_device="8:16"))["linux"]["resources"]
    assert resources["memory"] == {"limit": 64 << 20, "swap": 64 << 20}
    assert resources["cpu"] == {"quota": 150_000, "period": 100_000}
    assert resources["pids"] == {"limit": 10}
    assert resources["blockIO"] == {
        "throttleReadBpsDevice": [{"major": 8, "minor": 16, "rate": 1000}],
        "throttleWriteBpsDevice": [{"major": 8, "minor": 16, "rate": 2000}],
    }
    assert resources["devices"] == [{"allow": False, "access": "rwm"}]


def test_swap_is_left_alone_where_the_kernel_cannot_limit_it() -> None:
    cell = replace(CELL, resources=Resources(memory_bytes=64 << 20))
    assert of(cell, HostLimits(open_files=1, swap_limit=False))["linux"]["resources"]["memory"] == {"limit": 64 << 20}


def test_no_limit_is_written_that_was_not_asked_for() -> None:
    resources = of(replace(CELL, resources=Resources(pids=None)))["linux"]["resources"]
    assert set(resources) == {"devices"}


def test_the_smallest_cpu_share_is_one_the_kernel_takes() -> None:
    assert of(replace(CELL, resources=Resources(cpus=0.0001)))["linux"]["resources"]["cpu"]["quota"] == 1000


def test_mounts_come_after_the_systems_own_and_in_order() -> None:
    mounts = (
        CellMount(target="/tmp", source=None, size_bytes=4096),
        CellMount(target="/data", source=Path("/host/data"), read_only=True),
        CellMount(target="/etc/hosts", source=Path("/host/hosts"), read_only=True),
    )
    config = of(replace(CELL, mounts=mounts), files=frozenset({Path("/host/hosts")}))
    assert [entry["destination"] for entry in config["mounts"][-3:]] == ["/tmp", "/data", "/etc/hosts"]
    assert {"nosuid", "nodev", "noexec", "size=4096"} <= set(mount(config, "/tmp")["options"])
    assert "rro" in mount(config, "/data")["options"]
    assert "ro" in mount(config, "/etc/hosts")["options"]


def test_a_sandbox_is_not_given_what_its_own_kernel_does() -> None:
    config = bundle(replace(CELL, ids=None, user_namespace=None), Runsc.bundle, LIMITS, {}, ())
    assert not {"seccomp", "maskedPaths", "readonlyPaths", "uidMappings"} & set(config["linux"])
    assert "devices" not in config["linux"]["resources"]


@pytest.mark.parametrize(
    ("add", "drop", "expected"),
    [
        ((), (), set(DEFAULT)),
        (("NET_ADMIN",), (), {*DEFAULT, "CAP_NET_ADMIN"}),
        (("cap_net_admin",), ("MKNOD",), {*DEFAULT, "CAP_NET_ADMIN"} - {"CAP_MKNOD"}),
        (("ALL",), ("SYS_ADMIN",), set(KNOWN) - {"CAP_SYS_ADMIN"}),
        (("CHOWN",), ("all",), {"CAP_CHOWN"}),
        ((), ("ALL",), set()),
    ],
)
def test_capabilities(add: tuple[str, ...], drop: tuple[str, ...], expected: set[str]) -> None:
    assert set(capabilities(add, drop)) == expected


def test_an_unknown_capability_is_refused_naming_the_nearest() -> None:
    with pytest.raises(AlveoleError) as caught:
        capabilities(["NET_ADMN"], [])
    assert caught.value.code == ErrorCode.INVALID
    assert "NET_ADMIN" in caught.value.hint


PROFILE = {
    "defaultAction": "SCMP_ACT_ERRNO",
    "defaultErrnoRet": 38,
    "archMap": [{"architecture": "SCMP_ARCH_X86_64", "subArchitectures": ["SCMP_ARCH_X86"]}],
    "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW", "args": [], "includes": {}, "excludes": {}},
        {"names": ["bpf"], "action": "SCMP_ACT_ALLOW", "includes": {"caps": ["CAP_SYS_ADMIN"]}},
        {"names": ["bpf"], "action": "SCMP_ACT_ERRNO", "excludes": {"caps": ["CAP_SYS_ADMIN"]}, "errnoRet": 1},
        {"names": ["arm"], "action": "SCMP_ACT_ALLOW", "includes": {"arches": ["arm64"]}},
    ],
}


def test_seccomp_conditions_are_decided() -> None:
    plain = resolve(PROFILE, (), "x86_64")
    assert [(rule["names"], rule["action"]) for rule in plain["syscalls"]] == [
        (["read"], "SCMP_ACT_ALLOW"),
        (["bpf"], "SCMP_ACT_ERRNO"),
    ]
    assert plain["architectures"] == ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86"]
    admin = resolve(PROFILE, ("CAP_SYS_ADMIN",), "x86_64")
    assert [rule["action"] for rule in admin["syscalls"]] == ["SCMP_ACT_ALLOW", "SCMP_ACT_ALLOW"]


def test_seccomp_for_an_untested_machine_is_unsupported() -> None:
    with pytest.raises(AlveoleError) as caught:
        resolve(PROFILE, (), "vax")
    assert caught.value.code == ErrorCode.UNSUPPORTED


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"syscalls": []}', '{"syscalls": [{}]}'])
def test_a_missing_or_broken_profile_is_said_clearly(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "seccomp.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(AlveoleError) as caught:
        load_profile(path)
    assert caught.value.code == ErrorCode.UNSUPPORTED
    assert str(path) in caught.value.message
