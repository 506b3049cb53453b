"""`alveole completion`."""

import click

from alveole.cli import output


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell: str) -> None:
    """Print a completion script for your shell. Names of instances and images complete too.

    \b
    Examples:
      alveole completion bash > /etc/bash_completion.d/alveole
      alveole completion zsh > "${fpath[1]}/_alveole"
      alveole completion fish > ~/.config/fish/completions/alveole.fish
    """
    from click.shell_completion import get_completion_class

    root = click.get_current_context().find_root()
    kind = get_completion_class(shell)
    assert kind is not None, "click knows every shell offered above"  # noqa: S101
    output.line(kind(root.command, {}, "alveole", "_ALVEOLE_COMPLETE").source())
