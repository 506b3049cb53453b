"""`python -m alveole` is `alveole`."""

from alveole.cli.start import main

if __name__ == "__main__":
    main()
