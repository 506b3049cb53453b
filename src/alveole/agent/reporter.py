"""Tells the control plane what became of one instance, until it has heard."""

import asyncio
import logging

from alveole.model.agent import AgentLink, InstanceReport
from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import Instance, InstanceStatus
from alveole.model.operation import Step

log = logging.getLogger(__name__)
RETRY_S = 1.0


class Reporter:
    def __init__(self, link: AgentLink) -> None:
        self._link = link
        self._latest: InstanceReport | None = None

    async def send(
        self, instance: Instance, status: InstanceStatus, steps: tuple[Step, ...], *, removed: bool = False
    ) -> bool:
        """False if its epoch is stale: the instance is not this node's any more."""
        if instance.placement is None:
            return True
        report = InstanceReport(
            project=instance.project,
            name=instance.name,
            instance_id=instance.id,
            epoch=instance.placement.epoch,
            status=status.replace(observed_generation=instance.generation),
            removed=removed,
            steps=steps,
        )
        if self._latest is None and not removed and report.status == instance.status:
            return True  # as it was before this daemon
        while report != self._latest:
            try:
                await self._link.report_instance(report)
                self._latest = report
            except AlveoleError as error:
                if error.code is ErrorCode.CONFLICT:
                    return False
                log.warning("could not report on %s, trying again: %s", instance.name, error)
                await asyncio.sleep(RETRY_S)
        return True
