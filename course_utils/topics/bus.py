"""What ranks send to each other, counted: collectives of a small model that two processes train.

    model, batches = bus.small_model(), bus.my_batches()
    with bus.Bus() as seen:
        train(model, batches)
    bus.tell(sent=seen.sent_bytes)        # in a script; bus.run("script.py") starts it twice

PyTorch hands a collective to a dispatch mode as it does any operation, with its tensors. How much
of them a rank sends is what ring algorithms need, which NCCL takes between GPUs.

Not modelled: gloo's own algorithms, messages of the launcher, several hosts.

Source: NVIDIA, nccl-tests, doc/PERFORMANCE.md, "Bus Bandwidth".
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from course_utils.topics import ranks
from fitcast.step.ranks import exchanging
from fitcast.units import GIB, KIB

WIDTH, RANK, LAYERS, ROWS = 256, 16, 4, 8
FROZEN_BYTES, TRAINED_BYTES = LAYERS * WIDTH * WIDTH * 4, LAYERS * 2 * WIDTH * RANK * 4
# c10d's operation: what the field calls it, and how often a rank sends (n - 1) / n of its bytes.
COLLECTIVES = {
    "allreduce_": ("all-reduce", 2),
    "_allgather_base_": ("all-gather", 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1),
}


class Bus(TorchDispatchMode):
    """Notes each collective that moves a model's tensors while it is on.

    Attributes:
        seen: Name and bytes of the whole tensor, in the order in which they were called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int]] = []
        self._ranks = 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence = (), kwargs: dict | None = None
    ) -> Any:
        name = func.overloadpacket.__name__ if func.namespace == "c10d" else ""
        if name in COLLECTIVES:
            self.seen.append((COLLECTIVES[name][0], max(map(_bytes, args))))
            self._ranks = dist.get_world_size()  # a forecast's group is gone when it answers
        return func(*args, **(kwargs or {}))

    @property
    def sent_bytes(self) -> int:
        """What this rank sends in all that was seen, in whole bytes."""
        n = self._ranks
        factors = dict(COLLECTIVES.values())
        return sum(factors[name] * size * (n - 1) // n for name, size in self.seen)

    def __str__(self) -> str:
        return "; ".join(
            f"{self.seen.count(one)} x {one[0]} of {one[1] / KIB:g} KiB"
            for one in dict.fromkeys(self.seen)
        )


def _bytes(argument: Any) -> int:
    """Bytes of a collective's tensor, or of its list of one."""
    if isinstance(argument, (list, tuple)):
        return sum(map(_bytes, argument))
    return argument.nbytes if isinstance(argument, torch.Tensor) else 0


class Layer(nn.Module):
    """A frozen matrix and a LoRA adapter beside it, (rows, width) to (rows, width), float32."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.a, self.b = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.base(x)) + self.b(self.a(x))


class Small(nn.Module):
    """Layers one after the other; its forward answers with a loss, a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def small_model() -> Small:
    """Four layers of 256 KiB frozen and 32 KiB trained, the same in each process."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return Small()


def my_batches(count: int = 2) -> list[torch.Tensor]:
    """This rank's micro batches, each (rows, width)."""
    random = torch.Generator().manual_seed(dist.get_rank())
    return [torch.randn(ROWS, WIDTH, generator=random) for _ in range(count)]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that get a gradient."""
    return [p for p in model.parameters() if p.requires_grad]


def norm(model: nn.Module) -> float:
    """The length of the gradient of all that is trained, parts of it gathered."""
    grads: list[Any] = [p.grad for p in trained(model)]
    grads = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    return torch.cat([grad.flatten() for grad in grads]).double().norm().item()


def wrapped(strategy: str, model: Small) -> Any:
    """The model under DDP, or cut into FSDP2 units, one each layer.

    Args:
        strategy: "ddp" or "fsdp2".
        model: Changed in place by "fsdp2".
    """
    if strategy == "ddp":
        from torch.nn.parallel import DistributedDataParallel

        return DistributedDataParallel(model)
    from torch.distributed.fsdp import fully_shard

    for layer in model.layers:
        fully_shard(layer)
    return fully_shard(model)


def backward(model: Any, batches: Sequence[torch.Tensor]) -> None:
    """Gradients of a step's micro batches; they travel with the last one, as accelerate has it."""
    for number, batch in enumerate(batches, start=1):
        with exchanging(model, number == len(batches)):
            model(batch).backward()


def tell(**what: Any) -> None:
    """Say something to `run`, numbers, texts or lists of them; every rank has to call it, once."""
    said: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(said, what)
    if dist.get_rank() == 0:  # one process writes, or lines could mix
        print(json.dumps(said), flush=True)


def run(script: str | Path, *arguments: str, processes: int = 2) -> list[dict[str, Any]]:
    """What each rank of a script told, in order of rank; torchrun starts it on this machine's CPU.

    Args:
        script: A file that calls `tell` once.
        arguments: Its own.
        processes: How many to start.

    Raises:
        TimeoutError: It took too long.
        RuntimeError: A process failed; the message is its last word.
    """
    said = ranks.torchrun((str(script), *arguments), processes, is_whole=_has_told)
    return json.loads(said.splitlines()[-1])


def _has_told(said: str) -> bool:
    """Whether the last line is what every rank told; `tell` writes it once, when all have."""
    lines = said.splitlines()
    return bool(lines) and lines[-1].startswith("[{") and lines[-1].endswith("}]")


def card(row: dict[str, Any]) -> str:
    """A line about a run of the recorded group "cards": strategy, batch, peak of a rank, speed."""
    peak, speed = row["rank_peak_bytes"], row["tokens_per_second"]
    return (
        f"{row['model']:14}{row['strategy']:42}{row['micro_batch_size']} x "
        f"{row['sequence_length']:<7}"
        + (f"{peak / GIB:5.2f} GiB" if peak else row["outcome"])
        + (f"{speed:8,.0f} tokens/s" if speed else "")
    )


def launched(row: dict[str, Any]) -> str:
    """What tools/train_many_gpus.py said in a run of the group "gpus": its batch, its last step."""
    _, _, batch = row["shared"].rpartition(". ")
    return (
        f"{batch}\nstep {row['steps']}: loss {row['losses'][-1]:.4f}, "
        f"{row['tokens_per_second']:,.0f} tokens/s"
    )


def on_two_gpus(*lines: str) -> None:
    """Run command lines where two GPUs are, and print what they say; elsewhere say that none ran.

    Args:
        lines: As they are typed in the repository's root.

    Raises:
        RuntimeError: One of them failed.
    """
    if torch.accelerator.device_count() < 2:
        print("Nothing was started: these lines want two GPUs.")
        return
    for line in lines:
        print(f"$ {line}")
        _say(line)


def _say(line: str) -> None:
    """Run a command line in the repository's root, with this Python's accelerate."""
    launcher, _, rest = line.partition("launch ")
    command = [sys.executable, "-m", "accelerate.commands.launch", *rest.split()]
    if launcher != "accelerate ":
        command = line.split()
    with subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as started:
        for said in started.stdout or ():
            print(said, end="")
    if started.returncode:
        raise RuntimeError(f"it ended with {started.returncode}; its last lines say why")
