#!/usr/bin/env python
"""Runs `kd-det label`."""

from kd_det.commands.console import run_command

if __name__ == "__main__":
    run_command("label")
