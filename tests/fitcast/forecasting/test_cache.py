"""A question is answered from memory when it is the same question, and only then."""

import copy
import dataclasses

import pytest

from fitcast.forecasting import forecast as forecasting
from fitcast.forecasting.forecast import forecast
from fitcast.gpus import L4, T4
from fitcast.recipe import TrainRecipe
from tests.tiny import write_config


@pytest.fixture
def recipe(tmp_path):
    write_config(tmp_path)
    return TrainRecipe(model=str(tmp_path), amp_dtype="float16", sequence_length=128)


@pytest.fixture
def no_more_runs(monkeypatch):
    """Call it, and whoever runs a model from then on fails."""

    def refuse(*_):
        raise AssertionError("the model was run again")

    return lambda: monkeypatch.setattr(forecasting, "fake_run", refuse)


def test_what_needs_no_memory_is_answered_from_memory(recipe, no_more_runs):
    first = forecast(recipe)
    no_more_runs()
    assert forecast(dataclasses.replace(recipe, learning_rate=1e-5, seed=7, max_steps=3)) == first


@pytest.mark.slow
def test_growing_segments_are_another_question_about_the_same_run(tmp_path, no_more_runs):
    """Only the allocator's replay knows of them: `fit`, which always has them, is spared a run."""
    write_config(tmp_path, num_hidden_layers=8)
    recipe = TrainRecipe(model=str(tmp_path), amp_dtype="float16", sequence_length=8192)
    first = forecast(recipe)
    no_more_runs()
    grown = forecast(dataclasses.replace(recipe, expandable_segments=True))
    assert (grown.operations, grown.phases) == (first.operations, first.phases)
    assert grown.peak_reserved_bytes != first.peak_reserved_bytes


def test_a_config_in_two_places_is_one_question(tmp_path, recipe, no_more_runs):
    first = forecast(recipe)
    no_more_runs()
    other = tmp_path / "copy"
    other.mkdir()
    write_config(other)
    assert forecast(dataclasses.replace(recipe, model=str(other))) == first
    assert forecast(dataclasses.replace(recipe, model=str(other / "config.json"))) == first


@pytest.mark.slow
def test_an_edited_config_is_another_question(tmp_path, recipe):
    two_layers = forecast(recipe).resident_bytes
    write_config(tmp_path, num_hidden_layers=40, vocab_size=50_000)
    assert forecast(recipe).resident_bytes > 5 * two_layers
    write_config(tmp_path)
    assert forecast(recipe).resident_bytes == two_layers


def test_an_edited_config_of_as_many_layers_is_another_run(tmp_path, recipe):
    """Both are cut to the same few layers: what is kept of those must not answer for the other."""
    write_config(tmp_path, num_hidden_layers=8)
    narrow = forecast(recipe).resident_bytes
    write_config(tmp_path, num_hidden_layers=8, hidden_size=512)
    assert forecast(recipe).resident_bytes > 1.5 * narrow


def test_another_card_is_another_question(recipe):
    assert forecast(recipe, T4).gpu == T4
    assert forecast(recipe, L4).gpu == L4


def test_what_a_caller_does_to_his_copy_is_his_own_affair(recipe):
    mine = forecast(recipe)
    before = copy.deepcopy(mine)
    mine.composition["weights"] = 0
    mine.phase_peaks.clear()
    mine.timeline["weights"].clear()
    mine.phases.append("tea")
    mine.largest[0].n_bytes = 0
    mine.saved.pop()
    assert forecast(recipe) == before
