"""What a model was lent for leaves no trace: modes, weights, gradients, chance."""

import contextlib
import dataclasses

import pytest
import torch
from torch import nn

from fitcast.training import data, gates, restoring, trainer
from tests.tiny import ROWS, tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return tiny_recipe(tmp_path_factory.mktemp("restoring") / "model", lora_dropout=0.1)


def small():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    model[1].eval()
    return model


def spoil(model):
    """Train a step on purpose: weights, running averages, gradients, modes and chance move."""
    model.train()
    model(torch.randn(8, 4)).sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(1.0)


def trace(model):
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {
        f"gradient of {name}": p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }
    return state | {"chance": torch.get_rng_state()}, [m.training for m in model.modules()]


def same(one, other):
    (tensors, modes), (others, other_modes) = one, other
    assert modes == other_modes and tensors.keys() == others.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, others[name]), name


@pytest.mark.parametrize("fails", [False, True])
def test_unchanged_puts_everything_back(fails):
    model = small()
    model(torch.ones(2, 4)).sum().backward()
    before = trace(model)
    ending = pytest.raises(ZeroDivisionError) if fails else contextlib.nullcontext()
    with ending, restoring.unchanged(model):
        assert all(p.grad is None for p in model.parameters())
        spoil(model)
        if fails:
            raise ZeroDivisionError
    same(trace(model), before)


def test_modes_alone_are_put_back_one_by_one():
    model = small()
    with restoring.kept_modes(model):
        model.train()
        assert model[1].training
    assert model.training and not model[1].training
    with restoring.evaluating(model):
        assert not model.training and not torch.is_grad_enabled()
    assert model.training and not model[1].training and torch.is_grad_enabled()


@pytest.mark.parametrize("lora_rank", [16, None])
def test_gates_leave_no_trace(recipe, lora_rank, monkeypatch):
    monkeypatch.setattr(gates, "OVERFIT_STEPS", 2)
    recipe = dataclasses.replace(recipe, lora_rank=lora_rank, base="float32")
    model = trainer.build_model(recipe)
    asleep = list(model.modules())[-1]
    asleep.eval()
    before = trace(model)
    gates.check_gates(model, list(ROWS), recipe, pad_token_id=0)
    batch = data.collate(list(ROWS)[:2], 0)
    gates.attention_kernel(model, batch, dataclasses.replace(recipe, lora_dropout=0.0))
    (tensors, modes), (others, other_modes) = trace(model), before
    others["chance"] = tensors["chance"]  # a forward pass in training mode draws its dropout
    same((tensors, modes), (others, other_modes))


def test_gates_open_for_a_full_fine_tune(recipe):
    """Nothing to switch off: the loss itself is the finding, and the other three are asked."""
    recipe = dataclasses.replace(recipe, lora_rank=None, base="float32", attention="explicit_kv")
    model = trainer.build_model(recipe)
    found = gates.check_gates(model, list(ROWS), recipe, pad_token_id=0)
    assert found.require() is found
    assert [finding.name for finding in found.findings] == [
        "step 0",
        "gradients",
        "overfit",
        "attention",
        "longest",
    ]
    assert found.findings[0].found.endswith("no adapters to switch off")


def test_weights_that_are_no_numbers_shut_the_first_gate(recipe, monkeypatch):
    monkeypatch.setattr(gates, "OVERFIT_STEPS", 1)
    recipe = dataclasses.replace(recipe, lora_rank=None, base="float32")
    model = trainer.build_model(recipe)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    first = gates.check_gates(model, list(ROWS), recipe, pad_token_id=0).findings[0]
    assert "loss nan" in first.found and "look at the weights' files" in first.fix
