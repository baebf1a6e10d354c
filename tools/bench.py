"""What the package promises, measured here: the forecast's errors, its latency, the ledger's cost.

    python tools/bench.py [--rows FILE ...]

Errors are against rows measured on a GPU (tests/data, or files of tools/measure_steps.py). Times
depend on the machine and on what else it does: they are shown as ratios to a fixed piece of Python
and, for orientation, in seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "2")

import torch
import transformers

from course_utils.data import BUNDLED
from course_utils.figures import widgets
from fitcast import gpus, models
from fitcast.forecasting import forecast as forecasts
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import KIB, MIB
from tools.measure_runs import H200_WITH_T4_KERNELS

DATA = ROOT / "tests" / "data"
SHARED = {"llama-1b": "llama-3.2-1b", "llama-8b": "llama-3.1-8b"}


def recipe_of(row: dict, folder: Path) -> TrainRecipe:
    """The recipe of a row, in either file's words."""
    if "recipe" in row:
        return TrainRecipe(**row["recipe"])
    path = folder / row["model"]
    if not path.exists():  # that file's models have a head of their own
        config = models.config(SHARED[row["model"]])
        config.tie_word_embeddings = False
        config.save_pretrained(path)
    return TrainRecipe(
        model=str(path),
        amp_dtype="float16",
        loss=row["loss"],
        lora_dropout=row["lora_dropout"],
        micro_batch_size=row["micro_batch_size"],
        sequence_length=row["sequence_length"],
        checkpointed_layers=row["checkpointed_layers"],
        attention={"efficient": "explicit_kv"}.get(row["attention"], row["attention"]),
    )


def errors(path: Path, folder: Path) -> None:
    """Print one line a row and the totals of a file."""
    rows = [row for row in json.loads(path.read_text("utf-8"))["rows"] if "error" not in row]
    found, inside, widths = [], 0, []
    print(f"\n{path.name}: {len(rows)} rows; error of the peak, place of reserved in its interval")
    for row in rows:
        recipe = recipe_of(row, folder)
        gpu = gpus.H200 if row.get("kernels") == "own" else H200_WITH_T4_KERNELS
        f = forecasts.forecast(recipe, gpu)
        error = f.peak_allocated_bytes / row["peak_allocated_bytes"] - 1
        low, high = f.peak_reserved_bytes
        reserved = row["peak_reserved_bytes"]
        found.append(abs(error))
        inside += low <= reserved <= high
        widths.append((high - low) / reserved)
        default = TrainRecipe(model=BUNDLED)
        words = [
            f"{name}={value}"
            for name, value in dataclasses.asdict(recipe).items()
            if value != getattr(default, name) and name not in ("model", "amp_dtype")
        ]
        print(
            f"  {error:+8.4%}  {(reserved - low) / (high - low):5.0%} of "
            f"{widths[-1]:3.0%}  {Path(recipe.model).name} {' '.join(words)}"
        )
    print(
        f"  peak: median {statistics.median(found):.4%}, worst {max(found):.4%}; reserved: "
        f"{inside} of {len(rows)} inside, widest {max(widths):.1%}"
    )


def yardstick() -> float:
    """Seconds of a fixed piece of Python."""
    start = time.process_time()
    sum(i * i % 7 for i in range(2_000_000))
    return time.process_time() - start


def latency() -> None:
    """Print how long a forecast takes that is not in the cache, libraries loaded."""
    forecasts.forecast(
        TrainRecipe(model=BUNDLED, amp_dtype="float16", sequence_length=64)
    )  # loads libraries
    print("\nlatency of a new forecast (best of 3)")
    unit = min(yardstick() for _ in range(3))
    for model in ("llama-3.2-1b", "llama-3.1-8b"):
        times = []
        for sequence in (1001, 1002, 1003):
            start = time.process_time()
            forecasts.forecast(
                TrainRecipe(model=model, amp_dtype="float16", sequence_length=sequence)
            )
            times.append(time.process_time() - start)
        print(f"  {model}: {min(times):.2f} s of one core, {min(times) / unit:.1f} yardsticks")
    recipe = TrainRecipe(model="llama-3.2-1b", amp_dtype="float16", sequence_length=1003)
    forecasts.forecast(dataclasses.replace(recipe, checkpointed_layers=7))
    start = time.process_time()
    forecasts.forecast(dataclasses.replace(recipe, checkpointed_layers=9))
    print(f"  another k of the same recipe: {time.process_time() - start:.2f} s")


# What a reader types, and within how many seconds the answer should stand there, on two free cores.
COMMANDS = (
    ("forecast --model llama-3.1-8b --micro-batch-size 4 --sequence-length 2048", 4.0),
    ("fit --model llama-3.1-8b --micro-batch-size 4 --sequence-length 2048 "
     "--gradient-accumulation-steps 8", 15.0),
)  # fmt: skip


def cold_start() -> None:
    """Print how long the command line takes from the start of the process, each command twice.

    The first time nothing is kept on disk, the second time what the first one kept.
    """
    print("\ncommand line, wall clock from start to end (target; then with what was kept on disk)")
    fitcast = Path(sys.executable).with_name("fitcast")
    with tempfile.TemporaryDirectory() as folder:
        surroundings = os.environ | {"FITCAST_CACHE": folder}
        subprocess.run([fitcast, "--version"], check=True, capture_output=True)  # files are read
        for command, target in COMMANDS:
            seconds = []
            for _ in ("first", "again"):
                start = time.perf_counter()
                subprocess.run(
                    [fitcast, *command.split()], env=surroundings, capture_output=True, check=False
                )
                seconds.append(time.perf_counter() - start)
            print(
                f"  fitcast {command}\n    {seconds[0]:.1f} s, {seconds[0] / target:.2f} of the "
                f"{target:.0f} s allowed; again {seconds[1]:.1f} s"
            )


async def slider() -> None:
    """Print how long a move takes: to a new setting, and on from there after a look at it."""
    explorer = widgets.levers_explorer()
    for move, name, value, look in (
        ("first move", "micro_batch_size", 1, 5),
        ("the next one, after a look of 5 s", "micro_batch_size", 2, 15),
        ("another control's, after a look of 15 s", "lora_rank", 8, 0),
    ):
        shown, start = explorer.picture.value, time.process_time()
        explorer.controls[name].value = value
        while explorer.picture.value == shown:
            await asyncio.sleep(0)
        print(f"  slider, {move}: {1000 * (time.process_time() - start):.0f} ms")
        await asyncio.sleep(look)


def ledger_overhead() -> None:
    """Print a real training step's time with the ledger over without."""
    recipe = TrainRecipe(model=BUNDLED, base="float32", sequence_length=128, micro_batch_size=4)
    model = qlora.apply_levers(qlora.add_adapters(qlora.load_base(recipe), recipe), recipe).train()
    optimizer = qlora.build_optimizer(model, recipe)
    ids = torch.randint(10, 100, (4, 128))

    def step() -> float:
        start = time.process_time()
        qlora.training_step(model, optimizer, [{"input_ids": ids, "labels": ids}], recipe)
        return time.process_time() - start

    step()
    plain = statistics.median(step() for _ in range(5))
    with MemoryLedger(model):
        watched = statistics.median(step() for _ in range(5))
    print(f"\nledger on a real step of the bundled model: {watched / plain:.2f} x the time without")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rows",
        type=Path,
        nargs="*",
        default=[DATA / f"h200_{name}.json" for name in ("steps", "rules", "held")],
    )
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    cold_start()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    latency()
    asyncio.run(slider())
    ledger_overhead()
    with tempfile.TemporaryDirectory() as folder:
        for path in options.rows:
            errors(path, Path(folder))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    print(f"\nmemory of this process: {(after - before) / MIB:.0f} MiB above torch's own")


if __name__ == "__main__":
    main()
