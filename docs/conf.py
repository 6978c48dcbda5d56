"""Sphinx configuration."""

from __future__ import annotations

import mgs_core

project = "mgs_core"
author = "The mgs_core developers"
project_copyright = "The mgs_core developers"
version = release = mgs_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3  # links to headings of other pages
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = "mgs_core"

napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Cost"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"

nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(numpy|np|jaxtyping|collections\.abc|typing)\..*"),
    ("py:.*", r"(Array|Namespace|Tree|LossFunction|HeadFunction|ParameterChoice|PenaltyName|Shaped|Float|Any)"),
    ("py:.*", r"(torch|flax|jax|keras|lightning|transformers)\..*"),
    ("py:.*", r"mgs_core\._.*|onnx\.onnx_ml_pb2\..*|mgs_core\.onnx\.(graph|model)\..*"),
]
