"""Fake models against real ones: the same modules, the same bytes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, ViTConfig

from fitcast import models
from fitcast.forecasting.fake import fake_model, fake_tensors, faked
from fitcast.memory.ledger import MemoryLedger


def tiny(name):
    config = models.config(name)
    config.num_hidden_layers, config.vocab_size, config.hidden_size = 2, 1000, 128
    config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 256, 8, 4
    config.head_dim, config.bos_token_id, config.eos_token_id, config.pad_token_id = 16, 0, 0, 0
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    return config


def step(model, padded):
    ids = torch.zeros(2, 64, dtype=torch.long)
    mask = {"attention_mask": torch.ones_like(ids)} if padded else {}
    if padded and not hasattr(ids, "fake_mode"):
        mask["attention_mask"][0, 40:] = 0
    model(input_ids=ids, labels=ids, **mask).loss.backward()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama-3.2-1b", "qwen3-0.6b", "phi-4-mini"])
def test_fake_step_has_the_bytes_of_a_real_one(name, attention, padded):
    config = tiny(name)
    real = AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()
    real.config.use_cache = False
    with MemoryLedger(real) as ledger:
        step(real, padded)
    want = ledger.report()
    fake = fake_model(config, attention=attention)
    with fake_tensors(), MemoryLedger(fake) as ledger:
        step(fake, padded)
    got = ledger.report()
    for category in ("weights", "gradients"):
        assert got.composition[category] == want.composition[category]
    assert got.saved_activation_bytes == pytest.approx(want.saved_activation_bytes, rel=0.001)
    assert got.peak_bytes == pytest.approx(want.peak_bytes, rel=0.02)


def test_tied_weights_stay_one():
    model = fake_model("llama-3.2-1b", torch.float16)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert sum(p.numel() for p in model.parameters()) == 1_235_814_400


def test_weights_of_8b_take_no_memory_here():
    model = fake_model("llama-3.1-8b", torch.float16)
    assert sum(p.nbytes for p in model.parameters()) == 2 * 8_030_261_248
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_borrowed_model_comes_back():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4))
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="inside"), faked(model):
        assert type(model[0].weight) is not torch.nn.Parameter
        raise RuntimeError("inside")
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == before


@pytest.mark.parametrize("config", [ViTConfig(), BertConfig(is_decoder=False)], ids=["vit", "bert"])
def test_other_kinds_of_model_are_refused_or_run(config):
    if isinstance(config, ViTConfig):
        with pytest.raises(ValueError, match="^model must be a causal language model.*'vit'"):
            fake_model(config)
    else:
        assert fake_model(config, attention="eager") is not None
