"""`python -m alveole` is `alveole`."""

from alveole.cli.script import main

if __name__ == "__main__":
    main()
