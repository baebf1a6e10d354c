"""Colab's torchao: PEFT alone raises, the course trains adapters on a 16-bit base all the same."""

import subprocess
import sys
import textwrap

import pytest

from fitcast.step import compat

OLD = """
    import importlib.util, sys
    from importlib import metadata
    from importlib.machinery import ModuleSpec
    import peft, transformers

    find, version = importlib.util.find_spec, metadata.version
    importlib.util.find_spec = lambda name, *a: (
        ModuleSpec(name, None) if name == "torchao" else find(name, *a))
    for library in (metadata, peft.import_utils.importlib_metadata):
        library.version = lambda name: "0.10.0" if name == "torchao" else version(name)
    peft.import_utils.is_torchao_available.cache_clear()
    from course_utils.data import BUNDLED
    from fitcast.step import compat, qlora
    from fitcast.recipe import TrainRecipe

    recipe = TrainRecipe(model=BUNDLED, base="float32", amp_dtype=None)
    look_past, compat.look_past = compat.look_past, lambda: False
    try:
        qlora.add_adapters(qlora.load_base(recipe), recipe)
    except ImportError as error:
        print(error)
    compat.look_past = look_past
    model = qlora.add_adapters(qlora.load_base(recipe), recipe)
    print(qlora.count_parameters(model)[0] > 0, compat.look_past())
"""


@pytest.mark.slow
def test_adapters_go_on_a_float32_base_beside_an_old_torchao():
    """And PEFT alone raises there, else this would be no test."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(OLD)], capture_output=True, text=True
    )
    peft_alone, course = done.stdout.splitlines() or [done.stderr, ""]
    assert "incompatible version of torchao" in peft_alone
    assert course.split() == ["True", "False"]


def test_without_an_old_one_nothing_is_changed():
    assert compat.look_past() is False
