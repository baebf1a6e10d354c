"""A lever asks the model's own code: what it tells apart, and that it leaves no trace."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.forecasting.fake import fake_tensors
from fitcast.gpus import T4
from fitcast.memory.stream import DeviceLedger
from fitcast.step import lean, levers
from fitcast.step.alike import alike, random_numbers, real_numbers, stand_in

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def on_meta(kind, **more):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | more))


def test_a_stand_in_has_other_pieces_and_leaves_the_module_alone():
    module = torch.nn.Linear(2, 2)
    weight = module.weight.detach().clone()
    copy = stand_in(module, weight=torch.zeros(2, 2), bias=None)
    assert type(copy) is torch.nn.Linear and not copy(torch.ones(2)).any()
    assert torch.equal(module.weight, weight) and module.bias is not None


def test_what_cannot_be_run_or_has_another_shape_is_not_alike():
    x = random_numbers(2, 3)
    assert alike(lambda: x, lambda: x.clone())
    assert not alike(lambda: x[:1], lambda: x)
    assert not alike(lambda: x @ x, lambda: x)
    assert not alike(lambda: (x, x), lambda: (x,))


@pytest.mark.parametrize(
    "factor", [{"mlp_multipliers": [2.0, 1.0]}, {"mlp_multipliers": [1.0, 3.0]}]
)
def test_a_factor_inside_an_mlp_is_seen(factor):
    """Falcon-H1 has SiLU, a gate, an up and a down projection, and two factors between them."""
    with pytest.raises(ValueError, match="^mlp must be 'stock' for a model with FalconH1MLP, "):
        lean.use_lean_mlp(on_meta("falcon_h1", **factor))


def test_a_norm_that_multiplies_by_one_plus_weight_is_seen():
    for kind in ("gemma", "gemma3_text", "qwen3_next"):
        with pytest.raises(ValueError, match="^norm must be 'stock' for a model with .*RMSNorm, g"):
            levers.use_native_norm(on_meta(kind))


def test_a_norm_under_another_name_for_epsilon_is_changed():
    """Llama 4 calls it `eps`; so did a lever that looked for `variance_epsilon` do nothing."""
    from transformers.models.llama4.modeling_llama4 import Llama4TextRMSNorm

    norm, x = Llama4TextRMSNorm(16, eps=1e-2), 0.1 * random_numbers(3, 16)
    torch.nn.init.normal_(norm.weight)
    stock = norm(x)
    levers.use_native_norm(torch.nn.Sequential(norm))
    assert "forward" in vars(norm)
    torch.testing.assert_close(norm(x), stock)


def test_a_rotary_function_with_other_arguments_is_refused():
    """Gemma 3n turns one tensor a call, gpt-oss takes half of the angles."""
    for kind in ("gemma3n_text", "gpt_oss"):
        more = {"num_kv_shared_layers": 0} if kind == "gemma3n_text" else {}
        with pytest.raises(ValueError, match="^rotary must be 'stock' for .*Attention, got 'lean'"):
            lean.use_lean_rotary(on_meta(kind, **more))


@pytest.mark.parametrize(
    ("kind", "more", "odd"),
    [
        ("llama", {}, ()),
        ("gemma3_text", {}, ()),
        ("mixtral", {}, ()),
        ("granite", {"logits_scaling": 1.0}, ()),
        ("granite", {"logits_scaling": 2.0}, ("logits_scaling",)),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, ("final_logit_softcapping",)),
        (  # its cap has a name that no list of ours holds
            "recurrent_gemma",
            {"logits_soft_cap": 30.0},
            ("logits not seen to be its head's product (RecurrentGemmaForCausalLM)",),
        ),
        (
            "falcon_h1",
            {"lm_head_multiplier": 0.5},
            ("logits not seen to be its head's product (FalconH1ForCausalLM)",),
        ),
    ],
)
def test_what_a_model_does_to_its_logits_is_named(kind, more, odd):
    assert levers.odd_head(on_meta(kind, **more)) == odd


@pytest.mark.parametrize(
    ("kind", "pull", "words"),
    [
        ("stablelm", levers.use_native_norm, "norm must be 'stock' for a model without RMSNorms"),
        ("starcoder2", lean.use_lean_mlp, "mlp must be 'stock' for a model without a gated MLP"),
        ("gpt2", lean.use_lean_rotary, "rotary must be 'stock' for a model without a layer that"),
        ("llama", lean.use_lean_lora, "adapters must be 'stock' for a model without LoRA on"),
        ("gpt2", levers.checkpoint_layers, "model must have its layers in model.layers, as Llama"),
        ("gpt_oss", levers.use_explicit_kv_attention, "attention must be 'stock' or 'eager' for G"),
    ],
)
def test_a_lever_that_finds_nothing_to_change_says_so(kind, pull, words):
    with pytest.raises(ValueError) as refusal:
        pull(on_meta(kind))
    assert str(refusal.value).startswith(words)


def test_layers_that_cannot_forget_are_refused():
    model = on_meta("llama")
    model.model.layers = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(
        ValueError, match="^checkpointed_layers must be 0 for layers of Identity, g"
    ):
        levers.checkpoint_layers(model)
    levers.checkpoint_layers(model, 0)  # nothing to forget, nothing to refuse


def test_a_model_refused_is_a_model_unchanged():
    """The first layers are not changed before the last one is looked at."""
    model = on_meta("llama", num_hidden_layers=2)
    model.model.layers[1].mlp.act_fn = torch.nn.GELU()
    with pytest.raises(ValueError, match="whose activation is GELU"):
        lean.use_lean_mlp(model)
    assert not any("forward" in vars(module) for module in model.modules())


def test_asking_draws_no_random_number_and_allocates_nothing_that_a_forecast_sees():
    ledger, kernels, model = DeviceLedger(), CudaKernels(T4), on_meta("llama")
    before = torch.get_rng_state()
    with pretend_cuda(T4), fake_tensors(), ledger, kernels, torch.device("meta"):
        for pull in (levers.use_native_norm, lean.use_lean_mlp, lean.use_lean_rotary):
            pull(model)
        assert levers.odd_head(model) == ()
        with real_numbers():
            assert random_numbers(2).sum().item() != 0  # a number, not a shape
    assert torch.equal(torch.get_rng_state(), before)
    assert not ledger.stream().events
