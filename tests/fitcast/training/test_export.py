"""Export: what is reloaded is what was trained, up to the file's own rounding."""

from pathlib import Path

import pytest
import torch

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
