"""Holds the commands of ``kd-det``, one module each, and what they share."""
