"""What several cards in one machine change before a run: who uses them, by what, from how much RAM.

Not modelled: several machines; the bus between the cards.

Sources: transformers/trainer.py (`_wrap_model`: `nn.DataParallel` where it sees more than one card
and no launcher has started it, unless `is_loaded_in_4bit` or 8) and training_args.py
(`train_batch_size` counts them all the same); trl/trainer/sft_trainer.py (refuses); accelerate,
`cpu_ram_efficient_loading`: rank 0 reads the checkpoint, the other ranks wait with empty tensors.
"""

from __future__ import annotations

import os

from fitcast import gpus
from fitcast.training import host
from fitcast.training.versions import Finding
from fitcast.units import show_bytes

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE")  # set by torchrun and accelerate for each process


def together() -> list[Finding]:
    """The cards by name, what one process of Trainer does with them, NCCL; of one card nothing."""
    seen = gpus.cards()
    if len(seen) < 2:
        return []
    return [_trainer(seen), _nccl()]


def _trainer(seen: tuple[gpus.Card, ...]) -> Finding:
    n, names = len(seen), ", ".join(card.name for card in seen)
    if any(name in os.environ for name in LAUNCHED):
        return Finding("several GPUs", f"{n} ({names}), one process a card, as it was launched")
    return Finding(
        "several GPUs",
        f"{n} ({names}): one process of Trainer counts all of them ({n} times the batch: "
        "DataParallel copies the weights in each step, a 4-bit model takes it all on one card; "
        "TRL's trainers refuse), "
        f"`torchrun --nproc_per_node {n}` one process a card, "
        "CUDA_VISIBLE_DEVICES=0 only the first",
    )


def _nccl() -> Finding:
    import torch.distributed as dist  # the doctor also looks where no torch is

    if dist.is_available() and dist.is_nccl_available():
        return Finding("NCCL", "present: cards talk to each other directly")
    return Finding(
        "NCCL",
        "not in this PyTorch: ranks would talk through the host (gloo), FSDP2 not at all",
        "install PyTorch's build for CUDA on Linux, see pytorch.org/get-started, or use one card",
    )


def copies(n_bytes: int, ranks: int) -> list[Finding]:
    """Host memory for loading: every rank its copy, or rank 0 alone; of one rank nothing.

    Args:
        n_bytes: Of the checkpoint.
        ranks: How many processes load it on this machine.
    """
    free = host.memory()[1]
    if ranks < 2 or free is None:
        return []
    each = f"{ranks} ranks that each load the model take {show_bytes(ranks * n_bytes)} of "
    room = f"{show_bytes(free)} free"
    if ranks * n_bytes <= free:
        return [Finding("host copies", f"{each}host memory, {room}")]
    if n_bytes <= free:
        found = f"{each}host memory, only {room}; with cpu_ram_efficient_loading rank 0 alone loads"
        return [Finding("host copies", f"{found}: {show_bytes(n_bytes)}, as in configs/fsdp2_*")]
    found = f"{each}host memory, and one copy {show_bytes(n_bytes)}, only {room}"
    read = "; fitcast.training.sharded reads one tensor at a time, Trainer's 4-bit loading as well"
    return [Finding("host copies", found + read)]
