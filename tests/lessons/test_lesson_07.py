"""Lesson 07: what its stored outputs show was learned, and what its exercises accept.

test_notebooks.py proves that the outputs reproduce; here they are held against what was promised.
"""

import dataclasses
import html
import re

import nbformat
import pytest
import torch
from transformers import AutoTokenizer

from course_utils import data
from course_utils.exercises import lesson_07 as exercises
from course_utils.figures import widgets
from fitcast.training.data import encode
from fitcast.units import GIB
from tests.lessons.exercises import complaints
from tools.notebooks import LESSONS


@pytest.fixture(scope="module")
def shown():
    """Everything that the committed lesson prints, by the code that printed it."""
    notebook = nbformat.read(LESSONS / "07_qlora_on_a_t4.ipynb", as_version=4)
    return {
        cell.source: "".join(
            output.get("text")
            or output.get("evalue")
            or unfolded(output.get("data", {}).get("text/html", ""))
            or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


def unfolded(page: str) -> str:
    """The text of an answer that waits for a guess."""
    return html.unescape(re.sub(r"<[^>]*>", "", page))


def printed_by(shown, code: str) -> str:
    found = [text for source, text in shown.items() if code in source]
    assert len(found) == 1, f"{len(found)} cells contain {code!r}"
    return found[0]


def shares(text: str) -> tuple[int, int]:
    """Percent of held-out answers with the structure, and right ones."""
    return tuple(map(int, re.search(r"(\d+)% have the structure, (\d+)% are right", text).groups()))


def test_preflight_refuses_each_mistake_with_its_remedy(shown):
    refused = printed_by(shown, "greedy = replace(recipe").splitlines()
    assert [line.split()[0] for line in refused] == ["precision", "memory"]
    assert refused[0].endswith("use recipe.for_gpu(gpus.detect())")
    assert "; halve micro_batch_size" in refused[1]


def test_training_teaches_the_tickets(shown):
    before = printed_by(shown, "before = evaluation.answer_losses")
    after = printed_by(shown, "learned = tickets.score")
    first, last, low, high = map(
        float,
        re.search(
            r"held-out loss ([\d.]+) -> ([\d.]+), change\s+and 95 % interval \S+ \[(\S+), (\S+)\]",
            after,
        ).groups(),
    )
    assert last <= 0.7 * first and low <= high < -0.3 * first
    assert max(shares(before)) < 10
    assert min(shares(after)) > 85


def test_the_control_learns_no_tickets(shown):
    control = printed_by(shown, "controlled = tickets.score")
    assert shares(control)[1] < 10


def test_the_lesson_states_each_promise_as_kept(shown):
    for code, promises in (
        ("loss down by 30 %", 3),
        ("below the control beyond chance", 4),
        ("adapter exact", 3),
    ):
        kept = printed_by(shown, code)
        assert len(re.findall(r": +True$", kept, re.MULTILINE)) == promises and "False" not in kept


def test_the_killed_run_repeats_the_losses(shown):
    killed = printed_by(shown, "train_and_kill")
    assert "Resuming from checkpoint-3" in killed
    assert "0 of 5" in killed and "exit status -9" in killed


def test_a_save_that_dies_spoils_the_usual_file_and_not_ours(shown):
    assert "OutOfMemoryError" in printed_by(shown, 'torch.save, state, "last.pt"')
    ours = printed_by(shown, "survival.save_whole")
    assert "checkpoint-57 was not written" in ours and "checkpoint-56 is whole" in ours


def test_the_budgets_in_circulation_are_judged(shown):
    said = printed_by(shown, "budget.compare")
    assert said.count("missing in the budget") == 2
    assert "19.28 GiB   19.28 GiB   1.5 times the claim" in said
    assert "22.66 GiB   22.66 GiB   3.5 times the claim" in said


def test_the_closing_act_fits_and_is_faster(shown):
    table = printed_by(shown, "closing_act.table(preparation + ladder)")
    prepared, first, *others = [line for line in table.splitlines() if re.search(r"x$", line)]
    assert "k-bit upcast" in prepared and " no " in prepared
    assert "the usual recipe" in first and " no " in first and len(others) >= 8
    ratios = [float(line.split()[-1][:-1]) for line in others if " fits " in line]
    assert len(ratios) >= 6 and max(ratios) >= 2.3
    assert "measured: NVIDIA" in table
    assert "not measured on cpu" in printed_by(shown, "closing_act.train_here")


# --- exercises -----------------------------------------------------------------------------------


def test_exercise_1_counts_adapters():
    def count(layers, hidden, kv, r):
        return layers * r * (4 * hidden + 2 * (hidden + kv))

    wrong = {
        "one layer": (lambda layers, *rest: count(1, *rest), "that is one layer"),
        "no grouped queries": (lambda n, hidden, kv, r: count(n, hidden, hidden, r), "kv wide"),
        "A only": (lambda n, hidden, kv, r: n * r * 4 * hidden, "you counted A only"),
        "the weights": (lambda n, hidden, kv, r: n * 2 * hidden * (hidden + kv), "weights beside"),
        "a number": (lambda *_: 1, "should give"),
    }
    right = [count, lambda *case: torch.tensor(count(*case))]
    assert complaints(exercises.check_trainable, "check_trainable", right, wrong) == []
    assert "3,407,872 for Llama-3.2-1B" in repr(exercises.check_trainable(count))


def test_exercise_2_masks_prompts():
    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())
    rows = encode(data.load_instructions().select(range(3)), tokenizer, 128)
    lengths = [row["labels"].count(-100) for row in rows]
    first, n = len(rows[0]["labels"]), lengths[0]

    def check(answer):
        return exercises.check_labels(answer, rows, lengths)

    def slip(ids, n):
        labels = [-100] * n + ids[n:]
        labels[n + 2] = -100
        return labels

    wrong = {
        "swapped": (lambda ids, n: ids[:n] + [-100] * (len(ids) - n), "swap"),
        "shifted": (lambda ids, n: [-100] * (n - 1) + ids[n:] + [-100], "not shifted"),
        "0 for -100": (lambda ids, n: [0] * n + ids[n:], "-100 is what"),
        "no end": (lambda ids, n: [-100] * n + ids[n:-1] + [-100], "says stop"),
        "no mask": (lambda ids, n: ids, "nothing is masked"),
        "too short": (lambda ids, n: ids[n:], "as many as"),
        "a slip": (
            slip,
            f"(a list of {first}, {n}) should give {rows[0]['labels'][n + 2]} at index {n + 2} of "
            f"{first}, got -100",
        ),
        "a token missing": (
            lambda ids, n: [-100] * n + ids[n + 1 :],
            f"should give a list of {first}, got a list of {first - 1}",
        ),
    }
    right = [
        lambda ids, n: [-100] * n + ids[n:],
        lambda ids, n: torch.tensor([-100] * n + ids[n:]),
    ]
    assert complaints(check, "check_labels", right, wrong) == []


def test_exercise_3_keeps_the_lesson_in_less_memory_and_time():
    def changed(**changes):
        return dataclasses.replace(exercises.PHI, **changes)

    def check(answer):
        return exercises.check_budget(answer, exercises.PHI, 6 * GIB, 2)

    levers = {"attention": "explicit_kv", "loss": "chunked", "norm": "native", "lora_dropout": 0.0}
    small = {"micro_batch_size": 1, "gradient_accumulation_steps": 32}
    wrong = {
        "nothing": (changed(), "the peak is"),
        "a slow kernel": (
            changed(**levers | small | {"attention": "stock"}),
            "times as fast as before; the target is at least 2. Which kernel does attention take",
        ),
        "another batch": (changed(micro_batch_size=2), "effective_batch_size must stay 32"),
        "shorter": (changed(sequence_length=1024), "sequence_length must stay"),
        "a lower rank": (changed(lora_rank=4), "lora_rank must stay"),
        "other targets": (changed(lora_targets=("o_proj",)), "lora_targets must stay"),
        "16 bits": (changed(base="float16"), "base must stay"),
        "no learning": (changed(**levers, learning_rate=0.0), "learning_rate must stay"),
        "another alpha": (changed(**levers, lora_alpha=1), "lora_alpha must stay"),
        "padded": (changed(**levers, padded=True), "padded must stay"),
        "one step": (changed(**levers, max_steps=1), "max_steps must stay"),
        "text": ("smaller", "a TrainRecipe is asked for, got str"),
    }
    assert complaints(check, "check_budget", [changed(**levers)], wrong) == []
    assert "32 sequences" in repr(check(changed(**levers)))


def test_exercise_3_asks_for_what_is_slow_in_the_answer():
    """Not for the kernel when the answer has the fast one."""

    def said(**changes):
        answer = dataclasses.replace(
            exercises.PHI, attention="explicit_kv", loss="chunked", **changes
        )
        return repr(exercises.check_budget(answer, exercises.PHI, 6 * GIB, 9))

    assert "the target is at least 9. In how many steps" in said()
    assert "What does dropout draw" in said(norm="native")
    assert "Fewer layers that forget" in said(norm="native", lora_dropout=0.0)


@pytest.mark.slow
def test_the_widget_redraws_for_other_levers():
    explorer = widgets.levers_explorer()
    assert "the usual recipe: 19.28 GiB, does not fit" in explorer.figure.alt
    assert "with these levers: 9.16 GiB, fits" in explorer.figure.alt  # measured: the same
    explorer.controls["layers_that_forget"].value = "0 %"
    assert "with these levers: 9.16 GiB" not in explorer.picture.value
    explorer.controls["layers_that_forget"].value = "100 %"
    explorer.controls["loss"].value = "full"
    assert explorer.picture.value.count("does not fit") == 2


@pytest.mark.slow
def test_the_widget_draws_every_model():
    explorer = widgets.levers_explorer()
    for model in explorer.controls["model"].options:
        explorer.controls["model"].value = model
        assert f"alt='bars against the 14.42 GiB of a T4: {model}, QLoRA" in explorer.picture.value
