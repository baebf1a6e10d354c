"""What the objects of a script have to be, before a library says so in words of its own."""

from __future__ import annotations

import difflib
from typing import Any

from fitcast.units import refusal


def attention_of(asked: str | None, config: Any) -> tuple[str | None, str | None]:
    """The attention that is run, and the FlashAttention that it stands for.

    FlashAttention has a package of its own, for CUDA; sdpa runs the same algorithm.

    Args:
        asked: As `attn_implementation`, or `None`.
        config: Of the model; may name one itself.

    Returns:
        A name of transformers or `None` for the model's own; what was asked for or `None`.

    Raises:
        ValueError: transformers knows no attention of that name.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    named = asked or getattr(config, "_attn_implementation", None)
    if isinstance(named, str) and "flash" in named:
        return "sdpa", named
    known = ["eager", *ALL_ATTENTION_FUNCTIONS.valid_keys()]
    if asked is not None and asked not in known:
        close = difflib.get_close_matches(str(asked), known, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "for example 'sdpa'"
        raise refusal("attn_implementation", "be one that transformers knows", asked, remedy)
    return asked, None
