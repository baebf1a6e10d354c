"""Every lever on every family: it computes what the model does, or it refuses by name."""

import dataclasses
import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from course_utils.data import BUNDLED
from fitcast.cli.main import main
from fitcast.forecasting import search
from fitcast.recipe import TrainRecipe
from fitcast.step import levers, qlora
from tests.sample import by_turns

SIZES = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16}
FAMILIES = {
    "gemma3_text": LAYERS,
    "gemma2": LAYERS,
    "olmo2": {},
    "granite": {"attention_multiplier": 0.1, "residual_multiplier": 0.7, "logits_scaling": 8.0},
    "phi3": {"partial_rotary_factor": 0.75},
    "qwen3": {},
    "mistral": {"sliding_window": 16},
}
LEVERS = {
    "explicit_kv": {"attention": "explicit_kv"},
    "eager": {"attention": "eager"},
    "native norm": {"norm": "native"},
    "chunked loss": {"loss": "chunked", "loss_chunk_tokens": 20},
    "lean loss": {"loss": "lean", "loss_chunk_tokens": 20},
    "lean mlp": {"mlp": "lean"},
    "lean adapters": {"adapters": "lean"},
    "lean rotary": {"rotary": "lean"},
    "all checkpointed": {"checkpointed_layers": "all"},
    "attention kept": {"checkpointed_layers": "all", "keep_attention": True},
    "checkpoints on the host": {"checkpointed_layers": "all", "offload_checkpoints": True},
}
REFUSED = {  # the field that the error starts with, and what it must say
    ("gemma3_text", "native norm"): "norm must be 'stock' for a model with Gemma3RMSNorm, got 'n",
    ("gemma3_text", "lean mlp"): "mlp must be 'stock' for a model with Gemma3MLP, whose activati",
    ("gemma2", "native norm"): "norm must be 'stock' for a model with Gemma2RMSNorm, got 'native'",
    ("gemma2", "lean mlp"): "mlp must be 'stock' for a model with Gemma2MLP, whose activation is ",
    ("gemma2", "explicit_kv"): "attention must be 'stock' or 'eager' for Gemma2ForCausalLM, got '",
    ("gemma2", "attention kept"): "keep_attention must be False for Gemma2ForCausalLM, whose atte",
    ("gemma2", "chunked loss"): "loss must be 'full' for a model with final_logit_softcapping, go",
    ("gemma2", "lean loss"): "loss must be 'full' for a model with final_logit_softcapping, got 'l",
    ("granite", "chunked loss"): "loss must be 'full' for a model with logits_scaling, got 'chunk",
    ("granite", "lean loss"): "loss must be 'full' for a model with logits_scaling, got 'lean'; ",
}
STOCK = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_targets="all-linear",
    lora_dropout=0.0,
    checkpointed_layers=0,
    sequence_length=48,
)


def config(kind):
    return AutoConfig.for_model(kind, **SIZES | FAMILIES[kind])


def loss_and_gradients(kind, recipe, padded):
    torch.manual_seed(0)
    model = qlora.prepare_base(AutoModelForCausalLM.from_config(config(kind)), recipe)
    model = qlora.apply_levers(qlora.add_adapters(model, recipe), recipe).train()
    for name, parameter in model.named_parameters():
        if "norm" in name:  # at its start, nothing tells weight from 1 + weight
            torch.nn.init.normal_(parameter, mean=1.0, std=0.3)
        if "q_proj" in name or "k_proj" in name:  # scores large enough for a cap to bite
            parameter.data *= 4
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    ids = torch.randint(3, 256, (2, 48))
    batch = {"input_ids": ids, "labels": ids}
    if padded:
        batch["attention_mask"] = torch.ones_like(ids)
        batch["attention_mask"][1, 30:] = 0
        batch["labels"] = ids.masked_fill(batch["attention_mask"] == 0, -100)
    loss = qlora.compute_loss(model, batch, recipe)
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.fixture(scope="module")
def stock():
    """What each family computes without a lever, worked out once."""
    known = {}

    def of(kind, padded):
        if (kind, padded) not in known:
            known[kind, padded] = loss_and_gradients(kind, STOCK, padded)
        return known[kind, padded]

    return of


@pytest.mark.parametrize(("kind", "lever", "padded"), by_turns(FAMILIES, LEVERS))
def test_a_lever_computes_what_the_model_does_or_refuses(kind, lever, padded, stock):
    recipe = dataclasses.replace(STOCK, **LEVERS[lever])
    if (words := REFUSED.get((kind, lever))) is not None:
        with pytest.raises(ValueError) as refusal:
            loss_and_gradients(kind, recipe, padded)
        assert str(refusal.value).startswith(words)
        return
    want_loss, want = stock(kind, padded)
    loss, gradients = loss_and_gradients(kind, recipe, padded)
    assert torch.isclose(loss, want_loss, rtol=1e-5)
    assert (gradients - want).norm() <= 1e-5 * want.norm() and want.norm() > 0


def test_stock_attention_is_what_transformers_gives_the_model():
    """Gemma 2 caps its scores, which no kernel of PyTorch does: transformers writes them out."""
    for kind, name in (("gemma2", "eager"), ("gemma3_text", "sdpa")):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config(kind))
        qlora.apply_levers(model, STOCK)
        assert levers.attention_of(model) == name


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """A folder with the config of a Gemma 3 of two layers."""
    folder = tmp_path_factory.mktemp("gemma3")
    config("gemma3_text").save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["levers", pytest.param("fit", marks=pytest.mark.slow)])
def test_the_command_line_weighs_gemma_3(verb, gemma3, capsys, monkeypatch):
    names = {"explicit K/V attention", "lean rotary embedding", "native RMSNorm", "lean MLP"}
    every = search.single_changes
    monkeypatch.setattr(
        search, "single_changes", lambda *given: {n: every(*given)[n] for n in sorted(names)}
    )
    assert main([verb, "--model", gemma3, "--sequence-length", "64", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    if verb == "levers":  # the other two would change what it computes
        found = {lever["change"] for lever in answer["levers"]}
        assert found == names - {"native RMSNorm", "lean MLP"}
