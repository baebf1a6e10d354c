"""The public site: what Sphinx is told. tools/make_site.py lays the pages beside it and builds."""

from tools import stamp

NOW = stamp.facts()

project = "Make it fit"
author = copyright = "The authors of Make it fit"
version = release = NOW.version
language = "en"
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "site_parts",
]

# Lessons as committed: they were executed on a CPU, and a test compares each of their outputs.
nb_execution_mode = "off"
nb_merge_streams = True
nb_ipywidgets_js = {}  # controls show their static default; nothing is fetched for them
myst_enable_extensions = ["amsmath", "attrs_inline", "colon_fence", "dollarmath", "tasklist"]
myst_heading_anchors = 4
smartquotes = False  # an error's words, an option's two dashes: as they are typed
html_math_renderer = "mathml"  # written at build time: no script, no font, no third party

# Docstrings are Google's style, with names between single backticks.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
napoleon_use_ivar = True
add_module_names = False
python_use_unqualified_type_names = True
toc_object_entries = False

html_theme = "sphinx_book_theme"
html_title = "Make it fit"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"
html_context = {"default_mode": "auto"}
html_copy_source = html_show_sourcelink = False
html_theme_options = {
    "repository_url": NOW.repository,
    "use_repository_button": True,
    "use_download_button": False,
    "use_fullscreen_button": False,
    "show_toc_level": 2,
    "navbar_persistent": [],  # the search field is in the sidebar
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_exclude = ".linenos, .gp, .go"
suppress_warnings = ["myst.header"]  # a section that stands alone may begin with an h3
