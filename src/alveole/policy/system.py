"""Which wishes a whole operating system can fulfil, and which only it can. Pure.

Nothing of Alveole's runs inside a system, so what is done inside elsewhere (users, variables, mounts, health) has to be
said to the system itself. What cannot be done is refused by its name, never left out in silence.
"""

from alveole.model.error import AlveoleError, ErrorCode
from alveole.model.instance import InstanceSpec, Resources

_BY_ITSELF = "the system starts what it was set up to start: use --user-data, or log in"
_ITS_OWN = "set it up inside, by --user-data or by logging in"
_FILES = "copy files over SSH, or have them fetched by --user-data"


def check_system(spec: InstanceSpec) -> None:
    """Raise UNSUPPORTED for the first wish that an image with the disk of a whole system cannot fulfil."""
    refused: tuple[tuple[bool, str, str, str], ...] = (
        (bool(spec.command), "a COMMAND", "spec.command", _BY_ITSELF),
        (spec.entrypoint is not None, "--entrypoint", "spec.entrypoint", _BY_ITSELF),
        (bool(spec.env), "--env", "spec.env", _ITS_OWN),
        (spec.user is not None, "--user", "spec.user", _ITS_OWN),
        (spec.workdir is not None, "--workdir", "spec.workdir", _BY_ITSELF),
        (bool(spec.mounts), "a mount (--volume, --mount, --tmpfs)", "spec.mounts", _FILES),
        (spec.health is not None, "--health-cmd", "spec.health", "ask the service from outside, over the network"),
        (bool(spec.cap_add), "--cap-add", "spec.cap_add", "its root has all of its own kernel"),
        (bool(spec.cap_drop), "--cap-drop", "spec.cap_drop", "its root has all of its own kernel"),
        (spec.read_only, "--read-only", "spec.read_only", _ITS_OWN),
        (not spec.template, "--no-template", "spec.template", "leave it out: a system always boots"),
        (spec.stop_signal is not None, "--stop-signal", "spec.stop_signal", "it is stopped by its power button"),
        (spec.resources.pids != Resources().pids, "--pids-limit", "spec.resources.pids", _ITS_OWN),
    )
    for is_given, what, field, hint in refused:
        if is_given:
            message = f"{what} has no meaning for image {spec.image}, the disk of a whole operating system"
            raise AlveoleError(ErrorCode.UNSUPPORTED, message, hint=hint, field=field)


def check_no_system(spec: InstanceSpec) -> None:
    """Raise UNSUPPORTED for the first wish that only a whole operating system can fulfil."""
    for is_given, what, field in (
        (bool(spec.user_data), "--user-data", "spec.user_data"),
        (bool(spec.ssh_keys), "--ssh-key", "spec.ssh_keys"),
    ):
        if is_given:
            raise AlveoleError(
                ErrorCode.UNSUPPORTED,
                f"{what} is for the disks of whole operating systems, and image {spec.image} is none",
                hint="leave it out: use --env, --volume, or another image",
                field=field,
            )
