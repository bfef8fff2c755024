"""Runs ``kd-det`` as ``python -m kd_det``."""

from kd_det.commands.console import main

if __name__ == "__main__":
    main()
