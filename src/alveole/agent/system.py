"""What is made for an instance that runs a whole operating system, in place of a root directory and a process."""

import os
from functools import partial
from pathlib import Path

from alveole.agent.engine import Engine
from alveole.host.blocking import in_thread
from alveole.host.process import run
from alveole.image.seed import make_seed
from alveole.model.error import exhausted, internal
from alveole.model.image import ImageContent
from alveole.model.instance import Instance
from alveole.network.base import Attachment

_COPY_TIMEOUT_S = 3600.0
_NO_SPACE = "No space left on device"


async def copy_disk(engine: Engine, content: ImageContent, target: Path) -> None:
    """The disk of an image, sparse, as large as the system on it sees it. On disk when this returns."""
    target.unlink(missing_ok=True)
    source = engine.images.disk_path(content)
    argv = ["cp", "--sparse=always", "--", str(source), str(target)]
    result = await run(argv, timeout_s=_COPY_TIMEOUT_S, check=False)
    if _NO_SPACE in result.stderr.decode(errors="replace"):
        raise exhausted(f"no space for a root disk: {target.parent} is full", hint="free some space")
    if result.code != 0:
        raise result.failure()
    await in_thread(partial(_sync, target))


def _sync(target: Path) -> None:
    descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


async def ensure_seed(engine: Engine, instance: Instance, attachment: Attachment) -> Path:
    """The disk that it learns from who it is, made anew: its address may be another than at its last start."""
    card = attachment.card
    if card is None:
        raise internal(f"the network gave instance {instance.name} no card")
    target = engine.paths.seed(instance.id)
    await make_seed(
        target,
        instance_id=instance.id,
        hostname=attachment.hostname,
        user_data=instance.spec.user_data,
        ssh_keys=instance.spec.ssh_keys,
        address=card.address,
        gateway=card.gateway,
        mac=card.mac,
        nameserver=_nameserver(engine.network.resolv_conf(attachment)),
    )
    return target


def _nameserver(resolv_conf: str) -> str:
    """Empty if it names none."""
    words = (line.split() for line in resolv_conf.splitlines())
    return next((line[1] for line in words if len(line) > 1 and line[0] == "nameserver"), "")
