"""A rank's forecast: FSDP2's own code on fake tensors, against what two GPUs measured."""

import dataclasses
import json
from pathlib import Path

import pytest

from fitcast import forecast
from fitcast.forecasting import ranks
from fitcast.gpus import H200, T4
from fitcast.recipe import TrainRecipe
from tools import measure_ranks

MEASURED = Path(__file__).parents[2] / "data" / "h200_ranks.json"
CARD = dataclasses.replace(H200, flash_attention=False)
RECIPE = TrainRecipe(
    model="llama-3.2-1b", amp_dtype="float16", optimizer="adamw", loss="lean", lora_dropout=0.0,
    sequence_length=64, checkpointed_layers="all",
)  # fmt: skip


def rows() -> list[dict]:
    """Sharded rows that ran to their end; parts on the host are not forecast."""
    every = json.loads(MEASURED.read_text("utf-8"))["rows"]
    return [r for r in every if r["strategy"] == "fsdp2" and not r["offload"]]


@pytest.mark.slow
@pytest.mark.parametrize("spec", rows(), ids=lambda row: row["name"])
def test_a_rank_needs_what_was_measured(spec):
    stream = ranks.sharded_stream(
        measure_ranks.recipe_of(spec), CARD, measure_ranks.config_of(spec)
    )
    seen = ranks.report(stream, CARD)
    for rank in spec["ranks"]:
        if "error" in rank:  # out of a T4's memory: so says the forecast
            assert seen.peak_reserved_bytes[0] > measure_ranks.T4_BYTES
        else:
            wanted = pytest.approx(rank["peak_allocated_bytes"], rel=0.001)
            assert seen.peak_allocated_bytes == wanted


def test_two_ranks_hold_less_than_one():
    alone = forecast(RECIPE, T4)
    two = forecast(RECIPE, gpu=T4, strategy="fsdp2")
    assert two.peak_allocated_bytes < alone.peak_allocated_bytes


@pytest.mark.parametrize(
    "options, said",
    [
        ({"strategy": "deepspeed"}, "strategy must be ddp or fsdp2"),
        ({"strategy": "ddp", "world_size": 1}, "world_size must be 2 or more"),
        ({"strategy": "fsdp2", "offload": True}, "offload must be False"),
        ({"strategy": "fsdp2", "recipe": "8-bit"}, "optimizer must be 'adamw'"),
    ],
)
def test_what_cannot_be_sharded_is_said_in_a_sentence(options, said):
    eight = options.pop("recipe", None)
    recipe = dataclasses.replace(RECIPE, optimizer="adamw_8bit") if eight else RECIPE
    with pytest.raises(ValueError, match=said):
        forecast(recipe, gpu=T4, **options)


def test_ddp_is_the_recipes_own_world_size():
    many = dataclasses.replace(RECIPE, world_size=2)
    assert forecast(RECIPE, gpu=T4, strategy="ddp") == forecast(many, T4)
