"""Right notebooks again, written after the grader came to ask several exercises in one child.

Many share something between exercises: a counter, a cache, a helper that is written anew, output,
memory. In a kernel that runs each from top to bottom all fourteen checks say "Right".
"""

from tests.instructor.right_notebooks import SOL, edit

BATCH = SOL["effective_batch_size"]
STEPS = SOL["steps_for"]
SPLIT = SOL["split_for"]
MEAN = SOL["mean_over_tokens"]
SECONDS = SOL["update_seconds"]
LARGEST = SOL["largest_micro_batch"]
RATE = SOL["learning_rate"]
LOUD = "    print('one more line of many, to see what happens' * 600)\n"


def everywhere(before_each="", first_line="", **more):
    """Every function with a decorator or an import above it, or a first line in its body."""
    changes = {}
    for name, text in SOL.items():
        head, colon, body = text.partition(":\n")
        changes[name] = before_each + head + colon + first_line + body
    return edit(changes, **more)


FRESH = {
    "calls_counted_by_all": everywhere(
        "@counted\n",
        top=[
            "from collections import Counter\nCALLS = Counter()\ndef counted(function):\n"
            "    def inner(*given):\n        CALLS[function.__name__] += 1\n"
            "        return function(*given)\n    return inner"
        ],
    ),
    "output_of_all": everywhere(first_line=LOUD),
    "log_kept_by_all": everywhere(
        first_line="    LOG.append(bytearray(1 << 20))\n", top=["LOG = []"]
    ),
    "logging_in_all": everywhere(
        first_line="    log.info('called')\n",
        top=["import logging\nlogging.basicConfig(level=logging.INFO)\nlog = logging.getLogger()"],
    ),
    "time_waited_in_all": everywhere(first_line="    time.sleep(0.05)\n", top=["import time"]),
    "one_exercise_calls_another": edit(
        {
            "steps_for": STEPS.replace(
                "micro_batch_size * gradient_accumulation_steps * world_size *",
                "effective_batch_size(micro_batch_size, gradient_accumulation_steps, world_size) *",
            )
        },
        end=["effective_batch_size = 32"],
    ),
    "helper_written_anew": edit(
        {
            "effective_batch_size": "def f(*x): return math.prod(x)\n"
            "def effective_batch_size(m, g, w): return f(m, g, w)",
            "steps_for": "def f(a, b): return -(-a // b)\n"
            + STEPS.replace("math.ceil(token_budget / t)", "f(token_budget, t)"),
            "mean_over_tokens": "f = sum\n" + MEAN.replace("sum(", "f("),
        }
    ),
    "setting_changed_between": edit(
        {
            "effective_batch_size": "UNIT = 1\n" + BATCH.replace("math.prod", "UNIT * math.prod"),
            "update_seconds": "UNIT = 1e12\n" + SECONDS.replace("/ 1e12", "/ UNIT"),
        },
        end=["UNIT = None"],
    ),
    "sets_a_setting_when_called": edit(
        {
            "effective_batch_size": BATCH.replace(
                "    return", "    global scale\n    scale = 7\n    return"
            ),
            "mean_over_tokens": "scale = 1\n" + MEAN.replace("return ", "return scale * "),
        }
    ),
    "sets_a_setting_of_a_later_one": edit(
        {
            "effective_batch_size": "late = 1\n"
            + BATCH.replace("    return", "    global late\n    late = 2\n    return"),
            "mean_over_tokens": MEAN.replace("return ", "return late / late * "),
        }
    ),
    "random_seeded": edit(
        {"mean_over_tokens": "import random\nrandom.seed(1)\nx = random.random()\n" + MEAN}
    ),
    "decimal_context": edit(
        {
            "effective_batch_size": "from decimal import Decimal, getcontext\n"
            "getcontext().prec = 50\ndef effective_batch_size(m, g, w):\n"
            "    return int(Decimal(m) * g * w)"
        }
    ),
    "overloads": edit(
        {
            "effective_batch_size": "from typing import overload\n@overload\n"
            "def effective_batch_size(m: int, g: int, w: int) -> int: ...\n@overload\n"
            "def effective_batch_size(m: float, g: float, w: float) -> float: ...\n"
            "def effective_batch_size(m, g, w):\n    return m * g * w"
        }
    ),
    "exec_defines_it": edit(
        {"effective_batch_size": "exec('def effective_batch_size(m, g, w): return m * g * w')"}
    ),
    "globals_defines_it": edit(
        {"effective_batch_size": "globals()['effective_batch_size'] = lambda m, g, w: m * g * w"}
    ),
    "table_of_functions": edit(
        {
            "effective_batch_size": "TABLE = {'effective_batch_size': lambda m, g, w: m * g * w}\n"
            "for name, function in TABLE.items():\n    globals()[name] = function"
        }
    ),
    "two_at_once": edit(
        {"effective_batch_size": "effective_batch_size, spare = (lambda m, g, w: m * g * w), 1"}
    ),
    "bisect_asks": edit(
        {
            "largest_micro_batch": "import bisect\ndef largest_micro_batch(per_rank, fits):\n"
            "    found = [d for d in range(1, per_rank + 1) if per_rank % d == 0]\n"
            "    at = bisect.bisect_left(found, True, key=lambda n: not fits(n))\n"
            "    return found[at - 1] if at else 0"
        }
    ),
    "oracle_remembered": edit(
        {
            "largest_micro_batch": "import functools\n"
            + LARGEST.replace("    divs", "    fits = functools.cache(fits)\n    divs", 1)
        }
    ),
    "else_of_loops": edit(
        {
            "split_for": "def split_for(total, ranks, budget, fixed, each):\n"
            "    share = total // ranks\n"
            "    for m in range(min(share, (budget - fixed) // each), 0, -1):\n"
            "        if share % m == 0:\n            break\n    else:\n        m = 0\n"
            "    return [m, share // m]"
        }
    ),
    "finally_and_suppress": edit(
        {
            "steps_for": "from contextlib import suppress\n"
            + STEPS.replace(
                "    return [t,", "    with suppress(KeyError):\n        {}[1]\n    return [t,"
            )
        }
    ),
    "positional_only_and_defaults": edit(
        {
            "effective_batch_size": "def effective_batch_size(m, g, w, /, *, verbose=False):\n"
            "    if verbose: print(m)\n    return m * g * w"
        }
    ),
    "compiled_text": edit(
        {
            "effective_batch_size": "FORMULA = compile('m * g * w', 'formula', 'eval')\n"
            "def effective_batch_size(m, g, w):\n    return eval(FORMULA)"
        }
    ),
    "tests_in_the_notebook": edit(
        end=[
            "import doctest, unittest\ndoctest.testmod()\nclass T(unittest.TestCase):\n"
            "    def test_it(self): self.assertEqual(effective_batch_size(1, 2, 3), 6)\n"
            "unittest.main(argv=[''], exit=False, verbosity=2)",
            "assert effective_batch_size(2, 16, 1) == 32, 'oh no'",
        ]
    ),
    "checked_in_a_loop": edit(
        end=["for name in json.loads(PUBLIC): check(name, PUBLIC, globals())"]
    ),
    "own_answers_inspected": edit(
        top=["import inspect, __main__"],
        end=["print(inspect.signature(effective_batch_size))", "effective_batch_size??", "?sum"],
    ),
    "emoji_and_errors_printed": edit(
        {
            "effective_batch_size": "import sys, warnings\n"
            + BATCH.replace(
                "    return",
                "    print('✓ готово 🎉', file=sys.stderr)\n    warnings.warn('slow')\n"
                "    sys.stdout.write('x')\n    sys.stdout.flush()\n    return",
            )
        }
    ),
    "colab_drive": edit(
        top=[
            "from google.colab import drive, files\ndrive.mount('/content/drive')",
            "import os\nos.chdir('/content/drive/MyDrive')",
            "#@title Settings { run: 'auto' }\nLR = 2e-4 #@param {type:'number'}",
        ]
    ),
    "int_of_its_own": edit(
        {
            "effective_batch_size": "class Count(int):\n    '''A number of things.'''\n"
            "def effective_batch_size(m, g, w):\n    return Count(m * g * w)"
        }
    ),
    "class_with_slots": edit(
        {
            "effective_batch_size": "class Run:\n    __slots__ = ('m', 'g', 'w')\n"
            "    def __init__(self, m, g, w):\n        self.m, self.g, self.w = m, g, w\n"
            "    @property\n    def size(self): return self.m * self.g * self.w\n"
            "def effective_batch_size(*given):\n    return Run(*given).size"
        }
    ),
    "nonlocal_inside": edit(
        {
            "effective_batch_size": "def effective_batch_size(*factors):\n    total = 1\n"
            "    def times(x):\n        nonlocal total\n        total *= x\n"
            "    for x in factors: times(x)\n    return total"
        }
    ),
    "default_that_grows": edit(
        {
            "effective_batch_size": "def effective_batch_size(m, g, w, seen=[]):\n"
            "    seen.append((m, g, w))\n    return math.prod(seen[-1])"
        }
    ),
    "custom_exception_for_flow": edit(
        {
            "learning_rate": "class Warming(Exception): pass\n"
            + RATE.replace(
                "    if step < w:\n        return peak * (step / w)\n",
                "    try:\n        if step < w: raise Warming(peak * (step / w))\n"
                "    except Warming as found:\n        return found.args[0]\n",
            )
        }
    ),
    "sum_shadowed_inside": edit(
        {
            "mean_over_tokens": "def mean_over_tokens(means, tokens):\n    sum = 0\n"
            "    for mean, count in zip(means, tokens):\n        sum += (mean or 0) * count\n"
            "    return sum / math.fsum(tokens)"
        }
    ),
    "last_output_used": edit(
        top=["2 * 16", "FACTOR = _ // 32"],
        changes={"effective_batch_size": BATCH.replace("return ", "return FACTOR * ")},
    ),
}
