"""Lesson 01's exercises: references pass, named mistakes fail in own words; and the glossary."""

import functools
import re
from dataclasses import replace

import pytest
import torch

from course_utils.exercises import lesson_01
from course_utils.exercises.checks import not_yet, right
from course_utils.exercises.lesson_01 import FULL
from fitcast.memory.ledger import MemoryLedger
from fitcast.step import qlora
from fitcast.units import MIB
from tools.notebooks import lesson_scripts

BUDGET = 120 * MIB


@functools.cache
def two_steps(recipe, budget_bytes=None):
    model = qlora.load_base(recipe)
    optimizer = qlora.build_optimizer(model, recipe)
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


def unfinished(hidden, kv, intermediate, heads):
    attention = ...
    return 2 * (3 * hidden + 1) + attention


def judge_formula(check, answer, full):
    return check(answer)


def judge_batch(check, answer, full):
    return check(answer, two_steps, FULL, BUDGET)


def judge_logits(check, answer, full):
    return check(answer, full, vocab_size=1280)


# exercise: (how to call its check, reference, {wrong answer's name: answer}, untouched)
EXERCISES = {
    "check_saved_numbers": (
        judge_formula,
        numbers,
        {
            "bytes": lambda *w: 4 * numbers(*w),
            "no grouped queries": lambda h, kv, f, n: numbers(h, h, f, n),
            "no log-sum-exp": lambda h, kv, f, n: numbers(h, kv, f, n) - n,
            "no attention output": lambda h, kv, f, n: numbers(h, kv, f, n) - h,
            "three MLP tensors": lambda h, kv, f, n: numbers(h, kv, f, n) - f,
            "the boundary alone": lambda h, kv, f, n: h,
            "only right for the bundled shape": lambda h, kv, f, n: 3208,
        },
        unfinished,
    ),
    "check_largest_batch": (
        judge_batch,
        12,
        {
            "one too small": 10,
            "MB for MiB": 11,
            "forgot all that stays": 14,
            "forgot the optimizer state": 13,
            "scaled the whole peak": 4,
            "far too large": 40,
            "half a sequence": 12.5,
        },
        ...,
    ),
    "check_logits_at_peak": (
        judge_logits,
        3 * 512 * 1280 * 4,
        {
            "one copy": 512 * 1280 * 4,
            "with the embedding": 3 * 512 * 1280 * 4 + 3 * 1280 * 192 * 4,
            "in MiB": 7.5,
            "text": "7.5 MiB",
        },
        ...,
    ),
}


def complaints(name, check, full) -> list[str]:
    """What is wrong with a check, going by answers whose verdict is known."""
    judge, reference, mistakes, untouched = EXERCISES[name]
    found = []
    if not judge(check, reference, full).passed:
        found.append(f"refuses the reference: {judge(check, reference, full)}")
    verdicts = {mistake: judge(check, answer, full) for mistake, answer in mistakes.items()}
    found += [f"accepts {mistake}" for mistake, verdict in verdicts.items() if verdict.passed]
    if len({repr(verdict) for verdict in verdicts.values()}) < len(verdicts):
        found.append("says the same of different mistakes")
    for answer in (untouched, ...):
        verdict = judge(check, answer, full)
        if verdict.passed is not None or "not attempted yet" not in repr(verdict).lower():
            found.append(f"says of an untouched exercise: {verdict}")
    return found


@pytest.mark.parametrize("name", EXERCISES)
def test_check_knows_right_from_wrong(name, full):
    assert complaints(name, getattr(lesson_01, name), full) == []


@pytest.mark.parametrize("name", EXERCISES)
@pytest.mark.parametrize(
    ("stub", "complaint"),
    [
        (lambda *_, **__: right("well done."), "accepts"),
        (lambda *_, **__: not_yet("no."), "refuses the reference"),
    ],
    ids=["accepts everything", "refuses everything"],
)
def test_check_that_judges_nothing_is_caught(name, stub, complaint, full):
    found = complaints(name, stub, full)
    assert any(complaint in text for text in found)
    assert any("untouched" in text for text in found)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (11, "you used MB (10**6) where the budget is in MiB"),
        (14, "on an empty card"),
        (13, "the optimizer state stays"),
        (4, "you scaled the whole peak"),
        (10, "11 fits as well"),
        (40, "that runs out of memory"),
        (12.5, "a whole number"),
        (0, "a whole number"),
    ],
)
def test_largest_batch_names_the_mistake(answer, words):
    verdict = lesson_01.check_largest_batch(answer, two_steps, FULL, BUDGET)
    assert words in repr(verdict)


def test_largest_batch_is_what_the_budget_allows():
    two_steps(replace(FULL, micro_batch_size=12), BUDGET)
    with pytest.raises(torch.OutOfMemoryError, match="The budget is 120.00 MiB"):
        two_steps(replace(FULL, micro_batch_size=13), BUDGET)


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
