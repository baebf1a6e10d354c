"""Training: the loss of accumulated micro batches, refusals, logs, and surviving a kill."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes
import pytest
import torch

from fitcast import gpus
from fitcast.forecasting.forecast import forecast
from fitcast.step import qlora
from fitcast.training import checkpoints, data
from fitcast.training import trainer as training
from fitcast.units import round_up
from tests.tiny import ROWS, TOKENIZER, tiny_recipe
from tools.notebooks import ROOT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def recipe(folder):
    return tiny_recipe(folder / "model")


def train(recipe, output_dir, **options):
    return training.train(
        recipe, training.build_model(recipe), ROWS, TOKENIZER, output_dir, **options
    )


# --- the step ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [pytest.param("full", marks=pytest.mark.slow), "chunked"])
def test_accumulated_micro_batches_equal_one_large_batch(recipe, tmp_path, loss):
    """Against plain PyTorch: cross entropy over all labelled tokens of the 32 rows at once."""
    one = dataclasses.replace(
        recipe,
        lora_dropout=0.0,
        base="float32",
        loss=loss,
        max_steps=1,
        micro_batch_size=32,
        gradient_accumulation_steps=1,
        loss_chunk_tokens=7,
        warmup_fraction=0.0,
    )
    many = dataclasses.replace(one, micro_batch_size=2, gradient_accumulation_steps=16)
    rows = ROWS.select(range(32))
    runs = [
        training.train(r, training.build_model(r), rows, TOKENIZER, tmp_path / str(n)).steps[0]
        for n, r in enumerate((one, many))
    ]
    model = training.build_model(one)
    batch = data.collate(list(rows), 0)
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    plain = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten()
    )
    plain.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).norm()
    for step in runs:
        assert step["loss"] == pytest.approx(plain.item(), rel=1e-5)
        assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_each_step_logs_speed_and_memory(recipe, tmp_path):
    seen = []
    run = train(recipe, tmp_path, stop_at=3, on_step=seen.append)
    assert [step["step"] for step in run.steps] == [1, 2, 3] == [row["step"] for row in seen]
    assert [row["loss"] for row in seen] == run.losses
    for step in run.steps:
        assert 10 < step["tokens_per_second"] < 10**7
        assert step["peak_allocated_bytes"] is gpus.peak_allocated_bytes()  # None on a CPU


@pytest.mark.parametrize(
    ("optimizer", "kind"),
    [
        ("adamw", torch.optim.AdamW),
        pytest.param("adamw_8bit", bitsandbytes.optim.AdamW8bit, marks=pytest.mark.slow),
        pytest.param(  # a CPU has nothing to page to
            "paged_adamw_8bit", bitsandbytes.optim.AdamW8bit, marks=pytest.mark.slow
        ),
    ],
)
def test_optimizer_is_the_one_that_the_forecast_counts(recipe, tmp_path, optimizer, kind):
    """Trainer has optimizers of its own: after a step, this one holds the forecast's bytes."""
    recipe = dataclasses.replace(
        recipe, optimizer=optimizer, lora_targets="all-linear", lora_rank=128, weight_decay=0.1
    )
    model = training.build_model(recipe)
    trainer = training.QLoRATrainer(recipe, model, ROWS, TOKENIZER, tmp_path, stop_at=1)
    trainer.train()
    used = trainer.optimizer.optimizer  # accelerate wraps it
    assert type(used) is kind
    assert {group["weight_decay"] for group in used.param_groups} == {0.1}
    blocks = {  # CUDA's allocator cuts blocks of 512 bytes; AdamW's step counters stay on the host
        value.untyped_storage().data_ptr(): round_up(value.untyped_storage().nbytes(), 512)
        for entries in used.state.values()
        for value in entries.values()
        if isinstance(value, torch.Tensor) and value.ndim
    }
    assert sum(blocks.values()) == max(forecast(recipe, gpus.T4).timeline["optimizer state"])


# --- refusals ------------------------------------------------------------------------------------


def test_bfloat16_on_a_t4_is_refused(recipe, tmp_path, monkeypatch):
    model = training.build_model(recipe)
    monkeypatch.setattr(gpus, "detect", lambda: gpus.T4)
    with pytest.raises(ValueError, match="amp_dtype must be 'float16' on a T4, got 'bfloat16'"):
        training.train(
            dataclasses.replace(recipe, amp_dtype="bfloat16"), model, ROWS, TOKENIZER, tmp_path
        )


def test_float16_adapters_are_refused(recipe, tmp_path, monkeypatch):
    model = training.build_model(recipe)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    monkeypatch.setattr(gpus, "detect", lambda: gpus.T4)
    with pytest.raises(ValueError, match=r"adapters must be float32 .* scaler cannot unscale"):
        training.train(
            dataclasses.replace(recipe, amp_dtype="float16"), model, ROWS, TOKENIZER, tmp_path
        )


def test_other_silent_failures_are_refused(recipe, tmp_path):
    model = training.build_model(recipe)
    with pytest.raises(ValueError, match="amp_dtype must be None or 'bfloat16' without a GPU"):
        training.train(
            dataclasses.replace(recipe, amp_dtype="float16"), model, ROWS, TOKENIZER, tmp_path
        )
    with pytest.raises(ValueError, match="fp16_full_eval must be False in a run that trains"):
        training.QLoRATrainer(recipe, model, ROWS, TOKENIZER, tmp_path, fp16_full_eval=True)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="must have trainable parameters, got none"):
        training.train(recipe, model, ROWS, TOKENIZER, tmp_path)


def test_a_loss_that_is_no_number_stops_before_it_spoils_the_weights(recipe, tmp_path, monkeypatch):
    model = training.build_model(recipe)
    calls = iter(range(100))
    loss = qlora.compute_loss
    monkeypatch.setattr(
        qlora, "compute_loss", lambda *a: loss(*a) * (float("nan") if next(calls) == 2 else 1)
    )  # the first micro batch of step 2
    with pytest.raises(FloatingPointError, match=r"got nan at step 2; lower learning_rate.*step 1"):
        training.train(recipe, model, ROWS, TOKENIZER, tmp_path)
    assert all(p.isfinite().all() for p in model.parameters() if p.requires_grad)


# --- resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param(
            {"optimizer": "paged_adamw_8bit", "loss": "chunked", "checkpointed_layers": 1},
            marks=pytest.mark.slow,
        ),
        {"attention": "explicit_kv", "norm": "native", "lora_targets": "all-linear"},
    ],
    ids=["default", "8-bit", "levers"],
)
def test_a_resumed_run_repeats_the_losses_bit_for_bit(recipe, tmp_path, changes):
    recipe = dataclasses.replace(recipe, **changes)
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "stopped", stop_at=6)
    rest = train(recipe, tmp_path / "stopped")
    assert rest.resumed_from.name == "checkpoint-4" and rest.losses == whole.losses
    assert len(set(whole.losses)) == 12  # dropout and data make every step another


@pytest.mark.slow
def test_a_finished_run_is_loaded_not_repeated(recipe, tmp_path):
    first = training.build_model(recipe)
    done = training.train(recipe, first, ROWS, TOKENIZER, tmp_path)
    again = training.build_model(recipe)
    loaded = training.train(recipe, again, ROWS, TOKENIZER, tmp_path)
    assert loaded.losses == done.losses and loaded.resumed_from.name == "checkpoint-12"
    for (name, one), two in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_a_checkpoint_of_another_recipe_is_refused(recipe, tmp_path):
    train(recipe, tmp_path, stop_at=4)
    other = dataclasses.replace(recipe, learning_rate=0.5)
    with pytest.raises(ValueError, match=r"learning_rate must be 0.01 to resume.*got 0.5"):
        train(other, tmp_path)
    with pytest.raises(ValueError, match=r"no checkpoint when resume is False, got .*ckpoint-4"):
        train(recipe, tmp_path, resume=False)


@pytest.mark.slow
def test_a_half_written_checkpoint_is_refused_by_name(recipe, tmp_path):
    train(recipe, tmp_path, stop_at=8)
    half = tmp_path / "checkpoint-8"
    (half / "optimizer.pt").write_bytes((half / "optimizer.pt").read_bytes()[:100])
    with pytest.raises(ValueError, match=r"optimizer.pt must have \d+ bytes.*got 100 bytes"):
        train(recipe, tmp_path, resume=half)
    (half / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match="missing or half written; resume from an older"):
        train(recipe, tmp_path, resume=half)
    assert train(recipe, tmp_path).resumed_from.name == "checkpoint-4"  # and replaces the half one
    shutil.rmtree(tmp_path / "checkpoint-12")
    assert train(recipe, tmp_path, resume=half).resumed_from.name == "checkpoint-8"


@pytest.mark.slow
def test_the_drive_has_what_the_machine_lost(recipe, tmp_path):
    here, drive = tmp_path / "here", tmp_path / "drive"
    whole = train(recipe, here, drive=drive)
    shutil.rmtree(drive / "checkpoint-12")
    shutil.rmtree(here)
    rest = train(recipe, here, drive=drive)
    assert rest.resumed_from == drive / "checkpoint-8" and rest.losses == whole.losses


@pytest.mark.slow
def test_a_drive_that_vanishes_in_a_run_costs_a_warning(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "MyDrive").mkdir()
    monkeypatch.setattr(checkpoints, "MOUNTED_DRIVE", tmp_path / "MyDrive")
    drive = checkpoints.on_drive("runs")

    def unmount(row):
        if row["step"] == 5:
            shutil.rmtree(tmp_path / "MyDrive")

    run = train(recipe, tmp_path / "here", drive=drive, on_step=unmount)
    said = capsys.readouterr().out
    assert len(run.losses) == 12 and run.resumed_from is None
    assert "checkpoint-4 was not copied" not in said and "checkpoint-8 was not copied" in said
    assert checkpoints.on_drive("runs") is None
    assert checkpoints.find_last(tmp_path / "here", drive).name == "checkpoint-12"


def killed(folder, *words):
    """What kill_worker.py reports."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("kill_worker.py"), folder, *words],
        text=True,
        capture_output=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    return killed(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
def test_a_kill_in_a_save_costs_no_loss(tmp_path):
    report = killed(tmp_path, "--few")
    assert len(report["killed"]) >= 5 and len(report["uninterrupted"]["losses"]) == 12
    for moment, run in report["killed"].items():
        assert run["losses"] == report["uninterrupted"]["losses"], moment
        if moment.startswith("in a save"):
            assert run["signal"] == 9 and run["from"] == "checkpoint-4", moment
            assert "checkpoint-8 was being written when the last run ended" in run["said"]


@pytest.mark.slow
def test_a_kill_at_any_moment_costs_no_loss(survived):
    kills = survived["killed"]
    whole = survived["uninterrupted"]
    assert len(whole["losses"]) == 12 and len(kills) == 19
    for moment, run in kills.items():
        assert run["losses"] == whole["losses"], moment
        assert run["learning_rates"] == whole["learning_rates"], moment
        assert run["signal"] == 9 or "random" in moment, moment
    at_random = [run["signal"] for moment, run in kills.items() if "random" in moment]
    assert len(at_random) == 10 and at_random.count(9) >= 8, "too few died in their run"
    expected = {
        "before the first save": None,
        "in a forward pass": "checkpoint-4",
        "in a save, half the optimizer written": "checkpoint-4",
        "in a save, before the manifest": "checkpoint-4",
        "in a save, before the rename": "checkpoint-4",
        "after the rename": "checkpoint-8",
        "while an old one is deleted": "checkpoint-12",
    }
    assert {moment: kills[moment]["from"] for moment in expected} == expected
    for moment, run in kills.items():
        if moment.startswith("in a save"):
            assert "checkpoint-8 was being written when the last run ended" in run["said"]


@pytest.mark.slow
def test_a_full_disk_costs_one_save_and_no_loss(survived):
    full = survived["full disk"]
    assert full["signal"] == 9 and full["from"] == "checkpoint-4"
    assert "checkpoint-8 was not written" in full["warned"] and "File too large" in full["warned"]
    assert "last whole checkpoint is checkpoint-4. Free some space" in full["warned"]
    assert full["losses"] == survived["uninterrupted"]["losses"]
