"""The command line: exit codes, JSON, refusals in one sentence, progress when it takes long."""

import json
import os
import subprocess
import sys
import time

import pytest

from course_utils.data import BUNDLED
from fitcast.cli import main as cli
from fitcast.forecasting.forecast import forecast
from fitcast.gpus import T4
from fitcast.recipe import TrainRecipe

SMALL = ["--model", BUNDLED, "--sequence-length", "64"]


def test_forecast_that_fits_exits_0_and_shows_where_bytes_go(capsys):
    assert cli.main(["forecast", *SMALL]) == 0
    out = capsys.readouterr().out
    assert out.startswith("fits a T4 (14.56 GiB): peak ")
    assert "\n  weights " in out and "\n  peak in backward " in out


def test_forecast_that_does_not_fit_exits_3(capsys):
    arguments = [
        "forecast",
        "--model",
        "llama-3.2-1b",
        "--sequence-length",
        "2048",
        "--micro-batch-size",
        "12",
    ]
    assert cli.main(arguments) == 3
    assert capsys.readouterr().out.startswith("does not fit a T4")


def test_json_is_what_the_library_says(capsys):
    assert (
        cli.main(
            [
                "forecast",
                *SMALL,
                "--json",
                "--amp-dtype",
                "float16",
                "--no-double-quant",
                "--lora-targets",
                "q_proj,v_proj",
                "--checkpointed-layers",
                "0",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    recipe = TrainRecipe(
        model=BUNDLED,
        sequence_length=64,
        amp_dtype="float16",
        double_quant=False,
        lora_targets=("q_proj", "v_proj"),
        checkpointed_layers=0,
    )
    f = forecast(recipe, T4)
    assert told["peak_allocated_bytes"] == f.peak_allocated_bytes
    assert tuple(told["device_bytes"]) == f.device_bytes
    assert told["composition"] == f.composition and told["fits"] is True
    assert told["recipe"]["lora_targets"] == ["q_proj", "v_proj"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "lama-8b"], "model must be one of"),
        (["--gpu", "T5"], "gpu must be one of T4"),
        (["--sequence-length", "-4"], "sequence_length must be a whole number"),
        (["--micro-batch-size", "0"], "micro_batch_size must be a whole number"),
        (["--amp-dtype", "bfloat16"], "amp_dtype must be 'float16' on a T4"),
        (["--lora-targets", "qkv"], "lora_targets must name linear layers"),
        (["--checkpointed-layers", "half"], "checkpointed_layers must be a whole number"),
        (["--lora-rank", "none"], "lora_rank must be a number when base is 'nf4'"),
    ],
)
def test_bad_input_exits_2_with_one_sentence(capsys, arguments, message):
    assert cli.main(["forecast", *SMALL, *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == "" and message in told.err
    assert len([line for line in told.err.splitlines() if not line.startswith("...")]) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["predict"], ["forecast", "--loss", "half"], ["forecast", "--sequence-length", "long"]],
)
def test_what_argparse_refuses_exits_2_too(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2


def test_amp_none_is_not_the_same_as_not_said():
    parse = cli.parser().parse_args
    assert cli.recipe_of(parse(["forecast"])).amp_dtype == "float16"
    assert cli.recipe_of(parse(["forecast", "--gpu", "A10"])).amp_dtype == "bfloat16"
    assert cli.recipe_of(parse(["forecast", "--amp-dtype", "none"])).amp_dtype is None


def test_fit_names_settings_and_levers(capsys):
    arguments = ["fit", *SMALL, "--target-effective-batch", "2"]
    assert cli.main(arguments) == 0
    out = capsys.readouterr().out
    assert "tokens/s" in out and "one change at a time" in out and "micro batch" in out
    assert cli.main([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["levers"][0].keys() == {"change", "saved_bytes", "speedup"}


def test_fit_that_finds_nothing_exits_3_with_one_sentence(capsys):
    """16-bit weights of 8B alone are more than a T4 holds: nothing that fit may change helps."""
    arguments = ["fit", "--model", "llama-3.1-8b", "--base", "float16", "--sequence-length", "16"]
    assert cli.main([*arguments, "--json"]) == 3
    told = capsys.readouterr()
    (said,) = [line for line in told.err.splitlines() if not line.startswith("...")]
    assert told.out == "" and said.startswith("error: recipe must fit 14.56 GiB of a T4, got")
    assert "one sequence of 16 tokens" in said


def test_doctor_tells_of_this_machine(capsys, monkeypatch):
    assert cli.main(["doctor", "--json"]) == 0
    told = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert told["python"]["found"].startswith(".".join(map(str, sys.version_info[:2])))
    assert all(finding["fix"] is None for finding in told.values())
    monkeypatch.setitem(cli.sys.modules["fitcast.cli.doctor"].FLOORS, "peft", (99, 0))
    assert cli.main(["doctor"]) == 3
    assert "-> pip install 'peft>=99.0'" in capsys.readouterr().out


def test_doctor_needs_none_of_what_it_looks_for():
    code = """
import sys
from importlib import metadata
version, missing = metadata.version, {"torch", "transformers", "peft", "bitsandbytes"}
sys.modules.update(dict.fromkeys(missing))  # None makes an import of it fail

def asked(name):
    if name in missing:
        raise metadata.PackageNotFoundError(name)
    return version(name)

metadata.version = asked
from fitcast.cli.main import main
sys.exit(main(["doctor"]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout.count("not installed\n") == 4 and "pip install 'torch>=2.11'" in done.stdout


def test_progress_is_shown_after_a_second_and_not_before(capsys):
    progress = cli.Progress()
    progress("first thing")
    progress.stop()
    assert capsys.readouterr().err == ""
    progress = cli.Progress()
    time.sleep(1.1)
    progress("second thing")
    progress.stop()
    assert capsys.readouterr().err.splitlines() == ["... forecasting", "... second thing"]


def test_module_runs_as_a_program():
    done = subprocess.run(
        [sys.executable, "-m", "course_utils", "forecast", *SMALL, "--json"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["gpu"] == "T4"


def test_a_reader_who_has_seen_enough_is_no_error():
    reads, writes = os.pipe()
    os.close(reads)  # as `| head -1` does, only at once
    done = subprocess.run(
        [sys.executable, "-m", "course_utils", "doctor"],
        stdout=writes,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writes)
    assert (done.returncode, "BrokenPipe" in done.stderr) == (0, False), done.stderr
