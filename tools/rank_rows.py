"""Author's tool: what two GPUs measured, from the tests' recording into the lessons' one.

    python -m tools.rank_rows     # group "cards" of course_utils/data/recorded_runs.json

`tools/measure_ranks.py` measures, tests/data/h200_ranks.json keeps each rank's counters; lesson 08
reads a line for each run, of several that differ in length alone the longest. Left out: shortened
models, and runs that only a test needs, as those with other levers, which its lines do not name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from course_utils.topics import recorded

MEASURED = ROOT / "tests" / "data" / "h200_ranks.json"
GROUP = "cards"
MODELS = ("llama-3.1-8b", "qwen3-14b", "qwen3-32b")
LEVERS = ("lean", "all")  # loss and checkpointed_layers of the lesson's runs


def rows(measured: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each run of `MODELS`: the highest peak of its ranks, all ranks' tokens a second.

    Args:
        measured: As `tools/measure_ranks.py` writes it. Speed is told of runs that had the GPUs
            for themselves.
    """
    lines = [
        {
            "group": GROUP,
            "name": run["name"],
            "model": run["recipe"]["model"],
            "strategy": _told(run),
            "processes": run["processes"],
            "micro_batch_size": run["recipe"]["micro_batch_size"],
            "sequence_length": run["recipe"]["sequence_length"],
            "outcome": "out of memory" if "error" in run["ranks"][0] else "trained",
            "rank_peak_bytes": max((r.get("peak_allocated_bytes") or 0) for r in run["ranks"])
            or None,
            "tokens_per_second": round(min(r["tokens_per_second"] for r in run["ranks"]), 1)
            if run["alone"]
            else None,
            "gpu": measured["gpu"],
            "emulated": "T4",
            "versions": measured["versions"],
            "date": measured["date"],
        }
        for run in sorted(measured["rows"], key=lambda run: run["recipe"]["model"])
        if run["recipe"]["model"] in MODELS
        and run["strategy"] in ("ddp", "fsdp2")
        and not run["layers"]
        and (run["recipe"]["loss"], run["recipe"]["checkpointed_layers"]) == LEVERS
    ]
    longest = {
        _apart_from_length(line): line
        for line in sorted(lines, key=lambda line: line["sequence_length"])
    }
    return [line for line in lines if longest[_apart_from_length(line)] is line]


def _apart_from_length(line: dict[str, Any]) -> tuple:
    alone = line["tokens_per_second"] is not None
    return line["model"], line["strategy"], line["micro_batch_size"], alone


def _told(run: dict[str, Any]) -> str:
    """Strategy of a run, and what waits on the host."""
    if run["processes"] == 1:
        return "one card"
    recipe = run["recipe"]
    parts = {
        "embedding": recipe.get("embedding") == "host",
        "checkpoints": recipe.get("offload_checkpoints"),
    }
    on_host = " and ".join(name for name, there in parts.items() if there)
    return run["strategy"] + ", offload" * run["offload"] + (on_host and f", {on_host} on host")


def main() -> int:
    everything = recorded.recording()
    everything["rows"] = [row for row in everything["rows"] if row["group"] != GROUP]
    everything["rows"] += rows(json.loads(MEASURED.read_text("utf-8")))
    recorded.PATH.write_text(json.dumps(everything, indent=1) + "\n", "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
