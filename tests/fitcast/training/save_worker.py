"""One of several processes that train and save together, and fail to in turn.

torchrun --nproc-per-node 2 tests/fitcast/training/save_worker.py FOLDER
"""

import dataclasses
import errno
import os
import sys
from pathlib import Path

import torch
from transformers import Trainer

from fitcast import gpus
from fitcast.training import trainer as training
from tests.tiny import ROWS, TOKENIZER, tiny_recipe

FAILS = {1: 1, 2: 0}  # at this step the disk of this process is full


def main(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    on_gpus = gpus.device() != "cpu"
    if on_gpus:
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    write = Trainer._save_rng_state  # what every process writes

    def full_disk(trainer, output_dir):
        if FAILS.get(trainer.state.global_step) == rank:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(trainer, output_dir)

    Trainer._save_rng_state = full_disk
    recipe = dataclasses.replace(
        tiny_recipe(folder / "model"),
        world_size=2,
        max_steps=3,
        save_steps=1,
        gradient_accumulation_steps=1,
    )
    extra = {} if on_gpus else {"use_cpu": True, "ddp_backend": "gloo"}
    run = training.train(
        recipe.for_gpu(gpus.detect()),
        training.build_model(recipe),
        ROWS,
        TOKENIZER,
        folder / "run",
        ddp_find_unused_parameters=False,
        **extra,
    )
    sys.stdout.write(f"rank {rank} took {len(run.steps)} steps\n")  # one write: print makes two
    sys.stdout.flush()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
