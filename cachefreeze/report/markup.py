"""HTML from plain values: pages in one file, numbers that say where they are from.

A page runs no script and asks for nothing: its policy forbids both.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape

from cachefreeze.files import human_bytes
from cachefreeze.report.run_results import RunResults
from cachefreeze.report.summary_text import duration

# How numbers are written, everywhere in a page.
FORMATS: Mapping[str, Callable[[float], str]] = {
    "percent": lambda value: f"{value:.2%}",
    "seconds": duration,
    "bytes": human_bytes,
    "count": lambda value: f"{value:,.0f}",
    "loss": lambda value: f"{value:.4f}",
    "rate": lambda value: f"{value:.3g}",
    "times": lambda value: f"{value:.2f}x",
    "share": lambda value: f"{value:.2f}",
}

STYLE = """
*{box-sizing:border-box}
body{margin:0 auto;max-width:1180px;padding:1rem;font:16px/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--paper);overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}
h2{font-size:1.2rem;margin:2rem 0 .5rem}
p{max-width:75ch}
code{font:.9em ui-monospace,monospace}
pre{white-space:pre-wrap;margin:.5rem 0;padding:.6rem .8rem;border:1px solid var(--grid)}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1rem;margin:0}
dt,figcaption,.tile span{color:var(--muted)}
dd{margin:0;max-width:75ch}
.tiles{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(150px,1fr))}
.tile{border:1px solid var(--grid);padding:.6rem .8rem}
.tile b{display:block;font-size:1.5rem;line-height:1.3}
.figures{columns:2 480px;column-gap:2rem;margin-top:1.5rem}
figure{margin:0 0 2rem;break-inside:avoid}
figure h3{font-size:1rem;margin:0 0 .5rem}
figcaption{font-size:.9rem;margin-top:.25rem}
svg{display:block;width:100%;height:auto;font-family:system-ui,sans-serif;stroke-linejoin:round}
.scroll{overflow-x:auto;overflow-wrap:normal}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.2rem .8rem .2rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--grid)}
th{font-weight:600}
td.n,th.n{text-align:right}
td.n{white-space:nowrap}
a{color:inherit;text-decoration:underline dotted}
:target{outline:2px solid var(--suffix);outline-offset:2px}
@media(max-width:600px){
th,td{padding-right:.5rem;font-size:.9rem}
.stack table,.stack tbody{display:block}
.stack thead{display:none}
.stack tr{display:block;border-bottom:1px solid var(--grid);padding:.5rem 0}
.stack td{display:block;overflow:hidden;text-align:right;border:0;padding:0}
.stack td:first-child{font-weight:600}
.stack td::before{content:attr(data-header);float:left;margin-right:1rem;color:var(--muted)}
}
summary{cursor:pointer;padding:.3rem 0}
"""


def number(
    record: RunResults, place: str, how: str, by: tuple[RunResults, str] | None = None
) -> str:
    """A number of a run's files, in words, with its value and its place.

    Args:
        record: of the run.
        place: or places, see `RunResults.at`.
        how: one of `FORMATS`.
        by: the place, in a run, of another number that it is divided by.
    """
    value = record.at(place)
    named = f'data-run="{escape(str(record.folder))}" data-from="{place}"'
    if by is not None:
        value /= by[0].at(by[1])
        named += f' data-by-run="{escape(str(by[0].folder))}" data-by="{by[1]}"'
    return f'<data value="{value!r}" {named} data-as="{how}">{FORMATS[how](value)}</data>'


def frozen_units(record: RunResults, place: str) -> str:
    """How many units are, of how many: `4/5`."""
    return f"{number(record, place, 'count')}/{len(record.summary['units'])}"


def code(text: object) -> str:
    """A name or a value as it is written in commands and files."""
    return f"<code>{escape(str(text))}</code>"


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Iterable[int] = (),
    *,
    wide: str = "scroll",
) -> str:
    """Cells are HTML, the header's are text. Columns in `right` are numbers. What is wider than a
    phone can `scroll`, or `stack`: each row is a list there, of its cells with their headers."""
    kinds = [' class="n"' if column in set(right) else "" for column in range(len(header))]
    head = "".join(f"<th{k}>{escape(c)}</th>" for k, c in zip(kinds, header, strict=True))
    # CSS can show a header beside each cell only if it is an attribute of it.
    if wide == "stack":
        kinds = [f'{k} data-header="{escape(c)}"' for k, c in zip(kinds, header, strict=True)]
    body = "\n".join(
        "<tr>" + "".join(f"<td{k}>{c}</td>" for k, c in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="{wide}"><table><thead><tr>{head}</tr></thead>\n'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def terms(pairs: Iterable[tuple[str, str]]) -> str:
    """Terms (text) and what is to be said of them (HTML)."""
    return "<dl>" + "\n".join(f"<dt>{escape(t)}</dt><dd>{d}</dd>" for t, d in pairs) + "</dl>"


def glossary(words: Mapping[str, str]) -> str:
    """Words and what they mean (text), where `linked` leads to."""
    return (
        "<dl>"
        + "\n".join(
            f'<dt id="{_anchor(word)}">{escape(word)}</dt><dd>{escape(meaning)}</dd>'
            for word, meaning in words.items()
        )
        + "</dl>"
    )


def linked(word: str, text: str | None = None) -> str:
    """A word of the glossary, or another form of it (text)."""
    return f'<a href="#{_anchor(word)}">{escape(text or word)}</a>'


def _anchor(word: str) -> str:
    return f"word-{word.replace(' ', '-')}"


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """What matters most: large, with words below (both HTML)."""
    each = "\n".join(
        f'<div class="tile"><b>{large}</b><span>{words}</span></div>' for large, words in pairs
    )
    return f'<div class="tiles">{each}</div>'


def figure(title: str, svg: str, alternative: str, caption: str) -> str:
    """A picture (an `svg` element), what it shows for who cannot see it (text), and a caption
    (HTML)."""
    label = f'<svg role="img" aria-label="{escape(alternative)}" '
    return (
        f"<figure><h3>{escape(title)}</h3>{svg.replace('<svg ', label, 1)}"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def left_out(title: str, why: str) -> str:
    """Instead of a picture that would say nothing."""
    return (
        f'<figure class="left-out"><h3>{escape(title)}</h3>'
        f"<figcaption>Left out: {escape(why)}.</figcaption></figure>"
    )


def folded(title: str, content: str) -> str:
    """What only some want to see."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def variables(colours: Mapping[str, tuple[str, str]]) -> str:
    """CSS variables, by name: their values on a light page, and on a dark one."""
    light, dark = (
        ";".join(f"--{name}:{pair[which]}" for name, pair in colours.items()) for which in (0, 1)
    )
    return f":root{{{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def document(title: str, body: str, colours: Mapping[str, tuple[str, str]]) -> bytes:
    """A whole page.

    Args:
        title: text.
        body: HTML.
        colours: see `variables`.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(title)}</title>
<style>
{variables(colours)}{STYLE}</style>
</head>
<body>
{body}
</body>
</html>
""".encode()
