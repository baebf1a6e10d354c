"""Several cards on the command line: what a rank needs, which strategy is taken, and why."""

import json

import pytest

from fitcast import models
from fitcast.cli import main as cli
from fitcast.forecasting import search, strategies
from fitcast.forecasting.forecast import forecast
from fitcast.forecasting.ranks import forecast_ranks
from fitcast.forecasting.search import DoesNotFit, Fit
from fitcast.gpus import T4
from fitcast.recipe import TrainRecipe
from fitcast.units import show_bytes

ONE_B = ("--model", "llama-3.2-1b", "--sequence-length", "64")


def test_a_ranks_forecast_is_asked_for_by_its_strategy(capsys, tmp_path):
    config = models.config("llama-3.2-1b")
    config.num_hidden_layers, config.vocab_size = 4, 1024
    config.save_pretrained(tmp_path)

    def loaded_bytes(*words):
        shallow = ("forecast", "--model", str(tmp_path), "--sequence-length", "64", "--json")
        assert cli.main([*shallow, *words]) == cli.FITS
        return json.loads(capsys.readouterr().out)["loaded_bytes"]

    alone = loaded_bytes()
    assert loaded_bytes("--strategy", "fsdp2") < 0.8 * alone
    assert loaded_bytes("--strategy", "ddp") == alone


@pytest.mark.slow
def test_a_device_map_is_told_card_by_card(capsys):
    """Llama-3.2-1B in 4 bits is so small that transformers leaves it on the first card."""
    assert cli.main(["forecast", *ONE_B, "--strategy", "device_map"]) == cli.FITS
    said, beside = capsys.readouterr()
    assert "note: card 0, all of the model: fits" in said and "note: card 1 holds nothing" in said
    assert "not available" not in beside


@pytest.mark.parametrize(
    "words, said",
    [
        (("--offload",), "--offload must be given with --strategy fsdp2"),
        (("--strategy", "fsdp"), "did you mean 'fsdp2'?"),
        (("--strategy", "ddp", "--world-size", "1"), "world_size must be 2 or more"),
        (("--strategy", "ddp", "--step", "evaluation"), "--strategy must be given for a training"),
        (("--strategy", "fsdp2", "--optimizer", "paged_adamw_8bit"), "optimizer must be 'adamw'"),
        (("--strategy", "device_map", "--loss", "chunked"), "loss must be 'full'"),
    ],
)
def test_what_makes_no_sense_is_said(capsys, words, said):
    assert cli.main(["forecast", *ONE_B, *words]) == cli.BAD_INPUT
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def seen():
    recipe = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", sequence_length=64)
    return forecast(recipe, T4)


def faked(monkeypatch, seen, fitting: str):
    """A world in which only one way fits; each rank's forecast is one of a small model."""

    def alone(recipe, gpu, target=None, **_):
        if fitting != "ddp":
            raise DoesNotFit("recipe must fit a T4, got more")
        return Fit(recipe=recipe, forecast=seen, tokens_per_second=(1, 2), utilisation=(0.5, 0.6))

    def rank(recipe, gpu, *, strategy, world_size, offload=False):
        name = "fsdp2 --offload" if offload else "fsdp2"
        if recipe.embedding == "host":
            name = strategies.HOST_EMBEDDING
        fits = name == fitting and recipe.micro_batch_size < 4
        much = gpu.total_bytes * (0 if fits else 2)
        return type(seen)(**vars(seen) | {"unlimited_reserved_bytes": (much, much)})

    monkeypatch.setattr(search, "fit", alone)
    monkeypatch.setattr(strategies, "forecast_ranks", rank)


FIT = ("fit", *ONE_B, "--world-size", "2", "--target-effective-batch", "32")


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2 --embedding host", "fsdp2 --offload"])
def test_fit_takes_the_fastest_way_that_fits(monkeypatch, capsys, seen, way):
    faked(monkeypatch, seen, way)
    assert cli.main([*FIT, "--json"]) == cli.FITS
    answer = json.loads(capsys.readouterr().out)
    assert (answer["strategy"], answer["offload"]) == (way.split()[0], "offload" in way)
    assert [w["strategy"] for w in answer["weighed"]] == [
        "ddp", "fsdp2", "fsdp2 --embedding host", "fsdp2 --offload",
    ]  # fmt: skip
    assert answer["recipe"]["embedding"] == ("host" if "embedding" in way else "stock")
    taken = [w for w in answer["weighed"] if w["why"].startswith("taken")]
    assert [w["strategy"] for w in taken] == [way]
    if way != "ddp":
        recipe = answer["recipe"]
        assert recipe["micro_batch_size"] * recipe["gradient_accumulation_steps"] == 16
        assert recipe["micro_batch_size"] == 2, "four do not fit"
    assert cli.main(FIT) == cli.FITS
    said = capsys.readouterr().out
    low, high = (show_bytes(n, "GiB") for n in answer["device_bytes"])
    for rank in (0, 1):
        assert f"  rank {rank}: fits, {low} to {high}\n" in said


def test_where_nothing_fits_every_way_says_why(monkeypatch, capsys, seen):
    faked(monkeypatch, seen, "none")
    assert cli.main(FIT) == cli.DOES_NOT_FIT
    said = capsys.readouterr().err
    assert f"({show_bytes(2 * T4.total_bytes + T4.context_bytes)} with one sequence)" in said
    for words in ("ddp: ", "fsdp2: ", "embedding on the host: ", "parts on the host: "):
        assert f"{words}does not fit" in said


def test_an_embedding_that_cannot_leave_the_card_is_passed_over(monkeypatch, capsys, seen):
    """Llama-3.2-1B's is its head's weight, too; this reason is FSDP2's own."""
    faked(monkeypatch, seen, "fsdp2 --offload")
    rank = strategies.forecast_ranks

    def tied(recipe, gpu, **options):
        return (forecast_ranks if recipe.embedding == "host" else rank)(recipe, gpu, **options)

    monkeypatch.setattr(strategies, "forecast_ranks", tied)
    assert cli.main(FIT) == cli.FITS
    said = capsys.readouterr().out
    assert "embedding on the host: cannot be taken (embedding must be 'stock'" in said
    assert "fsdp2 with its parts on the host: taken" in said


def test_an_embedding_that_is_on_the_host_anyway_is_no_way_of_its_own(monkeypatch, capsys, seen):
    faked(monkeypatch, seen, strategies.HOST_EMBEDDING)
    assert cli.main([*FIT, "--embedding", "host", "--json"]) == cli.FITS
    answer = json.loads(capsys.readouterr().out)
    assert [w["strategy"] for w in answer["weighed"]] == ["ddp", "fsdp2", "fsdp2 --offload"]


def test_what_each_way_keeps_is_what_was_measured():
    from tests.fitcast.forecasting.test_forecast_ranks import MEASURED

    rows = {row["name"]: row for row in json.loads(MEASURED.read_text("utf-8"))["rows"]}
    one = rows["8b one process"]["ranks"][0]["tokens_per_second"]
    for name, kept in strategies.KEPT.items():
        both = rows[f"8b {name}"]["ranks"][0]["tokens_per_second"]
        assert both / (2 * one) == pytest.approx(kept, abs=0.005)
    rows_of = {strategies.HOST_EMBEDDING: "32b fsdp2 host embedding"}
    for name, (_, speed) in strategies.FROM_HOST.items():
        row = rows[rows_of.get(name, "32b fsdp2 offload")]
        assert row["ranks"][0]["tokens_per_second"] == pytest.approx(speed, abs=0.5)
