"""All findings about this host."""

import asyncio
from pathlib import Path

from alveole.host.probe import cgroups, firewall, machine, programs, storage
from alveole.host.probe.finding import Finding


async def host_findings(state: Path) -> tuple[Finding, ...]:
    """Look at everything, in about a second; what takes long or may hang runs in children with deadlines.

    ``state``: the daemon's state directory, which need not exist yet. Nothing is changed on the host.
    """
    async with asyncio.TaskGroup() as group:
        kvm = group.create_task(machine.kvm())
        overlay = group.create_task(storage.overlay(state))
        nftables = group.create_task(firewall.nftables())
        foreign = group.create_task(firewall.foreign_firewalls())
        installed = group.create_task(programs.programs())
        sandbox_network = group.create_task(programs.sandbox_network())
    runsc_network = sandbox_network.result()
    return (
        machine.kernel(),
        machine.capabilities(),
        cgroups.cgroups(),
        overlay.result(),
        nftables.result(),
        foreign.result(),
        firewall.forwarding(),
        programs.seccomp(),
        *installed.result(),
        *([runsc_network] if runsc_network else []),
        kvm.result(),
        storage.space(state),
        storage.reflink(state),
        machine.open_files(),
        machine.processes(),
        machine.limits(),
    )
