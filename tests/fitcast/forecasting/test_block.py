"""One layer's ledger against autograd's own list of saved tensors, on a real layer."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from course_utils.data import BUNDLED
from fitcast import models
from fitcast.forecasting.block import boundary_bytes, count_block, weight_bytes
from fitcast.recipe import TrainRecipe
from fitcast.step.levers import decoder_layers
from fitcast.step.qlora import add_adapters, apply_levers, prepare_base

FULL = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_rank=None,
    lora_dropout=0.0,
    checkpointed_layers=0,
    micro_batch_size=2,
    sequence_length=24,
)
SEVEN = replace(FULL, model="llama-2-7b", base="float16", micro_batch_size=1, sequence_length=2048)


def saved_by_autograd(recipe: TrainRecipe) -> int:
    """Bytes of the storages that autograd packs in a real layer's forward, weights left out."""
    config = models.config(recipe.model)
    config.num_hidden_layers = 1
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = apply_levers(add_adapters(prepare_base(model, recipe), recipe), recipe).train()
    layer, base = decoder_layers(model)[0], model.get_base_model() if recipe.lora_rank else model
    batch, seq = recipe.micro_batch_size, recipe.sequence_length
    x = torch.randn(batch, seq, config.hidden_size, requires_grad=True)
    rotary = base.model.rotary_emb(x, torch.arange(seq)[None])
    mask = torch.zeros(batch, 1, seq, seq) if recipe.attention == "eager" else None
    given = [*layer.parameters(), *rotary, *([] if mask is None else [mask])]
    ours = {tensor.untyped_storage()._cdata for tensor in given}
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x, position_embeddings=rotary, attention_mask=mask)
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for at, tensor in kept.items() if at not in ours)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention": "eager"},
        {"attention": "explicit_kv"},
        {"lora_rank": 8},
        {"lora_rank": 8, "lora_targets": "all-linear", "attention": "eager"},
        {"checkpointed_layers": "all"},
        {"micro_batch_size": 3, "sequence_length": 7},
    ],
    ids=str,
)
def test_equals_autograd_to_the_byte(changes):
    recipe = replace(FULL, **changes)
    report = count_block(recipe)
    assert report.saved_activation_bytes == saved_by_autograd(recipe) > 0
    assert sum(tensor.n_bytes for tensor in report.saved) == report.saved_activation_bytes


def test_ratios_that_the_lessons_quote():
    def ratio(**changes):
        recipe = replace(SEVEN, **changes)
        return round(count_block(recipe).saved_activation_bytes / boundary_bytes(recipe), 1)

    assert 32 * boundary_bytes(SEVEN) == 512 * 2**20
    assert ratio() == 22.8
    assert ratio(attention="eager") == 70.8
    assert ratio(lora_rank=16, amp_dtype="float16") == 20.2
    assert ratio(checkpointed_layers="all") == 1.0


def test_laws():
    kept = {
        name: [
            count_block(
                replace(SEVEN, attention=kind, sequence_length=length)
            ).saved_activation_bytes
            for length in (512, 1024, 1536)
        ]
        for name, kind in (("eager", "eager"), ("SDPA", "stock"))
    }
    first, second = (kept["SDPA"][i + 1] - kept["SDPA"][i] for i in (0, 1))
    assert first == second
    bend = (kept["eager"][2] - kept["eager"][1]) - (kept["eager"][1] - kept["eager"][0])
    assert bend == 2 * 512**2 * 32 * (2 + 4)  # scores of 32 heads: softmax in float32, and its fp16
    assert (
        count_block(replace(SEVEN, micro_batch_size=8)).saved_activation_bytes
        == 8 * count_block(SEVEN).saved_activation_bytes
    )


def test_weights_of_llama_2_7b():
    assert weight_bytes(SEVEN) == 2 * 6_738_415_616  # the published parameter count


def test_four_bits_are_refused():
    with pytest.raises(ValueError, match="base must be .* got 'nf4'; "):
        count_block(TrainRecipe(model=BUNDLED))
