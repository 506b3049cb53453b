"""`python -m alveole` is `alveole`."""

from alveole.cli.main import main

if __name__ == "__main__":
    main()
