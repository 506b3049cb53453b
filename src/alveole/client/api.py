"""The API, one thin method for each of its calls. Objects are dicts, as the API reference describes them."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from alveole.client import transport
from alveole.client.errors import ApiError

if TYPE_CHECKING:
    from alveole.client.session import Session

DEFAULT_SOCKET = "/run/alveole/alveole.sock"
_KEEPALIVE_TIMEOUT_S = 60.0  # the event stream says something every 15 s

Object = dict[str, Any]


class Event(NamedTuple):
    """One change. ``token`` resumes the stream after it."""

    token: str
    kind: str
    data: Object


class Client:
    """A daemon, seen by one project. Every method raises ApiError.

    A mutation returns its operation; with ``wait_s`` the daemon first waits that long for it to finish.
    """

    def __init__(self, socket_path: str = DEFAULT_SOCKET, project: str = "default") -> None:
        self.socket_path = socket_path
        self.project = project

    # what everything below is made of

    def get(self, path: str, **query: Any) -> Object:
        """``timeout_s`` in the query is how long the daemon may take to answer a long poll."""
        answer: Object = transport.request(
            self.socket_path,
            "GET",
            f"/v1/{path}",
            query={"project": self.project, **query},
            timeout_s=transport.ANSWER_TIMEOUT_S + query.get("timeout_s", 0),
        )
        return answer

    def items(self, path: str, **query: Any) -> list[Object]:
        """What a list holds."""
        return list(self.get(path, **query)["items"])

    def submit(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, wait_s: float = 0, **query: Any
    ) -> Object:
        headers = {"Idempotency-Key": os.urandom(16).hex()}
        if wait_s:
            headers["Prefer"] = f"wait={wait_s:g}"
        answer: Object = transport.request(
            self.socket_path,
            method,
            f"/v1/{path}",
            query={"project": self.project, **query},
            body=body,
            headers=headers,
            timeout_s=wait_s + transport.ANSWER_TIMEOUT_S,
        )
        return answer

    # instances

    def instances(self, filters: Sequence[str] = ()) -> list[Object]:
        """``filters`` are KEY=VALUE; an instance matches all of them."""
        return self.items("instances", filter=filters)

    def instance(self, ref: str) -> Object:
        return self.get(f"instances/{_part(ref)}")

    def create_instance(
        self, spec: Mapping[str, Any], *, name: str | None = None, start: bool = True, wait_s: float = 0
    ) -> Object:
        body: Object = {"spec": spec, "start": start}
        if name:
            body["name"] = name
        return self.submit("POST", "instances", body, wait_s=wait_s)

    def remove_instance(self, ref: str, *, force: bool = False, wait_s: float = 0) -> Object:
        return self.submit("DELETE", f"instances/{_part(ref)}", force=force, wait_s=wait_s)

    def start_instance(self, ref: str, *, wait_s: float = 0) -> Object:
        return self.submit("POST", f"instances/{_part(ref)}/start", {}, wait_s=wait_s)

    def stop_instance(self, ref: str, *, grace_s: float | None = None, wait_s: float = 0) -> Object:
        return self.submit("POST", f"instances/{_part(ref)}/stop", _given(grace_s=grace_s), wait_s=wait_s)

    def restart_instance(self, ref: str, *, grace_s: float | None = None, wait_s: float = 0) -> Object:
        return self.submit("POST", f"instances/{_part(ref)}/restart", _given(grace_s=grace_s), wait_s=wait_s)

    def recreate_instance(self, ref: str, *, wait_s: float = 0) -> Object:
        return self.submit("POST", f"instances/{_part(ref)}/recreate", {}, wait_s=wait_s)

    def sleep_instance(self, ref: str, *, wait_s: float = 0) -> Object:
        return self.submit("POST", f"instances/{_part(ref)}/sleep", {}, wait_s=wait_s)

    def fork_instance(
        self,
        ref: str,
        *,
        name: str | None = None,
        moment: str | None = None,
        paused: bool = False,
        new_inside_address: bool = False,
        wait_s: float = 0,
    ) -> Object:
        """The operation's result tells the moment, for more forks of the same."""
        flags = {"paused": paused, "new_inside_address": new_inside_address}
        body = {**_given(name=name, moment=moment), **flags}
        return self.submit("POST", f"instances/{_part(ref)}/fork", body, wait_s=wait_s)

    def kill_instance(self, ref: str, signal: str | int = "SIGKILL") -> None:
        self.submit("POST", f"instances/{_part(ref)}/kill", {"signal": signal})

    def wait_instance(self, ref: str, *, timeout_s: float = 30) -> Object:
        """Whether it has finished for good, and how; answers at the latest after ``timeout_s``."""
        return self.get(f"instances/{_part(ref)}/wait", timeout_s=timeout_s)

    def stats(self, ref: str) -> Object:
        return self.get(f"instances/{_part(ref)}/stats")

    def changes(self, ref: str) -> Object:
        return self.get(f"instances/{_part(ref)}/changes")

    def logs(
        self, ref: str, *, follow: bool = False, tail: int | None = None, since: str | None = None
    ) -> Iterator[Object]:
        """Log lines, oldest first; with ``follow``, until the instance has ended for good."""
        lines = transport.stream(
            self.socket_path,
            f"/v1/instances/{_part(ref)}/logs",
            query={"project": self.project, "follow": follow, "tail": tail, "since": since},
            timeout_s=None if follow else transport.ANSWER_TIMEOUT_S,
        )
        for line in lines:
            record = json.loads(line)
            if "error" in record:
                raise ApiError.from_record(record["error"])
            yield record

    def exec(self, ref: str, request: Mapping[str, Any]) -> "Session":
        """Run a command in it; ``request`` is an ExecRequest."""
        return self._session(f"instances/{_part(ref)}/exec", request)

    def attach(self, ref: str, *, rows: int = 24, columns: int = 80) -> "Session":
        """Both directions of its first process."""
        return self._session(f"instances/{_part(ref)}/attach", {"rows": rows, "columns": columns})

    def _session(self, path: str, first: Mapping[str, Any]) -> "Session":
        from alveole.client.session import Session

        return Session(self.socket_path, transport.target(f"/v1/{path}", {"project": self.project}), first)

    # images

    def images(self) -> list[Object]:
        return self.items("images")

    def image(self, name: str) -> Object:
        return self.get(f"images/{_part(name, slashes=True)}")

    def pull_image(self, reference: str, *, tls_verify: bool = True, wait_s: float = 0) -> Object:
        body = {"reference": reference, "tls_verify": tls_verify}
        return self.submit("POST", "images/pull", body, wait_s=wait_s)

    def import_image(self, name: str, path: str, form: str, *, wait_s: float = 0) -> Object:
        """``path`` is absolute, on the daemon's host; ``form`` is oci-layout, docker-archive or rootfs."""
        return self.submit("POST", "images/import", {"name": name, "path": path, "format": form}, wait_s=wait_s)

    def build_image(
        self, name: str, recipe: Mapping[str, Any], directory: str, *, use_cache: bool = True, wait_s: float = 0
    ) -> Object:
        body = {"name": name, "recipe": recipe, "directory": directory, "use_cache": use_cache}
        return self.submit("POST", "images/build", body, wait_s=wait_s)

    def remove_image(self, name: str, *, wait_s: float = 0) -> Object:
        return self.submit("DELETE", f"images/{_part(name, slashes=True)}", wait_s=wait_s)

    # networks and volumes

    def networks(self) -> list[Object]:
        return self.items("networks")

    def network(self, name: str) -> Object:
        return self.get(f"networks/{_part(name)}")

    def create_network(
        self, name: str, *, subnet: str | None = None, internal: bool = False, wait_s: float = 0
    ) -> Object:
        body = {"name": name, "internal": internal, **_given(subnet=subnet)}
        return self.submit("POST", "networks", body, wait_s=wait_s)

    def remove_network(self, name: str, *, wait_s: float = 0) -> Object:
        return self.submit("DELETE", f"networks/{_part(name)}", wait_s=wait_s)

    def volumes(self) -> list[Object]:
        return self.items("volumes")

    def volume(self, name: str) -> Object:
        return self.get(f"volumes/{_part(name)}")

    def create_volume(self, name: str, *, size_bytes: int | None = None, wait_s: float = 0) -> Object:
        return self.submit("POST", "volumes", {"name": name, **_given(size_bytes=size_bytes)}, wait_s=wait_s)

    def attach_volume(
        self, name: str, instance: str, target: str, *, read_only: bool = False, wait_s: float = 0
    ) -> Object:
        body = {"instance": instance, "target": target, "read_only": read_only}
        return self.submit("POST", f"volumes/{_part(name)}/attach", body, wait_s=wait_s)

    def detach_volume(self, name: str, instance: str, *, wait_s: float = 0) -> Object:
        return self.submit("POST", f"volumes/{_part(name)}/detach", {"instance": instance}, wait_s=wait_s)

    def remove_volume(self, name: str, *, wait_s: float = 0) -> Object:
        return self.submit("DELETE", f"volumes/{_part(name)}", wait_s=wait_s)

    # snapshots

    def snapshots(self) -> list[Object]:
        return self.items("snapshots")

    def snapshot(self, name: str) -> Object:
        return self.get(f"snapshots/{_part(name)}")

    def snapshot_changes(self, name: str) -> Object:
        return self.get(f"snapshots/{_part(name)}/changes")

    def create_snapshot(
        self, instance: str, *, name: str | None = None, memory: bool = False, wait_s: float = 0
    ) -> Object:
        return self.submit("POST", "snapshots", _given(instance=instance, name=name, memory=memory), wait_s=wait_s)

    def schedule_snapshots(self, ref: str, schedule: Object | None) -> Object:
        """``schedule``: every_s, keep, memory; None: no more."""
        return self.submit("PUT", f"instances/{_part(ref)}/schedule", _given(schedule=schedule))

    def remove_snapshot(self, name: str, *, wait_s: float = 0) -> Object:
        return self.submit("DELETE", f"snapshots/{_part(name)}", wait_s=wait_s)

    def restore_snapshot(self, name: str, *, wait_s: float = 0) -> Object:
        return self.submit("POST", f"snapshots/{_part(name)}/restore", {}, wait_s=wait_s)

    def fork_snapshot(
        self, snapshot: str, *, name: str | None = None, network: str | None = None, wait_s: float = 0
    ) -> Object:
        body = _given(name=name, network=network)
        return self.submit("POST", f"snapshots/{_part(snapshot)}/fork", body, wait_s=wait_s)

    # templates, of which a key is told by its beginning

    def templates(self) -> list[Object]:
        return self.items("templates")

    def template(self, key: str) -> Object:
        return self.get(f"templates/{_part(key)}")

    def remove_template(self, key: str, *, wait_s: float = 0) -> Object:
        """The operation's result tells the bytes that were freed, and those that instances still hold."""
        return self.submit("DELETE", f"templates/{_part(key)}", wait_s=wait_s)

    def refresh_template(self, key: str, *, wait_s: float = 0) -> Object:
        return self.submit("POST", f"templates/{_part(key)}/refresh", {}, wait_s=wait_s)

    # operations, events, the daemon itself

    def operations(self) -> list[Object]:
        return self.items("operations")

    def operation(self, identity: str) -> Object:
        return self.get(f"operations/{_part(identity)}")

    def wait_operation(self, identity: str, *, timeout_s: float = 30) -> Object:
        """The operation, once it is finished or ``timeout_s`` has passed."""
        return self.get(f"operations/{_part(identity)}/wait", timeout_s=timeout_s)

    def cancel_operation(self, identity: str) -> Object:
        return self.submit("POST", f"operations/{_part(identity)}/cancel", {})

    def events(self, token: str | None = None) -> Iterator[Event]:
        """Every change from now on, or after ``token``. Raises ApiError(gone) if that is too long ago."""
        lines = transport.stream(
            self.socket_path,
            "/v1/events",
            query={"project": self.project, "from": token},
            headers={"Accept": "text/event-stream"},
            timeout_s=_KEEPALIVE_TIMEOUT_S,
        )
        return parse_events(lines)

    def nodes(self) -> list[Object]:
        return self.items("nodes")

    def version(self) -> Object:
        return self.get("version")


def parse_events(lines: Iterator[bytes]) -> Iterator[Event]:
    """Server-sent events: fields up to an empty line. A line that begins with a colon is a comment."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            if "data" in fields:
                yield Event(fields.get("id", ""), fields.get("event", ""), json.loads(fields["data"]))
            fields = {}
            continue
        key, _, value = line.decode().partition(":")
        value = value.removeprefix(" ")
        if key == "data" and key in fields:
            value = f"{fields[key]}\n{value}"
        if key:
            fields[key] = value


def _part(name: str, *, slashes: bool = False) -> str:
    """A name as one part of a path. An empty one would address the whole collection."""
    if not name or name in {".", ".."}:
        raise ApiError("invalid", f"{name!r} names nothing", "give a name or an id")
    return quote(name, safe="/:@" if slashes else "")


def _given(**values: Any) -> Object:
    return {key: value for key, value in values.items() if value is not None}
