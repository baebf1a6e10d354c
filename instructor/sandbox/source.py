"""From a notebook's bytes to the code of each exercise: found by name, with what it needs.

Nothing is run here, yet parsing a hostile file can cost memory or crash the parser, so the grader
lets a limited child do it (`child`). Needs the standard library only. Every cell is parsed on its
own: one that does not parse costs only itself.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import json
import re
import symtable
from collections.abc import Sequence
from dataclasses import dataclass

PLACEHOLDER = "..."  # the student id of a notebook that nobody has filled in
MAGIC = re.compile(r"^(\s*)(?:[%!?].*|[\w.]+\?{1,2}\s*|[\w, ]+=\s*[%!].*)$")
CELL_MAGIC = re.compile(r"^\s*%%(\w+)")
TRANSPARENT = {"time", "timeit", "capture"}  # cell magics below which stands Python


class Unreadable(ValueError):
    """A notebook that cannot be graded, and the sentence that says why."""


@dataclass(frozen=True)
class Statement:
    """One top-level statement of a notebook, the names it binds and those it needs."""

    cell: int
    text: str  # with empty lines in front, so that line numbers are the cell's
    node: ast.stmt
    binds: frozenset[str]
    needs: frozenset[str]


def code_cells(data: bytes) -> list[str]:
    """The source of each code cell.

    Raises:
        Unreadable: It is no notebook.
    """
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise Unreadable("it is saved as UTF-16; save the notebook as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Unreadable("it is not UTF-8 text; download it again as .ipynb") from None
    try:
        notebook = json.loads(text)
    except (ValueError, RecursionError, MemoryError):
        raise Unreadable(
            "it is not JSON, as every notebook is; download it again as .ipynb"
        ) from None
    cells = notebook.get("cells") if isinstance(notebook, dict) else None
    if not isinstance(cells, list):
        raise Unreadable("it has no list of cells; open it in Jupyter or Colab, save it again")
    found = []
    for cell in cells:
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if isinstance(source, str):
            found.append(source)
    return found


def parse_cell(number: int, text: str) -> list[Statement]:
    """A cell's statements, without notebook magics.

    Raises:
        SyntaxError: It is not Python.
    """
    try:
        tree = _parse(text)
    except SyntaxError:
        magic = CELL_MAGIC.match(text)
        if magic and magic[1] not in TRANSPARENT:
            return []
        text = "\n".join(MAGIC.sub(r"\1pass", line) for line in text.split("\n"))
        tree = _parse(text)
    lines = text.split("\n")
    return [_statement(number, node, text, lines) for node in tree.body]


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (RecursionError, MemoryError, ValueError) as error:  # a null byte, a deep nest
        raise SyntaxError(f"cannot be parsed ({type(error).__name__})") from None


def _statement(cell: int, node: ast.stmt, text: str, lines: Sequence[str]) -> Statement:
    decorators = getattr(node, "decorator_list", [])
    if decorators:
        start = min(decorator.lineno for decorator in decorators)
        segment = "\n".join(lines[start - 1 : node.end_lineno])
    else:
        start, segment = node.lineno, ast.get_source_segment(text, node) or ""
    table = symtable.symtable(ast.unparse(_without_annotations(node)), "cell", "exec")
    top = table.get_symbols()
    binds = {s.get_name() for s in top if s.is_assigned() or s.is_imported()}
    needs = {s.get_name() for s in top if s.is_referenced()}
    waiting = list(table.get_children())
    while waiting:
        inner = waiting.pop()
        waiting += inner.get_children()
        needs |= {s.get_name() for s in inner.get_symbols() if s.is_global() and s.is_referenced()}
        binds |= {
            s.get_name()
            for s in inner.get_symbols()
            if s.is_declared_global() and s.is_assigned() and not _defines(node)
        }
    return Statement(cell, "\n" * (start - 1) + segment, node, frozenset(binds), frozenset(needs))


def _defines(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _without_annotations(node: ast.stmt) -> ast.stmt:
    """A copy without functions' annotations: they are never evaluated, so they need nothing."""
    copy = ast.parse(ast.unparse(node)).body[0]
    for part in ast.walk(copy):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            part.returns = None
        elif isinstance(part, ast.arg):
            part.annotation = None
    return copy


def needed(function: str, statements: Sequence[Statement]) -> list[Statement]:
    """What has to run, in the notebook's order, before the function can be called."""
    by_name: dict[str, list[int]] = {}
    stars = []
    for index, statement in enumerate(statements):
        for name in statement.binds:
            by_name.setdefault(name, []).append(index)
        if isinstance(statement.node, ast.ImportFrom) and statement.node.names[0].name == "*":
            stars.append(index)
    taken: set[int] = set()
    known, waiting = {function}, [function]
    while waiting:
        name = waiting.pop()
        # Only a name that nothing binds and Python does not know can come from a star import.
        unbound = (
            name not in by_name
            and name not in dir(__builtins__)
            and name not in (__builtins__ if isinstance(__builtins__, dict) else ())
        )
        for index in stars if unbound else by_name.get(name, []):
            taken.add(index)
            fresh = statements[index].needs - known
            known |= fresh
            waiting += sorted(fresh)
    return [statements[index] for index in sorted(taken)]


def shape(node: ast.stmt) -> tuple[str, int]:
    """What a function does, whatever its names, comments and layout; and how many parts it has.

    Two students' functions of one shape differ at most in names, comments, docstring, layout.
    """
    copy = _without_annotations(node)
    for part in ast.walk(copy):
        body = getattr(part, "body", None)
        if (
            _defines(part)
            and isinstance(body[0], ast.Expr)
            and isinstance(getattr(body[0].value, "value", None), str)
        ):
            part.body = body[1:] or [ast.Pass()]
    names: dict[str, str] = {}
    own = {part.arg for part in ast.walk(copy) if isinstance(part, ast.arg)}
    own |= {
        part.id
        for part in ast.walk(copy)
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)
    }
    count = 0
    for part in ast.walk(copy):
        count += not isinstance(part, ast.expr_context)
        for field in ("id", "arg"):
            name = getattr(part, field, None)
            if name in own and not isinstance(part, ast.keyword):
                setattr(part, field, names.setdefault(name, f"v{len(names)}"))
    return hashlib.sha256(ast.dump(copy).encode()).hexdigest()[:24], count


def read(data: bytes, functions: Sequence[str]) -> dict:
    """What the grader has to know of a notebook, as JSON values.

    Args:
        data: The file.
        functions: Names of the exercises.

    Returns:
        `student_id` (None if not filled in) and `functions`: by name a dictionary with `source`,
        a list of `[cell, text]`, `shape`, `parts`, `letter`, `definitions`, and `notes`; or with
        the `problem` that there is no such function.
    """
    statements: list[Statement] = []
    broken: list[tuple[int, str, SyntaxError]] = []
    for number, text in enumerate(code_cells(data), start=1):
        try:
            statements += parse_cell(number, text)
        except SyntaxError as error:
            broken.append((number, text, error))
    student_id = None
    for statement in statements:
        value = getattr(statement.node, "value", None)
        if (
            "STUDENT_ID" in statement.binds
            and isinstance(value, ast.Constant)
            and value.value != PLACEHOLDER
            and isinstance(value.value, str | int)
        ):
            student_id = str(value.value).strip() or None
    return {
        "student_id": student_id,
        "functions": {name: _function(name, statements, broken) for name in functions},
    }


def _function(
    name: str, statements: Sequence[Statement], broken: Sequence[tuple[int, str, SyntaxError]]
) -> dict:
    own = [s for s in statements if name in s.binds]
    unread = [
        (cell, error)
        for cell, text, error in broken
        if re.search(rf"^(async\s+)?def\s+{name}\b", text, re.M)
    ]
    if not own:
        return {"problem": _why_missing(name, statements, unread)}
    notes = [
        f"a cell with `{name}` (code cell {cell}) does not parse, an earlier one was graded"
        for cell, _ in unread
    ]
    texts = {s.text.strip() for s in own}
    if len(own) > 1:
        notes.append(
            f"`{name}` is defined {len(own)} times, "
            + ("each time the same" if len(texts) == 1 else "the last one was graded")
        )
    form, parts = shape(own[-1].node)
    letter = hashlib.sha256(own[-1].text.strip().encode("utf-8", "replace")).hexdigest()[:24]
    return {
        "source": [[s.cell, s.text] for s in needed(name, statements)],
        "shape": form,
        "parts": parts,
        "letter": letter,
        "definitions": len(own),
        "notes": notes,
    }


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
    others = [getattr(s.node, "name", "") for s in statements if _defines(s.node)]
    close = difflib.get_close_matches(name, others, n=1, cutoff=0.75)
    hint = f"; there is `{close[0]}`, was it renamed?" if close else "; was its cell deleted?"
    return f"there is no function `{name}`{hint}"
