"""Holds the commands of ``kd-det``, one module each: its arguments, and what it does with them."""
