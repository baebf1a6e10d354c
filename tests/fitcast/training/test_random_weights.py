"""Random weights: a checkpoint of its own for each model, whole or not there."""

import errno
import json

import pytest
import torch

from fitcast import models
from fitcast.training import random_weights
from fitcast.training.preflight import weights_fault


def shape(folder, **changes):
    """The folder of a small Llama's config."""
    config = models.config("llama-3.2-1b")
    sizes = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, head_dim=8)
    config.update(sizes | dict(num_key_value_heads=1, num_hidden_layers=1, vocab_size=64) | changes)
    config.save_pretrained(folder)
    return folder


def layers(checkpoint):
    return json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.parametrize("name", ["model", "model/config.json"])
def test_folders_of_the_same_name_are_different_models(tmp_path, name):
    for layer, place in enumerate(("a", "b"), start=1):
        shape(tmp_path / place / "model", num_hidden_layers=layer)
    one, two = (random_weights.write(str(tmp_path / p / name), tmp_path / "out") for p in "ab")
    assert one != two and (layers(one), layers(two)) == (1, 2)
    assert one.name.startswith("model-random-float16-")


def test_an_edited_config_is_another_model(tmp_path):
    """Also where the weights would be the same: the config goes with them."""
    first = random_weights.write(str(shape(tmp_path / "m")), tmp_path / "out")
    assert random_weights.write(str(shape(tmp_path / "m")), tmp_path / "out") == first
    other = random_weights.write(str(shape(tmp_path / "m", rms_norm_eps=0.1)), tmp_path / "out")
    assert other != first and models.config(str(other)).rms_norm_eps == 0.1


def test_a_disk_that_fills_up_leaves_nothing_behind(tmp_path, monkeypatch):
    shape(tmp_path / "m")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(random_weights, "_header", full)
    with pytest.raises(OSError, match="No space left"):
        random_weights.write(str(tmp_path / "m"), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_what_is_written_is_whole(tmp_path):
    written = random_weights.write(str(shape(tmp_path / "m")), tmp_path, torch.bfloat16)
    assert weights_fault(written) is None and [p.name for p in written.parent.glob("*.part")] == []
    with pytest.raises(ValueError, match=r"dtype must be one of .*bfloat16.*, got torch.float64"):
        random_weights.write(str(tmp_path / "m"), tmp_path, torch.float64)
