"""Configuration of the documentation site: ``python -m sphinx -W docs docs/_build/html``."""

import shutil
from pathlib import Path

from captum_fusion import __version__

HERE = Path(__file__).parent

# Sphinx reads only files below docs/, and the tutorials are beside it.
(HERE / "tutorials").mkdir(exist_ok=True)
for notebook in (HERE.parent / "tutorials").glob("*.ipynb"):
    shutil.copy2(notebook, HERE / "tutorials" / notebook.name)

project = "captum_fusion"
author = "the captum_fusion authors"
copyright = "2026, the captum_fusion authors"
release = version = __version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "paper"]  # the paper has a format of its own
html_theme = "furo"
html_title = "captum_fusion"
html_extra_path = ["llms.txt"]  # a summary for language models
templates_path: list[str] = []

nb_execution_mode = "off"  # tutorials keep their stored outputs
nb_render_markdown_format = "myst"  # with tables, which plain CommonMark does not have
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
