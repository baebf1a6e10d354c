"""The race: its batches, its order, its table, and what a contender that dies leaves behind."""

import argparse
import json
import multiprocessing
import os
import time

import pytest

from fitcast.recipe import TrainRecipe
from tools import race


def turn(contender, setting, tokens_per_second, gib, row="4x2048", repeat=0):
    return {
        "row": row, "repeat": repeat, "contender": contender, "setting": setting,
        "seconds": [2.0, 2.0], "tokens": [2 * tokens_per_second] * 2,
        "peak_allocated_bytes": int(gib * 2**30), "peak_reserved_bytes": int(gib * 2**30),
    }  # fmt: skip


RECORD = {
    "date": "2026-11-30",
    "host": {"gpu": "H200", "cpu": "Xeon", "launch_microseconds": 7.4},
    "turns": [
        turn("unsloth", "", 1000, 7.25),
        turn("unsloth", "", 1100, 7.25, repeat=1),
        turn("unsloth", "", 900, 7.25, repeat=2),
        turn("usual", "", 400, 19.4),
        turn("ours", "fast", 1050, 9),
        turn("ours", "small", 900, 6),
        turn("ours", "worse", 890, 6.5),
        {**turn("ours", "broken", 1, 1), "seconds": [], "error": "out of memory"},
    ],
}


def test_speeds_are_medians_of_repeats_and_ratios_those_of_the_row():
    lines = race.show(RECORD).splitlines()
    assert lines[0] == "H200, Xeon, 7.4 us a launch, 2026-11-30"
    rows = {line[9:39].strip(): line[39:].split() for line in lines[2:]}
    assert rows["unsloth"] == ["1000", "(900-1100)", "7.25", "1.00", "2.50"]
    assert rows["ours fast"] == ["1050", "(1050-1050)", "9.00", "1.05", "2.62"]
    assert rows["ours broken"] == ["out", "of", "memory"]


def test_a_setting_that_another_beats_in_both_is_tried_once():
    raced = race.Race(argparse.Namespace(minutes=1, out=None))
    raced.record["turns"] = RECORD["turns"]
    assert raced.dropped("4x2048") == {"worse", "broken"}


def test_each_repeat_begins_with_another_contender():
    firsts = [race.order(["a", "b", "c"], repeat)[0] for repeat in range(3)]
    assert firsts == ["a", "b", "c"] and sorted(race.order(["a", "b", "c"], 1)) == ["a", "b", "c"]


@pytest.mark.parametrize("row", race.ROWS)
def test_batches_are_as_long_as_their_row_says(row):
    spec = {**race.ROWS[row], "length": min(256, race.ROWS[row]["length"])}
    made = race.batches(spec, vocab_size=1000)
    again = race.batches(spec, vocab_size=1000)
    assert all(
        bool((a["input_ids"] == b["input_ids"]).all()) for a, b in zip(made, again, strict=True)
    )
    assert all(len(batch["input_ids"]) == spec["size"] for batch in made)
    for batch in made:
        assert batch["input_ids"].shape[1] <= spec["length"]
        assert ("attention_mask" in batch) == bool(spec.get("padded"))


def test_padding_is_behind_unlabelled_and_no_token():
    (batch,) = race.batches(
        {"size": 4, "length": 512, "padded": True, "unseen": 0, "timed": 1}, 1000
    )
    mask, labels = batch["attention_mask"], batch["labels"]
    assert bool((mask[:, 1:] <= mask[:, :-1]).all()) and bool((labels[mask == 0] == -100).all())
    assert race.tokens_of(batch) == int(mask.sum()) < mask.numel()


@pytest.mark.parametrize("row", race.ROWS)
def test_every_setting_of_ours_is_a_recipe(row):
    for fields in race.settings("ours", row).values():
        TrainRecipe(**race.recipe_fields(race.ROWS[row], fields))


def test_what_fit_picks_is_raced_first_in_its_row(monkeypatch):
    monkeypatch.setattr(race, "picks", {"1x8192": {"keep_attention": True}})
    assert next(iter(race.settings("ours", "1x8192").items())) == (
        race.FIT,
        {"keep_attention": True},
    )
    assert race.FIT not in race.settings("ours", "4x2048")
    assert race.settings("unsloth", "1x8192") == {"": {}}


def test_a_model_cut_short_takes_every_setting():
    for fields in (race.OURS["embedding on host, 18 kept"], race.OURS["picked"]):
        cut = race.fewer_layers(race.recipe_fields(race.ROWS["4x2048"], fields), 4)
        assert cut["offload_checkpoints"] in (3, False)
        assert cut["keep_attention"] in (4, True)
        assert cut.get("checkpointed_layers", 4) == 4


def dies(pipe):
    os._exit(3)


def test_a_contender_that_dies_leaves_a_row_and_the_race_goes_on(tmp_path):
    context = multiprocessing.get_context("spawn")
    near, far = context.Pipe()
    process = context.Process(target=dies, args=(far,))
    process.start()
    far.close()
    options = argparse.Namespace(minutes=1, out=tmp_path / "race.json", smoke=False)
    raced = race.Race(options)
    raced.pipes["usual"] = (near, process)
    raced.turn("4x2048", 0, "usual", "")
    raced.turn("4x2048", 1, "usual", "")  # it is no contender any more
    raced.dismiss()
    (found,) = json.loads(options.out.read_text())["turns"]
    assert "process" in found["error"] and race.speed(found) is None


def test_without_time_left_no_turn_is_taken():
    raced = race.Race(argparse.Namespace(minutes=0, out=None))
    raced.pipes["usual"] = (None, None)
    time.sleep(0.01)
    raced.turn("4x2048", 0, "usual", "")
    assert raced.record["turns"] == []


def test_a_race_on_record_replaces_rows_of_the_same_kind(tmp_path):
    path = tmp_path / "recorded_runs.json"
    others = [{"group": "ladder", "name": "kept"}, {"group": "race", "name": "packed, ours"}]
    old = {"group": "race", "name": "4x2048, trl", "contender": "trl", "outcome": "trained"}
    too_large = old | {"outcome": "OutOfMemoryError: CUDA out of memory"}
    others.append(too_large)  # no speed that would be compared across machines
    path.write_text(json.dumps({"rows": [old, *others]}))
    turns = [{**found, "at": 10 * i} for i, found in enumerate(RECORD["turns"])]
    contenders = {name: {"versions": {"torch": "2.11.0"}} for name in ("unsloth", "usual", "ours")}
    race.put_on_record(RECORD | {"turns": turns, "contenders": contenders}, path)
    first, second, third, unsloth, *rest = json.loads(path.read_text())["rows"]
    assert [first, second, third] == others and {row["group"] for row in rest} == {"race"}
    assert unsloth["name"] == "4x2048, unsloth" and unsloth["tokens_per_second"] == [
        900,
        1000,
        1100,
    ]
    assert unsloth["started_at_seconds"] == [0, 10, 20] and unsloth["launch_microseconds"] == 7.4
    assert rest[-1]["outcome"] == "out of memory"
