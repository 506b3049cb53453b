"""From what the user wants and what the image says to the cell that a runtime makes."""

from pathlib import Path

from alveole.agent.record import Paths
from alveole.model.error import invalid
from alveole.model.image import ImageConfig
from alveole.model.instance import Instance, InstanceSpec
from alveole.network.base import Attachment
from alveole.runtime.base import Capability, Cell, CellMount, Ids, Process, Runtime
from alveole.runtime.capabilities import capabilities
from alveole.runtime.passwd import resolve_user

CONSOLE = Process(args=(), env={}, workdir="/", uid=0, gid=0, tty=True, stdin=True)
"""Of a whole operating system: nothing that Alveole starts runs in it, and what is seen of it is a serial terminal."""

DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def command_line(spec: InstanceSpec, image: ImageConfig) -> tuple[str, ...]:
    """What to run, by Docker's rule: a command replaces the image's, an entrypoint replaces both.

    Raises INVALID if there is nothing to run.
    """
    entrypoint = image.entrypoint if spec.entrypoint is None else spec.entrypoint
    inherited = image.command if spec.entrypoint is None else ()
    words = (*entrypoint, *(inherited if spec.command is None else spec.command))
    if not words:
        raise invalid(
            f"image {spec.image} names no command, and none was given",
            hint=f"alveole run {spec.image} COMMAND",
            field="spec.command",
        )
    return words


def environment(instance: Instance, image: ImageConfig, home: str) -> dict[str, str]:
    """PATH, HOME, HOSTNAME and what others know it by, then the image's, then the user's."""
    spec = instance.spec
    env = {"PATH": DEFAULT_PATH, "HOME": home, "HOSTNAME": hostname_of(instance), "ALVEOLE_NAME": instance.name}
    if instance.address:
        env["ALVEOLE_ADDRESS"] = instance.address
    if spec.tty:
        env["TERM"] = "xterm"
    for assignment in image.env:
        name, _, value = assignment.partition("=")
        env[name] = value
    return {**env, **spec.env}


def hostname_of(instance: Instance) -> str:
    return instance.spec.hostname or instance.name.replace("_", "-").strip(".-")[:63]


def process_of(instance: Instance, root: Path) -> Process:
    """The instance's own process: ids resolved in its root file system."""
    spec, image = instance.spec, image_config(instance)
    user = resolve_user(root, image.user if spec.user is None else spec.user)
    return Process(
        args=command_line(spec, image),
        env=environment(instance, image, user.home),
        workdir=spec.workdir or image.workdir or "/",
        uid=user.uid,
        gid=user.gid,
        groups=user.groups,
        capabilities=capabilities(spec.cap_add, spec.cap_drop),
        tty=spec.tty,
        stdin=spec.stdin,
    )


def image_config(instance: Instance) -> ImageConfig:
    return instance.image.config if instance.image is not None else ImageConfig()


def build_cell(
    instance: Instance,
    *,
    paths: Paths,
    runtime: Runtime,
    attachment: Attachment,
    cgroup: str,
    mounts: tuple[CellMount, ...],
    block_device: str,
    root_disk: Path | None,
    origin: Path | None,
    seed_disk: Path | None,
) -> Cell:
    shifted = not runtime.capabilities.isdisjoint({Capability.USER_NAMESPACE, Capability.MACHINE})
    root = paths.root(instance.id)
    return Cell(
        id=instance.id,
        directory=paths.runtime(instance.id),
        run_directory=paths.sockets(instance.id),
        log_path=paths.log(instance.id),
        hostname="" if instance.spec.network == "host" else attachment.hostname,
        process=CONSOLE if instance.is_system else process_of(instance, root),
        root=root,
        read_only=instance.spec.read_only,
        mounts=mounts,
        ids=Ids(base=attachment.ids_base) if attachment.ids_base else None,
        user_namespace=Path(attachment.user_namespace) if shifted else None,
        network_namespace=Path(attachment.network_namespace) if attachment.network_namespace else None,
        cgroup=cgroup,
        resources=instance.spec.resources,
        block_device=block_device,
        root_disk=root_disk,
        origin=origin,
        woken=origin == paths.asleep(instance.id),
        seed_disk=seed_disk,
        card=attachment.card,
        template=instance.spec.template,
        accelerator=instance.spec.accelerator,
    )
