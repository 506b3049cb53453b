"""`alveole serve`."""

from pathlib import Path

import click

from alveole.cli.context import daemon_part, globals_of


@click.command()
@click.option(
    "--state",
    type=click.Path(file_okay=False, path_type=Path),
    default="/var/lib/alveole",
    show_default=True,
    help="What is kept: records, images, volumes, logs.",
)
@click.option(
    "--run-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default="/run/alveole",
    show_default=True,
    help="What a reboot may clear; holds the socket unless --socket says otherwise.",
)
@click.option("--group", help="The group that may use the socket; only root if not given.")
@click.option("--node", help="The name of this host; its host name if not given.")
def command(state: Path, run_dir: Path, group: str | None, node: str | None) -> None:
    """Run the daemon in the foreground. Instances outlive it.

    \b
    Examples:
      sudo alveole serve --group alveole
      sudo alveole --socket /tmp/a/s serve --state /tmp/a/state --run-dir /tmp/a
    """
    context = click.get_current_context()
    source = context.find_root().get_parameter_source("socket")
    given = source is not None and source is not click.core.ParameterSource.DEFAULT
    socket = Path(globals_of(context).socket) if given else run_dir / "alveole.sock"
    with daemon_part():
        from alveole.entry import serve
    serve.run(state, run_dir, socket, group, node)
