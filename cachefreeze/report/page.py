"""Pages in one file, made from the templates beside this module.

A page runs no script and loads nothing: its content security policy forbids both. All values in a
template are escaped, except pictures.
"""

from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cachefreeze.report import figures
from cachefreeze.report.summary_text import duration
from cachefreeze.store.files import human_bytes


@dataclass(frozen=True)
class Picture:
    """A picture, or the reason why there is none.

    Attributes:
        title: Title above the picture.
        svg: Picture, as an `svg` element. Empty if it was left out.
        alternative: Text for those who cannot see the picture.
        why: Reason why the picture was left out.
    """

    title: str
    svg: str = ""
    alternative: str = ""
    why: str = ""


def render(template: str, **content: Any) -> bytes:
    """Returns a page, as bytes of UTF-8.

    Args:
        template: File name of the template.
        **content: Values of the names in the template.
    """
    text = _TEMPLATES.get_template(template).render(colours=figures.COLOURS, **content)
    # Names of files may hold bytes that are no UTF-8.
    return text.encode(errors="backslashreplace")


def _trusted(svg: str) -> Markup:
    """Returns a picture of matplotlib without its first word `<svg`, which the template writes."""
    return Markup(svg.removeprefix("<svg"))


_TEMPLATES = Environment(
    loader=PackageLoader("cachefreeze.report"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "trusted": _trusted,
    "duration": duration,
    "bytes": human_bytes,
    "number": "{:,}".format,
    "percent": "{:.2%}".format,
    "ratio": "{:.2f}x".format,
}
