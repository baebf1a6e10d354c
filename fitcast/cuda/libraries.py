"""What Python libraries do when they see a CUDA device, on a machine without one.

PyTorch's optimizers, bitsandbytes, PEFT and this package take other paths on CUDA than on a CPU.
Inside `pretend_cuda` they take CUDA's, on fake tensors. Not modelled: multi-GPU paths.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from fitcast import gpus
from fitcast.cuda import bitsandbytes
from fitcast.cuda.autocast import cuda_autocast
from fitcast.cuda.kernels import cuda_functions, one_kernel
from fitcast.gpus import Gpu
from fitcast.step import compiled, embedding, fused, host


@contextlib.contextmanager
def pretend_cuda(gpu: Gpu) -> Iterator[None]:
    """Inside, libraries behave as on `gpu`. Enter it before the fake tensors."""
    from bitsandbytes import functional as bnb
    from bitsandbytes.optim.optimizer import GlobalOptimManager, Optimizer8bit
    from torch.optim import adam  # pyright: ignore[reportAttributeAccessIssue]  (hidden in stubs)

    with contextlib.ExitStack() as stack:
        for target, name, stand_in in (
            (gpus, "device", lambda: "cuda"),
            (torch, "is_autocast_enabled", _autocast_of_cpu(torch.is_autocast_enabled)),
            (host, "locked_memory", locked_memory),
            (embedding, "on_host", lambda weight: torch.empty_like(weight, device="meta")),
            (embedding, "look_up", rows_sent),
            (host, "copy", lambda *_: None),
            (compiled, "launch", one_kernel),
            (fused, "is_padded_behind", lambda _: True),
            (adam, "_default_to_fused_or_foreach", foreach_by_default),
            (torch.nn.utils.clip_grad, "_has_foreach_support", lambda *_: True),
            (torch.amp.GradScaler, "_maybe_opt_step", step_without_looking),
            (bnb, "create_dynamic_map", lambda *_, **__: torch.empty(256)),
            (bnb, "prefetch_tensor", lambda *_, **__: None),
            (Optimizer8bit, "get_state_buffer", bitsandbytes.state_buffer),
            # as a new process has them: what one run registers is no other's business
            (GlobalOptimManager, "_instance", None),
            (bnb.GlobalPageManager, "_instance", None),
        ):
            stack.enter_context(mock.patch.object(target, name, stand_in))
        stack.enter_context(mock.patch.dict(bnb.name2qmap, clear=True))
        stack.enter_context(cuda_functions(gpu))
        stack.enter_context(cuda_autocast())
        yield


def _autocast_of_cpu(original: Callable[[str], bool]) -> Callable[..., bool]:
    """PEFT asks for autocast's state without naming a device, which means CUDA's."""
    return lambda device="cpu": original(device)


def locked_memory(n_bytes: int, device: torch.device) -> torch.Tensor:
    """Locked memory is the host's: it takes none of the device."""
    return torch.empty(n_bytes, dtype=torch.uint8, device="meta")


def rows_sent(ids: torch.Tensor, weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What comes of a look-up on the host: its rows."""
    return torch.empty(*ids.shape, weight.shape[1], dtype=weight.dtype, device=device)


def foreach_by_default(*_: Any, **__: Any) -> tuple[bool, bool]:
    """On CUDA, Adam updates all parameters at once: a copy of each in between.

    Source: torch/optim/optimizer.py, `_default_to_fused_or_foreach`; torch/optim/adam.py,
    `_multi_tensor_adam`.
    """
    return False, True


def step_without_looking(
    self: torch.amp.GradScaler,
    optimizer: torch.optim.Optimizer,
    optimizer_state: dict,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """A step whose gradients are finite: fake ones hold no number to ask."""
    return optimizer.step(*args, **kwargs)
