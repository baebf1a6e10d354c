"""Measure training steps on two CUDA GPUs, each held to a T4's memory and kernels.

    python tools/measure_ranks.py OUT.json [--smoke] [--minutes 5] [--only NAME] [--one-card]

A row is a `TrainRecipe`, a strategy and a number of processes: DDP, FSDP2 or a device map, run by
`step.ranks` and `step.qlora`, which the forecast runs, too. Random weights at the real shapes are
made and quantized tensor by tensor, and each rank keeps its part; of "loaded auto" transformers
reads a checkpoint and places it. "launch" rows are the lines of the files under configs/, as
`accelerate launch` takes them, on cards that pass for T4s. Rows with `alone` have the GPUs
for themselves and tell a speed; the others share them, four at a time. A row that fails says why;
the file is written after every row. `--smoke` runs tiny shapes, through gloo where no GPU is.
`--one-card` lets all ranks of DDP share the first GPU, through gloo, since NCCL refuses a GPU that
it has already: each rank's tensors are its process's own, so its memory is that of two GPUs, its
speed is not. FSDP2 and device maps need two and are left out.

Protocol: FlashAttention and cuDNN attention off, `set_per_process_memory_fraction` at 14.42 GiB;
peaks of the fifth step, after `reset_peak_memory_stats`; the loss scale starts at 256, so that no
step is skipped. NCCL's own buffers are not the caching allocator's and not counted.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fitcast.gpus import EMULATE_VARIABLE

CONFIGS = ROOT / "tests" / "data" / "configs"
T4_BYTES = int(14.42 * 2**30)
STEPS = 5
LANES = 4
TIMEOUT = 400  # seconds of a row
QLORA = {"base": "nf4", "amp_dtype": "float16", "lora_dropout": 0.0, "optimizer": "adamw",
         "attention": "explicit_kv", "loss": "lean", "norm": "native", "adapters": "lean",
         "checkpointed_layers": "all"}  # fmt: skip
FULL = {"base": "float32", "amp_dtype": "float16", "lora_rank": None, "lora_dropout": 0.0,
        "optimizer": "adamw", "checkpointed_layers": 0, "loss": "full", "attention": "stock",
        "norm": "stock", "adapters": "stock"}  # fmt: skip
LONG = {"mlp": "lean", "mlp_tile_tokens": 2048, "rotary": "lean", "offload_checkpoints": True}
STOCK = {"attention": "stock", "loss": "full", "norm": "stock", "adapters": "stock"}


def row(name: str, strategy: str, model: str, batch: int, length: int, **options: Any) -> dict:
    """A row as JSON; what is no option of a row belongs to the recipe."""
    known = {"processes": 2, "offload": False, "alone": False, "steps": STEPS, "trace": False,
             "layers": None}  # fmt: skip
    spec = {key: options.pop(key, value) for key, value in known.items()}
    recipe = QLORA | options | {"model": model, "micro_batch_size": batch,
                                "sequence_length": length}  # fmt: skip
    return {"name": name, "strategy": strategy, "recipe": recipe} | spec


ROWS = [
    # Speed, and what fits: one at a time.
    row("8b one process", "ddp", "llama-3.1-8b", 2, 2048, processes=1, alone=True),
    row("8b ddp", "ddp", "llama-3.1-8b", 2, 2048, alone=True),
    row("8b fsdp2", "fsdp2", "llama-3.1-8b", 2, 2048, alone=True),
    # Memory: several at a time.
    row("32b fsdp2 1x1024", "fsdp2", "qwen3-32b", 1, 1024),
    row("14b fsdp2 1x4096", "fsdp2", "qwen3-14b", 1, 4096),
    row("32b fsdp2 offload", "fsdp2", "qwen3-32b", 1, 1024, offload=True),
    row("kill one rank", "kill", "llama-3.2-1b", 1, 256, processes=1),
    row("14b fsdp2 offload", "fsdp2", "qwen3-14b", 1, 2048, offload=True),
    row("8b fsdp2 16k", "fsdp2", "llama-3.1-8b", 1, 16384),
    row("8b fsdp2 19k", "fsdp2", "llama-3.1-8b", 1, 19456),
    row("8b fsdp2 20k", "fsdp2", "llama-3.1-8b", 1, 20480),
    row("8b fsdp2 32k host checkpoints", "fsdp2", "llama-3.1-8b", 1, 32768, steps=3, **LONG),
    row("8b fsdp2 96k host checkpoints", "fsdp2", "llama-3.1-8b", 1, 98304, steps=2, **LONG,
        embedding="host"),
    row("0.6b ddp full", "ddp", "qwen3-0.6b", 2, 256, **FULL, layers=14, trace=True),
    row("1.7b fsdp2 full", "fsdp2", "qwen3-1.7b", 1, 256, **FULL, layers=12),
    row("1b fsdp2 nf4", "fsdp2", "llama-3.2-1b", 2, 512, trace=True),
    row("8b device_map auto", "auto", "llama-3.1-8b", 2, 1024, processes=1, **STOCK),
    row("14b device_map balanced", "balanced", "qwen3-14b", 1, 2048, processes=1, **STOCK),
    row("1b ddp lora r64", "ddp", "llama-3.2-1b", 4, 1024, lora_rank=64,
        lora_targets="all-linear"),
    row("8b fsdp2 stock", "fsdp2", "llama-3.1-8b", 1, 2048, **STOCK),
    row("8b fsdp2 no checkpointing", "fsdp2", "llama-3.1-8b", 1, 512, checkpointed_layers=0),
    row("equal one", "ddp", "llama-3.2-1b", 2, 256, processes=1, steps=6),
    row("equal fsdp2", "fsdp2", "llama-3.2-1b", 1, 256, steps=6),
    row("equal ddp", "ddp", "llama-3.2-1b", 1, 256, steps=6),
    row("0.6b ddp full, accumulated", "ddp", "qwen3-0.6b", 1, 256, **FULL, layers=14,
        gradient_accumulation_steps=2),
    row("14b loaded auto", "loaded auto", "qwen3-14b", 1, 2048, processes=1, **STOCK),
    row("8b loaded auto", "loaded auto", "llama-3.1-8b", 2, 1024, processes=1, **STOCK),
    row("32b fsdp2 host embedding", "fsdp2", "qwen3-32b", 1, 1024, embedding="host"),
    row("ddp_2xt4", "launch", "llama-3.2-1b", 8, 1024, processes=1),
    row("fsdp2_qlora_2xt4", "launch", "llama-3.2-1b", 8, 1024, processes=1),
    row("fsdp2_offload_2xt4", "launch", "llama-3.2-1b", 8, 1024, processes=1, offload=True),
    row("fsdp2_host_embedding_2xt4", "launch", "llama-3.1-8b", 8, 1024, processes=1,
        embedding="host"),
    row("1b ddp lora 16-bit", "ddp", "llama-3.2-1b", 4, 1024, base="float16"),
    row("1b fsdp2 16-bit lora", "fsdp2", "llama-3.2-1b", 4, 1024, base="float16"),
]  # fmt: skip


# --- one rank ----------------------------------------------------------------------------------


def config_of(spec: dict) -> Any:
    """The recipe's model: a preset, or a config that the tests bring along; tiny for a smoke."""
    from fitcast import models

    name, layers = spec["recipe"]["model"], spec["layers"]
    folder = CONFIGS / name
    config = models.config(str(folder) if folder.is_dir() else name)
    if layers:
        config.num_hidden_layers = layers
        config.layer_types = (getattr(config, "layer_types", None) or [None])[:layers]
    if os.environ.get("SMOKE"):
        config.update({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
                       "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
                       "vocab_size": 256})  # fmt: skip
        config.layer_types = None if not hasattr(config, "layer_types") else ["full_attention"] * 3
    return config


def recipe_of(spec: dict) -> Any:
    from fitcast.recipe import TrainRecipe

    fields = dict(spec["recipe"])
    folder = CONFIGS / fields["model"]
    fields["model"] = str(folder) if folder.is_dir() else fields["model"]
    if os.environ.get("SMOKE"):
        fields["sequence_length"] = min(fields["sequence_length"], 32)
    return TrainRecipe(**fields)


class Rank:
    """One process of a row: its devices, its part of the model, its steps."""

    def __init__(self, spec: dict):
        import torch
        import torch.distributed as dist

        self.spec, self.recipe = spec, recipe_of(spec)
        self.rank, self.ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = torch.cuda.is_available()
        self.cards = [self.rank]
        if spec["strategy"] in ("auto", "balanced", "loaded auto"):
            self.cards = [0, 1]
        one_card = bool(os.environ.get("ONE_CARD"))
        if one_card:
            self.cards = [0]
        self.device: Any = self.cards[0] if self.cuda else "cpu"
        if self.cuda:
            torch.cuda.set_device(self.device)
            torch.backends.cuda.enable_flash_sdp(False)
            torch.backends.cuda.enable_cudnn_sdp(False)
            for card in self.cards:
                total = torch.cuda.get_device_properties(card).total_memory
                torch.cuda.set_per_process_memory_fraction(T4_BYTES / total, card)
        if self.ranks > 1:
            backend = "cpu:gloo,cuda:nccl" if self.cuda and not one_card else "gloo"
            dist.init_process_group(backend, rank=self.rank, world_size=self.ranks)

    def read(self) -> dict[str, Any]:
        import torch

        if not self.cuda:
            return {}
        for card in self.cards:
            torch.cuda.synchronize(card)
        first = self.cards[0]
        found: dict[str, Any] = {
            "allocated_bytes": torch.cuda.memory_allocated(first),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(first),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(first),
        }
        if len(self.cards) > 1:
            found["second_card"] = {
                "allocated_bytes": torch.cuda.memory_allocated(1),
                "peak_allocated_bytes": torch.cuda.max_memory_allocated(1),
                "peak_reserved_bytes": torch.cuda.max_memory_reserved(1),
            }
        return found

    def model(self) -> Any:
        """The wrapped model, its weights where they belong."""
        import torch

        from fitcast.forecasting.load import blueprint
        from fitcast.step import qlora, ranks

        spec, recipe = self.spec, self.recipe
        if spec["strategy"] == "loaded auto":
            return self.loaded()
        model = blueprint(recipe, config_of(spec), torch.float16)
        ranks.pack(model)
        device_of = lambda name: self.device  # noqa: E731
        if spec["strategy"] == "fsdp2":
            mesh = torch.distributed.init_device_mesh("cuda" if self.cuda else "cpu", (self.ranks,))
            qlora.apply_levers(model, recipe)
            ranks.shard(model, mesh, offload=spec["offload"])
        elif len(self.cards) > 1:
            self.map = ranks.cut(model, spec["strategy"], 2, T4_BYTES)
            device_of = ranks.device_in(self.map) if self.cuda else device_of
        weights = ranks.noise(0, self.device)
        ranks.place(model, weights, qlora.storage_dtype(recipe), device_of, offload=spec["offload"])
        model.train()
        if spec["strategy"] == "fsdp2":
            return model
        qlora.apply_levers(model, recipe)
        if len(self.cards) > 1 and self.cuda:
            from accelerate import dispatch_model

            dispatch_model(model.get_base_model(), self.map, force_hooks=True)
            return model
        if self.ranks == 1:
            return model
        return ranks.replicate(model, self.device if self.cuda else None)

    def loaded(self) -> Any:
        """The model as `from_pretrained(..., device_map="auto")` places it on two such cards."""
        from transformers import AutoModelForCausalLM

        from fitcast.step import qlora
        from fitcast.training import random_weights

        recipe = self.recipe
        folder = random_weights.write(recipe.model, os.environ["WEIGHTS"])
        base: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            quantization_config=qlora.quantization(recipe),
            dtype=qlora.storage_dtype(recipe),
            device_map="auto",
            max_memory=dict.fromkeys(self.cards, T4_BYTES),
            use_safetensors=True,
        )
        self.map = dict(base.hf_device_map)
        base = qlora.prepare_base(base, recipe)
        return qlora.apply_levers(qlora.add_adapters(base, recipe), recipe).train()

    def batches(self, step: int) -> list[dict]:
        """This rank's rows of a step's batch, which is the same for any number of ranks."""
        import torch

        recipe = self.recipe
        rows = recipe.micro_batch_size * self.ranks
        generator = torch.Generator().manual_seed(step)
        found = []
        for _ in range(recipe.gradient_accumulation_steps):
            ids = torch.randint(0, 256, (rows, recipe.sequence_length), generator=generator)
            mine = ids.chunk(self.ranks)[self.rank].to(self.device)
            found.append({"input_ids": mine, "labels": mine.clone()})
        return found

    def write_trace(self, trace: list[dict]) -> None:
        """The last step's events beside the result: action, address, bytes, stream."""
        if self.rank == 0:
            name = self.spec["name"].replace(" ", "-")
            path = Path(os.environ["TRACES"]) / f"ranks-{name}.json.gz"
            events = [[e["action"], e.get("addr"), e["size"], e["stream"]] for e in trace]
            path.write_bytes(gzip.compress(json.dumps(events).encode()))

    def run(self) -> dict[str, Any]:
        import torch
        import torch.distributed as dist

        from fitcast.step import qlora

        began = time.monotonic()
        read: dict[str, Any] = {}
        model = self.model()
        read["loaded"] = self.read() | {"seconds": round(time.monotonic() - began, 1)}
        optimizer = qlora.build_optimizer(model, self.recipe)
        scaler = torch.amp.GradScaler("cuda" if self.cuda else "cpu", init_scale=256.0)
        read["losses"], read["steps"] = [], []
        tracing = self.spec["trace"] and self.cuda
        for step in range(self.spec["steps"]):
            if tracing and step == self.spec["steps"] - 1:
                torch.cuda.memory._record_memory_history(max_entries=200_000, context=None)
            batches = self.batches(step)
            self.read()
            if self.cuda:
                for card in self.cards:
                    torch.cuda.reset_peak_memory_stats(card)
            started = time.monotonic()
            loss = qlora.training_step(model, optimizer, batches, self.recipe, scaler)
            if self.ranks > 1:
                dist.all_reduce(loss)
            read["losses"].append(loss.item() / self.ranks)
            counters = self.read()
            tokens = batches[0]["input_ids"].numel() * len(batches) * self.ranks
            counters["tokens_per_second"] = tokens / (time.monotonic() - started)
            read["steps"].append(counters)
            del batches, loss
        if tracing:
            self.write_trace(torch.cuda.memory._snapshot()["device_traces"][self.device])
        if len(self.cards) > 1:
            read["device_map"] = self.map
        read["optimizer_states"] = len(optimizer.state)
        return read | read["steps"][-1]


def one_rank(spec: dict, part: Path) -> None:
    try:
        if spec["strategy"] == "kill":
            read = kill_one_rank(part.parent)
        elif spec["strategy"] == "launch":
            read = launch(spec, part.parent)
        else:
            read = Rank(spec).run()
    except Exception as error:
        read = {"error": f"{type(error).__name__}: {error}"[:600],
                "where": traceback.format_exc()[-1800:]}  # fmt: skip
    part.write_text(json.dumps(read))
    os._exit(0)  # the other rank may be waiting in a collective that will not come


# --- all rows ----------------------------------------------------------------------------------


# What a row's process is told, and no launcher that it starts.
OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SMOKE")


def free_port() -> str:
    """One that nobody listens on: rows run side by side."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


class Running:
    """The processes of a row."""

    def __init__(self, spec: dict, folder: Path):
        self.spec, self.started = spec, time.monotonic()
        port = free_port()
        self.parts = [
            folder / f"{abs(hash(spec['name']))}-{i}.json" for i in range(spec["processes"])
        ]
        self.processes = []
        for rank, part in enumerate(self.parts):
            around = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(len(self.parts)),
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "2",
            }  # fmt: skip
            command = [sys.executable, __file__, str(part), "--one", json.dumps(spec)]
            self.processes.append(subprocess.Popen(command, env=around, stderr=subprocess.DEVNULL))

    def done(self) -> dict | None:
        """The row with what its ranks read, once they have ended or time is up."""
        alive = any(p.poll() is None for p in self.processes)
        failed = any(p.is_file() and "error" in p.read_text()[:12] for p in self.parts)
        late = time.monotonic() - self.started > TIMEOUT
        if alive and not (failed or late):
            return None
        if alive and failed:
            time.sleep(3)  # the others' word, too
        for process in self.processes:
            if process.poll() is None:
                process.kill()
        read = [json.loads(p.read_text()) if p.is_file() else {"error": "no answer in time"}
                for p in self.parts]  # fmt: skip
        return self.spec | {"seconds": round(time.monotonic() - self.started, 1), "ranks": read}


def kill_one_rank(folder: Path) -> dict:
    """The course's script under FSDP2: one rank is killed in a save, both are started again."""
    out = folder / "killed"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
               "2", str(ROOT / "tools" / "train_many_gpus.py"), "--strategy", "fsdp2", "--model",
               "bundled", "--out", str(out), "--steps", "12", "--save-steps", "2"]  # fmt: skip
    for name in OF_A_RANK:
        os.environ.pop(name, None)
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    said, killed = [], None
    assert first.stdout is not None
    for line in first.stdout:
        said.append(line.rstrip())
        if line.startswith("step 5") and killed is None:
            children = subprocess.run(["pgrep", "-P", str(first.pid)], capture_output=True,
                                      text=True).stdout.split()  # fmt: skip
            killed = int(children[-1])
            os.kill(killed, signal.SIGKILL)
    first.wait()
    again = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)
    return {"before": said[-25:], "killed": killed,
                   "after": again.stdout.splitlines()[-25:], "rc": again.returncode,
                   "errors": again.stderr[-800:] if again.returncode else ""}  # fmt: skip


def launch(spec: dict, folder: Path) -> dict:
    """A file of configs/ as `accelerate launch` takes it, on the course's script; four steps."""
    recipe = spec["recipe"]
    options = ["--model", recipe["model"], "--steps", "4", "--out", str(folder / spec["name"])]
    options += ["--strategy", "fsdp2"] if "fsdp2" in spec["name"] else []
    options += ["--offload"] if spec["offload"] else []
    options += ["--embedding", "host"] if recipe.get("embedding") == "host" else []
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file",
               str(ROOT / "configs" / f"{spec['name']}.yaml"), "--main_process_port", free_port(),
               str(ROOT / "tools" / "train_many_gpus.py"), *options]  # fmt: skip
    around = {k: v for k, v in os.environ.items() if k not in OF_A_RANK} | {EMULATE_VARIABLE: "T4"}
    ran = subprocess.run(command, cwd=os.environ["WEIGHTS"], env=around, capture_output=True,
                         text=True, timeout=TIMEOUT - 5)  # fmt: skip
    return {"said": ran.stdout.splitlines()[-12:], "rc": ran.returncode,
            "errors": ran.stderr[-1500:] if ran.returncode else ""}  # fmt: skip


def write(path: Path, rows: list[dict]) -> None:
    from importlib import metadata

    import torch

    versions = {n: metadata.version(n) for n in
                ("torch", "transformers", "peft", "bitsandbytes", "accelerate")}  # fmt: skip
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    date = datetime.date.today().isoformat()
    about = {"gpu": gpu, "versions": versions, "protocol": __doc__, "date": date,
             "one_card": bool(os.environ.get("ONE_CARD"))}  # fmt: skip
    path.write_text(json.dumps(about | {"rows": rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these in it")
    parser.add_argument("--lanes", type=int, default=LANES)
    parser.add_argument("--one-card", action="store_true", help="DDP's ranks share a GPU")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        return one_rank(json.loads(options.one), options.out)
    if options.smoke:
        os.environ["SMOKE"] = "1"
    os.environ["TRACES"] = str(options.out.resolve().parent)
    end = time.monotonic() + 60 * options.minutes
    waiting = [r for r in ROWS if any(part in r["name"] for part in options.only or [""])]
    if options.one_card:
        os.environ["ONE_CARD"] = "1"
        waiting = [r for r in waiting if r["strategy"] == "ddp" and not r["alone"]]
    running: list[Running] = []
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["WEIGHTS"] = str(folder / "weights")  # of rows that read a checkpoint
        (folder / "weights").mkdir()
        while waiting or running:
            while waiting and time.monotonic() < end and (
                not running or (len(running) < options.lanes and not waiting[0]["alone"]
                                and not running[0].spec["alone"])
            ):  # fmt: skip
                spec = waiting.pop(0)
                running.append(Running(spec, folder))
            for one in list(running):
                found = one.done()
                if found is not None:
                    running.remove(one)
                    rows.append(found)
                    print(one.spec["name"], found["seconds"], [
                        r.get("peak_allocated_bytes", r.get("error", "ran")) for r in found["ranks"]
                    ], flush=True)  # fmt: skip
                    write(options.out, rows)
            if not running and time.monotonic() > end:
                break
            time.sleep(0.1)


if __name__ == "__main__":
    main()
