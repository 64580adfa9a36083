"""Pieces of HTML: everything that is not markup of ours goes through `text`. And the page that they are put into."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from streamprune.reporting.figures import SERIES

_LIGHT = ("#0066b3", "#b34700", "#00795c", "#8a3d8f", "#8a6500", "#a1203f", "#3d5566", "#4a4a00")
_DARK = ("#6cb6ff", "#ff9b57", "#4fd1a5", "#e09be5", "#e6bd4d", "#ff8fa8", "#a9c1d1", "#cfcf70")

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --quiet: #57606a; --grid: #d8dee4; --tint: #f3f5f8;
  LIGHT }
@media (prefers-color-scheme: dark) {
:root { --paper: #14181d; --ink: #e4e8ec; --quiet: #a3adb8; --grid: #373e47; --tint: #1e242b; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6rem; line-height: 1.25 }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--grid); padding-top: 1rem }
h3 { margin: 1.75rem 0 .25rem }
p { max-width: 50rem } .quiet, figcaption, caption { color: var(--quiet) } a { color: var(--s0) }
pre { padding: .75rem; background: var(--tint); overflow-x: auto; font-size: .85rem }
.wide { overflow-x: auto; margin: .75rem 0 }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; overflow-wrap: normal }
caption { text-align: left; padding-bottom: .25rem }
th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--grid); text-align: right; vertical-align: top;
  white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { background: var(--tint) }
tbody th { font-weight: 600 } tr > * + .prose { text-align: left; white-space: normal; min-width: 12rem }
.figures { display: grid; gap: 1.5rem 1.25rem; margin: 1.5rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); align-items: start }
figure { margin: 0 } figure svg { width: 100%; max-width: 28rem; height: auto; display: block }
figure svg * { stroke-linejoin: round; stroke-linecap: butt } figcaption { font-size: .85rem }
figcaption b { color: var(--ink); display: block; font-size: .95rem }
details { margin: 1rem 0 } summary { cursor: pointer; padding: .25rem 0; color: var(--s0) }
:focus-visible { outline: 2px solid var(--s0); outline-offset: 2px }
@media print { body { max-width: none } .wide { overflow: visible } }
"""


@dataclass(frozen=True)
class Html:
    """Markup that is known to be safe."""

    code: str


Content = str | Html


def text(content: Content) -> str:
    """A text as markup that shows it; markup as it is."""
    return content.code if isinstance(content, Html) else html.escape(content)


def element(name: str, *contents: Content, **attributes: str) -> Html:
    """`<name …>contents</name>`; an attribute `class_` is called class, and `aria_label` aria-label."""
    given = "".join(f' {k.rstrip("_").replace("_", "-")}="{html.escape(v)}"' for k, v in attributes.items())
    return Html(f"<{name}{given}>{''.join(map(text, contents))}</{name}>")


def joined(parts: Iterable[Content]) -> Html:
    """One after the other."""
    return Html("\n".join(map(text, parts)))


def table(caption: str, head: Sequence[Content], rows: Iterable[Sequence[Content]], prose: Sequence[int] = ()) -> Html:
    """The first cell of each row is its heading; columns `prose` are text and wrap. It scrolls where it is too wide."""

    def cell(name: str, i: int, content: Content, **more: str) -> Html:
        return element(name, content, **({"class_": "prose"} if i in prose else {}), **more)

    heading = element("tr", *(cell("th", i, h, scope="col") for i, h in enumerate(head)))
    body = [
        element("tr", *(cell("td" if i else "th", i, c, **({} if i else {"scope": "row"})) for i, c in enumerate(row)))
        for row in rows
    ]
    top = [element("thead", heading)] if head else []
    inner = element("table", element("caption", caption), *top, element("tbody", joined(body)))
    return element("div", inner, class_="wide", role="region", aria_label=caption, tabindex="0")


def figure(svg: str, title: str, *about: Content) -> Html:
    """A drawing with what it shows below it."""
    return element("figure", Html(svg), element("figcaption", element("b", title), *about))


def folded(summary: str, *contents: Content) -> Html:
    """What is there for those who want to see it."""
    return element("details", element("summary", summary), joined(contents))


def page(title: str, body: Iterable[Content]) -> str:
    """The whole document; nothing in it is fetched from anywhere."""
    style = _STYLE.replace("LIGHT", _colours(_LIGHT)).replace("DARK", _colours(_DARK))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<meta name="generator" content="streamprune">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">\n'
        f"<title>{html.escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n{joined(body).code}\n</body>\n</html>\n"
    )


def _colours(colours: Sequence[str]) -> str:
    return " ".join(f"--s{i}: {colour};" for i, colour in zip(range(len(SERIES)), colours, strict=True))
