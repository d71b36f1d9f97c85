"""Markup: elements that escape what they hold, and the frame in which every page of ours stands.

A page holds its own style and pictures, so that it can be mailed and still be read in years; the price is pictures in
base64, a third larger. Texts in it come from users' data: `element` escapes every string that it was not given as Html.
"""

import base64
import html
import string
from collections.abc import Sequence
from pathlib import Path

from tlm.run import write_text


class Html(str):
    """Markup: goes into a page as it is."""


def element(tag: str, *children: str | None, **attributes: str | None) -> Html:
    """An element. Strings among the children, and all attributes, are escaped; `class_` is the attribute class."""
    named = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(value)}"'
        for name, value in attributes.items()
        if value is not None
    )
    inner = join(*children)
    return Html(f"<{tag}{named}>" if tag in ("img", "source") else f"<{tag}{named}>{inner}</{tag}>")


def join(*children: str | None) -> Html:
    return Html("".join(c if isinstance(c, Html) else html.escape(c, quote=False) for c in children if c is not None))


def section(title: str, note: str | None, *content: Html) -> Html:
    return element("section", element("h2", title), element("p", note, class_="soft") if note else None, *content)


def grid(label: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    """A table that scrolls sideways where the screen is narrow. A row's first cell names it; `label` is read aloud.

    Cells are strings or `td` elements; columns of `words` elements begin at the left, as their heads do.
    """
    left = {i for row in rows for i, cell in enumerate(row) if isinstance(cell, Html) and 'class="words' in cell}
    classes = ["words" if i in left else None for i in range(len(heads))]
    head = element("tr", *(element("th", t, scope="col", class_=c) for t, c in zip(heads, classes, strict=True)))
    body = [element("tr", element("th", first, scope="row"), *map(as_cell, rest)) for first, *rest in rows]
    table = element("table", element("thead", head), element("tbody", *body))
    return element("div", table, class_="scroll", tabindex="0", role="region", aria_label=label)


def as_cell(content: str) -> Html:
    return content if isinstance(content, Html) else element("td", content)


def by_day_and_night(light: bytes, dark: bytes, words: str) -> Html:
    """A picture as two PNGs, one for a light page and one for a dark one; `words` tell it to those who do not see."""
    by_night = element("source", srcset=data_url(dark), media="(prefers-color-scheme: dark)")
    return element("picture", by_night, element("img", src=data_url(light), alt=words))


def data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def write_page(path: Path, title: str, *sections: Html) -> None:
    """Raises InputError if the disk refuses."""
    body = join(element("h1", title), *sections)
    template = string.Template(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    write_text(path, template.substitute(title=html.escape(title), body=body))
