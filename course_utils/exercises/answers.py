"""A learner's answer as it was meant: numbers, lists, what equals what, what is still `...`.

Numbers and lists may come from NumPy or torch. What is still to be done is read in the source of
the answer. Not modelled: code without source (typed into `exec`), whose blanks nobody can count.
"""

from __future__ import annotations

import ast
import inspect
import math
import numbers
import textwrap
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

ROUNDING = 1e-12  # relative: some thousand roundings of Python's own floats
SHORT = 8  # items of a list that a sentence can hold


def number(answer: object) -> int | float | None:
    """An answer as Python's own number; `None` when it is no finite one (a bool is none).

    Args:
        answer: An int, a float, a fraction, a scalar of NumPy, or an array or tensor of no
            dimension.

    Example:
        >>> number(torch.tensor(3)), number(np.float64(0.5)), number(True), number("3")
        (3, 0.5, None, None)
    """
    plain = _plain(answer)
    if isinstance(plain, bool) or not isinstance(plain, numbers.Real):
        return None
    try:
        if not math.isfinite(plain):
            return None
    except OverflowError:  # a whole number with more than 308 digits
        return None
    return int(plain) if isinstance(plain, numbers.Integral) else float(plain)


def whole(answer: object, least: int, most: float = math.inf) -> int | None:
    """An answer as a whole number within bounds, also when it is written, or came out, as a float.

    Example:
        >>> whole(3.0, 1), whole(0.1 * 3 * 10, 1), whole(3.5, 1), whole(0, 1)
        (3, 3, None, None)
    """
    found = number(answer)
    if found is None or not equal(found, round(found)) or not least <= round(found) <= most:
        return None
    return round(found)


def items(answer: object) -> list[Any] | None:
    """What a list, tuple, range, array or tensor holds, in order; `None` for anything else."""
    if isinstance(answer, (np.ndarray, torch.Tensor)):
        return list(answer) if answer.ndim else None
    if isinstance(answer, Sequence) and not isinstance(answer, (str, bytes)):
        return list(answer)
    return None


def equal(found: object, wanted: object) -> bool:
    """Whether answers are the same: whole numbers exactly, others up to rounding, lists by item.

    Rounding is 1e-12 of the wanted number (and that itself where 0 is wanted), or the last digit of
    a dtype with less than 64 bits.

    Example:
        >>> equal(0.1 + 0.2, 0.3), equal(2**29 + 1, 2**29), equal(range(2), torch.tensor([0, 1]))
        (True, False, True)
    """
    ours, theirs = items(found), items(wanted)
    if ours is not None and theirs is not None:
        return len(ours) == len(theirs) and all(map(equal, ours, theirs))
    one, other = number(found), number(wanted)
    if one is not None and other is not None:
        if isinstance(one, int) and isinstance(other, int):
            return one == other
        slack = max(_rounding(found), _rounding(wanted))
        return math.isclose(one, other, rel_tol=slack, abs_tol=0.0 if other else slack)
    left, right = _plain(found), _plain(wanted)
    return type(left) is type(right) and bool(left == right)


def _plain(answer: Any) -> Any:
    """The Python object inside a NumPy scalar or an array or tensor of no dimension."""
    if isinstance(answer, (np.generic, np.ndarray, torch.Tensor)) and answer.ndim == 0:
        return answer.item()
    return answer


def _rounding(answer: Any) -> float:
    """The relative rounding error that a number may have, by its dtype."""
    if isinstance(answer, torch.Tensor) and answer.is_floating_point():
        return max(ROUNDING, torch.finfo(answer.dtype).eps)
    if isinstance(answer, (np.floating, np.ndarray)) and answer.dtype.kind == "f":
        return max(ROUNDING, float(np.finfo(answer.dtype).eps))
    return ROUNDING


def describe(value: object) -> str:
    """A value in a sentence: a tensor by its shape, a long list by its length."""
    if isinstance(value, tuple):
        return f"({', '.join(map(describe, value))})"
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim:
        return f"a tensor of shape {tuple(value.shape)}"
    if isinstance(value, list) and len(value) > SHORT:
        return f"a list of {len(value)}"
    return f"{_plain(value)!r}"


def difference(found: object, wanted: object) -> str:
    """Where an answer is not the wanted one: both, or the first item in which long lists differ."""
    ours, theirs = items(found), items(wanted)
    if ours is None or theirs is None or len(theirs) <= SHORT or len(ours) != len(theirs):
        return f"should give {describe(wanted)}, got {describe(found)}"
    first = next(i for i, pair in enumerate(zip(ours, theirs, strict=True)) if not equal(*pair))
    return (
        f"should give {describe(theirs[first])} at index {first} of {len(theirs)}, "
        f"got {describe(ours[first])}"
    )


def unfinished(answer: object) -> bool:
    """Whether an answer is nothing, or it or a part of it is still `...`."""
    if isinstance(answer, Mapping):
        parts = list(answer.values())
    elif isinstance(answer, (tuple, list)):
        parts = list(answer)
    else:
        parts = []
    return answer is None or any(part is ... for part in (answer, *parts))


def blanks(answer: object) -> list[str]:
    """Each `...` that an answer still has, by the line it stands in; none where no source is found.

    In an index (`x[..., 0]`) three dots are no blank.

    Args:
        answer: A function, the `apply` of an autograd function, or a dict of answers by name.
    """
    if isinstance(answer, Mapping):
        return [f"{name} = ..." for name, value in answer.items() if value is ...]
    owner = getattr(answer, "__self__", None)
    methods = vars(owner).values() if isinstance(owner, type) else (answer,)
    functions = [getattr(method, "__func__", method) for method in methods]
    return [line for one in functions if inspect.isfunction(one) for line in _dotted_lines(one)]


def is_empty(function: object) -> bool:
    """Whether a function's body does nothing: `...`, `pass`, a docstring, a bare `return`."""
    match ast.parse(_source(function)).body:
        case [ast.FunctionDef(body=body)]:
            return all(map(_does_nothing, body))
    return False


def _does_nothing(line: ast.stmt) -> bool:
    match line:
        case ast.Pass() | ast.Expr(value=ast.Constant()) | ast.Return(value=None):
            return True
    return False


def _source(function: Any) -> str:
    """A function's own source; "" when there is none, as for a lambda in the midst of a call."""
    try:
        source = textwrap.dedent(inspect.getsource(function))
        ast.parse(source)
    except (OSError, TypeError, SyntaxError, tokenize.TokenError):
        return ""
    return source


def _dotted_lines(function: Any) -> list[str]:
    """The line of each `...` in a function, without its comment."""
    source = _source(function)
    lines = source.splitlines()
    return [lines[dots.lineno - 1].split("#")[0].strip() for dots in _dots(ast.parse(source))]


def _dots(node: ast.AST) -> Iterator[ast.Constant]:
    """Each `...` below a node, in the order of the source, but for those in an index."""
    if isinstance(node, ast.Constant) and node.value is ...:
        yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(node, ast.Subscript) and child is node.slice):
            yield from _dots(child)
