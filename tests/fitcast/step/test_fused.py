"""Fewer, larger operations: 20 steps have the losses of PyTorch's and PEFT's own code."""

import dataclasses
from unittest import mock

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fitcast.recipe import TrainRecipe
from fitcast.step import compiled, fused, lean, levers, qlora

SIZES = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0,
    "max_position_embeddings": 128, "use_cache": False,
}  # fmt: skip
KINDS = ("llama", "qwen3", "phi3", "mistral")
FAST = ("qwen3", "compiled")  # the one that every change runs
STOCK = TrainRecipe(
    model="llama-3.1-8b", base="float32", lora_targets="all-linear", lora_dropout=0.0,
    learning_rate=2e-3, optimizer="adamw", attention="explicit_kv",
)  # fmt: skip
LEAN = dataclasses.replace(STOCK, loss="lean", loss_chunk_tokens=20)


def build(kind, recipe):
    torch.manual_seed(0)
    more = {"partial_rotary_factor": 0.75} if kind == "phi3" else {}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES, **more))
    model = qlora.add_adapters(qlora.prepare_base(model, recipe), recipe)
    return qlora.apply_levers(model, recipe).train()


def data(count):
    """Batches of two rows, 24 tokens, prompts without labels, the second row padded behind."""
    random, made = torch.Generator().manual_seed(1), []
    for _ in range(count):
        ids = torch.randint(1, 128, (2, 24), generator=random)
        mask = torch.ones_like(ids)
        mask[1, 15:] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[:, :4] = -100
        made.append({"input_ids": ids, "labels": labels, "attention_mask": mask})
    return made


def losses(model, recipe, count=20):
    optimizer = qlora.build_optimizer(model, recipe)
    batches = data(4)
    return torch.stack(
        [qlora.training_step(model, optimizer, [batches[i % 4]], recipe) for i in range(count)]
    )


@pytest.mark.parametrize(
    ("kind", "which"),
    [
        pytest.param(kind, which, marks=() if (kind, which) == FAST else pytest.mark.slow)
        for kind in KINDS
        for which in ("fused", "compiled")
    ],
)
def test_twenty_steps_have_the_losses_of_stock(kind, which):
    stock = losses(build(kind, STOCK), STOCK)
    model = build(kind, LEAN)
    fused.use_adapters_in_place(levers.unwrap(model))
    fused.use_causal_padding(model)
    head_loss = {"fused": fused.HeadLoss, "compiled": compiled.HeadLoss}[which]
    if which == "compiled":
        compiled.use_compiled_mlp(levers.unwrap(model))
        compiled.use_compiled_rotary(levers.unwrap(model))
    with mock.patch.object(lean, "HeadLoss", head_loss):
        ours = losses(model, LEAN)
    assert (ours - stock).abs().max() < 1e-4
    assert stock[0] - stock[16] > 0.01  # the same batch, learnt


def test_the_compiled_loss_is_used_and_a_wrong_one_is_seen(monkeypatch):
    def half(logits, targets):
        loss, grad = whole(logits, targets)
        return loss / 2, grad

    whole = compiled.loss_and_gradient
    monkeypatch.setattr(compiled, "loss_and_gradient", half)
    with mock.patch.object(lean, "HeadLoss", compiled.HeadLoss):
        wrong = losses(build("llama", LEAN), LEAN, count=1)
    assert wrong[0] < 0.6 * losses(build("llama", STOCK), STOCK, count=1)[0]


def test_gradients_of_swiglu_and_the_turn_are_autograds():
    torch.manual_seed(0)
    gate, up = (torch.randn(2, 3, 6, dtype=torch.double, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(compiled.SwiGLU.apply, (gate, up))
    x = torch.randn(1, 2, 3, 8, dtype=torch.double, requires_grad=True)
    angles = torch.randn(1, 1, 3, 4, dtype=torch.double)
    assert torch.autograd.gradcheck(compiled.Rotary.apply, (x, angles.cos(), angles.sin()))


def test_an_adapter_in_place_holds_no_second_output():
    """At the end of an adapted layer's forward one output is alive, not the base's and its copy."""
    model = build("llama", LEAN)
    layer = levers.decoder_layers(model)[0].mlp.down_proj
    fused.use_adapters_in_place(layer)
    bases = []
    layer.base_layer.register_forward_hook(lambda *found: bases.append(found[2]))
    out = layer(torch.randn(1, 5, 96))
    assert out.untyped_storage().data_ptr() == bases[0].untyped_storage().data_ptr()


def test_one_flat_parameter_steps_as_its_pieces_do():
    pieces = [torch.nn.Parameter(torch.randn(n, 4, generator=torch.Generator())) for n in (8, 4)]
    alone = [torch.nn.Parameter(piece.detach().clone()) for piece in pieces]
    flat = fused.Flat(pieces)
    one = torch.optim.AdamW([flat.parameter], lr=0.1)
    many = torch.optim.AdamW(alone, lr=0.1)
    for step in range(3):
        for found in (pieces, alone):
            sum((p**2).sum() * (step + 1) for p in found).backward()
        flat.gather()
        one.step()
        many.step()
        one.zero_grad()
        many.zero_grad()
    for piece, other in zip(pieces, alone, strict=True):
        torch.testing.assert_close(piece, other)


@pytest.mark.parametrize(
    ("row", "behind"),
    [([1, 1, 0], True), ([1, 1, 1], True), ([0, 1, 1], False), ([1, 0, 1], False)],
)
def test_only_padding_behind_is_forgotten(row, behind):
    model = build("llama", LEAN)
    seen = []
    fused.use_causal_padding(model)
    trunk = levers.unwrap(model).model
    trunk.register_forward_pre_hook(
        lambda _, args, inputs: seen.append(inputs["attention_mask"] is None), with_kwargs=True
    )
    mask = torch.tensor([[1, 1, 1], row])
    trunk(input_ids=torch.ones_like(mask), attention_mask=mask)
    model.eval()
    trunk(input_ids=torch.ones_like(mask), attention_mask=mask)
    assert seen == [behind, False]
