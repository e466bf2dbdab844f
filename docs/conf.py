"""Sphinx: how the pages are built. ``sphinx-build -W -b html docs build/docs`` needs no network."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "extensions"))
os.environ["MPLBACKEND"] = "Agg"

import rmsprop_gpu

project, author = "rmsprop_gpu", "the authors of rmsprop_gpu"
version = release = rmsprop_gpu.__version__
copyright = f"{author}; BSD-3-Clause"

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
    "sphinx-mathjax-offline",
    "numpydoc",
    "myst_nb",
    "repository",
    "tables",
    "signatures",
]
exclude_patterns = ["extensions", "_templates"]
templates_path = ["_templates"]
default_role = "code"  # `lr` in a docstring is an argument
nitpicky = False  # numpydoc's words for types ("array", "callable") are no names

# The reference. What is not installed is mocked: no library but this one has to be there.
OPTIONAL = ("torch", "mpi4py", "cupy", "cupyx", "nccl", "cuda")
autodoc_mock_imports = [name for name in OPTIONAL if find_spec(name) is None]
if "torch" in autodoc_mock_imports:
    autodoc_mock_imports.append("rmsprop_gpu.torch.exchange")  # it reads a table of C functions of torch
autodoc_typehints = "none"  # they stand in the docstrings, in words
autodoc_member_order = "bysource"
autosummary_generate = True
numpydoc_show_class_members = False
numpydoc_xref_param_type = False

# Markdown, and notebooks, which are run while the pages are built.
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "deflist"]
myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_timeout = 180
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js = {}  # two scripts from a server; no page has a widget

html_theme = "pydata_sphinx_theme"
html_title = "rmsprop_gpu"
html_static_path = ["_static"]
html_css_files = ["pages.css"]
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}  # light or dark as the reader has it
html_theme_options = {
    "logo": {"text": "rmsprop_gpu"},
    "navbar_end": ["theme-switcher"],
    "secondary_sidebar_items": ["page-toc"],
    "show_prev_next": True,
    "header_links_before_dropdown": 6,
    "navigation_with_keys": False,
    "footer_start": ["copyright"],
    "footer_end": [],
}
