"""The targets of lesson 04's exercises. Each is counted or run when the check runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch

from course_utils.data import BUNDLED, named
from course_utils.exercises.answers import describe, equal, number
from course_utils.exercises.checks import (
    Mistake,
    Verdict,
    call,
    check,
    judge_function,
    name_mistake,
    not_yet,
    right,
)
from course_utils.exercises.self_check import Question, SelfCheck
from course_utils.topics.precision import FORMATS, Products, products_of_4_bits
from fitcast import gpus
from fitcast.forecasting.fake import fake_model, fake_tensors
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import measurement
from fitcast.units import show_bytes

NUMBERS = (1.0, 1.25, 1.5, 2.0, 0.75, 100.0, 1024.0, 3e-3, 2e-4)
COPIED = (BUNDLED, "llama-3.2-1b", "llama-2-7b")  # two with a tied head, one without
# Up to 1536 tokens bitsandbytes may, by the card, multiply in a kernel of its own that autocast
# does not reach: on an H200 the published recipe then has no detour. More are unpacked on all.
ON_A_GPU = 1600  # tokens of a row [bitsandbytes 0.50.2, backends/cuda/ops.py]
# Formats and optimizer as in Hugging Face's 4-bit notebook (the lesson's sources), the rest usual.
PUBLISHED = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "bnb_4bit_compute_dtype": "bfloat16",
    "fp16": True,
    "bf16": False,
    "optim": "paged_adamw_8bit",
    "learning_rate": 2e-4,
    "num_train_epochs": 3,
    "logging_steps": 10,
    "save_strategy": "epoch",
}

QUESTIONS = SelfCheck(
    Question(
        "Why is float16 harder to train in than bfloat16?",
        ("its steps are coarser", "its range is shorter", "its products are slower"),
        "b",
        "A coarse step is noise that averages out; out of range is always zero or infinite.",
    ),
    Question(
        "All weights in float32, then `fp16=True`. The memory of weights and Adam's state",
        ("is halved", "falls by a quarter", "stays as it was"),
        "c",
        "Autocast casts operands of operations: these stay in float32, and copies come on top.",
    ),
    Question(
        "Two float16 weights, 4.0 and 0.1, get 1000 updates of 0.0001 each. Which one moves?",
        ("only 0.1", "only 4.0", "both", "neither"),
        "a",
        "An update moves a weight if it is above half the distance to the next number: 0.002 at "
        "4.0, 0.00003 at 0.1.",
    ),
    Question(
        "Which 16-bit format does a T4 multiply in hardware?",
        ("both", "bfloat16", "neither", "float16"),
        "d",
        "Its compute capability is 7.5; bfloat16 products came with 8.0.",
    ),
    Question(
        "On a T4, fp16=True and a 4-bit base with bnb_4bit_compute_dtype=bfloat16. In which format "
        "do forward's products with the base run?",
        ("bfloat16", "float16", "float32", "none: it is an error"),
        "b",
        "The layer casts to the compute dtype, autocast casts back: time, and three bits.",
    ),
)


@check()
def check_spacing(answer: Callable) -> Verdict:
    """Exercise 04.3: distance from a positive number to the next larger one of a format."""
    cases = [(x, dtype) for dtype in FORMATS.values() for x in NUMBERS]
    cases = [(torch.tensor(x, dtype=dtype).item(), dtype) for x, dtype in cases]

    def next_up(x: float, dtype: torch.dtype) -> float:
        here = torch.tensor(x, dtype=dtype)
        integer = torch.int32 if here.element_size() == 4 else torch.int16
        return (here.view(integer) + 1).view(dtype).item() - x  # the next pattern of bits

    def eps(dtype: torch.dtype) -> float:
        return torch.finfo(dtype).eps

    def to_power(power: Callable[[float], float]) -> Callable:
        return lambda x, dtype: 2.0 ** power(x) * eps(dtype)

    to_base_2 = "a power of two is asked for: log2 gives it, log is to base e, log10 to base 10."
    return judge_function(
        answer,
        cases,
        [next_up(*case) for case in cases],
        mistakes=[
            Mistake(
                "that is the distance at 1.0; it grows with the number.",
                to_power(lambda x: 0),
            ),
            Mistake(
                "that scales smoothly with the number; the distance is the same from one power of "
                "two to the next.",
                to_power(math.log2),
            ),
            Mistake(
                "round the power down, not to the nearest: 1.5 lies between 2**0 and 2**1.",
                to_power(lambda x: round(math.log2(x))),
            ),
            Mistake(
                "round the power down, not up: 1.25 lies between 2**0 and 2**1.",
                to_power(lambda x: math.ceil(math.log2(x))),
            ),
            Mistake(
                "int() cuts towards 0, which is up for what is below 1: 0.75 lies between 2**-1 "
                "and 2**0; math.floor() rounds down.",
                to_power(lambda x: int(math.log2(x))),
            ),
            Mistake(to_base_2, to_power(lambda x: math.floor(math.log(x)))),
            Mistake(to_base_2, to_power(lambda x: math.floor(math.log10(x)))),
            Mistake(to_base_2, to_power(math.log)),
            Mistake(to_base_2, to_power(math.log10)),
            Mistake(
                "you divided by the power of two where the distance grows with it.",
                to_power(lambda x: -math.floor(math.log2(x))),
            ),
            Mistake(
                "that is half of it: the update that just fails to move the number.",
                lambda x, dtype: next_up(x, dtype) / 2,
            ),
        ],
        takeaway="equal to the next pattern of bits, for every number and format.",
    )


def copies(model: torch.nn.Module) -> int:
    """Bytes of 16-bit weight copies that autocast makes in a forward pass, by the ledger."""
    shapes_of_weights = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    with fake_tensors(), MemoryLedger(model) as ledger:
        ids = torch.zeros(1, 8, dtype=torch.long)
        with torch.autocast("cpu", dtype=torch.float16):
            logits = model(input_ids=ids).logits
        report = ledger.report()
    del logits
    return sum(
        block.n_bytes
        for block in report.saved
        if block.dtype == torch.float16
        and block.operation.startswith("_to_copy")
        and (block.shape in shapes_of_weights or block.shape[::-1] in shapes_of_weights)
    )


@check()
def check_copies(answer: Callable) -> Verdict:
    """Exercise 04.1: bytes of 16-bit copies that autocast adds to a float32 model."""
    for name in COPIED:
        model = fake_model(name)
        result, wanted = call(answer, model), copies(model)
        every = sum(p.numel() for p in model.parameters())
        inner = sum(
            m.weight.numel()
            for n, m in model.named_modules()
            if isinstance(m, torch.nn.Linear) and n != "lm_head"
        )
        mistakes = [
            Mistake("that counts 4 bytes each; the copies have 16 bits.", 2 * wanted),
            Mistake("that counts numbers; each copy takes 2 bytes.", wanted // 2),
            Mistake(
                "that counts every weight; autocast copies what matrix products read, not norms "
                "and not an embedding that is only looked up.",
                2 * every,
            ),
            Mistake(
                "the head is a linear layer too, also where it shares its matrix with the "
                "embedding.",
                2 * inner,
            ),
        ]
        if not equal(result, wanted):
            found = number(result)
            got = describe(result) if found is None else show_bytes(int(found))
            said = f"for {named(name)} it should be {show_bytes(wanted)}, got {got}."
            return not_yet(name_mistake(result, mistakes) or said)
    return right(f"to the byte, for {', '.join(map(named, COPIED))}.")


def _amp_dtype(settings: Mapping[str, Any]) -> Literal["float16", "bfloat16"] | None:
    """Autocast's format, by the names of `TrainingArguments`."""
    if settings["fp16"]:
        return "float16"
    return "bfloat16" if settings["bf16"] else None


def run_published(settings: Mapping[str, Any]) -> Products:
    """One training step of the bundled model with published settings: its 4-bit products."""
    from transformers import BitsAndBytesConfig

    recipe = TrainRecipe(
        model=BUNDLED,
        amp_dtype=_amp_dtype(settings),
        sequence_length=16 if gpus.device() == "cpu" else ON_A_GPU,
        checkpointed_layers=0,
        lora_dropout=0.0,
    )
    quantization = BitsAndBytesConfig(
        **{name: value for name, value in settings.items() if name.startswith(("load", "bnb"))}
    )
    base = qlora.load_base(recipe, quantization_config=quantization)
    model = qlora.add_adapters(base, recipe)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    batches = measurement.random_batches(recipe, gpus.device())
    with products_of_4_bits() as products:
        qlora.training_step(model, optimizer, batches, recipe)
    return products


@check()
def check_published(answer: Mapping[str, Any]) -> Verdict:
    """Exercise 04.2: the published settings, made right for a T4 by changing one of them."""
    if not isinstance(answer, Mapping):
        return not_yet(f"the settings as a dict are asked for, got {type(answer).__name__}.")
    changed = {name: value for name, value in answer.items() if PUBLISHED.get(name) != value}
    if set(answer) != set(PUBLISHED):
        return not_yet(
            f"the names must stay those of the published settings; look at "
            f"{', '.join(sorted(set(answer) ^ set(PUBLISHED)))}."
        )
    amp_dtype = _amp_dtype(answer)
    if amp_dtype is None:
        return not_yet("without fp16 the products leave the T4's tensor cores; keep it on.")
    if not answer["load_in_4bit"]:
        return not_yet("that gives up the 4 bits and what they save; the mistake is elsewhere.")
    if amp_dtype == "bfloat16":
        return not_yet(
            f"bf16 must be False on a T4, got True: {gpus.mixed_precision(gpus.T4).reason}. "
            "Keep fp16, and look for what does not agree with it."
        )
    products = run_published(answer)
    if products.detours:
        why = "nothing has changed; " if not changed else ""
        return not_yet(f"{why}of a step's products with 4-bit weights {products}.")
    if len(changed) > 1:
        return not_yet(f"that works, but one change is enough; you changed {', '.join(changed)}.")
    return right(f"of a step's products with 4-bit weights {products}.")
