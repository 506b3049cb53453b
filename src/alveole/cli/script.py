"""The console script: it imports the rest without looking for garbage, which would take a tenth of the time of `ls`."""

import gc


def main() -> None:
    gc.disable()
    from alveole.cli.main import main as run

    gc.freeze()
    gc.enable()
    run()
