"""A gradient that overflows in one rank's part only: run by test_sharded.py under torchrun.

Prints, on each rank and for each step: whether the weights moved, and the scaler's scale. In the
second step the gradient of the last output is infinite: under FSDP2 the last rank holds it alone,
under DDP only the last rank's loss has it.

    torchrun --nproc-per-node 2 tests/fitcast/training/scaler_worker.py {ddp,fsdp2}
"""

import json
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel


def whole(weight):
    return (weight.full_tensor() if hasattr(weight, "full_tensor") else weight).detach().clone()


def main(strategy: str) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4, bias=False)
    if strategy == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    steps = []
    for step in range(3):
        before = whole(next(model.parameters()))
        sent = torch.ones(4)
        if step == 1 and (strategy == "fsdp2" or rank == 1):
            sent[-1] = float("inf")
        scaler.scale((model(torch.ones(1, 4)) * sent).sum()).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        after = whole(next(model.parameters()))
        steps.append([not torch.equal(before, after), scaler.get_scale()])
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, steps)
    if rank == 0:
        print(json.dumps(every), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
