"""One training step on several GPUs: the model replicated (DDP), sharded (FSDP2) or cut in two.

    pack(model); shard(model, mesh); place(model, weights, dtype, device_of)

Weights come one at a time from a function, so that no process ever holds the whole model: each is
quantized where it arrives, and each rank keeps its part of it. What travels between ranks is what
PyTorch's own wrappers send. The forecast runs this very code under a process group that only
pretends (`forecasting.ranks`).

4-bit weights are stored as float16 numbers here, two packed bytes in each: FSDP2 cuts and gathers
numbers of a floating dtype. Adapters keep their float32, in the unit of their layer: FSDP2 shards
tensor by tensor, so that frozen and trained ones share a unit.

Not modelled: tensor and pipeline parallelism, several nodes.

Sources: torch/distributed/fsdp/_fully_shard; bitsandbytes, nn/modules.py (`quant_storage`,
`fix_4bit_weight_quant_state_from_module`); accelerate, utils/modeling.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from fitcast import gpus
from fitcast.recipe import TrainRecipe
from fitcast.step.levers import decoder_layers, unwrap
from fitcast.units import refusal

# name, shape, dtype -> the whole tensor, on the device where it is to be quantized
Weights = Callable[[str, torch.Size, torch.dtype], torch.Tensor]


# --- the weights -------------------------------------------------------------------------------


def pack(model: torch.nn.Module) -> None:
    """Give each 4-bit weight of a model on meta the shape in which it will be stored.

    Args:
        model: Prepared by its quantizer; changed in place. `packed_from` of a layer is the shape
            before, (outputs, inputs).
    """
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if hasattr(weight, "quant_type"):
            layer: Any = module
            size = math.ceil(weight.numel() / 2 / layer.quant_storage.itemsize)
            meta = torch.empty(size, 1, dtype=layer.quant_storage, device="meta")
            layer.packed_from, layer.packed_as = weight.shape, weight.quant_type
            layer.packed_twice = weight.compress_statistics
            layer.weight = torch.nn.Parameter(meta, requires_grad=False)


def place(
    model: torch.nn.Module,
    weights: Weights,
    dtype: torch.dtype,
    device_of: Callable[[str], Any],
    *,
    offload: bool = False,
) -> None:
    """Fill a packed model on meta, tensor by tensor, in the order of its names.

    Args:
        model: After `pack`, and after `shard` where it is sharded.
        weights: Where they come from.
        dtype: In which they arrive.
        device_of: Name of a parameter -> its device.
        offload: Whether shards wait on the host.
    """
    owners = _owners(model)
    for name in sorted(owners, key=_natural):
        holders = owners[name]
        module, attribute = holders[0]
        old: Any = module._parameters[attribute]
        full = _whole(name, module, old, weights, dtype, device_of(name))
        if hasattr(old, "device_mesh"):  # sharded; what is not stays whole on each rank
            full = _part(full, old, offload)
        elif hasattr(module, "device_of_rows"):  # `embedding="host"`
            full, module.device_of_rows = to_host(full, locked=False), torch.device(device_of(name))
        new = torch.nn.Parameter(full, requires_grad=old.requires_grad)
        for holder, place_name in holders:
            holder._parameters[place_name] = new
        del full, old, new
    _fill_buffers(model, device_of)


def _owners(model: torch.nn.Module) -> dict[str, list[tuple[Any, str]]]:
    """Name of each parameter -> all modules that hold it, tied ones under the first name."""
    first: dict[int, str] = {}
    owners: dict[str, list[tuple[Any, str]]] = {}
    for path, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                name = first.setdefault(id(parameter), f"{path}.{attribute}")
                owners.setdefault(name, []).append((module, attribute))
    return owners


def _natural(name: str) -> list[tuple[int, object]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _whole(
    name: str, module: Any, old: Any, weights: Weights, dtype: torch.dtype, device: Any
) -> torch.Tensor:
    """A tensor as it lies on the device: as it came, cast, or packed into 4 bits."""
    shape = getattr(module, "packed_from", None)
    if shape is None or not name.endswith(".weight") or ".lora_" in name:
        arrives = old.dtype if ".lora_" in name else dtype
        return weights(name, old.shape, arrives).to(device, old.dtype)
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(
        weights(name, shape, dtype).to(device),
        compress_statistics=module.packed_twice,
        quant_type=module.packed_as,
        quant_storage=module.quant_storage,
    )
    module.quant_state = state
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False  # a CPU's kernels repack the weight
    return packed


def _part(full: torch.Tensor, old: Any, offload: bool) -> Any:
    """This rank's part of a tensor, cut as FSDP2 cuts: even chunks of the first dimension."""
    from torch.distributed.tensor import DTensor

    mesh: Any = old.device_mesh
    chunks = torch.chunk(full, mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    local = chunks[rank].clone() if rank < len(chunks) else full.new_empty(0, *full.shape[1:])
    local = to_host(local) if offload else local
    make: Any = DTensor  # `from_local` would move a host's part to the mesh's device
    return make(local, old._spec, requires_grad=False)


def to_host(tensor: torch.Tensor, locked: bool = True) -> torch.Tensor:
    """A tensor in host memory, locked where a GPU will copy it back layer by layer."""
    tensor = tensor.to("cpu")
    return tensor.pin_memory() if locked and gpus.device() == "cuda" else tensor


def _fill_buffers(model: torch.nn.Module, device_of: Callable[[str], Any]) -> None:
    """Buffers are few and computed: rotary frequencies, made again by the model's own code."""
    for path, module in model.named_modules():
        made = False
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and buffer.is_meta:
                made = made or _rotary_again(module, device_of(f"{path}.{name}"))
                if module._buffers[name] is buffer:
                    module._buffers[name] = torch.zeros_like(buffer, device=device_of(path))


def _rotary_again(module: Any, device: Any) -> bool:
    """Frequencies of a rotary embedding, by its class; they are not part of a checkpoint."""
    if not hasattr(module, "config") or "inv_freq" not in module._buffers:
        return False
    fresh = type(module)(module.config)
    for name, buffer in fresh._buffers.items():
        module._buffers[name] = None if buffer is None else buffer.to(device)
    if hasattr(module, "original_inv_freq"):
        module.original_inv_freq = module._buffers["inv_freq"]
    return True


def noise(seed: int, device: Any) -> Weights:
    """Random weights at the real shapes, the same in every process: adapters as PEFT starts them.

    Args:
        seed: Another one, other weights.
        device: Where they are made.
    """

    def made(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        if len(shape) < 2:
            return torch.ones(shape, dtype=dtype, device=device)
        if ".lora_B." in name:
            return torch.zeros(shape, dtype=dtype, device=device)
        generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()) + seed)
        tensor = torch.empty(shape, dtype=dtype, device=device)
        if ".lora_A." in name:
            bound = 1 / math.sqrt(shape[1])
            return tensor.uniform_(-bound, bound, generator=generator)
        return tensor.normal_(std=0.02, generator=generator)

    return made


# --- the wrappers ------------------------------------------------------------------------------


def replicate(model: torch.nn.Module, device: Any = None) -> Any:
    """The model under `DistributedDataParallel`, as Trainer wraps it for adapters or whole models.

    Args:
        model: Whole, on this rank's device.
        device: Index of that device; `None` on a CPU.
    """
    from torch.nn.parallel import DistributedDataParallel

    answer_with_the_loss(model)
    return DistributedDataParallel(model, device_ids=None if device is None else [device])


def shard(model: Any, mesh: Any, *, offload: bool = False) -> None:
    """Cut each decoder layer, the input embedding and the rest into FSDP2 units, in place.

    The rest (last norm and head) is the root's, which is gathered from the start of forward to the
    end of backward: the chunked loss multiplies with the head inside the root's forward. At the
    peak a part would lie beside the whole, so a rest that is frozen stays whole on each rank.

    Args:
        model: On meta, packed; what `place` fills afterwards.
        mesh: One dimension of ranks.
        offload: Whether parameters, gradients and optimizer state wait on the host.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    answer_with_the_loss(model)
    pinned = gpus.device() == "cuda"
    policy = CPUOffloadPolicy(pin_memory=pinned) if offload else OffloadPolicy()
    base = unwrap(model)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, offload_policy=policy)
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    alone = head is None or head.weight is not embedding.weight
    if alone and not hasattr(embedding, "device_of_rows"):
        fully_shard(embedding, mesh=mesh, offload_policy=policy)
    whole = {p for p in model.parameters() if not (p.requires_grad or hasattr(p, "device_mesh"))}
    fully_shard(model, mesh=mesh, offload_policy=policy, ignored_params=whole)


def check_optimizer(recipe: TrainRecipe) -> None:
    """Refuse an optimizer whose kernels do not take sharded tensors."""
    if recipe.optimizer != "adamw":
        raise refusal(
            "optimizer", "be 'adamw' when the model is sharded", recipe.optimizer,
            "bitsandbytes' kernels do not take parts; a rank's share of AdamW's state is small",
        )  # fmt: skip


def cut(model: Any, how: str, cards: int, bytes_on_each: int) -> dict[str, int]:
    """Which card holds which module, as accelerate answers "auto" and "balanced".

    Args:
        model: On meta, packed.
        how: "auto" or "balanced": equal parts; "sequential": the first card is filled first.
        cards: How many there are.
        bytes_on_each: What may lie on one.

    Returns:
        Path of a module -> number of its card.
    """
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    base = unwrap(model)
    alone = [type(layer).__name__ for layer in decoder_layers(model)][:1]
    limits: Any = dict.fromkeys(range(cards), bytes_on_each)
    if how != "sequential":
        limits = get_balanced_memory(base, limits, no_split_module_classes=alone)
        limits[cards - 1] = bytes_on_each
    placed: Any = infer_auto_device_map(base, limits, no_split_module_classes=alone)
    return placed


def device_in(device_map: dict[str, int]) -> Callable[[str], int]:
    """Name of a parameter, also of an adapter or under PEFT's prefix -> its card."""

    def of(name: str) -> int:
        plain = re.sub(r"^base_model\.model\.", "", name)
        best = max((p for p in device_map if f"{plain}.".startswith(f"{p}." if p else "")), key=len)
        return device_map[best]

    return of


def is_wrapped(model: Any) -> bool:
    """Whether a model stands under DDP or FSDP2, whose forward has to see the loss."""
    names = {kind.__name__ for kind in type(model).__mro__}
    return bool(names & {"DistributedDataParallel", "FSDPModule"})


def answer_with_the_loss(model: torch.nn.Module) -> None:
    """Let the model's forward answer `loss_of=(...)` with `qlora.loss_within` of these arguments.

    DDP averages gradients, and FSDP2 gathers weights, only around a forward of its own, which calls
    the model's: a loss computed beside it would let every process train a model of its own, in
    silence. Any other call is answered as before.

    Args:
        model: Changed in place; what a wrapper will be put around.
    """
    from fitcast.step import qlora

    plain = model.forward

    @functools.wraps(plain)
    def forward(*args: Any, loss_of: tuple | None = None, **options: Any) -> Any:
        if loss_of is None:
            return plain(*args, **options)
        return qlora.loss_within(model, *loss_of, whole=plain)

    model.forward = forward


@contextlib.contextmanager
def exchanging(model: Any, last: bool) -> Iterator[None]:
    """Gradients travel in the last micro batch of a step only, as accelerate arranges it.

    Args:
        model: Wrapped or not.
        last: Whether this is the step's last micro batch.
    """
    if not is_wrapped(model) or last:
        if hasattr(model, "set_requires_gradient_sync"):
            model.set_requires_gradient_sync(True)
        yield
    elif hasattr(model, "no_sync"):
        with model.no_sync():
            yield
    else:
        model.set_requires_gradient_sync(False)
        yield


def world() -> tuple[int, int]:
    """Rank and number of ranks of this process."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
