"""The check inside a student's notebook: one sentence about the public cases, never an exception.

`instructor.build` copies this file's functions into the notebook, so they need the standard library
only. The grader compares answers with the same `same`, and believes nothing that a notebook says.
"""

import copy
import json
import math
import time

NOT_ATTEMPTED = "Not attempted yet: replace the `...` by your code and run both cells."


class TooMany(Exception):
    """A function asked its oracle more often than the exercise allows."""


def same(answer, expected, rel_tolerance=0.0):
    """Whether an answer is the expected one: true is not 1, 4.0 is 4, a tuple may be a list."""
    if isinstance(answer, bool) or isinstance(expected, bool):
        return answer is expected
    if isinstance(answer, (int, float)) and isinstance(expected, (int, float)):
        try:
            return answer == expected or math.isclose(answer, expected, rel_tol=rel_tolerance)
        except OverflowError:  # an integer beyond every float
            return False
    if isinstance(answer, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(answer) == len(expected) and all(
            same(a, e, rel_tolerance) for a, e in zip(answer, expected, strict=True)
        )
    if isinstance(answer, dict) and isinstance(expected, dict):
        return answer.keys() == expected.keys() and all(
            same(answer[key], expected[key], rel_tolerance) for key in expected
        )
    return type(answer) is type(expected) and answer == expected


def plain(answer):
    """What the grader makes of an answer: arrays and tuples are lists, exact numbers are floats."""
    if hasattr(answer, "tolist"):
        answer = answer.tolist()
    if isinstance(answer, (list, tuple)):
        return [plain(part) for part in answer]
    if isinstance(answer, dict):
        return {key: plain(part) for key, part in answer.items()}
    if not isinstance(answer, (int, float)) and hasattr(type(answer), "__float__"):
        return float(answer)  # Fraction, Decimal
    return answer


def unfinished(answer):
    """Whether there is still a `...` in it."""
    parts = answer.values() if isinstance(answer, dict) else answer
    return answer is ... or isinstance(answer, (list, tuple, dict)) and any(map(unfinished, parts))


def oracle(case):
    """What a case's function may ask: whether a number is at most the one that the case knows."""
    asked = []

    def ask(number):
        asked.append(number)
        if len(asked) > case["most_questions"]:
            raise TooMany
        return number <= case["knows"]

    return ask


def show_call(name, case):
    """A case as the call that it makes, and shortened if it is long."""
    arguments = [*map(repr, case["arguments"]), *([case["oracle"]] if case["oracle"] else [])]
    text = f"{name}({', '.join(arguments)})"
    return text if len(text) < 160 else f"{text[:150]} ...)"


def attempt(name, function, case, mistakes):
    """The function's answer to one case, and the sentence that ends the check; one is None."""
    arguments = copy.deepcopy(case["arguments"])
    if case["oracle"]:
        arguments.append(oracle(case))
    try:
        answer = function(*arguments)
    except TooMany:
        return None, f"Not yet: {mistakes['too many questions']}"
    except (Exception, SystemExit) as error:
        if "llipsis" in str(error):
            return None, NOT_ATTEMPTED
        return None, f"Not yet: {show_call(name, case)} raised {type(error).__name__}: {error}"
    return answer, NOT_ATTEMPTED if unfinished(answer) else None


def judge(name, function, cases, mistakes):
    """One sentence about a function: its public cases, or the mistake that explains them all."""
    answers = []
    for case in cases:
        answer, problem = attempt(name, function, case, mistakes)
        if problem:
            return problem
        answers.append(answer)
    fits = [
        same(plain(a), case["expected"], case["rel_tolerance"])
        for a, case in zip(answers, cases, strict=True)
    ]
    if all(fits):
        return f"Right: all {len(cases)} public cases. Grading adds cases with other numbers."
    for mistake, sentence in mistakes.items():
        explained = [
            same(plain(a), case["mistakes"].get(mistake, case["expected"]), 1e-9)
            for a, case in zip(answers, cases, strict=True)
        ]
        if all(explained):
            return f"Not yet: {sentence}"
    wrong = fits.index(False)
    return wrong_answer(name, answers[wrong], cases[wrong])


def wrong_answer(name, answer, case):
    """What to say of an answer that no known mistake explains."""
    if answer is None:
        return f"Not yet: {show_call(name, case)} returns nothing; is a `return` missing?"
    kind = "" if type(answer) is type(case["expected"]) else f" ({type(answer).__name__})"
    return (
        f"Not yet: {show_call(name, case)} should give {case['expected']!r}, "
        f"got {str(answer)[:80]}{kind}."
    )


def slow(seconds, most):
    """What to say of a right answer that comes late; None if it does not."""
    if most is None or seconds <= most / 2:
        return None
    return (
        f"Right, but slow: the public cases took {seconds:.1f} s of processor time, and grading "
        f"stops a function after {most:g} s for these and the hidden ones together."
    )


def check(name, public, namespace, clock=time.process_time):
    """Print what `judge` says of the notebook's function `name`."""
    function = namespace.get(name)
    if not callable(function):
        print(f"Not yet: there is no function {name}; run its cell, and keep its name.")
        return
    exercise = json.loads(public)[name]
    try:
        start = clock()
        said = judge(name, function, exercise["cases"], exercise["mistakes"])
        late = slow(clock() - start, exercise.get("cpu_seconds"))
        print(late if late and said.startswith("Right") else said)
    except Exception as error:  # an answer can be anything, and print or compare as it likes
        print(
            f"Not yet: your answer cannot be looked at ({type(error).__name__}); return numbers, "
            "words, lists or dictionaries."
        )
