"""Race QLoRA steps of Llama-3.1-8B's shape: the usual recipe, TRL, Unsloth and this project's.

    python tools/race.py OUT.json [--rows 4x2048 padded ...] [--contenders ours unsloth ...]
                         [--minutes 8] [--repeats 3] [--peer-site FOLDER] [--smoke]
    python tools/race.py OUT.json --show [--record course_utils/data/recorded_runs.json]

One machine, one checkpoint (random weights at the real shape, nf4 with double quantization, r = 16
on q, k, v, o, PagedAdamW8bit, fp16), the same batches. Each contender is a process that loads its
model once and stays; they set up side by side, and then take turns: only one computes at a time.
Each repeat runs every contender, and begins with another one than the repeat before. Each turn
takes a step or two unseen, then times steps one by one, the GPU waited for; peaks are those of the
timed steps. Tokens are those that are no padding.

FlashAttention and cuDNN attention are off, as on a T4. Rows that say "limited" have a T4's memory.
Trainers run their own `train()`; Unsloth's model and ours run `fitcast`'s step (forward, backward,
unscale, clip, step). TRL turns the adapters of a 4-bit base to bfloat16, whose gradients the loss
scaler of fp16 refuses: they are float32 again here. A peer that is not installed leaves a row that
says so: peers are installed only where a race is run, Unsloth with its own versions of trl and
datasets in `--peer-site`.
The file is written after every turn. Not modelled: a T4's speed; it has none of Hopper's.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import gc
import itertools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")

GIB = 2**30
RECORDED = ROOT / "course_utils" / "data" / "recorded_runs.json"
T4_BYTES = int(14.42 * GIB)  # 14.56 that a program sees, less 141 MiB of CUDA's context
MODEL = "llama-3.1-8b"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
# row: sequences, tokens in the longest, whether padded, limited to a T4's memory, steps unseen and
# timed. "packed" rows are instructions end to end: full rows without a mask. Padded batches are of
# many lengths; compilers, ours and a peer's, write their kernels for any length at the second one.
ROWS: dict[str, dict[str, Any]] = {
    "4x2048": {"size": 4, "length": 2048, "unseen": 2, "timed": 3},
    "padded": {"size": 4, "length": 2048, "padded": True, "unseen": 3, "timed": 8},
    "packed": {"size": 4, "length": 2048, "packed": True, "unseen": 1, "timed": 3},
    "1x8192": {"size": 1, "length": 8192, "limited": True, "unseen": 1, "timed": 3},
    "1x32768": {"size": 1, "length": 32768, "limited": True, "unseen": 1, "timed": 1},
    "1x40960": {"size": 1, "length": 40960, "limited": True, "unseen": 1, "timed": 1},
    "2x2048": {"size": 2, "length": 2048, "unseen": 2, "timed": 4},
}
ROWS["4x2048 again"] = ROWS["4x2048"]  # on another host
START: dict[str, Any] = {"model": MODEL, "amp_dtype": "float16", "lora_dropout": 0.0}
PICKED = {"micro_batch_size": 2, "gradient_accumulation_steps": 2}  # the same sequences a step
LEVERS = {"attention": "explicit_kv", "loss": "lean", "norm": "native", "adapters": "lean",
          "rotary": "lean", "expandable_segments": True}  # fmt: skip
LEAN = LEVERS | {"mlp": "lean", "offload_checkpoints": 31}
# setting: changes of the recipe. Those that come first matter most; later ones are tried once.
PLAIN = {"adapters": "in_place", "loss": "fused", "flat_optimizer": True}
COMPILED = PLAIN | {"loss": "compiled", "mlp": "compiled", "rotary": "compiled"}
HOST = LEAN | COMPILED | {"embedding": "host"}
OURS: dict[str, dict[str, Any]] = {
    "lean, compiled": LEAN | COMPILED,
    "embedding on host": HOST,
    "embedding on host, 18 kept": HOST | {"keep_attention": 18},
    "embedding on host, kept": HOST | {"keep_attention": True},
    "compiled, on card": LEAN | COMPILED | {"offload_checkpoints": False},
    "compiled, 28 forget, kept": LEAN
    | COMPILED
    | {"checkpointed_layers": 28, "keep_attention": True, "offload_checkpoints": False},
    "lean, plain parts": LEAN | PLAIN,
    "levers": LEVERS,
    "lean": LEAN,
    "picked": LEAN
    | PICKED
    | {"keep_attention": True, "offload_checkpoints": False}
    | {"checkpointed_layers": 17},
}
FEW = ("lean, compiled", "embedding on host, 18 kept")
TILED = LEAN | PLAIN | {"embedding": "host", "mlp_tile_tokens": 8192}
LONG = {
    "tiled": TILED,
    "tiled, compiled": HOST | {"mlp_tile_tokens": 8192},
    "tiled, compiled, 10 kept": HOST | {"mlp_tile_tokens": 8192, "keep_attention": 10},
}
BY_ROW = {"1x8192": {name: OURS[name] for name in ("lean, compiled", "compiled, on card", "lean")},
          "4x2048": OURS, "4x2048 again": OURS, "1x32768": LONG, "1x40960": LONG}  # fmt: skip
REPEATED = ("4x2048", "4x2048 again", "2x2048")  # for the other rows, name them several times
FIT = "fit's pick"
picks: dict[str, dict[str, Any]] = {}  # row -> what `fit` picks for it, from --picks
wanted: list[str] = []  # of ours, from --settings; none: all


def settings(contender: str, row: str) -> dict[str, dict[str, Any]]:
    """What a contender runs in a row: name -> changes of its recipe."""
    if contender != "ours":
        return {"": {}}
    own = BY_ROW.get(row, {name: OURS[name] for name in FEW})
    every = {FIT: picks[row]} | own if row in picks else own
    return {name: own for name, own in every.items() if name in (wanted or every)}


def recipe_fields(row: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Fields of ours' recipe in a row; a padded one's padding is all behind."""
    padded = bool(row.get("padded"))
    own = {"sequence_length": row["length"], "micro_batch_size": row["size"], "padded": padded}
    return START | own | {"causal_padding": padded} | changes


def rate_here(pipe: Any) -> None:
    """In a process of its own: seconds of an operation, as `fit` measures them on this machine."""
    from fitcast.forecasting import launches

    pipe.send({"launch_seconds": launches.measured_seconds()})


def pick_here(row: str, launch_seconds: float, pipe: Any) -> None:
    """In a process of its own: what `fit` picks with this machine's rate."""
    pipe.send({"pick": pick(row, launch_seconds)})


def pick(row: str, launch_seconds: float | None = None) -> dict[str, Any]:
    """What `fit` changes of a row's recipe for the race's own card: an H200 with a T4's memory.

    Args:
        row: Of `ROWS`.
        launch_seconds: What an operation costs the race's host; by default what `fit` knows.
    """
    import dataclasses
    from unittest import mock

    from fitcast import gpus
    from fitcast.forecasting import launches, search
    from fitcast.recipe import TrainRecipe

    memory = {"total_bytes": gpus.T4.total_bytes, "context_bytes": gpus.T4.context_bytes}
    card = dataclasses.replace(gpus.H200, flash_attention=False, **memory)
    start = TrainRecipe(**recipe_fields(ROWS[row], {}))
    seconds = launch_seconds or launches.RECORDED_SECONDS
    rate = launches.LaunchRate(seconds, "as the race was told")
    with mock.patch.object(search, "launch_rate", return_value=rate):
        best = search.fit(start, card)
        print(f"{row}: {best.launch_basis}, {best.tokens_per_second} tokens/s", flush=True)
    before, after = dataclasses.asdict(start), dataclasses.asdict(best.recipe)
    return {name: value for name, value in after.items() if value != before[name]}


def batches(row: dict[str, Any], vocab_size: int) -> list[dict[str, Any]]:
    """The batches of a row's steps, on the CPU: input_ids, labels and, if padded, attention_mask.

    Lengths of padded rows are those of the bundled instructions, scaled to the longest allowed;
    a batch is as long as its longest. The longest batch is the first, as in lesson 07: what has to
    grow to it does so unseen. All are (sequences, tokens), int64.
    """
    import torch

    random = torch.Generator().manual_seed(0)
    size, longest, made = row["size"], row["length"], []
    lengths = iter(itertools.cycle(_lengths(longest)))
    for _ in range(row["unseen"] + row["timed"]):
        own = [next(lengths) for _ in range(size)] if row.get("padded") else [longest] * size
        shape = (size, max(own))
        ids = torch.randint(10, vocab_size - 10, shape, generator=random)
        batch = {"input_ids": ids, "labels": ids.clone()}
        if row.get("padded"):
            mask = torch.arange(shape[1])[None] < torch.tensor(own)[:, None]
            batch |= {"attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}
        if row.get("packed"):  # two thirds are prompts, which have no label
            batch["labels"][:, ::3] = -100
            batch["labels"][:, 1::3] = -100
        made.append(batch)
    first = max(made, key=lambda batch: batch["input_ids"].shape[1])
    return [first, *(batch for batch in made if batch is not first)]


def _lengths(longest: int) -> list[int]:
    """Lengths of the bundled instructions, the longest of them being `longest` tokens."""
    import random

    text = (ROOT / "course_utils" / "data" / "instructions.jsonl").read_text("utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    sizes = [len(row["prompt"]) + len(row["answer"]) for row in rows]
    random.Random(0).shuffle(sizes)
    return [max(16, longest * size // max(sizes)) for size in sizes]


def tokens_of(batch: dict[str, Any]) -> int:
    """Tokens of a batch that are no padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())


class Clock:
    """Seconds of the steps after the unseen ones, and the peaks of those."""

    def __init__(self, row: dict[str, Any]):
        self.unseen, self.wanted = row["unseen"], row["unseen"] + row["timed"]
        self.seconds: list[float] = []
        self._steps, self._start = 0, 0.0

    def begin(self) -> None:
        import torch

        torch.cuda.synchronize()
        if self._steps == self.unseen:
            torch.cuda.reset_peak_memory_stats()
        self._start = time.perf_counter()

    def end(self) -> None:
        import torch

        torch.cuda.synchronize()
        if self._steps >= self.unseen:
            self.seconds.append(time.perf_counter() - self._start)
        self._steps += 1


class Contender:
    """A model that is loaded once, and takes turns."""

    model: Any

    def __init__(self, checkpoint: str):
        raise NotImplementedError

    def turn(
        self, row: dict[str, Any], changes: dict[str, Any], data: list[Any], clock: Clock
    ) -> dict[str, Any]:
        """Steps of a row between `clock.begin` and `clock.end`; what else is worth recording."""
        raise NotImplementedError


def quantized(checkpoint: str) -> Any:
    """The checkpoint in nf4 with double quantization, as transformers loads it."""
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float16, device_map={"": 0}, use_safetensors=True,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float16,
        ),
    )  # fmt: skip
    model.config.use_cache = False
    return model


class Usual(Contender):
    """`transformers.Trainer` with PEFT and gradient checkpointing, as most scripts have it."""

    def __init__(self, checkpoint: str):
        from peft import LoraConfig, get_peft_model

        model = quantized(checkpoint)
        model.enable_input_require_grads()
        self.lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules=TARGETS,
                               task_type="CAUSAL_LM")  # fmt: skip
        self.model = get_peft_model(model, self.lora)
        self.kept = own_forwards(self.model)

    def arguments(self, row: dict[str, Any], folder: str) -> dict[str, Any]:
        return dict(
            output_dir=folder, per_device_train_batch_size=row["size"], fp16=True,
            max_steps=row["unseen"] + row["timed"], gradient_checkpointing=True, report_to="none",
            optim="paged_adamw_8bit", save_strategy="no", logging_strategy="no", disable_tqdm=True,
            remove_unused_columns=False,
        )  # fmt: skip

    def turn(self, row, changes, data, clock):
        from transformers import Trainer, TrainingArguments

        with tempfile.TemporaryDirectory() as folder:
            arguments = TrainingArguments(**self.arguments(row, folder))
            rows, collate = as_rows(data)
            trainer = Trainer(self.model, arguments, train_dataset=rows, data_collator=collate,
                              callbacks=[on_the_clock(clock)])  # fmt: skip
            self.train(trainer, rows)
        return {}

    def train(self, trainer: Any, rows: Any) -> None:
        import torch
        from torch.utils.data import SequentialSampler

        trainer._get_train_sampler = lambda *_, **__: SequentialSampler(rows)
        trainer.accelerator.scaler = torch.amp.GradScaler("cuda", init_scale=256.0)  # skips none
        trainer.train()
        restore_forwards(self.model, self.kept)


class Sft(Usual):
    """TRL's SFTTrainer, with the same arguments."""

    def turn(self, row, changes, data, clock):
        import torch
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        from fitcast.forecasting.stage import tokenizer

        with tempfile.TemporaryDirectory() as folder:
            arguments = SFTConfig(
                **self.arguments(row, folder), bf16=False, max_length=row["length"],
                dataset_kwargs={"skip_prepare_dataset": True},
            )  # fmt: skip
            # its own collator gives full batches a mask, too
            masked = [{"attention_mask": torch.ones_like(b["input_ids"])} | b for b in data]
            rows, collate = as_rows(masked)
            rows = Dataset.from_list(rows)
            trainer = SFTTrainer(
                self.model, arguments, train_dataset=rows, processing_class=tokenizer(),
                data_collator=collate, callbacks=[on_the_clock(clock)],
            )  # fmt: skip
            for parameter in self.model.parameters():  # bfloat16 by TRL, which a scaler refuses
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
            self.train(trainer, rows)
        return {}


def as_rows(data: list[dict[str, Any]]) -> tuple[list[dict], Callable[[list[dict]], dict]]:
    """Batches as a data set of sequences, and the collator that gives the batches back."""
    size = len(data[0]["input_ids"])
    rows = [{"index": i} for i in range(1000 * size)]

    def collate(found: list[dict]) -> dict[str, Any]:
        return dict(data[found[0]["index"] // size % len(data)])

    return rows, collate


def on_the_clock(clock: Clock) -> Any:
    from transformers import TrainerCallback

    class Times(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            clock.begin()

        def on_step_end(self, args, state, control, **kwargs):
            clock.end()

    return Times()


class Unsloth(Contender):
    """Unsloth's model with its own kernels and checkpointing, stepped by our loop."""

    def __init__(self, checkpoint: str):
        import torch
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            checkpoint, max_seq_length=40960, dtype=torch.float16, load_in_4bit=True,
            use_exact_model_name=True, local_files_only=True,
        )  # fmt: skip
        self.model = FastLanguageModel.get_peft_model(
            model, r=16, target_modules=TARGETS, lora_alpha=32, lora_dropout=0, bias="none",
            use_gradient_checkpointing="unsloth", random_state=0, max_seq_length=40960,
        )  # fmt: skip

    def turn(self, row, changes, data, clock):
        import torch

        from fitcast.recipe import TrainRecipe
        from fitcast.step import qlora

        self.model.train()
        recipe = TrainRecipe(model=MODEL, amp_dtype="float16")  # loss "full": the model's own
        with on_device(data) as ready:
            steps(self.model, recipe, [[batch] for batch in ready], clock, qlora, torch)
        return {}


class Ours(Contender):
    """Levers of `fitcast` on transformers' own model."""

    def __init__(self, checkpoint: str):
        from fitcast.recipe import TrainRecipe
        from fitcast.step import qlora

        self.recipe = TrainRecipe(**START)
        self.model = qlora.add_adapters(
            qlora.prepare_base(quantized(checkpoint), self.recipe), self.recipe
        )
        self.kept = own_forwards(self.model)

    def turn(self, row, changes, data, clock):
        import torch

        from fitcast import gpus
        from fitcast.recipe import TrainRecipe
        from fitcast.step import qlora

        most = len(self.model.base_model.model.model.layers)
        recipe = TrainRecipe(**fewer_layers(recipe_fields(row, changes), most))
        micro = recipe.micro_batch_size
        gpus.use_expandable_segments(recipe.expandable_segments)
        try:
            qlora.apply_levers(self.model, recipe).train()
            with on_device(data) as ready:
                cut = [
                    [{k: v[i : i + micro] for k, v in batch.items()} for i in starts(batch, micro)]
                    for batch in ready
                ]
                steps(self.model, recipe, cut, clock, qlora, torch)
        finally:
            restore_forwards(self.model, self.kept)
            embedding_back(self.model.get_input_embeddings())
            mask_back(self.model.base_model.model.model)
        return {"recipe": changes}


def fewer_layers(fields: dict[str, Any], layers: int) -> dict[str, Any]:
    """The same for a model cut short, to try the race itself: no lever has more than its layers."""
    if layers > 31:
        return fields
    most = {"checkpointed_layers": layers, "offload_checkpoints": layers - 1,
            "keep_attention": layers}  # fmt: skip
    return {k: min(v, most[k]) if k in most and type(v) is int else v for k, v in fields.items()}


def starts(batch: dict[str, Any], micro: int) -> range:
    return range(0, len(batch["input_ids"]), micro)


@contextlib.contextmanager
def on_device(data: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    yield [{name: t.cuda() for name, t in batch.items()} for batch in data]


def steps(
    model: Any, recipe: Any, data: list[list[dict]], clock: Clock, qlora: Any, torch: Any
) -> None:
    """Optimizer steps over batches, each a list of micro batches."""
    scaler: Any = torch.amp.GradScaler("cuda", init_scale=256.0)
    optimizer = qlora.build_optimizer(model, recipe)
    for i in range(clock.wanted):
        clock.begin()
        loss = qlora.training_step(model, optimizer, data[i], recipe, scaler)
        clock.end()
    if not torch.isfinite(loss):
        raise ValueError(f"loss must be finite, got {float(loss)}; the run is not a training run")


def own_forwards(model: Any) -> dict[int, Any]:
    """The forward methods that single modules have, by module: those of hooks."""
    return {id(m): vars(m)["forward"] for m in model.modules() if "forward" in vars(m)}


def restore_forwards(model: Any, kept: dict[int, Any]) -> None:
    """Take back what levers and trainers put there."""
    for module in model.modules():
        if id(module) in kept:
            module.forward = kept[id(module)]
        else:
            vars(module).pop("forward", None)


def embedding_back(embedding: Any) -> None:
    """On the GPU again, after a setting that keeps it on the host."""
    import torch

    if (device := vars(embedding).pop("device_of_rows", None)) is not None:
        vars(embedding).pop("_apply")
        embedding.weight = torch.nn.Parameter(embedding.weight.to(device), requires_grad=False)


def mask_back(trunk: Any) -> None:
    """Read again, after a setting that forgets it."""
    if hasattr(trunk, "_causal_padding"):
        trunk._causal_padding.remove()


KINDS: dict[str, type[Contender]] = {"unsloth": Unsloth, "ours": Ours, "usual": Usual, "trl": Sft}


def contender(kind: str, checkpoint: str, peer_site: str | None, pipe: Any) -> None:
    """A process: loads its model, says so, and runs what it is told."""
    if kind == "unsloth" and peer_site:
        sys.path.insert(0, peer_site)
    try:
        if kind == "unsloth":
            import unsloth  # noqa: F401  (before torch, as it asks for)
        import torch

        for switch in (torch.backends.cuda.enable_flash_sdp, torch.backends.cuda.enable_cudnn_sdp):
            switch(False)
        start = time.monotonic()
        racer = KINDS[kind](checkpoint)
        resident = torch.cuda.memory_allocated()
        first = warm_up(racer, kind)
        pipe.send(
            {
                "ready": round(time.monotonic() - start, 1),
                "resident_bytes": resident,
                "first_step": first.get("error", first.get("seconds")),
                "versions": versions(),
            }
        )
    except BaseException as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"[:500],
                   "where": traceback.format_exc()[-1500:]})  # fmt: skip
        return
    while (told := pipe.recv()) is not None:
        pipe.send(host() if told == "host" else take_turn(racer, *told))


def warm_up(racer: Any, kind: str) -> dict[str, Any]:
    """A first step of full rows, while others set up: what compiles does so here."""
    most = list(settings(kind, "4x2048").values())[0]
    return take_turn(racer, ROWS["4x2048"] | {"unseen": 0, "timed": 1}, most)


def take_turn(racer: Any, row: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """One turn: seconds of each timed step, tokens, bytes; or why there is none."""
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    limited = T4_BYTES if row.get("limited") else total
    torch.cuda.set_per_process_memory_fraction(limited / total)
    data, clock = batches(row, 128256), Clock(row)
    found: dict[str, Any] = {}
    try:
        found = racer.turn(row, changes, data, clock)
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:300],
                 "where": traceback.format_exc()[-1200:]}  # fmt: skip
    done = range(clock.unseen, clock.unseen + len(clock.seconds))
    found |= {
        "seconds": [round(s, 4) for s in clock.seconds],
        "tokens": [tokens_of(data[i]) for i in done],
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
    }
    for parameter in racer.model.parameters():
        parameter.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    return found


def launch_microseconds(count: int = 20000) -> float:
    """What Python needs to launch one operation: many tiny ones, the GPU not waited for."""
    import torch

    x = torch.zeros(8, device="cuda")
    rates = []
    for _ in range(3):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            x.add_(1.0)
        rates.append((time.perf_counter() - start) / count * 1e6)
        torch.cuda.synchronize()
    return statistics.median(rates)


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    names = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "trl", "unsloth",
             "unsloth_zoo", "triton", "datasets")  # fmt: skip
    found = {"python": sys.version.split()[0]}
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"


def host() -> dict[str, Any]:
    """What the machine is, asked while everybody else waits."""
    import torch

    return {
        "gpu": torch.cuda.get_device_name(0),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "launch_microseconds": round(launch_microseconds(), 2),
    }


def write_checkpoint(folder: str, layers: int | None) -> str:
    """Random weights at the real shape, with a tokenizer of as many words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    from fitcast import models
    from fitcast.training import random_weights

    config = models.config(MODEL)
    if layers:
        config.num_hidden_layers = layers
    config.save_pretrained(f"{folder}/shape")
    path = random_weights.write(f"{folder}/shape", folder)
    words = {f"word{i}": i for i in range(config.vocab_size - 3)}
    for name in ("<s>", "</s>", "<pad>"):
        words[name] = len(words)
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<s>")),
        bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<s>",
    ).save_pretrained(path)  # fmt: skip
    return str(path)


def ask(pipe: Any, process: Any, deadline: float) -> dict[str, Any]:
    """An answer of a contender, or that it gave none."""
    while not pipe.poll(0.2):
        if not process.is_alive() and not pipe.poll(0.2):
            return {"error": f"the process ended with {process.exitcode}"}
        if time.monotonic() > deadline:
            process.kill()
            return {"error": "no time left"}
    try:
        return pipe.recv()
    except EOFError:
        process.join(5)
        return {"error": f"the process ended with {process.exitcode}"}


def order(contenders: list[str], repeat: int) -> list[str]:
    """Each repeat begins with another contender."""
    shift = repeat % len(contenders)
    return contenders[shift:] + contenders[:shift]


class Race:
    """The contenders' processes and the record of what they did."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.start = time.monotonic()
        self.end = self.start + 60 * options.minutes
        self.record: dict[str, Any] = {
            "date": datetime.date.today().isoformat(), "protocol": __doc__, "turns": []
        }  # fmt: skip
        self.pipes: dict[str, Any] = {}

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.start:5.0f} s  {text}", flush=True)

    def set_up(self, folder: str) -> None:
        """The checkpoint, and each contender's model, side by side."""
        context = multiprocessing.get_context("spawn")
        checkpoint = write_checkpoint(folder, self.options.layers)
        rate = self.told(context, rate_here) if self.options.fit_here else None
        self.record["picks"] = rate or {}
        self.say(f"the checkpoint is written; {rate}")
        for kind in self.options.contenders:
            near, far = context.Pipe()
            site = self.options.peer_site
            process = context.Process(
                target=contender, args=(kind, checkpoint, site, far), daemon=True
            )
            process.start()
            self.pipes[kind] = (near, process)
        self.record["contenders"] = {}
        if rate and "launch_seconds" in rate:  # while the others load
            self.fit_here(context, rate["launch_seconds"])
        for kind, (pipe, process) in list(self.pipes.items()):
            said = ask(pipe, process, self.end)
            self.record["contenders"][kind] = said
            self.say(f"{kind}: {said.get('error', 'ready')} {said.get('where', '')}")
            if "error" in said:
                del self.pipes[kind]
        self.record["host"] = {}
        self.write()

    def ask_host(self) -> None:
        """The machine's own numbers, once nobody races any more."""
        for pipe, process in list(self.pipes.values())[-1:]:  # Unsloth changes what Python does
            pipe.send("host")
            self.record["host"] = ask(pipe, process, time.monotonic() + 20)
        self.say(f"{self.record['host']}")
        self.write()

    def told(self, context: Any, target: Callable, *arguments: Any) -> dict[str, Any]:
        """What a process of its own answers."""
        near, far = context.Pipe()
        process = context.Process(target=target, args=(*arguments, far), daemon=True)
        process.start()
        return ask(near, process, self.end)

    def fit_here(self, context: Any, launch_seconds: float) -> None:
        """Ask `fit` on this machine for what it picks, row by row."""
        for row in dict.fromkeys(self.options.rows):
            said = self.told(context, pick_here, row, launch_seconds)
            self.record["picks"][row] = said
            self.say(f"fit, {row}: {said}")
            if "pick" in said:
                picks[row] = said["pick"]

    def run(self) -> None:
        """Every row: each contender's settings, then the repeats of the row."""
        running = [kind for kind in self.options.contenders if kind in self.pipes]
        for row in self.options.rows:
            for repeat in range(self.options.repeats if row in REPEATED else 1):
                for kind in order(running, repeat) if running else ():
                    for name in settings(kind, row):
                        if repeat and name in self.dropped(row):
                            continue
                        self.turn(row, repeat, kind, name)

    def turn(self, row: str, repeat: int, kind: str, name: str) -> None:
        pipe, process = self.pipes.get(kind, (None, None))
        if pipe is None or time.monotonic() > self.end:
            return
        spec, changes = dict(ROWS[row]), settings(kind, row)[name]
        if kind in ("usual", "trl") and not spec.get("padded"):  # their steps take long
            spec |= {"unseen": 1, "timed": 2}
        if self.options.smoke:
            spec |= {"unseen": 1, "timed": 1}
        try:
            pipe.send((spec, changes))
            found = ask(pipe, process, self.end)
        except OSError as error:
            process.join(5)
            found = {"error": f"the process is gone: {error}"}
        if not process.is_alive():
            del self.pipes[kind]
        turn = {"row": row, "repeat": repeat, "contender": kind, "setting": name,
                "at": round(time.monotonic() - self.start)} | found  # fmt: skip
        self.record["turns"].append(turn)
        self.write()
        self.say(f"{row} #{repeat} {kind} {name}: {one_line(turn)}")

    def dismiss(self) -> None:
        """Let every process end that still listens."""
        for pipe, process in self.pipes.values():
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10)
            process.kill()

    def dropped(self, row: str) -> set[str]:
        """Settings of ours that another one beats in both speed and bytes: tried once."""
        turns = [t for t in self.record["turns"] if t["row"] == row and t["repeat"] == 0]
        ours = [(t["setting"], speed(t), t["peak_allocated_bytes"])
                for t in turns if t["contender"] == "ours" and speed(t)]  # fmt: skip
        beaten = {
            a for a, v, b in ours for _, w, c in ours if w > v * 1.01 and c <= b or w >= v and c < b
        }
        failed = {t["setting"] for t in turns if t["contender"] == "ours" and not speed(t)}
        return (beaten | failed) - set(list(OURS)[:2])

    def write(self) -> None:
        self.options.out.write_text(json.dumps(self.record, indent=1), encoding="utf-8")


def speed(turn: dict[str, Any]) -> float | None:
    """Tokens a second of a turn; `None` without a timed step, or if the turn failed."""
    if "error" in turn or not turn.get("seconds"):
        return None
    return sum(turn["tokens"]) / sum(turn["seconds"])


def one_line(turn: dict[str, Any]) -> str:
    if (fast := speed(turn)) is None:
        return turn.get("error", "no step") + " " + turn.get("where", "")[-600:]
    peak, reserved = (turn[f"peak_{name}_bytes"] / GIB for name in ("allocated", "reserved"))
    return f"{fast:7.0f} tokens/s, {peak:5.2f} GiB, {reserved:5.2f} reserved"


def table(record: dict[str, Any]) -> list[dict[str, Any]]:
    """A line for each row, contender and setting: min, median and max of its turns' speeds."""
    lines: dict[tuple, list[dict]] = {}
    for turn in record["turns"]:
        key = (turn["row"], turn["contender"], turn["setting"])
        lines.setdefault(key, []).append(turn)
    found = []
    for (row, kind, name), turns in lines.items():
        good = [t for t in turns if speed(t)]
        speeds = sorted(speed(t) or 0 for t in good)
        found.append({
            "row": row, "contender": kind, "setting": name, "repeats": len(good),
            "tokens_per_second": [round(f(speeds)) for f in (min, statistics.median, max)]
            if good else None,
            "peak_allocated_bytes": max((t["peak_allocated_bytes"] for t in good), default=None),
            "peak_reserved_bytes": max((t["peak_reserved_bytes"] for t in good), default=None),
            "recipe": turns[0].get("recipe"),
            "error": None if good else turns[-1].get("error"),
        })  # fmt: skip
    return found


def show(record: dict[str, Any]) -> str:
    """The race as a table, speeds beside Unsloth's and the usual recipe's of the same row."""
    machine = record["host"]
    lines = [f"{machine.get('gpu')}, {machine.get('cpu')}, "
             f"{machine.get('launch_microseconds')} us a launch, {record['date']}",
             f"{'row':9}{'who':30}{'tokens/s (min-max)':>24}{'GiB':>8}"
             f"{'x Unsloth':>11}{'x usual':>9}"]  # fmt: skip
    rows = table(record)
    medians = {(r["row"], r["contender"]): r["tokens_per_second"][1]
               for r in rows if r["tokens_per_second"]}  # fmt: skip
    for r in rows:
        who = f"{r['contender']} {r['setting']}"
        if not r["tokens_per_second"]:
            lines.append(f"{r['row']:9}{who:30} {str(r['error'])[:70]}")
            continue
        low, middle, high = r["tokens_per_second"]
        peak = f"{r['peak_allocated_bytes'] / GIB:8.2f}"
        ratios = "".join(
            f"{middle / medians[r['row'], kind]:{width}.2f}" if (r["row"], kind) in medians
            else " " * (width - 1) + "-" for kind, width in (("unsloth", 11), ("usual", 9))
        )  # fmt: skip
        lines.append(f"{r['row']:9}{who:30}{f'{middle} ({low}-{high})':>24}{peak}{ratios}")
    return "\n".join(lines)


def rows_to_record(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The race as rows of recorded_runs.json, each with its machine and when its turns were."""
    turns = record["turns"]
    found = []
    for line in table(record):
        where = (line["row"], line["contender"], line["setting"])
        versions = _versions_of(record, line["contender"])
        own = [t for t in turns if (t["row"], t["contender"], t["setting"]) == where]
        found.append(
            {
                "group": "race",
                "name": ", ".join(filter(None, where)),
                "limited": bool(ROWS[line["row"]].get("limited")),
                "outcome": "trained" if line["repeats"] else str(line["error"]),
                "started_at_seconds": [turn["at"] for turn in own],
                "step_seconds": [turn.get("seconds") for turn in own],
                "settings": line["recipe"]
                or settings(line["contender"], line["row"]).get(line["setting"]),
                **{k: v for k, v in line.items() if k not in ("row", "setting", "error", "recipe")},
                **{k: record["host"].get(k) for k in ("gpu", "cpu", "cpus", "launch_microseconds")},
                "emulated": "T4",
                "versions": versions,
                "date": record["date"],
            }
        )
    return found


# What earlier races called their settings' parts, which were no fields of a recipe then.
OLD_PARTS = {"in place": {"adapters": "in_place"}, "loss": {"loss": "fused"},
             "flat": {"flat_optimizer": True}, "keep 18": {"keep_attention": 18}, "causal": {},
             "compiled": {"loss": "compiled", "mlp": "compiled", "rotary": "compiled"}}  # fmt: skip


def recipe_on_record(line: dict[str, Any]) -> Any:
    """The recipe of a recorded row of ours; a padded one is as long as its longest timed batch."""
    from fitcast.recipe import TrainRecipe

    name = line["name"].split(",")[0]
    row, changes = ROWS[name], dict(line["settings"])
    for part in changes.pop("parts", ()):
        changes |= OLD_PARTS[part]
    if row.get("padded"):
        timed = range(row["unseen"], row["unseen"] + row["timed"])
        made = batches(row, 1000)
        row = row | {"length": max(made[i]["input_ids"].shape[1] for i in timed)}
    return TrainRecipe(**recipe_fields(row, changes))


def _versions_of(record: dict[str, Any], kind: str) -> dict[str, str]:
    """Of a contender, or of any other one where it did not come so far."""
    said = [record["contenders"].get(kind, {}), *record["contenders"].values()]
    return next((one["versions"] for one in said if "versions" in one), {})


def put_on_record(record: dict[str, Any], path: Path) -> None:
    """Write a race's rows in the place of those that earlier races have of the same kind.

    Of a contender that did not race this time its word that memory did not do is kept: no speed is
    compared with it.
    """
    recorded, found = json.loads(path.read_text("utf-8")), rows_to_record(record)
    raced = {row["name"].split(",")[0] for row in found}
    racers = {row["contender"] for row in found}
    kept = [
        row
        for row in recorded["rows"]
        if row["group"] != "race"
        or row["name"].split(",")[0] not in raced
        or (row["contender"] not in racers and "OutOfMemory" in row["outcome"])
    ]
    recorded["rows"] = kept + found
    path.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["4x2048", "padded", "packed"])
    parser.add_argument("--contenders", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--settings", nargs="+", default=[], help="of ours, only these")
    parser.add_argument("--layers", type=int, help="fewer layers than 32, to try the race itself")
    parser.add_argument("--peer-site", help="folder of packages for Unsloth alone")
    parser.add_argument("--picks", type=Path, help="what fit picks for rows: ours runs that, too")
    parser.add_argument("--fit-here", action="store_true", help="fit picks on this machine")
    parser.add_argument("--write-picks", action="store_true", help="ask fit, no GPU; into OUT")
    parser.add_argument("--launch-microseconds", type=float, help="of the race's host, for fit")
    parser.add_argument("--smoke", action="store_true", help="4 layers, one step of each")
    parser.add_argument("--show", action="store_true", help="print the table of OUT and stop")
    parser.add_argument("--record", type=Path, help="put OUT into this recorded_runs.json and stop")
    options = parser.parse_args()
    if options.write_picks:
        seconds = options.launch_microseconds and options.launch_microseconds / 1e6
        found = {row: pick(row, seconds) for row in options.rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return
    wanted.extend(options.settings)
    if options.picks:
        picks.update(json.loads(options.picks.read_text("utf-8")))
    if options.show or options.record:
        record = json.loads(options.out.read_text("utf-8"))
        print(show(record))
        if options.record:
            put_on_record(record, options.record)
        return
    if options.smoke:
        options.layers, options.repeats = options.layers or 4, 1
    race = Race(options)
    with tempfile.TemporaryDirectory() as folder:
        race.set_up(folder)
        race.run()
        race.ask_host()
        race.dismiss()
    print(show(race.record))


if __name__ == "__main__":
    main()
