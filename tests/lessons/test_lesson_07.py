"""Lesson 07: what its stored outputs show was learned, and what its exercises accept.

test_notebooks.py proves that the outputs reproduce; here they are held against what was promised.
"""

import html
import re

import nbformat
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from course_utils import data
from course_utils.exercises import lesson_07 as exercises
from course_utils.topics import recorded, sources
from fitcast.cli import main as cli
from fitcast.training.data import labelled
from tests.lessons.exercises import complaints, prose
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


def test_data_that_teach_nothing_are_refused_with_their_place(shown):
    said = printed_by(shown, "sources.choose(None, data=")
    assert said.startswith("data, row 0, messages[0].role must be assistant")


def test_a_t4_is_told_minutes_as_a_range(shown):
    said = printed_by(shown, "predicted_gib, show=")
    low, high = map(float, re.search(r"60 steps ([\d.]+) to ([\d.]+) minutes", said).groups())
    assert 1.3 * low < high < 3 * low


def test_every_gate_is_open(shown):
    said = printed_by(shown, "gates.check_gates").splitlines()
    assert [line.split()[0] for line in said if line] == ["ok"] * 5
    assert "longest" in said[4]


def test_training_teaches_more_than_the_control(shown):
    said = printed_by(shown, "learned, controlled =")
    before, after, control = (
        float(re.search(rf"{name}: held-out loss ([\d.]+)", said)[1])
        for name in ("before", "after", "control")
    )
    low, high = map(float, re.search(r"interval: \S+ \[(\S+), (\S+)\]", said).groups())
    assert after < 0.1 * before and 0 < low <= round(control - after, 2) <= high
    learned, controlled = (shares(line) for line in said.splitlines() if "are right" in line)
    assert learned[0] > 90 and learned[1] > 60 and controlled[1] < 10


def test_the_lesson_states_each_promise_as_kept(shown):
    for code, promises in (
        ("below the control beyond chance", 4),
        ("adapter exact", 2),
    ):
        kept = printed_by(shown, code)
        assert len(re.findall(r": +True$", kept, re.MULTILINE)) == promises and "False" not in kept


def test_the_folders_answer_as_the_model_did_and_a_bare_adapter_less_so(shown):
    said = printed_by(shown, "ways = {")
    same = dict(re.findall(r"^(.+?) +(\d) of 8 answers", said, re.MULTILINE))
    assert int(same["merged"]) == int(same["adapter, base in NF4"]) == 8
    assert int(same["adapter, base unquantized"]) <= 8


def test_both_folders_have_a_tokenizer_with_its_template(shown):
    said = printed_by(shown, 'shards.merge_shards(recipe, "adapter", "merged"').splitlines()
    assert len(said) >= 2 and all("chat_template.jinja" in line for line in said if line)


def test_the_killed_run_repeats_the_losses(shown):
    killed = printed_by(shown, "train_and_kill")
    assert "Resuming from checkpoint-3" in killed
    assert "0 of 5" in killed and "exit status -9" in killed


def test_a_save_that_dies_spoils_the_usual_file_and_not_ours(shown):
    assert "OutOfMemoryError" in printed_by(shown, 'torch.save, state, "last.pt"')
    ours = printed_by(shown, "survival.save_whole")
    assert "checkpoint-65 was not written" in ours and "checkpoint-64 is whole" in ours


def test_the_budgets_on_paper_are_judged(shown):
    said = printed_by(shown, "budget.compare")
    assert said.count("missing on paper") == 2
    assert "19.28 GiB   19.28 GiB   1.5 times as much" in said
    assert "22.66 GiB   22.66 GiB   3.5 times as much" in said


# --- what the prose says -------------------------------------------------------------------------


def test_what_it_says_of_its_runs_on_a_gpu_is_recorded():
    printed = {
        row.get("model"): "\n".join(one["printed"] for one in row["measured"])
        for row in recorded.rows("lessons")
        if row["name"].startswith("07")
    }
    said = re.search(
        r"ended at ([\d.]+) on held-out answers, its control at ([\d.]+); of its answers (\d+) %",
        prose("07"),
    )
    after, control, right = said.groups()
    assert (
        f"\nafter: held-out loss {after}\ncontrol: held-out loss {control}\n" in printed["bundled"]
    )
    assert re.search(
        rf"after: .*, {right}% are right\ncontrol: .*, 0% are right", printed["bundled"]
    )
    assert "interval: +0.00 [-0.00, +0.00]" in printed[None]  # random weights, level


def test_its_learning_rate_is_the_small_models_alone():
    assert sources.SETTINGS[sources.BUNDLED_NAME]["learning_rate"] == 0.007
    others = {*sources.SETTINGS, "llama-3.2-1b", "someone/else"} - {sources.BUNDLED_NAME}
    assert {sources.settings_of(name)["learning_rate"] for name in others} == {2e-4}
    assert "A learning rate of 0.007 suits" in prose("07") and "any other model gets 2e-4" in prose(
        "07"
    )


def what_is_said_of_8b() -> tuple[str, str]:
    """The peak in GiB, and what stands behind `fitcast` in the command that gives it."""
    said = re.search(
        r"\*\*8B\*\* peaks at ([\d.]+) GiB by forecast .*?`fitcast (forecast .*?)`", prose("07")
    )
    return said[1], said[2]


def test_its_script_says_what_8b_needs_and_who_says_so():
    peak, line = what_is_said_of_8b()
    assert float(peak) < 14 and line.split()[:3] == ["forecast", "--model", "llama-3.1-8b"]


@pytest.mark.slow
def test_its_script_holds_8b_as_it_says(capsys):
    peak, line = what_is_said_of_8b()
    assert cli.main([*line.split(), "--gpu", "T4"]) == 0
    found = re.search(r"peak ([\d.]+) GiB in tensors", capsys.readouterr().out)
    assert f"{float(found[1]):.1f}" == peak


# --- exercises -----------------------------------------------------------------------------------


def test_exercise_2_counts_adapters():
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


def test_exercise_1_labels_what_the_assistant_says():
    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())

    def ids_of(messages, header=False):
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=header, return_dict=False
        )

    def check(answer):
        return exercises.check_labels(answer, ids_of)

    def turns(start_at, end_at):
        def labels_of(messages):
            ids = ids_of(messages)
            labels = [-100] * len(ids)
            for n, message in enumerate(messages):
                if message["role"] == "assistant":
                    start, end = start_at(messages, n), end_at(messages, n)
                    labels[start:end] = ids[start:end]
            return labels

        return labels_of

    def begin(messages, n):
        return len(ids_of(messages[:n], True))

    def end(messages, n):
        return len(ids_of(messages[: n + 1]))

    right = turns(begin, end)
    wrong = {
        "header": (turns(lambda m, n: len(ids_of(m[:n])), end), "header is learned"),
        "no end": (turns(begin, lambda m, n: end(m, n) - 1), "never stops"),
        "to the end": (turns(begin, lambda m, n: len(ids_of(m))), "later questions as well"),
        "shifted": (lambda m: [*right(m)[1:], -100], "not shifted"),
        "no mask": (ids_of, "nothing is masked"),
        "nothing": (lambda m: [-100] * len(ids_of(m)), "no token has a label"),
        "a slip": (lambda m: [*right(m)[:-1], 0], "got 0"),
    }
    accepted = [
        right,
        lambda m: torch.tensor(right(m)),
        lambda m: np.array(right(m)),
        lambda m: tuple(right(m)),
        lambda m: [float(label) for label in right(m)],
    ]
    assert complaints(check, "check_labels", accepted, wrong) == []
    # outside: the reader of the engine says the same of every conversation
    for one in exercises.CONVERSATIONS:
        assert right(one) == labelled(one, tokenizer)[1]
