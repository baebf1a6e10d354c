"""What data parallel training adds to a process, against PyTorch's own wrapper."""

import dataclasses
import json

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from course_utils.data import BUNDLED
from fitcast import models
from fitcast.forecasting import data_parallel
from fitcast.forecasting.forecast import forecast, run_stream
from fitcast.gpus import A100, T4
from fitcast.memory.report import Block
from fitcast.memory.stream import Stream
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import MIB

SHAPE = {
    "model_type": "llama",
    "vocab_size": 8000,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 7,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
FULL = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_rank=None,
    lora_dropout=0.0,
    optimizer="adamw",
    sequence_length=16,
)


@pytest.fixture
def alone_in_a_group(monkeypatch, tmp_path):
    """A process group of this process."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    url = f"file://{tmp_path}/meeting"
    distributed.init_process_group("gloo", init_method=url, rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def buckets_of_pytorch(recipe):
    """Bytes of DDP's buckets at first, and from the second step on."""
    config = models.config(recipe.model)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model = qlora.add_adapters(qlora.prepare_base(model, recipe), recipe)
    ddp = DistributedDataParallel(qlora.apply_levers(model, recipe).train())
    ids = torch.zeros(1, recipe.sequence_length, dtype=torch.long)
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.amp_dtype is not None):
            loss = ddp(input_ids=ids, labels=ids).loss
        loss.backward()
        ddp.zero_grad(set_to_none=True)
    said = ddp._get_ddp_logging_data()
    return [
        [int(n) for n in said[name].split(",")] for name in ("bucket_sizes", "rebuilt_bucket_sizes")
    ]


@pytest.mark.one_fast("changes1-True")
@pytest.mark.parametrize(
    ("changes", "tied"),
    [
        ({}, False),
        ({"amp_dtype": "float16"}, True),
        pytest.param(
            {"lora_rank": 256, "lora_targets": "all-linear", "checkpointed_layers": 3},
            False,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_buckets_are_pytorchs(tmp_path, alone_in_a_group, changes, tied):
    """A tied embedding's gradient comes first from the head, and is whole at the end."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE | {"tie_word_embeddings": tied}))
    recipe = dataclasses.replace(FULL, model=str(tmp_path), **changes)
    stream = data_parallel.wrapped(run_stream(recipe, T4))
    ours = [
        [
            block.n_bytes
            for block in stream.blocks
            if block.operation == "DistributedDataParallel"
            and (block.category, block.phase) == ("gradients", phase)
        ]
        for phase in ("wrap", "forward")
    ]
    first, rebuilt = buckets_of_pytorch(recipe)
    assert ours == [first, rebuilt] and len(rebuilt) > 3


@pytest.mark.one_fast
@pytest.mark.parametrize("lora_rank", [None, 16])
def test_each_process_of_several_holds_its_gradients_twice(lora_rank):
    recipe = dataclasses.replace(FULL, lora_rank=lora_rank)
    alone, of_two, of_eight = (
        forecast(dataclasses.replace(recipe, world_size=n), A100) for n in (1, 2, 8)
    )
    model = qlora.add_adapters(AutoModelForCausalLM.from_config(models.config(BUNDLED)), recipe)
    gradients = 4 * sum(p.numel() for p in model.parameters() if p.requires_grad)
    more = of_two.peak_allocated_bytes - alone.peak_allocated_bytes
    assert more == pytest.approx(gradients, rel=0.002)
    assert of_two.resident_bytes - alone.resident_bytes == pytest.approx(gradients, rel=0.002)
    assert of_eight == of_two
    assert of_two.ideal_seconds == alone.ideal_seconds
    assert "wrap" in of_two.phase_peaks and "wrap" not in alone.phase_peaks


@pytest.mark.slow
def test_weights_are_sent_in_the_models_own_order(tmp_path, monkeypatch):
    """As PyTorch groups the model's named parameters and buffers, the head behind the layers."""
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    recipe = dataclasses.replace(FULL, model=str(tmp_path))
    monkeypatch.setattr(data_parallel, "FLAT", 25 * MIB)
    stream = data_parallel.wrapped(run_stream(recipe, T4))
    ours = [b.n_bytes for b in stream.blocks if b.phase == "wrap" and b.category == "temporaries"]
    model = AutoModelForCausalLM.from_config(models.config(recipe.model), dtype=torch.float32)
    sent = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    groups, _ = distributed._compute_bucket_assignment_by_size(sent, [25 * MIB])
    wanted = [sum(sent[n].nbytes for n in group) for group in groups if len(group) > 1]
    assert ours == wanted and max(wanted) > SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4


def test_weights_are_sent_in_flat_tensors_two_at_a_time():
    """1000 MiB in weights of 100: flat tensors of 300, 300, 300; the last one is sent as it is."""
    blocks = [
        Block(100 * MIB, "weights", "empty", "", "load", (100 * MIB,), torch.uint8)
        for _ in range(10)
    ]
    events = [(1, number, "load") for number in range(10)]
    marks = {"load": 10, "adapters": 10, "ready": 10, "step": 10}
    stream = data_parallel.wrapped(Stream(blocks, events, marks))
    live, seen = 0, []
    for sign, block, _ in stream.events[10:]:
        live += sign * stream.blocks[block].n_bytes
        seen.append(live // MIB)
    assert seen == [300, 600, 300, 600, 300, 0]
    assert stream.marks == {"load": 10, "adapters": 10, "ready": 16, "step": 16}
