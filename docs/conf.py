"""How Sphinx builds the documentation: `make docs`. No network is asked for anything."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "extensions"), str(HERE.parent / "src")]

import memfit  # noqa: E402

project = "memfit"
author = "The memfit maintainers"
copyright = "The memfit maintainers, Apache-2.0"
release = version = memfit.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "command_line"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3
smartquotes = False  # it would make a dash of --memory

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_class_signature = "separated"
autodoc_default_options = {"exclude-members": "__init__, __new__"}
python_maximum_signature_line_length = 80
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# Without a network other projects' names cannot be looked up; memfit's own must all be found.
nitpick_ignore_regex = [(r"py:.*", r"(?!memfit).*"), (r"py:.*", r"memfit\.runtime\.windows\.Batch")]

html_theme = "furo"
html_title = "memfit"
html_static_path = ["static"]
html_css_files = ["memfit.css"]
html_show_sourcelink = False
html_copy_source = False
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#0059b3", "color-brand-content": "#0059b3"},
    "dark_css_variables": {"color-brand-primary": "#7db8ff", "color-brand-content": "#7db8ff"},
}
pygments_style = "friendly"
pygments_dark_style = "github-dark"
