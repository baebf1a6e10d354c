import dataclasses

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with 4-bit friendly sizes, saved as a checkpoint."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=256,
        )
    ).save_pretrained(path)
    return str(path)


@pytest.fixture
def recipe(folder):
    return TrainRecipe(model=folder, sequence_length=32, lora_dropout=0.0)


def weights(model):
    return MemoryLedger(model).report().composition["weights"]


def test_nf4_bytes_are_half_a_byte_a_weight_and_the_scales(recipe):
    model = qlora.load_base(recipe)
    linear = 2 * (2 * 256 * 256 + 2 * 128 * 256 + 3 * 256 * 512)  # 14 matrices
    kept = 4 * (2 * 256 * 256 + 5 * 256)  # embeddings, head and norms stay in 4 bytes here
    single = qlora.load_base(dataclasses.replace(recipe, double_quant=False))
    # one float32 scale per 64 weights, and a 16-entry code book per layer
    assert 0 <= weights(single) - kept - linear * (1 / 2 + 4 / 64) <= 14 * 64 + 1024
    assert weights(model) < weights(single)


def test_kbit_upcast_doubles_what_is_not_quantized(recipe):
    half = dataclasses.replace(recipe, amp_dtype="float16")
    plain, upcast = (
        qlora.load_base(dataclasses.replace(half, kbit_upcast=u)) for u in (False, True)
    )
    assert plain.lm_head.weight.dtype == torch.float16
    assert upcast.lm_head.weight.dtype == torch.float32
    assert weights(upcast) - weights(plain) == 2 * (2 * 256 * 256 + 5 * 256)


def test_adapters_are_float32_and_the_only_trainable_parameters(recipe):
    model = qlora.add_adapters(qlora.load_base(recipe), recipe)
    trainable, total = qlora.count_parameters(model)
    # r x (in + out) for q, k, v, o of two layers
    assert trainable == 2 * 16 * (512 + 384 + 384 + 512)
    assert total == trainable + sum(
        p.numel() for p in LlamaForCausalLM(model.get_base_model().config).parameters()
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


def test_llama_1b_has_the_trainable_share_it_is_said_to_have():
    from fitcast import models

    recipe = TrainRecipe(model="llama-3.2-1b")
    with torch.device("meta"):
        model = LlamaForCausalLM(models.config("llama-3.2-1b"))
        model = qlora.add_adapters(qlora.prepare_base(model, recipe), recipe)
    assert qlora.count_parameters(model) == (3_407_872, 1_239_222_272)


def test_target_that_matches_no_layer_lists_those_there_are(recipe):
    with pytest.raises(
        ValueError,
        match="lora_targets must name linear layers .*got qkv_proj; it has down_proj, .*q_proj",
    ):
        qlora.add_adapters(
            qlora.load_base(recipe),
            dataclasses.replace(recipe, lora_targets=("qkv_proj", "o_proj")),
        )


@pytest.mark.one_fast
@pytest.mark.parametrize("optimizer", ["adamw", "adamw_8bit", "paged_adamw_8bit"])
def test_steps_learn_and_leave_no_gradients(recipe, optimizer):
    recipe = dataclasses.replace(recipe, optimizer=optimizer, learning_rate=5e-3)
    model = qlora.apply_levers(qlora.add_adapters(qlora.load_base(recipe), recipe), recipe).train()
    steps = qlora.build_optimizer(model, recipe)
    ids = torch.arange(64).reshape(2, 32)
    batches = [{"input_ids": row[None], "labels": row[None]} for row in ids]
    losses = [qlora.training_step(model, steps, batches, recipe).item() for _ in range(8)]
    assert losses[-1] < losses[0] - 0.1
    assert all(p.grad is None for p in model.parameters())


def test_accumulated_step_reports_the_loss_of_the_whole_batch(recipe):
    recipe = dataclasses.replace(recipe, learning_rate=0.0)
    model = qlora.add_adapters(qlora.load_base(recipe), recipe).train()
    ids = torch.arange(64).reshape(2, 32)
    labels = ids.clone()
    labels[0, :28] = -100  # uneven: 4 labelled tokens against 31
    whole = {"input_ids": ids, "labels": labels}
    parts = [{name: value[i : i + 1] for name, value in whole.items()} for i in range(2)]
    optimizer = qlora.build_optimizer(model, recipe)
    together = qlora.training_step(model, optimizer, [whole], recipe)
    apart = qlora.training_step(model, optimizer, parts, recipe)
    assert torch.isclose(together, apart, rtol=1e-6)
