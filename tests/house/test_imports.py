"""What an import costs, and what it must not bring: torch comes when something is computed.

Who may import whom is import-linter's (`make lint`, contracts in pyproject.toml).
"""

import ast
import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from tools.surroundings import ROOT

HEAVY = {"torch", "transformers", "peft", "datasets", "bitsandbytes", "numpy", "matplotlib"}
# `sys.modules[name] = None` makes `import name` raise ImportError.
BLOCKED = "import sys\nsys.modules.update(dict.fromkeys(['torch', 'transformers', 'numpy']))\n"


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("package", ["fitcast", "course_utils"])
def test_import_is_light(package):
    code = (
        "import sys, time; before = set(sys.modules); start = time.process_time()\n"
        f"import {package}\n"
        "print(time.process_time() - start, *set(sys.modules) - before)"
    )
    runs = [python(code).split() for _ in range(3)]
    assert HEAVY & set(runs[0][1:]) == set()
    assert min(float(run[0]) for run in runs) < 0.1


def test_recipe_needs_no_torch():
    code = "from fitcast.recipe import TrainRecipe\nprint(TrainRecipe(model='llama-3.1-8b').model)"
    assert python(BLOCKED + code) == "llama-3.1-8b\n"
    with pytest.raises(AssertionError, match="torch"):
        python(BLOCKED + "import fitcast.memory.ledger")


# Distributions whose module has another name.
MODULE_OF = {"pyyaml": "yaml", "ipython": "IPython"}


def module_of(requirement: str) -> str:
    name = Requirement(requirement).name
    return MODULE_OF.get(name, name)


def declared() -> dict[str, set[str]]:
    """Libraries that a package may import: the engine what everybody gets or an extra of its own
    brings, the course what the extra `course` brings, too.
    """
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    engine = {module_of(line.partition("#")[0]) for line in lines if line[0] != "#"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    course, trl = (
        {module_of(one) for one in project["optional-dependencies"][extra]}
        for extra in ("course", "trl")
    )
    ours = {"fitcast", "course_utils"}
    return {"fitcast": engine | trl | {"fitcast"}, "course_utils": engine | course | ours}


def undeclared(source: str, package: str) -> set[str]:
    """Libraries that a module imports and that are not asked for where it is installed."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    roots = {name.split(".")[0] for name in names} - set(sys.stdlib_module_names)
    return roots - declared()[package]


@pytest.mark.parametrize("package", ["fitcast", "course_utils"])
def test_every_import_is_declared(package):
    found = {
        path.relative_to(ROOT).as_posix(): missing
        for path in (ROOT / package).rglob("*.py")
        if (missing := undeclared(path.read_text("utf-8"), package))
    }
    assert found == {}, "requirements.txt, or the extra `course` in pyproject.toml"


def test_undeclared_import_is_caught():
    source = "def f():\n    from scipy.stats import norm\n    import torch.nn, json, matplotlib"
    assert undeclared(source, "fitcast") == {"scipy", "matplotlib"}
    assert undeclared(source, "course_utils") == {"scipy"}
