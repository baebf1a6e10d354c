"""Lesson 03's exercises: the reference passes, each named mistake fails in its own words."""

import contextlib
import math
import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)
from transformers.modeling_outputs import CausalLMOutput

from course_utils import data
from course_utils.data import BUNDLED
from course_utils.exercises import lesson_03
from course_utils.figures import widgets
from course_utils.topics import trainer_log
from fitcast import gpus
from fitcast.forecasting.forecast import forecast
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training import batching
from fitcast.training.batching import labelled_tokens
from fitcast.units import MIB
from tests.lessons.exercises import complaints, prose
from tools.notebooks import lesson_scripts


def schedule(epoch_steps, warmup_of=None, lines_of=None, ranks_of=lambda ranks: ranks):
    """A learner's function, from what it takes for the steps of the epochs."""

    def answer(examples, micro_batch_size, accumulation, ranks, epochs, warmup, logging_steps):
        micro_batches = math.ceil(examples / (micro_batch_size * ranks_of(ranks)))
        steps = epoch_steps(micro_batches, accumulation, epochs)
        seen = epochs * micro_batches
        return (
            steps,
            math.ceil(warmup * steps) if warmup_of is None else warmup_of(warmup, steps, seen),
            steps // logging_steps if lines_of is None else lines_of(seen, logging_steps),
        )

    return answer


def steps(micro_batches, accumulation, epochs):
    return epochs * math.ceil(micro_batches / accumulation)


def by(weight_of):
    """A learner's accumulation, from the weight that it gives a micro batch's mean."""

    def answer(model, micro_batches):
        for micro_batch in micro_batches:
            (model(**micro_batch).loss * weight_of(micro_batch, micro_batches)).backward()

    return answer


def total(micro_batches):
    return sum(map(labelled_tokens, micro_batches))


def unshifted(micro_batch):
    return int((micro_batch["labels"] != -100).sum())


def backward_at_the_end(model, micro_batches):
    sum(
        model(**m).loss * labelled_tokens(m) / total(micro_batches) for m in micro_batches
    ).backward()


def all_at_once(model, micro_batches):
    model(
        **{name: torch.cat([m[name] for m in micro_batches]) for name in micro_batches[0]}
    ).loss.backward()


def clears(model, micro_batches):
    for m in micro_batches:
        model.zero_grad()
        (model(**m).loss * labelled_tokens(m) / total(micro_batches)).backward()


def only_forward(model, micro_batches):
    for m in micro_batches:
        model(**m)


def bisect(train, upper, caught=torch.OutOfMemoryError):
    good, bad = 0, upper + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        fits = True
        try:
            train(middle)
        except caught:
            fits = False
        good, bad = (middle, bad) if fits else (good, middle)
    return good


def linear(train, upper):
    for size in range(1, upper + 1):
        try:
            train(size)
        except torch.OutOfMemoryError:
            return size - 1
    return upper


def powers_of_two(train, upper):
    size = 1
    try:
        while size <= upper:
            train(size)
            size *= 2
    except torch.OutOfMemoryError:
        pass
    return size // 2


def inside_except(train, upper, good=0, bad=None):
    bad = upper + 1 if bad is None else bad
    if bad - good <= 1:
        return good
    middle = (good + bad) // 2
    try:
        train(middle)
    except torch.OutOfMemoryError:
        return inside_except(train, upper, good, middle)
    return inside_except(train, upper, middle, bad)


def leaks_once(train, upper):
    """The first failure is still alive when the next attempt begins; later ones are gone."""
    try:
        train(upper)
    except torch.OutOfMemoryError:
        with contextlib.suppress(torch.OutOfMemoryError):
            train(1)
    return bisect(train, upper)


def hides_errors(train, upper):
    def quiet(size):
        try:
            train(size)
        except torch.OutOfMemoryError:
            raise
        except ValueError:
            pass

    return bisect(quiet, upper)


def hides_runtime_errors(train, upper):
    """`torch.OutOfMemoryError` is a RuntimeError, so this finds every limit."""
    return bisect(train, upper, caught=RuntimeError)


THREE = TrainRecipe(model="llama-3.2-3b", sequence_length=2048, amp_dtype="float16")


def plan(micro, accumulation, forget):
    return {
        "micro_batch_size": micro,
        "gradient_accumulation_steps": accumulation,
        "checkpointed_layers": forget,
    }


@pytest.mark.slow
def test_effective_batch():
    wrong = {
        "two at a time": (plan(2, 16, 28), "fewer sequences at a time leave room"),
        "nothing is spent": (plan(1, 32, 28), "the room for layers that remember is not spent"),
        "on the edge": (plan(1, 32, 16), "tight, with 13.22 GiB in tensors"),
        "the ones that remember": (plan(1, 32, 10), "counts the layers that forget, not"),
        "all at once": (plan(32, 1, 28), "no layer is left to forget: smaller micro batches"),
        "too many remember": (plan(2, 16, 14), "let more layers forget"),
        "the gaps are too many": (plan(2, 16, 24), "with the allocator's gaps is more than 14.42"),
        "half of it": (plan(1, 16, 20), "1 x 16 x 1 card makes 16 sequences"),
        "half a sequence": (plan(0.5, 64, 28), "micro_batch_size is a whole number from 1"),
        "more than there are": (plan(1, 32, 29), "the model has 28 layers, 29 cannot forget"),
        "text": (plan(1, 32, "all"), "a whole number from 0, got 'all'"),
        "half done": (plan(1, 32, ...), "1 of 3 `...` still there: `checkpointed_layers = ...`"),
    }
    right = [
        plan(1, 32, 18),
        plan(1.0, 32.0, 20.0),
        plan(torch.tensor(1), np.int64(32), np.float64(22)),
        plan(np.array(1), torch.tensor(32.0), 26),
        plan(*range(1, 2), 32, 24),
    ]

    def check(answer):
        return lesson_03.check_effective_batch(answer, THREE, gpus.T4)

    assert complaints(check, "check_effective_batch", right, wrong) == []


def test_a_plan_that_does_not_make_32_needs_no_forecast():
    said = lesson_03.check_effective_batch(plan(2, 8, 28), THREE, gpus.T4)
    assert "2 x 8 x 1 card makes 16 sequences behind an update; 32 are asked for" in repr(said)


def test_only_the_first_label_is_kept():
    rows = [{"input_ids": [1, 2, 3, 4], "labels": [-100, 2, 3, 4]} for _ in range(2)]
    first, second = lesson_03.keep_first_token(rows, of_answers=1)
    assert first == {"input_ids": [1, 2, 3, 4], "labels": [-100, 2, -100, -100]}
    assert second == rows[1] == rows[0]


def test_chance_cuts_answers_from_their_end_and_more_of_them_short():
    rows = [{"input_ids": [7] * 65, "labels": [-100, *range(64)]} for _ in range(200)]
    found = lesson_03.cut_by_chance(rows)
    lengths = [sum(label >= 0 for label in row["labels"]) for row in found]
    assert all(
        row["labels"] == [-100, *range(n), *[-100] * (64 - n)]
        for row, n in zip(found, lengths, strict=True)
    )
    assert min(lengths) == 1 and max(lengths) > 56 and 6 <= sorted(lengths)[100] <= 11  # of 64
    assert rows[0]["labels"][-1] == 63 and found == lesson_03.cut_by_chance(rows)


def half_done_search(train, upper):
    good, bad = 0, upper + 1
    while bad - good > 1:
        good, bad = ..., ...
    return good


# exercise: {what is wrong with an answer: (answer, words of its verdict)}
WRONG = {
    "check_schedule": {
        "counts micro batches": (
            schedule(lambda n, _, epochs: epochs * n),
            "those are micro batches",
        ),
        "drops the rest": (
            schedule(lambda n, accumulation, epochs: epochs * (n // accumulation)),
            "round up",
        ),
        "carries the rest over": (
            schedule(lambda n, accumulation, epochs: math.ceil(epochs * n / accumulation)),
            "does not run on into the next epoch",
        ),
        "carries the rest over, and drops the last": (
            schedule(lambda n, accumulation, epochs: epochs * n // accumulation),
            "does not run on into the next epoch",
        ),
        "and rounds the warm-up down": (
            schedule(
                lambda n, accumulation, epochs: epochs * n // accumulation,
                lambda warmup, n, _: int(warmup * n),
            ),
            "does not run on into the next epoch",
        ),
        "warm-up in micro batches": (
            schedule(steps, lambda warmup, _, seen: math.ceil(warmup * seen)),
            "not of the micro batches",
        ),
        "warm-up rounded down": (
            schedule(steps, lambda warmup, n, _: int(warmup * n)),
            "a share of a warm-up step",
        ),
        "logs micro batches": (
            schedule(steps, lines_of=lambda seen, every: seen // every),
            "`logging_steps` counts optimizer steps",
        ),
        "forgets the ranks": (schedule(steps, ranks_of=lambda _: 1), "only its share"),
        "one number": (lambda *_: 4, "should give"),
        "divides by zero": (lambda *_: 1 / 0, "ZeroDivisionError"),
        "not a function": (12, "a function is asked for"),
    },
    "check_accumulation": {
        "mean of means": (by(lambda _, all_: 1 / len(all_)), "the mean of the micro batches'"),
        "adds means": (by(lambda *_: 1), "adds the means up"),
        "by all tokens": (by(lambda _, all_: 1 / total(all_)), "not multiplied by its own first"),
        "counts position 0": (
            by(lambda m, all_: unshifted(m) / sum(map(unshifted, all_))),
            "labels[:, 1:]",
        ),
        "does not divide": (by(lambda m, _: labelled_tokens(m)), "nothing divides"),
        "clears in the loop": (clears, "only the last micro batch"),
        "backward at the end": (backward_at_the_end, "at most"),
        "all at once": (all_at_once, "let each micro batch's graph go"),
        "no backward": (only_forward, "backward() was not called"),
        "half of it": (by(lambda m, all_: labelled_tokens(m) / total(all_) / 2), "error"),
    },
    "check_search": {
        "linear": (linear, "38 attempts"),
        "powers of two": (powers_of_two, "32 trains, but so does 37"),
        "inside except": (inside_except, "began inside `except`"),
        "one leak": (leaks_once, "began inside `except`"),
        "first failure": (
            lambda train, upper: bisect(train, upper) + 1,
            "38 runs out of memory",
        ),
        "catches nothing": (lambda train, upper: train(upper), "came through"),
        "hides other errors": (hides_errors, "a ValueError is no lack of memory"),
        "hides RuntimeErrors": (
            hides_runtime_errors,
            "a RuntimeError is no lack of memory when",
        ),
        "64 built in": (lambda train, upper: bisect(train, 64), "10 was the largest"),
        "beyond upper": (lambda train, upper: bisect(train, 2 * upper), "64 was the largest"),
        "half a sequence": (lambda train, upper: train(upper / 3), "whole number"),
        "text": (lambda train, upper: f"{bisect(train, upper)} rows", "a number, got '37 rows'"),
        "half done": (half_done_search, "2 of 3 `...` still there: `good, bad = ..., ...`"),
    },
    "check_rank_loss": {
        "its own mean": (lambda loss_sum, mine, all_, ranks: loss_sum / mine, "own mean"),
        "forgets DDP": (
            lambda loss_sum, mine, all_, ranks: loss_sum / all_,
            "2 times too small",
        ),
        "a sum": (lambda loss_sum, mine, all_, ranks: loss_sum, "sum over tokens"),
        "own mean times ranks": (
            lambda loss_sum, mine, all_, ranks: loss_sum * ranks / mine,
            "still divided by the rank's own",
        ),
        "upside down": (
            lambda loss_sum, mine, all_, ranks: loss_sum * all_ / ranks,
            "error is",
        ),
        "detached": (lambda loss_sum, mine, all_, ranks: loss_sum.detach(), "RuntimeError"),
    },
}


RIGHT = {
    "check_schedule": [schedule(steps), lambda *case: torch.tensor(schedule(steps)(*case))],
    "check_accumulation": [by(lambda m, all_: labelled_tokens(m) / total(all_))],
    "check_search": [bisect, lambda train, upper: torch.tensor(bisect(train, upper))],
    "check_rank_loss": [lambda loss_sum, mine, all_, ranks: loss_sum * ranks / all_],
}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", WRONG)
def test_check_knows_right_from_wrong(monkeypatch, name, whole):
    """Counted by hand, on two micro batches; whole: against Trainer's runs, on four."""
    if not whole:
        monkeypatch.setattr(lesson_03, "scheduled", schedule(steps))
        monkeypatch.setattr(lesson_03, "uneven_batch", partial(lesson_03.uneven_batch, rows=4))
    assert complaints(getattr(lesson_03, name), name, RIGHT[name], WRONG[name]) == []


def test_other_ways_to_accumulate_pass():
    """What is checked is the gradient and the peak, not how they come about."""

    def by_num_items(model, micro_batches):
        for m in micro_batches:
            model(**m, num_items_in_batch=total(micro_batches)).loss.backward()

    def divides_gradients(model, micro_batches):
        for m in micro_batches:
            (model(**m).loss * labelled_tokens(m)).backward()
        for parameter in model.parameters():
            parameter.grad /= total(micro_batches)

    for answer in (by_num_items, divides_gradients):
        assert lesson_03.check_accumulation(answer).passed, answer


def test_other_searches_pass():
    """Doubling first, then halving, from 1 upwards."""

    def doubling(train, upper):
        def fits(size):
            try:
                train(size)
            except torch.OutOfMemoryError:
                return False
            return True

        good, bad = 0, 1
        while bad <= upper and fits(bad):
            good, bad = bad, 2 * bad
        bad = min(bad, upper + 1)
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if fits(middle) else (good, middle)
        return good

    assert lesson_03.check_search(doubling).passed


def test_a_search_may_look_at_other_errors_and_raise_them_again():
    def careful(train, upper):
        def passing_on(size):
            try:
                train(size)
            except RuntimeError as error:
                if not isinstance(error, torch.OutOfMemoryError):
                    raise
                fits = False
            else:
                fits = True
            return fits

        good, bad = 0, upper + 1
        while bad - good > 1:
            middle = (good + bad) // 2
            good, bad = (middle, bad) if passing_on(middle) else (good, middle)
        return good

    assert lesson_03.check_search(careful).passed


@pytest.mark.one_fast
@pytest.mark.parametrize(
    ("case", "counted"),
    [
        ((32, 2, 4, 1, 1, 0.5, 1), (4, 2, 4)),  # 16 micro batches
        ((20, 2, 4, 1, 2, 0.1, 2), (6, 1, 3)),  # 10 an epoch: two whole updates and a rest, twice
        ((40, 2, 4, 2, 2, 0.25, 2), (6, 2, 3)),  # the same 10 on each of two ranks
    ],
)
def test_trainer_counts_as_by_hand(case, counted):
    assert trainer_log.scheduled(*case) == counted


@pytest.mark.parametrize(("told", "times"), [(None, 16), (False, 1)])
def test_a_classifiers_head_ignores_the_count(tmp_path, told, times):
    """Plain Trainer on BERT, and what the lesson sets. transformers issue 47688."""
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config = BertConfig(vocab_size=100, hidden_dropout_prob=0, **sizes)
    rows = [{"input_ids": [n] * 8, "labels": n % 2} for n in range(32)]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=16, max_steps=1,
        logging_steps=1, learning_rate=0.0, report_to="none", use_cpu=True, save_strategy="no",
        disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(BertForSequenceClassification(config), arguments, train_dataset=rows)
    if told is not None:
        trainer.model_accepts_loss_kwargs = told
    trainer.train()
    logged = trainer.state.log_history[0]["loss"]
    assert logged == pytest.approx(times * trainer.evaluate(rows)["eval_loss"], rel=0.05)


@pytest.mark.parametrize("name", ["Repaired", "MyTrainer"])
@pytest.mark.parametrize(("ranks", "cards"), [(1, 1), (2, 1), (1, 2)])
def test_the_override_multiplies_by_the_gpus_as_trainer_does(name, ranks, cards):
    """What averages over GPUs divides by their number. transformers/trainer.py, `compute_loss`."""
    (path,) = lesson_scripts(["03"])
    written = re.search(
        rf"(?:# )?class {name}\(Trainer\):\n(?:(?:# )? {{4}}.*\n)+", path.read_text()
    )
    exec(re.sub("^# ", "", written[0], flags=re.M), {"Trainer": Trainer}, made := {})
    trainer = made[name].__new__(made[name])
    vars(trainer).update(
        model=None, label_smoother=None, compute_loss_func=None, model_accepts_loss_kwargs=True,
        is_deepspeed_enabled=False,
        accelerator=SimpleNamespace(parallelism_config=None, num_processes=ranks),
        args=SimpleNamespace(average_tokens_across_devices=True, n_gpu=cards),
    )  # fmt: skip

    def model(num_items_in_batch):
        return CausalLMOutput(loss=torch.tensor(12.0) / num_items_in_batch)

    assert trainer.compute_loss(model, {}, num_items_in_batch=4) == 3 * ranks * cards


def test_trainer_log_has_trainers_own_lines():
    rows = [{"input_ids": [1, 2, 3, 4], "attention_mask": [1] * 4, "labels": [-100, 2, 3, 4]}] * 6
    recipe = TrainRecipe(
        model=BUNDLED,
        base="float32",
        lora_rank=None,
        optimizer="adamw",
        micro_batch_size=1,
        gradient_accumulation_steps=3,
        max_steps=2,
        warmup_fraction=0.5,
    )
    padding = type("Tokenizer", (), {"pad_token_id": 0})
    log = trainer_log.trainer_log(recipe, rows, padding, logging_steps=1)
    assert [line["step"] for line in log] == [1, 2]
    assert [line["learning_rate"] for line in log] == [0.0, recipe.learning_rate]

    class Doubled(Trainer):
        def compute_loss(self, *args, **options):
            return 2 * super().compute_loss(*args, **options)

    one = trainer_log.trainer_log(
        replace(recipe, max_steps=1), rows, padding, Doubled, logging_steps=1
    )
    assert one[0]["loss"] == pytest.approx(2 * log[0]["loss"], rel=1e-5)


@pytest.mark.slow
def test_4_x_8_needs_what_the_bars_of_2_x_16_say():
    """The Task of section 3, by its own formula and the lesson's own function."""
    (path,) = lesson_scripts(["03"])
    lesson = path.read_text("utf-8")
    (two_updates,) = re.findall(r"^def two_updates.*?report\(\)$", lesson, re.M | re.S)
    (recipe,) = re.findall(r"^recipe = TrainRecipe\(.*?\)$", lesson, re.M | re.S)
    names = {
        "TrainRecipe": TrainRecipe, "data": data, "qlora": qlora, "torch": torch, "gpus": gpus,
        "batching": batching, "MemoryLedger": MemoryLedger,
    }  # fmt: skip
    exec(f"{recipe}\n{two_updates}", names)
    four = replace(names["recipe"], micro_batch_size=4, gradient_accumulation_steps=8)
    (said,) = re.findall(r"<code>(2 \* 40\.18 - 4 \* 5\.82)</code>, which is 57", prose("03"))
    assert names["two_updates"](four).peak_bytes / MIB == pytest.approx(eval(said), abs=0.1)


@pytest.mark.slow
def test_memory_follows_tokens_up_to_2048_a_sequence():
    """What the explorer's answer says of a T4, where longer rows pay for their scores."""

    def peak(micro_batch_size, sequence_length):
        recipe = TrainRecipe(
            model="llama-3.2-3b",
            micro_batch_size=micro_batch_size,
            sequence_length=sequence_length,
            gradient_accumulation_steps=2,
        )
        return forecast(recipe.for_gpu(gpus.T4), gpus.T4).peak_bytes

    for shape in ((4, 1024), (8, 512)):
        assert peak(*shape) == pytest.approx(peak(2, 2048), rel=0.01)
    assert 1.75 < peak(1, 8192) / peak(4, 2048) < 1.95  # nearly twice


@pytest.mark.slow
def test_the_widget_compares_a_split_with_the_whole():
    explorer = widgets.split_explorer()
    assert re.search(
        r"2 x 16: [\d.]+ GiB, fits .* 32 x 1: [\d.]+ GiB, does not fit", explorer.figure.alt
    )
    explorer.controls["effective_batch"].value = 8
    assert "2 x 4: " in explorer.picture.value and "8 x 1: " in explorer.picture.value
