#!/usr/bin/env python
"""Runs `kd-det similarity`."""

from kd_det.commands.console import run_command

if __name__ == "__main__":
    run_command("similarity")
