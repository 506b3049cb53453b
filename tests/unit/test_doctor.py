"""How ``alveole doctor`` shows findings and what it returns. What is found is made up here."""

import json
from pathlib import Path

import pytest

from alveole.entry import doctor
from alveole.host.probe.finding import Finding, Status

FINE = Finding(name="kernel", status=Status.OK, needed=True, found="6.1", means="new enough")
EXTRA = Finding(name="skopeo", status=Status.MISSING, needed=False, found="not installed", means="no pulls")


def missing(command: str = "") -> Finding:
    return Finding(
        name="crun",
        status=Status.MISSING,
        needed=True,
        found="not installed",
        means="containers cannot run",
        fix="install crun",
        command=command,
    )


def answering(monkeypatch: pytest.MonkeyPatch, *answers: tuple[Finding, ...]) -> None:
    left = list(answers)

    async def host_findings(state: Path) -> tuple[Finding, ...]:
        return left.pop(0)

    monkeypatch.setattr(doctor, "host_findings", host_findings)


def test_only_what_is_needed_makes_it_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, (FINE, EXTRA), (FINE, missing()))
    assert doctor.main() == 0
    assert doctor.main() == 1


def test_table_says_meaning_and_fix_of_what_is_not_ok() -> None:
    table = doctor.as_table((FINE, missing("apt-get install crun")), width=80)
    assert "new enough" not in table
    for expected in (
        "containers cannot run",
        "fix: install crun",
        "$ apt-get install crun",
        "cannot work here yet: crun",
    ):
        assert expected in table


def test_json_holds_every_field(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answering(monkeypatch, (FINE,))
    doctor.main("json")
    expected = {"name": "kernel", "status": "ok", "needed": True, "found": "6.1", "means": "new enough"}
    assert json.loads(capsys.readouterr().out) == [{**expected, "fix": "", "command": ""}]


def test_machines_are_booted_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async def machine_findings() -> tuple[Finding, ...]:
        return (missing(),)

    monkeypatch.setattr(doctor, "machine_findings", machine_findings)
    answering(monkeypatch, (FINE,), (FINE,))
    assert doctor.main() == 0
    assert doctor.main(selftest=True) == 1


def test_fix_runs_the_commands_and_looks_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One command that fails neither stops the next nor raises."""
    made = tmp_path / "made"
    failing = missing("echo no such package >&2; false")
    answering(monkeypatch, (failing, missing(f"touch {made}")), (FINE,))
    assert doctor.main(fix=True) == 0
    assert made.exists()
