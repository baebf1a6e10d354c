"""Where the lean pieces do not hold: they say so, or take the usual path."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from course_utils.data import BUNDLED
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.step.lean import use_lean_lora, use_lean_rotary
from fitcast.units import IGNORED

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
}


def tiny(kind: str, **more) -> torch.nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more)).eval()


@pytest.mark.parametrize("kind", ["glm", "glm4", "cohere", "helium", "ernie4_5"])
def test_neighbouring_pairs_are_not_turned(kind):
    with pytest.raises(ValueError, match="rotary must be 'stock' for .*Attention, got 'lean'"):
        use_lean_rotary(tiny(kind))


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "mistral", "gemma2", "olmo2"])
def test_halves_are_turned_as_the_model_does(kind):
    model, ids = tiny(kind), torch.arange(1, 12)[None]
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        use_lean_rotary(model)
        torch.testing.assert_close(model(input_ids=ids).logits, stock, rtol=1e-5, atol=1e-6)


def test_lean_adapters_on_a_16_bit_base_without_autocast():
    recipe = TrainRecipe(model=BUNDLED, base="bfloat16", lora_targets=("q_proj",))
    model = qlora.add_adapters(tiny("llama").to(torch.bfloat16), recipe).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)  # zero at the start
    ids = torch.arange(1, 12)[None]
    with torch.no_grad():
        stock = model(input_ids=ids).logits
        use_lean_lora(model)
        assert torch.equal(model(input_ids=ids).logits, stock)


@pytest.mark.parametrize("loss", ["full", "chunked", "lean"])
def test_a_step_without_labels_leaves_the_adapters_finite(loss):
    recipe = TrainRecipe(
        model=BUNDLED, base="float32", loss=loss, optimizer="adamw", sequence_length=16
    )
    model = qlora.add_adapters(qlora.load_base(recipe), recipe).train()
    ids = torch.randint(10, 100, (1, 16))
    batch = {"input_ids": ids, "labels": torch.full_like(ids, IGNORED)}
    found = qlora.training_step(model, qlora.build_optimizer(model, recipe), [batch], recipe)
    assert found.item() == 0
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_a_max_grad_norm_of_zero_does_not_clip():
    recipe = TrainRecipe(
        model=BUNDLED, base="float32", optimizer="adamw", sequence_length=16, max_grad_norm=0.0
    )
    model = qlora.add_adapters(qlora.load_base(recipe), recipe).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in weights]
    ids = torch.randint(10, 100, (1, 16))
    qlora.training_step(
        model, qlora.build_optimizer(model, recipe), [{"input_ids": ids, "labels": ids}], recipe
    )
    assert not all(torch.equal(*pair) for pair in zip(before, weights, strict=True))
