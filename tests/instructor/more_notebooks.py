"""More right notebooks, written as students write and not after the grader; and some wrong ones.

`MORE` are right in a kernel that runs them cell by cell as their authors did; `WRONG` names the
functions that are wrong, though they are made to look otherwise.
"""

from tests.instructor.right_notebooks import SOL, edit

BATCH = SOL["effective_batch_size"]
STEPS = SOL["steps_for"]
SPLIT = SOL["split_for"]
MEAN = SOL["mean_over_tokens"]
PAD = SOL["real_and_padded"]
SECONDS = SOL["update_seconds"]
CARDS = SOL["compare_cards"]
LARGEST = SOL["largest_micro_batch"]
GRADIENT = SOL["combined_gradient"]


def only(function, text, **more):
    """A notebook in which one function is written so."""
    return edit({function: text}, **more)


MORE = {
    "lambda": only("effective_batch_size", "effective_batch_size = lambda m, g, w: m * g * w"),
    "partial": only(
        "effective_batch_size",
        "from functools import partial, reduce\nimport operator\n"
        "def times(start, *factors): return reduce(operator.mul, factors, start)\n"
        "effective_batch_size = partial(times, 1)",
    ),
    "callable_object": only(
        "effective_batch_size",
        "class Product:\n    def __call__(self, *factors):\n        return math.prod(factors)\n"
        "effective_batch_size = Product()",
    ),
    "static_method": only(
        "effective_batch_size",
        "class Tools:\n    @staticmethod\n    def batch(m, g, w):\n        return m * g * w\n"
        "effective_batch_size = Tools.batch",
    ),
    "factory": only(
        "effective_batch_size",
        "def make(scale):\n    def effective(m, g, w):\n        return scale * m * g * w\n"
        "    return effective\neffective_batch_size = make(1)",
    ),
    "decorated_with_a_clock": only(
        "steps_for",
        "import functools, time\ndef timed(function):\n    @functools.wraps(function)\n"
        "    def inner(*given):\n        start = time.perf_counter()\n        try:\n"
        "            return function(*given)\n        finally:\n"
        "            print(f'{function.__name__}: {time.perf_counter() - start:.3f} s')\n"
        "    return inner\n\n@timed\n" + STEPS,
    ),
    "global_counter": only(
        "steps_for",
        "CALLS = 0\n" + STEPS.replace("    t =", "    global CALLS\n    CALLS += 1\n    t =", 1),
    ),
    "star_arguments": only(
        "effective_batch_size", "def effective_batch_size(*all):\n    return math.prod(all)"
    ),
    "star_import": only("steps_for", "from math import *\n" + STEPS.replace("math.ceil", "ceil")),
    "annotated_with_numpy": only(
        "mean_over_tokens",
        "import numpy as np\n"
        + MEAN.replace("(means, tokens)", "(means: np.ndarray, tokens) -> np.float64", 1),
    ),
    "annotations_evaluated": only(
        "compare_cards",
        "from typing import NamedTuple, get_type_hints\nclass Card(NamedTuple):\n    m: int\n"
        "    a: int\n    s: float\n    mib: int\nassert get_type_hints(Card)['s'] is float\n"
        + CARDS.replace("    def need", "    t4, a10 = Card(*t4), Card(*a10)\n    def need", 1),
    ),
    "singledispatch": only(
        "mean_over_tokens",
        "from functools import singledispatch\n@singledispatch\ndef number(x):\n    return x\n"
        "@number.register\ndef _(x: None):\n    return 0\n" + MEAN.replace("(m or 0)", "number(m)"),
    ),
    "enum_and_dataclass": only(
        "compare_cards",
        "from dataclasses import dataclass, field\nfrom enum import Enum\nclass W(str, Enum):\n"
        "    TOKENS = 'tokens'\n@dataclass(order=True)\nclass Need:\n    fixed: int\n"
        "    parts: list = field(default_factory=list)\n    def all(self):\n"
        "        return self.fixed + sum(self.parts)\n"
        + CARDS.replace(
            "return fixed_mib + c[0] * sequence_mib",
            "return Need(fixed_mib, [sequence_mib] * c[0]).all()",
        ).replace('weighting == "tokens"', "weighting == W.TOKENS"),
    ),
    "generator_and_itertools": only(
        "real_and_padded",
        "from itertools import islice\ndef chunks(values, size):\n    values = iter(values)\n"
        "    while part := list(islice(values, size)):\n        yield part\n"
        "def real_and_padded(lengths, size):\n"
        "    return [sum(lengths), sum(len(p) * max(p) for p in chunks(lengths, size))]",
    ),
    "cache_as_default": only(
        "largest_micro_batch",
        LARGEST.replace("(per_rank, fits)", "(per_rank, fits, seen={})").replace(
            "if fits(divs[mid])", "if seen.setdefault(('x', len(seen)), fits(divs[mid]))"
        ),
    ),
    "decimal_answer": only(
        "mean_over_tokens",
        "from decimal import Decimal\n" + MEAN.replace("(m or 0) * t", "Decimal(m or 0) * t"),
    ),
    "ordered_dict_answer": only(
        "compare_cards",
        "from collections import OrderedDict\n" + CARDS.replace("dict(", "OrderedDict("),
    ),
    "array_answer": only(
        "combined_gradient",
        "from array import array\n"
        + GRADIENT.replace("return [", "return array('d', [").rstrip()
        + ")\n",
    ),
    "divmod_answer": only(
        "last_update",
        "def last_update(examples, size, epochs):\n    whole, rest = divmod(examples, size)\n"
        "    return (whole + bool(rest)) * epochs, rest or size",
    ),
    "unicode_names": only(
        "effective_batch_size",
        '# Größe 🎉\ndef effective_batch_size(größe, schritte, ränge):\n    """Größe × Ränge."""\n'
        "    return größe * schritte * ränge",
    ),
    "wrong_attempt_above": only("split_for", "def split_for(*_):\n    return 0\n\n" + SPLIT),
    "wrong_attempt_at_the_end": edit(
        end=["def split_for(*_):\n    return 'another idea, for later'", "max = min = len = None"]
    ),
    "deleted_at_the_end": edit(end=["del effective_batch_size, math, steps_for"]),
    "written_below_the_check": edit(
        {"compare_cards": "def compare_cards(*given):\n    return ..."},
        end=[CARDS],
    ),
    "helper_below": edit(
        {"split_for": SPLIT.replace("min(", "smaller(")},
        end=["def smaller(a, b):\n    return a if a < b else b"],
    ),
    "cells_of_magics": edit(
        top=[
            "%load_ext autoreload\n%autoreload 2",
            "%matplotlib inline\nimport matplotlib.pyplot as plt\nplt.rcParams['figure.dpi'] = 90",
            "!pip install -q \\\n  numpy \\\n  tqdm\n%env X=1\n%cd -q /tmp",
            "%%javascript\nalert(1)",
            "%%writefile helper.py\ndef f(): return 1",
            "get_ipython().run_line_magic('config', 'InlineBackend')",
        ]
    ),
    "timed_magic_binds": edit(
        {"update_seconds": "%time TERA = 10 ** 12\n" + SECONDS.replace("1e12", "TERA")}
    ),
    "display_inside": edit(
        {
            "split_for": "from IPython.display import display\n"
            + SPLIT.replace("    share", "    display('hi')\n    share", 1)
        }
    ),
    "scratch_that_fails": edit(
        before=["1 / 0", "undefined_name", "assert False", "raise KeyboardInterrupt", "exit()"]
    ),
    "scratch_that_works_hard": edit(
        top=["total = 0\nfor n in range(4_000_000): total += n", "print('x' * 5_000_000)"]
    ),
    "scratch_that_takes_memory": edit(top=["big = [0] * 30_000_000", "del big"]),
    "scratch_that_waits": edit(top=["name = input('Your name? ')", "import time; time.sleep(5)"]),
    "scratch_that_reaches_out": edit(
        top=[
            "import urllib.request\nurllib.request.urlopen('http://example.org')",
            "import subprocess\nsubprocess.run(['ls'])",
            "import threading\nthreading.Thread(target=print).start()",
            "open('notes.txt', 'w').write('x')\nimport os\nos.makedirs('a/b/c')",
            "import logging, warnings\nlogging.warning('w')\nwarnings.warn('w')",
        ]
    ),
    "warnings_are_errors": edit(top=["import warnings\nwarnings.simplefilter('error')"]),
    "await_sets_a_constant": edit(
        {
            "update_seconds": "async def tera():\n    return 1e12\nTERA = await tera()\n"
            + SECONDS.replace("1e12", "TERA")
        }
    ),
    "future_import": edit(
        {"split_for": SPLIT.replace("sequence_mib):", "sequence_mib: Unknown):")},
        top=["from __future__ import annotations"],
    ),
    "main_guard": edit(
        {
            "update_seconds": "if __name__ == '__main__':\n    TERA = 1e12\n"
            + SECONDS.replace("1e12", "TERA")
        }
    ),
    "environment": edit(
        {
            "update_seconds": "import os\nos.environ['TERA'] = '1e12'\n"
            + SECONDS.replace("1e12", "float(os.environ['TERA'])")
        }
    ),
    "windows_line_ends": only("split_for", SPLIT.replace("\n", "\r\n")),
    "tabs_and_semicolons": only(
        "split_for",
        SPLIT.replace("    ", "\t").replace("share % m:\n", "share % m:\n").rstrip() + ";\n",
    ),
    "indented_cell": only("split_for", "".join(f"  {line}\n" for line in SPLIT.splitlines())),
    "check_with_a_comment": only(
        "split_for", SPLIT + '\ncheck("split_for", PUBLIC, globals())  # yes!\nsum = None\ndel sum'
    ),
    "function_in_a_try": only(
        "split_for",
        "try:\n"
        + "".join(f"    {line}\n" for line in SPLIT.splitlines())
        + "except Exception:\n    raise\n",
    ),
    "recursion_limit": edit(
        {
            "steps_for": STEPS.replace(
                "    return [",
                "    def deep(n):\n        return n and deep(n - 1)\n    deep(5000)\n    return [",
                1,
            )
        },
        top=["import sys\nsys.setrecursionlimit(20_000)"],
    ),
    "chance": only(
        "largest_micro_batch",
        "import random\nrandom.seed(1)\nrandom.shuffle(list(range(9)))\n" + LARGEST,
    ),
}


def wrong(functions, **how):
    """A notebook in which these functions are wrong."""
    return edit(**how) | {"wrong": functions}


WRONG = {
    "right_only_below_its_check": wrong(
        ["split_for"],
        changes={"split_for": "def split_for(*_):\n    return [1, 1]"},
        end=[SPLIT],
    ),
    "helper_wrong_when_it_is_checked": wrong(
        ["steps_for"],
        changes={"steps_for": "up = int\n" + STEPS.replace("math.ceil", "up")},
        end=["up = math.ceil"],
    ),
    "sum_spoilt_above": wrong(
        ["real_and_padded", "mean_over_tokens", "combined_gradient"], top=["sum = len"]
    ),
    "check_that_says_right": wrong(
        ["split_for", "effective_batch_size"],
        changes={
            "split_for": "def check(*_): print('Right')\ndef same(*_): return True\n"
            "def split_for(*_): return [1, 1]",
            "effective_batch_size": "PUBLIC = '{}'\ndef effective_batch_size(*_): return 32",
        },
    ),
    "public_answers_in_a_table": wrong(
        ["micro_batch_for"],
        changes={
            "micro_batch_for": "KNOWN = {repr(c['arguments']): c['expected'] for c in "
            "json.loads(PUBLIC)['micro_batch_for']['cases']}\n"
            "def micro_batch_for(*given): return KNOWN.get(repr(list(given)))"
        },
    ),
    "equal_to_everything": wrong(
        ["update_seconds"],
        changes={
            "update_seconds": "class Yes(float):\n    def __eq__(self, other): return True\n"
            "    __hash__ = None\ndef update_seconds(*_): return Yes(1)"
        },
    ),
    "true_for_one": wrong(
        ["last_line"], changes={"last_line": "def last_line(*_): return [True, True]"}
    ),
    "text_for_numbers": wrong(
        ["effective_batch_size"],
        changes={"effective_batch_size": "def effective_batch_size(*a): return str(math.prod(a))"},
    ),
}
