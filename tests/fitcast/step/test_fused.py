"""Fewer, larger operations: 20 steps have the losses of PyTorch's and PEFT's own code."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fitcast.cuda.kernels import CHECKS_OF_A_CALL
from fitcast.forecasting import forecast as forecasting
from fitcast.gpus import H200, T4
from fitcast.recipe import TrainRecipe
from fitcast.step import apply, compiled, fused, levers, qlora
from fitcast.training import trainer
from tests.tiny import ROWS, TOKENIZER, tiny_recipe
from tools import profile_step, race

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
FUSED = {"adapters": "in_place", "loss": "fused", "loss_chunk_tokens": 20,
         "flat_optimizer": True, "padded": True, "causal_padding": True}  # fmt: skip
WAYS = {
    "fused": FUSED,
    "compiled": FUSED | {"loss": "compiled", "mlp": "compiled", "rotary": "compiled"},
}


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


@pytest.mark.slow
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
    recipe = dataclasses.replace(STOCK, **WAYS[which])
    ours = losses(build(kind, recipe), recipe)
    assert (ours - stock).abs().max() < 1e-4
    assert stock[0] - stock[16] > 0.01  # the same batch, learnt


@pytest.mark.slow
@pytest.mark.parametrize("which", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_stock(kind, which):
    def gradients(recipe):
        model = build(kind, recipe)
        qlora.compute_loss(model, data(1)[0], recipe).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients(STOCK)
    ours = gradients(dataclasses.replace(STOCK, **WAYS[which]))
    assert stock.keys() == ours.keys()
    for name, grad in stock.items():
        torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-6)


def test_the_compiled_loss_is_used_and_a_wrong_one_is_seen(monkeypatch):
    def half(logits, targets):
        loss, grad = whole(logits, targets)
        return loss / 2, grad

    whole, recipe = compiled.loss_and_gradient, dataclasses.replace(STOCK, loss="compiled")
    monkeypatch.setattr(compiled, "loss_and_gradient", half)
    wrong = losses(build("llama", recipe), recipe, count=1)
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
    model = build("llama", STOCK)
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
        for found in (pieces, alone):  # as Trainer clips: the model's own parameters
            torch.nn.utils.clip_grad_norm_(found, 0.1)
        one.step()
        many.step()
        flat.clear()
        many.zero_grad()
    for piece, other in zip(pieces, alone, strict=True):
        torch.testing.assert_close(piece, other)


@pytest.mark.parametrize(
    ("row", "behind"),
    [([1, 1, 0], True), ([1, 1, 1], True), ([0, 1, 1], False), ([1, 0, 1], False)],
)
def test_only_padding_behind_is_forgotten(row, behind):
    model = build("llama", STOCK)
    seen = []
    for _ in range(2):  # twice is once
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


def test_a_step_that_overflows_leaves_no_gradient_behind():
    """Pieces would add the next step's gradients to what is infinite."""
    recipe = dataclasses.replace(STOCK, flat_optimizer=True)
    model = build("llama", recipe)
    optimizer = qlora.build_optimizer(model, recipe)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)  # the scaled loss is beyond float32
    before = [p.clone() for p in model.parameters() if p.requires_grad]
    qlora.training_step(model, optimizer, data(1), recipe, scaler)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(trained, before, strict=True))
    assert all(p.grad is None for p in [*trained, optimizer.flat.parameter])


def test_levers_by_name_take_the_compiled_parts():
    model = build("llama", STOCK)
    said = apply.apply_levers(
        model, mlp="compiled", rotary="compiled", loss="compiled", adapters="in_place",
        causal_padding=True,
    )  # fmt: skip
    assert said.applied["mlp"] == said.applied["loss"] == "compiled"
    batch = data(1)[0]
    ours = model(**batch).loss
    torch.testing.assert_close(ours, build("llama", STOCK)(**batch).loss, rtol=1e-4, atol=1e-4)
    mlp, attention = levers.decoder_layers(model)[0].mlp, levers.decoder_layers(model)[0].self_attn
    assert mlp.forward.__module__ == compiled.__name__
    assert attention.forward.__func__.__globals__["apply_rotary_pos_emb"] is compiled.apply_rotary


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"causal_padding": True}, "causal_padding must be False when padded is False, got True"),
        ({"flat_optimizer": True, "world_size": 2}, "flat_optimizer must be False when wo"),
        ({"flat_optimizer": True, "base": "float32", "lora_rank": None}, "flat_optimizer must"),
        ({"loss": "compiled", "base": "float32", "lora_rank": None}, "loss must be"),
        ({"keep_attention": 4, "checkpointed_layers": 3}, "keep_attention must be True or at most"),
        ({"keep_attention": 1}, "keep_attention must be a whole number from 2 to 1000, got 1"),
    ],
)  # fmt: skip
def test_what_cannot_go_together_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        TrainRecipe(model="llama-3.1-8b", **fields)


def test_attention_is_kept_by_the_last_layers_alone():
    model = build("llama", dataclasses.replace(STOCK, checkpointed_layers=2, keep_attention=False))
    levers.checkpoint_layers(model, 2, keep_attention=1)
    kept = [layer._gradient_checkpointing_func.args[1] for layer in levers.decoder_layers(model)]
    assert kept == [False, True]
    with pytest.raises(ValueError, match="keep_attention must be True or at most 2"):
        levers.checkpoint_layers(model, 2, keep_attention=3)


# --- forecasts ---------------------------------------------------------------------------------

SHORT = dict(model="llama-3.1-8b", amp_dtype="float16", lora_dropout=0.0, sequence_length=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        race.LEAN | race.COMPILED | {"keep_attention": 18},
        race.LEVERS | {"keep_attention": 8, "checkpointed_layers": 20, "flat_optimizer": True},
    ],
)
def test_few_layers_stand_for_all_of_them(fields):
    recipe = TrainRecipe(**SHORT | fields)
    few, whole = (forecasting.run_stream(recipe, T4, whole=whole) for whole in (False, True))
    said, counted = (forecasting.report(stream, T4) for stream in (few, whole))
    assert said.peak_allocated_bytes == counted.peak_allocated_bytes
    assert said.phase_peaks == counted.phase_peaks and said.composition == counted.composition
    assert few.pinned_host_bytes == whole.pinned_host_bytes
    assert said.operations == counted.operations


@pytest.mark.slow
def test_a_compiled_part_is_one_operation_and_makes_nothing_in_between():
    """Forward and backward: stock takes silu, product and their gradients one by one."""
    plain = dict(SHORT, model="llama-3.2-1b", checkpointed_layers=0, loss="lean")
    lean, compiled_ = (
        forecasting.forecast(TrainRecipe(**plain, mlp=mlp), T4) for mlp in ("lean", "compiled")
    )
    calls = 1 + CHECKS_OF_A_CALL
    assert lean.operations - compiled_.operations == 16 * (2 + 4 - 2 * calls)
    assert lean.ideal_seconds > compiled_.ideal_seconds
    assert lean.peak_allocated_bytes >= compiled_.peak_allocated_bytes


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        ("compiled", "; highest in forward in the compiled loss"),
        ("chunked", "beside the model's modules, as a loss or a script's own code is"),
    ],
)
def test_a_peak_outside_of_every_module_is_named_in_the_readers_words(loss, said):
    """The losses that save memory run beside the model; a compiled part is no operation either."""
    short = SHORT | {"loss_chunk_tokens": 4096, "attention": "explicit_kv", "norm": "native"}
    recipe = TrainRecipe(**short | dict(model="llama-3.2-1b", sequence_length=4096, loss=loss))
    seen = forecasting.forecast(recipe, T4)
    assert seen.peak_module == "" and str(seen).endswith(said)


def test_a_compiled_part_of_a_module_says_where_it_is():
    recipe = TrainRecipe(**SHORT | {"model": "llama-3.2-1b", "mlp": "compiled"})
    made = [b for b in forecasting.run_stream(recipe, T4).blocks if "compiled" in b.operation]
    assert {block.operation for block in made} == {"compiled MLP"}
    assert all(".mlp" in block.module for block in made)


DATA = Path(__file__).resolve().parents[2] / "data"
ROWS_ON_RECORD = json.loads(race.RECORDED.read_text("utf-8"))["rows"]
RACED = [row for row in ROWS_ON_RECORD if row["group"] == "race" and row["contender"] == "ours"
         and row["peak_allocated_bytes"]]  # fmt: skip
GUARD = "4x2048, ours, lean, compiled"


@pytest.mark.parametrize(
    "row",
    [pytest.param(r, id=r["name"], marks=[] if r["name"] == GUARD else pytest.mark.slow)
     for r in RACED],
)  # fmt: skip
def test_a_raced_peak_is_forecast(row):
    said = forecasting.forecast(
        race.recipe_on_record(row), dataclasses.replace(H200, flash_attention=False)
    )
    assert said.peak_allocated_bytes == pytest.approx(row["peak_allocated_bytes"], rel=1e-3)


@pytest.mark.slow
def test_a_trainer_trains_them_saves_them_and_goes_on(tmp_path):
    """Losses and gradient norms of Trainer with PEFT's own code; resumed halfway likewise."""
    start = dataclasses.replace(
        tiny_recipe(tmp_path / "model"), lora_dropout=0.0, base="float32", padded=True, max_steps=6,
        save_steps=3, max_grad_norm=0.05, optimizer="adamw",
    )  # fmt: skip
    ours = dataclasses.replace(start, **WAYS["compiled"])

    def run(recipe, name, **options):
        model = trainer.build_model(recipe)
        return trainer.train(recipe, model, ROWS, TOKENIZER, tmp_path / name, **options).steps

    stock, whole = run(start, "stock"), run(ours, "whole")
    run(ours, "halves", stop_at=3)
    halves = run(ours, "halves")
    for name in ("loss", "grad_norm"):
        wanted = [step[name] for step in stock]
        assert [step[name] for step in whole] == pytest.approx(wanted, rel=1e-4)
        assert [step[name] for step in halves] == pytest.approx(wanted, rel=1e-4)


PROFILED = json.loads((DATA / "h200_profile.json").read_text("utf-8"))["rows"]
AS_A_T4 = dataclasses.replace(H200, flash_attention=False)
L2_BYTES = 60 * 2**20  # of an H200: Inductor's buffer while it times kernels, in the first step
STEPS = {name: row for name, row in PROFILED.items() if name.startswith("step")}


def profiled(name):
    return forecasting.forecast(profile_step.recipe_of(profile_step.ROWS[name][2], False), AS_A_T4)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_a_profiled_peak_is_forecast(name):
    """From the first step on, in which a large compiled part is timed beside its tensors."""
    said, peak = profiled(name).peak_allocated_bytes, STEPS[name]["peak_allocated_bytes"]
    timed = L2_BYTES if name == "step, 4 x 2048, compiled" else 0
    assert said + timed == pytest.approx(peak, rel=1e-4)


@pytest.mark.slow
def test_a_short_steps_time_is_the_hosts_and_follows_the_operations():
    """Fewer operations, and compiled calls at their price: all within an eighth of one rate."""
    short = {name: row for name, row in STEPS.items() if "1 x 512" in name}
    assert all(row["gpu_busy_seconds"] < row["step_seconds"] / 3 for row in short.values())
    rates = [row["step_seconds"] / profiled(name).operations for name, row in short.items()]
    assert max(rates) / min(rates) < 1 + 1 / 8
    compiled_, plain = (profiled(f"step, 1 x 512, {way}") for way in ("compiled", "plain parts"))
    assert compiled_.operations > plain.operations  # the host is quicker without


@pytest.mark.parametrize(
    ("part", "operations"),
    [
        ("swiglu", ("silu", "mul")),
        ("swiglu_gradients", ("sigmoid", "rsub", "mul")),
        ("turn", ("cat", "sub", "add")),
        ("loss_and_gradient", ("red", "log_softmax", "exp")),
        ("loss_and_gradient", ("per", "gather", "sum")),
    ],
)
def test_a_kernel_of_each_part_compiles_for_a_t4(part, operations):
    """On record from tools/compiled_for_t4.py; an error would stand in the place of the bytes."""
    assert callable(getattr(compiled, part))
    kernels = json.loads((DATA / "sm_75.json").read_text("utf-8"))["kernels"]
    found = [what for name, what in kernels.items() if set(operations) <= words(name)]
    assert len(found) == 1 and found[0]["cubin_bytes"] > 1000


def words(name):
    """What a kernel's name says that it does; operations of two words are one."""
    return {*name.replace("log_softmax", "logsoftmax").split("_")} | (
        {"log_softmax"} if "log_softmax" in name else set()
    )


@pytest.mark.slow
def test_a_part_is_compiled_for_more_shapes_than_pytorch_allows(monkeypatch):
    """PyTorch's limit of eight ended a race; what compiles here only traces."""
    whole = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **more: whole(f, backend="eager", **more))
    part = compiled._compiled.__wrapped__(lambda x: x + 1)
    for dimensions in range(1, 12):  # of another rank: never the same code
        assert part(torch.zeros([2] * dimensions)).sum() == 2**dimensions


@pytest.mark.slow
def test_the_command_line_brings_no_compiler():
    code = "import sys, fitcast.step.qlora; print('torch._dynamo.eval_frame' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"
