"""What the probe concludes from texts captured on hosts of many kinds."""

import json
from pathlib import Path

import pytest

from alveole.host.probe import cgroups, firewall, machine, programs, storage
from alveole.host.probe.finding import Finding, Status

DOCKER = """table ip filter {
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
		counter packets 12 bytes 720 jump DOCKER-USER
		oifname "docker0" ct state related,established counter packets 0 bytes 0 accept
		oifname "docker0" counter packets 0 bytes 0 jump DOCKER
	}

	chain DOCKER-USER {
		counter packets 12 bytes 720 return
	}
}
"""
UFW = """table ip filter {
	chain ufw-before-forward {
		ct state related,established counter packets 0 bytes 0 accept
	}

	chain FORWARD {
		type filter hook forward priority filter; policy drop;
		counter packets 0 bytes 0 jump ufw-before-logging-forward
		counter packets 0 bytes 0 jump ufw-reject-forward
	}
}
"""
FIREWALLD = """table inet firewalld {
	chain filter_FORWARD {
		type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		ct state invalid drop
		reject with icmpx admin-prohibited
	}
}
"""
OWN_ROUTER = """table inet router {
	chain forward {
		type filter hook forward priority filter; policy accept;
		iifname "eth1" accept
		counter packets 3 bytes 180 drop
	}
}
"""
HARMLESS = """table ip filter {
	chain FORWARD {
		type filter hook forward priority filter; policy accept;
		ip saddr 203.0.113.7 drop
		counter packets 0 bytes 0 jump DOCKER-USER
	}
}
"""


def chain(family: str, table: str, name: str, policy: str) -> firewall.Chain:
    return firewall.Chain(family=family, table=table, name=name, policy=policy)


@pytest.mark.parametrize(
    ("listed", "table", "who", "fix"),
    [
        (chain("ip", "filter", "FORWARD", "drop"), DOCKER, "Docker", "iptables -I DOCKER-USER -i av+ -j ACCEPT"),
        (chain("ip", "filter", "FORWARD", "drop"), UFW, "ufw", "ufw default allow routed"),
        (chain("inet", "firewalld", "filter_FORWARD", "accept"), FIREWALLD, "firewalld", "firewall-cmd --permanent"),
        (chain("inet", "router", "forward", "accept"), OWN_ROUTER, "inet router forward", "devices av+"),
    ],
)
def test_foreign_drop_is_found_and_its_owner_named(listed: firewall.Chain, table: str, who: str, fix: str) -> None:
    assert firewall.drops(listed, table)
    finding = firewall.explain(listed, table)
    assert who in finding.found
    assert fix in finding.fix
    assert finding.needed


@pytest.mark.parametrize(
    ("listed", "table"),
    [
        (chain("ip", "filter", "FORWARD", "accept"), HARMLESS),
        (
            chain("ip", "filter", "FORWARD", "drop"),
            DOCKER.replace("\tchain DOCKER-USER {\n", '\tchain DOCKER-USER {\n\t\tiifname "av*" accept\n'),
        ),
    ],
)
def test_no_drop_where_the_end_accepts_or_our_devices_are_let_through(listed: firewall.Chain, table: str) -> None:
    assert not firewall.drops(listed, table)


def test_forward_chains_are_those_of_others_that_see_forwarded_ipv4() -> None:
    """From nft 1.0.6 with Docker's and firewalld's chains, an IPv6 one and one of Alveole's."""
    forward = {"type": "filter", "hook": "forward", "prio": 0, "policy": "drop"}
    listing = {
        "nftables": [
            {"metainfo": {"version": "1.0.6", "release_name": "Lester Gooch #5", "json_schema_version": 1}},
            {"chain": {"family": "ip", "table": "filter", "name": "FORWARD", "handle": 1, **forward}},
            {"chain": {"family": "ip", "table": "filter", "name": "DOCKER-USER", "handle": 2}},
            {"chain": {"family": "ip", "table": "nat", "name": "PREROUTING", "hook": "prerouting", "policy": "accept"}},
            {"chain": {"family": "ip6", "table": "filter", "name": "FORWARD", **forward}},
            {"chain": {"family": "inet", "table": "alveole_0a1b2c3d", "name": "forward", **forward}},
        ]
    }
    assert firewall.forward_chains(json.dumps(listing)) == (chain("ip", "filter", "FORWARD", "drop"),)


@pytest.mark.parametrize(
    ("rules", "dropped"),
    [
        ("-P FORWARD DROP\n", True),
        ("-P FORWARD ACCEPT\n", False),
        ("-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited\n", True),
        ("-P FORWARD DROP\n-A FORWARD -i av+ -j ACCEPT\n", False),
    ],
)
def test_iptables_legacy_drop_is_found(rules: str, *, dropped: bool) -> None:
    assert firewall.legacy_drops(rules) is dropped


MOUNTINFO_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n"
MOUNTINFO_HYBRID = """41 30 0:31 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu
42 30 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
43 30 0:33 / /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
44 30 0:34 / /sys/fs/cgroup/freezer rw,relatime - cgroup cgroup rw,freezer
45 30 0:35 / /sys/fs/cgroup/devices rw,relatime - cgroup cgroup rw,devices
46 30 0:36 / /sys/fs/cgroup/blkio rw,relatime - cgroup cgroup rw,blkio
47 30 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
48 30 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw
"""


@pytest.mark.parametrize(
    ("mountinfo", "controllers", "kind", "status"),
    [
        (MOUNTINFO_V2, "cpuset cpu io memory hugetlb pids rdma misc", "v2", Status.OK),
        (MOUNTINFO_V2, "cpu memory pids", "v2", Status.WARN),  # no io
        (MOUNTINFO_V2, "cpuset", "v2", Status.MISSING),  # a container whose controllers were not delegated
        (MOUNTINFO_HYBRID, "", "hybrid", Status.OK),
        (MOUNTINFO_HYBRID, "hugetlb", "hybrid", Status.MISSING),  # crun refuses
        (MOUNTINFO_HYBRID.split("48 ", maxsplit=1)[0], None, "v1", Status.OK),
        ("22 1 8:1 / / rw - ext4 /dev/sda1 rw\n", None, "none", Status.MISSING),
    ],
)
def test_cgroup_layouts(mountinfo: str, controllers: str | None, kind: str, status: Status) -> None:
    layout = cgroups.layout(mountinfo, controllers)
    assert layout.kind == kind
    assert cgroups.judge(layout).status is status


def test_hybrid_fix_mounts_the_controller_that_stops_crun() -> None:
    finding = cgroups.judge(cgroups.layout(MOUNTINFO_HYBRID, "hugetlb"))
    assert "mount -t cgroup -o hugetlb none /sys/fs/cgroup/hugetlb" in finding.command


@pytest.mark.parametrize(
    ("measured", "found"),
    [
        ({"guest_ns": 0.35, "native_ns": 0.33}, "native"),
        ({"guest_ns": 4.0, "native_ns": 0.33}, "native"),  # a slow nested host is still no emulator
        ({"guest_ns": 1108.9, "native_ns": 0.33}, "emulated"),
        ({"error": "Permission denied"}, "absent: Permission denied"),
    ],
)
def test_kvm_is_judged_by_speed(measured: dict[str, float | str], found: str) -> None:
    assert machine.judge_kvm(measured).found.startswith(found)


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("crun version 1.8.1\ncommit: f8a096be", (1, 8, 1)),
        ("runsc version 0.0~20240729.0\nspec: 1.0.2-dev", (0, 0, 20240729, 0)),
        ("runsc version release-20250811.0", (20250811, 0)),
        ("mke2fs 1.47.0 (5-Feb-2023)", (1, 47, 0)),
        ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2~bpo12+1)", (10, 0, 2)),
        ("ip utility, iproute2-6.1.0, libbpf 1.1.2", (6, 1, 0)),
        ("no number", None),
    ],
)
def test_versions_of_programs(said: str, version: tuple[int, ...] | None) -> None:
    assert programs.version(said) == version


def test_program_too_old_is_a_warning_and_absent_one_has_a_command() -> None:
    crun = programs.PROGRAMS[0]
    assert programs.judge(crun, "crun version 1.5", (1, 5)).status is Status.WARN
    absent = programs.judge(crun, "not installed", None)
    assert absent.status is Status.MISSING
    assert absent.command.endswith(" crun")


@pytest.mark.parametrize(
    ("said", "visible", "hides"),
    [
        ("runsc version 0.0~20240729.0", True, True),
        ("runsc version 0.0~20240729.0", False, False),
        ("runsc version release-20250811.0", True, False),
    ],
)
def test_faulty_runsc_is_recognised_only_with_the_kernel_that_shows_it(
    said: str, *, visible: bool, hides: bool
) -> None:
    assert ("hidden" in programs.judge_sandbox_network(said, visible=visible).means) is hides


@pytest.mark.parametrize(
    ("release", "status"),
    [("6.1.0-18-amd64", Status.OK), ("5.19.0", Status.OK), ("5.10.0-28-amd64", Status.MISSING), ("x", Status.MISSING)],
)
def test_kernel_versions(release: str, status: Status) -> None:
    assert machine.kernel(release).status is status


def test_lacking_capabilities_are_named() -> None:
    held = (1 << 41) - 1 - (1 << 21)
    finding = machine.capabilities(f"Name:\tx\nCapEff:\t{held:016x}\n")
    assert finding.status is Status.MISSING
    assert finding.found == "lacks CAP_SYS_ADMIN"


def test_low_kernel_limits_give_a_command_that_raises_only_them() -> None:
    finding = machine.limits({"net.ipv4.neigh.default.gc_thresh3": 1024, "kernel.pid_max": 4194304})
    assert finding.command.endswith("--write net.ipv4.neigh.default.gc_thresh3=4096")
    assert machine.limits({"kernel.pid_max": 4194304}).status is Status.OK


@pytest.mark.parametrize(
    ("free_gib", "inodes", "status"),
    [
        (50, 10**6, Status.OK),
        (50, None, Status.OK),
        (5, 10**6, Status.WARN),
        (50, 9, Status.WARN),
        (0, 9, Status.MISSING),
    ],
)
def test_space(free_gib: int, inodes: int | None, status: Status) -> None:
    found: Finding = storage.judge_space(Path("/x"), free_bytes=free_gib << 30, free_inodes=inodes)
    assert found.status is status
