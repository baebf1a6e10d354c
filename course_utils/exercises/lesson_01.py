"""The targets of lesson 01's exercises. Each is counted when the check runs, none is stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from course_utils.data import BUNDLED, named
from course_utils.exercises.answers import whole
from course_utils.exercises.checks import (
    Mistake,
    Verdict,
    check,
    judge_function,
    judge_number,
    name_mistake,
    not_yet,
    right,
)
from course_utils.exercises.self_check import Question, SelfCheck
from fitcast import models
from fitcast.forecasting.block import count_block
from fitcast.memory.report import MemoryReport
from fitcast.recipe import TrainRecipe
from fitcast.units import GB, MIB

FULL = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_rank=None,
    lora_dropout=0.0,
    checkpointed_layers=0,
    optimizer="adamw",
    micro_batch_size=4,
    sequence_length=128,
)
MODELS = (BUNDLED, "llama-2-7b", "llama-3.2-1b")

QUESTIONS = SelfCheck(
    Question(
        "All weights are trained with Adam, everything in float32. The weights take 1 GiB. What do "
        "gradients and Adam's state take together?",
        ("1 GiB", "2 GiB", "3 GiB", "nothing, once the step is done"),
        "c",
        "A gradient for each weight, and two averages for each: 1 + 2.",
    ),
    Question(
        "What does autograd keep from forward for backward?",
        (
            "every tensor that forward computes",
            "what a derivative needs: operands of products, inputs or outputs of functions",
            "each layer's gradient",
        ),
        "b",
        "An addition keeps nothing, a product both operands; gradients come only in backward.",
    ),
    Question(
        "Flash or memory-efficient SDPA takes the place of eager attention. What is no longer "
        "kept?",
        (
            "queries, keys and values",
            "the scores of every token with every other",
            "the inputs of the MLP",
            "nothing: it is faster, not smaller",
        ),
        "b",
        "Backward computes the scores again, a block at a time.",
    ),
    Question(
        "Llama-3.2-1B has a vocabulary of 128 256 words. In come 4 x 1024 tokens. The largest "
        "tensor of the step is",
        ("a float32 copy of the logits", "the embedding matrix", "a layer's scores", "the batch"),
        "a",
        "Tokens x vocabulary x 4 bytes, and three such copies are alive at the peak.",
    ),
    Question(
        "You look for the largest batch that fits. How many training steps must each attempt run?",
        ("a forward pass is enough", "one step", "two steps", "an epoch"),
        "c",
        "Adam's state appears in the first optimizer step; the second step has to live with it.",
    ),
)


def widths(model: str) -> tuple[int, int, int, int]:
    """A layer's hidden, key/value and intermediate widths and its attention heads."""
    config = models.config(model)
    kv = config.num_key_value_heads * config.head_dim
    return config.hidden_size, kv, config.intermediate_size, config.num_attention_heads


@check(asked=2)
def check_saved_numbers(answer: Callable) -> Verdict:
    """Exercise 01.1: numbers per token that a float32 layer with SDPA keeps, to the byte."""
    number_bytes = 4 * FULL.micro_batch_size * FULL.sequence_length  # one float32 for each token
    counted = {
        widths(model): count_block(replace(FULL, model=model)).saved_activation_bytes
        // number_bytes
        for model in MODELS
    }

    def without(missing: Callable) -> Callable:
        return lambda *case: counted[case] - missing(*case)

    return judge_function(
        answer,
        list(counted),
        list(counted.values()),
        mistakes=[
            Mistake(
                "that counts bytes; count numbers, float32 makes 4 bytes of each.",
                lambda *case: 4 * counted[case],
            ),
            Mistake(
                "key and value are kv numbers wide each, not hidden (grouped-query attention).",
                without(lambda hidden, kv, intermediate, heads: 2 * (kv - hidden)),
            ),
            Mistake(
                "attention also keeps one number for each head, its log-sum-exp.",
                without(lambda hidden, kv, intermediate, heads: heads),
            ),
            Mistake(
                "attention keeps its output too: o_proj needs it.",
                without(lambda hidden, kv, intermediate, heads: hidden),
            ),
            Mistake(
                "the MLP keeps 4 tensors: gate's output, silu's, up's, and the product that down "
                "reads.",
                without(lambda hidden, kv, intermediate, heads: intermediate),
            ),
        ],
        takeaway=f"to the byte, for {', '.join(map(named, MODELS))}. Nothing in it is "
        "sequence x sequence.",
    )


@check()
def check_largest_batch(
    answer: int, two_steps: Callable, recipe: TrainRecipe, budget_bytes: int
) -> Verdict:
    """Exercise 01.3: the largest micro batch whose two steps stay within a budget.

    Args:
        answer: Sequences in a micro batch.
        two_steps: Trains `recipe` for two steps under a ledger with `budget_bytes`, returns its
            report.
        recipe: Everything but the micro batch.
        budget_bytes: The size of the pretended card.
    """
    size = whole(answer, least=1)
    if size is None:
        return not_yet(f"a micro batch is a whole number of sequences from 1, got {answer!r}.")

    def report(size: int, budget: int | None = None) -> MemoryReport:
        return two_steps(replace(recipe, micro_batch_size=size), budget_bytes=budget)

    def fits(size: int) -> bool:
        try:
            report(size, budget_bytes)
        except torch.OutOfMemoryError:
            return False
        return True

    fit = fits(size)
    if fit and not fits(size + 1):
        return right(f"{size} fits, {size + 1} does not. Memory is linear in the batch.")
    said = f"{size + 1} fits as well" if fit else "that runs out of memory"
    two, four = report(2), report(4)  # not 1: its peak may be in the optimizer's step
    each = (four.peak_bytes - two.peak_bytes) // 2  # what one more sequence costs
    fixed = two.peak_bytes - 2 * each  # what is there whatever the batch
    megabytes = budget_bytes // MIB * (GB // 1000)  # the same number of MB, 10**6 bytes each
    mistakes = [
        Mistake(
            "weights and optimizer state, which are there whatever the batch, are not subtracted "
            "first",
            budget_bytes // each,
        ),
        Mistake(
            "the weights are subtracted and the optimizer state, which stays from step to step, "
            "is not",
            (budget_bytes - two.composition["weights"]) // each,
        ),
        Mistake(
            "MB (10**6) are used where the budget is in MiB (2**20)",
            (megabytes - fixed) // each,
        ),
        Mistake(
            "the whole peak is scaled, where only activations and temporaries grow with the batch",
            4 * budget_bytes // four.peak_bytes,
        ),
        Mistake(
            "the difference of the two runs, which is two sequences, is taken for one",
            (budget_bytes - fixed) // (2 * each),
        ),
    ]
    if sentence := name_mistake(size, mistakes):  # near the right one there are other reasons, too
        said += f"; {size} comes out when {sentence}"
    return not_yet(f"{size} is not the largest: {said}.")


@check()
def check_logits_at_peak(answer: float, report: MemoryReport, vocab_size: int) -> Verdict:
    """Exercise 01.2: bytes of logits-shaped tensors alive at the peak of a ledger's report."""
    logits = [block for block in report.largest if block.shape[-1:] == (vocab_size,)]
    held = sum(block.n_bytes for block in logits)
    makers = ", ".join(block.operation.split(".")[0] for block in logits)
    return judge_number(
        answer,
        held,
        mistakes=[
            Mistake(
                "that is one copy of the logits; more than one is alive at the peak.",
                logits[0].n_bytes,
            ),
            Mistake(
                "that has the embedding matrix in it: (vocabulary, hidden), so its last dimension "
                "is hidden.",
                sum(block.n_bytes for block in report.largest if vocab_size in block.shape),
            ),
            Mistake(
                "that is everything at the peak; pick the tensors whose last dimension is the "
                "vocabulary.",
                report.peak_bytes,
            ),
        ],
        takeaway=f"{len(logits)} copies ({makers}), {held / report.peak_bytes:.0%} of the peak of "
        f"a model with a vocabulary of only {vocab_size:,}.",
    )
