"""A model in parts on several GPUs (FSDP2), loaded by one process and trained by Trainer.

Rank 0 reads the checkpoint tensor by tensor; each tensor goes to all ranks, is quantized there, and
each keeps its part: the host holds one tensor, no card the whole model. Trainer and accelerate see
a model that is sharded already, and leave it so; they save and load it in parts
(`torch.distributed.checkpoint`), which may be read again by another number of ranks.

Not modelled: checkpoints whose names differ from the model's (some families are renamed while
transformers loads them), 8-bit optimizers, whose kernels do not take sharded tensors.

Sources: accelerate/utils/fsdp_utils.py, `fsdp2_prepare_model`; torch/distributed/fsdp/_fully_shard.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from fitcast import gpus, models
from fitcast.forecasting.load import blueprint
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora, ranks
from fitcast.step.levers import unwrap
from fitcast.units import Said, refusal

# What accelerate reads when Trainer is made; `accelerate launch` has set it, torchrun has not.
ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
}


def build_model(
    recipe: TrainRecipe, source: str | None = None, *, offload: bool = False
) -> torch.nn.Module:
    """The model of `recipe`, each rank with its part.

    Args:
        recipe: As for `trainer.build_model`.
        source: Folder of the weights, by default where `models.hub_id` says.
        offload: Whether parts wait on the host until their layer's turn.

    Raises:
        ValueError: An optimizer whose kernels do not take sharded tensors.
    """
    ranks.check_optimizer(recipe)
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    device = start()
    folder = _folder(source or models.hub_id(recipe.model))
    model = blueprint(recipe, models.config(str(folder)), torch.float16)
    _marked(model, recipe)
    ranks.pack(model)
    qlora.apply_levers(model, recipe)
    mesh = init_device_mesh(torch.device(device).type, (dist.get_world_size(),))
    ranks.shard(model, mesh, offload=offload)
    read = reader(folder, device, recipe.seed)
    ranks.place(model, read, qlora.storage_dtype(recipe), lambda _: device, offload=offload)
    return model.train()


def _marked(model: torch.nn.Module, recipe: TrainRecipe) -> None:
    """What Trainer asks a model that `from_pretrained` would have quantized."""
    quantization = qlora.quantization(recipe, torch.float16)
    if quantization is not None:
        from transformers.quantizers.auto import AutoHfQuantizer

        base: Any = unwrap(model)
        base.hf_quantizer, base.is_quantized = AutoHfQuantizer.from_config(quantization), True


def tell_accelerate(trainer: Any) -> None:
    """Let a Trainer take a model as it is sharded, and save it in parts, also where no GPU is.

    Args:
        trainer: Over a model that is sharded already.

    Source: accelerate/state.py, `AcceleratorState.__init__`, which leaves FSDP out for CPUs.
    """
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    if getattr(state, "fsdp_plugin", None) is None:
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, state_dict_type="SHARDED_STATE_DICT"
        )
        state._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
        trainer.is_fsdp_enabled = True
    state.fsdp_plugin.auto_wrap_policy = (
        None  # its units are there; the layers' class has a new name
    )


def start() -> Any:
    """This process's device, with the ranks connected: NCCL between GPUs, gloo between hosts."""
    on_gpu = gpus.device() == "cuda"
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    return (
        torch.device("cuda", torch.accelerator.current_device_index())
        if on_gpu
        else torch.device("cpu")
    )


def _folder(source: str) -> Path:
    """The checkpoint's folder; one of the hub is fetched by rank 0 of this host, once."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors"]
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        snapshot_download(source, allow_patterns=patterns)
    dist.barrier()
    return Path(snapshot_download(source, allow_patterns=patterns, local_files_only=True))


def save_adapter(model: Any, folder: Path) -> None:
    """The adapters of a sharded model as one file; every rank has to call it, rank 0 writes.

    Args:
        model: Of `build_model`.
        folder: As PEFT's `save_pretrained` takes it.
    """
    adapters = {
        name: parameter.full_tensor().cpu()
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    if ranks.world()[0] == 0:
        model.save_pretrained(folder, state_dict=adapters, save_embedding_layers=False)
    dist.barrier()


def reader(folder: Path, device: Any, seed: int = 0) -> ranks.Weights:
    """Tensors of a safetensors checkpoint by parameter name: rank 0 reads, the others are sent.

    Args:
        folder: Of the checkpoint.
        device: Where each tensor arrives, on every rank.
        seed: Of the adapters, which no checkpoint has: each rank draws the same ones.

    Raises:
        ValueError: The checkpoint lacks a tensor; on rank 0, when it is asked for.
    """
    files = _files(folder)
    rank, _ = ranks.world()
    drawn = ranks.noise(seed, device)

    def read(name: str, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        from safetensors import safe_open

        if ".lora_" in name:
            return drawn(name, shape, dtype)
        if rank == 0:
            plain = checkpoint_name(name)
            if plain not in files:
                raise refusal(
                    "source", f"hold {plain}", Said(folder), "name a checkpoint of this model"
                )
            with safe_open(files[plain], "pt") as file:
                whole = file.get_tensor(plain).to(device, dtype)
        else:
            whole = torch.empty(shape, dtype=dtype, device=device)
        dist.broadcast(whole, 0)
        return whole

    return read


def _files(folder: Path) -> dict[str, Path]:
    """Name of each tensor -> the file that holds it."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return {n: folder / f for n, f in json.loads(index.read_text())["weight_map"].items()}
    from safetensors import safe_open

    one = folder / "model.safetensors"
    with safe_open(one, "pt") as file:
        return dict.fromkeys(file.keys(), one)


def checkpoint_name(name: str) -> str:
    """The name of a parameter before PEFT wrapped the model and its layers.

    Example:
        >>> checkpoint_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
        'model.layers.0.mlp.up_proj.weight'
    """
    return re.sub(r"^base_model\.model\.", "", name).replace(".base_layer.", ".")
