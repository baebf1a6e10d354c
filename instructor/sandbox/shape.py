"""What a function does, whatever its names, comments and layout: to tell copies."""

from __future__ import annotations

import ast
import hashlib

from .source import defines, without_annotations


def shape(node: ast.stmt) -> tuple[str, int]:
    """A key that two functions share if they do the same in the same order; and how many parts.

    Two students' functions of one shape differ at most in names, comments, layout and statements
    that do nothing. One that is nested too deep to be looked at has the empty key and no part.
    """
    try:
        copy = without_annotations(node)
        for part in ast.walk(copy):
            _drop_idle(part)
        count = _rename(copy)
        text = ast.dump(copy)
    except (RecursionError, MemoryError):
        return "", 0
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:24], count


def _drop_idle(node: ast.AST) -> None:
    """Drop the statements that do nothing: docstrings and other texts, `pass`, bare numbers."""
    for field in ("body", "orelse", "finalbody"):
        block = getattr(node, field, None)
        if isinstance(block, list):
            kept = [one for one in block if not _idle(one)]
            setattr(node, field, kept or ([ast.Pass()] if field == "body" else []))


def _idle(node: ast.AST) -> bool:
    return isinstance(node, ast.Pass) or (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    )


def _rename(node: ast.stmt) -> int:
    """Call its own names v0, v1, ... in the order in which they come; returns how many parts."""
    parts = list(ast.walk(node))
    own = {part.arg for part in parts if isinstance(part, ast.arg)}
    own |= {p.id for p in parts if isinstance(p, ast.Name) and isinstance(p.ctx, ast.Store)}
    own |= {part.name for part in parts[1:] if defines(part)}  # not the exercise's own
    names: dict[str, str] = {}
    for part in parts:
        for field in ("id", "arg", "name"):
            name = getattr(part, field, None)
            if name in own and part is not node and not isinstance(part, ast.keyword):
                setattr(part, field, names.setdefault(name, f"v{len(names)}"))
    return sum(not isinstance(part, ast.expr_context) for part in parts)
