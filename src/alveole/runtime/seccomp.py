"""The seccomp profile of containers: the one that Podman, CRI-O and Buildah ship, resolved to what an engine takes.

The profile is read from the host, where the distribution keeps it up to date. It says for each rule on which
architectures and with which capabilities it holds; engines want the answer, not the conditions.
"""

import json
import platform
from collections.abc import Collection, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from alveole.model.error import unsupported

PROFILE = Path("/usr/share/containers/seccomp.json")
_PACKAGE_HINT = "install golang-github-containers-common (Debian) or containers-common (Fedora)"

# machine -> (its name in "arches", its name in "archMap")
_MACHINES = {"x86_64": ("amd64", "SCMP_ARCH_X86_64"), "aarch64": ("arm64", "SCMP_ARCH_AARCH64")}


def load_profile(path: Path = PROFILE) -> Mapping[str, Any]:
    """Read the host's profile. Raises AlveoleError(UNSUPPORTED) if it is missing or not a profile."""
    try:
        profile = json.loads(path.read_bytes())
        names = [rule["names"] for rule in profile["syscalls"]]
    except FileNotFoundError as error:
        raise unsupported(f"the seccomp profile {path} is missing", hint=_PACKAGE_HINT) from error
    except (ValueError, TypeError, KeyError) as error:
        raise unsupported(f"{path} is not a seccomp profile: {error!r}", hint=_PACKAGE_HINT) from error
    if not names:
        raise unsupported(f"the seccomp profile {path} allows nothing", hint=_PACKAGE_HINT)
    return dict(profile)


@lru_cache(maxsize=64)
def host_seccomp(capabilities: frozenset[str]) -> dict[str, Any]:
    """OCI ``linux.seccomp`` for a process that may have these capabilities on this host. Do not change it."""
    return resolve(load_profile(), capabilities, platform.machine())


def resolve(profile: Mapping[str, Any], capabilities: Collection[str], machine: str) -> dict[str, Any]:
    """The profile with its conditions decided. Raises UNSUPPORTED for a machine nobody tested."""
    if machine not in _MACHINES:
        raise unsupported(
            f"no seccomp profile for machine type {machine}", hint=f"supported are {', '.join(sorted(_MACHINES))}"
        )
    arch, native = _MACHINES[machine]
    architectures = [native]
    for entry in profile.get("archMap", ()):
        if entry["architecture"] == native:
            architectures += entry.get("subArchitectures") or []
    return {
        "defaultAction": profile["defaultAction"],
        "defaultErrnoRet": profile.get("defaultErrnoRet", 1),
        "architectures": architectures,
        "syscalls": [_rule(rule) for rule in profile["syscalls"] if _holds(rule, capabilities, arch)],
    }


def _holds(rule: Mapping[str, Any], capabilities: Collection[str], arch: str) -> bool:
    includes, excludes = rule.get("includes") or {}, rule.get("excludes") or {}
    if includes.get("arches") and arch not in includes["arches"]:
        return False
    if arch in (excludes.get("arches") or ()):
        return False
    if not set(includes.get("caps") or ()) <= set(capabilities):
        return False
    return set(excludes.get("caps") or ()).isdisjoint(capabilities)


def _rule(rule: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"names": rule["names"], "action": rule["action"]}
    if rule.get("args"):
        kept["args"] = rule["args"]
    if rule.get("errnoRet") is not None:
        kept["errnoRet"] = rule["errnoRet"]
    return kept
