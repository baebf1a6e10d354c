"""The public face: each name is there, explained, light to import; README examples are true."""

import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys

import pytest

import fitcast
from fitcast.cli.main import main
from tools.notebooks import ROOT

FACE = ROOT / "fitcast" / "__init__.py"
README = (ROOT / "fitcast" / "README.md").read_text("utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
CONSOLE = re.findall(r"^```console\n\$ (.*?)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
TABLE = re.findall(r"^\| `(\w+)` \| (.+) \|$", README, re.MULTILINE)
# Each example, in the README's order, and the call that it is about.
SHOWN = {
    "forecast": "forecast(recipe",
    "script": "TrainingArguments(",
    "levers": "levers(recipe",
    "lean": "apply_levers(model",
    "fit": "fit(recipe",
    "ledger": "MemoryLedger(model",
    "loop": "torch.optim.AdamW(",
    "adapters": "get_peft_model(base",
}
# What takes a second to import: nothing of it before a name needs it.
HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "numpy", "pandas"}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def said(example: str) -> str:
    """The lines of an example that are comments: what it prints."""
    return "".join(f"{line}\n" for line in re.findall(r"^# (.*)$", example, re.MULTILINE))


@pytest.mark.parametrize("name", fitcast.__all__)
def test_each_name_is_there_and_explained(name):
    found = getattr(fitcast, name)
    assert found.__doc__ and found.__doc__.strip()
    assert name in dir(fitcast)


def test_readme_has_every_name_and_no_other():
    assert sorted(name for name, _ in TABLE) == sorted(fitcast.__all__)
    assert [name for name, words in TABLE if not 4 <= len(words) <= 80] == []


def test_type_checkers_see_the_same_names():
    """They read the imports under `TYPE_CHECKING`, where Python reads `__getattr__`'s table."""
    (typed,) = [
        node for node in ast.parse(FACE.read_text("utf-8")).body if isinstance(node, ast.If)
    ]
    homes = {
        alias.name: node.module
        for node in typed.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == {name: f"fitcast.{module}" for name, module in fitcast._HOMES.items()}
    assert sorted(homes) == sorted(fitcast.__all__)


def test_a_name_that_is_not_there_lists_those_that_are():
    with pytest.raises(AttributeError, match="fitcast has no 'forcast'; it has .*forecast"):
        fitcast.forcast  # noqa: B018
    with pytest.raises(ImportError):
        from fitcast import forcast  # noqa: F401


@pytest.mark.parametrize(
    ("code", "seconds"),
    [
        ("import fitcast", 0.1),
        ("from fitcast import T4, TrainRecipe, preset, show_bytes", 0.3),
        ("from fitcast.cli.main import main\ntry: main(['--help'])\nexcept SystemExit: pass", 0.3),
        ("from fitcast.cli.main import main\ntry: main(['fit', '--help'])\nexcept SystemExit: pass",
         0.3),
    ],
)  # fmt: skip
def test_what_needs_no_torch_is_quick_and_brings_none(code, seconds):
    """Seconds of the processor, which on a free machine are those of the clock, from Python's own
    start on: another test may run beside this one."""
    report = "\nimport sys, time\nprint('\\n', time.process_time(), *sys.modules)"
    runs = [python(code + report).splitlines()[-1].split() for _ in range(3)]
    bare = min(float(python(report).split()[0]) for _ in range(3))
    assert min(float(run[0]) for run in runs) - bare < seconds
    assert HEAVY & set(runs[0][1:]) == set()


@pytest.mark.slow
def test_a_module_of_the_same_name_does_not_hide_a_function():
    """`fitcast.forecasting.forecast` is a module, `fitcast.forecast` stays the function."""
    code = (
        "import fitcast.forecasting.search, fitcast.training.preflight, fitcast.step.levers\n"
        "import fitcast.cli.doctor\n"
        "from fitcast import doctor, fit, forecast, levers, preflight\n"
        "print(*(type(x).__name__ for x in (doctor, fit, forecast, levers, preflight)))"
    )
    assert set(python(code).split()) == {"function"}


def test_readme_shows_each_of_the_questions():
    assert [sum(call in example for example in EXAMPLES) for call in SHOWN.values()] == [1] * len(
        SHOWN
    )
    for example in EXAMPLES:
        code = [x for x in example.splitlines() if x.strip() and not x.startswith("#")]
        assert len(code) <= 12 and said(example)


@pytest.mark.one_fast
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT 0.21 asks
@pytest.mark.parametrize(
    "example",
    [
        pytest.param(
            example,
            id=name,
            marks=[pytest.mark.slow] * (name not in ("forecast", "ledger")),
        )
        for name, example in zip(SHOWN, EXAMPLES, strict=True)
    ],
)
def test_example_prints_what_its_comments_say(example):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(example, "fitcast/README.md", "exec"), {})
    assert out.getvalue() == said(example)


def test_command_prints_what_is_shown(capsys):
    ((command, shown),) = CONSOLE
    line, pipe, rest = command.partition(" | ")
    assert (pipe, rest) == (" | ", "head -1")
    main(shlex.split(line)[1:])
    assert capsys.readouterr().out.splitlines()[0] == shown.rstrip("\n")
