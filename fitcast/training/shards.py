"""Merge an adapter into a model that is larger than the memory: tensor by tensor, on the CPU.

The base's safetensors files are read one tensor at a time, the adapter's product is added where it
has one, and what has been summed is written whenever it fills a file. So the memory holds one
file's worth of the result and one layer in float32, whatever the model's size.

Not modelled: models whose files name their tensors otherwise than the running model does (some
mixtures of experts; `export.merge` takes those, in as much memory as they are large), DoRA,
adapters of embeddings.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fitcast import models
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from peft import LoraConfig

SHARD_BYTES = 2 * 1024**3
INDEX = "model.safetensors.index.json"
BESIDE = ("config.json", "generation_config.json")
PREFIX, A, B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


def merge_shards(
    recipe: TrainRecipe,
    adapter: str | Path,
    folder: str | Path,
    base: Literal["original", "dequantized"] = "dequantized",
    shard_bytes: int = SHARD_BYTES,
    tokenizer: Any = None,
) -> int:
    """Write base + adapter as a plain float16 model; returns the bytes of its weights' files.

    Args:
        recipe: That of the training run.
        adapter: Folder written by `export.save_adapter`.
        folder: Of the merged model; made if need be.
        base: As for `export.merge`.
        shard_bytes: Of a file, about; what the memory has to hold.
        tokenizer: Written beside it with its chat template, as by `export.save_merged`.

    Raises:
        ValueError: An adapter that is not plain LoRA on linear layers, or has no weight in the
            base's files; a sum that float16 cannot hold; the base's own folder. Until then the
            model that the folder holds stays.
        FileNotFoundError: The base's weights are not on this disk.
    """
    from safetensors.torch import load_file

    source, target = _base_folder(recipe), Path(folder)
    if target.resolve() == source.resolve():
        raise refusal("folder", "be another one than the base's", target, "say a new folder")
    target.mkdir(parents=True, exist_ok=True)
    for part in target.glob("part-*.safetensors"):
        part.unlink()  # of a merge that was killed
    config = _plain_lora(adapter)
    learned = load_file(Path(adapter) / "adapter_model.safetensors")
    pairs = _pairs(learned)
    quantized = _quantized(recipe) if base == "dequantized" else frozenset()
    writer, met = _Writer(target, shard_bytes), set()
    for name, tensor in _tensors(source):
        module = name.removesuffix(".weight")
        if module in quantized:
            tensor = _through_nf4(tensor, recipe)
        if module in pairs:
            met.add(module)
            tensor = _sum(tensor, *pairs[module], config)
        writer.add(name, _in_float16(name, tensor))
    if missing := sorted(set(pairs) - met):
        raise refusal(
            "adapter",
            "belong to weights in the base's files",
            Said(f"none for {missing[0]}"),
            "merge with export.merge, which loads the whole model",
        )
    _copy_beside(source, target)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(target))
    return writer.close()


def _base_folder(recipe: TrainRecipe) -> Path:
    """Where the base's files are: its folder, or what the hub's client has kept of it."""
    source = models.hub_id(recipe.model)
    if Path(source).exists():
        return Path(source)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))


def _plain_lora(adapter: str | Path) -> LoraConfig:
    from peft import LoraConfig

    config: Any = LoraConfig.from_pretrained(str(adapter))
    special = [
        name
        for name in (
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "modules_to_save",
            "fan_in_fan_out",
        )
        if getattr(config, name)
    ]
    if special:
        raise refusal(
            "adapter", "be plain LoRA", Said(", ".join(special)), "merge with export.merge"
        )
    return config


def _pairs(learned: dict[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A (rank, in) and B (out, rank) of each adapted layer, by the layer's name."""
    other = [name for name in learned if not name.endswith((A, B))]
    if other:
        raise refusal(
            "adapter",
            "hold LoRA's matrices only",
            Said(f"{other[0]}, too"),
            "merge with export.merge",
        )
    return {
        name.removesuffix(A).removeprefix(PREFIX): (matrix, learned[name.removesuffix(A) + B])
        for name, matrix in learned.items()
        if name.endswith(A)
    }


def _quantized(recipe: TrainRecipe) -> frozenset[str]:
    """Names of the layers that bitsandbytes keeps in 4 bits: all linear ones but the head."""
    from fitcast.forecasting.fake import meta_model

    if recipe.base != "nf4":
        raise refusal(
            "base",
            f"be 'original' for a recipe in {recipe.base}",
            "dequantized",
            "nothing was quantized",
        )
    model: Any = meta_model(models.config(recipe.model))
    head = model.get_output_embeddings()
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    )


def _tensors(source: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model's files, one at a time."""
    from safetensors import safe_open

    files = sorted(source.glob("model*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no model.safetensors in {source}; load the base once")
    for path in files:
        with safe_open(path, "pt") as file:
            names = list(file.keys())
        for name in names:  # opened anew: pages of a file that stays mapped stay in memory
            with safe_open(path, "pt") as file:
                yield name, file.get_tensor(name)


def _through_nf4(weight: torch.Tensor, recipe: TrainRecipe) -> torch.Tensor:
    """What training saw of a weight: rounded to 16 values for each block of 64."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    loaded = weight.to(qlora.storage_dtype(recipe))
    packed, state = quantize_4bit(
        loaded, quant_type="nf4", compress_statistics=recipe.double_quant, blocksize=64
    )
    return dequantize_4bit(packed, state)


def _sum(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, config: LoraConfig
) -> torch.Tensor:
    """W + (alpha / rank) B A, in float32. W: (out, in)."""
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return torch.addmm(weight.float(), b.float(), a.float(), alpha=scale)


def _in_float16(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    rounded = tensor.to(torch.float16)
    if not rounded.isfinite().all():
        raise refusal(
            name,
            "be finite in torch.float16",
            Said("infinity or NaN"),
            "merge with export.merge and dtype='bfloat16', or look at what was trained",
        )
    return rounded


class _Writer:
    """Writes tensors into numbered files as they come; `close` names the files and lists them."""

    def __init__(self, folder: Path, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        self.waiting: dict[str, torch.Tensor] = {}
        self.files: list[list[str]] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        size = sum(waiting.nbytes for waiting in self.waiting.values())
        if self.waiting and size + tensor.nbytes > self.shard_bytes:
            self._write()
        self.waiting[name] = tensor.contiguous()

    def _write(self) -> None:
        from safetensors.torch import save_file

        self.files.append(list(self.waiting))
        path = self.folder / f"part-{len(self.files)}.safetensors"
        save_file(self.waiting, path, metadata={"format": "pt"})
        self.waiting.clear()

    def close(self) -> int:
        """Bytes of all files. An older model goes now: all that takes long has been written."""
        self._write()
        _remove_model(self.folder)
        count, where, total = len(self.files), {}, 0
        for n, names in enumerate(self.files, start=1):
            name = f"model-{n:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
            path = (self.folder / f"part-{n}.safetensors").replace(self.folder / name)
            total += path.stat().st_size
            where |= dict.fromkeys(names, name)
        if count > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (self.folder / INDEX).write_text(json.dumps(index, indent=1), "utf-8")
        return total


def _remove_model(folder: Path) -> None:
    """Remove a model's weights, which transformers might read in the place of newer ones.

    Its index first: what a kill leaves in between does not load, rather than load as a mixture.
    """
    for pattern in (INDEX, "model*.safetensors"):
        for path in folder.glob(pattern):
            path.unlink()


def _copy_beside(source: Path, target: Path) -> None:
    """The base's configuration, saying float16."""
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copy(source / name, target / name)
    path = target / BESIDE[0]
    config = json.loads(path.read_text("utf-8"))
    config.pop("torch_dtype", None)
    config.pop("quantization_config", None)
    path.write_text(json.dumps(config | {"dtype": "float16", "use_cache": True}, indent=2), "utf-8")
