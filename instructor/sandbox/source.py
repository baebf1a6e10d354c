"""From a notebook's bytes to its statements, as a kernel would run them from top to bottom.

Nothing is run here, yet parsing a hostile file can cost memory or crash the parser, so the grader
lets a limited child do it (`child`). Needs the standard library only, and IPython's transformer of
magics where there is one. Every cell is parsed on its own: one that does not parse costs only
itself.
"""

from __future__ import annotations

import ast
import json
import re
import symtable
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

# What IPython makes of `%magic`, `!command` and `help?`; the fork server puts its transformer here.
TRANSFORM: list[Callable[[str], str]] = []
CELL_MAGIC = re.compile(r"^\s*%%(\w+)[^\n]*")
TRANSPARENT = {"time", "timeit", "capture", "prun"}  # cell magics below which stands Python
# IPython runs these without a `%` or `!` where they are a cell of their own; some mix them in.
COMMANDS = "pip3?|conda|mamba|uv|apt|apt-get|git|cd|ls|pwd|cat|mkdir"
COMMAND = re.compile(rf"^({COMMANDS}) +[^=(\s].*$", re.M)


MOST_BROKEN = 1_000  # cells, behind which magics are not looked for: thousands take seconds


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


@dataclass
class Notebook:
    """What a notebook's code cells hold.

    Args:
        statements: From top to bottom, without the assignment's own checks.
        checks: Each check of the assignment: a function's name, and how many statements stand
            above it.
        broken: Cells that do not parse: number, text, error.
        python: The Python that it was saved with, e.g. "3.12"; empty if it does not say.
    """

    statements: list[Statement] = field(default_factory=list)
    checks: list[tuple[str, int]] = field(default_factory=list)
    broken: list[tuple[int, str, SyntaxError]] = field(default_factory=list)
    python: str = ""


def parse(data: bytes) -> Notebook:
    """The statements of a notebook.

    Raises:
        Unreadable: It is no notebook.
    """
    document = _json(data)
    found = Notebook(python=_python(document))
    for number, text in enumerate(_code_cells(document), start=1):
        try:
            statements = parse_cell(number, text, magics=len(found.broken) < MOST_BROKEN)
        except SyntaxError as error:
            found.broken.append((number, text, error))
            continue
        for statement in statements:
            if name := _checked(statement.node):
                found.checks.append((name, len(found.statements)))
            else:
                found.statements.append(statement)
    return found


def _checked(node: ast.stmt) -> str:
    """The function that a statement checks, if it is one of the assignment's own checks.

    Those are `check("name", PUBLIC, globals())`, in `build.notebooks`.
    """
    call = node.value if isinstance(node, ast.Expr) else None
    if not isinstance(call, ast.Call) or len(call.args) != 3:
        return ""
    name, public = call.args[:2]
    ours = getattr(call.func, "id", "") == "check" and getattr(public, "id", "") == "PUBLIC"
    return name.value if ours and isinstance(getattr(name, "value", None), str) else ""


def _json(data: bytes) -> dict:
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
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise Unreadable("it has no list of cells; open it in Jupyter or Colab, save it again")
    return notebook


def _python(notebook: dict) -> str:
    """The Python of the kernel that saved it, as Jupyter notes it: "3.12"; empty if it does not."""
    about = notebook
    for name in ("metadata", "language_info", "version"):
        about = about.get(name) if isinstance(about, dict) else None
    match = re.match(r"(\d\.\d{1,2})(\.|$)", about) if isinstance(about, str) else None
    return match[1] if match else ""


def _code_cells(notebook: dict) -> Iterator[str]:
    """The source of each code cell, line ends as Python has them."""
    for cell in notebook["cells"]:
        if not isinstance(cell, dict) or cell.get("cell_type") != "code":
            continue
        source = cell.get("source", "")
        if isinstance(source, list) and all(isinstance(line, str) for line in source):
            source = "".join(source)
        if isinstance(source, str):
            yield source.replace("\r\n", "\n").replace("\r", "\n")


def parse_cell(number: int, text: str, magics: bool = True) -> list[Statement]:
    """A cell's statements; magics are calls of IPython's, as in a kernel, if they are looked for.

    Raises:
        SyntaxError: It is not Python.
    """
    if magic := CELL_MAGIC.match(text):
        if magic[1] not in TRANSPARENT:
            return []
        text = re.sub(r"\S[^\n]*", "", magic[0]) + text[magic.end() :]
    try:
        tree = _parse(text)
    except SyntaxError as error:
        if not magics:
            raise
        text, tree = _transformed(text, error)
    lines = text.split("\n")
    return [_statement(number, node, lines) for node in tree.body]


def _transformed(text: str, error: SyntaxError) -> tuple[str, ast.Module]:
    """The cell as IPython reads it; without bare commands, if that is still no Python."""
    for transform in [*TRANSFORM, _without_commands]:
        text = transform(text)
        try:
            return text, _parse(text)
        except SyntaxError:
            continue
    raise error


def _without_commands(text: str) -> str:
    return COMMAND.sub("pass", text)


def _parse(text: str) -> ast.Module:
    try:
        return ast.parse(text)
    except (RecursionError, MemoryError, ValueError) as error:  # a null byte, a deep nest
        raise SyntaxError(f"cannot be parsed ({type(error).__name__})") from None


def _statement(cell: int, node: ast.stmt, lines: list[str]) -> Statement:
    starts = [node.lineno, *(one.lineno for one in getattr(node, "decorator_list", []))]
    start, end = min(starts), node.end_lineno or node.lineno
    part = lines[start - 1 : end]
    # Several statements may share a line; columns count UTF-8's bytes.
    part[-1] = part[-1].encode()[: node.end_col_offset].decode()
    if len(starts) == 1:
        part[0] = part[0].encode()[node.col_offset :].decode()
    text = "\n".join(part)
    binds, needs = _names(node, text)
    return Statement(cell, "\n" * (start - 1) + text, node, binds, needs)


def _names(node: ast.stmt, text: str) -> tuple[frozenset[str], frozenset[str]]:
    """The names that a statement binds at the top level, and those that it needs from there."""
    try:
        if any(map(_annotated, ast.walk(node))):
            text = ast.unparse(without_annotations(node))
        table = symtable.symtable(text, "cell", "exec")
    except (SyntaxError, RecursionError, MemoryError, ValueError):
        return _names_anywhere(node)
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
            if s.is_declared_global() and s.is_assigned() and not defines(node)
        }
    return frozenset(binds), frozenset(needs)


def _names_anywhere(node: ast.stmt) -> tuple[frozenset[str], frozenset[str]]:
    """The same of a statement too deep for `symtable`, or of one that no compiler takes."""
    names = [part for part in ast.walk(node) if isinstance(part, ast.Name)]
    binds = {name.id for name in names if isinstance(name.ctx, ast.Store)}
    if defines(node):
        binds = {node.name}
    return frozenset(binds), frozenset({name.id for name in names} - binds)


def defines(node: ast.AST) -> bool:
    """Whether it is a function's or class's definition."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _annotated(node: ast.AST) -> bool:
    return getattr(node, "annotation", None) is not None or (
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None
    )


def without_annotations(node: ast.stmt) -> ast.stmt:
    """A copy without functions' annotations, which need nothing to be called.

    Raises:
        RecursionError: It is nested too deep.
    """
    copy = ast.parse(ast.unparse(node)).body[0]
    for part in ast.walk(copy):
        if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
            part.returns = None
        elif isinstance(part, ast.arg):
            part.annotation = None
    return copy
