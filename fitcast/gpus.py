"""Which GPU is this, or which one are we pretending to have.

The only module that asks `torch.cuda`. What it measures is `None` without a GPU (`torch.cuda`
answers 0, which looks like a measurement). Not modelled: clocks, power limits, PCIe, NVLink.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fitcast.units import MIB, show_bytes

EMULATE_VARIABLE = "COURSE_EMULATE_GPU"  # set to "T4" to run every lesson as if on a T4
_emulated: Gpu | None = None
_for_good = contextlib.ExitStack()  # what the variable set up stays until the process ends
atexit.register(_for_good.close)


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as a memory budget, a set of kernels and a speed.

    Attributes:
        total_bytes: Memory that a program can see (`torch.cuda.mem_get_info()[1]`).
        capability: CUDA compute capability, (major, minor).
        multiprocessors: Streaming multiprocessors; libraries pick kernels by their number.
        context_bytes: Memory gone before the first tensor: driver, kernels, cuBLAS handles.
        matmul_flops, float32_flops: Peak dense FLOP/s of 16-bit tensor cores and of plain float32.
        bandwidth: Peak memory bandwidth in bytes/s.
        flash_attention: `False` for a T4's attention kernels on another card.
    """

    name: str
    total_bytes: int
    capability: tuple[int, int]
    multiprocessors: int
    context_bytes: int
    matmul_flops: float
    float32_flops: float
    bandwidth: float
    flash_attention: bool = True

    def __post_init__(self):
        whole = ("total_bytes", "context_bytes", "multiprocessors")
        for field in (*whole, "matmul_flops", "float32_flops", "bandwidth"):
            value, kinds = getattr(self, field), (int,) if field in whole else (int, float)
            if type(value) not in kinds or not 0 < value < float("inf"):
                raise ValueError(
                    f"{field} must be a positive {'whole ' * (field in whole)}number, "
                    f"got {value!r}; see the data sheet, or take a preset"
                )
        for field, kind in (("name", str), ("flash_attention", bool)):
            if type(value := getattr(self, field)) is not kind or value == "":
                raise ValueError(f"{field} must be a {kind.__name__}, got {value!r}; see `Gpu`")
        if self.context_bytes >= self.total_bytes:
            raise ValueError(
                f"context_bytes must be below total_bytes ({self.total_bytes}), got "
                f"{self.context_bytes}; both are bytes, not MiB"
            )
        pair = self.capability if isinstance(self.capability, tuple) else ()
        if [type(part) for part in pair] != [int, int] or min(pair) < 0:
            raise ValueError(
                f"capability must be a pair of whole numbers such as (7, 5), got "
                f"{self.capability!r}; see developer.nvidia.com/cuda-gpus"
            )

    @property
    def usable_bytes(self) -> int:
        """Bytes left for tensors and the allocator's slack: total minus context."""
        return self.total_bytes - self.context_bytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes of one cuBLAS workspace (PyTorch keeps one per thread: forward and backward).

        Source: aten/src/ATen/cuda/CublasHandlePool.cpp, `parseChosenWorkspaceSize`.
        """
        return 1024 * (4096 * 8 if self.capability[0] == 9 else 4096 * 2 + 16 * 8)

    @property
    def has_bfloat16(self) -> bool:
        """Whether the GPU computes in bfloat16 itself, rather than emulating it slowly.

        `torch.cuda.is_bf16_supported()` is True on a T4, because it counts emulation.
        """
        return self.capability >= (8, 0)

    @property
    def has_flash_attention(self) -> bool:
        """Whether FlashAttention runs here: compute capability 8.0 and up."""
        return self.flash_attention and self.capability >= (8, 0)


# total_bytes: `torch.cuda.mem_get_info()` on T4 and H200; the others by out-of-memory messages, to
# 1 %. context_bytes: measured on T4 and H200; the others take the H200's. The rest: data sheets.
T4 = Gpu(
    name="T4",
    total_bytes=14912 * MIB,
    capability=(7, 5),
    multiprocessors=40,
    context_bytes=141 * MIB,
    matmul_flops=65e12,
    float32_flops=8.1e12,
    bandwidth=320e9,
)
L4 = Gpu(
    name="L4",
    total_bytes=22563 * MIB,
    capability=(8, 9),
    multiprocessors=58,
    context_bytes=685 * MIB,
    matmul_flops=121e12,
    float32_flops=30.3e12,
    bandwidth=300e9,
)
A10 = Gpu(
    name="A10",
    total_bytes=22589 * MIB,
    capability=(8, 6),
    multiprocessors=72,
    context_bytes=685 * MIB,
    matmul_flops=125e12,
    float32_flops=31.2e12,
    bandwidth=600e9,
)
A100 = Gpu(
    name="A100-40",
    total_bytes=40448 * MIB,
    capability=(8, 0),
    multiprocessors=108,
    context_bytes=685 * MIB,
    matmul_flops=312e12,
    float32_flops=19.5e12,
    bandwidth=1555e9,
)
H100 = Gpu(
    name="H100",
    total_bytes=81003 * MIB,
    capability=(9, 0),
    multiprocessors=132,
    context_bytes=685 * MIB,
    matmul_flops=989e12,
    float32_flops=67e12,
    bandwidth=3350e9,
)
H200 = Gpu(
    name="H200",
    total_bytes=143166 * MIB,
    capability=(9, 0),
    multiprocessors=132,
    context_bytes=685 * MIB,
    matmul_flops=989e12,
    float32_flops=67e12,
    bandwidth=4800e9,
)
PRESETS = {gpu.name: gpu for gpu in (T4, L4, A10, A100, H100, H200)}


def preset(name: str, asked: str = "gpu") -> Gpu:
    """The preset of this name, in any letter case; `ValueError` when there is none."""
    for known, gpu in PRESETS.items():
        if known.lower() == str(name).lower():
            return gpu
    raise ValueError(
        f"{asked} must be one of {', '.join(PRESETS)}, got {name!r}; "
        "for another card build a gpus.Gpu(...)"
    )


@dataclass(frozen=True)
class MixedPrecision:
    """The autocast dtype that suits a GPU (`None`: stay in float32) and the reason for it."""

    dtype: str | None
    reason: str


def mixed_precision(gpu: Gpu | None) -> MixedPrecision:
    """Which half-precision dtype to train in on `gpu` (`None`: no GPU), and why."""
    if gpu is None:
        return MixedPrecision(None, "no GPU: float32, so that results match on every machine")
    has = "{} has compute capability {}.{}".format(gpu.name, *gpu.capability)
    if gpu.has_bfloat16:
        return MixedPrecision("bfloat16", f"{has} >= 8.0: bfloat16 in hardware, no loss scaling")
    return MixedPrecision(
        "float16", f"{has} < 8.0: float16 in hardware, with loss scaling; bfloat16 is only emulated"
    )


def device() -> str:
    """Where tensors go: "cuda" when there is a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def detect() -> Gpu | None:
    """The GPU that this process trains on, the emulated one if any, or `None` without a GPU.

    The environment variable COURSE_EMULATE_GPU (a preset's name) emulates for the whole process.
    """
    import torch

    if not torch.cuda.is_available():
        return None
    if _emulated is None and (wanted := os.environ.get(EMULATE_VARIABLE)):
        _for_good.enter_context(emulate(preset(wanted, EMULATE_VARIABLE)))
    if _emulated:
        return _emulated
    card = torch.cuda.get_device_properties(0)
    words = card.name.lower().replace("-", " ").split()
    nearest = min(
        PRESETS.values(),
        key=lambda gpu: (  # an A100 is no L4, though both have 8.x
            gpu.name.lower() not in words,
            abs(10 * gpu.capability[0] + gpu.capability[1] - 10 * card.major - card.minor),
        ),
    )
    same_size = abs(card.total_memory / nearest.total_bytes - 1) < 0.05  # no slice, no H100 NVL
    if nearest.name.lower() in words and same_size:
        return nearest
    return replace(
        nearest,
        name=card.name,
        capability=(card.major, card.minor),
        total_bytes=card.total_memory,
        multiprocessors=card.multi_processor_count,
    )


@dataclass(frozen=True, kw_only=True)
class Card:
    """A GPU of this machine as its driver describes it: never the emulated one.

    Attributes:
        name: As the driver says it, such as "Tesla T4".
        capability: CUDA compute capability, (major, minor).
        total_bytes: The card's memory.
        free_bytes: Of these, what no program holds; `None` when the card does not answer.
    """

    name: str
    capability: tuple[int, int]
    total_bytes: int
    free_bytes: int | None


def cards() -> tuple[Card, ...]:
    """Every GPU that PyTorch sees, in its order: `cuda:0` first. Empty without a GPU."""
    import torch

    if not torch.cuda.is_available():
        return ()
    found = []
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        try:
            free = torch.cuda.mem_get_info(index)[0]
        except RuntimeError:  # no room for a context, or another program has it for itself
            free = None
        found.append(
            Card(
                name=card.name,
                capability=(card.major, card.minor),
                total_bytes=card.total_memory,
                free_bytes=free,
            )
        )
    return tuple(found)


def compiled_for() -> tuple[str, ...]:
    """What this PyTorch holds kernels for: "sm_75" as machine code, "compute_90" as PTX.

    Empty for a PyTorch without CUDA.
    """
    import torch

    return tuple(torch.cuda.get_arch_list())


def has_kernels(capability: tuple[int, int], compiled: Iterable[str]) -> bool:
    """Whether a card of this compute capability runs what a PyTorch was compiled for.

    Machine code ("sm_80") runs on its own major version, from its minor version on; PTX
    ("compute_80") is translated for that card and for every later one. A letter behind binds it
    closer: "sm_90a" runs on 9.0 alone, "sm_100f" within its major version.

    Args:
        capability: (major, minor) of the card.
        compiled: As from `compiled_for`. With none of these in it (a PyTorch for AMD says
            "gfx942") there is nothing to compare, and the answer is yes.

    Source: CUDA C++ Programming Guide, "Binary Compatibility", "PTX Compatibility" and
    "Architecture-Specific Features".

    Example:
        >>> has_kernels((8, 6), ["sm_80"]), has_kernels((6, 0), ["sm_70", "compute_90"])
        (True, False)
    """
    known = [
        (kind, (int(major), int(minor)), bound)
        for kind, major, minor, bound in re.findall(
            r"\b(sm|compute)_(\d+)(\d)([af]?)\b", " ".join(compiled)
        )
    ]
    return not known or any(_runs(capability, *architecture) for architecture in known)


def _runs(card: tuple[int, int], kind: str, built: tuple[int, int], bound: str) -> bool:
    if bound == "a":
        return card == built
    if kind == "compute" and not bound:
        return card >= built
    return card[0] == built[0] and card >= built


def describe(gpu: Gpu | None) -> str:
    """One line for a set-up cell."""
    if gpu is None:
        return (
            f"No GPU here: bytes are counted for the CPU's own kernels, and forecast for a T4 "
            f"({show_bytes(T4.total_bytes)})."
        )
    return f"{gpu.name}, {show_bytes(gpu.total_bytes)}. {mixed_precision(gpu).reason}."


@contextlib.contextmanager
def emulate(gpu: Gpu) -> Iterator[Gpu]:
    """Train on the present card as if it were a smaller `gpu`: its memory, its attention kernels.

    Limits the allocator to its usable bytes, turns off kernels that it lacks, asks for its cuBLAS
    workspace (in time only before the first matrix product). Speed stays. No CUDA device, or one
    smaller than `gpu`, raises `ValueError`.
    """
    import torch

    global _emulated
    if not torch.cuda.is_available():
        raise ValueError("emulate needs a CUDA device, got none; forecast(recipe, gpu) needs none")
    total = torch.cuda.get_device_properties(0).total_memory
    if total < gpu.total_bytes:
        raise ValueError(
            f"gpu must be no larger than the present card ({show_bytes(total)}), got "
            f"{gpu.name} with {show_bytes(gpu.total_bytes)}; pick a smaller preset"
        )
    sdp, before = torch.backends.cuda, _emulated
    kernels = {
        sdp.enable_flash_sdp: sdp.flash_sdp_enabled(),
        sdp.enable_cudnn_sdp: sdp.cudnn_sdp_enabled(),
    }
    if gpu.capability[0] != 9:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    torch.cuda.set_per_process_memory_fraction(gpu.usable_bytes / total)
    for enable, was_on in kernels.items():
        enable(was_on and gpu.has_flash_attention)
    _emulated = gpu
    try:
        yield gpu
    finally:
        torch.cuda.set_per_process_memory_fraction(before.usable_bytes / total if before else 1.0)
        for enable, was_on in kernels.items():
            enable(was_on)
        _emulated = before


def use_expandable_segments(wanted: bool) -> None:
    """Let CUDA's allocator grow one segment from now on, or not. Without a GPU: nothing."""
    import torch

    if torch.cuda.is_available():
        torch._C._accelerator_setAllocatorSettings(f"expandable_segments:{wanted}")


def reset_peak() -> int | None:
    """Start a new peak measurement; returns the bytes in tensors right now, `None` on CPU."""
    synchronize()
    _on_cuda("reset_peak_memory_stats")
    return _on_cuda("memory_allocated")


def _on_cuda(measure: str) -> Any:
    """What `torch.cuda` answers to the measure of this name; `None` without a GPU."""
    import torch

    return getattr(torch.cuda, measure)() if torch.cuda.is_available() else None


def peak_allocated_bytes(above: int | None = 0) -> int | None:
    """Most bytes in tensors since `reset_peak`, less those `above` which to count; `None` on CPU.

    The allocator's rounding counts. What `reset_peak` returned leaves out what others hold.
    """
    peak = _on_cuda("max_memory_allocated")
    return None if peak is None else peak - above


def peak_reserved_bytes() -> int | None:
    """Most bytes that the allocator held since `reset_peak`; `None` on CPU."""
    return _on_cuda("max_memory_reserved")


def free_bytes() -> int | None:
    """Bytes of the GPU that nobody holds, other programs counted; `None` on CPU."""
    return (_on_cuda("mem_get_info") or (None,))[0]


def synchronize() -> None:
    """Wait until the GPU has done what it was asked to, so that a clock reads the truth."""
    _on_cuda("synchronize")
