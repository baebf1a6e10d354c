"""A forecast is kept for other processes; only the same question of the same engine finds it."""

import dataclasses
import os

import pytest

from fitcast.forecasting import cache, store
from fitcast.forecasting import forecast as forecasting
from fitcast.forecasting.forecast import forecast
from fitcast.gpus import L4, T4
from fitcast.recipe import TrainRecipe
from tests.tiny import write_config


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    write_config(tmp_path)
    monkeypatch.setenv("FITCAST_CACHE", str(tmp_path / "kept"))
    another_process(monkeypatch)
    return TrainRecipe(model=str(tmp_path), amp_dtype="float16", sequence_length=128)


def another_process(monkeypatch):
    monkeypatch.setattr(cache, "_remembered", type(cache._remembered)())


def files(tmp_path):
    return sorted((tmp_path / "kept").glob("*"))


def no_more_runs(monkeypatch):
    def refuse(*_):
        raise AssertionError("the model was run again")

    monkeypatch.setattr(forecasting, "fake_run", refuse)
    forecasting._shallow_run.cache_clear()


def test_another_process_reads_what_one_worked_out(recipe, tmp_path, monkeypatch):
    first = forecast(recipe)
    assert len(files(tmp_path)) == 1
    another_process(monkeypatch)
    no_more_runs(monkeypatch)
    again = forecast(recipe)
    assert again == first
    assert again.largest[0].dtype is first.largest[0].dtype
    with pytest.raises(AssertionError, match="run again"):
        forecast(recipe, L4)


@pytest.mark.one_fast
@pytest.mark.parametrize("change", ["engine", "config", "recipe"])
def test_what_a_forecast_depends_on_is_asked_anew(recipe, tmp_path, monkeypatch, change):
    forecast(recipe)
    another_process(monkeypatch)
    if change == "engine":
        monkeypatch.setattr(store, "engine", lambda: "another one")
    elif change == "config":
        file = tmp_path / "config.json"
        file.write_text(file.read_text().replace('"hidden_size": 256', '"hidden_size": 512'))
    else:
        recipe = dataclasses.replace(recipe, lora_rank=8)
    forecast(recipe)
    assert len(files(tmp_path)) == 2


def test_the_engines_checksum_sees_every_source_and_version(monkeypatch):
    before = store.engine()
    store.engine.cache_clear()
    monkeypatch.setattr(store, "_version", lambda name: "9.9" if name == "peft" else "1.0")
    assert store.engine() != before
    store.engine.cache_clear()


@pytest.mark.one_fast
@pytest.mark.parametrize("damage", [b"", b"not gzip", None])
def test_a_damaged_file_is_made_anew(recipe, tmp_path, monkeypatch, damage):
    first = forecast(recipe)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    another_process(monkeypatch)
    assert forecast(recipe) == first
    assert store.read(cache.key(asked(recipe), T4), T4) == first


def asked(recipe):
    return dataclasses.replace(recipe, **forecasting.NO_MEMORY)


def test_a_folder_that_cannot_be_written_is_no_error(recipe, tmp_path, monkeypatch):
    (tmp_path / "kept").write_text("a file where the folder would be")
    assert forecast(recipe).peak_allocated_bytes > 0


def test_zero_keeps_nothing(recipe, tmp_path, monkeypatch):
    monkeypatch.setenv("FITCAST_CACHE", "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    forecast(recipe)
    assert not files(tmp_path) and not (tmp_path / "home").exists()
    monkeypatch.delenv("FITCAST_CACHE")
    assert store.folder() == tmp_path / "home" / "fitcast"


def test_the_folder_stays_small_and_keeps_what_was_used_last(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "KEPT", 3)  # the first one's too
    first = forecast(recipe)
    for days, question in enumerate(("a", "b", "c")):
        store.write(question, first)
        os.utime(store._file(question), (days, days))
    store.write("d", first)
    assert store.read("d", T4) == first and store.read("c", T4) == first
    assert store.read("a", T4) is None and store.read("b", T4) is None
    assert len(files(tmp_path)) == 3
