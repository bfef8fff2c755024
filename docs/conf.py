"""How the documentation is built: `make docs`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

project = "kd_det"
author = "The kd_det authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "config_reference", "notebook"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "kd_det"
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
# Quotes and double hyphens stay as they are: values and options are copied from the pages.
smartquotes = False
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_preserve_defaults = True
smartquotes = False  # "" is a value of keys.
