"""The root command. Verbs are imported when they are called, so that each costs only what it uses."""

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

import click

from alveole.cli.context import EXIT_BROKEN_PIPE, EXIT_FAILED, EXIT_INTERRUPTED, EXIT_USAGE, report
from alveole.client.errors import ApiError

VERBS = {
    "run": "Create an instance and start it, with its output here unless detached.",
    "create": "Create an instance without starting it.",
    "start": "Start instances that are stopped.",
    "stop": "Stop instances: signal, wait, then kill.",
    "recreate": "Begin instances anew from their images: files, memory and processes.",
    "sleep": "Put running instances on disk, memory and processes included.",
    "wake": "Let sleeping instances go on where they were.",
    "fork": "Duplicate a running instance: memory, disk and processes.",
    "copy": "Make a new instance with the files and volumes of another, running or not, and start it.",
    "snapshot": "Keep what instances are, go back to it, and begin others from it.",
    "restart": "Stop instances and start them again.",
    "kill": "Send a signal to the first process of instances.",
    "rm": "Remove instances.",
    "ls": "List all instances.",
    "ps": "List running instances.",
    "inspect": "Show all that is known of instances.",
    "diff": "Show what an instance changed of its image.",
    "logs": "Show what an instance wrote.",
    "exec": "Run a command in a running instance.",
    "attach": "Connect to the first process of a running instance.",
    "console": "Sit down at the serial console of an operating system.",
    "wait": "Wait until instances have ended and print their exit codes.",
    "stats": "Show what running instances use.",
    "events": "Follow every change, as it happens.",
    "image": "Pull, build, import and remove images.",
    "network": "Create and remove networks.",
    "volume": "Create and remove volumes, and give them to running instances.",
    "template": "Show what vms go on from in place of booting, remove it, make it afresh.",
    "operation": "Look into what was asked for, and cancel it.",
    "doctor": "Check this host: what was found, what it means, how to fix it.",
    "serve": "Run the daemon.",
    "version": "Show the versions of the command line and of the daemon.",
    "completion": "Print a completion script for your shell.",
}
"""The first line of each verb's help; kept here so that `alveole --help` imports no verb."""


class LazyGroup(click.Group):
    """A group whose commands live in modules of the same name, imported on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        command = importlib.import_module(f"alveole.cli.{cmd_name}").command
        assert isinstance(command, click.Command)  # noqa: S101
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(VERBS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        verbs = [CompletionItem(verb, help=text) for verb, text in VERBS.items() if verb.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the verb; failures that were foreseen end in a line of text and an exit code."""
        try:
            try:
                return super().invoke(ctx)
            finally:
                sys.stdout.flush()
        except ApiError as error:
            report(error)
            ctx.exit(EXIT_FAILED)
        except BrokenPipeError:
            # Whoever read our output has gone. Nothing is left to say, and the last flush must not say it either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(EXIT_BROKEN_PIPE)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Each command explains itself: alveole COMMAND --help",
)
@click.option(
    "--socket",
    envvar="ALVEOLE_SOCKET",
    default="/run/alveole/alveole.sock",
    show_default=True,
    help="The daemon's socket; $ALVEOLE_SOCKET.",
)
@click.option(
    "--project",
    envvar="ALVEOLE_PROJECT",
    default="default",
    show_default=True,
    help="The project that names belong to; $ALVEOLE_PROJECT.",
)
@click.option("--debug", is_flag=True, help="Show the code, field and cause of errors.")
def cli(socket: str, project: str, debug: bool) -> None:
    """Run many isolated services on few machines: containers and sandboxes behind one API."""


def run(arguments: Sequence[str]) -> int:
    """The exit code of a command line."""
    try:
        code = cli.main(args=list(arguments), prog_name="alveole", standalone_mode=False)
    except click.UsageError as error:
        _explain(error)
        return EXIT_USAGE
    except click.ClickException as error:
        error.show()
        return EXIT_FAILED
    except click.Abort:
        return EXIT_INTERRUPTED
    return code if isinstance(code, int) else 0


def _explain(error: click.UsageError) -> None:
    """One line that says what is wrong, and where to read more."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return
    path = error.ctx.command_path if error.ctx else "alveole"
    message = " ".join(error.format_message().split())
    sys.stderr.write(f"{path}: {message}\nSee `{path} --help`.\n")


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
