"""Colab's torchao: PEFT alone raises, the course trains adapters on a 16-bit base all the same."""

import subprocess
import sys
import textwrap

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
    from course_utils import old_torchao, qlora
    from course_utils.recipe import TrainRecipe
"""
ADAPT = """
    recipe = TrainRecipe(base="float32", amp_dtype=None)
    model = qlora.add_adapters(qlora.load_base(recipe), recipe)
    print(qlora.count_parameters(model)[0] > 0, old_torchao.look_past())
"""


def python(*parts: str) -> subprocess.CompletedProcess:
    code = "".join(map(textwrap.dedent, parts))
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_adapters_go_on_a_float32_base_beside_an_old_torchao():
    done = python(OLD, ADAPT)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_without_it_peft_raises():
    done = python(OLD,
                  "old_torchao.look_past = qlora.old_torchao.look_past = lambda: False", ADAPT)
    assert "incompatible version of torchao" in done.stderr


def test_without_an_old_one_nothing_is_changed():
    done = python("from course_utils.old_torchao import look_past; print(look_past())")
    assert done.stdout.split() == ["False"], done.stderr
