"""A rank's forecast: FSDP2's own code on fake tensors, against what two GPUs measured."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.fsdp import fully_shard

from fitcast import forecast, models
from fitcast.forecasting import data_parallel, ranks
from fitcast.gpus import H200, T4
from fitcast.recipe import TrainRecipe
from fitcast.units import MIB
from tools import measure_ranks

MEASURED = Path(__file__).parents[2] / "data" / "h200_ranks.json"
# DDP's ranks side by side on one card, through gloo: memory only.
ON_ONE_CARD = MEASURED.with_name("h200_ranks_one.json")
# Each rank was held to so many bytes of tensors and holes.
CARD = dataclasses.replace(
    H200, flash_attention=False, total_bytes=measure_ranks.T4_BYTES + H200.context_bytes
)
RECIPE = TrainRecipe(
    model="llama-3.2-1b", amp_dtype="float16", optimizer="adamw", loss="lean", lora_dropout=0.0,
    sequence_length=64, checkpointed_layers="all",
)  # fmt: skip


def rows_of_parts() -> list[dict]:
    """Sharded rows that ran to their end, or ran out of memory."""
    every = json.loads(MEASURED.read_text("utf-8"))["rows"]
    return [r for r in every if r["strategy"] == "fsdp2"]


# Forecast less exactly than to 0.01 %: 0.7 MiB too little, 4 MiB too much, of a cause not known.
NEARLY = {"1b fsdp2 nf4": 0.001, "32b fsdp2 host embedding": 0.001}
# Of four replays under the limit one runs to its end, and so did the run: 45 MiB were left.
TOO_CAREFUL = ("8b fsdp2 20k",)
FAST = "1b fsdp2 16-bit lora"  # guards the others


def one_fast(rows: list[dict]) -> list:
    """As parameters of a test, all slow but one."""
    return [
        pytest.param(row, id=row["name"], marks=[] if row["name"] == FAST else pytest.mark.slow)
        for row in rows
    ]


@pytest.mark.parametrize("spec", one_fast(rows_of_parts()))
def test_a_rank_needs_what_was_measured(spec):
    recipe, config = measure_ranks.recipe_of(spec), measure_ranks.config_of(spec)
    stream = ranks.sharded_stream(recipe, CARD, config, offload=spec["offload"])
    seen = ranks.report_rank(stream, CARD, recipe)
    for rank in spec["ranks"]:
        if "error" in rank:
            assert "OutOfMemoryError" in rank["error"] and seen.verdict == "does not fit"
        else:
            close = NEARLY.get(spec["name"], 0.0001)
            wanted = pytest.approx(rank["peak_allocated_bytes"], rel=close)
            assert seen.peak_allocated_bytes == wanted
            low, high = seen.peak_reserved_bytes
            assert low <= rank["peak_reserved_bytes"] <= high
            assert seen.fits == (spec["name"] not in TOO_CAREFUL)


def replicated(files: tuple[Path, ...] = (MEASURED, ON_ONE_CARD)) -> list[dict]:
    """Rows of DDP, and the one process that they are held against."""
    every = [row for path in files for row in json.loads(path.read_text("utf-8"))["rows"]]
    return [row for row in every if row["strategy"] == "ddp"]


def over_nccl() -> list[dict]:
    """Those of ranks with a card each."""
    return replicated((MEASURED,))


def test_two_ranks_lose_what_one_process_loses():
    """Of one batch: two DDP ranks and FSDP2's parts against one process, and against each other."""
    for measured in (replicated(), replicated()[::-1]):  # over NCCL, and through gloo
        rows = {row["name"]: row["ranks"] for row in measured + rows_of_parts()}
        pairs = ("equal ddp", "equal one"), ("equal fsdp2", "equal one"), ("8b fsdp2", "8b ddp")
        for name, other in pairs:
            alone = pytest.approx(rows[other][0]["losses"], abs=1e-3)
            assert all(rank["losses"] == alone for rank in rows[name])


def test_rows_measured_again_agree():
    """To the byte, also in what the allocator reserved."""
    again = [row for row in rows_of_parts() if "measured_again" in row]
    assert {row["name"] for row in again} == {"8b fsdp2", "8b fsdp2 16k"}
    for row in again:
        for first, second in zip(row["ranks"], row["measured_again"], strict=True):
            assert second["peak_allocated_bytes"] == first["peak_allocated_bytes"]
            assert second["peak_reserved_bytes"] == first["peak_reserved_bytes"]
            assert second["losses"] == pytest.approx(first["losses"], abs=1e-3)


def test_ranks_on_one_card_measure_what_two_cards_do():
    """Tensors, of six rows; what NCCL and gloo make the allocator reserve differs by up to 9 %."""
    found: dict[str, list[int]] = {}
    for row in replicated():
        peak = row["ranks"][0]["peak_allocated_bytes"]
        found.setdefault(row["name"], []).append(peak)
    twice = [peaks for peaks in found.values() if len(peaks) == 2]
    assert len(twice) == 6
    for here, there in twice:
        assert here == pytest.approx(there, rel=0.001)


# Below the lower bound by up to 8 % through gloo, whose own tensors lie between two holes, or not.
OUTSIDE = ("0.6b ddp full", "0.6b ddp full, accumulated")


@pytest.mark.slow
@pytest.mark.parametrize("spec", replicated(), ids=lambda row: row["name"])
def test_a_replica_needs_what_was_measured(spec, request):
    recipe, config = measure_ranks.recipe_of(spec), measure_ranks.config_of(spec)
    stream = ranks.whole_stream(recipe, CARD, config)
    if spec["processes"] > 1:
        stream = data_parallel.wrapped(stream)
    seen = ranks.report_rank(stream, CARD, recipe)
    for rank in spec["ranks"]:
        wanted = pytest.approx(rank["peak_allocated_bytes"], rel=0.001)
        assert seen.peak_allocated_bytes == wanted
        if spec["processes"] > 1:
            wrapping = rank["loaded"]["peak_allocated_bytes"]
            assert seen.phase_peaks["wrap"] == pytest.approx(wrapping, rel=0.0001)
    if spec["name"] in OUTSIDE and spec not in over_nccl():
        request.applymarker(pytest.mark.xfail(strict=True, reason="reserved less than forecast"))
    low, high = seen.peak_reserved_bytes
    assert all(low <= rank["peak_reserved_bytes"] <= high for rank in spec["ranks"])


def tiny_stream(recipe=RECIPE, **options):
    config = measure_ranks.config_of({"recipe": {"model": recipe.model}, "layers": 2})
    return ranks.sharded_stream(recipe, T4, config, **options)


def test_gathers_lie_on_streams_of_their_own():
    """`foreach_all_gather` and `foreach_reduce` enter a stream each: two beside the step's."""
    blocks = tiny_stream().blocks
    assert {block.stream for block in blocks} == {0, 1, 2}
    assert all(b.operation.startswith("empty") for b in blocks if b.stream)


def test_parts_on_the_host_take_nothing_of_the_card():
    here, host = (tiny_stream(offload=choice) for choice in (False, True))
    seen = [ranks.report_rank(stream, T4, RECIPE) for stream in (here, host)]
    assert seen[1].loaded_bytes < seen[0].loaded_bytes
    assert "optimizer state" not in {b.category for b in host.blocks}


@pytest.mark.slow
def test_two_ranks_hold_less_than_one(tmp_path):
    config = models.config(RECIPE.model)
    config.num_hidden_layers, config.vocab_size = 4, 1024
    config.save_pretrained(tmp_path)
    shallow = dataclasses.replace(RECIPE, model=str(tmp_path))
    alone = forecast(shallow, T4)
    two = forecast(shallow, gpu=T4, strategy="fsdp2")
    assert two.peak_allocated_bytes < alone.peak_allocated_bytes


@pytest.mark.slow
def test_an_embedding_on_the_host_is_neither_held_nor_gathered():
    """Llama-3.1-8B's has 128 256 rows of 4 096 numbers, and the head another weight."""
    table = 128256 * 4096 * 2
    stock = dataclasses.replace(RECIPE, model="llama-3.1-8b")
    host = dataclasses.replace(stock, embedding="host")
    blocks = [tiny_stream(recipe).blocks for recipe in (stock, host)]
    gathered = [sum(b.n_bytes == table and b.phase != "load" for b in made) for made in blocks]
    assert gathered[0] > 0 == gathered[1]
    loaded = [ranks.report_rank(tiny_stream(r), T4, r).loaded_bytes for r in (stock, host)]
    assert loaded[0] - loaded[1] == pytest.approx(table // 2, abs=2 * MIB)  # a segment's rest


def test_32b_trains_on_two_cards_only_with_parts_or_the_embedding_on_the_host():
    """Qwen3-32B at 1 x 1024, measured: two cards do not hold it whole."""
    rows = {row["name"]: row["ranks"] for row in rows_of_parts()}
    assert all("OutOfMemoryError" in rank["error"] for rank in rows["32b fsdp2 1x1024"])
    for name in ("32b fsdp2 offload", "32b fsdp2 host embedding"):
        assert all(rank["peak_allocated_bytes"] for rank in rows[name]), name


@pytest.mark.parametrize(
    "options, said",
    [
        ({"strategy": "deepspeed"}, "strategy must be ddp, fsdp2 or device_map"),
        ({"strategy": "ddp", "world_size": 1}, "world_size must be 2 or more"),
        ({"strategy": "ddp", "offload": True}, "offload must be False with ddp"),
        ({"strategy": "device_map", "offload": True}, "offload must be False with device_map"),
        ({"strategy": "fsdp2", "recipe": "8-bit"}, "optimizer must be 'adamw'"),
    ],
)
def test_what_cannot_be_sharded_is_said_in_a_sentence(options, said):
    eight = options.pop("recipe", None)
    recipe = dataclasses.replace(RECIPE, optimizer="adamw_8bit") if eight else RECIPE
    with pytest.raises(ValueError, match=said):
        forecast(recipe, gpu=T4, **options)


@pytest.mark.slow
def test_ddp_is_the_recipes_own_world_size():
    many = dataclasses.replace(RECIPE, world_size=2)
    assert forecast(RECIPE, gpu=T4, strategy="ddp") == forecast(many, T4)


def test_torchs_own_tracker_sees_the_same_bytes():
    """`FSDPMemTracker` counts six linear layers, sharded, through two steps of AdamW."""
    seen = []
    for _ in range(2):
        with ranks.pretended_group(2) as mesh, FakeTensorMode():
            with torch.device("meta"):
                layers = [torch.nn.Linear(512, 512, bias=False) for _ in range(6)]
                model = torch.nn.Sequential(*layers)
            for unit in (*layers, model):
                fully_shard(unit, mesh=mesh)
            model.to_empty(device="cpu")
            optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
            seen.append(_counted(model, optimizer, torch.ones(64, 512), with_ledger=bool(seen)))
    (theirs, their_peak), (ours, our_peak) = seen
    assert theirs == ours == 6 * 512 * 512 * 4 // 2
    assert our_peak == pytest.approx(their_peak, rel=0.01)


def _counted(model, optimizer, rows, *, with_ledger: bool) -> tuple[int, int]:
    """Bytes of the parameters' parts, and the peak, as ours or as PyTorch's tracker counts them."""

    def steps():
        for _ in range(2):
            model(rows).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    if with_ledger:
        ledger = ranks.RankLedger()
        with ranks.told(ledger), ledger:
            ledger.watch(model)
            ledger.note_inputs(rows)
            steps()
        report = ledger.report()
        return report.composition["weights"], report.peak_bytes
    tracker = FSDPMemTracker(model, optimizer)
    tracker.track_inputs((rows,))
    with tracker:
        steps()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    parts = next(n for kind, n in peak.items() if str(kind).endswith("SHARDED_PARAM"))
    return parts, peak["Total"]
