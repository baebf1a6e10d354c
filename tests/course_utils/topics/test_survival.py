"""Accidents on purpose: they happen, end with their block, and harm no whole checkpoint."""

import signal
import subprocess
import sys

import pytest
import torch

from course_utils.topics import survival
from fitcast.training import checkpoints
from tests.tiny import ROWS, TOKENIZER, tiny_recipe

NO_MEMORY, NO_DISK = survival.ACCIDENTS


def test_memory_ends_in_the_middle_of_a_save(tmp_path):
    path, state = tmp_path / "state.pt", {"weights": torch.ones(1000)}
    torch.save(state, path)
    size = path.stat().st_size
    with survival.dies_in_a_save(NO_MEMORY), pytest.raises(torch.OutOfMemoryError):
        torch.save(state, path)
    assert path.stat().st_size == size // 2, "the good file is gone"
    with pytest.raises(RuntimeError, match="zip archive"):
        torch.load(path)
    torch.save(state, path)
    assert torch.equal(torch.load(path)["weights"], state["weights"]), "after the block all is well"


def test_a_save_of_the_course_leaves_the_last_one_whole(tmp_path, capsys):
    survival.save_whole(tmp_path / "checkpoint-1", {"step": 1})
    with survival.dies_in_a_save(NO_MEMORY):
        survival.attempt(survival.save_whole, tmp_path / "checkpoint-2", {"step": 2})
    said = capsys.readouterr().out
    assert said.startswith("SaveError: checkpoint-2 was not written: CUDA out of memory")
    assert "last whole checkpoint is checkpoint-1" in said and "free on that disk" not in said
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoints.verify(checkpoints.find_last(tmp_path))["files"]


def test_a_full_disk_and_a_kill_leave_the_last_one_whole_too(tmp_path, capsys):
    survival.save_whole(tmp_path / "checkpoint-1", {"step": 1})
    with survival.dies_in_a_save(NO_DISK):
        survival.attempt(survival.save_whole, tmp_path / "checkpoint-2", {"step": 2})
    assert "[Errno 28] No space left on device" in capsys.readouterr().out
    assert survival.kill_in_a_save(tmp_path / "checkpoint-2") == -signal.SIGKILL
    assert (tmp_path / checkpoints.STAGING / "checkpoint-2" / "state.pt").read_bytes() == b"half"
    assert checkpoints.find_last(tmp_path).name == "checkpoint-1"
    assert "checkpoint-2 was being written when the last run ended" in capsys.readouterr().out


def test_an_attempt_swallows_nothing_else(capsys):
    survival.attempt(lambda: None)
    assert capsys.readouterr().out == "saved\n"
    with pytest.raises(KeyError):
        survival.attempt({}.__getitem__, "x")


@pytest.mark.slow
def test_a_run_that_ends_too_early_is_no_kill(tmp_path):
    recipe = tiny_recipe(tmp_path / "model", max_steps=2)
    with pytest.raises(RuntimeError, match=r"live for 9 steps, got exit status 0; .*step 2: loss"):
        survival.train_and_kill(recipe, ROWS, TOKENIZER, tmp_path / "run", at_step=9)


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_another_signal_ends_before_its_step_is_no_kill(tmp_path, monkeypatch, number):
    code = f"import os\nprint('step 1: loss 2', flush=True)\nos.kill(os.getpid(), {int(number)})"
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **options: start([sys.executable, "-c", code], **options),
    )
    with pytest.raises(RuntimeError, match=f"4 steps, got exit status -{int(number)}; .*step 1: "):
        survival.train_and_kill(tiny_recipe(tmp_path), ROWS, TOKENIZER, tmp_path, at_step=4)
