"""Settings of Sphinx, which makes the site: `make docs`."""

from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml

import robustkern

project = "robustkern"
html_title = f"{project} {robustkern.__version__}"
html_theme = "furo"
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 80
default_role = "literal"  # docstrings have `code` in single backticks, as Markdown does
copybutton_prompt_text = r">>> |\.\.\. "
copybutton_prompt_is_regexp = True
html_math_renderer = "mathml"
# Reports of `robustkern evaluate`, which pages point to.
html_extra_path = [
    str(page) for page in Path(__file__).resolve().parent.parent.glob("bench/results/*.html")
]


def inline_math(writer, node):
    """A formula in a line of text."""
    writer.body.append(str(tex2mathml(node.astext())))
    raise nodes.SkipNode


def displayed_math(writer, node):
    """A formula of its own."""
    writer.body.append(f"<p>{tex2mathml(node.astext(), as_block=True)}</p>")
    raise nodes.SkipNode


def setup(app):
    """Formulas as MathML, which browsers show without a script from elsewhere."""
    app.add_html_math_renderer("mathml", (inline_math, None), (displayed_math, None))
