"""Lesson 06: what its exercises accept and how they name mistakes, and its widget."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from course_utils.exercises import lesson_06 as exercises
from course_utils.figures import widgets
from fitcast import chunked_loss
from tests.lessons.exercises import complaints


def summed(rows, head, targets):
    return F.cross_entropy(head(rows).float(), targets, reduction="sum")


def reference(hidden, head, labels, chunk_tokens, each=None, by="labelled", start=0):
    rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    each = each or (lambda *given: checkpoint(summed, *given, use_reentrant=False))
    total = 0
    for at in range(0, len(targets) - start, chunk_tokens):
        total = total + each(rows[at : at + chunk_tokens], head, targets[at : at + chunk_tokens])
    return total / {"labelled": (targets != -100).sum(), "all": len(targets), "one": 1}[by]


def padded_labels(hidden, head, labels, chunk_tokens):
    """The shift by padding, as the engine does it; chunks by `split`."""
    rows, targets = hidden.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    parts = zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    each = [checkpoint(summed, rows, head, wanted, use_reentrant=False) for rows, wanted in parts]
    return torch.stack(each).sum() / (targets != -100).sum()


def by_log_softmax(hidden, head, labels, chunk_tokens):
    """A mean over what is labelled, with `gather`; one number in a list of one."""

    def part(rows, targets):
        picked = F.log_softmax(head(rows), -1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
        return -(picked * (targets != -100)).sum()

    rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    parts = zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    sums = [checkpoint(part, *pair, use_reentrant=False) for pair in parts]
    return (sum(sums) / (targets != -100).sum()).reshape(1)


def row_by_row(hidden, head, labels, chunk_tokens):
    total = sum(
        checkpoint(summed, rows[at : at + chunk_tokens], head,
                   wanted[at : at + chunk_tokens], use_reentrant=False)
        for rows, wanted in zip(hidden[:, :-1], labels[:, 1:], strict=True)
        for at in range(0, len(rows), chunk_tokens)
    )  # fmt: skip
    return total / (labels[:, 1:] != -100).sum()


def reentrant(hidden, head, labels, chunk_tokens):
    return reference(
        hidden,
        head,
        labels,
        chunk_tokens,
        lambda *one: checkpoint(summed, *one, use_reentrant=True),
    )


def with_gradient(hidden, head, labels, chunk_tokens):
    return chunked_loss(hidden, head, labels, chunk_tokens, lean=True)


def all_at_once(hidden, head, labels, chunk_tokens):
    logits = head(hidden)[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten())


def unshifted(hidden, head, labels, chunk_tokens):
    return F.cross_entropy(head(hidden).flatten(0, 1), labels.flatten())


def across_rows(hidden, head, labels, chunk_tokens):
    return F.cross_entropy(head(hidden).flatten(0, 1)[:-1], labels.flatten()[1:])


def means(hidden, head, labels, chunk_tokens):
    rows, targets = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    parts = zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True)
    each = [F.cross_entropy(head(rows), wanted).nan_to_num() for rows, wanted in parts]
    return sum(each) / len(each)


def half_a_gradient(hidden, head, labels, chunk_tokens):
    loss = reference(hidden, head, labels, chunk_tokens)
    return (loss + loss.detach()) / 2


def test_exercise_1_wants_the_same_loss_in_few_bytes():
    wrong = {
        "all logits": (all_at_once, "All logits are there at once"),
        "chunks that remember": (
            lambda *given: reference(*given, each=summed), "still wait for backward"),
        "no shift": (unshifted, "its own label"),
        "a shift across rows": (across_rows, "the first token of the next row"),
        "a mean of means": (means, "mean of the chunks' means"),
        "all positions": (lambda *given: reference(*given, by="all"), "divided by all positions"),
        "a sum": (lambda *given: reference(*given, by="one"), "that is the sum"),
        "no rest": (lambda h, w, y, c: reference(h, w, y, c, start=c - 1), "last whole chunk"),
        "a number": (lambda *given: all_at_once(*given).item(), "a tensor with one number"),
        "no gradient": (lambda *given: all_at_once(*given).detach(), "no gradient leads back"),
        "half a gradient": (half_a_gradient, "its gradient is not"),
        "twice the loss": (lambda *given: 2 * reference(*given), "the usual one's"),
        "nothing": (lambda *given: None, "returns nothing"),
    }  # fmt: skip
    right = [
        reference, padded_labels, by_log_softmax, row_by_row, reentrant, with_gradient, chunked_loss
    ]  # fmt: skip
    assert complaints(exercises.check_chunked, "check_chunked", right, wrong) == []


def phi(**changes):
    return dataclasses.replace(exercises.PHI, **changes)


LEVERS = {"attention": "explicit_kv", "loss": "chunked", "norm": "native", "lora_dropout": 0.0}


@pytest.mark.slow
def test_exercise_2_keeps_the_lesson_in_less_memory_and_time():
    small = {"micro_batch_size": 1, "gradient_accumulation_steps": 32}
    wrong = {
        "nothing": (phi(), "the peak is"),
        "a slow kernel": (
            phi(**LEVERS | small | {"attention": "stock"}),
            "times as fast as before; the target is at least 2. Which kernel does attention take",
        ),
        "another batch": (phi(micro_batch_size=2), "effective_batch_size must stay 32"),
        "shorter": (phi(sequence_length=1024), "sequence_length must stay"),
        "a lower rank": (phi(lora_rank=4), "lora_rank must stay"),
        "padded": (phi(**LEVERS, padded=True), "padded must stay"),
        "text": ("smaller", "a TrainRecipe is asked for, got str"),
    }
    right = [
        phi(**LEVERS), phi(**LEVERS | {"loss": "lean"}), phi(**LEVERS, mlp="lean"),
        phi(**LEVERS | {"norm": "stock"}), phi(**LEVERS, rotary="lean", adapters="lean"),
    ]  # fmt: skip
    assert complaints(exercises.check_phi, "check_phi", right, wrong) == []


@pytest.mark.slow
def test_exercise_2_asks_for_what_is_slow_in_the_answer(monkeypatch):
    """Not for the kernel when the answer has the fast one."""
    monkeypatch.setattr(exercises, "PHI_SPEEDUP", 9)

    def said(**changes):
        return repr(exercises.check_phi(phi(attention="explicit_kv", loss="chunked", **changes)))

    assert "the target is at least 9. In how many steps" in said()
    assert "What does dropout draw" in said(norm="native")
    assert "Fewer layers that forget" in said(norm="native", lora_dropout=0.0)


@pytest.mark.slow
def test_one_step_from_the_widgets_default_is_a_picture():
    explorer = widgets.levers_explorer()
    assert "no mask" in explorer.figure.alt
    for settings in explorer._next_settings(explorer.controls["rows"]):
        if sum(settings[name] != explorer.settings[name] for name in settings) == 1:
            assert "<img alt=" in explorer._look(**settings), settings
