"""Twelve steps measured on a real T4, beside their forecasts: a reading to add to the others.

    python -m tools.t4_reading [--out reading.json] [--minutes 15]

Each row runs in a process of its own: a base of random weights at the real shape (memory and speed
do not depend on values), adapters, optimizer steps until the first that is not skipped, three timed
ones, one under the ledger. The last row is meant to run out of memory. Rows for which no time is
left say so. lessons/add_a_t4_reading.ipynb runs this on Colab and Kaggle.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fitcast.recipe import TrainRecipe

MINUTES = 15
QLORA = {"amp_dtype": "float16", "lora_dropout": 0.0}
SMALL, MIDDLE = "llama-3.2-1b", "qwen3-1.7b"
LEAN = {"attention": "explicit_kv", "loss": "chunked"}
ROWS: list[dict[str, Any]] = [
    {"model": SMALL, "micro_batch_size": 1, "sequence_length": 1024},
    {"model": SMALL, "micro_batch_size": 4, "sequence_length": 1024},
    {"model": SMALL, "micro_batch_size": 4, "sequence_length": 1024, **LEAN},
    {"model": SMALL, "micro_batch_size": 2, "sequence_length": 1024, "padded": True},
    {"model": SMALL, "micro_batch_size": 1, "sequence_length": 2048},
    {"model": SMALL, "micro_batch_size": 1, "sequence_length": 4096, **LEAN},
    {"model": SMALL, "micro_batch_size": 2, "sequence_length": 1024, "checkpointed_layers": 0},
    {"model": SMALL, "micro_batch_size": 2, "sequence_length": 1024, "norm": "native", **LEAN},
    {"model": MIDDLE, "micro_batch_size": 1, "sequence_length": 1024},
    {"model": MIDDLE, "micro_batch_size": 2, "sequence_length": 1024, **LEAN},
    {"model": MIDDLE, "micro_batch_size": 1, "sequence_length": 2048, "padded": True},
    {"model": MIDDLE, "micro_batch_size": 8, "sequence_length": 2048},
]


def recipe_of(row: dict[str, Any]) -> TrainRecipe:
    return TrainRecipe(**QLORA, **row)


def measure(row: dict[str, Any], folder: str) -> dict[str, Any]:
    """What one row takes here, from an empty process."""
    import torch

    from fitcast import build_model, measure_step
    from fitcast.training import random_weights

    recipe = recipe_of(row)
    source = random_weights.write(recipe.model, folder, torch.float16)
    found = measure_step(recipe, build_model(recipe, str(source)))
    return {
        "seconds": round(found.seconds, 4),
        "tokens_per_second": round(found.tokens_per_second, 1),
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "peak_reserved_bytes": found.peak_reserved_bytes,
        "counted_bytes": found.report.peak_bytes,
    }


def expected(row: dict[str, Any]) -> dict[str, Any]:
    """What the forecast says of the row on a T4, before it runs."""
    from fitcast import T4, forecast

    said = forecast(recipe_of(row), T4)
    return {"fits": said.fits, "forecast_peak_allocated_bytes": said.peak_allocated_bytes}


def child(row: dict[str, Any], folder: str, seconds: float) -> dict[str, Any]:
    """A row in a process of its own; a failure's last line is the row's record of it."""
    command = [
        sys.executable,
        "-m",
        "tools.t4_reading",
        "--row",
        json.dumps(row),
        "--folder",
        folder,
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=seconds,
            cwd=Path(__file__).parents[1],
            env={**os.environ, "FITCAST_CACHE": "0"},
        )
    except subprocess.TimeoutExpired:
        return {"error": "no time left"}
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    return {"error": (done.stderr.strip().splitlines() or ["no message"])[-1][:300]}


def machine() -> dict[str, str]:
    """What `fitcast doctor` finds here: versions, card, memory."""
    from fitcast import doctor

    return {finding.name: finding.found for finding in doctor()}


def reading(minutes: float = MINUTES, rows: Sequence[dict[str, Any]] = ROWS) -> dict[str, Any]:
    """Every row with its forecast and its measurement, and what measured it.

    Args:
        minutes: After these, the rows that wait are left out and say so.
        rows: What is run: `ROWS`, or some of them.
    """
    began = time.monotonic()
    found = {"date": datetime.date.today().isoformat(), "machine": machine(), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        for row in rows:
            left = minutes * 60 - (time.monotonic() - began)
            said = {"error": "no time left"}
            if left > 0:
                said = expected(row) | child(row, folder, left)
            found["rows"].append(row | said)
            print(f"{len(found['rows'])}/{len(rows)} {shown(row | said)}", flush=True)
    return found


def shown(row: dict[str, Any]) -> str:
    """A row in one line: what ran, its forecast and its measurement."""
    from fitcast import show_bytes

    what = f"{row['model']} {row['micro_batch_size']} x {row['sequence_length']}"
    if "forecast_peak_allocated_bytes" in row:
        what += f": forecast {show_bytes(row['forecast_peak_allocated_bytes'])}"
    if "error" in row:
        return f"{what}, {row['error'][:80]}"
    return (
        f"{what}, measured {show_bytes(row['peak_allocated_bytes'])}, "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("reading.json"))
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--row", type=json.loads, help="one row, in this process")
    parser.add_argument("--folder", default="", help="where its base is written")
    options = parser.parse_args(arguments)
    if options.row is not None:
        print(json.dumps(measure(options.row, options.folder)))
        return 0
    text = json.dumps(reading(options.minutes))
    options.out.write_text(text + "\n", "utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
