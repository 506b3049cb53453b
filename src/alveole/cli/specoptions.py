"""The options that describe an instance, the same for `run` and `create`."""

import os
from pathlib import Path
from typing import Any

import click

from alveole.cli.options import Function
from alveole.cli.spec import instance_spec


def _many(*names: str, metavar: str, text: str) -> Any:
    return click.option(*names, metavar=metavar, multiple=True, help=text)


def _one(*names: str, metavar: str, text: str, kind: Any = None) -> Any:
    return click.option(*names, metavar=metavar, type=kind, help=text)


_OPTIONS = (
    _one("--name", metavar="NAME", text="Its name; made up if not given."),
    click.option("--isolation", type=click.Choice(["container", "sandbox", "vm"]), help="The wall around it."),
    click.option("--pull", type=click.Choice(["missing", "always", "never"]), help="When to fetch its image."),
    click.option("--rm", "remove_on_exit", is_flag=True, help="Remove it when it has ended."),
    _many(
        "-p", "--publish", metavar="[ADDRESS:]PORT:PORT[/PROTOCOL]", text="Publish a port: the host's, then its own."
    ),
    _many("-e", "--env", metavar="KEY[=VALUE]", text="Set a variable; KEY alone passes your own value."),
    click.option(
        "--env-file", type=click.Path(exists=True, dir_okay=False), multiple=True, help="Variables, one a line."
    ),
    _many("-v", "--volume", metavar="SOURCE:TARGET[:ro]", text="Mount a volume, or an absolute host path."),
    _many("--mount", metavar="KEY=VALUE,...", text="Mount: type, source, target, readonly, tmpfs-size."),
    click.option(
        "--user-data",
        "user_data_file",
        type=click.Path(exists=True, dir_okay=False),
        help="For an operating system: a script or #cloud-config for cloud-init.",
    ),
    click.option(
        "--ssh-key",
        "ssh_key_files",
        type=click.Path(exists=True, dir_okay=False),
        multiple=True,
        help="For an operating system: a public key that may log in.",
    ),
    _many("--tmpfs", metavar="TARGET[:size=SIZE]", text="Mount a file system kept in memory."),
    _one("--network", metavar="NETWORK", text="The network it joins, or host, or none."),
    click.option(
        "--inside-address",
        type=click.Choice(["constant", "same"]),
        help="What a vm sees as its address: the one all have, or the one it is reached at.",
    ),
    click.option(
        "--accel",
        "accelerator",
        type=click.Choice(["kvm", "tcg"]),
        help="What runs a vm's kernel: the processor, or QEMU; as measured if not given.",
    ),
    click.option("--no-template", is_flag=True, help="Boot a vm, instead of going on from a template."),
    _one("-m", "--memory", metavar="SIZE", text="Most memory, such as 512m."),
    _one("--cpus", metavar="NUMBER", text="Most processors, such as 1.5.", kind=float),
    _one("--pids-limit", metavar="NUMBER", text="Most processes and threads; -1 for no limit.", kind=int),
    _one("--io-read-bps", metavar="SIZE", text="Most bytes read a second, such as 10m."),
    _one("--io-write-bps", metavar="SIZE", text="Most bytes written a second."),
    _one("--net-receive-bps", metavar="SIZE", text="Most bytes received from its network a second."),
    _one("--net-send-bps", metavar="SIZE", text="Most bytes sent to its network a second."),
    _one("--restart", metavar="POLICY", text="no, always, unless-stopped or on-failure[:RETRIES]."),
    _one("--health-cmd", metavar="COMMAND", text="Run by /bin/sh inside it; exit code 0 is healthy."),
    _one("--health-interval", metavar="TIME", text="Time between two checks, such as 30s."),
    _one("--health-timeout", metavar="TIME", text="Longest time a check may take."),
    _one("--health-retries", metavar="NUMBER", text="Failures in a row that make it unhealthy.", kind=int),
    _one("--health-start-period", metavar="TIME", text="Time in which failures do not count."),
    _one("--entrypoint", metavar="PROGRAM", text="Run this instead of the image's entrypoint; '' for none."),
    _one("-u", "--user", metavar="USER[:GROUP]", text="Who runs the command: names or numbers of the image."),
    _one("-w", "--workdir", metavar="PATH", text="Where the command begins."),
    _many("-l", "--label", metavar="KEY[=VALUE]", text="Label it, for filters."),
    _many("--cap-add", metavar="NAME", text="Give it a Linux capability."),
    _many("--cap-drop", metavar="NAME", text="Take a Linux capability away, or ALL."),
    click.option("--read-only", is_flag=True, help="Its root file system cannot be written."),
    _one("--hostname", metavar="NAME", text="Its host name; its own name if not given."),
    _one("--stop-signal", metavar="SIGNAL", text="What asks it to end; as the image says, else SIGTERM."),
    _one("--stop-timeout", metavar="SECONDS", text="How long it may take to end before it is killed."),
)


def spec_options(function: Function) -> Function:
    """All of them, and IMAGE [COMMAND...]: options after IMAGE belong to the command."""
    decorated: Any = click.argument("command_line", metavar="[COMMAND]...", nargs=-1, type=click.UNPROCESSED)(function)
    decorated = click.argument("image", shell_complete=complete_images)(decorated)
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]


def complete_images(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    from alveole.cli.context import globals_of
    from alveole.client.errors import ApiError

    try:
        found = globals_of(context).client().images()
    except ApiError:
        return []
    return [image["name"] for image in found if image["name"].startswith(incomplete)]


def given_spec(options: dict[str, Any]) -> dict[str, Any]:
    """The spec that the command line describes. Raises BadValueError."""
    path = options["user_data_file"]
    files = {
        "env_file": tuple(_read("--env-file", path, "a text file of KEY=VALUE lines") for path in options["env_file"]),
        "user_data": _read("--user-data", path, "a text file") if path else "",
        "ssh_keys": tuple(_read("--ssh-key", path, "a file of public keys") for path in options["ssh_key_files"]),
    }
    return instance_spec(options["image"], options["command_line"], {**options, **files}, os.environ)


def _read(flag: str, path: str, valid: str) -> str:
    try:
        return Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"{flag} {path}: {error}; valid: {valid}") from error
