"""Lesson 08: what two processes showed, the lines for two GPUs, and what its exercises accept."""

import dataclasses
import functools
import html
import re
import sys

import nbformat
import numpy as np
import pytest
import torch

from course_utils.exercises import lesson_08 as exercises
from course_utils.figures import widgets
from course_utils.topics import bus
from fitcast import GIB, T4, TrainRecipe, forecast, show_bytes
from tests.lessons.exercises import complaints
from tools import minutes, stamp, train_many_gpus
from tools.notebooks import LESSONS, ROOT

SCRIPT = LESSONS / "08_beyond_one_gpu.py"


@pytest.fixture(scope="module")
def shown() -> str:
    """Everything that the committed lesson prints, also what it folds."""
    notebook = nbformat.read(SCRIPT.with_suffix(".ipynb"), as_version=4)
    pages = [
        output.get("text") or output.get("data", {}).get("text/html", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    ]
    return html.unescape(re.sub(r"<[^>]*>", "", "\n".join(pages)))


def test_it_takes_the_half_hour_that_it_says():
    stated = int(re.search(r"\*\*(\d+) min", SCRIPT.read_text("utf-8"))[1])
    assert minutes.measured(SCRIPT).minutes <= stated == 30


def test_ranks_agree_but_for_the_mistake(shown):
    ways = re.findall(r"^(?:(\w+) on )?rank (\d): .*gradient ([\d.]+)$", shown, re.M)
    assert len(ways) == 6 and len({norm for *_, norm in ways}) == 1
    beside = re.findall(r"^gradient on rank \d: ([\d.]+)$", shown, re.M)
    assert len(set(beside)) == 2 and "counted  0 KiB" in shown


def test_two_processes_sent_what_the_check_counts(shown):
    counted = re.findall(r"^counted +(\d+) KiB", shown, re.M)
    assert counted == [
        f"{exercises.counted(strategy, 2, 2) / 1024:g}" for strategy in ("ddp", "fsdp2")
    ] + ["0"]


def test_what_an_8b_model_sends_follows_from_its_shapes(shown):
    width, wide, keys, vocabulary, layers = 4096, 14336, 1024, 128_256, 32  # Llama-3.1-8B
    in_4_bits = (2 * width * width + 2 * width * keys + 3 * width * wide) // 2
    frozen = layers * (in_4_bits + 2 * width * 2) + vocabulary * width * 2  # norms, embedding
    trained = layers * 16 * (2 * (width + width) + 2 * (width + keys)) * 4
    sent = exercises.sent("fsdp2", frozen, trained, micro_batches=1, ranks=2)
    text = " ".join(SCRIPT.read_text("utf-8").split("### Explain\n")[3].split())
    assert f"one micro batch: {sent / GIB:.2f} GiB" in shown
    assert f"{sent / GIB:.2f} GiB a micro batch" in text
    assert f"{exercises.sent('ddp', frozen, trained, 1, 2) / 2**20:.2f} MiB a step" in text


def test_the_lines_for_two_gpus_are_lines_of_the_script(monkeypatch):
    (call,) = re.findall(r"^bus\.on_two_gpus\((.*?)^\)", SCRIPT.read_text("utf-8"), re.M | re.S)
    lines = eval(f"({call})")
    for line, strategy in zip(lines, ("ddp", "fsdp2"), strict=True):
        launch, config, script, *options = re.split(" --config_file | ", line)[1:]
        assert launch == "launch" and (ROOT / script).is_file()
        assert f"--config_file {config}" in (ROOT / config).read_text("utf-8")
        monkeypatch.setattr(sys, "argv", [script, *options])
        assert train_many_gpus.arguments().strategy == strategy


def test_it_opens_in_kaggle_too():
    now, text = stamp.facts(), SCRIPT.read_text("utf-8")
    address = f"https://kaggle.com/kernels/welcome?src={now.page(f'lessons/{SCRIPT.stem}.ipynb')}"
    assert f"({address})" in text
    moved = dataclasses.replace(now, version="9.9.9")
    assert address.replace(now.tag, "v9.9.9") in stamp.lesson_source(text, SCRIPT.stem, moved)


# --- exercises -----------------------------------------------------------------------------------


def test_exercise_1_counts_what_is_sent():
    right = [exercises.sent, lambda *case: np.float64(exercises.sent(*case)),
             lambda *case: torch.tensor(exercises.sent(*case), dtype=torch.float64)]  # fmt: skip

    def slip(strategy, **keywords):
        return lambda *case: exercises.sent(*case, **keywords if case[0] == strategy else {})

    wrong = {
        f"{strategy} {keywords}": (slip(strategy, **keywords), sentence)
        for strategy, named in exercises.MISTAKES.items()
        for sentence, keywords in named
    }
    wrong["both"] = (functools.partial(exercises.sent, every=True), "ddp: that is sent for each")
    wrong["a number"] = (lambda *_: 1, "should give")
    assert complaints(exercises.check_sent, "check_sent", right, wrong) == []


def test_exercise_2_weighs_by_all_ranks_tokens():
    def with_tokens(weigh):
        def loss_of_rank(loss_sum, my_tokens, all_reduce, ranks):
            tokens = torch.tensor(float(my_tokens))
            all_reduce(tokens)
            return weigh(loss_sum, my_tokens, tokens, ranks)

        return loss_of_rank

    def silent(loss_sum, my_tokens, all_reduce, ranks):
        return loss_sum * ranks / torch.tensor(float(my_tokens))

    def some(loss_sum, my_tokens, all_reduce, ranks):
        tokens = torch.tensor(float(my_tokens))
        if my_tokens < 10:
            all_reduce(tokens)
        return loss_sum * ranks / tokens

    def also_logs(loss_sum, my_tokens, all_reduce, ranks):
        tokens, logged = torch.tensor(my_tokens), loss_sum.detach().clone()
        all_reduce(tokens)
        all_reduce(logged)
        return loss_sum / tokens * ranks

    right = [with_tokens(lambda loss, mine, every, ranks: loss * ranks / every), also_logs]
    wrong = {
        "mean": (with_tokens(lambda loss, mine, every, ranks: loss / every), "2 times too small"),
        "own": (with_tokens(lambda loss, mine, every, ranks: loss / mine), "own tokens"),
        "nobody is asked": (silent, "still divided by the rank's own"),
        "sum": (with_tokens(lambda loss, mine, every, ranks: loss), "grows with the batch"),
        "some wait": (some, "would wait for ever"),
        "squared": (with_tokens(lambda loss, mine, every, n: loss / every**2), "relative error"),
    }
    assert complaints(exercises.check_loss, "check_loss", right, wrong) == []


@pytest.mark.slow
def test_ranks_explorer_moves_as_the_task_says():
    recipe = TrainRecipe(
        model="llama-3.1-8b", amp_dtype="float16", lora_dropout=0.0, loss="lean", norm="native",
        attention="explicit_kv", optimizer="adamw", micro_batch_size=2, sequence_length=2048,
    )  # fmt: skip
    two = forecast(recipe, T4, strategy="fsdp2", world_size=2)
    explorer = widgets.ranks_explorer(recipe, {"fsdp2 on 2": two})
    assert f"fsdp2 on 2: {show_bytes(two.peak_allocated_bytes)}" in explorer.figure.alt
    explorer.controls["ranks"].value = 4
    held = float(re.search(r"fsdp2 on 4: ([\d.]+) GiB", explorer.picture.value)[1])
    assert 0.5 < held / (two.peak_allocated_bytes / GIB) < 1


def test_the_check_plays_ranks_that_agree():
    data = [torch.ones(n, 2, dtype=torch.float64) for n in (1, 3)]
    found = exercises.together(lambda loss, mine, all_reduce, ranks: loss, (1, 3), data)
    assert found.tolist() == [8.0, 8.0]  # (2 x 2 x 1 + 2 x 2 x 3) / 2
    assert bus.COLLECTIVES.keys() == {"allreduce_", "_allgather_base_", "_reduce_scatter_base_"}
