"""What every HTML page has: its shell, its figures as plotly's JSON, and a file that is whole or
not there.

A page needs no network: its content security policy forbids every request, and plotly.js is in it
once, packed, where the template asks for it. Text is escaped by jinja's autoescape, and the JSON of
figures by writing `<` as `\\u003c`.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratoscope.errors import ResultError
from stratoscope.plots import theme
from stratoscope.plots.text import (
    JOINED,
    SPECIAL,
    leftward,
    number,
    percent,
    prose,
    quiet,
    readable,
    scientific,
    visible,
)

if TYPE_CHECKING:
    import plotly.graph_objects as go
    from jinja2 import Environment

HERE = Path(__file__).parent
THEMES = {"light": theme.template(theme.LIGHT), "dark": theme.template(theme.DARK)}


@dataclass(frozen=True, slots=True)
class Panel:
    """One drawn figure: title (also alternative text), height and least width in pixels, plotly's
    JSON."""

    title: str
    height: int
    width: int
    data: str


def panel(figure: go.Figure, title: str, width: int) -> Panel:
    """A plotly figure as a page holds it."""
    drawn = json.loads(figure.to_json(engine="json"))
    del drawn["layout"]["template"]  # the page puts in that of its theme
    for trace in drawn["data"]:
        if "meta" in trace:
            # a text per cell is most of the file; page.js builds it from `meta`
            del trace["hovertext"]
    return Panel(title, int(figure.layout.height), width, json.dumps(drawn))


def render(template: str, **what: Any) -> str:
    """The page of one template of this folder, given `what` it shows."""
    from markupsafe import Markup

    script = lambda name: Markup((HERE / name).read_text(encoding="utf-8"))  # noqa: E731
    return fragment(
        template,
        **what,
        css=script("page.css"),
        js=script("page.js"),
        figures=script("figures.js"),
        plotly=_plotly,
        themes=json.dumps(THEMES),
    )


def fragment(template: str, folder: Path = HERE, /, **what: Any) -> str:
    """A part of a page, or a page that brings its own scripts: one template of `folder`, which may
    use those of this one."""
    return (
        _environment(folder)
        .get_template(template)
        .render(
            **what, palettes={"light": theme.LIGHT, "dark": theme.DARK}, gradient=theme.gradient
        )
    )


@cache
def _environment(folder: Path) -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    tidy = {"trim_blocks": True, "lstrip_blocks": True}
    page = Environment(
        loader=FileSystemLoader([folder, HERE]), autoescape=True, undefined=StrictUndefined, **tidy
    )
    page.filters |= {f.__name__: f for f in (visible, readable, percent, number, scientific)}
    page.filters |= {f.__name__: lambda text, f=f: Markup(f(text)) for f in (prose, quiet)}
    page.tests |= {"leftward": leftward, "special": _special}
    page.globals |= {"json": lambda text: Markup(_inert(text)), "html": Markup}
    return page


@cache
def _plotly() -> str:
    """plotly.js, gzipped in base64: 1.9 MB instead of 4.8, the same bytes each time."""
    from plotly.offline import get_plotlyjs

    return base64.b64encode(gzip.compress(get_plotlyjs().encode(), 9, mtime=0)).decode()


def image(svg: str) -> str:
    """An SVG as the address of a picture: inside it, its style touches nothing else on the page."""
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


def _special(token: str) -> bool:
    """Whether a token stands back: no text spells it, or its left neighbour shows it."""
    return token == JOINED or bool(SPECIAL.fullmatch(token)) or not token.strip()


def write(html: str, path: str | os.PathLike[str]) -> Path:
    """Write a page; the file is complete or not there at all. Raises ResultError when it cannot be
    written."""
    target = Path(path)
    # "replace": half of a surrogate pair in a token must not cost the whole page.
    content = html.encode("utf-8", errors="replace")
    half = target.parent / f".{target.name}.{os.getpid()}.part"
    try:
        try:
            half.write_bytes(content)
            os.replace(half, target)
        finally:
            with suppress(OSError):
                half.unlink()  # gone already when the page is in place
    except OSError as error:
        raise ResultError(
            f"The page could not be written to {target}: {error.strerror or error}. "
            "Nothing was left behind; name a file in a folder that exists, can be written to and "
            "has room."
        ) from error
    return target


def _inert(text: str) -> str:
    """JSON that cannot leave the script element it stands in, nor be read as HTML."""
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
