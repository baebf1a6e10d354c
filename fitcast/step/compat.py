"""PEFT beside a torchao that is too old for it, as on Colab.

PEFT raises as soon as adapters go on a base that is not in 4 bits, although nothing here uses
torchao. Upgrading it would mean a restart in the middle of a lesson, so PEFT is told that there is
none. Source: peft/import_utils.py, `is_torchao_available`.
"""

from __future__ import annotations

import sys


def look_past() -> bool:
    """Whether PEFT had to be told to look past the installed torchao."""
    import peft.tuners.lora.torchao  # noqa: F401  (one of those that ask)
    from peft import import_utils

    try:
        import_utils.is_torchao_available()
    except ImportError:
        for name, module in list(sys.modules.items()):
            if name.startswith("peft.") and hasattr(module, "is_torchao_available"):
                vars(module)["is_torchao_available"] = lambda: False
        return True
    return False
