"""How Sphinx builds the site: `make docs`, with every warning an error."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

import pins_ext

project = "pins_ext"
author = "the pins_ext developers"
version = release = pins_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "commands", "docstrings"]
exclude_patterns = ["_ext", "diagrams", "conftest.py"]

source = "https://github.com/pins-ext/pins_ext"
myst_enable_extensions = ["colon_fence", "deflist", "smartquotes"]
myst_heading_anchors = 3
# [text](source:csrc/ops.cpp) leads into the repository.
myst_url_schemes = {"http": None, "https": None, "source": f"{source}/blob/main/{{{{path}}}}"}

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
maximum_signature_line_length = 88
python_display_short_literal_types = True
napoleon_use_ivar = True
default_role = "code"

html_theme = "pydata_sphinx_theme"
html_title = f"pins_ext {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
# Pages without pages below them need no list of these.
html_sidebars = {page: [] for page in ("get_started", "results", "faq")}
html_copy_source = False
html_theme_options = {
    "navbar_align": "left",
    "header_links_before_dropdown": 6,
    "show_toc_level": 2,
    "icon_links": [{"name": "Source", "url": source, "icon": "fa-brands fa-github"}],
    "footer_start": ["copyright"],
    "footer_end": ["theme-version"],
    "secondary_sidebar_items": ["page-toc"],
}
copyright = "the pins_ext developers, Apache-2.0"
copybutton_prompt_text = "$ "
