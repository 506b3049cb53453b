"""``alveole doctor``: what this host can do, what that means, and the fix. Needs no daemon."""

import asyncio
import json
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from alveole.host.probe.finding import Finding, Status
from alveole.host.probe.survey import host_findings
from alveole.host.process import run
from alveole.runtime.qemu.selftest import machine_findings

DEFAULT_STATE = Path("/var/lib/alveole")
FIX_DEADLINE_S = 600.0  # installing packages


def main(
    format: str = "table",  # noqa: A002
    fix: bool = False,
    state: Path = DEFAULT_STATE,
    *,
    selftest: bool = False,
) -> int:
    """Print the findings as ``table`` or ``json``; with ``fix``, first run the commands that set things right.

    With ``selftest`` machines are booted too. Returns 1 if something that Alveole cannot work without is missing, or
    machines were to boot and none did.
    """
    findings = asyncio.run(host_findings(state))
    if fix and _apply(findings):
        findings = asyncio.run(host_findings(state))
    if selftest:
        findings = (*findings, *asyncio.run(machine_findings()))
    print(as_json(findings) if format == "json" else as_table(findings, shutil.get_terminal_size((100, 24)).columns))
    return 1 if lacking(findings) else 0


def lacking(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.needed and finding.status is Status.MISSING]


def as_json(findings: Iterable[Finding]) -> str:
    return json.dumps([asdict(finding) for finding in findings], indent=2)


def as_table(findings: tuple[Finding, ...], width: int) -> str:
    """A line for each finding, and for what is not ok, what it means and the fix below it."""
    longest = max(len(finding.name) for finding in findings)
    indent = " " * (longest + 10)
    lines = []
    for finding in findings:
        lines.append(f"{finding.status:<8}{finding.name:<{longest}}  {_fitting(finding.found, width - len(indent))}")
        if finding.status is not Status.OK:
            for remark in filter(None, (finding.means, finding.fix and f"fix: {finding.fix}")):
                lines += textwrap.wrap(remark, width, initial_indent=indent, subsequent_indent=indent)
            if finding.command:
                lines.append(f"{indent}$ {finding.command}")  # whole, so that it can be copied
    return "\n".join([*lines, "", _verdict(findings)])


def _fitting(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 0)] + "…"


def _verdict(findings: tuple[Finding, ...]) -> str:
    missing = lacking(findings)
    if missing:
        return f"Alveole cannot work here yet: {', '.join(finding.name for finding in missing)}."
    if os.geteuid() != 0:
        return "Nothing that is needed was found missing, but not all could be checked: run as root."
    return "Alveole can work here."


def _apply(findings: Iterable[Finding]) -> bool:
    """Run the commands of what is not ok, showing each; one that fails does not hide the next."""
    commands = dict.fromkeys(finding.command for finding in findings if finding.command)
    for command in commands:
        print(f"$ {command}", file=sys.stderr)
        done = asyncio.run(run(["sh", "-c", command], timeout_s=FIX_DEADLINE_S, check=False))
        if done.code != 0:
            print(done.failure(), file=sys.stderr)
    return bool(commands)
