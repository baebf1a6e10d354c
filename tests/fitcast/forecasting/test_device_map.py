"""A device map: who holds what, what crosses, who pays for the logits, and what was measured."""

import dataclasses
import json
from pathlib import Path

import pytest

from fitcast import forecast
from fitcast.forecasting import device_map, ranks
from fitcast.gpus import H200, T4
from fitcast.recipe import TrainRecipe
from fitcast.step.ranks import cut
from tools import measure_ranks

MEASURED = Path(__file__).parents[2] / "data" / "h200_ranks.json"
# Each card was held to so many bytes of tensors and holes.
CARD = dataclasses.replace(
    H200, flash_attention=False, total_bytes=measure_ranks.T4_BYTES + H200.context_bytes
)
RECIPE = TrainRecipe(
    model="llama-3.1-8b", amp_dtype="float16", optimizer="adamw", lora_dropout=0.0,
    sequence_length=64, micro_batch_size=2, checkpointed_layers="all",
)  # fmt: skip
CONFIG = measure_ranks.config_of({"recipe": {"model": RECIPE.model}, "layers": 4})
PLACED = {
    "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 0, "model.layers.2": 1,
    "model.layers.3": 1, "model.norm": 1, "model.rotary_emb": 1, "lm_head": 1,
}  # fmt: skip
NUMBERS = 2 * 64 * 128256  # logits


def measured() -> list[dict]:
    """Runs of one process on two cards, with the map that it had."""
    every = json.loads(MEASURED.read_text("utf-8"))["rows"]
    return [row for row in every if row["strategy"] in ("auto", "balanced", "loaded auto")]


@pytest.fixture(scope="module")
def seen():
    """The events of four layers on two cards, and each block's card."""
    return device_map.stream_of_cards(RECIPE, T4, CONFIG, PLACED)


@pytest.mark.slow
@pytest.mark.parametrize("spec", measured(), ids=lambda row: row["name"])
def test_each_card_needs_what_was_measured(spec):
    recipe, config = measure_ranks.recipe_of(spec), measure_ranks.config_of(spec)
    (first,) = spec["ranks"]
    if spec["strategy"] != "loaded auto":
        model = ranks.packed_model(recipe, config)
        assert cut(model, spec["strategy"], 2, measure_ranks.T4_BYTES) == first["device_map"]
    loaded = spec["strategy"] == "loaded auto"
    stream, cards = device_map.stream_of_cards(
        recipe, CARD, config, first["device_map"], warmed=loaded
    )
    reserved = []
    for number, card in enumerate((first, first["second_card"])):
        part = device_map.stream_of_card(stream, cards, number)
        report = ranks.report_rank(part, CARD, recipe)
        wanted = pytest.approx(card["peak_allocated_bytes"], rel=0.0025)
        assert report.peak_allocated_bytes == wanted
        reserved.append((report.peak_reserved_bytes, card["peak_reserved_bytes"]))
    assert all(low <= there <= high for (low, high), there in reserved)


def test_weights_lie_where_the_map_says(seen):
    """Of four layers the first card holds two and the embedding, the second two and the head."""
    stream, cards = seen
    alone = ranks.report_rank(ranks.whole_stream(RECIPE, T4, CONFIG), T4, RECIPE)
    parts = [device_map.stream_of_card(stream, cards, n) for n in (0, 1)]
    loaded = [ranks.report_rank(part, T4, RECIPE).loaded_bytes for part in parts]
    assert sum(loaded) == pytest.approx(alone.loaded_bytes, rel=0.001)
    assert loaded[0] == pytest.approx(loaded[1], rel=0.001)


def test_transformers_asks_each_card_for_all_its_weights_at_once(seen):
    """`caching_allocator_warmup`, seen in a run of 14B: they lie in one segment then."""
    stream, cards = seen
    for card in (0, 1):
        part = device_map.stream_of_card(stream, cards, card)
        (_, warm_up, _), (sign, gone, _) = part.events[:2]
        assert sign < 0 and gone == warm_up
        loaded = ranks.report_rank(part, T4, RECIPE).loaded_bytes
        assert stream.blocks[warm_up].n_bytes == pytest.approx(loaded, rel=0.07)  # and scales


def test_the_second_card_pays_for_the_loss_and_the_first_for_a_copy(seen):
    """`lm_head` lies on the second card, and so do labels and loss; the answer is sent back."""
    stream, cards = seen
    made = [
        (cards[n], block.operation.startswith("clone"))
        for n, block in enumerate(stream.blocks)
        if block.phase == "forward" and block.n_bytes in (2 * NUMBERS, 4 * NUMBERS)
    ]
    assert {card for card, copied in made if not copied} == {1}
    assert [copied for card, copied in made if card == 0] == [True]


def test_every_layer_of_a_card_that_has_no_rotary_embedding_is_sent_it_again(seen):
    """The map puts `rotary_emb` on the second card: cosines and sines cross for layers 0 and 1."""
    stream, cards = seen
    size = 64 * 128 * 2
    sent = [
        block
        for n, block in enumerate(stream.blocks)
        if block.operation.startswith("clone") and block.n_bytes == size
        and cards[n] == 0 and block.phase == "forward"
    ]  # fmt: skip
    assert len(sent) == 2 * 2


def test_the_state_of_an_adapter_lies_beside_it(seen):
    stream, cards = seen
    states = [n for n, b in enumerate(stream.blocks) if b.category == "optimizer state"]
    large = [cards[n] for n in states if stream.blocks[n].n_bytes > 512]
    assert large.count(0) == large.count(1) > 0


def test_transformers_own_answer_is_taken():
    """Counted by hand: of 8B the first card holds the embedding and 14 of 32 layers.

    Bytes: a layer 109 MB in 4 bits, embedding and head 1 051 MB each, all 5 591 MB. A card may hold
    half and 1.25 of the largest, of that nine tenths, and keeps room for the largest: 2 647 MB.
    """
    config = measure_ranks.config_of({"recipe": {"model": RECIPE.model}, "layers": None})
    placed = device_map.map_of(RECIPE, T4, config)
    first = [path for path, card in placed.items() if card == 0]
    assert first == ["model.embed_tokens", *(f"model.layers.{n}" for n in range(14))]
    assert set(placed.values()) == {0, 1}


def test_a_model_that_two_cards_do_not_hold_is_refused():
    small = dataclasses.replace(T4, total_bytes=2 * 2**30)
    with pytest.raises(ValueError, match="model must fit 2 x"):
        device_map.map_of(RECIPE, small, CONFIG)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"loss": "chunked"}, "loss must be 'full' with a device map"),
        ({"loss": "full", "embedding": "host"}, "embedding must be 'stock' with a device map"),
    ],
)
def test_a_lever_that_wants_one_card_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        forecast(dataclasses.replace(RECIPE, **change), gpu=T4, strategy="device_map")


@pytest.mark.slow
def test_every_card_is_in_the_notes():
    found = forecast(RECIPE, gpu=T4, strategy="device_map")
    assert [note.split(",")[0] for note in found.notes[-2:]] == ["card 0", "card 1"]
    assert found.verdict == "fits" and found.flops > 0
