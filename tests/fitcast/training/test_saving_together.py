"""A save that fails in one of two processes costs that save, and nobody waits for ever."""

import subprocess
import sys
from pathlib import Path

import pytest

from course_utils.topics.ranks import LOOPBACK, _environment
from fitcast.training import checkpoints
from tests.tiny import tiny_recipe


@pytest.mark.slow
def test_a_full_disk_in_one_process_costs_one_save(tmp_path):
    tiny_recipe(tmp_path / "model")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--local-addr",
            LOOPBACK,
            "--rdzv-backend",
            "c10d",
            "--rdzv-endpoint",
            f"{LOOPBACK}:0",
            str(Path(__file__).with_name("save_worker.py")),
            str(tmp_path),
        ],
        env=_environment(False) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(line for line in done.stdout.splitlines() if line.startswith("rank")) == [
        "rank 0 took 3 steps",
        "rank 1 took 3 steps",
    ]
    assert done.stdout.count("Warning: checkpoint-1 was not written: another process") == 1
    assert done.stdout.count("Warning: checkpoint-2 was not written: [Errno 28] No space") == 1
    left = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert left == ["checkpoint-3"] and checkpoints.verify(tmp_path / "run/checkpoint-3")
