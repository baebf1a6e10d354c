"""What a library raises, as one sentence: which field of the script, and what to change.

A forecast runs other people's code, so it meets other people's errors. Some are the run's own (a
real GPU would raise them, too); others say that a step cannot be run without numbers.
"""

from __future__ import annotations

import difflib
import inspect
import re
import traceback
from collections.abc import Iterable
from pathlib import Path

from torch._subclasses import fake_tensor

from fitcast.units import Said, refusal

NEEDS_NUMBERS = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
)
# Part of a message -> field, rule, remedy.
KNOWN: tuple[tuple[str, tuple[str, str, str]], ...] = (
    (
        "Attempting to unscale FP16 gradients",
        (
            "dtype", "not be float16 for weights that fp16=True trains",
            "load them with dtype='float32', or give a peft_config, whose adapters are float32",
        ),
    ),
    (
        "check_and_unscale_cuda\" not implemented for 'BFloat16'",
        (
            "fp16", "not scale the gradients of weights in bfloat16, which CUDA cannot",
            "TRL casts the adapters of a quantized model to bfloat16: set bf16=True on a card that "
            "has it, else, once the trainer is made, make them float32 again (p.data = "
            "p.data.float() for each p of trainer.model.parameters() that requires_grad)",
        ),
    ),
    (
        "purely quantized models",
        (
            "peft_config", "be given for weights in 4 or 8 bits: nobody can train those",
            "give a LoraConfig, or leave quantization_config out",
        ),
    ),
    (
        "out tensor with dtype torch.uint8",
        (
            "quantization_config", "leave alone the weights that the model itself writes to",
            "name them in llm_int8_skip_modules",
        ),
    ),
    (
        "specify `target_modules`",
        (
            "peft_config", "name its target_modules for this family",
            "for example target_modules='all-linear'",
        ),
    ),
    (
        "No `target_modules` passed",
        (
            "peft_config", "name its target_modules for this family",
            "for example target_modules='all-linear'",
        ),
    ),
    (
        "Target modules",
        (
            "peft_config.target_modules", "be names of layers of this model",
            "for example target_modules='all-linear'",
        ),
    ),
    (
        "does not support an attention implementation",
        (
            "attn_implementation", "be one that the model has",
            "leave it out, or take 'eager'",
        ),
    ),
    (
        "does not support activation checkpointing",
        (
            "gradient_checkpointing", "be False for this model",
            "its class cannot recompute its layers",
        ),
    ),
)  # fmt: skip


def refuse_unknown(
    given: Iterable[str], known: Iterable[str], whose: str, *, others: bool = False
) -> None:
    """Refuse a keyword that nobody takes, before a library does so in words of its own.

    Args:
        given: Keywords of a call.
        known: All that are taken.
        whose: Who takes them, for the sentence.
        others: Whether there may be more than are known: then only a slip is refused.

    Raises:
        ValueError: A keyword is unknown; the nearest one is named.
    """
    known = set(known)
    for name in given:
        close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
        if name in known or (others and not close):
            continue
        remedy = f"did you mean {close[0]}?" if close else "leave it out, or check its spelling"
        raise refusal("keyword", f"be one that {whose} takes", name, remedy)


def keywords_of(kind: type) -> tuple[set[str], bool]:
    """What the making of a class takes, with all it is built on; and whether any word goes."""
    made = [vars(one)["__init__"] for one in kind.__mro__[:-1] if "__init__" in vars(one)]
    taken = [one for init in made for one in inspect.signature(init).parameters.values()]
    return {one.name for one in taken}, any(one.kind is one.VAR_KEYWORD for one in taken)


def first_line(error: BaseException, most: int = 200) -> str:
    """The first sentence of an error's text, on one line, or the name of its kind."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if re.match(r"\w*(Error|Exception): ", line)]
    text = (causes or lines or [type(error).__name__])[0]
    text = re.split(r"(?<=[a-z0-9)`'\"])\. ", text)[0].rstrip(".")
    return text if len(text) <= most else text[: most - 3] + "..."


def explained(error: Exception, model_type: str) -> ValueError:
    """The error as one sentence that says what to change.

    Args:
        error: Whatever running the trainer raised.
        model_type: Of the model that was run.
    """
    if isinstance(error, ValueError) and _is_ours(error):
        return error
    text = str(error)
    for part, (field, rule, remedy) in KNOWN:
        if part in text:
            return refusal(field, rule, Said(f"{model_type}: {first_line(error)}"), remedy)
    where = _where(error)
    if isinstance(error, NEEDS_NUMBERS):
        return refusal(
            "model", "run without the numbers in its tensors",
            Said(f"{model_type}, which asks for some in {where}"),
            "measure it on the card with fitcast.measure_step",
        )  # fmt: skip
    ours = "if the same run works on a card, this is ours to mend: please report it"
    return refusal(
        "model", "train with these arguments",
        Said(f"{model_type}: {type(error).__name__} in {where} ({first_line(error)})"),
        f"change the argument that it names; {ours}" if _is_refusal(error) else ours,
    )  # fmt: skip


def _is_ours(error: ValueError) -> bool:
    """Whether this package raised it, which says already what to change."""
    return "fitcast" in Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts


def _is_refusal(error: Exception) -> bool:
    """Whether a trainer's library raised it by itself, as it does for a value it does not take."""
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
    libraries = {"trl", "transformers", "peft", "accelerate"}
    return isinstance(error, ValueError) and bool(libraries & set(raised_in))


def _where(error: Exception) -> str:
    """File and line of the last call that is neither PyTorch's nor ours."""
    calls = traceback.extract_tb(error.__traceback__)
    theirs = [
        call
        for call in calls
        if not {"torch", "fitcast", "_dispatch"} & set(Path(call.filename).parts)
    ]
    call = (theirs or calls)[-1]
    parts = Path(call.filename).parts
    start = parts.index("site-packages") + 1 if "site-packages" in parts else len(parts) - 1
    return f"{'/'.join(parts[start:])}:{call.lineno}"
