"""Before the run: what would stop it, found in seconds and before any download.

Each finding names its fix. Not modelled: network speed, a session's time limit.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fitcast import gpus, models
from fitcast.forecasting.fake import meta_model
from fitcast.recipe import TrainRecipe
from fitcast.step.qlora import add_adapters, count_parameters
from fitcast.training.versions import Finding, too_old
from fitcast.units import show_bytes

if TYPE_CHECKING:
    from fitcast.forecasting.forecast import Forecast


@dataclass(frozen=True)
class Preflight:
    """All findings; prints as a table."""

    findings: list[Finding]

    def __repr__(self) -> str:
        rows = [
            f"{'stop' if f.fix else 'ok':5}{f.name:11}{f.found}{f'; {f.fix}' if f.fix else ''}"
            for f in self.findings
        ]
        return "\n".join(rows)

    def require(self) -> Preflight:
        """Itself, when nothing stands in the way.

        Raises:
            ValueError: Something would stop the run; the message has every fix.
        """
        if stops := [
            f"{f.name} must let the run pass, got {f.found}; {f.fix}"
            for f in self.findings
            if f.fix
        ]:
            raise ValueError("\n".join(stops))
        return self


def preflight(
    recipe: TrainRecipe,
    gpu: gpus.Gpu | None,
    output_dir: str | Path = ".",
    planned: Forecast | None = None,
) -> Preflight:
    """Look at everything that stops runs, without loading or downloading weights.

    Args:
        gpu: What `gpus.detect()` found.
        output_dir: Where checkpoints will go.
        planned: The step's forecast, if there is one.
    """
    weights = _weights(recipe)
    return Preflight(
        [
            _gpu(recipe, gpu),
            _precision(recipe, gpu),
            _memory(gpu, planned),
            _disk(recipe, Path(output_dir), weights),
            _versions(),
            weights,
        ]
    )


def _gpu(recipe: TrainRecipe, gpu: gpus.Gpu | None) -> Finding:
    if gpu is not None:
        return Finding("GPU", f"{gpu.name}, {show_bytes(gpu.total_bytes)}")
    small = Path(models.hub_id(recipe.model)).exists()
    return Finding(
        "GPU",
        "none" + ", and none needed for this model" * small,
        None if small else "switch Runtime > Change runtime type to T4, or take a small model",
    )


def _precision(recipe: TrainRecipe, gpu: gpus.Gpu | None) -> Finding:
    found = recipe.amp_dtype or "float32"
    try:
        refuse_precision(recipe, gpu)
    except ValueError as error:
        return Finding("precision", f"{found} ({error})", "use recipe.for_gpu(gpus.detect())")
    return Finding("precision", found)


def _memory(gpu: gpus.Gpu | None, planned: Forecast | None) -> Finding:
    needed = (
        "no forecast"
        if planned is None
        else f"forecast peak {show_bytes(planned.peak_allocated_bytes)}, with holes up to "
        f"{show_bytes(planned.peak_reserved_bytes[1])}"
    )
    if gpu is None:
        return Finding("memory", f"{needed}, in this machine's own memory")
    free = min(gpu.usable_bytes, gpus.free_bytes() or gpu.usable_bytes)
    fits = planned is None or planned.fits and planned.peak_allocated_bytes <= free
    return Finding(
        "memory",
        f"{needed}, {show_bytes(free)} free",
        None
        if fits
        else "halve micro_batch_size and double gradient_accumulation_steps, then set "
        "loss='chunked' and checkpointed_layers='all'",
    )


def _disk(recipe: TrainRecipe, output_dir: Path, weights: Finding) -> Finding:
    """Room for the download in 16 bits and for three checkpoints (two kept, one being written)."""
    place = next(p for p in (output_dir.absolute(), *output_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if weights.fix and recipe.model not in models.NAMES:  # its config is on the hub, too
        return Finding("disk", f"{show_bytes(free)} free, the model's size is not known")
    model = meta_model(models.config(recipe.model))
    needed = 0 if Path(models.hub_id(recipe.model)).exists() else 2 * count_parameters(model)[0]
    with torch.device("meta"):  # of each trained parameter the weight and two averages, in float32
        needed += 3 * 12 * count_parameters(add_adapters(model, recipe))[0]
    return Finding(
        "disk",
        f"{show_bytes(needed)} needed, enough free"
        if free >= needed
        else f"{show_bytes(free)} free, {show_bytes(needed)} needed",
        None if free >= needed else "delete old runs, or set another output_dir",
    )


def _versions() -> Finding:
    old = too_old()
    return Finding(
        "versions",
        ", ".join(old) or "all recent enough",
        "run the set-up cell, then Runtime > Restart session" if old else None,
    )


def _weights(recipe: TrainRecipe) -> Finding:
    """Whether the weights can be had: on disk, or on the hub and open to this reader."""
    source = models.hub_id(recipe.model)
    if Path(source).exists():
        return Finding("weights", "on this disk")
    return Finding(
        "weights",
        *{
            "open": (f"{source}, open to you",),
            "cached": (f"{source}, downloaded before",),
            "gated": (
                f"{source} is gated",
                "accept its licence on huggingface.co and log in, or take "
                "an ungated copy such as unsloth/Llama-3.2-1B-Instruct",
            ),
            "unknown": (f"{source} is not on the hub", "check the spelling"),
            "silent": ("the hub does not answer", "check the network, or give a local folder"),
        }[ask_hub(source)],
    )


def ask_hub(repository: str, kind: Literal["model", "dataset"] = "model") -> str:
    """Whether a repository of the hub is to be had, in one request and without a download.

    Returns:
        "open", "gated", "unknown" or "silent"; for a silent hub "cached" when the weights are here.
    """
    import huggingface_hub
    from huggingface_hub import errors

    try:
        huggingface_hub.utils.validate_repo_id(repository)
        huggingface_hub.auth_check(repository, repo_type=kind)
        return "open"
    except errors.GatedRepoError:
        return "gated"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return "unknown"
    except (*errors.HfHubHTTPError.__bases__, OSError):  # 5xx, no network, HF_HUB_OFFLINE
        pass  # then what is on this disk decides
    try:
        folder = huggingface_hub.snapshot_download(
            repository, repo_type=kind, local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        return "silent"
    return "cached" if list(Path(folder).glob("*.safetensors")) else "silent"


# --- what Trainer accepts and should not ----------------------------------------------------------


def refuse_precision(recipe: TrainRecipe, gpu: gpus.Gpu | None) -> None:
    """Raise for mixed precision that this machine only emulates or does not have.

    Raises:
        ValueError: bfloat16 on a GPU below capability 8.0, or float16 without a GPU.
    """
    if gpu is not None:
        recipe.check_on(gpu)
    elif recipe.amp_dtype == "float16":
        raise ValueError(
            "amp_dtype must be None or 'bfloat16' without a GPU, got 'float16'; use "
            "recipe.for_gpu(gpus.detect())"
        )


def refuse_silent_failures(
    recipe: TrainRecipe, model: torch.nn.Module, overrides: dict[str, Any]
) -> None:
    """Raise for settings that Trainer accepts and that then crawl, crash late or learn nothing.

    Args:
        overrides: TrainingArguments beyond the recipe's.

    Raises:
        ValueError: Precision that this GPU emulates; 16-bit adapters under a gradient scaler;
            fp16_full_eval, which makes the adapters 16-bit in place; nothing to train.
    """
    refuse_precision(recipe, gpus.detect())
    if overrides.get("fp16_full_eval"):
        raise ValueError(
            "fp16_full_eval must be False in a run that trains, got True; evaluation "
            "would turn the adapters into float16, which cannot be trained"
        )
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("model must have trainable parameters, got none; call qlora.add_adapters")
    if recipe.amp_dtype == "float16" and any(p.dtype == torch.float16 for p in trainable):
        raise ValueError(
            "adapters must be float32 when amp_dtype is 'float16', got float16; the "
            "gradient scaler cannot unscale them, call .float() on each of them"
        )
