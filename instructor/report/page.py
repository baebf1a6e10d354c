"""What the feedback pages and the class report share: one self-contained page, light and dark."""

from __future__ import annotations

import re
from html import escape as _escape

STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --paper: #fff; --panel: #f6f8fa; --line: #d0d7de;
  --good: #116329; --bad: #a33c00; --bar: #0550ae; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9da7b1; --paper: #0d1117;
  --panel: #161b22; --line: #3d444d; --good: #57ab5a; --bad: #f0883e; --bar: #79c0ff; } }
body { margin: 0 auto; padding: 1.5rem 1.25rem 4rem; max-width: 52rem; background: var(--paper);
  color: var(--ink); font: 17px/1.6 system-ui, sans-serif; }
h1, h2, h3 { line-height: 1.25; } h2 { margin-top: 2.5rem; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  background: var(--panel); padding: .1em .3em; border-radius: 4px; overflow-wrap: anywhere; }
code.name, .tight { white-space: nowrap; }
table { border-collapse: collapse; width: 100%; }
caption { text-align: left; color: var(--soft); padding-bottom: .3rem; }
th, td { text-align: left; vertical-align: top; padding: .4rem .8rem .4rem 0;
  border-bottom: 1px solid var(--line); overflow-wrap: break-word; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } .soft { color: var(--soft); }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.note { background: var(--panel); border-left: 4px solid var(--bad); padding: .6rem 1rem; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 13px system-ui; }
svg rect { fill: var(--bar); } svg line { stroke: var(--line); }
li { margin: .35rem 0; }
@media print { body { max-width: none; font-size: 11pt; } }
"""


def escape(text: object) -> str:
    """Text for a page, whatever a student wrote; lone surrogates as question marks."""
    return _escape(str(text).encode("utf-8", "replace").decode())


def code(text: object, kind: str = "") -> str:
    """Text as code; of the kind `name` it stays in one line."""
    return f"<code class='{kind}'>{escape(text)}</code>" if kind else f"<code>{escape(text)}</code>"


def sentence(text: str) -> str:
    """A sentence in which `backticks` mark code and *stars* emphasis, where they come in pairs."""
    parts = escape(text).split("`")
    if len(parts) % 2 == 0:  # one is left over
        return escape(text)
    return "".join(
        f"<code>{part}</code>"
        if index % 2
        else re.sub(r"(?<![\w*])\*(\w[^*`]*?)\*(?![\w*])", r"<em>\1</em>", part)
        for index, part in enumerate(parts)
    )


def page(title: str, body: str) -> str:
    """A whole page. Nothing in it is loaded from elsewhere, and no script may run."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"{body}\n</main>\n</body>\n</html>\n"
    )
