"""The command line: exit codes, text and JSON of every verb, progress when it takes long."""

import dataclasses
import inspect
import json
import os
import shlex
import subprocess
import sys
import time

import pytest

from course_utils.data import BUNDLED
from fitcast import models
from fitcast.cli import changes, options
from fitcast.cli import main as cli
from fitcast.cli.progress import Progress
from fitcast.forecasting import search
from fitcast.forecasting.forecast import NO_MEMORY, checked_config, forecast
from fitcast.gpus import A10, T4
from fitcast.recipe import TrainRecipe
from fitcast.step.apply import PULLED, apply_levers
from fitcast.units import show_bytes

SMALL = ["--model", BUNDLED, "--sequence-length", "64", "--micro-batch-size", "2"]
# In Python: what SMALL says, and the precision that suits a T4.
RECIPE = TrainRecipe(model=BUNDLED, sequence_length=64, micro_batch_size=2, amp_dtype="float16")
TOO_LARGE = ["--model", "llama-3.2-1b", "--sequence-length", "2048", "--micro-batch-size", "12"]


def asked(*words: str) -> TrainRecipe:
    return options.recipe_of(options.parse(words))


def told(capsys, *words: str, code: int = 0):
    """The JSON that a command prints."""
    assert cli.main([*words, "--json"]) == code
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def one_search():
    """A search takes seconds: what it found for a question is told to all who ask it again."""
    searching, found = search.fit, {}

    def fit(*asked, **options):
        if asked not in found:
            found[asked] = searching(*asked, **options)
        return found[asked]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "fit", fit)
        yield


@pytest.fixture(scope="module")
def shallow(tmp_path_factory):
    """A model of two layers, for which a search is short."""
    config = models.config(BUNDLED)
    config.num_hidden_layers = 2
    path = tmp_path_factory.mktemp("shallow")
    config.save_pretrained(path)
    return str(path)


def test_forecast_that_fits_exits_0_and_shows_where_bytes_go(capsys):
    assert cli.main(["forecast", *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fits a T4 (14.56 GiB): peak ")
    assert "\n  weights " in out and "\n  peak in backward " in out


@pytest.mark.slow
def test_images_run_through_the_tower_with_the_step(capsys, tmp_path):
    from tests.fitcast.forecasting.test_images import FAMILIES

    FAMILIES["gemma3"][2].save_pretrained(tmp_path)
    words = ["forecast", "--model", str(tmp_path), "--sequence-length", "64"]
    seen = told(capsys, *words, "--images", "2")
    assert seen["notes"][0] == "forecast as a stock Trainer runs it: its rows hold images"
    assert "each row holds 2 images, whose tokens are among its own" in seen["notes"]


def test_forecast_that_does_not_fit_exits_3(capsys):
    assert cli.main(["forecast", *TOO_LARGE]) == 3
    assert capsys.readouterr().out.startswith("does not fit a T4")


def test_json_is_what_the_library_says(capsys):
    levers = ["--no-double-quant", "--lora-targets", "q_proj,v_proj", "--checkpointed-layers", "0"]
    said = told(capsys, "forecast", *SMALL, "--amp-dtype", "float16", *levers)
    recipe = dataclasses.replace(
        RECIPE, double_quant=False, lora_targets=("q_proj", "v_proj"), checkpointed_layers=0
    )
    f = forecast(recipe, T4)
    assert said["peak_allocated_bytes"] == f.peak_allocated_bytes
    assert tuple(said["device_bytes"]) == f.device_bytes
    assert said["composition"] == f.composition and said["fits"] is True
    assert said["recipe"]["lora_targets"] == ["q_proj", "v_proj"]


def test_amp_none_is_not_the_same_as_not_said():
    assert asked("forecast", *SMALL).amp_dtype == "float16"
    assert asked("forecast", *SMALL, "--gpu", "A10").amp_dtype == "bfloat16"
    assert asked("forecast", *SMALL, "--amp-dtype", "none").amp_dtype is None


def test_every_field_is_an_option_or_changes_no_byte():
    fields = {field.name for field in dataclasses.fields(TrainRecipe)}
    grouped = [name for names in options.GROUPS.values() for name in names]
    assert sorted([*grouped, *options.NOT_ASKED]) == sorted(fields)
    assert set(options.NOT_ASKED) <= set(NO_MEMORY)


@pytest.mark.parametrize("verb", ["forecast", "fit", "levers"])
def test_help_has_its_groups_and_explains_each_option(capsys, verb):
    with pytest.raises(SystemExit) as stop:
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert stop.value.code == 0
    what = "(--model NAME | FILE)" if verb == "forecast" else "--model NAME"
    assert out.startswith(f"usage: fitcast {verb} {what} [option ...]")
    titles = [line.split(" (")[0].rstrip(":") for line in out.splitlines() if line[:1].isalpha()]
    wanted = ["options", "model", "batch", "levers", "card", "output"]
    assert [title for title in titles if title in wanted] == wanted
    about = options._field_docs() | options.IN_OTHER_WORDS
    assert [f for fs in options.GROUPS.values() for f in fs if f != "model" and not about[f]] == []
    assert "None" not in out and "`" not in out
    assert "(required)" in out and ("--target-effective-batch" in out) is (verb == "fit")


def test_fit_names_settings_and_the_command_for_what_comes_next(capsys, one_search, shallow):
    arguments = ["fit", "--model", shallow, "--sequence-length", "32"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out and "one change at a time" in out and "micro batch" in out
    asked_for = TrainRecipe(model=shallow, amp_dtype="float16", sequence_length=32)
    before = forecast(asked_for, T4)  # what it was, beside what it is to be
    low, high = (show_bytes(n, "GiB") for n in before.device_bytes)
    assert f"\n  was: fits, {low} to {high}\n" in out
    again = shlex.split(out.splitlines()[-1])
    assert again[:2] == ["fitcast", "levers"]
    said = told(capsys, *arguments)
    assert tuple(said["before"]["device_bytes"]) == before.device_bytes
    assert said["before"]["verdict"] == "fits" and said["device_bytes"] != [*before.device_bytes]
    low, high = said["tokens_per_second"]
    assert said["fits"] and 0 < low <= high and tuple(said["utilisation"]) == T4.sustained
    # What it found can be asked for, by a reader and by a program.
    words = shlex.split(said["command"])
    assert words[:2] == ["fitcast", "forecast"]
    found = dataclasses.asdict(asked(*words[1:]))
    assert found | {"lora_targets": list(found["lora_targets"])} == said["recipe"]
    assert asked(*again[1:]) == asked(*words[1:])


def test_what_fit_changed_is_said_for_a_script():
    start = dataclasses.replace(RECIPE, micro_batch_size=4, gradient_accumulation_steps=8)
    found = dataclasses.replace(
        start,
        micro_batch_size=2,
        gradient_accumulation_steps=16,
        checkpointed_layers=1,
        keep_attention=True,
        attention="explicit_kv",
        loss="lean",
        expandable_segments=True,
    )
    assert changes.in_a_script(start, found) == [
        "- per_device_train_batch_size=4,",
        "+ per_device_train_batch_size=2,",
        "- gradient_accumulation_steps=8,",
        "+ gradient_accumulation_steps=16,",
        '+ os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"',
        "+ fitcast.apply_levers(trainer.model, attention='explicit_kv', norm='stock', "
        "mlp='stock', adapters='stock', rotary='stock', loss='lean', checkpointed_layers=1, "
        "keep_attention=True)",
    ]
    assert "micro_batch_size: 4 -> 2" in changes.in_our_names(start, found)
    assert changes.in_a_script(found, found)[:-1] == []  # the levers are wanted all the same
    # Its levers are those of `apply_levers`, and no other.
    parameters = inspect.signature(apply_levers).parameters
    assert {*PULLED, *changes.BY_NAME, *changes.CHECKPOINTS} == set(parameters) - {
        "model",
        "loss_chunk_tokens",
    }


def test_the_command_names_the_card():
    gpu_words = shlex.split(options.command_line("forecast", RECIPE.for_gpu(A10), A10))
    asked_for = options.parse(gpu_words[1:])
    assert options.gpu_of(asked_for) == A10
    assert options.recipe_of(asked_for) == RECIPE.for_gpu(A10)


def test_any_card_by_its_memory_and_capability():
    words = ["forecast", *SMALL, "--memory-gib", "48", "--capability", "8.6"]
    gpu = options.gpu_of(options.parse(words))
    assert (gpu.total_bytes, gpu.capability) == (48 * 2**30, (8, 6))
    again = shlex.split(options.command_line("forecast", RECIPE.for_gpu(gpu), gpu))
    assert options.gpu_of(options.parse(again[1:])) == gpu
    smaller = options.gpu_of(options.parse(["forecast", *SMALL, "--memory-gib", "12"]))
    assert (smaller.total_bytes, smaller.capability) == (12 * 2**30, T4.capability)


def test_a_run_that_is_tight_exits_4(capsys):
    """Its bounds reach above the card, its tensors and what the allocator takes do not."""
    assert cli.main(["forecast", *SMALL, "--memory-gib", "0.17"]) == 4
    assert capsys.readouterr().out.startswith("tight on a card of 0.17 GiB")


def test_a_fit_that_fails_exits_3_with_one_sentence(capsys, monkeypatch):
    def nothing(*_, **__):
        raise search.DoesNotFit("recipe must fit 14.56 GiB of a T4, got 16 GiB")

    monkeypatch.setattr(search, "fit", nothing)
    assert cli.main(["fit", *SMALL, "--json"]) == 3
    assert capsys.readouterr() == ("", "error: recipe must fit 14.56 GiB of a T4, got 16 GiB\n")


@pytest.mark.slow
def test_fit_that_finds_nothing_exits_3_with_one_sentence(capsys):
    """16-bit weights of 8B alone are more than a T4 holds: nothing that fit may change helps."""
    arguments = ["fit", "--model", "llama-3.1-8b", "--base", "float16", "--sequence-length", "16"]
    assert cli.main([*arguments, "--json"]) == 3
    told = capsys.readouterr()
    (said,) = [line for line in told.err.splitlines() if not line.startswith("...")]
    assert told.out == "" and said.startswith("error: recipe must fit 14.56 GiB of a T4, got")
    assert "one sequence of 16 tokens" in said


@pytest.fixture
def few_changes(monkeypatch):
    """Of what levers weighs, three are enough to be told."""
    every = search.single_changes
    monkeypatch.setattr(
        search,
        "single_changes",
        lambda *given: {name: every(*given)[name] for name in ("lean loss", "rank 8", "lean MLP")},
    )


def test_levers_says_what_each_change_saves_and_costs(capsys, few_changes):
    said = told(capsys, "levers", *SMALL)
    base = forecast(RECIPE, T4)
    assert said["peak_allocated_bytes"] == base.peak_allocated_bytes
    by_name = {lever["change"]: lever for lever in said["levers"]}
    lean = by_name["lean loss"]
    assert lean["options"] == ["--loss", "lean"] and lean["fits"] is True
    after = forecast(dataclasses.replace(RECIPE, loss="lean"), T4)
    assert lean["peak_allocated_bytes"] == after.peak_allocated_bytes
    assert lean["saved_bytes"] == base.peak_allocated_bytes - after.peak_allocated_bytes > 0
    assert [x["saved_bytes"] for x in said["levers"]] == sorted(
        (x["saved_bytes"] for x in said["levers"]), reverse=True
    )
    assert cli.main(["levers", *SMALL]) == 0
    verdict, head, *rows = capsys.readouterr().out.splitlines()
    assert verdict == str(base) and head.split()[-4:] == ["peak", "speed", "fits", "option"]
    assert len(rows) == len(by_name)
    (row,) = [row for row in rows if row.strip().startswith("lean loss")]
    assert row.endswith("yes    --loss lean") and " -" in row and " x " in row


def test_levers_of_a_recipe_that_does_not_fit_exits_3(capsys, monkeypatch):
    monkeypatch.setattr(search, "levers", lambda recipe, gpu, progress: ())
    said = told(capsys, "levers", *TOO_LARGE, code=3)
    assert said["fits"] is False and said["levers"] == []


def test_options_of_a_change_are_that_change():
    """Typed behind the recipe's own, they ask for exactly what was weighed."""
    layers = checked_config(RECIPE).num_hidden_layers
    changes = search.single_changes(RECIPE, layers)
    assert len(changes) > 15
    for name, fields in changes.items():
        try:
            changed = dataclasses.replace(RECIPE, **fields)
        except ValueError:  # this recipe excludes it
            continue
        words = options.as_options(changed, RECIPE)
        assert asked("levers", *SMALL, *words) == changed, name


def keys_and_values(data):
    """Each value of nested JSON with the last key above it."""
    if isinstance(data, dict):
        for key, value in data.items():
            yield from ((k or key, v) for k, v in keys_and_values(value))
    elif isinstance(data, list):
        for value in data:
            yield from keys_and_values(value)
    else:
        yield None, data


def test_numbers_in_json_have_their_types(capsys, few_changes, one_search, shallow):
    answers = [
        told(capsys, "forecast", *SMALL),
        told(capsys, "fit", "--model", shallow, "--sequence-length", "32"),
        told(capsys, "levers", *SMALL),
        told(capsys, "doctor"),
    ]
    seen = set()
    for key, value in keys_and_values(answers):
        if key.endswith("_bytes") or key == "flops":
            seen.add(key)
            assert type(value) is int or (key, value) == ("total_bytes", None), (key, value)
    assert {"peak_allocated_bytes", "device_bytes", "saved_bytes", "free_bytes", "flops"} <= seen
    forecast_answer = answers[0]
    assert all(type(n) is int for n in forecast_answer["composition"].values())
    assert all(type(n) is int for n in forecast_answer["phase_peaks"].values())
    assert type(forecast_answer["ideal_seconds"]) is float
    assert [type(n) for n in forecast_answer["peak_reserved_bytes"]] == [int, int]


def test_progress_is_shown_after_a_second_and_not_before(capsys):
    progress = Progress()
    progress("first thing")
    progress.stop()
    assert capsys.readouterr().err == ""
    progress = Progress()
    time.sleep(1.1)
    progress("second thing")
    progress.stop()
    assert capsys.readouterr().err.splitlines() == ["... forecasting", "... second thing"]


@pytest.mark.slow
def test_the_old_door_answers_and_points_to_the_new_one():
    done = subprocess.run(
        [sys.executable, "-m", "course_utils", "forecast", *SMALL, "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpu"] == "T4"
    first = done.stderr.splitlines()[0]
    assert first.startswith("`python -m course_utils` is now `fitcast`")


def into_a_closed_pipe(*arguments: str) -> subprocess.CompletedProcess:
    reads, writes = os.pipe()
    os.close(reads)  # as `| head -1` does, only at once
    done = subprocess.run(
        [sys.executable, *arguments], stdout=writes, stderr=subprocess.PIPE, text=True
    )
    os.close(writes)
    return done


@pytest.mark.slow
def test_a_reader_who_has_seen_enough_is_no_error():
    done = into_a_closed_pipe("-m", "fitcast", "doctor")
    assert (done.returncode, "BrokenPipe" in done.stderr) == (0, False), done.stderr


def test_a_reader_who_has_seen_enough_does_not_change_the_verdict():
    code = """
import sys
from fitcast.cli import main
main.COMMANDS["doctor"] = lambda asked, progress: (3, "line\\n" * 100_000)
sys.exit(main.main(["doctor"]))
"""
    done = into_a_closed_pipe("-c", code)
    assert (done.returncode, done.stderr) == (3, "")


def test_ctrl_c_ends_without_a_traceback(capsys, monkeypatch):
    def interrupted(asked, progress):
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "fit", interrupted)
    assert cli.main(["fit", *SMALL]) == 130
    assert capsys.readouterr() == ("", "")


def test_nothing_asked_is_answered_with_help(capsys):
    assert cli.main([]) == 2
    told = capsys.readouterr()
    assert told.out == "" and all(f"fitcast {verb}" in told.err for verb in options.VERBS)
