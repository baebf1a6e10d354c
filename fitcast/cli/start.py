"""A process that answers one question and ends: what would only cost it time is left out."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

_alone = False


def quickly() -> None:
    """To be called before torch is imported, and by a process of its own only."""
    global _alone
    _alone = True
    gc.disable()  # what is made lives until the answer; looking for rubbish is a fifth of the time
    os.environ["OMP_NUM_THREADS"] = "1"  # nothing is computed; and a process without threads forks


def leave(code: int) -> int:
    """End this process with an exit code, if it was started `quickly`.

    Python would take every object apart that torch and transformers made: a fifth of the time.
    """
    if _alone:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def engine() -> None:
    """Import what a forecast imports; in a process of its own without the compiler's second.

    bitsandbytes wraps four functions of its CPU part in `torch.compile`, and the compiled levers
    theirs, for which all of inductor is imported. A forecast calls none of them. Source:
    bitsandbytes/backends/default/ops.py (0.49).
    """
    if _alone:
        import torch

        library: Any = torch
        library.compile = _as_it_is
        import bitsandbytes  # noqa: F401

        models_read_once()


def models_read_once() -> None:
    """Import transformers' models without their files being read once more.

    The package has read a thousand of them for what they define, and `transformers.models` would
    do so again: an eighth of a forecast's time. Source: transformers/utils/import_utils.py (5.17).
    """
    from transformers.utils import import_utils

    found = what_models_define()
    if found and MODELS not in sys.modules:
        with mock.patch.object(import_utils, "define_import_structure", lambda _: found):
            importlib.import_module(MODELS)


MODELS, PREFIX = "transformers.models", "models."


def what_models_define() -> dict[frozenset[str], dict[str, set[str]]]:
    """What a name lacks here to be imported -> its module -> names, as the package knows them.

    Empty where a version of transformers keeps it elsewhere.
    """
    import transformers

    found: dict[frozenset[str], dict[str, set[str]]] = {}
    lacking = getattr(transformers, "_object_missing_backend", {})
    for name, module in getattr(transformers, "_class_to_module", {}).items():
        if module.startswith(PREFIX):
            modules = found.setdefault(frozenset(lacking.get(name, ())), {})
            modules.setdefault(module.removeprefix(PREFIX), set()).add(name)
    return found


def _as_it_is(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return _as_it_is if function is None else function


def processes() -> int:
    """How many may weigh settings side by side, where processes fork: one a core, four at most."""
    if not _alone or sys.platform != "linux":
        return 1
    return min(4, len(os.sched_getaffinity(0)))
