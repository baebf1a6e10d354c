"""Several processes train what one does."""

import ast
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from course_utils.topics import sources
from course_utils.topics.ranks import LOOPBACK, _environment
from fitcast import gpus
from fitcast.recipe import TrainRecipe
from tools import train_many_gpus
from tools.notebooks import LESSONS, ROOT


def test_the_effective_batch_is_kept():
    recipe = train_many_gpus.lesson_recipe(sources.choose(None))
    for world_size in (1, 2):
        many = train_many_gpus.shared(recipe, world_size)
        assert many.effective_batch_size == recipe.effective_batch_size == 16
        assert many.micro_batch_size == recipe.micro_batch_size
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps \(2\), got 3; start 1 or 2"):
        train_many_gpus.shared(recipe, 3)


def test_the_script_trains_the_lessons_recipe():
    lesson = ast.parse((LESSONS / "07_qlora_on_a_t4.py").read_text("utf-8"))
    made = next(
        node
        for node in lesson.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "recipe"
    )
    source = sources.choose(None)
    names = {"TrainRecipe": TrainRecipe, "source": source, "gpu": None}
    exec(compile(ast.Module([made], []), "lesson", "exec"), names)
    assert names["recipe"] == train_many_gpus.lesson_recipe(source)


def run(folder, *launcher: str) -> dict:
    command = [
        sys.executable,
        *launcher,
        str(ROOT / "tools" / "train_many_gpus.py"),
        "--model",
        "bundled",
        "--out",
        str(folder),
        "--steps",
        "2",
    ]
    environment = _environment(False) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {"said": done.stdout, "adapter": load_file(folder / "adapter/adapter_model.safetensors")}


@pytest.mark.slow
@pytest.mark.skipif(gpus.detect() is not None, reason="on GPUs sums come in no fixed order")
def test_two_processes_train_the_adapters_of_one(tmp_path):
    one = run(tmp_path / "one")
    two = run(
        tmp_path / "two",
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--local-addr",
        LOOPBACK,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{LOOPBACK}:0",
    )
    assert "2 x 8 x 1 = 16 sequences of at most 104 tokens a step" in two["said"]
    assert two["said"].count("step 1:") == 1, "one process speaks"
    moved = max(t.abs().max() for name, t in one["adapter"].items() if "lora_B" in name)
    apart = max((t - two["adapter"][name]).abs().max() for name, t in one["adapter"].items())
    assert moved > 1e-3 and apart < 1e-4 * moved
