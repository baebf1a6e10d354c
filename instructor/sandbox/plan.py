"""What of a notebook runs before a student's function is called: what the grader is told of it.

A function is graded as a kernel would find it that runs the notebook from top to bottom: with the
names as they are where the function's own check stands (`Notebook.checks`). A scratch cell further
down that binds `sum` anew changes nothing; nor does one that would stop the kernel.

Where students do not keep to that order, the grader is more patient than a kernel: of names that
nothing above the check binds, it takes what binds them below.
"""

from __future__ import annotations

import ast
import builtins
import difflib
import hashlib
import json
import re
from collections.abc import Mapping, Sequence

from .shape import shape
from .source import Notebook, Statement, defines, parse

PLACEHOLDER = "..."  # the student id of a notebook that nobody has filled in
DYNAMIC = {"exec", "globals", "locals", "vars", "setattr"}
LONGEST_ID, MOST_NAMES = 200, 100  # characters, names of functions


def read(data: bytes, functions: Sequence[str]) -> dict:
    """What the grader has to know of a notebook, as JSON values.

    Args:
        data: The file.
        functions: Names of the exercises.

    Returns:
        `student_id` (None if not filled in); `python`, that of the kernel (empty if unknown);
        `public`, the `digest` of the public numbers that it was built with (empty without any);
        `defines`, names of functions;
        `statements`, a list of `[cell, text]`; and `functions`: by name a dictionary with `plans`
        (each says how many statements a kernel has run, and the numbers of those that the function
        cannot do without), `shape`, `parts`, `definitions`, `broken` (whether a cell with it does
        not parse) and `notes`; or with the `problem` that there is no such function.

    Raises:
        Unreadable: It is no notebook.
    """
    notebook = parse(data)
    return {
        "student_id": _student_id(notebook.statements),
        "python": notebook.python,
        "public": _public(notebook.statements),
        "defines": _defines(notebook.statements),
        "statements": [[s.cell, s.text] for s in notebook.statements],
        "functions": {name: _function(name, notebook) for name in functions},
    }


def digest(public: Mapping[str, Sequence[Sequence]]) -> str:
    """Of public numbers: by function, the arguments of each case."""
    return hashlib.sha256(json.dumps(public, sort_keys=True).encode()).hexdigest()[:24]


def _public(statements: Sequence[Statement]) -> str:
    for statement in statements:
        text = getattr(getattr(statement.node, "value", None), "value", None)
        if "PUBLIC" in statement.binds and isinstance(text, str):
            try:
                return digest(
                    {
                        name: [case["arguments"] for case in exercise["cases"]]
                        for name, exercise in json.loads(text).items()
                    }
                )
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                return ""
    return ""


def _defines(statements: Sequence[Statement]) -> list[str]:
    found = {s.node.name[:LONGEST_ID] for s in statements if isinstance(s.node, ast.FunctionDef)}
    return sorted(found)[:MOST_NAMES]


def _student_id(statements: Sequence[Statement]) -> str | None:
    found = None
    for statement in statements:
        value = getattr(statement.node, "value", None)
        if (
            "STUDENT_ID" in statement.binds
            and isinstance(value, ast.Constant)
            and value.value != PLACEHOLDER
            and isinstance(value.value, str | int)
        ):
            try:
                found = str(value.value).strip()[:LONGEST_ID] or None
            except ValueError:  # an integer of thousands of digits
                found = None
    return found


def _function(name: str, notebook: Notebook) -> dict:
    statements = notebook.statements
    own = [index for index, s in enumerate(statements) if name in s.binds]
    own = own or _by_text(name, statements)
    unread = [
        (cell, error)
        for cell, text, error in notebook.broken
        if re.search(rf"^(async\s+)?def\s+{name}\b", text, re.M)
    ]
    if not own:
        return {"problem": _why_missing(name, statements, unread), "broken": bool(unread)}
    cut = _cut(name, own, notebook)
    seen = [index for index in own if index < cut]
    form, parts = shape(statements[seen[-1]].node)
    cuts = [cut]
    if own[-1] >= cut:
        cuts.append(_end_of_cell(own[-1], statements))
    return {
        "plans": [[cut, needed(name, statements, cut)] for cut in cuts],
        "shape": form,
        "parts": parts,
        "definitions": len(own),
        "broken": bool(unread),
        "notes": _notes(name, own, seen, statements, unread),
    }


def _by_text(name: str, statements: Sequence[Statement]) -> list[int]:
    """What may define it without a binding to be seen: `exec(...)`, `globals()[name] = ...`."""
    if not any(DYNAMIC & s.needs for s in statements if "PUBLIC" not in s.binds):
        return []
    return [
        index
        for index, s in enumerate(statements)
        if "PUBLIC" not in s.binds
        and any(
            isinstance(part, ast.Constant) and isinstance(part.value, str) and name in part.value
            for part in ast.walk(s.node)
        )
    ]


def _cut(name: str, own: Sequence[int], notebook: Notebook) -> int:
    """How many statements stand above the last check that sees a definition of the function.

    Without such a check, above the end of the cell with the last definition.
    """
    checks = [at for checked, at in notebook.checks if checked == name and at > own[0]]
    return max(checks, default=_end_of_cell(own[-1], notebook.statements))


def _end_of_cell(index: int, statements: Sequence[Statement]) -> int:
    cell = statements[index].cell
    return max(i for i, s in enumerate(statements) if s.cell == cell) + 1


def _binders(statements: Sequence[Statement], cut: int) -> dict[str, list[int]]:
    """Name to the statements that bind it: those above the cut, or below it if there are none."""
    above: dict[str, list[int]] = {}
    below: dict[str, list[int]] = {}
    for index, statement in enumerate(statements):
        for name in statement.binds:
            (above if index < cut else below).setdefault(name, []).append(index)
    unknown = {name: found for name, found in below.items() if not hasattr(builtins, name)}
    return unknown | above


def needed(function: str, statements: Sequence[Statement], cut: int) -> list[int]:
    """What a function cannot do without: what binds it, and what binds the names that takes.

    Args:
        function: Its name.
        statements: The notebook's.
        cut: How many of them a kernel has run when it comes to the function's check. What stands
            below is taken for a name only if nothing above binds it, nor Python itself.
    """
    by_name = _binders(statements, cut)
    stars = [
        index
        for index, s in enumerate(statements)
        if isinstance(s.node, ast.ImportFrom) and s.node.names[0].name == "*"
    ]
    taken: set[int] = set()
    known, waiting = {function}, [function]
    while waiting:
        name = waiting.pop()
        # Only a name that nothing binds and Python does not know can come from a star import.
        unbound = name not in by_name and not hasattr(builtins, name)
        for index in stars if unbound else by_name.get(name, []):
            taken.add(index)
            fresh = statements[index].needs - known
            known |= fresh
            waiting += sorted(fresh)
    return sorted(taken)


def _notes(
    name: str,
    own: Sequence[int],
    seen: Sequence[int],
    statements: Sequence[Statement],
    unread: Sequence[tuple[int, SyntaxError]],
) -> list[str]:
    """What the instructor and the student should know of which definition was graded."""
    notes = [
        f"a cell with `{name}` (code cell {cell}) does not parse, an earlier one was graded"
        for cell, _ in unread[:1]
    ]
    if len(own) == 1:
        return notes
    if len({statements[index].text.strip() for index in own}) == 1:
        which = "each time the same"
    elif len(seen) == len(own):
        which = "the last one was graded"
    else:
        which = "the one that its check sees was graded"
    return [*notes, f"`{name}` is defined {len(own)} times, {which}"]


def _why_missing(
    name: str, statements: Sequence[Statement], unread: Sequence[tuple[int, SyntaxError]]
) -> str:
    if unread:
        cell, error = unread[-1]
        where = f" in its line {error.lineno}" if error.lineno else ""
        return f"the cell with `{name}` (code cell {cell}) does not parse: {error.msg}{where}"
    inner = any(
        isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef) and part.name == name
        for s in statements
        for part in ast.walk(s.node)
    )
    if inner:
        return f"`{name}` stands inside something else; move it to the left margin"
    others = [getattr(s.node, "name", "") for s in statements if defines(s.node)]
    close = difflib.get_close_matches(name, others[:1000], n=1, cutoff=0.75)
    hint = f"; there is `{close[0]}`, was it renamed?" if close else "; was its cell deleted?"
    return f"there is no function `{name}`{hint}"
