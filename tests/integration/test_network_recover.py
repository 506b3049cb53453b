"""The network driver killed, restarted, rebooted and closed: nothing is lost, nothing is left."""

import asyncio
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from alveole.model.error import AlveoleError
from alveole.model.instance import Port
from alveole.network.base import Attachment
from alveole.network.routed import RoutedNetwork
from alveole.runtime.base import Ids
from tests.integration.network_lab import (
    DENIED,
    HOST_ADDRESS,
    OUTSIDE_ADDRESS,
    Lab,
    attach,
    driver,
    laboratory,
    make_network,
    reach,
    serving,
    sh,
)

pytestmark = pytest.mark.root

_DAEMON = """
import asyncio, pathlib, sys
from alveole.model.instance import Port
from tests.integration.network_lab import Lab, attach
from alveole.network.routed import RoutedNetwork

async def main():
    lab = Lab(pathlib.Path(sys.argv[1]), -1)
    network = RoutedNetwork(lab.identity(), pool_size=2)
    await network.open()
    await network.recover((), ())
    number = 0
    while True:
        ports = (Port(host_port=8080 + number, instance_port=80),)
        machine = "constant" if number % 3 == 1 else ""
        attachment = await attach(
            network, f"n{number}", host=2 + number, ports=ports, shifted=number % 3 != 2, machine=machine
        )
        print(attachment.to_json().decode(), flush=True)
        if number > 2:
            await network.detach(attachment, keep_ids=False)
        number += 1

asyncio.run(main())
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[Lab]:
    with laboratory(tmp_path) as made:
        yield made


def _killed_daemon(lab: Lab, *, after_lines: int, wait_s: float = 0.0) -> list[Attachment]:
    """Run a driver in a process of its own, kill it, and return the attachments that it told of."""
    daemon = subprocess.Popen([sys.executable, "-c", _DAEMON, str(lab.directory)], stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    lines = [daemon.stdout.readline() for _ in range(after_lines)]
    try:
        daemon.wait(wait_s)
    except subprocess.TimeoutExpired:
        daemon.kill()
    assert daemon.wait() == -signal.SIGKILL
    daemon.stdout.close()
    return [Attachment.from_json(line) for line in lines]


async def test_instances_work_on_after_kill_9_and_are_adopted(lab: Lab) -> None:
    before = lab.remains()
    kept, lost = _killed_daemon(lab, after_lines=2)
    async with serving(kept.network_namespace, 80, "kept"), serving(lost.network_namespace, 80, "lost"):
        assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"kept {OUTSIDE_ADDRESS}"
        network = RoutedNetwork(lab.identity(), pool_size=0)
        try:
            await network.open()
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"kept {OUTSIDE_ADDRESS}"
            sh("ip", "route", "del", f"{kept.address}/32")
            await network.recover([kept], [])
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"kept {OUTSIDE_ADDRESS}"
            assert await reach(None, "::1", 8080) == f"kept {network._identity.gateway}"
            assert await reach(lab.outside, HOST_ADDRESS, 8081) == DENIED
            assert {path.name for path in (lab.directory / "daemon0/run/ns").iterdir()} == {
                kept.network_namespace.split("/")[-2]
            }
            devices = {name for _, name in socket.if_nameindex()}
            assert devices == {"lo", "up0", network.gateway_device, kept.interface}
            with pytest.raises(AlveoleError, match="8080/tcp is already used by instance n0"):
                await attach(network, "other", host=9, ports=(Port(host_port=8080, instance_port=80),))
            mate = await attach(network, "mate", host=10)
            assert mate.ids_base != kept.ids_base
            assert await reach(mate.network_namespace, kept.address, 80) == f"kept {mate.address}"
            await network.detach(kept, keep_ids=False)
        finally:
            await network.close(keep=False)
    assert lab.remains() == before


@pytest.mark.parametrize("wait_s", [0.0, 0.003, 0.006, 0.01, 0.015, 0.02, 0.04, 0.08])
@pytest.mark.parametrize("after_lines", [0, 5])
async def test_killed_at_any_moment_nothing_is_left_after_the_next_start(
    lab: Lab, after_lines: int, wait_s: float
) -> None:
    """While it opens (no line: from when Python has loaded, about), and while instances come and go."""
    before = lab.remains()
    start_s = 0.35 if after_lines == 0 else 0
    _killed_daemon(lab, after_lines=after_lines, wait_s=start_s + wait_s)
    async with driver(lab):
        pass
    assert lab.remains() == before


async def test_a_restart_with_keep_leaves_instances_alone(lab: Lab) -> None:
    network = RoutedNetwork(lab.identity(), pool_size=2)
    await network.open()
    await network.recover((), ())
    web = await attach(network, "web", ports=(Port(host_port=8080, instance_port=80),))
    async with serving(web.network_namespace, 80, "web"):
        await network.close(keep=True)
        assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"web {OUTSIDE_ADDRESS}"
        assert await reach(None, "::1", 8080) == DENIED  # only the daemon speaks IPv6
        assert [path.name for path in (lab.directory / "daemon0/run/ns").iterdir()] == [
            web.network_namespace.split("/")[-2]
        ]
        async with driver(lab, adopt=[web]):
            assert await reach(None, "::1", 8080) != DENIED


async def test_after_a_reboot_only_the_id_range_is_kept(lab: Lab) -> None:
    """Namespaces, devices, table and run directory are gone; the state directory still knows the attachment."""
    async with driver(lab) as network:
        former = await attach(network, "web", ports=(Port(host_port=8080, instance_port=80),))
    (lab.directory / "daemon0/run").rmdir()
    async with driver(lab, adopt=[former], pool_size=2) as network:
        other = await attach(network, "other", host=3)
        assert other.ids_base != former.ids_base
        await network.detach(former, keep_ids=True)
        web = await attach(network, "web", ports=former.ports, ids=Ids(base=former.ids_base))
        assert web.ids_base == former.ids_base
        async with serving(web.network_namespace, 80, "web"):
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"web {OUTSIDE_ADDRESS}"


async def test_a_flushed_ruleset_is_put_back_while_running(lab: Lab) -> None:
    """Reloading the host's own firewall must not leave the instances without walls."""
    port = Port(host_port=8080, instance_port=80)
    async with driver(lab) as network:
        web = await attach(network, "web", ports=(port,))
        far = await attach(network, "far", network=make_network(2))
        await network.repair()
        sh("nft", "flush", "ruleset")
        async with serving(web.network_namespace, 80, "web"):
            assert await reach(far.network_namespace, web.address, 80) != DENIED
            await network.repair()
            assert await reach(far.network_namespace, web.address, 80) == DENIED
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"web {OUTSIDE_ADDRESS}"


async def test_a_flushed_ruleset_comes_back_with_recover(lab: Lab) -> None:
    async with driver(lab) as network:
        web = await attach(network, "web", ports=(Port(host_port=8080, instance_port=80),))
        sh("nft", "flush", "ruleset")
        async with serving(web.network_namespace, 80, "web"):
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == DENIED
            await network.recover([web], [])
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"web {OUTSIDE_ADDRESS}"


async def test_a_port_taken_meanwhile_does_not_stop_recovery(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    web = _killed_daemon(lab, after_lines=1)[0]
    async with serving(None, 8080, "host"), driver(lab, adopt=[web]):
        assert "port 8080/tcp is already used" in caplog.text
        async with serving(web.network_namespace, 80, "web"):
            assert await reach(lab.outside, HOST_ADDRESS, 8080) == f"web {OUTSIDE_ADDRESS}"


async def test_cancelled_attaches_leave_nothing(lab: Lab) -> None:
    """Cancelled at many moments, each time everything is as before, and the next attach succeeds."""
    async with driver(lab, pool_size=0) as network:
        await network.detach(await attach(network, "warm"), keep_ids=False)
        clean = lab.remains()
        for step in range(25):
            ports = (Port(host_port=8080, instance_port=80),)
            task = asyncio.create_task(attach(network, "web", ports=ports))
            await asyncio.sleep(step / 2000)
            task.cancel()
            try:
                await network.detach(await task, keep_ids=False)
            except asyncio.CancelledError:
                assert task.cancelled()
            assert lab.remains() == clean
        await attach(network, "web", ports=(Port(host_port=8080, instance_port=80),))


async def test_many_at_once_get_different_slots(lab: Lab) -> None:
    """More than the pool holds; networks vanish from the rules with their last instance."""
    async with driver(lab, pool_size=3) as network:
        clean = sh("nft", "list", "ruleset")
        wanted = [attach(network, f"n{n}", host=2 + n, network=make_network(1 + n % 2)) for n in range(12)]
        made = await asyncio.gather(*wanted)
        assert len({attachment.ids_base for attachment in made}) == len(made)
        for attachment in made:
            assert await reach(None, attachment.address, 1) == DENIED
        await asyncio.gather(*(network.detach(attachment, keep_ids=False) for attachment in made))
        assert sh("nft", "list", "ruleset") == clean
