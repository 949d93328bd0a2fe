"""The page that the reports are made of: one HTML file that needs nothing else, in light and in dark.

In: a title, and sections of tables, figures and text. Out: HTML as text. Always: no script, and a
Content-Security-Policy that forbids every request, so that even text which was not escaped could fetch and run nothing;
all text that is not made here is escaped and printable. Not here: what is shown (page), the plots (plot).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from .show import plain

STYLE = """
:root { color-scheme: light dark; --back: #fff; --fore: #1b1f24; --dim: #59636e; --rule: #dfe3e8; --warn: #9a3412;
  --strip: #8884; --c0: #0b62a8; --c1: #c2410c; --c2: #0f7a55; --c3: #a3358c; --c4: #8a6a00; --c5: #2a8fbd;
  --c6: #b91c1c; --c7: #5b5bd6; --c8: #4d7c0f; --c9: #6b7280 }
@media (prefers-color-scheme: dark) { :root { --back: #14171b; --fore: #e4e8ec; --dim: #98a2ad; --rule: #2d333b;
  --warn: #fdba74; --c0: #5cb3ff; --c1: #ff9351; --c2: #43cf9b; --c3: #f08bd9; --c4: #e3bd3f; --c5: #7fd3f7;
  --c6: #ff7b7b; --c7: #a5a5ff; --c8: #a3d65c; --c9: #9ca3af } }
body { background: var(--back); color: var(--fore); font: 15px/1.45 system-ui, sans-serif; margin: 0 auto;
  max-width: 1320px; padding: 1rem 1.5rem 4rem }
h1 { font-size: 1.5rem } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; overflow-wrap: anywhere }
p { margin: .3rem 0; overflow-wrap: anywhere } .dim, figcaption small { color: var(--dim) }
.warning { color: var(--warn); font-weight: 600 }
dl { display: flex; flex-wrap: wrap; gap: .5rem 2rem; margin: 1rem 0 } dt { color: var(--dim); font-size: .85rem }
dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600 }
.figures { display: grid; gap: 1rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)) }
figure { margin: 0 } figcaption { font-weight: 600 } figcaption small { display: block; font-weight: 400 }
.key { font-size: .85rem; font-weight: 400; margin-right: .8rem; overflow-wrap: anywhere }
.key::before { background: var(--c); content: ""; display: inline-block; height: .2rem; margin: 0 .3rem .25rem 0;
  width: 1rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 }
th, td { border-bottom: 1px solid var(--rule); padding: .2rem .7rem; text-align: right; vertical-align: top;
  white-space: nowrap }
th:first-child, td:first-child, .word { text-align: left }
td.word { min-width: 8rem; overflow-wrap: anywhere; white-space: normal }
th { color: var(--dim); font-weight: 500; white-space: normal }
svg { display: block; font-size: 11px; height: auto; width: 100% } svg text { fill: var(--dim) }
.rule { stroke: var(--rule) } .line { fill: none; stroke: var(--c); stroke-linejoin: round; stroke-width: 1.6 }
.dot, .bar { fill: var(--c) } .spread { fill: none; stroke: var(--fore) } .strip { fill: transparent }
.strip:hover { fill: var(--strip) }
""" + "".join(f".c{index} {{ --c: var(--c{index}) }}\n" for index in range(10))

POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def text(value: object, most: int = 400) -> str:
    """Foreign text as HTML."""
    return escape(plain(value, most))


def render_document(title: str, body: Iterable[str]) -> str:
    """`body` is HTML."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{text(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{text(title)}</h1>",
            *body,
            "</body></html>\n",
        ]
    )


def render_table(head: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = ()) -> str:
    """`words`: columns of words, beside the first; figures stand right. No rows, no table."""
    body = "".join(f"<tr>{_cells('td', row, words)}</tr>" for row in rows)
    if not body:
        return ""
    top = f"<thead><tr>{_cells('th', head, words)}</tr></thead>"
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def _cells(tag: str, cells: Sequence[str], words: Sequence[int]) -> str:
    return "".join(
        f'<{tag} class="word">{text(cell)}</{tag}>' if place in words else f"<{tag}>{text(cell)}</{tag}>"
        for place, cell in enumerate(cells)
    )


def render_facts(facts: Iterable[tuple[str, str]]) -> str:
    """Figures side by side, each below its word."""
    return f"<dl>{''.join(f'<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>' for name, value in facts)}</dl>"


def render_figure(title: str, note: str, keys: Iterable[tuple[str, int]], svg: str) -> str:
    """`keys`: what each colour stands for."""
    small = f"<small>{text(note)}</small>" if note else ""
    return f"<figure><figcaption>{text(title)}{small}{render_keys(keys)}</figcaption>{svg}</figure>"


def render_keys(keys: Iterable[tuple[str, int]]) -> str:
    spans = "".join(f'<span class="key c{colour}">{text(name)}</span>' for name, colour in keys)
    return f"<div>{spans}</div>"


def render_warnings(sentences: Iterable[str]) -> list[str]:
    return [f'<p class="warning">{text(sentence)}</p>' for sentence in sentences]


def render_details(title: str, inner: str) -> str:
    return f"<details><summary>{text(title)}</summary>{inner}</details>"


def render_heading(title: str) -> str:
    return f"<h2>{text(title)}</h2>"
