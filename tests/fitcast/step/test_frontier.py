"""Tiles, checkpoints of some layers and the embedding on the host: what they keep, run and refuse.

That they change no loss and no gradient is in test_levers.py.
"""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from course_utils.data import BUNDLED
from fitcast.forecasting import forecast as forecasting
from fitcast.gpus import H200, T4
from fitcast.recipe import TrainRecipe
from fitcast.step import embedding, host, levers, qlora, tiles

DATA = Path(__file__).resolve().parents[2] / "data"
SIZES = dict(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    vocab_size=256,
    num_attention_heads=4,
    num_key_value_heads=2,
    use_cache=False,
)
STOCK = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_dropout=0.0,
    lora_targets="all-linear",
    sequence_length=48,
    optimizer="adamw",
    learning_rate=1e-2,
)
ALL = {"mlp_tile_tokens": 20, "offload_checkpoints": 2, "embedding": "host", "mlp": "lean"}


def build(recipe, kind=LlamaForCausalLM, config=LlamaConfig, **sizes):
    torch.manual_seed(0)
    model = qlora.prepare_base(kind(config(**SIZES | sizes)), recipe)
    return qlora.apply_levers(qlora.add_adapters(model, recipe), recipe).train()


def batches(count=2):
    ids = torch.randint(0, 256, (count, 2, 48), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": rows, "labels": rows.clone()} for rows in ids]


def losses(recipe, steps, **model):
    model = build(recipe, **model)
    optimizer = qlora.build_optimizer(model, recipe)
    step = [float(qlora.training_step(model, optimizer, batches(), recipe)) for _ in range(steps)]
    return torch.tensor(step), model


@pytest.mark.parametrize(
    ("kind", "config"),
    [(LlamaForCausalLM, LlamaConfig), (MistralForCausalLM, MistralConfig)],
    ids=["llama", "mistral"],
)
@pytest.mark.slow
def test_twenty_steps_lose_the_same(kind, config):
    stock, _ = losses(STOCK, 20, kind=kind, config=config)
    ours, model = losses(dataclasses.replace(STOCK, **ALL), 20, kind=kind, config=config)
    assert torch.allclose(ours, stock, rtol=1e-4) and stock[-1] < 0.9 * stock[0]
    # forty micro batches used the same memory again: (2, 48, 64) float32 numbers, of two layers
    assert levers.pinned_host_bytes(model) == 2 * torch.empty(2, 48, 64).nbytes


def test_dropout_drops_the_same_in_a_tile_of_backward():
    """A difference quotient asks forward alone; backward has to have dropped the same."""
    recipe = dataclasses.replace(STOCK, lora_dropout=0.3, checkpointed_layers=0, mlp_tile_tokens=20)
    model = build(recipe)
    weight = model.get_base_model().model.layers[1].mlp.up_proj.lora_B["default"].weight

    def loss():
        torch.manual_seed(3)
        return qlora.compute_loss(model, batches(1)[0], recipe)

    loss().backward()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.05)
    model.zero_grad()
    loss().backward()
    direction, small = weight.grad / weight.grad.norm(), 1e-2
    with torch.no_grad():
        weight += small * direction
        above = loss()
        weight -= 2 * small * direction
        below = loss()
    assert torch.isclose((above - below) / (2 * small), weight.grad.norm(), rtol=1e-2)


def test_a_recomputed_layer_does_not_run_its_mlp_again(monkeypatch):
    """Each tile runs twice in a step: once forward, once in backward. Never a third time."""
    tokens = []
    stock = LlamaMLP.forward
    monkeypatch.setattr(
        LlamaMLP, "forward", lambda self, x: (tokens.append(len(x)), stock(self, x))[1]
    )
    recipe = dataclasses.replace(STOCK, mlp_tile_tokens=20)
    model = build(recipe)
    del tokens[:]
    qlora.compute_loss(model, batches(1)[0], recipe).backward()
    assert sum(tokens) == 2 * 4 * (2 * 48) and max(tokens) == 20


def test_a_checkpoint_is_fetched_one_layer_ahead(monkeypatch):
    recipe = dataclasses.replace(STOCK, offload_checkpoints=3)
    model, happened = build(recipe), []
    monkeypatch.setattr(host, "copy", lambda to, x: (happened.append("copy"), to.copy_(x)))
    for number, layer in enumerate(levers.decoder_layers(model)):
        layer.self_attn.register_forward_hook(lambda *_, n=number: happened.append(n))
    qlora.compute_loss(model, batches(1)[0], recipe).backward()
    out, back = happened[:7], happened[7:]
    assert out == ["copy", 0, "copy", 1, "copy", 2, 3]  # the last one's stays
    assert back == ["copy", 3, "copy", 2, "copy", 1, 0]


def test_batches_that_get_longer_lock_no_second_set():
    """Host memory is that of the longest batch so far, however many were the longest before."""
    checkpoints, held = host.HostCheckpoints(ahead=True), []
    for tokens in (32, 48, 40, 64):
        waiting = [host.Waiting(checkpoints, torch.zeros(tokens, 64)) for _ in range(3)]
        held.append(checkpoints.n_bytes)
        assert [one.host.shape[0] for one in waiting] == [tokens] * 3
        del waiting
        assert sum(memory.nbytes for memory in checkpoints.free) == checkpoints.n_bytes
    assert held == [3 * 64 * 4 * longest for longest in (32, 48, 48, 64)]


def test_two_forward_passes_before_a_backward_keep_their_own_checkpoints():
    recipe = dataclasses.replace(STOCK, offload_checkpoints=3)

    def gradients(recipe):
        model = build(recipe)
        one, two = (qlora.compute_loss(model, batch, recipe) for batch in batches())
        (one + 2 * two).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    assert torch.equal(gradients(recipe), gradients(STOCK))


def embedded(**options):
    model = LlamaForCausalLM(LlamaConfig(**SIZES | options.pop("sizes", {})))
    model.requires_grad_(False)
    if options:
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], **options))
    return model


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: embedded(sizes={"tie_word_embeddings": True}), "the head's weight, too"),
        (lambda: embedded(modules_to_save=["embed_tokens"]), "in modules_to_save"),
        (lambda: LlamaForCausalLM(LlamaConfig(**SIZES)), "is trained"),
    ],
    ids=["tied", "modules_to_save", "trained"],
)
def test_an_embedding_that_has_to_stay_is_refused_by_name(model, words):
    with pytest.raises(ValueError, match=f"embedding must be 'stock'.*{words}"):
        embedding.use_host_embedding(model())


def test_an_embedding_on_the_host_stays_there():
    model = embedded()
    embedding.use_host_embedding(model)
    weight = model.get_input_embeddings().weight
    model.to(torch.float64)  # as `.to("cuda")` would move all the others
    assert model.get_input_embeddings().weight is weight and weight.dtype == torch.float32
    assert model.lm_head.weight.dtype == torch.float64


def test_rows_of_an_embedding_on_the_host_go_where_the_model_went():
    """Also where it went after the lever was pulled; meta stands for the GPU."""
    model = embedded()
    embedding.use_host_embedding(model)
    model.to("meta")
    table = model.get_input_embeddings()
    assert table.weight.device.type == "cpu"
    assert table(torch.zeros(1, 4, dtype=torch.long)).device.type == "meta"


def test_tiles_refuse_a_model_without_a_gated_mlp():
    with pytest.raises(ValueError, match="mlp_tile_tokens must be None for a model without"):
        tiles.use_tiled_mlp(torch.nn.Linear(2, 2))


def test_more_checkpoints_on_the_host_than_can_wait():
    with pytest.raises(ValueError, match="offload_checkpoints must be True or below 4"):
        levers.checkpoint_layers(build(STOCK), "all", offload=4)


@pytest.mark.slow
def test_few_layers_stand_for_all_of_them():
    recipe = dataclasses.replace(
        STOCK, model="llama-3.2-1b", amp_dtype="float16", base="nf4", checkpointed_layers=14,
        offload_checkpoints=6, mlp_tile_tokens=20, mlp="lean", adapters="lean",
    )  # fmt: skip
    few, whole = (forecasting.run_stream(recipe, T4, whole=whole) for whole in (False, True))
    assert few.pinned_host_bytes == whole.pinned_host_bytes == 6 * 48 * 2048 * 2
    said, counted = (forecasting.report(stream, T4) for stream in (few, whole))
    assert said.peak_allocated_bytes == counted.peak_allocated_bytes
    assert said.phase_peaks == counted.phase_peaks and said.composition == counted.composition


ROWS = json.loads((DATA / "h200_frontier.json").read_text("utf-8"))["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=[row["name"] for row in ROWS])
def test_a_measured_frontier_is_forecast(row, monkeypatch):
    monkeypatch.chdir(DATA.parents[1])  # configs are said from there
    said = forecasting.forecast(
        TrainRecipe(**row["recipe"]), dataclasses.replace(H200, flash_attention=False)
    )
    assert said.peak_allocated_bytes == pytest.approx(row["peak_allocated_bytes"], rel=1e-3)
    assert said.pinned_host_bytes == row["pinned_host_bytes"]
    low, high = said.peak_reserved_bytes
    assert low <= row["peak_reserved_bytes"] <= high
