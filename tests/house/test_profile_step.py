"""The profile of a step: what counts as busy, and what a row that fails leaves behind."""

import json
import subprocess
import sys

from tools import profile_step


def test_kernels_that_overlap_are_busy_once_and_gaps_are_idle():
    assert profile_step.busy_and_idle([(5, 6), (0, 2), (1, 3), (1, 2)]) == (4, 2)
    assert profile_step.busy_and_idle([]) == (0, 0)


def test_a_row_that_dies_says_so_and_the_next_ones_run(tmp_path, monkeypatch):
    def run(command, **_):
        name = command[command.index("--row") + 1]
        if "graph" not in name:
            (tmp_path / "row").write_text(json.dumps({"name": name}))
            (tmp_path / "row").replace(command[2])

    monkeypatch.setattr(subprocess, "run", run)
    out = tmp_path / "profile.json"
    monkeypatch.setattr(sys, "argv", ["profile_step", str(out), "--rows", "1 x 512"])
    profile_step.main()
    rows = json.loads(out.read_text())["rows"]
    assert rows["step, 1 x 512, lean"] == {"name": "step, 1 x 512, lean"}
    assert "FileNotFoundError" in rows["graph, 1 x 512"]["error"] and len(rows) == 5
