"""Lesson 07's run on several GPUs: the same recipe, the same sequences behind each step.

    torchrun --nproc-per-node 2 tools/train_many_gpus.py --out run          # 2 x T4 on Kaggle
    accelerate launch --num_processes 2 tools/train_many_gpus.py --out run
    python tools/train_many_gpus.py --out run                               # one GPU, or none

Each process trains on its share; gradients are averaged over labelled tokens, so the adapters come
out as from one process, rounding aside. Without GPUs the processes talk through gloo on the CPU.
Checkpoints, resume and the Drive work as in the lesson; process 0 writes them.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

from course_utils.topics import sources
from fitcast import gpus
from fitcast.recipe import TrainRecipe
from fitcast.training import data, export, sharded, trainer


def lesson_recipe(source: sources.Source) -> TrainRecipe:
    """The recipe of lesson 07, for one process (a test holds the two together)."""
    usual: dict = {
        "model": source.model,
        "base": "nf4",
        "double_quant": True,
        "lora_rank": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "padded": True,
        "attention": "explicit_kv",
        "loss": "lean",
        "norm": "native",
        "adapters": "lean",
        "optimizer": "paged_adamw_8bit",
        "warmup_fraction": 0.05,
        "save_steps": 32,
        "seed": 1,
    }
    return TrainRecipe(**usual | source.settings)


def shared(recipe: TrainRecipe, world_size: int) -> TrainRecipe:
    """The recipe for `world_size` processes: the effective batch stays, accumulation shrinks.

    Raises:
        ValueError: Accumulation cannot be divided among so many processes.
    """
    steps = recipe.gradient_accumulation_steps
    if world_size < 1 or steps % world_size:
        possible = " or ".join(str(n) for n in range(1, steps + 1) if steps % n == 0)
        raise ValueError(
            f"world_size must divide gradient_accumulation_steps ({steps}), got "
            f"{world_size}; start {possible} processes, or halve "
            "micro_batch_size and double the accumulation"
        )
    return dataclasses.replace(
        recipe, world_size=world_size, gradient_accumulation_steps=steps // world_size
    )


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=sources.AUTO, help="as in the lesson's first cell")
    parser.add_argument("--data", default=sources.AUTO, help="likewise: a file, or a set's id")
    parser.add_argument("--out", type=Path, default=Path("run"), help="checkpoints and adapter")
    parser.add_argument("--drive", type=Path, help="a mounted folder for copies of checkpoints")
    parser.add_argument("--strategy", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--offload", action="store_true", help="fsdp2: parts wait on the host")
    parser.add_argument(
        "--embedding", choices=("stock", "host"), default="stock", help="host: not on the GPU"
    )
    parser.add_argument("--save-steps", type=int, help="optimizer steps between checkpoints")
    parser.add_argument("--steps", type=int, help="end after this optimizer step")
    return parser.parse_args()


def built(recipe: TrainRecipe, options: argparse.Namespace) -> torch.nn.Module:
    """The model, whole in each process or in parts."""
    if options.strategy == "fsdp2":
        return sharded.build_model(recipe, offload=options.offload)
    return trainer.build_model(recipe)


def asked(recipe: TrainRecipe, options: argparse.Namespace) -> TrainRecipe:
    """The lesson's recipe with what the command line changes."""
    changes: dict = {"optimizer": "adamw"} if options.strategy == "fsdp2" else {}
    changes["embedding"] = options.embedding
    if options.save_steps:
        changes["save_steps"] = options.save_steps
    return dataclasses.replace(recipe, **changes)


def main() -> None:
    options = arguments()
    world_size, rank, local_rank = (
        int(os.environ.get(name, default))
        for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    on_gpus = gpus.device() != "cpu"
    if on_gpus:
        torch.accelerator.set_device_index(local_rank)  # before anything lands on a GPU
    gpu = gpus.detect()
    source = sources.choose(gpu, options.model, options.data)
    recipe = asked(shared(lesson_recipe(source).for_gpu(gpu), world_size), options)
    tokenizer = source.tokenizer()
    rows = data.encode(source.conversations()[0], tokenizer, recipe.sequence_length)

    def say(row: dict) -> None:
        if rank == 0:
            print(
                f"step {row['step']}: loss {row['loss']:.4f}, "
                f"{world_size * row['tokens_per_second']:,.0f} tokens/s",
                flush=True,
            )

    if rank == 0:
        print(
            source,
            f"{world_size} x {recipe.micro_batch_size} x "
            f"{recipe.gradient_accumulation_steps} = {recipe.effective_batch_size} sequences of "
            f"at most {recipe.sequence_length} tokens a step",
            flush=True,
        )
    extra = {"ddp_find_unused_parameters": False} if world_size > 1 else {}
    if world_size > 1 and not on_gpus:
        extra |= {"use_cpu": True, "ddp_backend": "gloo"}
    model = built(recipe, options)
    trainer.train(
        recipe,
        model,
        rows,
        tokenizer,
        options.out,
        stop_at=options.steps,
        drive=options.drive,
        on_step=say,
        **extra,
    )
    if options.strategy == "fsdp2":
        sharded.save_adapter(model, options.out / "adapter")
    elif rank == 0:
        export.save_adapter(model, options.out / "adapter")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
