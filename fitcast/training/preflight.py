"""Before the run: what would stop it, found in seconds and before any download.

Each finding names its fix. Not modelled: network speed, a session's time limit.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from fitcast import gpus, models
from fitcast.forecasting.fake import meta_model
from fitcast.recipe import TrainRecipe
from fitcast.step.overflow import float16_warning
from fitcast.step.qlora import add_adapters, count_parameters
from fitcast.training import host, several
from fitcast.training.versions import Finding, too_old
from fitcast.units import Said, refusal, show_bytes

if TYPE_CHECKING:
    from fitcast.forecasting.forecast import Forecast

# A step of 8 192 tokens is then 6 x 1e8 x 8192 = 5e12 operations: about a minute on two CPU cores.
SMALL_PARAMETERS = 100_000_000


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
            str(refusal(f.name, "let the run pass", Said(f.found), f.fix))
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
        recipe: Of the run to come.
        gpu: What `gpus.detect()` found.
        output_dir: Where checkpoints will go.
        planned: The step's forecast, if there is one.
    """
    weights = _weights(recipe)
    model = _skeleton(recipe, weights)
    return Preflight(
        [
            _gpu(gpu, model),
            *several.together(),
            *_copies(recipe, model),
            _precision(recipe, gpu, model),
            _memory(gpu, planned),
            *_merge(recipe, Path(output_dir), model),  # before adapters are added for the next
            _disk(recipe, Path(output_dir), model),
            _versions(),
            weights,
        ]
    )


def _skeleton(recipe: TrainRecipe, weights: Finding) -> torch.nn.Module | None:
    """The model without its weights; `None` where not even its config is to be had."""
    on_the_hub = not Path(models.hub_id(recipe.model)).exists()
    if weights.fix and on_the_hub and recipe.model not in models.NAMES:
        return None
    try:
        config = models.config(recipe.model)
    except (ValueError, OSError):
        if weights.fix is None:
            raise
        return None
    return meta_model(config)


def _gpu(gpu: gpus.Gpu | None, model: torch.nn.Module | None) -> Finding:
    if gpu is not None:
        compiled, fix = gpus.compiled_for(), None
        if not gpus.has_kernels(gpu.capability, compiled):
            needed = "sm_{}{}".format(*gpu.capability)
            fix = (
                f"this PyTorch has kernels for {', '.join(compiled)} and none for {needed}: "
                "fitcast doctor says what to install"
            )
        return Finding("GPU", f"{gpu.name}, {show_bytes(gpu.total_bytes)}", fix)
    if model is not None and count_parameters(model)[1] <= SMALL_PARAMETERS:
        return Finding("GPU", "none, and none needed for this model")
    return Finding(
        "GPU", "none", "switch Runtime > Change runtime type to T4, or take a small model"
    )


def _copies(recipe: TrainRecipe, model: torch.nn.Module | None) -> list[Finding]:
    """Room for what several ranks load: the whole model in 16 bits each, or once."""
    if model is None:
        return []
    return several.copies(2 * count_parameters(model)[1], recipe.world_size)


def _precision(recipe: TrainRecipe, gpu: gpus.Gpu | None, model: torch.nn.Module | None) -> Finding:
    """Mixed precision that the card lacks stops; float16 that the family overflows, too."""
    found = recipe.amp_dtype or "float32"
    try:
        refuse_precision(recipe, gpu)
    except ValueError as error:
        return Finding("precision", f"{found} ({error})", "use recipe.for_gpu(gpus.detect())")
    if found == "float16" and model is not None and gpu is not None:
        kind: Any = model.config
        if warning := float16_warning(kind.model_type, gpu):
            what, _, remedy = warning.rpartition("; ")
            return Finding("precision", f"float16: {what}", remedy)
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
    remedy = (
        "halve micro_batch_size and double gradient_accumulation_steps, then set "
        "loss='chunked' and checkpointed_layers='all'"
    )
    return Finding("memory", f"{needed}, {show_bytes(free)} free", None if fits else remedy)


def _disk(recipe: TrainRecipe, output_dir: Path, model: torch.nn.Module | None) -> Finding:
    """Room for the download in 16 bits and for three checkpoints (two kept, one being written)."""
    free = shutil.disk_usage(_existing(output_dir)).free
    if model is None:
        return Finding("disk", f"{show_bytes(free)} free, the model's size is not known")
    needed = 0 if Path(models.hub_id(recipe.model)).exists() else 2 * count_parameters(model)[1]
    with torch.device("meta"):  # of each trained parameter the weight and two averages, in float32
        needed += 3 * 12 * count_parameters(add_adapters(model, recipe))[0]
    if free >= needed:
        return Finding("disk", f"{show_bytes(needed)} needed, enough free")
    return Finding(
        "disk",
        f"{show_bytes(free)} free, {show_bytes(needed)} needed",
        "delete old runs, or set another output_dir",
    )


def _merge(recipe: TrainRecipe, output_dir: Path, model: torch.nn.Module | None) -> list[Finding]:
    """What `export.merge` will lack afterwards, if anything: a remark, since training does not."""
    if recipe.lora_rank is None or model is None:
        return []
    needed = 2 * count_parameters(model)[1]  # the whole model in 16 bits, in memory and on the disk
    free, room = host.memory()[1], shutil.disk_usage(_existing(output_dir)).free
    short = [
        f"{show_bytes(have)} of {what}"
        for what, have in (("memory", free), ("disk", room))
        if have is not None and have < needed
    ]
    if not short:
        return []
    found = f"{show_bytes(needed)} of host memory and of disk, for the whole model in 16 bits"
    free_now = f"{found}; now free: {' and '.join(short)}, so keep the adapters beside their base"
    return [Finding("merge", free_now)]


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that is there already."""
    return next(p for p in (folder.absolute(), *folder.absolute().parents) if p.exists())


def _versions() -> Finding:
    old = too_old()
    return Finding(
        "versions",
        ", ".join(old) or "all recent enough",
        "run the set-up cell, then Runtime > Restart session" if old else None,
    )


def _weights(recipe: TrainRecipe) -> Finding:
    """Whether the weights can be had: whole on this disk, or on the hub and open to this reader."""
    source = models.hub_id(recipe.model)
    if Path(source).exists():
        fault = _config_fault(source) or weights_fault(Path(source))
        if fault is None:
            return Finding("weights", "on this disk")
        return Finding(
            "weights", f"{fault} in {source}", "give the folder that `save_pretrained` wrote"
        )
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


def _config_fault(source: str) -> str | None:
    try:
        models.config(source)
    except (ValueError, OSError):
        return "no config.json that transformers can read"
    return None


def weights_fault(folder: Path) -> str | None:
    """What keeps `from_pretrained` from loading a folder's weights, in words; `None`: nothing.

    Looks at the files' headers, which say how long each is: a copy that broke off is found.

    Args:
        folder: With one model.safetensors, or with the files of a model.safetensors.index.json.
    """
    from safetensors import SafetensorError, safe_open

    names, index = ["model.safetensors"], folder / "model.safetensors.index.json"
    if index.is_file() and not (folder / names[0]).is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            return f"{index.name} is damaged"
    for name in names:
        if not (folder / name).is_file():
            return f"no {name}"
        try:
            with safe_open(folder / name, "pt"):
                pass
        except (SafetensorError, OSError):
            return f"{name} is not whole"
    return None


def ask_hub(repository: str, kind: Literal["model", "dataset"] = "model") -> str:
    """Whether a repository of the hub is to be had, in one request and without a download.

    Args:
        repository: owner/name.
        kind: What it holds.

    Returns:
        "open", "gated", "unknown" or "silent"; for a silent hub "cached" when a model's weights
        are here, all of them.
    """
    import huggingface_hub
    from huggingface_hub import errors

    library_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # httpx's, or its heir's

    try:
        huggingface_hub.utils.validate_repo_id(repository)
        huggingface_hub.auth_check(repository, repo_type=kind)
        return "open"
    except errors.GatedRepoError:
        return "gated"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return "unknown"
    except (library_error, OSError):  # 5xx, no network, HF_HUB_OFFLINE
        pass  # then what is on this disk decides
    try:
        folder = huggingface_hub.snapshot_download(
            repository, repo_type=kind, local_files_only=True
        )
    except errors.LocalEntryNotFoundError:
        return "silent"
    return "cached" if weights_fault(Path(folder)) is None else "silent"


# --- what Trainer accepts and should not ----------------------------------------------------------


def refuse_precision(recipe: TrainRecipe, gpu: gpus.Gpu | None) -> None:
    """Raise for mixed precision that this machine only emulates or does not have.

    Args:
        recipe: Uses amp_dtype and base.
        gpu: What `gpus.detect()` found.

    Raises:
        ValueError: bfloat16 on a GPU below capability 8.0, or float16 without a GPU.
    """
    if gpu is not None:
        recipe.check_on(gpu)
    elif recipe.amp_dtype == "float16":
        raise refusal(
            "amp_dtype",
            "be None or 'bfloat16' without a GPU",
            "float16",
            "use recipe.for_gpu(gpus.detect())",
        )


def refuse_silent_failures(
    recipe: TrainRecipe, model: torch.nn.Module, overrides: dict[str, Any]
) -> None:
    """Raise for settings that Trainer accepts and that then crawl, crash late or learn nothing.

    Args:
        recipe: That of the run.
        model: Loaded, with adapters if the recipe has them.
        overrides: TrainingArguments beyond the recipe's.

    Raises:
        ValueError: Precision that this GPU emulates; an override that the recipe decides, that the
            loop would not read, or that would undo its checkpointing; evaluation that makes the
            adapters 16-bit in place; 16-bit adapters under a gradient scaler; nothing to train.
    """
    refuse_precision(recipe, gpus.detect())
    _refuse_overrides(recipe, overrides)
    trainable = [p for p in model.parameters() if p.requires_grad]
    if not trainable:
        raise refusal("model", "have trainable parameters", Said("none"), "call qlora.add_adapters")
    if recipe.amp_dtype == "float16" and any(p.dtype == torch.float16 for p in trainable):
        raise refusal(
            "adapters",
            "be float32 when amp_dtype is 'float16'",
            Said("float16"),
            "the gradient scaler cannot unscale them, call .float() on each of them",
        )


_LAYERS = ("be left to the recipe", "it decides layer by layer, set its checkpointed_layers")
_TRAINS = "be False in a run that trains"
# TrainingArguments that a run here cannot have: the rule, and what to change.
REFUSED = {
    "activation_checkpointing": _LAYERS,
    "gradient_checkpointing": _LAYERS,
    "fp16_full_eval": (
        _TRAINS,
        "evaluation would turn the adapters into float16, which cannot be trained",
    ),
    "bf16_full_eval": (
        _TRAINS,
        "evaluation would turn the adapters into bfloat16, too coarse to be trained",
    ),
    "auto_find_batch_size": (
        "be left to the recipe",
        "the batch would no longer be its own, ask fitcast.fit for one",
    ),
}
_ADAM = "leave it out, the optimizer is the recipe's"
# TrainingArguments that the loop here never reads, since loss, optimizer and number of steps are
# the recipe's: the only value that is true of the run (`None`: none is), and what to change.
UNREAD = {
    "label_smoothing_factor": (0.0, "leave it out, the loss is the recipe's"),
    "num_train_epochs": (None, "leave it out, set the recipe's max_steps"),
    "adam_beta1": (0.9, _ADAM),
    "adam_beta2": (0.999, _ADAM),
    "adam_epsilon": (1e-8, _ADAM),
    "optim_args": (None, _ADAM),
    "optim_target_modules": (None, _ADAM),
}


def _refuse_overrides(recipe: TrainRecipe, overrides: dict[str, Any]) -> None:
    for name, (rule, remedy) in REFUSED.items():
        if overrides.get(name):
            raise refusal(name, rule, overrides[name], remedy)
    for name, (value, remedy) in UNREAD.items():
        if overrides.get(name, value) != value:
            rule = f"be {value!r}, or left out: nothing here reads it"
            raise refusal(name, rule, overrides[name], remedy)
    for name, value in recipe.trainer_settings().items():
        if name in overrides and overrides[name] != value:
            raise refusal(
                name,
                f"be {value!r} as in the recipe",
                overrides[name],
                "change the recipe instead, which the forecast and the checkpoints know",
            )
