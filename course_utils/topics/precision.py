"""Numbers of 16 and 32 bits: what fits into a format, what rounds away, what autocast makes of it.

Formats go by name: "float32", "float16" (5 exponent bits, 10 of fraction), "bfloat16" (8 and 7).

Not modelled: float8, TF32, stochastic rounding. Sources: IEEE 754-2008; Micikevicius et al. 2018,
"Mixed precision training"; torch/amp/grad_scaler.py; aten/src/ATen/autocast_mode.h.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from fitcast import gpus
from fitcast.memory.operations import OperationLog as OperationLog  # shown beside the formats
from fitcast.memory.operations import name_of
from fitcast.units import Said, refusal

FORMATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
EXPONENT_BITS = {"float32": 8, "float16": 5, "bfloat16": 8}


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a format's name.

    Raises:
        ValueError: No such format.
    """
    if name not in FORMATS:
        raise refusal("format", f"be one of {', '.join(FORMATS)}", name, "pick one")
    return FORMATS[name]


def bits(value: float, name: str) -> str:
    """A number's bits in a format: sign, exponent, fraction, as the memory holds them.

    Example:
        >>> bits(1.0, "float16"), bits(-0.5, "bfloat16")
        ('0 01111 0000000000', '1 01111110 0000000')
    """
    tensor = torch.tensor(value, dtype=dtype_of(name))
    width = 8 * tensor.element_size()
    pattern = tensor.view(torch.int32 if width == 32 else torch.int16).item() % 2**width
    text, end = f"{pattern:0{width}b}", 1 + EXPONENT_BITS[name]
    return f"{text[0]} {text[1:end]} {text[end:]}"


@dataclass(frozen=True)
class Landing:
    """Where non-zero numbers land in a format: shares, 0 to 1, that add up to 1.

    Attributes:
        zero: Rounded to zero ("flushed").
        subnormal: Below the smallest normal number: kept, with fewer bits the smaller they are.
        normal: With the format's full precision.
        infinite: Above the largest number, or not finite to begin with.
    """

    zero: float
    subnormal: float
    normal: float
    infinite: float


def land(tensors: Iterable[torch.Tensor], name: str = "float16", scale: float = 1.0) -> Landing:
    """Multiply by `scale`, round to the format, and see what became of the non-zero numbers.

    Raises:
        ValueError: There is no non-zero number.

    Example:
        >>> land([torch.tensor([1e-8, 1e-6, 0.1, 1e6, 0.0])])
        Landing(zero=0.25, subnormal=0.25, normal=0.25, infinite=0.25)
    """
    tiny, count = torch.finfo(dtype_of(name)).tiny, Counter()
    for tensor in tensors:
        number = tensor.detach()[tensor.detach() != 0]
        landed = (number.double() * scale).to(FORMATS[name]).double().abs()
        finite = landed.isfinite()
        count += Counter(
            all=number.numel(),
            zero=int((landed == 0).sum()),
            normal=int((finite & (landed >= tiny)).sum()),
            infinite=int((~finite).sum()),
        )
    if not count["all"]:
        raise refusal(
            "tensors", "hold a non-zero number", Said("none"), "run a backward pass first"
        )
    zero, normal, infinite = (count[k] / count["all"] for k in ("zero", "normal", "infinite"))
    kept = count["all"] - count["zero"] - count["normal"] - count["infinite"]
    return Landing(zero, kept / count["all"], normal, infinite)


def moved_share(weights: Iterable[torch.Tensor], update: float, name: str) -> float:
    """Share (0 to 1) of weights that an update of this size changes when the format stores them.

    Rounding to nearest leaves a weight alone when the update is below half the distance to its
    neighbour.
    """
    moved = total = 0
    for weight in weights:
        before = weight.detach().to(dtype_of(name))
        moved += int(((before.double() + update).to(before.dtype) != before).sum())
        total += before.numel()
    return moved / total


@dataclass
class Products:
    """A step's products with 4-bit weights: in which format their input came, and ran.

    Attributes:
        seen: (format of the input, of the result) to how often, forward and backward.
    """

    seen: Counter[tuple[str, str]]

    @property
    def detours(self) -> int:
        """Products whose operands came in another format than the one in which they ran."""
        return sum(count for (came, ran), count in self.seen.items() if came != ran)

    def __str__(self) -> str:
        return " and ".join(
            f"{count} get {came} and run in {ran}" if came != ran else f"{count} run in {ran}"
            for (came, ran), count in sorted(self.seen.items())
        )


@contextlib.contextmanager
def products_of_4_bits() -> Iterator[Products]:
    """Inside, products with bitsandbytes' 4-bit weights are noted.

    At the layer's own function: under a dispatch mode autocast does not reach what the operation
    does inside, and the formats would be others than those of a run.
    """
    from bitsandbytes.autograd._functions import MatMul4Bit

    products = Products(Counter())

    def noted(function: Callable) -> Any:
        def call(ctx: Any, given: torch.Tensor, *rest: Any, **more: Any) -> Any:
            found = function(ctx, given, *rest, **more)
            result = found[0] if isinstance(found, tuple) else found
            if result is not None:
                products.seen[name_of(given.dtype), name_of(result.dtype)] += 1
            return found

        return staticmethod(call)

    forward, backward = noted(MatMul4Bit.forward), noted(MatMul4Bit.backward)
    with (
        mock.patch.object(MatMul4Bit, "forward", forward),
        mock.patch.object(MatMul4Bit, "backward", backward),
    ):
        yield products


@dataclass(frozen=True)
class Watched:
    """What passed through the linear layers: their outputs, and the gradients of these."""

    activations: list[torch.Tensor]
    gradients: list[torch.Tensor]


@contextlib.contextmanager
def watch_linears(model: torch.nn.Module) -> Iterator[Watched]:
    """Collect each linear layer's output in forward, and in backward that output's gradient.

    These gradients are what 16 bits must carry from layer to layer; a weight's gradient is a sum of
    them over all tokens, and larger.
    """
    watched = Watched([], [])

    def watch(module, inputs, output):
        watched.activations.append(output.detach().clone())
        if output.requires_grad:
            output.register_hook(lambda gradient: watched.gradients.append(gradient.clone()))

    hooks = [
        module.register_forward_hook(watch)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear)
    ]
    try:
        yield watched
    finally:
        for hook in hooks:
            hook.remove()


@dataclass(frozen=True)
class ScalerStep:
    """One step of a gradient scaler: the scale its loss had, and whether it was skipped."""

    scale: float
    skipped: bool


class TracedScaler(torch.amp.GradScaler):
    """PyTorch's gradient scaler, with a `trace` of what it did in each step."""

    def __init__(self, device: str = "cpu", **settings: Any):
        super().__init__(device, **settings)
        self.trace: list[ScalerStep] = []

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """As in `torch.amp.GradScaler`, written down."""
        found = [
            flag.item()
            for state in self._per_optimizer_states.values()
            for flag in state["found_inf_per_device"].values()
        ]
        scale = self.get_scale()
        super().update(new_scale)
        self.trace.append(ScalerStep(scale, any(found)))


def trace_scaler(trainer: Any, **settings: Any) -> TracedScaler:
    """Give a `transformers.Trainer` with `fp16=True` a traced scaler, on a CPU as on a GPU.

    Without a GPU accelerate leaves out both scaler and autocast, and says nothing.

    Args:
        trainer: Not yet training.
        settings: Of `torch.amp.GradScaler`.
    """
    trainer.accelerator.native_amp = True
    trainer.accelerator.scaler = TracedScaler(gpus.device(), **settings)
    return trainer.accelerator.scaler


def _operations(x: torch.Tensor) -> dict[str, Callable[[], torch.Tensor]]:
    """Operations of a transformer on a square matrix."""
    index = torch.zeros(len(x), dtype=torch.long, device=x.device)
    return {
        "linear": lambda: F.linear(x, x),
        "matmul": lambda: x @ x,
        "softmax": lambda: x.softmax(-1),
        "layer_norm": lambda: F.layer_norm(x, x.shape[-1:]),
        "rms_norm": lambda: F.rms_norm(x, x.shape[-1:]),
        "cross_entropy": lambda: F.cross_entropy(x, index),
        "sum": lambda: x.sum(),
        "pow": lambda: x.pow(2),
        "exp": lambda: x.exp(),
        "silu": lambda: F.silu(x),
        "embedding": lambda: F.embedding(index, x),
        "add to float32": lambda: x + x.float(),
    }


def autocast_table(device_type: str, name: str = "float16") -> dict[str, tuple[str, str]]:
    """What autocast makes of each operation on "cpu" or "cuda", found by running it there.

    No GPU is needed for "cuda": fake tensors go through the same dispatch as real ones.

    Returns:
        Operation to the formats of its result, given float32 and given `name`.
    """
    was_enabled, was = torch.is_autocast_enabled(device_type), torch.get_autocast_dtype(device_type)
    torch.set_autocast_enabled(device_type, True)  # the context refuses "cuda" without a GPU
    torch.set_autocast_dtype(device_type, dtype_of(name))
    try:
        with torch.no_grad(), FakeTensorMode():  # a fake graph on "cuda" would abort the process
            given = [
                torch.empty(4, 4, device=device_type, dtype=d)
                for d in (torch.float32, FORMATS[name])
            ]
            full, half = (
                {n: name_of(run().dtype) for n, run in _operations(x).items()} for x in given
            )
            return {operation: (full[operation], half[operation]) for operation in full}
    finally:
        torch.set_autocast_enabled(device_type, was_enabled)
        torch.set_autocast_dtype(device_type, was)
