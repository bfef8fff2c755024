"""Writes HTML reports: one self-contained page with tables, learning curves and test images."""

from kd_det.reporting.page import Page, write_page

__all__ = ["Page", "write_page"]
