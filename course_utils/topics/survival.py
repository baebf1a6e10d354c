"""What kills runs, made to happen on purpose: SIGKILL, and a save that memory or disk ends.

Not modelled: power cuts (the disk's own cache), a machine that vanishes with its disk.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from course_utils.topics import ranks
from fitcast.recipe import TrainRecipe
from fitcast.training import checkpoints, trainer

ACCIDENTS = (
    torch.OutOfMemoryError("CUDA out of memory, in the middle of a save"),
    OSError(errno.ENOSPC, "No space left on device"),
)
SAVE_ERRORS = (torch.OutOfMemoryError, OSError, checkpoints.SaveError)
HALF_A_SAVE = """
import sys, time
from pathlib import Path
from fitcast.training import checkpoints
with checkpoints.written_whole(Path(sys.argv[1]), {}) as folder:
    Path(folder, "state.pt").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(600)
"""


def train_and_kill(
    recipe: TrainRecipe, rows: Any, tokenizer: Any, output_dir: str | Path, at_step: int
) -> int:
    """Train in another process, and SIGKILL it once it has done `at_step` steps.

    Args:
        recipe: As for `fitcast.train`.
        rows: As for `fitcast.train`.
        tokenizer: Only its padding token is used.
        output_dir: As for `fitcast.train`.
        at_step: Optimizer steps that the process lives to see.

    Returns:
        Its exit status: -9 for a process that was killed.

    Raises:
        RuntimeError: It ended by itself before that; the message is its last line.
    """
    data = Path(output_dir) / "rows.json"
    data.parent.mkdir(parents=True, exist_ok=True)
    data.write_text(json.dumps([dict(row) for row in rows]), encoding="utf-8")
    job = {
        "recipe": dataclasses.asdict(recipe),
        "rows": str(data),
        "output_dir": str(output_dir),
        "pad_token_id": tokenizer.pad_token_id,
    }
    said, lived = "", False
    with subprocess.Popen(
        [sys.executable, "-m", __name__, json.dumps(job)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ranks.with_this_package(),
    ) as child:
        for line in _lines(child):
            said = line.strip() or said
            if line.startswith(f"step {at_step}:"):
                lived = True
                child.kill()
    if not lived or child.returncode >= 0:
        raise RuntimeError(
            f"the run must live for {at_step} steps, got exit status "
            f"{child.returncode}; its last line: {said}"
        )
    return child.returncode


def _lines(child: subprocess.Popen[str]) -> Iterator[str]:
    """What another process prints, line by line, as it comes."""
    assert child.stdout is not None, "started with stdout=PIPE"
    yield from child.stdout


def main(job: str) -> None:
    """The process that is killed: train, one line a step."""
    from datasets import Dataset

    asked = json.loads(job)
    recipe = TrainRecipe(**asked["recipe"])
    rows = Dataset.from_list(json.loads(Path(asked["rows"]).read_text("utf-8")))
    trainer.train(
        recipe,
        trainer.build_model(recipe),
        rows,
        SimpleNamespace(pad_token_id=asked["pad_token_id"]),
        asked["output_dir"],
        on_step=lambda row: print(f"step {row['step']}: loss {row['loss']:.4f}", flush=True),
    )


@contextlib.contextmanager
def dies_in_a_save(accident: Exception) -> Iterator[None]:
    """Within the block each `torch.save` writes half of its file and then raises `accident`."""
    whole = torch.save

    def half(thing: Any, path: str | Path, *_: Any, **__: Any) -> None:
        whole(thing, path)
        os.truncate(path, os.path.getsize(path) // 2)
        raise type(accident)(*accident.args)  # its own instance: a traceback keeps `thing` alive

    with mock.patch.object(torch, "save", half):
        yield


def kill_in_a_save(target: Path) -> int:
    """SIGKILL another process in the middle of a save to `target`; returns its exit status.

    Raises:
        RuntimeError: It ended before it was in the middle.
    """
    with subprocess.Popen(
        [sys.executable, "-c", HALF_A_SAVE, str(target)],
        text=True,
        stdout=subprocess.PIPE,
        env=ranks.with_this_package(),
    ) as child:
        halfway = next(_lines(child), "")
        child.kill()
    if not halfway:
        raise RuntimeError(f"the save must get halfway, got exit status {child.returncode}")
    return child.returncode


def save_whole(target: Path, state: Any) -> None:
    """Save a state as the checkpoints of this course are saved: whole or not at all."""
    with checkpoints.written_whole(target, {}) as folder:
        torch.save(state, folder / "state.pt")


def attempt(save: Callable[..., None], *args: Any) -> None:
    """Call a save and print how it ended; what it raises goes no further, as in a training loop."""
    try:
        save(*args)
        print("saved")
    except SAVE_ERRORS as error:
        said = re.sub(r" \([^)]* free on that disk\)", "", str(error))  # it differs by the minute
        print(f"{type(error).__name__}: {said}")


if __name__ == "__main__":
    main(sys.argv[1])
