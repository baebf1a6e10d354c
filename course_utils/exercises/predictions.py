"""A learner's guess beside what forecast and instruments say; the answer stays folded until then.

Folded is HTML's `<details>`: it opens by a click or by keyboard in Colab, JupyterLab and on GitHub,
and the numbers in it are part of the notebook's output, so that a comparison of outputs holds them.
Where only text is shown, the answer is not. Not offered: a lock that keeps a curious reader out.
"""

from __future__ import annotations

import contextlib
import html
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from course_utils.exercises.answers import items, number
from fitcast.units import show_bytes

OPEN = "Write your guess in place of the `...` above, then run both cells."


class Folded:
    """What a prediction is compared with, before there is one: a line of text, the rest folded.

    Args:
        text: The lines to fold.
        also: What follows them: text, or anything with `as_html`, as figures have.
        said: What stands unfolded above.
    """

    def __init__(self, text: str, also: Sequence[Any] = (), said: str = OPEN) -> None:
        self.text, self.also, self.said = text, also, said

    def _repr_html_(self) -> str:
        parts = [self.text, *self.also]
        inside = "\n".join(
            part.as_html() if hasattr(part, "as_html") else f"<pre>{html.escape(str(part))}</pre>"
            for part in parts
        )
        said = html.escape(self.said).replace("`...`", "<code>...</code>")
        return (
            f"<p>{said}</p>\n"
            f"<details><summary>The answer, without a guess</summary>\n{inside}\n</details>"
        )

    def __repr__(self) -> str:
        return self.said


def show_prediction(
    predicted: object,
    *,
    show: Callable[[Any], str] = show_bytes,
    also: object = (),
    **values: float | set[str] | None,
) -> None:
    """Show a prediction above what forecast and instruments say, one a line.

    Args:
        predicted: The learner's; while it is `...` all the rest is folded.
        show: How to write a number; bytes by default, e.g. `"{:.1f} times".format`.
        also: What gives the answer away as well, a figure or a text or a list of these: it follows
            the numbers, and is folded with them.
        values: Name to number, or to the set of the names that are asked for; `None` is a quantity
            that nobody measured here.
    """
    more = list(also) if isinstance(also, (list, tuple)) else [also]
    rows = {name: _value(value, show) for name, value in values.items()}
    if predicted is ... or predicted is None:
        _display(Folded(_table(rows), more))
        return
    print(_table({"predicted": _guess(predicted, show, values)} | rows))
    for one in more:
        print(one) if isinstance(one, str) else _display(one)


def printed(function: Callable[..., object], *args: Any, **kwargs: Any) -> str:
    """What a function prints, as a text that can be folded.

    Example:
        >>> printed(print, "peak", 3)
        'peak 3'
    """
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        function(*args, **kwargs)
    return text.getvalue().rstrip("\n")


def _table(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(f"{name.replace('_', ' '):{width}}  {text}" for name, text in rows.items())


def _display(shown: object) -> None:
    from IPython.display import display  # where there is no notebook, it prints

    display(shown)


def _value(value: float | set[str] | None, show: Callable[[Any], str]) -> str:
    if isinstance(value, set):
        return "; ".join(sorted(value)) or "none"
    return show_bytes(None) if value is None else show(value)


def _guess(predicted: object, show: Callable[[Any], str], values: Mapping[str, Any]) -> str:
    """A guess as it is shown: names as values are, a number with what stands beside it."""
    if any(isinstance(value, set) for value in values.values()):
        one = {predicted} if isinstance(predicted, str) else predicted
        names = one if isinstance(one, (set, frozenset)) else items(one)
        return (
            f"{predicted!r}, which names none"
            if names is None
            else _value(set(map(str, names)), show)
        )
    found = number(predicted)
    if found is None:
        return f"{predicted!r}, which is not a number"
    return show(found) + _beside(found, show, values)


def _beside(found: float, show: Callable[[Any], str], values: Mapping[str, float | None]) -> str:
    """What stands beside a predicted number: its ratio to the first value that is known, if any."""
    known = next(((name, value) for name, value in values.items() if value), None)
    if "**" in show(found) or found <= 0 or known is None:  # a ratio of exponents says nothing
        return ""
    if found >= 2 and show(0.5).startswith("50") and show(0.5).endswith("%"):
        return f" (a share from 0 to 1 is asked for: {show(found / 100)} is {found / 100:g})"
    name, value = known
    return f" ({found / value:.2f} times the {name.replace('_', ' ')})"
