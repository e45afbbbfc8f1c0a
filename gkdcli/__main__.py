"""`python -m gkdcli` is `gkd`; torchrun starts it this way."""

from gkdcli.cli import main

if __name__ == "__main__":
    main()
