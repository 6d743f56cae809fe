"""The site: Sphinx and MyST, from pages here, notebooks as they are saved, and docstrings.  ``make docs`` builds it."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # sitetools, and bench

import prunelab  # noqa: E402

project = "prunelab"
author = "prunelab contributors"
copyright = "prunelab contributors"
version = release = prunelab.__version__
language = "en"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sitetools",  # gathers notebooks and pages of the repository, and makes pages from what was measured
]
exclude_patterns = ["generated", "requirements.lock", "**/.ipynb_checkpoints"]
nitpicky = True
nitpick_ignore_regex = [
    # Types of other libraries: their inventories would have to be downloaded.
    (r"py:.*", r"(torch|torchvision|numpy|np|pandas|pd|matplotlib|ipywidgets|PIL|nn|collections|typing|pathlib)\..*"),
    (r"py:.*", r"Nested"),
    (r"py:.*", r"os\.PathLike"),
    # The words that an option may be: the text of each option lists them.
    (
        r"py:.*",
        r"(Reduction|Normalizer|Fisher|QuadraticForm|Curvature|Structure|Factor|Diagonal|Correction|Schedule)(Name)?",
    ),
    (r"py:.*", r"PlanOptions"),  # the keywords of plan
    (r"py:.*", r"t\.Any"),  # as traitlets writes it
    (r"py:.*", r"(Tensor|Module|Path|Figure|Any|Callable|Iterable|Iterator|Mapping|Sequence|Literal|ABC|NamedTuple)"),
]
suppress_warnings = ["mystnb.unknown_mime_type"]  # results of notebooks are for programs; their text is shown
default_role = "code"

# Notebooks are shown as they are saved; what runs them is `make notebooks`.
nb_execution_mode = "off"
nb_merge_streams = True

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_dmath_double_inline = True  # $$…$$ in the middle of a paragraph, as Jupyter draws it
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False  # forward() says what nn.Module says
autodoc_preserve_defaults = True
autodoc_type_aliases = {
    "Batches": "prunelab.batches.Batches",
    "Loss": "prunelab.batches.Loss",
    "Inputs": "prunelab.tracing.fakes.Inputs",
    "fakes.Inputs": "prunelab.tracing.fakes.Inputs",
    "Schedule": "prunelab.pruning.schedule.Schedule",
}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
add_module_names = False
toc_object_entries_show_parents = "hide"

html_theme = "sphinx_book_theme"
html_title = "prunelab"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_copy_source = True  # the download button gives the notebook
html_show_sphinx = False
html_context = {"default_mode": "auto"}
html_theme_options = {
    "show_toc_level": 2,
    "show_navbar_depth": 1,
    "use_download_button": True,
    "use_fullscreen_button": False,
    "navbar_persistent": [],  # the search field is in the sidebar
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
}
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .gp, .go"

linkcheck_timeout = 15
linkcheck_retries = 2
linkcheck_workers = 4
