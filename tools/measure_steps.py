"""Measure the memory of real training steps on a CUDA GPU, to hold the forecast against.

    python tools/measure_steps.py OUT.json [--rows look|held|padded] [--minutes 9] [--workers 3]

Each row is a `TrainRecipe` run through `fitcast.step.qlora` in a process of its own: load a
checkpoint of random weights at the real shapes, add adapters, take three optimizer steps. The file
is written again after every row; a row that fails says why. Memory counters are per process, so
rows may share the GPU; no times are taken.

Protocol: rows with `kernels="t4"` have the FlashAttention and cuDNN kernels off, as on a T4; cuBLAS
keeps this GPU's workspaces. `peak_*` are those of the third step, after
`reset_peak_memory_stats`, without emptying the cache. Rows with `trace` also write every event of
the caching allocator, in order, into OUT.trace-N.json.gz.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gzip
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # no CUDA in the parent: it forks
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fitcast.recipe import TrainRecipe

QLORA = {"amp_dtype": "float16", "sequence_length": 2048}  # nf4, r=16 on q,k,v,o, PagedAdamW8bit
LLAMA1, LLAMA3, LLAMA8 = "llama-3.2-1b", "llama-3.2-3b", "llama-3.1-8b"
QWEN06, QWEN17, PHI, SMOL = "qwen3-0.6b", "qwen3-1.7b", "phi-4-mini", "smollm2-1.7b"
FUSED = ("qkv_proj", "o_proj")


def row(model: str, kernels: str = "t4", trace: bool = False, **changes) -> dict:
    return {"kernels": kernels, "trace": trace, "recipe": QLORA | {"model": model} | changes}


# Looked at while the rules about CUDA's kernels were written: one row for each mechanism.
LOOK = [
    row(LLAMA1, trace=True, sequence_length=512),
    row(LLAMA1, trace=True, sequence_length=512, attention="explicit_kv", loss="chunked"),
    row(LLAMA1, trace=True, sequence_length=1024, micro_batch_size=2, padded=True),
    row(LLAMA1, trace=True, sequence_length=512, attention="eager", optimizer="adamw"),
    row(
        LLAMA1,
        trace=True,
        sequence_length=512,
        norm="native",
        lora_dropout=0.0,
        checkpointed_layers=10,
        attention="explicit_kv",
    ),
    row(LLAMA1, trace=True, sequence_length=512, base="float16", amp_dtype=None),
    row(LLAMA1, trace=True, sequence_length=512, lora_rank=None, base="float32", optimizer="adamw"),
    row(LLAMA1, trace=True, kernels="own", sequence_length=1024),
    row(LLAMA1, trace=True, sequence_length=512, kbit_upcast=True, gradient_accumulation_steps=2),
    row(
        LLAMA1,
        trace=True,
        kernels="own",
        sequence_length=1024,
        padded=True,
        base="bfloat16",
        amp_dtype="bfloat16",
        micro_batch_size=2,
        optimizer="adamw_8bit",
    ),
    row(
        LLAMA1,
        trace=True,
        sequence_length=512,
        micro_batch_size=4,
        attention="explicit_kv",
        offload_checkpoints=True,
        loss="chunked",
    ),
    row(LLAMA1, trace=True, sequence_length=512, amp_dtype=None, base="nf4"),
]

# Predicted before it was looked at.
HELD = [
    row(PHI, lora_targets=FUSED, sequence_length=512, micro_batch_size=2),
    row(PHI, lora_targets=FUSED, sequence_length=1024, attention="explicit_kv", loss="chunked"),
    row(PHI, lora_targets=FUSED, sequence_length=2048, kbit_upcast=True),
    row(
        PHI,
        lora_targets="all-linear",
        sequence_length=1024,
        checkpointed_layers=20,
        attention="explicit_kv",
        norm="native",
    ),
    row(QWEN17, sequence_length=1024, micro_batch_size=2),
    row(QWEN17, sequence_length=2048, micro_batch_size=4, attention="explicit_kv", loss="chunked"),
    row(QWEN17, sequence_length=512, micro_batch_size=12, norm="native", attention="explicit_kv"),
    row(QWEN17, sequence_length=1024, attention="eager", checkpointed_layers=0),
    row(QWEN06, sequence_length=4096, attention="explicit_kv", loss="chunked"),
    row(QWEN06, sequence_length=512, micro_batch_size=8, amp_dtype=None, base="float16"),
    row(QWEN06, sequence_length=512, lora_rank=None, base="float32", optimizer="adamw_8bit"),
    row(
        QWEN06,
        sequence_length=512,
        micro_batch_size=3,
        lora_rank=None,
        base="float32",
        optimizer="adamw",
        amp_dtype="float16",
        gradient_accumulation_steps=2,
    ),
    row(
        QWEN06,
        kernels="own",
        sequence_length=2048,
        micro_batch_size=2,
        base="bfloat16",
        amp_dtype="bfloat16",
    ),
    row(SMOL, sequence_length=1024, micro_batch_size=2, double_quant=False),
    row(SMOL, sequence_length=2048, loss="chunked", optimizer="adamw", lora_rank=64),
    row(SMOL, sequence_length=1024, micro_batch_size=4, padded=True, optimizer="adamw_8bit"),
    row(
        SMOL,
        sequence_length=512,
        kbit_upcast=True,
        checkpointed_layers=0,
        amp_dtype=None,
        base="float16",
    ),
    row(LLAMA1, sequence_length=4096, attention="explicit_kv", loss="chunked"),
    row(LLAMA1, sequence_length=512, micro_batch_size=12, lora_targets="all-linear"),
    row(LLAMA1, sequence_length=2048, attention="eager", micro_batch_size=2, loss="chunked"),
    row(
        LLAMA1,
        sequence_length=1024,
        micro_batch_size=3,
        padded=True,
        attention="explicit_kv",
        gradient_accumulation_steps=4,
    ),
    row(LLAMA1, sequence_length=2048, kbit_upcast=True, checkpointed_layers=6),
    row(LLAMA1, kernels="own", sequence_length=4096, micro_batch_size=2),
    row(
        LLAMA3,
        sequence_length=1024,
        micro_batch_size=2,
        checkpointed_layers=14,
        attention="explicit_kv",
    ),
    row(LLAMA3, sequence_length=2048, attention="stock", loss="chunked", double_quant=False),
    row(LLAMA3, sequence_length=512, base="float16", micro_batch_size=2),
    row(
        LLAMA8,
        sequence_length=2048,
        micro_batch_size=4,
        attention="explicit_kv",
        loss="chunked",
        norm="native",
        lora_dropout=0.0,
    ),
    row(
        LLAMA8,
        sequence_length=2048,
        attention="explicit_kv",
        loss="chunked",
        checkpointed_layers=16,
    ),
    row(
        LLAMA8,
        sequence_length=2048,
        micro_batch_size=4,
        attention="explicit_kv",
        loss="chunked",
        offload_checkpoints=True,
    ),
    row(LLAMA8, sequence_length=2048, kbit_upcast=True),
    row(
        LLAMA8,
        sequence_length=1024,
        micro_batch_size=2,
        lora_targets="all-linear",
        gradient_accumulation_steps=2,
    ),
    row(LLAMA8, sequence_length=1024, micro_batch_size=2, padded=True),
]

LEAN = {"attention": "explicit_kv", "norm": "native", "mlp": "lean", "adapters": "lean",
        "rotary": "lean", "lora_dropout": 0.0}  # fmt: skip
COMPILED = LEAN | {"loss": "compiled", "mlp": "compiled", "adapters": "in_place",
                   "rotary": "compiled", "flat_optimizer": True}  # fmt: skip
# Batches with a mask, whose losses copy the labelled positions. Predicted before looked at. Of two
# rows at least: one alone is as long as its batch (`TrainRecipe.has_mask`).
PADDED = [
    row(LLAMA1, sequence_length=1024, micro_batch_size=4, padded=True, loss="chunked"),
    row(QWEN17, micro_batch_size=4, padded=True, loss="chunked", offload_checkpoints=True),
    row(
        QWEN06,
        sequence_length=512,
        micro_batch_size=4,
        padded=True,
        loss="chunked",
        lora_rank=None,
        base="float32",
        optimizer="adamw_8bit",
    ),
    row(LLAMA1, micro_batch_size=3, padded=True, **LEAN, loss="lean", checkpointed_layers=0),
    row(LLAMA3, sequence_length=1024, micro_batch_size=4, padded=True, **LEAN, loss="fused"),
    row(QWEN17, micro_batch_size=2, padded=True, loss="lean", checkpointed_layers=14),
    row(LLAMA8, micro_batch_size=2, padded=True, **COMPILED, checkpointed_layers=15),
    row(LLAMA1, micro_batch_size=8, padded=True, **COMPILED),
    row(LLAMA3, micro_batch_size=2, padded=True, **COMPILED, checkpointed_layers=0),
    row(
        PHI,
        lora_targets=FUSED,
        sequence_length=1024,
        micro_batch_size=2,
        padded=True,
        **LEAN,
        loss="fused",
        checkpointed_layers=4,
    ),
]
SETS = {"look": LOOK, "held": HELD, "padded": PADDED}


def write_checkpoint(folder: Path, model: str, dtype: str) -> Path:
    """A safetensors checkpoint of random weights at the real shapes; returns its folder."""
    import torch

    from fitcast.training import random_weights

    return random_weights.write(model, folder, getattr(torch, dtype))


def make_batch(recipe: TrainRecipe, vocab_size: int) -> dict:
    import torch

    shape = (recipe.micro_batch_size, recipe.sequence_length)
    ids = torch.randint(10, vocab_size - 10, shape, device="cuda")
    batch = {"input_ids": ids, "labels": ids.clone()}
    if recipe.padded:
        mask = torch.ones_like(ids)
        mask[0, -recipe.sequence_length // 4 :] = 0
        batch |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return batch


def measure(spec: dict, source: str, trace_path: str) -> dict:
    """The bytes of one row, from an empty process."""
    import torch
    import transformers

    from fitcast.step import qlora

    recipe = TrainRecipe(**spec["recipe"])
    if spec["kernels"] == "t4":
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.enable_cudnn_sdp(False)
    if spec["trace"]:
        torch.cuda.memory._record_memory_history(
            "all", context=None, stacks="python", max_entries=2_000_000
        )
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(0)
    marks, result = [], {}

    def mark(name: str) -> None:
        torch.cuda.synchronize()
        if spec["trace"]:
            marks.append((name, len(torch.cuda.memory._snapshot()["device_traces"][0])))
        stats = torch.cuda.memory_stats()
        result[name] = {
            "allocated": stats["allocated_bytes.all.current"],
            "peak_allocated": stats["allocated_bytes.all.peak"],
            "requested_peak": stats["requested_bytes.all.peak"],
            "reserved": stats["reserved_bytes.all.current"],
            "peak_reserved": stats["reserved_bytes.all.peak"],
            "segments": stats["segment.all.current"],
        }
        torch.cuda.reset_peak_memory_stats()

    model = qlora.load_base(recipe, source=source)
    mark("load")
    model = qlora.add_adapters(model, recipe)
    model = qlora.apply_levers(model, recipe)
    model.train()
    mark("adapters")
    optimizer = qlora.build_optimizer(model, recipe)
    scaler = (
        torch.amp.GradScaler("cuda", init_scale=256.0) if recipe.amp_dtype == "float16" else None
    )
    batches = [
        make_batch(recipe, model.config.vocab_size)
        for _ in range(recipe.gradient_accumulation_steps)
    ]
    losses = []
    for step in (1, 2, 3):
        losses.append(qlora.training_step(model, optimizer, batches, recipe, scaler))
        mark(f"step_{step}")
    if spec["trace"]:
        events = torch.cuda.memory._snapshot()["device_traces"][0]
        events = [[e["action"], e["size"], e["addr"]] for e in events]
        with gzip.open(trace_path, "wt", encoding="utf-8") as file:
            json.dump({"spec": spec, "marks": marks, "events": events}, file)
    return result | {
        "loaded_bytes": result["load"]["allocated"],
        "load_peak_bytes": result["load"]["peak_allocated"],
        "adapters_added_bytes": result["adapters"]["allocated"],
        "peak_allocated_bytes": result["step_3"]["peak_allocated"],
        "peak_reserved_bytes": result["step_3"]["peak_reserved"],
        "optimizer_states": len(optimizer.state),
        "losses": [round(float(loss), 4) for loss in losses],
    }


def child(spec: dict, source: str, trace_path: str, pipe) -> None:
    try:
        pipe.send(measure(spec, source, trace_path))
    except BaseException as error:  # the row's own record of what went wrong
        pipe.send(
            {"error": f"{type(error).__name__}: {error}", "where": traceback.format_exc()[-2000:]}
        )


def versions() -> dict:
    from importlib.metadata import version

    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
    return {name: version(name) for name in names} | {"python": sys.version.split()[0]}


def ask_gpu(pipe) -> None:
    import torch

    properties = torch.cuda.get_device_properties(0)
    torch.zeros(1, device="cuda")
    free, total = torch.cuda.mem_get_info()
    pipe.send(
        {
            "name": properties.name,
            "capability": [properties.major, properties.minor],
            "multiprocessors": properties.multi_processor_count,
            "total_bytes": total,
            "used_by_first_tensor_bytes": total - free,
            "cuda": torch.version.cuda,
        }
    )


def in_child(context, function, *arguments):
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=function, args=(*arguments, send))
    process.start()
    send.close()
    return process, receive


def answer(process, receive) -> dict:
    try:
        found = receive.recv()
    except EOFError:
        found = {"error": f"process ended with exit code {process.exitcode}"}
    process.join()
    return found


def storage(spec: dict) -> str:
    recipe = spec["recipe"]
    base = recipe.get("base", "nf4")
    return (recipe.get("amp_dtype") or "float32") if base == "nf4" else base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", choices=SETS, default="look")
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--only", type=int, nargs="*", help="row numbers")
    options = parser.parse_args()
    deadline = time.monotonic() + options.minutes * 60

    import torch  # imported once, before the rows fork
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM  # noqa: F401

    torch.set_num_threads(1)  # a forked child of a parent with OpenMP threads would hang
    context = multiprocessing.get_context("fork")
    specs = SETS[options.rows]
    record = {
        "gpu": answer(*in_child(context, ask_gpu)),
        "versions": versions(),
        "date": datetime.date.today().isoformat(),
        "protocol": __doc__,
        "rows": [],
    }
    specs = [
        spec | {"row": i} for i, spec in enumerate(specs) if not options.only or i in options.only
    ]
    # rows of one checkpoint follow each other, so that a checkpoint can go when they are done
    waiting = sorted(specs, key=lambda spec: (spec["recipe"]["model"], storage(spec)))
    running: list[tuple] = []
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            if waiting and time.monotonic() > deadline:
                record["rows"] += [spec | {"error": "no time left"} for spec in waiting]
                waiting = []
            if waiting and len(running) < options.workers:
                spec = waiting.pop(0)
                path = write_checkpoint(Path(folder), spec["recipe"]["model"], storage(spec))
                trace_path = f"{options.out.with_suffix('')}.trace-{spec['row']}.json.gz"
                running.append((spec, *in_child(context, child, spec, str(path), trace_path)))
                continue
            for item in list(running):
                spec, process, receive = item
                late = time.monotonic() > deadline + 45
                if not (receive.poll(0.05) or not process.is_alive() or late):
                    continue
                if late:
                    process.kill()
                found = answer(process, receive)
                running.remove(item)
                record["rows"].append(spec | found)
                record["rows"].sort(key=lambda r: r["row"])
                options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
                peak = found.get("peak_allocated_bytes")
                text = found.get("error") or f"{peak / 2**30:.2f} GiB, losses {found['losses']}"
                changes = {k: v for k, v in spec["recipe"].items() if k != "model"}
                print(
                    f"{len(record['rows'])}/{len(specs)} {spec['recipe']['model']} {changes} "
                    f"{spec['kernels']}: {text}",
                    flush=True,
                )
            needed = {
                f"{s['recipe']['model']}-random-{storage(s)}"
                for s in waiting + [item[0] for item in running]
            }
            for done in Path(folder).iterdir():
                if done.name.rpartition("-")[0] not in needed:  # less the config's digest
                    shutil.rmtree(done)
    options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    failed = [r["row"] for r in record["rows"] if "error" in r]
    print(f"done: {len(record['rows'])} rows, failed: {failed or 'none'}")


if __name__ == "__main__":
    for spec in LOOK + HELD + PADDED:
        dataclasses.replace(TrainRecipe(**spec["recipe"]))  # a typo fails before any GPU time
    main()
