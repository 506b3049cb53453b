"""`alveole doctor`."""

import click

from alveole.cli.context import daemon_part, leave


@click.command()
@click.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True, help="How to print."
)
@click.option("--fix", is_flag=True, help="First run the commands that set things right.")
@click.option("--selftest", is_flag=True, help="Boot a small machine with each accelerator too: up to 40 seconds.")
def command(form: str, fix: bool, selftest: bool) -> None:
    """Check this host: what was found, what it means, how to fix it.

    Needs no daemon. The exit code is 1 if something that Alveole cannot work without is missing.

    \b
    Examples:
      alveole doctor
      sudo alveole doctor --fix
      sudo alveole doctor --selftest
    """
    with daemon_part():
        from alveole.entry import doctor
    leave(doctor.main(form, fix, selftest=selftest))
