"""Train on a GPU as if it were a T4, and write what was measured beside what was forecast.

    python tools/record_gpu_run.py [--out PATH] [--groups ladder fit …]

Each row is a recipe run through `training.QLoRATrainer` in a process of its own, one after the
other: random weights at the real shapes (memory and speed do not depend on values), full-length
sequences, T4 kernels and, unless a row says otherwise, the T4's memory limit. Speed is the median
of the steps after the second; peaks are the highest of all steps but the first two. Beside each
peak stands its forecast, made at the end without the GPU. The group "budgets" goes through
`measurement.measure_step` instead: peak and median of three steps, then one more under the ledger,
which says who holds what. The group "lessons" executes every lesson headlessly on the emulated T4,
"tests" runs the tests that need CUDA, "ranks" lesson 03's update by two processes with a GPU each.
The file is written again after every row, and rows of groups that were not asked for stay as they
were: each names its GPU, versions and date.
"""

from __future__ import annotations

import argparse
import ast
import bisect
import dataclasses
import datetime
import hashlib
import html
import json
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from course_utils.data import BUNDLED
from fitcast.gpus import EMULATE_VARIABLE, T4
from fitcast.recipe import TrainRecipe
from fitcast.units import GIB
from tools.measure_steps import answer, in_child, storage, versions, write_checkpoint

LLAMA8, LLAMA1, PHI, QWEN = "llama-3.1-8b", "llama-3.2-1b", "phi-4-mini", "qwen3-1.7b"
FUSED = ("qkv_proj", "o_proj")
USUAL = TrainRecipe(
    model=LLAMA8,
    amp_dtype="float16",
    sequence_length=2048,
    micro_batch_size=4,
    max_steps=6,
    warmup_fraction=0.0,
    seed=0,
)
LADDER = (  # each rung keeps the ones before it
    ("the usual recipe", {}),
    ("explicit key/value heads", {"attention": "explicit_kv"}),
    ("chunked loss", {"loss": "chunked"}),
    ("no adapter dropout", {"lora_dropout": 0.0}),
    ("native RMSNorm", {"norm": "native"}),
    ("loss with its gradient", {"loss": "lean"}),
    ("adapters in one product", {"adapters": "lean"}),
    ("lean rotary embedding", {"rotary": "lean"}),
    ("expandable segments", {"expandable_segments": True}),
    ("lean MLP", {"mlp": "lean"}),
    ("checkpoints on the host", {"offload_checkpoints": True}),
)
PADDED = ("the usual recipe", "explicit key/value heads", "chunked loss",
          "lean rotary embedding", "checkpoints on the host")  # fmt: skip
OURS = {key: value for _, change in LADDER[:-2] for key, value in change.items()}
LEAN = OURS | LADDER[-2][1]
MEASURED = r"measured|: (True|False)$"  # in what a lesson's cell prints
NEEDS_CUDA = "skipif(not torch.cuda.is_available()"


def row(group: str, name: str, limited: bool = True, **changes) -> dict:
    return {
        "group": group,
        "name": name,
        "limited": limited,
        "recipe": dataclasses.asdict(dataclasses.replace(USUAL, **changes)),
    }


def ladder() -> list[dict]:
    rows, changes = [row("ladder", "with k-bit upcast", limited=False, kbit_upcast=True)], {}
    for name, change in LADDER:
        changes |= change
        rows.append(row("ladder", name, limited=False, **changes))
    return [
        row("ladder", "the usual recipe on a T4"),
        row("ladder", "the last rung on a T4", **changes),
        *rows,
    ]


def padded() -> list[dict]:
    """The ladder's rungs that matter, with a batch of unequal rows: a mask, hence other kernels."""
    rows, changes = [], {"padded": True}
    for name, change in LADDER:
        changes |= change
        if name in PADDED:
            rows.append(row("padded", name, limited=False, **changes))
    return rows


def card():
    """This card's speed, a T4's memory and kernels: what `fit` is asked about."""
    from fitcast import gpus as hardware

    return dataclasses.replace(
        hardware.detect(),
        total_bytes=T4.total_bytes,
        context_bytes=T4.context_bytes,
        flash_attention=False,
    )


def picked(group: str, name: str, max_steps: int = USUAL.max_steps, **changes) -> dict:
    """What `fit` picks for an effective batch of 8 within a T4's memory."""
    from fitcast.forecasting.search import fit

    start = dataclasses.replace(USUAL, gradient_accumulation_steps=2, **LEAN | changes)
    return row(
        group, name, **dataclasses.asdict(fit(start, card()).recipe) | {"max_steps": max_steps}
    )


def fitted() -> list[dict]:
    """Effective batch 8 on a T4: what `fit` picks, for 50 steps, and its neighbours."""
    return [
        row("fit", "the usual recipe", limited=False, gradient_accumulation_steps=2),
        picked("fit", "what fit picks", max_steps=50),
    ] + [
        row(
            "fit",
            f"micro batch {size}, {k} layers checkpointed",
            micro_batch_size=size,
            gradient_accumulation_steps=8 // size,
            checkpointed_layers=k,
            **LEAN,
        )
        for size, k in ((1, 0), (2, 18), (4, 26), (4, "all"))
    ]


def menu() -> list[dict]:
    rows = []
    for model, targets in ((LLAMA1, USUAL.lora_targets), (QWEN, USUAL.lora_targets), (PHI, FUSED)):
        which = {"model": model, "lora_targets": targets}
        rows.append(row("menu", f"{model}, usual", limited=False, **which))
        for size in (4, 8, 16):
            rows.append(
                row(
                    "menu",
                    f"{model}, ours, micro batch {size}",
                    **which | OURS | {"micro_batch_size": size},
                )
            )
        size = largest_micro_batch(dataclasses.replace(USUAL, **which | OURS))
        rows.append(
            row(
                "menu",
                f"{model}, ours, largest micro batch",
                **which | OURS | {"micro_batch_size": size},
            )
        )
        rows.append(
            row(
                "menu",
                f"{model}, lean, checkpoints on the host",
                **which | LEAN | {"offload_checkpoints": True},
            )
        )
        rows.append(picked("menu", f"{model}, what fit picks", **which))
    return rows


def largest_micro_batch(recipe: TrainRecipe) -> int:
    """The most sequences that a T4 is forecast to hold, upper bound of reserved memory included."""
    from fitcast.forecasting.forecast import forecast

    sizes = range(1, 128)
    return bisect.bisect_left(
        sizes,
        True,
        key=lambda size: not forecast(dataclasses.replace(recipe, micro_batch_size=size), T4).fits,
    )


def checkpointing() -> list[dict]:
    """What forgetting costs: Llama-3.2-1B with adapters, and with all weights trained."""
    ways = {"LoRA": {}, "all weights": {"lora_rank": None, "base": "float32"}}
    return [
        row(
            "checkpointing",
            f"{way}, {k} of 16 layers",
            limited=False,
            model=LLAMA1,
            sequence_length=1024,
            checkpointed_layers=k,
            **changes,
        )
        for way, changes in ways.items()
        for k in (0, 8, 16)
    ]


def matmul() -> list[dict]:
    return [{"group": "matmul", "name": name} for name in ("float32", "float16", "bfloat16")]


def launch() -> list[dict]:
    """A step so small that Python's pace of launching operations is the only thing to see."""
    return [
        row(
            "launch",
            "8B, 1 x 64 tokens",
            model=LLAMA8,
            micro_batch_size=1,
            max_steps=20,
            **LEAN | {"sequence_length": 64, "checkpointed_layers": 0},
        )
    ]


def lessons() -> list[dict]:
    scripts = sorted((ROOT / "lessons").glob("[0-9][0-9]_*.py"))
    small = {"group": "lessons", "name": "07_qlora_on_a_t4, small model", "model": "bundled"}
    return [*({"group": "lessons", "name": script.stem} for script in scripts), small]


def gpus() -> list[dict]:
    """Lesson 07's run with its 32 sequences a step shared by processes, one GPU each."""
    import torch

    return [
        {"group": "gpus", "name": f"{n} GPU{'s' * (n > 1)}", "processes": n, "steps": 12}
        for n in (1, 2, 4)
        if n <= torch.cuda.device_count()
    ]


def ranks() -> list[dict]:
    """Lesson 03's update by two processes that talk through NCCL."""
    import torch

    return [
        {"group": "ranks", "name": "2 ranks, a GPU each", "ranks": 2}
        for _ in range(torch.cuda.device_count() > 1)
    ]


def tests() -> list[dict]:
    """A row for each module with tests that are skipped where there is no GPU."""
    return [
        {"group": "tests", "name": path.name}
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if needing_cuda(path)
    ]


def needing_cuda(path: Path) -> list[str]:
    """The tests of a module whose mark says that they are skipped where there is no GPU."""
    text = path.read_text(encoding="utf-8")
    if "torch.cuda.is_available" not in text:  # most have none, and need no tree
        return []
    return [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef)
        and any(NEEDS_CUDA in ast.unparse(mark) for mark in node.decorator_list)
    ]


def budgets() -> list[dict]:
    """The models for which budgets circulate, trained by the usual recipe: who holds what."""
    return [
        row("budgets", model, limited=False, model=model, lora_targets=targets)
        for model, targets in ((LLAMA8, USUAL.lora_targets), (PHI, FUSED))
    ]


def curves() -> list[dict]:
    """The same data and seed, 50 steps: the levers change the memory, not the training."""
    common = {
        "micro_batch_size": 1,
        "max_steps": 50,
        "lora_dropout": 0.0,
        "limited": False,
        "learning_rate": 2e-3,
    }
    return [
        row("curves", "usual", **common),
        row("curves", "ours", **common | {k: v for k, v in LEAN.items() if k not in common}),
    ]


GROUPS = {
    "ladder": ladder,
    "padded": padded,
    "fit": fitted,
    "curves": curves,
    "checkpointing": checkpointing,
    "matmul": matmul,
    "menu": menu,
    "launch": launch,
    "budgets": budgets,
    "gpus": gpus,
    "ranks": ranks,
    "tests": tests,
    "lessons": lessons,
}


def list_rows(group: str, pipe) -> None:
    pipe.send(GROUPS[group]())


def sequences(recipe: TrainRecipe, vocab_size: int) -> list[dict[str, list[int]]]:
    """Full-length sequences with something to learn: they use 64 tokens of the vocabulary."""
    import torch

    random = torch.Generator().manual_seed(recipe.seed)
    words = torch.randint(10, vocab_size - 10, (64,), generator=random)
    order = torch.randint(64, (256, recipe.sequence_length), generator=random)
    rows = [{"input_ids": row, "labels": row} for row in words[order].tolist()]
    if recipe.padded:  # one token is enough for transformers to keep the mask
        mask = [1] * (recipe.sequence_length - 1) + [0]
        rows = [row | {"attention_mask": mask} for row in rows]
    return rows


def emulated(spec: dict):
    """A T4, or a T4 with all of this card's memory, while the row runs."""
    import torch

    from fitcast import gpus as hardware

    total = torch.cuda.get_device_properties(0).total_memory
    return hardware.emulate(T4 if spec["limited"] else dataclasses.replace(T4, total_bytes=total))


def train_row(spec: dict, source: str, pipe) -> None:
    """Train one row in an empty process; the answer goes through the pipe, errors too."""
    import torch
    from transformers import default_data_collator

    from fitcast.training import trainer as training

    recipe, steps = TrainRecipe(**spec["recipe"]), []
    try:
        with emulated(spec), tempfile.TemporaryDirectory() as folder:
            model = training.build_model(recipe, source)
            trainer = training.QLoRATrainer(
                recipe,
                model,
                sequences(recipe, model.config.vocab_size),
                SimpleNamespace(pad_token_id=0),
                Path(folder),
                on_step=steps.append,
                save_strategy="no",
                remove_unused_columns=False,
            )
            trainer.data_collator = default_data_collator
            trainer.train()
        outcome = "trained"
    except torch.OutOfMemoryError as error:
        outcome = "out of memory: " + str(error).split(". GPU")[0]
    except BaseException as error:  # the row's own record of what went wrong
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        return
    measured = steps[2:] or [{}]
    speeds = [step["tokens_per_second"] for step in measured if step]
    pipe.send(
        {
            "outcome": outcome,
            "steps": len(steps),
            "peak_allocated_bytes": max(
                (s["peak_allocated_bytes"] for s in measured if s), default=None
            ),
            "peak_reserved_bytes": max(
                (s["peak_reserved_bytes"] for s in measured if s), default=None
            ),
            "tokens_per_second": round(statistics.median(speeds), 1) if speeds else None,
            "losses": [round(step["loss"], 5) for step in steps],
        }
    )


def count_row(spec: dict, source: str, pipe) -> None:
    """Measure some steps of one row, and count the bytes of one more with the ledger."""
    from fitcast.training import measurement
    from fitcast.training import trainer as training

    recipe = TrainRecipe(**spec["recipe"])
    with emulated(spec):
        found = measurement.measure_step(recipe, training.build_model(recipe, source))
    pipe.send(
        {
            "outcome": "trained",
            "composition": found.report.composition,
            "peak_allocated_bytes": found.peak_allocated_bytes,
            "peak_reserved_bytes": found.peak_reserved_bytes,
            "tokens_per_second": round(found.tokens_per_second, 1),
        }
    )


def run_on_gpus(spec: dict) -> dict:
    """Run tools/train_many_gpus.py under torchrun; losses and speeds are what it prints."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(spec["processes"]),
        str(ROOT / "tools" / "train_many_gpus.py"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*command, "--out", folder, "--steps", str(spec["steps"])],
            text=True,
            capture_output=True,
            env=os.environ | {EMULATE_VARIABLE: "T4"},
        )
    shared = re.search(r"^.* sequences of .*$", done.stdout, re.M)
    steps = re.findall(r"^step \d+: loss ([\d.]+), ([\d,]+) tokens/s", done.stdout, re.M)
    if done.returncode or len(steps) != spec["steps"]:
        return {"error": done.stderr[-1000:]}
    speeds = [int(speed.replace(",", "")) for _, speed in steps[2:]]
    return {
        "outcome": "trained",
        "shared": shared[0],
        "losses": [float(loss) for loss, _ in steps],
        "tokens_per_second": statistics.median(speeds),
    }


def run_tests(spec: dict) -> dict:
    """The outcome of each test of a module that needs CUDA, in a pytest without plugins."""
    path = next((ROOT / "tests").rglob(spec["name"]))
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pytest",
                "-q",
                "--noconftest",
                "-p",
                "no:cacheprovider",
                "-c",
                os.devnull,
                f"--rootdir={ROOT}",
                f"--junitxml={report}",
                *(f"{path}::{name}" for name in needing_cuda(path)),
            ],
            cwd=ROOT,
            text=True,
            capture_output=True,
            env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        )
        if not report.exists():
            return {"error": (done.stdout + done.stderr)[-1000:]}
        cases = list(ElementTree.parse(report).iter("testcase"))
    return {
        "outcome": "ran",
        "tests": {
            case.get("name"): next(
                (part.tag for part in case if part.tag in ("failure", "error", "skipped")), "passed"
            )
            for case in cases
        },
    }


def share_update(spec: dict, pipe) -> None:
    """How far an update shared by processes is from that of one, on lesson 03's uneven batch."""
    from transformers import AutoTokenizer

    from course_utils import data
    from course_utils.topics import ranks as processes
    from fitcast.training import gradients
    from fitcast.training.data import collate, encode
    from fitcast.units import IGNORED

    recipe = TrainRecipe(
        model=BUNDLED,
        base="float32",
        lora_rank=None,
        lora_dropout=0.0,
        checkpointed_layers=0,
        optimizer="adamw",
        micro_batch_size=2,
        gradient_accumulation_steps=16,
        sequence_length=128,
    )
    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())
    rows = list(encode(data.load_instructions(), tokenizer, recipe.sequence_length))
    rows = [dict(row) for row in rows[: recipe.effective_batch_size]]
    for row in rows[:28]:  # one labelled token is left
        first = next(at for at, label in enumerate(row["labels"]) if label != IGNORED)
        row["labels"] = [
            label if at <= first else IGNORED for at, label in enumerate(row["labels"])
        ]
    batch = {name: tensor.cuda() for name, tensor in collate(rows, tokenizer.pad_token_id).items()}
    alone = processes.update(recipe, batch)
    shared = dataclasses.replace(
        recipe, world_size=spec["ranks"], gradient_accumulation_steps=16 // spec["ranks"]
    )
    found = processes.launch(shared, batch)
    pipe.send(
        {
            "outcome": "trained",
            "relative_errors": {
                weigh: gradients.relative_error(update, alone) for weigh, update in found.items()
            },
        }
    )


def run_lesson(spec: dict) -> dict:
    """Execute a lesson as on a T4; what a cell measured or found true goes into the row."""
    from tools.notebooks import LESSONS, LessonError, execute, from_script, lesson_scripts

    notebook = from_script(lesson_scripts([spec["name"][:2]])[0])
    chosen = f'MODEL, DATA = "{spec.get("model", "auto")}"'
    for cell in notebook.cells:
        cell.source = cell.source.replace('MODEL, DATA = "auto"', chosen)
    os.environ[EMULATE_VARIABLE] = "T4"
    start = time.monotonic()
    try:
        execute(notebook, LESSONS)
    except LessonError as error:
        return {"error": str(error)[-1000:]}
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    printed = [
        {"cell": sha(cell.source), "printed": text}
        for cell in cells
        for output in cell.outputs
        if re.search(MEASURED, text := said(output), re.M)
    ]
    return {
        "outcome": "executed",
        "seconds": round(time.monotonic() - start, 1),
        "cells": len(cells),
        "measured": printed,
    }


def said(output: dict) -> str:
    """What an output says; of an answer that is folded until a guess stands, its lines."""
    folded = output.get("data", {}).get("text/html", "")
    lines = re.findall(r"<pre>(.*?)</pre>", "".join(folded), re.DOTALL)
    return html.unescape("\n".join([output.get("text", ""), *lines])).strip()


def sha(source: str) -> str:
    """What a cell of this source is recorded as: it says whether the cell has changed since."""
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def add_forecasts(rows: list[dict]) -> None:
    """Put beside every measured peak what a T4 with this much memory was forecast to need."""
    from fitcast.forecasting.forecast import forecast

    for spec in rows:
        if "recipe" in spec:
            said = forecast(TrainRecipe(**spec["recipe"]), T4)
            spec["forecast"] = {
                "peak_allocated_bytes": said.peak_allocated_bytes,
                "peak_reserved_bytes": said.peak_reserved_bytes,
                "fits": said.fits,
            }


def time_product(spec: dict, pipe) -> None:
    from fitcast.training import measurement

    pipe.send({"flops": measurement.matmul_flops(spec["name"])})


def describe_gpu(pipe) -> None:
    import torch

    pipe.send({"name": torch.cuda.get_device_name(0)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    recorded = ROOT / "course_utils" / "data" / "recorded_runs.json"
    parser.add_argument("--out", type=Path, default=recorded)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--names", nargs="+", help="of these groups, only rows that begin so")
    parser.add_argument(
        "--forecasts",
        action="store_true",
        help="only forecast the recorded rows again; needs no GPU",
    )
    options = parser.parse_args()
    if options.forecasts:
        record = json.loads(options.out.read_text(encoding="utf-8"))
        add_forecasts(record["rows"])
        return save(record, options.out)
    import torch  # imported once, before the rows fork
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.set_num_threads(1)  # a forked child of a parent with OpenMP threads would hang
    context = multiprocessing.get_context("fork")
    old = json.loads(options.out.read_text())["rows"] if options.out.exists() else []
    gpu = answer(*in_child(context, describe_gpu))["name"]
    stamp = {
        "gpu": gpu,
        "emulated": None if "T4" in gpu.split() else "T4",
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
    }
    specs = [
        spec
        for group in options.groups
        for spec in answer(*in_child(context, list_rows, group))
        if spec["name"].startswith(tuple(options.names or [""]))
    ]
    again = {(spec["group"], spec["name"]) for spec in specs}
    gone = set() if options.names else set(options.groups)  # rows that no longer exist go, too
    record = {
        "protocol": " ".join(__doc__.split("\n\n", 2)[2].split()),
        "rows": [r for r in old if (r["group"], r["name"]) not in again and r["group"] not in gone],
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        for number, spec in enumerate(specs, 1):
            title = f"{number}/{len(specs)} {spec['group']}: {spec['name']}"
            if spec["group"] == "matmul":
                found = answer(*in_child(context, time_product, spec))
            elif spec["group"] == "lessons":
                found = run_lesson(spec)
            elif spec["group"] == "gpus":
                found = run_on_gpus(spec)
            elif spec["group"] == "tests":
                found = run_tests(spec)
            elif spec["group"] == "ranks":
                found = answer(*in_child(context, share_update, spec))
            else:
                key = (spec["recipe"]["model"], storage(spec))
                if checkpoint != key:
                    source, checkpoint = write_checkpoint(Path(folder), *key), key
                run = count_row if spec["group"] == "budgets" else train_row
                found = answer(*in_child(context, run, spec, str(source)))
            peak = found.get("peak_allocated_bytes")
            print(
                title,
                f"{peak / GIB:.2f} GiB, {found['tokens_per_second']:.0f} tok/s"
                if peak
                else {k: v for k, v in found.items() if k != "losses"},
                flush=True,
            )
            record["rows"].append(spec | found | stamp)
            save(record, options.out)
    add_forecasts(record["rows"])
    save(record, options.out)


def save(record: dict, path: Path) -> None:
    """Write beside the old file first, so that an interruption leaves a whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    main()
