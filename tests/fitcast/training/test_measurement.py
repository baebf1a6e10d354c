"""Measurement: the ledger's bytes against sizes counted by hand; time against the clock."""

import dataclasses
import time

import pytest
import torch

from fitcast import gpus
from fitcast.step import qlora
from fitcast.training import measurement, trainer
from tests.tiny import tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("measurement") / "model")


def test_bytes_are_those_of_the_tensors(recipe):
    model = trainer.build_model(recipe)
    trainable = qlora.count_parameters(model)[0]
    report = measurement.measure_step(recipe, model, steps=1).report
    most = {name: max(line) for name, line in report.timeline.items()}
    assert most["adapters"] == most["gradients"] == 4 * trainable
    # Adam's two averages, and its step counter for each tensor
    tensors = sum(p.requires_grad for p in model.parameters())
    assert most["optimizer state"] == 8 * trainable + 4 * tensors
    assert most["inputs"] == 2 * 2 * 4 * 64 * 8  # 2 batches, ids and labels, (4, 64), int64
    assert report.peak_phase == "backward"


def test_time_is_the_clocks(recipe):
    model = trainer.build_model(recipe)
    start = time.perf_counter()
    found = measurement.measure_step(recipe, model, steps=3)
    assert 0 < 3 * found.seconds < time.perf_counter() - start
    assert found.tokens_per_second == pytest.approx(2 * 4 * 64 / found.seconds)
    assert (found.peak_allocated_bytes is None) == (gpus.device() == "cpu")


def test_measuring_puts_modes_back_and_wants_a_step(recipe):
    model = trainer.build_model(recipe).eval()
    measurement.measure_step(recipe, model, steps=1)
    assert not any(module.training for module in model.modules())
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        measurement.measure_step(recipe, model, steps=0)


def test_batches_have_the_recipes_shape(recipe):
    padded = dataclasses.replace(recipe, padded=True, gradient_accumulation_steps=3)
    batches = measurement.random_batches(padded, "cpu")
    assert len(batches) == 3
    assert all(tensor.shape == (4, 64) for batch in batches for tensor in batch.values())
    assert not torch.equal(batches[0]["input_ids"], batches[1]["input_ids"])
    assert "attention_mask" in batches[0]
    assert "attention_mask" not in measurement.random_batches(recipe, "cpu")[0]


def test_speed_of_products_is_not_measured_without_a_gpu(monkeypatch):
    monkeypatch.setattr(measurement.gpus, "detect", lambda: None)
    assert measurement.matmul_flops("float16") is None
