"""The options of `run` and `create`, mapped to the InstanceSpec of the API. Pure."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from alveole.cli import values
from alveole.cli.context import BadValueError

_HOSTNAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")
_MEMORY_LEAST_BYTES = 4 << 20
_RATES = {
    "io_read_bps": "read or written",
    "io_write_bps": "read or written",
    "net_receive_bps": "received",
    "net_send_bps": "sent",
}
_HEALTH_FLAGS = ("health_interval", "health_timeout", "health_retries", "health_start_period")
_SWITCHES = {
    **{name: (name, True) for name in ("tty", "stdin", "read_only", "remove_on_exit")},
    "no_template": ("template", False),
}


def instance_spec(
    image: str, command: Sequence[str], options: Mapping[str, Any], caller: Mapping[str, str]
) -> dict[str, Any]:
    """Only what was given is set; all else is as the image or the daemon says.

    ``options`` are click's parameters by name, with ``env_file``, ``user_data`` and ``ssh_keys`` holding the files'
    contents; ``caller`` is the environment that a bare KEY is taken from. Raises BadValueError.
    """
    if not image:
        raise BadValueError("IMAGE", image, "is empty", "an image's name, such as debian:12")
    spec: dict[str, Any] = {"image": image}
    for name in ("user", "network", "inside_address", "accelerator", "isolation", "pull", "stop_signal", "user_data"):
        if options.get(name):
            spec[name] = options[name]
    for flag, (name, value) in _SWITCHES.items():
        if options.get(flag):
            spec[name] = value
    spec |= _process(command, options, caller)
    spec |= _lists(options)
    if keys := [key for content in options.get("ssh_keys", ()) for key in values.public_keys("--ssh-key", content)]:
        spec["ssh_keys"] = keys
    if limits := _resources(options):
        spec["resources"] = limits
    if options.get("restart"):
        spec["restart"] = values.restart("--restart", options["restart"])
    if health := _health(options):
        spec["health"] = health
    if options.get("stop_timeout") is not None:
        spec["stop_grace_s"] = _at_most("--stop-timeout", values.duration_s("--stop-timeout", options["stop_timeout"]))
    if spec.get("remove_on_exit") and spec.get("restart", {}).get("policy", "no") != "no":
        raise BadValueError("--rm", options["restart"], "it cannot be both removed and restarted", "one of them")
    return spec


def _process(command: Sequence[str], options: Mapping[str, Any], caller: Mapping[str, str]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    entrypoint = options.get("entrypoint")
    if entrypoint is not None:
        chosen["entrypoint"] = [entrypoint] if entrypoint else []
    if command or entrypoint is not None:  # the image's command is meant for the image's entrypoint
        chosen["command"] = list(command)
    lines = [line for content in options.get("env_file", ()) for line in values.environment_file_lines(content)]
    env = values.environment("--env-file", tuple(lines), caller)
    env |= values.environment("--env", tuple(options.get("env", ())), caller)
    if env:
        chosen["env"] = env
    workdir = options.get("workdir")
    if workdir is not None:
        if not workdir.startswith("/"):
            raise BadValueError("--workdir", workdir, "not absolute", "a path that begins with /")
        chosen["workdir"] = workdir
    hostname = options.get("hostname")
    if hostname is not None:
        if not _HOSTNAME.fullmatch(hostname):
            raise BadValueError("--hostname", hostname, "not a host name", "letters, digits, - and ., at most 63")
        chosen["hostname"] = hostname
    return chosen


def _lists(options: Mapping[str, Any]) -> dict[str, Any]:
    def each(name: str, flag: str, read: Callable[[str, str], Any]) -> list[Any]:
        return [read(flag, text) for text in options.get(name, ())]

    mounts = each("volume", "--volume", values.volume)
    mounts += each("mount", "--mount", values.mount)
    mounts += each("tmpfs", "--tmpfs", values.tmpfs)
    targets = [mount["target"].rstrip("/") for mount in mounts]
    for target in targets:
        if targets.count(target) > 1:
            raise BadValueError("--volume/--mount/--tmpfs", target, "is mounted twice", "one mount for each target")
    chosen = {
        "ports": each("publish", "--publish", values.port),
        "mounts": mounts,
        "labels": dict(each("label", "--label", values.pair)),
        "cap_add": [_capability("--cap-add", name) for name in options.get("cap_add", ())],
        "cap_drop": [_capability("--cap-drop", name) for name in options.get("cap_drop", ())],
    }
    return {name: value for name, value in chosen.items() if value}


def _capability(flag: str, text: str) -> str:
    name = text.upper()
    if not re.fullmatch(r"[A-Z][A-Z_]*", name):
        raise BadValueError(flag, text, "not a capability", "a name such as NET_ADMIN, or ALL")
    return name if name == "ALL" or name.startswith("CAP_") else f"CAP_{name}"


def _resources(options: Mapping[str, Any]) -> dict[str, Any]:
    limits: dict[str, Any] = {}
    if options.get("memory") is not None:
        limits["memory_bytes"] = values.size_bytes("--memory", options["memory"])
        if limits["memory_bytes"] < _MEMORY_LEAST_BYTES:
            raise BadValueError("--memory", options["memory"], "too little to run anything", "4m or more")
    if options.get("cpus") is not None:
        limits["cpus"] = _cpus(options["cpus"])
    if options.get("pids_limit") is not None:
        # Zero and below mean no limit, as users of other engines know it.
        limits["pids"] = options["pids_limit"] if options["pids_limit"] > 0 else None
    for name, nothing in _RATES.items():
        if options.get(name) is not None:
            flag = "--" + name.replace("_", "-")
            limits[name] = values.size_bytes(flag, options[name])
            if limits[name] < 1:
                raise BadValueError(flag, options[name], f"nothing could be {nothing}", "1 or more a second")
    return limits


def _cpus(number: float) -> float:
    if not 0 < number <= 4096:
        raise BadValueError("--cpus", f"{number:g}", "not a number of processors", "more than 0, such as 1.5")
    return number


def _health(options: Mapping[str, Any]) -> dict[str, Any]:
    command = options.get("health_cmd")
    given = [name for name in _HEALTH_FLAGS if options.get(name) is not None]
    if not command:
        if given:
            flag = "--" + given[0].replace("_", "-")
            raise BadValueError(flag, str(options[given[0]]), "there is nothing to check", "with --health-cmd only")
        return {}
    health: dict[str, Any] = {"command": ["/bin/sh", "-c", command]}
    for name in given:
        flag = "--" + name.replace("_", "-")
        if name == "health_retries":
            health["retries"] = options[name]
            if options[name] < 1:
                raise BadValueError(flag, str(options[name]), "too few", "1 or more")
            continue
        seconds = values.duration_s(flag, options[name])
        if seconds < 0.1 and name != "health_start_period":
            raise BadValueError(flag, options[name], "too short", "100ms or more")
        health[name.removeprefix("health_") + "_s"] = seconds
    return health


def _at_most(flag: str, seconds: float, most_s: float = 3600.0) -> float:
    if seconds > most_s:
        raise BadValueError(flag, f"{seconds:g}", "too long", f"at most {most_s:g} seconds")
    return seconds
