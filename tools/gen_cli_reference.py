"""Writes docs/reference/cli.md from the command line itself, so that it cannot say anything else.

Run `python tools/gen_cli_reference.py`. With `--check` nothing is written: the exit code tells whether it is current.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from alveole.cli.main import cli

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "cli.md"
_WIDTH = 100
_INTRODUCTION = """\
# The command line

Generated from the program by `tools/gen_cli_reference.py`: `alveole COMMAND --help` prints the same.

| exit code | meaning |
|---|---|
| 0 | done |
| 1 | failed; with several names, all were tried |
| 2 | the command line itself is wrong |
| 125 | `run`, `exec`, `attach`: Alveole failed |
| 126, 127 | `run`, `exec`: the command cannot be executed, does not exist |
| 130 | Ctrl-C |
| 141 | whoever read the output has gone |
| other | `run`, `exec`, `attach`: the command's own; 128 + N when signal N killed it |

Colours are used on a terminal only, and never where `NO_COLOR` is set.
"""


def commands(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    """Each command's path and help, in the order of the program."""
    settings = {**command.context_settings, "terminal_width": _WIDTH}
    context = click.Context(command, parent=parent, info_name=name, **settings)
    yield context.command_path, command.get_help(context)
    if isinstance(command, click.Group):
        for child in command.list_commands(context):
            found = command.get_command(context, child)
            if found is not None:
                yield from commands(found, context, child)


def page() -> str:
    """The whole reference page."""
    sections = (f"## {path}\n\n```text\n{text.rstrip()}\n```\n" for path, text in commands(cli, None, "alveole"))
    return "\n".join([_INTRODUCTION, *sections])


def main() -> int:
    current = page()
    if "--check" in sys.argv[1:]:
        return 0 if PAGE.exists() and PAGE.read_text() == current else 1
    PAGE.write_text(current)
    return 0


if __name__ == "__main__":
    sys.exit(main())
