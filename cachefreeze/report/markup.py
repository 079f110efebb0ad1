"""HTML of a page in one file. It runs no script and asks for nothing: its policy forbids both."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

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
:target{outline:2px solid var(--training);outline-offset:2px}
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


def code(text: object) -> str:
    """Returns a name or a value as it is written in commands and files."""
    return f"<code>{escape(str(text))}</code>"


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    right: Iterable[int] = (),
    *,
    wide: str = "scroll",
) -> str:
    """Returns a table.

    Args:
        header: Texts of the header.
        rows: Cells of every row, as HTML.
        right: Columns that hold numbers.
        wide: What is done on a phone: "scroll", or "stack" for a list of cells with their headers
            in the place of each row.
    """
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


def terms(pairs: Iterable[tuple[str, str]], *, linkable: bool = False) -> str:
    """Returns terms (text), each with what is said of it (HTML).

    Args:
        pairs: Terms and their HTML.
        linkable: Whether these are the meanings of words, which `linked` leads to.
    """
    anchor = ' id="{}"' if linkable else ""
    lines = (
        f"<dt{anchor.format(_anchor(term))}>{escape(term)}</dt><dd>{said}</dd>"
        for term, said in pairs
    )
    return "<dl>" + "\n".join(lines) + "</dl>"


def linked(word: str, text: str | None = None) -> str:
    """Returns a word that leads to its meaning, or another form of it (text)."""
    return f'<a href="#{_anchor(word)}">{escape(text or word)}</a>'


def _anchor(word: str) -> str:
    return f"word-{word.replace(' ', '-')}"


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Returns what matters most: large, with words below (both HTML)."""
    each = "\n".join(
        f'<div class="tile"><b>{large}</b><span>{words}</span></div>' for large, words in pairs
    )
    return f'<div class="tiles">{each}</div>'


def figure(title: str, svg: str, alternative: str, caption: str) -> str:
    """Returns a picture with its title.

    Args:
        title: Text above it.
        svg: Picture, as an `svg` element.
        alternative: Text for those who cannot see it.
        caption: HTML below it.
    """
    label = f'<svg role="img" aria-label="{escape(alternative)}" '
    return (
        f"<figure><h3>{escape(title)}</h3>{svg.replace('<svg ', label, 1)}"
        f"<figcaption>{caption}</figcaption></figure>"
    )


def left_out(title: str, why: str) -> str:
    """Returns a sentence in the place of a picture that would say nothing."""
    return (
        f"<figure><h3>{escape(title)}</h3>"
        f"<figcaption>Left out: {escape(why)}.</figcaption></figure>"
    )


def folded(title: str, content: str) -> str:
    """Returns HTML that only some want to see, folded below its title."""
    return f"<details><summary>{escape(title)}</summary>{content}</details>"


def variables(colours: Mapping[str, tuple[str, str]]) -> str:
    """Returns CSS variables by name, with their values on a light page and on a dark one."""
    light, dark = (
        ";".join(f"--{name}:{pair[which]}" for name, pair in colours.items()) for which in (0, 1)
    )
    return f":root{{{light}}}\n@media(prefers-color-scheme:dark){{:root{{{dark}}}}}"


def document(title: str, body: str, colours: Mapping[str, tuple[str, str]]) -> bytes:
    """Returns a whole page, as bytes of UTF-8.

    Args:
        title: Text of the title.
        body: HTML of the body.
        colours: Colours by name; see `variables`.
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
