"""The targets of lesson 02's exercises. Each is counted when the check runs, none is stored."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch

from course_utils.exercises.answers import blanks, equal, items, number, whole
from course_utils.exercises.checks import (
    Mistake,
    Unfinished,
    Verdict,
    call,
    check,
    name_mistake,
    not_yet,
    right,
)
from course_utils.exercises.predictions import Folded
from course_utils.exercises.self_check import Question, SelfCheck
from course_utils.figures.chain import held_beside
from course_utils.topics.checkpointing import trace_chain
from fitcast import models
from fitcast.forecasting.forecast import forecast
from fitcast.gpus import Gpu
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.units import GB, GIB, show_bytes

STEPS = 6
QUESTIONS = SelfCheck(
    Question(
        "What does gradient checkpointing store?",
        ("gradients of some layers", "a file of the weights", "the inputs of layers"),
        "c",
        "Activations: each layer's input, its boundary. The rest is computed again from it.",
    ),
    Question(
        "All weights are trained, every layer forgets. How much more work is a step?",
        ("half as much again", "twice as much", "some, but less than a third", "nothing"),
        "c",
        "Backward is about two forwards, so a second forward would be a third more; and not all of "
        "forward is asked for again.",
    ),
    Question(
        "`from_pretrained`, then the switch, then your own loop: nothing is saved. Why?",
        (
            "the model is in evaluation mode: call `train()`",
            "the optimizer was made before the switch",
            "checkpointing needs LoRA",
        ),
        "a",
        "A layer forgets in training mode only, and from_pretrained returns evaluation mode.",
    ),
    Question(
        "What decides whether a QLoRA run on a T4 needs checkpointing?",
        (
            "the number of weights alone",
            "micro batch, sequence length, the layers' width and number",
            "the rank of the adapters",
        ),
        "b",
        "It saves activations, and those follow all of these, on a T4, for Llama 3 without a mask, "
        "the length most.",
    ),
    Question(
        "12 of 32 layers may remember; the peak is in a recomputed layer. Which ones?",
        ("any: it makes no difference", "the first", "every third", "the last"),
        "d",
        "Backward frees the last ones first, before a recomputed layer needs room.",
    ),
)
# What autograd says when a checkpoint is wrong, and what it means.
AUTOGRAD_SAYS = {
    "does not require grad": "there is no graph to run backward through: inside backward autograd "
    "is off, run the function under `torch.enable_grad()`.",
    "incorrect number of gradients": "backward returns one value for each argument of forward: "
    "None for the function, then what arrived at `x`.",
    "only for scalar outputs": "the second backward starts from the gradient that came in: "
    "`output.backward(grad)`.",
    "the graph a second time": "cut the recomputation off from what came before, with "
    "`detach()`, and let its input require a gradient.",
}


@check(asked=2)
def check_traces(answer: Mapping[str, Any]) -> Verdict:
    """Exercise 02.1: inputs held while backward runs steps 6 to 1 of a chain of six.

    Args:
        answer: Two lists of six counts, under "keep_all" and "keep_135".
    """
    for name, kept in {"keep_all": range(1, STEPS + 1), "keep_135": (1, 3, 5)}.items():
        held = _held_in_backward(kept)
        verdict = _judge_trace(name, answer[name], held, set(kept))
        if verdict:
            return verdict
    return right("6 against 4 at the most, and the price is a few steps of forward.")


def _held_in_backward(kept: Collection[int]) -> list[tuple[int, ...]]:
    """Which inputs the chain holds while backward runs its last step, the one before, and so on."""
    moments = {moment.action: moment.held for moment in trace_chain(STEPS, kept)}
    return [moments[f"backward {step}"] for step in range(STEPS, 0, -1)]


def _judge_trace(
    name: str, answer: Any, held: list[tuple[int, ...]], kept: set[int]
) -> Verdict | None:
    """What is wrong with the counts of one chain; `None` when they are right."""
    target, counts = [len(inputs) for inputs in held], items(answer)
    if counts is None or len(counts) != STEPS:
        return not_yet(
            f"{name} is a list of {STEPS} counts, for backward of step 6, 5, 4, 3, 2, "
            f"1; got {answer!r}."
        )
    if equal(counts, target):
        return None
    mistakes = [
        Mistake(
            "count during each backward step, before its own input is freed.",
            [count - 1 for count in target],
        ),
        Mistake("what backward has used is freed: the counts fall.", [len(kept)] * STEPS),
        Mistake(
            "the recomputed input takes room as well, while its step needs it.",
            [len(set(inputs) & kept) for inputs in held],
        ),
        Mistake(
            "one segment at a time is computed again, not the whole chain at once.",
            range(STEPS, 0, -1),
        ),
    ]
    if sentence := name_mistake(counts, mistakes):
        return not_yet(f"{name}: {sentence}")
    first = next(i for i in range(STEPS) if not equal(counts[i], target[i]))
    names = ", ".join(f"a{number}" for number in held[first])
    return not_yet(
        f"{name}: while backward runs step {STEPS - first}, memory holds {names}; you "
        f"count {counts[first]}."
    )


def draw_traces(keep_all: Any, keep_135: Any) -> Any:
    """Exercise 02.1's counts beside those of a chain that was run; folded until both are right."""
    names, mine = ("keep a1 to a6", "keep a1, a3, a5"), {}
    kept = dict(zip(names, (range(1, STEPS + 1), (1, 3, 5)), strict=True))
    for name, answer in zip(names, (keep_all, keep_135), strict=True):
        counts = [found for one in items(answer) or () if (found := number(one)) is not None]
        if len(counts) == STEPS:
            mine[name] = counts
    counted = {name: [len(held) for held in _held_in_backward(kept[name])] for name in names}
    figure = held_beside(mine, counted)
    if mine == counted:
        return figure
    said = {"said": "Not yet what the check wants. To compare, once you give up:"} if mine else {}
    return Folded("In a chain that was run:", [figure], **said)


@check(asked=2)
def check_forget(answer: Callable) -> Verdict:
    """Exercise 02.2: a checkpoint of one's own, for gradients to the bit *and* fewer bytes.

    Args:
        answer: `answer(function, x)` is `function(x)`, and keeps nothing but `x` for backward.
    """
    if blanks(answer):
        raise Unfinished
    try:
        plain, yours = _train_blocks(lambda block, x: block(x)), _train_blocks(answer)
    except RuntimeError as error:
        for words, sentence in AUTOGRAD_SAYS.items():
            if words in str(error):
                return not_yet(sentence)
        raise
    if not torch.equal(yours["output"], plain["output"]):
        return not_yet("the output is not function(x).")
    if yours["kept_bytes"] > plain["boundary_bytes"]:
        return not_yet(
            f"{show_bytes(yours['kept_bytes'])} wait for backward; the target is at "
            f"most {show_bytes(plain['boundary_bytes'])}, the input of each block."
        )
    if any(gradient is None for gradient in yours["weights"]):
        return not_yet(
            "the weights got no gradient: let `output.backward(...)` run through the "
            "function, it reaches them too."
        )
    if not _equal(yours["input"], plain["input"]):
        return not_yet(
            "the gradient of the input is not the plain one: backward returns what "
            "arrived at `x`, and starts from `grad`."
        )
    if not _equal(yours["weights"], plain["weights"]):
        return not_yet(
            "the gradients of the weights are not the plain ones: start the second "
            "backward from `grad`, once."
        )
    kept = plain["kept_bytes"] / yours["kept_bytes"]
    return right(f"gradients equal to the bit, and {kept:.0f} times less waits for backward.")


def _train_blocks(through: Callable, blocks: int = 3) -> dict[str, Any]:
    """Some blocks, each through `through(block, x)`: gradients, and what waits for backward."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(64, 32, generator=random).requires_grad_()
    stack = []
    for _ in range(blocks):
        block = torch.nn.Sequential(
            torch.nn.Linear(32, 128), torch.nn.GELU(), torch.nn.Linear(128, 32), torch.nn.Tanh()
        )
        for weight in block.parameters():
            weight.data = 0.1 * torch.randn(weight.shape, generator=random)
        stack.append(block)
    upstream = torch.randn(64, 32, generator=random)
    with MemoryLedger(torch.nn.ModuleList(stack), inputs=(x, upstream)) as ledger:
        before, output = ledger.live_bytes, x
        for block in stack:
            # A sum with 0 keeps nothing: who keeps its block's output too keeps one tensor more.
            output = call(through, block, output) + 0.0
        kept_bytes = ledger.live_bytes - before
    output.backward(upstream)
    return {
        "output": output.detach(),
        "kept_bytes": kept_bytes,
        "input": [x.grad],
        "boundary_bytes": blocks * x.nbytes,
        "weights": [weight.grad for block in stack for weight in block.parameters()],
    }


def _equal(left: list, right: list) -> bool:
    return all(a is not None and torch.equal(a, b) for a, b in zip(left, right, strict=True))


@check()
def check_smallest_k(answer: int, recipe: TrainRecipe, gpu: Gpu, budget_bytes: int) -> Verdict:
    """Exercise 02.3: the fewest layers that must forget, by forecast.

    Args:
        answer: How many layers forget.
        recipe: Everything but that number.
        gpu: The card to forecast.
        budget_bytes: Most bytes of tensors at the peak.
    """
    layers = models.config(recipe.model).num_hidden_layers
    k = whole(answer, 0, layers)
    if k is None:
        return not_yet(f"a whole number of layers from 0 to {layers} is asked for, got {answer!r}.")

    def peak(k: int) -> int:
        return forecast(replace(recipe, checkpointed_layers=k), gpu).peak_allocated_bytes

    here = peak(k)
    if here <= budget_bytes and (k == 0 or peak(k - 1) > budget_bytes):
        return right(
            f"{k} of {layers} fit, with {show_bytes(here)}; one less does not. The "
            f"other {layers - k} run forward only once."
        )
    said = "that runs out of memory" if here > budget_bytes else f"{k - 1} fit as well"
    least, most = peak(layers), peak(0)
    each = (most - least) / layers
    remember = int((budget_bytes - least) // each)
    gigabytes = budget_bytes / GIB * GB  # the same number of GB
    mistakes = [
        Mistake("it is how many layers may *remember*; the other ones forget", remember),
        Mistake(
            "it comes out when nothing is subtracted for the weights and everything else: start "
            "from the peak with every layer forgetting",
            layers - int(budget_bytes // each),
        ),
        Mistake(
            "it comes out when GB (10**9) are used where the budget is in GiB (2**30)",
            layers - int((gigabytes - least) // each),
        ),
        Mistake("so do far fewer: each layer that remembers saves time", layers),
    ]
    if sentence := name_mistake(k, mistakes):  # near the right one there are other reasons, too
        said += f"; {sentence}"
    return not_yet(
        f"{k} is not the smallest: {said}. Its peak is {show_bytes(here)}, the budget "
        f"{show_bytes(budget_bytes)}."
    )
