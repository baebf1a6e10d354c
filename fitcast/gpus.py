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


def _is_range(value: object) -> bool:
    """Whether these are two fractions above 0, the lower one first."""
    if not isinstance(value, tuple) or [type(part) for part in value] != [float, float]:
        return False
    return 0 < value[0] <= value[1] <= 1


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
        sustained: Lowest and highest part of these peaks that long training steps reach.
        basis: Where `sustained` comes from: what was measured, or that nothing was.
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
    sustained: tuple[float, float] = (0.3, 0.6)
    basis: str = "not measured: 30 % to 60 % of the data sheet's peaks is assumed"

    def __post_init__(self):
        whole = ("total_bytes", "context_bytes", "multiprocessors")
        for field in (*whole, "matmul_flops", "float32_flops", "bandwidth"):
            value, kinds = getattr(self, field), (int,) if field in whole else (int, float)
            if type(value) not in kinds or not 0 < value < float("inf"):
                raise ValueError(
                    f"{field} must be a positive {'whole ' * (field in whole)}number, "
                    f"got {value!r}; see the data sheet, or take a preset"
                )
        for field, kind in (("name", str), ("flash_attention", bool), ("basis", str)):
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
        if not _is_range(self.sustained):
            raise ValueError(
                f"sustained must be two fractions, the lower one first, got {self.sustained!r}; "
                "(0.3, 0.6) where nothing was measured"
            )

    @property
    def usable_bytes(self) -> int:
        """Bytes left for tensors and the allocator's slack: total minus context."""
        return self.total_bytes - self.context_bytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes of one cuBLAS workspace (PyTorch keeps one per thread: forward and backward).

        Hopper and Blackwell take more. Source: aten/src/ATen/cuda/CublasHandlePool.cpp,
        `parseChosenWorkspaceSize`.
        """
        return 1024 * (4096 * 8 if self.capability[0] in (9, 10, 12) else 4096 * 2 + 16 * 8)

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


def _card(
    name: str,
    total_mib: int,
    capability: tuple[int, int],
    multiprocessors: int,
    half_teraflops: float,
    float32_teraflops: float,
    gigabytes_per_second: float,
    context_mib: int = 685,
    **measured: Any,
) -> Gpu:
    """A row of the table below."""
    return Gpu(
        name=name,
        total_bytes=total_mib * MIB,
        capability=capability,
        multiprocessors=multiprocessors,
        context_bytes=context_mib * MIB,
        matmul_flops=half_teraflops * 1e12,
        float32_flops=float32_teraflops * 1e12,
        bandwidth=gigabytes_per_second * 1e9,
        **measured,
    )


# Memory: `torch.cuda.mem_get_info()` on T4 and H200; of the others what out-of-memory messages say,
# to 1 %. Context: measured on T4 and H200 (there 685 MiB, later 751); the others take the H200's.
# Rates: data sheets, dense; 16-bit products that add up in float32, which a GeForce does at half
# the rate of those in float16. P100 has no tensor cores: its rate is that of plain float16.
T4 = _card(
    "T4", 14912, (7, 5), 40, 65, 8.1, 320, context_mib=141, sustained=(15 / 65, 24 / 65),
    basis="public readings of a T4 at 70 W: 24 TFLOP/s in a 4096 fp16 product, 15 in a 14B QLoRA",
)  # fmt: skip
P100 = _card("P100", 16281, (6, 0), 56, 18.7, 9.3, 732)
V100_16 = _card("V100-16", 16160, (7, 0), 80, 125, 15.7, 900)
V100_32 = _card("V100-32", 32510, (7, 0), 80, 125, 15.7, 900)
RTX_3060_12 = _card("RTX-3060-12", 12042, (8, 6), 28, 25.5, 12.7, 360)
RTX_3090 = _card("RTX-3090", 24259, (8, 6), 82, 71, 35.6, 936)
RTX_4090 = _card("RTX-4090", 24207, (8, 9), 128, 165.2, 82.6, 1008)
RTX_5090 = _card("RTX-5090", 32111, (12, 0), 170, 209.5, 104.8, 1792)
L4 = _card("L4", 22563, (8, 9), 58, 121, 30.3, 300)
L40S = _card("L40S", 45467, (8, 9), 142, 362, 91.6, 864)
A10 = _card("A10", 22589, (8, 6), 72, 125, 31.2, 600)
A100 = _card("A100-40", 40448, (8, 0), 108, 312, 19.5, 1555)
A100_80 = _card("A100-80", 81050, (8, 0), 108, 312, 19.5, 2039)
H100 = _card("H100", 81003, (9, 0), 132, 989, 67, 3350)
H200 = _card(
    "H200", 143166, (9, 0), 132, 989, 67, 4800, sustained=(0.56, 0.64),
    basis="measured on an H200 with a T4's attention kernels, 2026-11: 56 % to 64 %",
)  # fmt: skip
B200 = _card("B200", 182642, (10, 0), 148, 2250, 80, 8000)
PRESETS = {
    gpu.name: gpu
    for gpu in (
        T4, P100, V100_16, V100_32, RTX_3060_12, RTX_3090, RTX_4090, RTX_5090, L4, L40S, A10, A100,
        A100_80, H100, H200, B200,
    )
}  # fmt: skip


def preset(name: str, asked: str = "gpu") -> Gpu:
    """The preset of this name, in any letter case, with or without hyphens.

    Raises:
        ValueError: There is none, or it comes in several sizes.
    """
    found = presets_called(name)
    if found and _plain(found[0]) == _plain(name):
        return PRESETS[found[0]]
    if found:
        raise ValueError(f"{asked} must be one card, got {name!r}; say {' or '.join(found)}")
    raise ValueError(
        f"{asked} must be one of {', '.join(PRESETS)}, got {name!r}; "
        "for another card build a gpus.Gpu(...)"
    )


def presets_called(name: str) -> list[str]:
    """The presets that a name means: that of this name, all sizes of a card ("A100"), or none."""
    plain = {known: _plain(known) for known in PRESETS}
    wanted = _plain(name)
    exact = [known for known in PRESETS if plain[known] == wanted]
    return exact or [known for known in PRESETS if wanted and plain[known].startswith(wanted)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", str(name).lower())


def custom(total_bytes: int, capability: tuple[int, int]) -> Gpu:
    """A card that is no preset: its own memory and kernels, the rates of the nearest preset.

    Args:
        total_bytes: Memory that a program can see.
        capability: CUDA compute capability, (major, minor).

    Raises:
        ValueError: No such card can be.
    """
    nearest = min(PRESETS.values(), key=lambda gpu: _distance(gpu, capability, total_bytes))
    name = (
        f"card of {show_bytes(total_bytes, 'GiB')} and capability {capability[0]}.{capability[1]}"
    )
    return replace(
        nearest,
        name=name,
        total_bytes=total_bytes,
        capability=capability,
        sustained=Gpu.sustained,
        basis=f"not measured: 30 % to 60 % of a {nearest.name}'s peaks is assumed",
    )


def _distance(gpu: Gpu, capability: tuple[int, int], total_bytes: int) -> tuple[int, float]:
    """How unlike two cards are: first in their kernels, then in their memory."""
    versions = 10 * gpu.capability[0] + gpu.capability[1] - 10 * capability[0] - capability[1]
    return abs(versions), abs(total_bytes / gpu.total_bytes - 1)


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
    nearest = min(
        PRESETS.values(),
        key=lambda gpu: (  # an A100 is no L4, though both have 8.x
            not _is_called(gpu, card.name),
            *_distance(gpu, (card.major, card.minor), card.total_memory),
        ),
    )
    same_size = abs(card.total_memory / nearest.total_bytes - 1) < 0.05  # no slice, no H100 NVL
    if _is_called(nearest, card.name) and same_size:
        return nearest
    return replace(
        nearest,
        name=card.name,
        capability=(card.major, card.minor),
        total_bytes=card.total_memory,
        multiprocessors=card.multi_processor_count,
        sustained=Gpu.sustained,
        basis=Gpu.basis,
    )


def _is_called(gpu: Gpu, driver_name: str) -> bool:
    """Whether the driver's name has a preset's: "NVIDIA GeForce RTX 4090" is an RTX-4090."""
    model = re.sub(r"-\d\d$", "", gpu.name)  # without the memory of one that has several sizes
    words = re.findall(r"[a-z0-9]+", driver_name.lower())
    return set(re.findall(r"[a-z0-9]+", model.lower())) <= set(words)


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
