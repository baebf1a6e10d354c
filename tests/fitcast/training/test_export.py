"""Export: what is reloaded is what was trained, up to the file's own rounding."""

import dataclasses
import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fitcast.step import qlora
from fitcast.training import export, trainer
from tests.tiny import ROWS, tiny_recipe


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A recipe, a model with random (not zero) adapters, and its logits."""
    folder = tmp_path_factory.mktemp("export")
    recipe = tiny_recipe(folder / "model", lora_targets="all-linear")
    model = trainer.build_model(recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    export.save_adapter(model, folder / "adapter")
    return recipe, folder, logits(model)


@torch.no_grad()
def logits(model):
    model.eval()
    return model(input_ids=torch.tensor([ROWS[0]["input_ids"]])).logits


def test_reloaded_adapter_is_exact(trained):
    recipe, folder, expected = trained
    assert torch.equal(logits(export.load_adapter(recipe, folder / "adapter")), expected)
    assert not torch.equal(logits(qlora.load_base(recipe)), expected)
    with pytest.raises(FileNotFoundError, match="must hold an adapter, got .*save_adapter"):
        export.load_adapter(recipe, folder)


def test_merged_into_dequantized_equals_the_trained_model(trained):
    recipe, folder, expected = trained
    merged = export.merge(recipe, folder / "adapter", "dequantized")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    size = export.save_merged(merged, folder / "merged")
    assert size == pytest.approx(2 * sum(p.numel() for p in merged.parameters()), rel=0.1)
    error = (logits(export.load_merged(recipe, folder / "merged")) - expected).abs().max()
    assert error < 0.01 * expected.abs().max()


def test_merged_into_the_original_is_farther_off(trained):
    recipe, folder, expected = trained
    near, far = (
        (logits(export.merge(recipe, folder / "adapter", base)) - expected).abs().max()
        for base in ("dequantized", "original")
    )
    assert far > 100 * near
    with pytest.raises(ValueError, match="base must be 'original' or 'dequantized', got 'nf4'"):
        export.merge(recipe, folder / "adapter", "nf4")


def test_size_of_the_adapter_is_its_parameters(trained):
    recipe, folder, _ = trained
    model = trainer.build_model(recipe)
    size = export.save_adapter(model, Path(folder) / "again")
    assert size == pytest.approx(4 * qlora.count_parameters(model)[0], rel=0.1)


# --- what rounding takes away --------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_changes(tmp_path_factory):
    """A bfloat16 recipe, an adapter as a short training leaves it, and PEFT's own float32 sum."""
    folder = tmp_path_factory.mktemp("small")
    recipe = tiny_recipe(folder / "model", lora_targets="all-linear", amp_dtype="bfloat16")
    model = trainer.build_model(recipe)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=2e-4)
    export.save_adapter(model, folder / "adapter")
    base = AutoModelForCausalLM.from_pretrained(recipe.model, dtype=torch.float32)
    before = {name: p.detach().clone() for name, p in base.named_parameters()}
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 under the old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        exact = PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    return recipe, folder, before, dict(exact.named_parameters())


def lost(file: dict, before: dict, exact: dict) -> float:
    """The error of what was learned, by its size; 1 is as bad as an export without the adapter."""
    adapted = [name for name in exact if "_proj" in name]
    assert len(adapted) == 2 * 7
    error = sum((file[n].double() - exact[n].double()).square().sum() for n in adapted)
    learned = sum((exact[n].double() - before[n].double()).square().sum() for n in adapted)
    return (error / learned).sqrt().item()


def test_a_bfloat16_run_keeps_what_it_learned(small_changes, tmp_path):
    """In bfloat16, where an eighth of float16's steps are left, much of it is lost."""
    recipe, folder, before, exact = small_changes
    for dtype, low, high in ((None, 0, 0.1), ("bfloat16", 0.3, 1)):
        merged = export.merge(recipe, folder / "adapter", "original", dtype)
        size = export.save_merged(merged, tmp_path / str(dtype))
        file = load_file(tmp_path / str(dtype) / "model.safetensors")
        assert {t.dtype for t in file.values()} == {getattr(torch, dtype or "float16")}
        assert size == pytest.approx(2 * sum(t.numel() for t in file.values()), rel=0.1)
        assert low <= lost(file, before, exact) < high
        config = json.loads((tmp_path / str(dtype) / "config.json").read_text())
        assert config["dtype"] == (dtype or "float16") and config["use_cache"]


def test_one_layer_at_a_time_is_in_float32(small_changes, monkeypatch):
    recipe, folder, _, _ = small_changes
    wide, merge = [], torch.nn.Linear.float

    def float32(layer):
        merge(layer)
        wide.append(sum(p.dtype == torch.float32 for p in weights(layers)))
        return layer

    def weights(model):
        return [p for name, p in model.named_parameters() if name.endswith("base_layer.weight")]

    adapt = export._with_adapter

    def adapted(*arguments):
        nonlocal layers
        layers = adapt(*arguments)
        return layers

    layers = None
    monkeypatch.setattr(export, "_with_adapter", adapted)
    monkeypatch.setattr(torch.nn.Linear, "float", float32)
    export.merge(recipe, folder / "adapter", "original")
    assert wide == [1] * (2 * 7)


def test_a_weight_that_float16_cannot_hold_is_refused_by_name(trained, tmp_path):
    recipe, folder, _ = trained
    merged = export.merge(recipe, folder / "adapter", "original")
    with torch.no_grad():
        merged.model.layers[1].mlp.up_proj.weight[3, 4] = 1e5
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight must be finite in torch.fl"):
        export.save_merged(merged, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_what_cannot_be_exported_is_refused(trained, tmp_path):
    recipe, folder, _ = trained
    whole = dataclasses.replace(recipe, base="float32", lora_rank=None)
    with pytest.raises(ValueError, match="model must have adapters to be saved alone, got Llama"):
        export.save_adapter(trainer.build_model(whole), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    with pytest.raises(ValueError, match="lora_rank must be the adapter's, got None"):
        export.merge(whole, folder / "adapter", "original")
    with pytest.raises(ValueError, match="lora_rank must be the adapter's, got None"):
        export.load_adapter(whole, folder / "adapter")
    plain = dataclasses.replace(recipe, base="float32")
    with pytest.raises(ValueError, match="base must be 'original' for a recipe in float32"):
        export.merge(plain, folder / "adapter", "dequantized")
    with pytest.raises(ValueError, match="dtype must be 'float16' or 'bfloat16', got 'int8'"):
        export.merge(recipe, folder / "adapter", "original", "int8")
    with pytest.raises(FileNotFoundError, match="must hold an adapter, got .*save_adapter"):
        export.merge(recipe, tmp_path, "original")


@pytest.mark.parametrize("renames", [0, 1])
def test_a_killed_copy_to_the_drive_loses_none(tmp_path, monkeypatch, renames):
    """Killed before its first rename or between the two, and called again."""
    folder, drive = tmp_path / "adapter", tmp_path / "drive"
    for made in (folder, drive):
        made.mkdir()
    (folder / "a.txt").write_text("old")
    export.to_drive(folder, drive)
    (folder / "a.txt").write_text("new")
    rename, done = export.Path.rename, []

    def killed(path, target):
        if len(done) >= renames:
            raise KeyboardInterrupt
        done.append(path)
        return rename(path, target)

    monkeypatch.setattr(export.Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        export.to_drive(folder, drive)
    monkeypatch.undo()
    kept = [path.read_text() for path in drive.rglob("a.txt")]
    assert "old" in kept and "new" in kept

    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(export.shutil, "copytree", full)
    with pytest.raises(OSError, match="no space"):
        export.to_drive(folder, drive)
    assert (drive / "adapter" / "a.txt").read_text() == "old"
    monkeypatch.undo()
    export.to_drive(folder, drive)
    assert [path.name for path in drive.iterdir()] == ["adapter"]
    assert (drive / "adapter" / "a.txt").read_text() == "new"
