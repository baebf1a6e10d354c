"""What the pages share: Jinja templates that escape everything, so no student's text is HTML.

A page is self-contained, light and dark. Its texts may mark code with `backticks` and emphasis with
*stars* where they come in pairs (`sentence`); nothing else in a text means anything.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape


def _encodable(value: Any) -> Any:
    """A text without lone surrogates, which no file can hold; anything else as it is."""
    if isinstance(value, str) and not isinstance(value, Markup):
        return value.encode("utf-8", "replace").decode()
    return value


def code(text: object, kind: str = "") -> Markup:
    """Text as code; of the kind `name` it stays in one line."""
    start = Markup("<code class='{}'>").format(kind) if kind else Markup("<code>")
    return start + escape(_encodable(text)) + Markup("</code>")


def sentence(text: str) -> Markup:
    """A sentence in which `backticks` mark code and *stars* emphasis, where they come in pairs."""
    parts = str(escape(_encodable(text))).split("`")
    if len(parts) % 2 == 0:  # one is left over
        return escape(_encodable(text))
    marked = [
        f"<code>{part}</code>"
        if index % 2
        else re.sub(r"(?<![\w*])\*(\w[^*`]*?)\*(?![\w*])", r"<em>\1</em>", part)
        for index, part in enumerate(parts)
    ]
    return Markup("".join(marked))


TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=True,
    finalize=_encodable,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters["sentence"] = sentence


def page(template: str, **values: Any) -> str:
    """A whole page.

    Args:
        template: Name of a file in `templates/`, without its endings.
        values: What it shows. A text is escaped, unless `code` or `sentence` made it HTML.
    """
    return TEMPLATES.get_template(f"{template}.html.j2").render(**values)
