"""A checkpoint with the real shape of a model and random numbers, for when the hub is out of reach.

Memory and speed of a step depend on shapes and dtypes, not on values, so they stay true; what such
a model writes is noise. Written tensor by tensor: 16 GB of weights need no 16 GB of memory.

Not modelled: what training has done to real weights (outliers, anything that was learned).

Source of the layout: safetensors, "Format": an 8-byte length, a JSON header, the bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fitcast import models
from fitcast.forecasting.fake import meta_model
from fitcast.units import refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
NOISE_NUMBERS = 2**22  # random numbers that are made once and written again and again
# Fields of a config that say who wrote it and where from, and nothing of the model.
LIBRARY_FIELDS = ("transformers_version", "_name_or_path", "architectures", "dtype")
STANDARD_DEVIATION = 0.02  # what these models are initialised with


def write(model: str, folder: str | Path, dtype: torch.dtype = torch.float16) -> Path:
    """Folder of a checkpoint that `from_pretrained` loads: config.json and model.safetensors.

    Vectors (the weights of norms) are ones, matrices are noise.

    Args:
        model: Name in `models.NAMES`, or whatever else `models.config` takes.
        folder: Where the checkpoint's folder is made; one of the same config and dtype is kept.
        dtype: Of every weight: float16, bfloat16 or float32.

    Raises:
        ValueError: Another dtype.
    """
    if dtype not in NAMES:
        raise refusal("dtype", f"be one of {', '.join(map(str, NAMES))}", dtype, "pick one")
    config = models.config(model)
    target = Path(folder) / _name(model, config, dtype)
    if target.exists():
        return target
    part = target.with_name(f"{target.name}.{os.getpid()}.part")  # each rank writes its own
    part.mkdir(parents=True)
    try:
        _write_into(part, config, dtype)
        with contextlib.suppress(OSError):  # another process was faster
            part.rename(target)  # a folder with this name is whole
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _name(model: str, config: PretrainedConfig, dtype: torch.dtype) -> str:
    """Readable, and another one for another config: two folders may be called the same."""
    path = Path(model).absolute()
    readable = path.parent.name if path.name == "config.json" else path.name
    fields = {k: v for k, v in config.to_dict().items() if k not in LIBRARY_FIELDS}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode()).hexdigest()
    return f"{readable}-random-{str(dtype).removeprefix('torch.')}-{digest[:8]}"


def _write_into(folder: Path, config: PretrainedConfig, dtype: torch.dtype) -> None:
    meta: Any = meta_model(config, dtype, "eager")  # every family has it; the weights are the same
    tied = set(meta.all_tied_weights_keys) if config.tie_word_embeddings else set()
    tensors = {name: t for name, t in meta.state_dict().items() if name not in tied}
    noise = torch.randn(NOISE_NUMBERS, generator=torch.Generator().manual_seed(0))
    block = _bytes_of((noise * STANDARD_DEVIATION).to(dtype))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(_header(tensors, dtype))
        for tensor in tensors.values():
            left = tensor.numel() * dtype.itemsize
            if tensor.ndim < 2:
                left -= file.write(_bytes_of(torch.ones(tensor.shape, dtype=dtype)))
            while left:
                left -= file.write(block[: min(left, len(block))])
    config.architectures = [type(meta).__name__]
    config.save_pretrained(folder)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    array: Any = tensor.view(torch.uint8).numpy()
    return memoryview(array).cast("B")


def _header(tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> bytes:
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * dtype.itemsize
        header[name] = {
            "dtype": NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
