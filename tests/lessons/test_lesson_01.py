"""Lesson 01's exercises: references pass, named mistakes fail in own words; and the glossary."""

import functools
import re
import types
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Qwen2Config

from course_utils.exercises import lesson_01
from course_utils.exercises.lesson_01 import FULL
from fitcast import fake_model, forecast_step, gpus, models
from fitcast.forecasting.fake import fake_tensors, meta_model, on_fake_tensors
from fitcast.memory.ledger import MemoryLedger
from fitcast.step import qlora
from fitcast.units import GIB, MIB
from tests.lessons.exercises import complaints
from tools.notebooks import lesson_scripts

BUDGET = 120 * MIB


@functools.cache
def two_steps(recipe, budget_bytes=None, foreach=None):
    model = qlora.load_base(recipe)
    optimizer = qlora.build_optimizer(model, recipe)
    optimizer.param_groups[0]["foreach"] = foreach
    ids = torch.zeros(recipe.micro_batch_size, recipe.sequence_length, dtype=torch.long)
    with MemoryLedger(model, inputs=ids, budget_bytes=budget_bytes) as ledger:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.report()


@pytest.fixture(scope="module")
def full():
    return two_steps(FULL)


def numbers(hidden, kv, intermediate, heads):
    return 2 * (3 * hidden + 1) + 2 * hidden + 2 * kv + heads + 4 * intermediate


@pytest.mark.parametrize(
    "kind", [int, *(pytest.param(other, marks=pytest.mark.slow) for other in (float, torch.tensor))]
)
def test_saved_numbers(kind):
    wrong = {
        "bytes": (lambda *w: 4 * numbers(*w), "count numbers"),
        "no grouped queries": (lambda h, kv, f, n: numbers(h, h, f, n), "not hidden (grouped"),
        "no log-sum-exp": (lambda h, kv, f, n: numbers(h, kv, f, n) - n, "log-sum-exp"),
        "no attention output": (lambda h, kv, f, n: numbers(h, kv, f, n) - h, "o_proj needs it"),
        "three MLP tensors": (lambda h, kv, f, n: numbers(h, kv, f, n) - f, "the MLP keeps 4"),
        "the boundary alone": (lambda h, kv, f, n: h, "should give 3208, got 192"),
        "only right for the bundled shape": (lambda h, kv, f, n: 3208, "(4096, 4096, 11008, 32)"),
    }
    right = [lambda *widths: kind(numbers(*widths))]
    assert complaints(lesson_01.check_saved_numbers, "check_saved_numbers", right, wrong) == []


def check_largest_batch(answer):
    return lesson_01.check_largest_batch(answer, two_steps, FULL, BUDGET)


def test_largest_batch():
    wrong = {
        "MB for MiB": (11, "12 fits as well; 11 comes out when MB (10**6) are used"),
        "half a sequence": (12.5, "a whole number of sequences from 1, got 12.5"),
        "none": (0, "a whole number"),
        "a truth": (True, "a whole number"),
    }
    assert complaints(check_largest_batch, "check_largest_batch", [12], wrong) == []


@pytest.mark.slow
def test_largest_batch_knows_where_a_wrong_one_comes_from():
    wrong = {
        "one too small": (10, "11 fits as well."),
        "forgot the optimizer state": (
            13,
            "that runs out of memory; 13 comes out when the weights are subtracted and the "
            "optimizer state",
        ),
        "forgot all that stays": (14, "when weights and optimizer state, which are there whatever"),
        "scaled the whole peak": (9, "when the whole peak is scaled"),
        "took two sequences for one": (6, "when the difference of the two runs, which is two"),
        "far too large": (40, "that runs out of memory."),
    }
    right = [12.0, torch.tensor(12)]
    assert complaints(check_largest_batch, "check_largest_batch", right, wrong) == []


def test_logits_at_peak(full):
    copies, each = 3, 512 * 1280 * 4
    wrong = {
        "one copy": (each, "that is one copy"),
        "with the embedding": (copies * each + 3 * 1280 * 192 * 4, "embedding matrix in it"),
        "everything": (full.peak_bytes, "that is everything at the peak"),
        "in MiB": (7.5, "factor of 1024**2"),
        "text": ("7.5 MiB", "a number is asked for, got str"),
    }

    def check(answer):
        return lesson_01.check_logits_at_peak(answer, full, vocab_size=1280)

    right = [copies * each, torch.tensor(copies * each)]
    assert complaints(check, "check_logits_at_peak", right, wrong) == []
    makers = "_log_softmax, nll_loss_backward, _log_softmax_backward_data"
    assert f"3 copies ({makers})" in check(copies * each).message


@pytest.mark.slow
@pytest.mark.parametrize("foreach", [None, True])
def test_largest_batch_is_what_the_budget_allows(foreach):
    two_steps(replace(FULL, micro_batch_size=12), BUDGET, foreach)
    with pytest.raises(torch.OutOfMemoryError, match="The budget is 120.00 MiB"):
        two_steps(replace(FULL, micro_batch_size=13), BUDGET, foreach)


@pytest.mark.slow
def test_two_and_four_tell_where_adamw_takes_all_weights_at_once():
    """As on a GPU by default: batch 1 peaks in the optimizer's step, and would mislead."""
    one, two, four = (
        two_steps(replace(FULL, micro_batch_size=size), foreach=True) for size in (1, 2, 4)
    )
    phases = [report.peak_phase for report in (one, two, four)]
    assert phases == ["optimizer", "backward", "backward"]
    each = (four.peak_bytes - two.peak_bytes) // 2
    assert (BUDGET - (two.peak_bytes - 2 * each)) // each == 12


def whole_game(lines: set[int]) -> int:
    """The peak of the lesson's first run on a pretended T4, with some of its three lines."""
    dtype = torch.float16 if 1 in lines else torch.float32
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of names
        model = meta_model(models.config("llama-3.2-3b"), dtype)
        if 2 in lines:
            model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))
        if 3 in lines:
            model.gradient_checkpointing_enable()
    trained = [p for p in on_fake_tensors(model).parameters() if p.requires_grad]
    with fake_tensors():
        ids, optimizer = torch.zeros(4, 1024, dtype=torch.long), torch.optim.AdamW(trained)
        with MemoryLedger(model, inputs=ids, budget_bytes=gpus.T4.usable_bytes) as ledger:
            for _ in range(2):
                model(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    return ledger.report().peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lines", "where"),
    [
        (set(), "layers.2"),
        ({1, 2}, "layers.18"),
        ({1, 3}, "the optimizer's step"),
        ({2, 3}, "lm_head"),
    ],
)
def test_each_of_the_three_lines_is_needed(lines, where):
    with pytest.raises(torch.OutOfMemoryError, match=f"The budget is 14.42 GiB .*, in .*{where}"):
        whole_game(lines)


@pytest.mark.slow
def test_the_three_lines_together_are_enough():
    assert whole_game({1, 2, 3}) < gpus.T4.usable_bytes


QWEN = {  # Qwen2.5-0.5B, as its config.json and model card have it
    "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
    "num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip


def script_on_a_t4(folder, tokens: int, **options):
    """The forecast of the steps of "In your script", and the model's number of weights."""
    model = fake_model(str(folder))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, **options)

    def step(model):
        ids = torch.zeros(1, tokens, dtype=torch.long, device="cuda")
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    return forecast_step(model, step, gpus.T4), model.num_parameters()


@pytest.mark.slow
def test_what_the_script_is_expected_to_show(tmp_path):
    """Few tokens: three holders of 7.36 GiB, and the optimizer's temporary above them."""
    Qwen2Config(**QWEN).save_pretrained(tmp_path)
    short, weights = script_on_a_t4(tmp_path, 512)
    fused, _ = script_on_a_t4(tmp_path, 512, fused=True)
    long, _ = script_on_a_t4(tmp_path, 2048)
    assert weights == 494_032_768
    assert short.fits and 9 * GIB < short.peak_allocated_bytes < 9.5 * GIB
    assert short.composition["temporaries"] >= 4 * weights
    assert 16 * weights < fused.peak_allocated_bytes < 9 * GIB
    assert not long.fits and long.composition["activations"] > 4 * GIB
    with fake_tensors():  # a CPU's, where AdamW goes from one weight to the next
        on_a_cpu = on_fake_tensors(meta_model(Qwen2Config(**QWEN), torch.float32))
        ids = torch.zeros(1, 512, dtype=torch.long)
        optimizer = torch.optim.AdamW(on_a_cpu.parameters())
        with MemoryLedger(on_a_cpu, inputs=ids) as ledger:
            for _ in range(2):
                on_a_cpu(input_ids=ids, labels=ids).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert 8 * GIB < ledger.report().peak_bytes < 8.5 * GIB


def test_what_the_lessons_hooks_saw_is_gone_afterwards():
    """PyTorch keeps a tensor for ever whose own node was handed it back by a hook."""
    source = lesson_scripts(["01"])[0].read_text("utf-8")
    (function,) = re.findall(r"^def kept_for_backward.*?(?=^\n|\n# %%)", source, re.M | re.S)
    names = {"torch": torch}
    exec(function, names)  # the lesson's own lines
    seen = []
    model = on_watch = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Softmax(-1))

    class Told(torch.nn.Module):
        parameters = on_watch.parameters

        def forward(self, input_ids, labels):
            probabilities = model(input_ids)  # softmax keeps what it made
            seen.append(weakref.ref(probabilities.untyped_storage()))
            return types.SimpleNamespace(loss=probabilities.sum())

    assert names["kept_for_backward"](Told(), torch.ones(2, 4)) > 0
    assert seen[0]() is None


def words(term: str) -> set[str]:
    """A term's own words, whatever their order, form and case."""
    said = re.findall(r"[\w-]+", re.sub(r"['’]s\b", "", term.lower()))
    return {word.removesuffix("s") for word in said} - {"the", "and"}


def missing_terms(lesson: str, number: str, glossary: str) -> list[str]:
    """New concepts of a lesson for which the glossary has no line with a link to it."""
    lines = re.findall(r"^\| (.+?) \| .* \| \[(\d\d)\]\((\w+)\.ipynb\) \|$", glossary, re.M)
    known = [words(term) for term, link, target in lines if link == number == target[:2]]
    prose = " ".join(re.findall(r"^# (.*)", lesson, re.M))
    new = re.search(r"New concepts \(\d\):\*\* (.*?)\. Each", prose)[1].split(" · ")
    return [term for term in new if not any(words(term) <= line for line in known)]


@pytest.mark.parametrize("path", lesson_scripts(), ids=lambda path: path.stem)
def test_glossary_has_each_new_concept(path):
    glossary = path.with_name("glossary.md").read_text("utf-8")
    assert missing_terms(path.read_text("utf-8"), path.stem[:2], glossary) == []
    links = set(re.findall(r"\((0\d_\w+)\.ipynb\)", glossary))
    assert links == {script.stem for script in lesson_scripts()}


def test_term_that_the_glossary_lacks_is_found():
    path = lesson_scripts(["01"])[0]
    lesson, glossary = path.read_text("utf-8"), path.with_name("glossary.md").read_text("utf-8")
    assert missing_terms(lesson, "01", glossary.replace("**logits term**", "logit")) == [
        "the logits term"
    ]
    assert len(missing_terms(lesson, "02", glossary)) == 5
