"""What `train` refuses, and what must not end it or spoil it."""

import dataclasses
import errno
import functools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainingArguments

from course_utils.topics import survival
from fitcast.step import qlora
from fitcast.training import checkpoints
from fitcast.training import trainer as training
from fitcast.units import IGNORED
from tests.tiny import ROWS, TOKENIZER, tiny_recipe


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    return dataclasses.replace(
        tiny_recipe(tmp_path_factory.mktemp("base") / "model"), max_steps=4, save_steps=2
    )


def trainer(recipe, output_dir, rows=ROWS, **options):
    return training.QLoRATrainer(
        recipe, training.build_model(recipe), rows, TOKENIZER, output_dir, **options
    )


def train(recipe, output_dir, **options):
    return training.train(
        recipe, training.build_model(recipe), ROWS, TOKENIZER, output_dir, **options
    )


@pytest.mark.slow
def test_a_run_does_not_go_back_behind_its_later_checkpoints(recipe, tmp_path):
    train(recipe, tmp_path)
    with pytest.raises(ValueError, match="resume must not go back behind .*checkpoint-4, got .*-2"):
        train(recipe, tmp_path, resume=tmp_path / "checkpoint-2")
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    elsewhere = train(recipe, tmp_path / "again", resume=tmp_path / "checkpoint-2")
    assert elsewhere.resumed_from == tmp_path / "checkpoint-2" and len(elsewhere.steps) == 4


def test_a_checkpoint_of_something_else_is_refused(recipe, tmp_path):
    survival.save_whole(tmp_path / "checkpoint-1", {"step": 1})
    with pytest.raises(ValueError, match="resume must be a checkpoint that train wrote, got"):
        train(recipe, tmp_path)


def test_more_processes_than_there_are_is_refused(recipe, tmp_path):
    with pytest.raises(ValueError, match="world_size must be 1, the processes .* got 4; start it"):
        trainer(dataclasses.replace(recipe, world_size=4), tmp_path)


@pytest.mark.parametrize("step", [0, -1])
def test_a_run_that_stops_before_its_first_step_is_refused(recipe, tmp_path, step):
    with pytest.raises(ValueError, match="stop_at must be a step from 1, or None, got"):
        train(recipe, tmp_path, stop_at=step)


@pytest.mark.slow
def test_a_path_is_a_model_too(recipe, tmp_path):
    run = train(dataclasses.replace(recipe, model=Path(recipe.model)), tmp_path)
    assert len(run.steps) == 4 and checkpoints.find_last(tmp_path).name == "checkpoint-4"


def test_a_process_uses_one_gpu_even_where_it_sees_two(recipe, tmp_path, monkeypatch):
    """Kaggle's two T4s: Trainer would split each batch among them, by DataParallel."""
    arguments = TrainingArguments._setup_devices.func

    def two(self):
        device = arguments(self)
        self._n_gpu = 2
        return device

    devices = functools.cached_property(two)
    devices.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", devices)
    seen = trainer(recipe, tmp_path).args
    assert seen.__dict__["_n_gpu"] == 1


def test_it_evaluates_on_the_same_loss(recipe, tmp_path):
    one = trainer(recipe, tmp_path)
    batch = one.data_collator([ROWS[0], ROWS[1]])
    found = one.evaluate(ROWS.select(range(2)))["eval_loss"]
    with torch.no_grad():
        assert found == pytest.approx(qlora.compute_loss(one.model, batch, recipe).item(), rel=1e-5)


def test_a_step_without_labels_says_so_and_changes_nothing(recipe, tmp_path):
    rows = ROWS.map(lambda row: {"labels": [IGNORED] * len(row["labels"])})
    blank = trainer(recipe, tmp_path, rows)
    before = [p.detach().clone() for p in blank.model.parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="rows must hold a labelled token in each step, got none"):
        blank.train()
    after = [p for p in blank.model.parameters() if p.requires_grad]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))


@pytest.mark.slow
def test_old_checkpoints_that_cannot_be_deleted_only_warn(recipe, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(errno.ENOTEMPTY, "Directory not empty")

    monkeypatch.setattr(checkpoints, "prune", fails)
    (tmp_path / "drive").mkdir()
    assert len(train(recipe, tmp_path / "run", drive=tmp_path / "drive/run").steps) == 4
    assert "Warning: older checkpoints were not deleted: [Errno" in capsys.readouterr().out
    for folder in ("run", "drive/run"):
        assert checkpoints.find_last(tmp_path / folder).name == "checkpoint-4"


def test_a_save_that_fails_in_one_process_fails_in_all_and_none_waits():
    """Two processes by hand: each asks how many failed, whether its own work did or not."""

    def process(fails, failures_elsewhere):
        asked = []

        def reduce(failed):
            asked.append(failed.item())
            return failed + failures_elsewhere

        def work():
            if fails:
                raise OSError(errno.ENOSPC, "No space left on device")

        one = SimpleNamespace(
            args=SimpleNamespace(device="cpu"), accelerator=SimpleNamespace(reduce=reduce)
        )
        try:
            training.QLoRATrainer._together(one, work)
        except OSError as error:
            return asked, error
        return asked, None

    asked, error = process(fails=True, failures_elsewhere=0)
    assert asked == [1.0] and "No space left" in str(error)
    asked, error = process(fails=False, failures_elsewhere=1)
    assert asked == [0.0] and "another process could not save" in str(error)
    assert process(fails=False, failures_elsewhere=0) == ([0.0], None)
