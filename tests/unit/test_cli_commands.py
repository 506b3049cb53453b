"""The verbs, from command line to requests, output and exit code, against a server that answers as the daemon does."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from alveole.cli import main as root
from tests.daemon_double import Double, Reply, instance, operation, serving

WEB = instance("web", ports=[{"host_address": "127.0.0.1", "host_port": 8080, "instance_port": 80, "protocol": "tcp"}])
OLD = instance("old", "exited")


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Double]:
    with serving(tmp_path / "s") as double:
        monkeypatch.setenv("ALVEOLE_SOCKET", double.path)
        double.answers["GET /v1/instances"] = Reply({"items": [WEB, OLD], "revision": "x:1"})
        double.answers["GET /v1/instances/web"] = Reply(WEB)
        yield double


def test_ls_lists_all_and_ps_the_running(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    assert root.run(["ls"]) == 0
    head, web, old = capsys.readouterr().out.splitlines()
    assert head.split() == ["NAME", "ID", "IMAGE", "STATUS", "ISOLATION", "ADDRESS", "PORTS"]
    assert web.startswith("web ")
    assert "127.0.0.1:8080->80/tcp" in web
    assert old.startswith("old ")
    assert root.run(["ps", "-q"]) == 0
    assert capsys.readouterr().out == f"{WEB['id']}\n"
    assert root.run(["ps", "-aq"]) == 0
    assert capsys.readouterr().out == f"{WEB['id']}\n{OLD['id']}\n"


def test_json_is_what_the_api_said(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    assert root.run(["--project", "blue", "ls", "--format", "json", "--filter", "label=a"]) == 0
    assert json.loads(capsys.readouterr().out) == [WEB, OLD]
    assert daemon.requests[0].query == {"project": ["blue"], "filter": ["label=a"]}


def test_all_names_are_tried_and_one_failure_is_exit_1(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "c"):
        daemon.answers[f"DELETE /v1/instances/{name}"] = Reply(operation("instance.remove", f"instance/{name}"))
    assert root.run(["rm", "-f", "a", "b", "c"]) == 1
    said = capsys.readouterr()
    assert said.out == "a\nc\n"
    assert said.err == "error: b does not exist (look)\n"
    assert [request.query["force"] for request in daemon.requests] == [["true"]] * 3


def test_a_failed_operation_is_told_with_its_hint(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"code": "unavailable", "message": "no registry", "hint": "check the network", "field": "image"}
    daemon.answers["POST /v1/images/pull"] = Reply(operation("image.pull", "image/x:1", "failed", error=error))
    assert root.run(["--debug", "image", "pull", "x:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("error: no registry (check the network)\n")
    assert "field: image" in err


def test_an_operation_is_waited_for_until_it_ends(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    running = operation("volume.create", "volume/data", "running")
    states = iter([running, running, operation("volume.create", "volume/data")])
    daemon.answers["POST /v1/volumes"] = Reply(running)
    daemon.answers["GET /v1/operations/1a2b/wait"] = lambda _request: Reply(next(states))
    assert root.run(["volume", "create", "data", "--size", "1g"]) == 0
    assert capsys.readouterr().out == "data\n"
    assert daemon.requests[0].body == {"name": "data", "size_bytes": 1 << 30}
    assert len(daemon.requests) == 4


def test_detached_run_prints_the_id(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    done = operation("instance.run", "instance/web", result={"id": "0123456789ab", "name": "web"})
    daemon.answers["POST /v1/instances"] = Reply(done)
    assert root.run(["run", "-d", "--name", "web", "debian:12", "sleep", "-x", "--rm"]) == 0
    assert capsys.readouterr().out == "0123456789ab\n"
    assert daemon.requests[0].body == {
        "name": "web",
        "start": True,
        "spec": {"image": "debian:12", "command": ["sleep", "-x", "--rm"]},
    }


@pytest.mark.parametrize(("field", "code"), [("command", 127), ("command.mode", 126), ("spec.image", 125), ("", 125)])
def test_what_failed_is_told_by_the_exit_code(daemon: Double, field: str, code: int) -> None:
    error = {"code": "invalid", "message": "m", "field": field}
    daemon.answers["POST /v1/instances"] = Reply(operation("instance.run", "instance/web", "failed", error=error))
    assert root.run(["run", "-d", "debian:12", "x"]) == code


def test_logs_go_where_they_came_from(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    records: list[dict[str, Any]] = [
        {"time": "T1", "stream": "stdout", "line": "one, ", "partial": True},
        {"time": "T2", "stream": "stdout", "line": "two"},
        {"time": "T3", "stream": "stderr", "line": "three"},
    ]
    lines = tuple(json.dumps(record).encode() + b"\n" for record in records)
    daemon.answers["GET /v1/instances/web/logs"] = Reply(chunks=lines)
    assert root.run(["logs", "--timestamps", "--since", "2026-01-31T13:00:00+01:00", "web"]) == 0
    said = capsys.readouterr()
    assert said.out == "T1 one, two\n"
    assert said.err == "T3 three\n"
    assert daemon.requests[0].query["since"] == ["2026-01-31T12:00:00.000000Z"]


def test_wait_asks_again_until_it_has_ended(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    answers = iter([{"finished": False}, {"finished": True, "exit_code": 3}])
    daemon.answers["GET /v1/instances/web/wait"] = lambda _request: Reply(next(answers))
    assert root.run(["wait", "web"]) == 0
    assert capsys.readouterr().out == "3\n"


def test_inspect_prints_those_that_are_there(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    assert root.run(["inspect", "web", "none"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out) == [WEB]
    assert "none does not exist" in said.err


def test_an_operation_shows_its_steps_and_their_time(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [
        {"name": "image", "started_at": "2026-01-31T12:00:00Z", "duration_ms": 12.34},
        {"name": "network", "started_at": "2026-01-31T12:00:00Z", "detail": "10.0.0.2"},
    ]
    record = operation("instance.run", "instance/web", steps=steps, finished_at="2026-01-31T12:00:00.050000Z")
    daemon.answers["GET /v1/operations/1a2b"] = Reply(record)
    assert root.run(["operation", "show", "1a2b"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "took      50.0 ms" in lines
    assert [line.split() for line in lines[-2:]] == [["image", "12.3", "-"], ["network", "under", "way", "10.0.0.2"]]


@pytest.mark.parametrize(
    ("machine", "told"),
    [
        ({"shares_identity": True}, True),
        ({"shares_identity": False}, False),
        ({"template": "0123"}, False),
        (None, False),
    ],
)
def test_a_fork_of_a_system_says_that_its_names_inside_are_the_originals(
    daemon: Double, capsys: pytest.CaptureFixture[str], machine: dict[str, Any] | None, told: bool
) -> None:
    twin = instance("twin")
    twin["status"]["machine"] = machine
    done = operation("instance.fork", "instance/twin", result={"id": twin["id"], "name": "twin", "moment": "0" * 12})
    daemon.answers["POST /v1/instances/web/fork"] = Reply(done)
    daemon.answers[f"GET /v1/instances/{twin['id']}"] = Reply(twin)
    assert root.run(["fork", "web"]) == 0
    said = capsys.readouterr()
    assert said.out == "twin\n"
    assert ("SSH host keys are those of web" in said.err) is told
    assert said.err.count("\n") == told


def test_stats_need_two_looks_for_the_processor(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    seconds = iter([10.0, 10.5])
    daemon.answers["GET /v1/instances/web/stats"] = lambda _request: Reply(
        {"name": "web", "cpu_s": next(seconds), "memory_bytes": 1 << 20, "own_bytes": 3 << 20, "shared_bytes": 2048}
    )
    assert root.run(["stats", "--no-stream", "web"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[3:7] == ["MEMORY", "LIMIT", "OWN", "SHARED"]  # after NAME and CPU %
    row = line.split()
    assert 20 < float(row[1]) <= 100.5  # half a second of work in half a second, or more on a busy host
    assert row[2:9] == ["1.0", "MB", "-", "3.0", "MB", "2.0", "kB"]


def template(key: str, **more: Any) -> dict[str, Any]:
    """A template as the API answers it."""
    return {
        "kind": "template",
        "key": key,
        "node": "node-1",
        "memory_bytes": 512 << 20,
        "cpus": 2,
        "tty": False,
        "accelerator": "tcg",
        "kernel": "6.12.9-amd64",
        "qemu": "10.0.2 (Debian 1:10.0.2)",
        "size_bytes": 60 << 20,
        "created_at": "2026-01-31T12:00:00.000000Z",
        "used_at": "2026-01-31T12:00:00.000000Z",
        "boot_s": 5.0,
        "cause": "wanted",
        "checked": True,
        "instances": 3,
        **more,
    }


def test_templates_are_shown_with_their_state(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    items = [template("3f2a"), template("a000", checked=False, cause="damaged", instances=0)]
    daemon.answers["GET /v1/templates"] = Reply({"items": items, "revision": "x:1"})
    assert root.run(["template", "ls"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:4] == ["KEY", "MEMORY", "CPUS", "ACCEL"]
    assert first.split()[:10] == ["3f2a", "512", "MB", "2", "tcg", "6.12.9-amd64", "10.0.2", "60.0", "MB", "3"]
    assert first.endswith("  ready")
    assert second.endswith("  unchecked (made anew: was damaged)")
    assert root.run(["template", "ls", "-q"]) == 0
    assert capsys.readouterr().out == "3f2a\na000\n"
    assert root.run(["template", "ls", "--format", "json"]) == 0
    assert json.loads(capsys.readouterr().out) == items


def test_unused_templates_are_those_without_instances(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    items = [template("3f2a"), template("a000", instances=0), template("b000", instances=0)]
    daemon.answers["GET /v1/templates"] = Reply({"items": items, "revision": "x:1"})
    for key in ("a000", "b000"):
        done = operation("template.rm", f"template/{key}", result={"freed_bytes": 1, "held_bytes": 0})
        daemon.answers[f"DELETE /v1/templates/{key}"] = Reply(done)
    assert root.run(["template", "rm", "--unused"]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("a000\nb000\n", "")
    assert not [request for request in daemon.requests if request.path.endswith("3f2a")]


def test_what_instances_still_hold_of_a_removed_template_is_told(
    daemon: Double, capsys: pytest.CaptureFixture[str]
) -> None:
    done = operation("template.rm", "template/3f2a0000", result={"freed_bytes": 1, "held_bytes": 60 << 20})
    daemon.answers["DELETE /v1/templates/3f"] = Reply(done)
    assert root.run(["template", "rm", "3f"]) == 0
    said = capsys.readouterr()
    assert said.out == "3f2a0000\n"
    assert said.err.startswith("60.0 MB are given back when")


def test_a_template_is_made_afresh(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers["POST /v1/templates/3f/refresh"] = Reply(operation("template.refresh", "template/3f2a0000"))
    assert root.run(["template", "refresh", "3f", "b"]) == 1
    said = capsys.readouterr()
    assert said.out == "3f2a0000\n"
    assert said.err == "error: refresh does not exist (look)\n"


@pytest.mark.parametrize("line", [["rm"], ["rm", "--unused", "3f"]])
def test_templates_to_remove_are_named_or_the_unused(
    daemon: Double, capsys: pytest.CaptureFixture[str], line: list[str]
) -> None:
    assert root.run(["template", *line]) == 2
    assert "alveole template rm: give either KEYs or --unused" in capsys.readouterr().err
    assert daemon.requests == []


@pytest.mark.parametrize("form", ["table", "json"])
def test_events_tell_of_removals_too(daemon: Double, capsys: pytest.CaptureFixture[str], form: str) -> None:
    data = {"action": "removed", "kind": "instance", "name": "web", "revision": 7, "object": None}
    daemon.answers["GET /v1/events"] = Reply(
        chunks=(b"id: s:7\nevent: instance\n", f"data: {json.dumps(data)}\n\n".encode())
    )
    assert root.run(["events", "--from", "s:6", "--format", form]) == 0
    out = capsys.readouterr().out
    assert (
        json.loads(out) == {"token": "s:7", **data}
        if form == "json"
        else out.split()
        == [
            "s:7",
            "instance",
            "removed",
            "web",
        ]
    )
    assert daemon.requests[0].query["from"] == ["s:6"]


def test_build_sends_the_recipe_and_where_it_is(
    daemon: Double, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('base = "scratch"\n[[files]]\ntarget = "/x"\nsource = "x"\n')
    done = operation("image.build", "image/x:1", result={"name": "x:1", "digest": "sha256:ab"})
    daemon.answers["POST /v1/images/build"] = Reply(done)
    assert root.run(["image", "build", "x:1", str(recipe)]) == 0
    assert capsys.readouterr().out == "x:1  sha256:ab\n"
    assert daemon.requests[0].body == {
        "name": "x:1",
        "recipe": {"base": "scratch", "files": [{"target": "/x", "source": "x"}]},
        "directory": str(tmp_path),
        "use_cache": True,
    }
    recipe.write_text("base = ")
    assert root.run(["image", "build", "x:1", str(recipe)]) == 2


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (["lss"], "alveole: No such command 'lss'."),
        (["run"], "alveole run: Missing argument 'IMAGE'."),
        (["run", "-m", "12x", "debian:12"], "alveole run: --memory '12x': not a size; valid: "),
        (["run", "-d", "-p", "80", "debian:12"], "alveole run: --publish '80': the host port is missing; valid: "),
        (["run", "--isolation", "jail", "debian:12"], "alveole run: Invalid value for '--isolation': 'jail' is not "),
        (["stop", "-t", "soon", "web"], "alveole stop: --time 'soon': not a time; valid: "),
        (["volume", "create", "-s", "x", "data"], "alveole volume create: --size 'x': not a size; valid: "),
        (["logs", "--since", "noon", "web"], "alveole logs: --since 'noon': not a time; valid: "),
        (
            ["logs", "--since", "2026-01-31T12:00:00", "web"],
            "alveole logs: --since '2026-01-31T12:00:00': the time zone",
        ),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_2(
    daemon: Double, capsys: pytest.CaptureFixture[str], line: list[str], told: str
) -> None:
    assert root.run(line) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(told)
    assert second.endswith("--help`.")
    assert daemon.requests == []


def test_a_terminal_is_asked_for_where_there_is_none(daemon: Double, monkeypatch: pytest.MonkeyPatch) -> None:
    with Path(os.devnull).open() as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        assert root.run(["run", "-it", "debian:12"]) == 2
    assert daemon.requests == []


def test_a_stopped_daemon_is_one_line_and_exit_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert root.run(["--socket", str(tmp_path / "none"), "ls"]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: cannot reach the daemon at ")
    assert said.err.endswith("(start it with `alveole serve`)\n")


def test_hostile_text_in_an_error_cannot_drive_the_terminal(daemon: Double, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"code": "internal", "message": "\x1b[2Jgone\nfine"}
    daemon.answers["GET /v1/version"] = Reply({"error": error}, 500)
    assert root.run(["version"]) == 1
    assert "error: \ufffd[2Jgone\ufffdfine\n" in capsys.readouterr().err


def test_a_reader_that_leaves_ends_the_command_quietly(daemon: Double) -> None:
    """Exit 141, as a program killed by SIGPIPE, and not a word."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "alveole", "ls"], stdout=writer, stderr=subprocess.PIPE, timeout=30, check=False
        )
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_every_command_explains_itself_with_an_example() -> None:
    """Also: the list of verbs, kept apart so that it imports none, says what each verb says."""
    top = click.Context(root.cli, info_name="alveole")
    for name, text in root.VERBS.items():
        command = root.cli.get_command(top, name)
        assert command is not None
        assert command.help is not None
        leaves = list(command.commands.values()) if isinstance(command, click.Group) else [command]
        assert command.help.split("\n")[0].startswith(text.removesuffix("."))
        for leaf in leaves:
            assert "Example" in (leaf.help or ""), f"{name} {leaf.name}"
