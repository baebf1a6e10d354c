"""Take it home: what lesson 07 exports, `transformers.pipeline` loads without this course."""

import sys
from dataclasses import replace

import pytest
import torch
from transformers import pipeline

from course_utils import data
from fitcast import TrainRecipe
from fitcast.step import qlora
from fitcast.training import evaluation, export, shards, trainer
from tools.notebooks import ROOT

OURS = ("course_utils", "fitcast", "tests", "tools")
QUESTION = [{"role": "user", "content": "Where is order 4711?"}]
RECIPE = TrainRecipe(model=data.BUNDLED, lora_targets="all-linear", amp_dtype=None)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Folders of an adapter that changes what the small model writes, and what that is."""
    folder, model = tmp_path_factory.mktemp("home"), trainer.build_model(RECIPE)
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.normal_(std=0.1)
    export.save_adapter(model, folder / "adapter", data.tokenizer())
    shards.merge_shards(
        RECIPE, folder / "adapter", folder / "merged", tokenizer=data.tokenizer(), base="original"
    )
    plain = replace(RECIPE, base="float32")
    beside = export.load_adapter(plain, folder / "adapter")
    return folder, evaluation.generate(beside, data.tokenizer(), [QUESTION], plain, 8)[0]


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A place where nothing of this repository can be imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if one not in ("", str(ROOT))])
    for name in [name for name in sys.modules if name.split(".")[0] in OURS]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError):
        import fitcast.training  # noqa: F401


@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_a_pipeline_loads_the_folder_and_answers(exported, elsewhere, kind):
    folder, expected = exported
    chat = pipeline("text-generation", model=str(folder / kind), dtype=torch.float32)
    said = chat([QUESTION], max_new_tokens=8, do_sample=False)[0][0]["generated_text"][-1]
    assert said["role"] == "assistant" and said["content"] == expected
    assert "lora" not in str(chat.model.state_dict().keys()) or kind == "adapter"


def test_the_base_alone_would_have_said_something_else(exported):
    _, expected = exported
    base = qlora.load_base(replace(RECIPE, base="float32"))
    bare = replace(RECIPE, base="float32", lora_rank=None)
    assert evaluation.generate(base, data.tokenizer(), [QUESTION], bare, 8)[0] != expected
