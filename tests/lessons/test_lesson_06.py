"""Lesson 06: what its stored outputs show was learned, and what its exercises accept.

test_notebooks.py proves that the outputs reproduce; here they are held against what was promised.
"""

import dataclasses
import re

import nbformat
import pytest
from transformers import AutoTokenizer

from course_utils import data
from course_utils.exercises import lesson_06 as exercises
from course_utils.figures import widgets
from fitcast.training.data import encode
from fitcast.units import GIB
from tools.notebooks import LESSONS


@pytest.fixture(scope="module")
def shown():
    """Everything that the committed lesson prints, by the code that printed it."""
    notebook = nbformat.read(LESSONS / "06_qlora_on_a_t4.ipynb", as_version=4)
    return {
        cell.source: "".join(
            output.get("text")
            or output.get("evalue")
            or output.get("data", {}).get("text/plain", "")
            for output in cell.outputs
        )
        for cell in notebook.cells
        if cell.cell_type == "code"
    }


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
    assert refused[0].endswith("use recipe.for_gpu(hardware.detect())")
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
    table = printed_by(shown, "print(closing_act.table(preparation + ladder))")
    prepared, first, *others = [line for line in table.splitlines() if re.search(r"x$", line)]
    assert "k-bit upcast" in prepared and " no " in prepared
    assert "the usual recipe" in first and " no " in first and len(others) >= 8
    ratios = [float(line.split()[-1][:-1]) for line in others if " fits " in line]
    assert len(ratios) >= 6 and max(ratios) >= 2.3
    assert "measured: NVIDIA" in table
    assert "not measured on cpu" in printed_by(shown, "closing_act.train_here")


# --- exercises -----------------------------------------------------------------------------------


def distinct(verdicts) -> list[str]:
    """Messages of failing verdicts, all different."""
    assert [verdict.passed for verdict in verdicts] == [False] * len(verdicts), verdicts
    messages = [verdict.message for verdict in verdicts]
    assert len(set(messages)) == len(messages)
    return messages


def test_exercise_1_counts_adapters():
    check = exercises.check_trainable
    right = check(lambda layers, hidden, kv, r: layers * r * (4 * hidden + 2 * (hidden + kv)))
    assert right.passed and "3,407,872" in right.message
    messages = distinct(
        [
            check(lambda layers, hidden, kv, r: r * (4 * hidden + 2 * (hidden + kv))),
            check(lambda layers, hidden, kv, r: layers * r * 8 * hidden),
            check(lambda layers, hidden, kv, r: layers * r * 4 * hidden),
            check(lambda layers, hidden, kv, r: layers * 2 * hidden * (hidden + kv)),
            check(lambda layers, hidden, kv, r: 1),
        ]
    )
    for message, words in zip(
        messages, ("one layer", "kv wide", "A only", "weights beside", "should give"), strict=True
    ):
        assert words in message
    assert check(lambda *_: ...).passed is None and check(...).passed is None


def test_exercise_2_masks_prompts():
    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())
    rows = encode(data.load_instructions().select(range(3)), tokenizer, 128)
    lengths = [row["labels"].count(-100) for row in rows]

    def check(answer):
        return exercises.check_labels(answer, rows, lengths)

    assert check(lambda ids, n: [-100] * n + ids[n:]).passed
    messages = distinct(
        [
            check(lambda ids, n: ids[:n] + [-100] * (len(ids) - n)),
            check(lambda ids, n: [-100] * (n - 1) + ids[n:] + [-100]),
            check(lambda ids, n: [0] * n + ids[n:]),
            check(lambda ids, n: [-100] * n + ids[n:-1] + [-100]),
            check(lambda ids, n: ids),
            check(lambda ids, n: ids[n:]),
        ]
    )
    for message, words in zip(
        messages,
        ("swap", "not shifted", "-100 is what", "says stop", "nothing is masked", "as many as"),
        strict=True,
    ):
        assert words in message
    assert check(lambda ids, n: ...).passed is None


def test_exercise_3_keeps_the_lesson_in_less_memory_and_time():
    def check(**changes):
        return exercises.check_budget(
            dataclasses.replace(exercises.PHI, **changes), exercises.PHI, 6 * GIB, 2
        )

    levers = {"attention": "explicit_kv", "loss": "chunked", "norm": "native", "lora_dropout": 0.0}
    right = check(**levers)
    assert right.passed and "32 sequences" in right.message, right
    messages = distinct(
        [
            check(),
            check(
                **levers
                | {"attention": "stock", "micro_batch_size": 1, "gradient_accumulation_steps": 32}
            ),
            check(micro_batch_size=2),
            check(sequence_length=1024),
            check(lora_rank=4),
            check(lora_targets=("o_proj",)),
            check(base="float16"),
            check(**levers | {"learning_rate": 0.0}),
            check(**levers | {"lora_alpha": 1}),
            check(**levers | {"padded": True}),
            check(**levers | {"max_steps": 1}),
            exercises.check_budget("smaller", exercises.PHI, 6 * GIB, 2),
        ]
    )
    for message, words in zip(
        messages,
        (
            "the peak is",
            "times as fast as before",
            "effective_batch_size must stay 32",
            "sequence_length must stay",
            "lora_rank must stay",
            "lora_targets must stay",
            "base must stay",
            "learning_rate must stay",
            "lora_alpha must stay",
            "padded must stay",
            "max_steps must stay",
            "a TrainRecipe",
        ),
        strict=True,
    ):
        assert words in message
    assert exercises.check_budget(..., exercises.PHI, 6 * GIB, 2).passed is None


def test_the_widget_redraws_for_other_levers():
    explorer = widgets.levers_explorer()
    assert "the usual recipe: 19.28 GiB, does not fit" in explorer.figure.alt
    assert "with these levers: 9.16 GiB, fits" in explorer.figure.alt  # measured: the same
    explorer.controls["layers_that_forget"].value = "0 %"
    assert "with these levers: 9.16 GiB" not in explorer.picture.value
    explorer.controls["layers_that_forget"].value = "100 %"
    explorer.controls["loss"].value = "full"
    assert explorer.picture.value.count("does not fit") == 2
