"""Several processes, one update: data-parallel training, small enough to read.

`launch` starts this file as a script, as torchrun does for any training script:

    torchrun --nproc-per-node 2 -m course_utils.topics.ranks JOB RESULT

Each process (rank) trains on its own share of the batch; DistributedDataParallel averages their
gradients. With a GPU for each rank they talk through NCCL, else they compute on the CPU and talk
through gloo; always over the loopback address, so that no network and no name server is needed.

Not modelled: several machines, sharded weights or optimizers (ZeRO, FSDP), a rank that fails.

Source: torch/nn/parallel/distributed.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from fitcast import gpus
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training.batching import labelled_tokens, split
from fitcast.training.gradients import in_float64
from fitcast.units import refusal

LOOPBACK = "127.0.0.1"
WEIGHINGS = ("tokens", "ranks")  # what counts the same: each token, or each rank's mean
Batch = dict[str, torch.Tensor]


def update(recipe: TrainRecipe, batch: Batch, weigh: str = "tokens", rank: int = 0) -> torch.Tensor:
    """How one optimizer step of `recipe` changes the weights, in float64, as one vector.

    In float64, so that what is left of a difference is no rounding error. When `recipe.world_size`
    is above 1, every rank has to call this at the same time.

    Args:
        recipe: Uses model, micro_batch_size, gradient_accumulation_steps, world_size, optimizer,
            learning_rate, weight_decay. All weights are trained.
        batch: The whole effective batch; each rank takes its share of the rows.
        weigh: "tokens" divides by the labelled tokens of all ranks; "ranks" by each rank's own, so
            that DDP's average is a mean of means.
        rank: Which process this is, from 0.

    Raises:
        ValueError: The batch is not an effective batch of this recipe, or no such weighing.
    """
    rows, world_size = len(batch["labels"]), recipe.world_size
    if rows != recipe.effective_batch_size:
        raise refusal(
            "batch",
            f"have {recipe.effective_batch_size} rows (micro batch x accumulation x world size)",
            rows,
            "cut it, or change the recipe",
        )
    if weigh not in WEIGHINGS:
        raise refusal("weigh", f"be one of {', '.join(WEIGHINGS)}", weigh, "pick one")
    device, share = batch["labels"].device, rows // world_size
    mine = {name: tensor[rank * share : (rank + 1) * share] for name, tensor in batch.items()}
    model = qlora.load_base(dataclasses.replace(recipe, base="float32", lora_rank=None))
    model = in_float64(model).to(device).train()
    before = _flat(model)
    optimizer = qlora.build_optimizer(model, recipe)
    ddp = DistributedDataParallel(model) if world_size > 1 else None
    num_items, factor = torch.tensor(labelled_tokens(mine), device=device), 1
    if ddp and weigh == "tokens":
        dist.all_reduce(num_items)  # now the sum over ranks
        factor = world_size  # DDP divides the summed gradients by it
    micro_batches = split(mine, recipe.micro_batch_size)
    for index, micro_batch in enumerate(micro_batches):
        last = index == len(micro_batches) - 1  # only then are gradients worth sending
        with ddp.no_sync() if ddp and not last else contextlib.nullcontext():
            loss = (ddp or model)(**micro_batch, num_items_in_batch=num_items).loss
            (factor * loss).backward()
    optimizer.step()
    return _flat(model) - before


def _flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().cpu().flatten() for p in model.parameters()])


def launch(recipe: TrainRecipe, batch: Batch, timeout_s: float = 120) -> dict[str, torch.Tensor]:
    """The same update by `recipe.world_size` processes under torchrun, for each weighing.

    Args:
        recipe: As for `update`.
        batch: As for `update`; handed over in a file. If it is on a GPU, each process takes one.
        timeout_s: After so many seconds every process is ended.

    Raises:
        ValueError: There are fewer GPUs than processes.
        TimeoutError: It took too long.
        RuntimeError: A process failed; the message is its last word.
    """
    on_gpus = batch["labels"].device.type != "cpu"
    if on_gpus and (n_gpus := torch.accelerator.device_count()) < recipe.world_size:
        raise refusal(
            "world_size",
            f"be at most {n_gpus}, the GPUs of this machine",
            recipe.world_size,
            "NCCL wants one each, a batch on the CPU wants none",
        )
    with tempfile.TemporaryDirectory() as folder:
        job, result = Path(folder, "job.pt"), Path(folder, "result.pt")
        torch.save(
            {
                "recipe": dataclasses.asdict(recipe),
                "batch": {name: tensor.cpu() for name, tensor in batch.items()},
            },
            job,
        )
        torchrun(
            ("-m", __name__, str(job), str(result)), recipe.world_size, timeout_s, on_gpus=on_gpus
        )
        return torch.load(result)


def torchrun(
    script: Sequence[str], processes: int, timeout_s: float = 120, *, on_gpus: bool = False,
    is_whole: Callable[[str], bool] = lambda said: False,
) -> str:  # fmt: skip
    """What the ranks of a script print, started by torchrun on this machine.

    Args:
        script: Its path, or `-m` and a module's name; then its arguments.
        processes: How many ranks.
        timeout_s: After so many seconds every process is ended.
        on_gpus: Whether they see the GPUs.
        is_whole: Whether what was printed is all that was asked for. Then it counts though a
            process died: one may while it takes its group down (seen once, on a busy machine).

    Raises:
        TimeoutError: It took too long.
        RuntimeError: A process failed; the message is its last word.
    """
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",  # what `torchrun` runs
        "--nproc-per-node",
        str(processes),
        "--local-addr",
        LOOPBACK,
        "--rdzv-backend",
        "c10d",
        "--rdzv-endpoint",
        f"{LOOPBACK}:0",  # any free port
        *script,
    ]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=_environment(on_gpus),
        start_new_session=True,
    ) as agent:
        try:
            said, errors = agent.communicate(timeout=timeout_s)
        except BaseException as reason:  # an interrupted cell must not leave ranks behind
            _end(agent)
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            raise TimeoutError(
                f"{processes} ranks did not finish in {timeout_s:g} s "
                "and were ended; give a larger timeout_s"
            ) from None
    if agent.returncode and not is_whole(said):
        raise RuntimeError(f"a rank failed: {_last_word(errors)}")
    return said


def place(batch: Batch, world_size: int) -> Batch:
    """The batch where so many ranks compute: on the GPUs if each can have one, else on the CPU."""
    device = gpus.device() if torch.accelerator.device_count() >= world_size else "cpu"
    return {name: tensor.to(device) for name, tensor in batch.items()}


def _end(agent: subprocess.Popen) -> None:
    """Ask torchrun to end its ranks, which live in sessions of their own, and itself."""
    agent.terminate()
    try:
        agent.communicate(timeout=20)
    except subprocess.TimeoutExpired:
        agent.kill()


def with_this_package() -> dict[str, str]:
    """The environment of another process that is to import this package, installed or not."""
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def _environment(on_gpus: bool) -> dict[str, str]:
    # ranks cannot share a GPU through NCCL
    added = {"OMP_NUM_THREADS": "1"} | ({} if on_gpus else {"CUDA_VISIBLE_DEVICES": ""})
    for name in ("lo", "lo0"):  # Linux, macOS: bind there, never ask for this machine's name
        if name in (interface for _, interface in socket.if_nameindex()):
            added |= {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": name}
    return with_this_package() | added


def _last_word(errors: str) -> str:
    """The first exception that a rank raised; the others then fail for want of a partner."""
    said = re.findall(r"^(?:\[rank\d+\]: ?)?((?:\w+\.)*\w*(?:Error|Exception)\b.*)", errors, re.M)
    return said[0] if said else errors.strip()[-300:] or "it said nothing"


def main(job: str, result: str) -> None:
    """One rank: read the job, train, and let rank 0 write what came out."""
    asked = torch.load(job)
    fields = asked["recipe"]
    recipe, rank = TrainRecipe(**fields), int(os.environ["LOCAL_RANK"])
    on_gpus = gpus.device() != "cpu"
    if on_gpus:
        torch.accelerator.set_device_index(rank)
    batch = {name: tensor.to(gpus.device()) for name, tensor in asked["batch"].items()}
    dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timedelta(seconds=60))
    try:
        updates = {weigh: update(recipe, batch, weigh, rank) for weigh in WEIGHINGS}
        if rank == 0:
            torch.save(updates, result)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
