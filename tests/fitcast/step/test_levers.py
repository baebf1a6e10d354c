"""Every lever leaves loss and gradients as they were, and saves what its docstring says."""

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from course_utils.data import BUNDLED
from fitcast.memory import flops
from fitcast.memory.ledger import MemoryLedger
from fitcast.memory.report import tensors_in
from fitcast.recipe import TrainRecipe
from fitcast.step import lean, levers, losses, qlora
from tests.sample import by_turns

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "vocab_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "use_cache": False,
}
SEQ = 48
PHI3 = {"partial_rotary_factor": 0.75, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
FUSED = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
FAMILIES = {  # configuration, model, sizes of its own, where adapters go
    "llama": (LlamaConfig, LlamaForCausalLM, {}, TrainRecipe.lora_targets),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}, TrainRecipe.lora_targets),
    "phi3": (Phi3Config, Phi3ForCausalLM, PHI3, FUSED),
}
LEVERS = {
    "explicit_kv": {"attention": "explicit_kv"},
    "eager": {"attention": "eager"},
    "native norm": {"norm": "native"},
    "chunked loss": {"loss": "chunked", "loss_chunk_tokens": 20},
    "half checkpointed": {"checkpointed_layers": 2},
    "all checkpointed": {"checkpointed_layers": "all"},
    "lean loss": {"loss": "lean", "loss_chunk_tokens": 20},
    "lean mlp": {"mlp": "lean"},
    "lean adapters": {"adapters": "lean"},
    "lean rotary": {"rotary": "lean"},
    "attention kept": {"checkpointed_layers": "all", "keep_attention": True},
    "everything": {
        "attention": "explicit_kv",
        "loss": "lean",
        "norm": "native",
        "mlp": "lean",
        "adapters": "lean",
        "rotary": "lean",
        "checkpointed_layers": 2,
        "keep_attention": True,
    },
    "tiled mlp": {"mlp_tile_tokens": 20},
    "tiled lean mlp, checkpointed": {
        "mlp": "lean",
        "adapters": "lean",
        "mlp_tile_tokens": 20,
        "checkpointed_layers": "all",
    },
    "some checkpoints on the host": {"checkpointed_layers": "all", "offload_checkpoints": 2},
    "embedding on the host": {"embedding": "host"},
    "checkpoints on the host": {"checkpointed_layers": "all", "offload_checkpoints": True},
}
STOCK = TrainRecipe(
    model=BUNDLED, base="float32", lora_dropout=0.0, checkpointed_layers=0, sequence_length=SEQ
)


def build(recipe, family="llama", **sizes):
    torch.manual_seed(0)
    config, model, own, targets = FAMILIES[family]
    recipe = dataclasses.replace(recipe, lora_targets=targets)
    model = qlora.prepare_base(model(config(**SIZES | own | sizes)), recipe)
    model = qlora.apply_levers(qlora.add_adapters(model, recipe), recipe)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # starts at zero, which would hide every error in lora_A's gradient
            torch.nn.init.normal_(parameter, std=0.05)
    return model.train()


def batch(padded=False):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 256, (3, SEQ), generator=generator)
    labels = ids.clone()
    labels[0, :30] = -100  # a prompt
    if not padded:
        return {"input_ids": ids, "labels": labels}
    mask = torch.ones_like(ids)
    mask[1, 20:] = 0
    labels[1, 20:] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_gradients(recipe, padded=False, num_items=None, **build_options):
    model = build(recipe, **build_options)
    loss = qlora.compute_loss(model, batch(padded), recipe, num_items)
    loss.backward()
    return loss.detach(), torch.cat(
        [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    )


@functools.cache
def stock_loss_and_gradients(padded, family):
    return loss_and_gradients(STOCK, padded, family=family)


@pytest.mark.parametrize(("family", "lever", "padded"), by_turns(FAMILIES, LEVERS))
def test_lever_equals_the_stock_path(family, lever, padded):
    stock_loss, stock = stock_loss_and_gradients(padded, family)
    recipe = dataclasses.replace(STOCK, **LEVERS[lever])
    loss, gradients = loss_and_gradients(recipe, padded, family=family)
    assert torch.isclose(loss, stock_loss, rtol=1e-5)
    assert (gradients - stock).norm() <= 1e-5 * stock.norm()
    assert stock.norm() > 0


def test_the_comparison_notices_a_wrong_attention(monkeypatch):
    """The test above must be able to fail: heads repeated in the wrong order change gradients."""
    _, stock = loss_and_gradients(STOCK)
    monkeypatch.setattr(levers, "_repeat_heads", lambda x, groups: x.repeat(1, groups, 1, 1))
    _, gradients = loss_and_gradients(dataclasses.replace(STOCK, attention="explicit_kv"))
    assert (gradients - stock).norm() > 1e-2 * stock.norm()


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="PyTorch 2.13 and newer")
def test_chunked_losses_equal_pytorchs_own():
    head, labels = torch.nn.Linear(64, 256, bias=False).requires_grad_(False), batch()["labels"]
    hidden = torch.randn(*labels.shape, 64, generator=torch.Generator().manual_seed(0))
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    found = []
    for loss_of in (
        lambda rows: F.linear_cross_entropy(
            rows.flatten(0, 1), head.weight, targets, options=torch.nn.LinearCrossEntropyOptions()
        ),
        lambda rows: losses.chunked_loss(rows, head, labels, 16),
        lambda rows: losses.chunked_loss(rows, head, labels, 16, lean=True),
    ):
        rows = hidden.clone().requires_grad_()
        loss = loss_of(rows)
        loss.backward()
        found.append((loss.detach(), rows.grad))
    for loss, gradient in found[1:]:
        torch.testing.assert_close(loss, found[0][0], rtol=1e-5, atol=0)
        assert (gradient - found[0][1]).norm() <= 1e-5 * found[0][1].norm()


@pytest.mark.parametrize(
    ("kind", "odd", "words"),
    [
        (GraniteConfig, {"logits_scaling": 8.0}, "logits_scaling"),
        (Gemma2Config, {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
    ],
)
def test_chunks_are_refused_where_logits_are_more_than_a_product(kind, odd, words):
    config = kind(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        vocab_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        **odd,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    recipe = dataclasses.replace(STOCK, attention="eager")
    qlora.apply_levers(model, recipe)
    with pytest.raises(ValueError, match=f"^loss must be 'full' for a model with {words}, got 'ch"):
        qlora.apply_levers(model, dataclasses.replace(recipe, loss="chunked"))


def test_recomputing_is_bit_equal():
    _, stock = loss_and_gradients(STOCK)
    _, again = loss_and_gradients(dataclasses.replace(STOCK, checkpointed_layers="all"))
    assert torch.equal(stock, again)


def test_dropout_is_the_same_when_recomputed():
    dropping = dataclasses.replace(STOCK, lora_dropout=0.3)
    results = []
    for k in (0, "all"):
        recipe = dataclasses.replace(dropping, checkpointed_layers=k)
        model = build(recipe)
        torch.manual_seed(5)
        qlora.compute_loss(model, batch(), recipe).backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(*results)


def test_every_attention_kernel_of_a_gpu_is_kept():
    assert {kernel.default for kernel in flops.FORWARD} <= set(levers.ATTENTION_KERNELS)


@pytest.mark.parametrize("loss", ["full", "chunked", "lean"])
def test_num_items_makes_micro_batches_add_up(loss):
    recipe = dataclasses.replace(STOCK, loss=loss, loss_chunk_tokens=7)
    _, whole = loss_and_gradients(recipe)
    model, full = build(recipe), batch()
    items = (full["labels"][:, 1:] != -100).sum()
    for row in range(3):
        part = {name: value[row : row + 1] for name, value in full.items()}
        qlora.compute_loss(model, part, recipe, items).backward()
    parts = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    assert (parts - whole).norm() <= 1e-5 * whole.norm()


def peak(recipe, **options):
    model, inputs = build(recipe, **options), batch()
    with MemoryLedger(model, inputs=tuple(inputs.values())) as ledger:
        qlora.compute_loss(model, inputs, recipe).backward()
    return ledger.report()


def test_checkpointing_k_layers_saves_in_proportion():
    saved = [
        peak(dataclasses.replace(STOCK, checkpointed_layers=k)).saved_activation_bytes
        for k in range(5)
    ]
    steps = [before - after for before, after in zip(saved, saved[1:], strict=False)]
    assert len(set(steps)) <= 2 and min(steps) > 10 * 3 * SEQ * 64 * 4  # many boundaries a layer


def test_chunked_loss_never_holds_all_logits():
    logits = 3 * SEQ * 4000 * 4
    full, chunked = (
        peak(
            dataclasses.replace(STOCK, checkpointed_layers="all", loss=loss, loss_chunk_tokens=8),
            vocab_size=4000,
        )
        for loss in ("full", "chunked")
    )
    assert sum(b.n_bytes == logits for b in full.largest) >= 2
    assert all(b.n_bytes < logits / 10 for b in chunked.largest if b.category != "weights")
    assert full.peak_bytes - chunked.peak_bytes > 2 * logits


@pytest.mark.parametrize("loss", ["chunked", "lean"])
def test_prompts_get_no_logits(loss):
    """Half of the tokens labelled: half of the head's products, in a batch with a mask."""

    def products(labelled):
        recipe = dataclasses.replace(STOCK, loss=loss, loss_chunk_tokens=4)
        model, inputs = build(recipe), batch()
        inputs["labels"] = inputs["input_ids"].clone()
        inputs["labels"][:, : SEQ - labelled] = -100
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with FlopCounterMode(display=False) as counter:
            qlora.compute_loss(model, inputs, recipe)
        return counter.get_total_flops()

    head = 2 * 64 * 256 * (2 if loss == "lean" else 1)  # FLOPs a token, forward
    assert products(SEQ) - products(SEQ // 2) == pytest.approx(3 * SEQ / 2 * head, rel=0.05)


def test_a_batch_without_labels_has_no_loss_and_no_gradient():
    for loss in ("chunked", "lean"):
        model, inputs = build(dataclasses.replace(STOCK, loss=loss)), batch()
        inputs["labels"][:] = -100
        value = qlora.compute_loss(model, inputs, dataclasses.replace(STOCK, loss=loss), 5)
        value.backward()
        assert value == 0 and all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_lean_mlp_keeps_one_tensor_less_in_each_layer():
    stock, lean = (peak(dataclasses.replace(STOCK, mlp=mlp)) for mlp in ("stock", "lean"))
    assert stock.saved_activation_bytes - lean.saved_activation_bytes == 4 * 3 * SEQ * 128 * 4


def test_kept_attention_is_not_computed_again():
    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func in levers.ATTENTION_KERNELS
            return func(*args, **(kwargs or {}))

    def kernels(keep):
        model = build(dataclasses.replace(STOCK, checkpointed_layers="all", keep_attention=keep))
        with Count() as count:
            qlora.compute_loss(model, batch(), STOCK).backward()
        return count.calls

    assert (kernels(False), kernels(True)) == (8, 4)  # 4 layers


def test_lean_rotary_turns_a_part_of_each_head_as_phi_wants():
    torch.manual_seed(0)
    model = Phi3ForCausalLM(Phi3Config(**SIZES | PHI3))
    results = []
    for change in (lambda model: None, lean.use_lean_rotary):
        change(model)
        model.zero_grad()
        model(**batch()).loss.backward()
        results.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    stock, ours = results
    assert (ours - stock).norm() <= 1e-5 * stock.norm()


def test_lean_rotary_moves_half_the_bytes():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    class Traffic(TorchDispatchMode):
        n_bytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if not func.is_view:
                self.n_bytes += sum(t.nbytes for t in tensors_in((args, result)))
            return result

    def moved(turn):
        query, key = (
            torch.randn(2, 32, heads, 16).transpose(1, 2).requires_grad_() for heads in (4, 2)
        )
        angles = torch.randn(2, 32, 8).repeat(1, 1, 2)
        cos, sin, grads = angles.cos(), angles.sin(), (query.clone(), key.clone())
        with Traffic() as traffic:
            torch.autograd.backward(turn(query, key, cos, sin), grads)
        return traffic.n_bytes

    assert moved(lean.apply_rotary) < 0.6 * moved(apply_rotary_pos_emb)


def test_lean_adapters_step_aside_when_adapters_are_off():
    model = build(dataclasses.replace(STOCK, adapters="lean")).eval()
    inputs = {"input_ids": batch()["input_ids"]}
    with torch.no_grad(), model.disable_adapter():
        off = model(**inputs).logits
    assert torch.equal(off, build(STOCK).eval().unload()(**inputs).logits)


def test_the_last_layers_are_the_ones_that_remember():
    model = build(dataclasses.replace(STOCK, checkpointed_layers=1))
    assert [layer.gradient_checkpointing for layer in levers.decoder_layers(model)] == [
        True,
        False,
        False,
        False,
    ]


@pytest.mark.parametrize("k", [5, -1])
def test_more_checkpointed_layers_than_layers(k):
    with pytest.raises(ValueError, match=f"checkpointed_layers must be from 0 to 4.*got {k}"):
        levers.checkpoint_layers(build(STOCK), k)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU for its attention kernel")
def test_explicit_kv_runs_on_the_memory_efficient_kernel():
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn(1, 8, 64, 64, device="cuda", dtype=torch.float16)
    key = torch.randn(1, 2, 64, 64, device="cuda", dtype=torch.float16)
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION):
        levers.explicit_kv_attention(None, query, key, key, None)
        with pytest.raises(RuntimeError):
            torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="float16 on a GPU has a noise of its own")
@pytest.mark.parametrize("lever", LEVERS)
def test_lever_in_float16_is_as_near_to_float32_as_the_stock_path(lever):
    def gradients(recipe):
        model, inputs = build(recipe).cuda(), {n: t.cuda() for n, t in batch().items()}
        with torch.autocast("cuda", torch.float16, enabled=recipe.amp_dtype is not None):
            loss = qlora.compute_loss(model, inputs, recipe)
        (loss * 1024).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    exact = gradients(STOCK)
    half = dataclasses.replace(STOCK, amp_dtype="float16")
    noise = (gradients(half) - exact).norm()
    error = (gradients(dataclasses.replace(half, **LEVERS[lever])) - exact).norm()
    assert 0 < noise < 0.01 * exact.norm() and error < 2 * noise
