"""QLoRA in parts: load in 4 bits, add adapters, compute the loss, step.

The forecast runs this very code on fake tensors, so what it predicts is what trains. The levers
that make a run fit are in `levers` and `lean`. Not modelled: mixtures of experts, encoder-decoders.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from fitcast import gpus, models
from fitcast.recipe import TrainRecipe
from fitcast.step import compat, compiled, fused, losses, ranks
from fitcast.step.embedding import use_host_embedding
from fitcast.step.lean import use_lean_lora, use_lean_mlp, use_lean_rotary
from fitcast.step.levers import (
    attention_of,
    checkpoint_layers,
    odd_head,
    set_attention,
    unwrap,
    use_explicit_kv_attention,
    use_native_norm,
    use_stock_attention,
)
from fitcast.step.losses import chunked_loss
from fitcast.step.tiles import use_tiled_mlp
from fitcast.units import IGNORED, Said, refusal

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig


def storage_dtype(recipe: TrainRecipe) -> torch.dtype:
    """Dtype of every weight that is not quantized: the base's own, or for nf4 autocast's.

    A 16-bit checkpoint kept in another dtype than autocast's would be copied at every use.
    """
    name = (recipe.amp_dtype or "float32") if recipe.base == "nf4" else recipe.base
    return getattr(torch, name)


def quantization(
    recipe: TrainRecipe, storage: torch.dtype = torch.uint8
) -> BitsAndBytesConfig | None:
    """How bitsandbytes stores the base; `None` for a base that is not quantized.

    Args:
        recipe: Uses base, double_quant, amp_dtype.
        storage: Dtype of the numbers that hold the packed bytes; sharding wants a floating one.
    """
    from transformers import BitsAndBytesConfig

    return (
        BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",  # the default is fp4
            bnb_4bit_use_double_quant=recipe.double_quant,
            bnb_4bit_compute_dtype=storage_dtype(recipe),  # the default, float32, is slow on a GPU
            bnb_4bit_quant_storage=storage,
        )
        if recipe.base == "nf4"
        else None
    )


def load_base(
    recipe: TrainRecipe,
    source: str | None = None,
    quantization_config: BitsAndBytesConfig | None = None,
) -> torch.nn.Module:
    """The frozen base model on the device, in 4 bits (nf4) or in `recipe.base`.

    Args:
        recipe: Uses model, base, double_quant, kbit_upcast, amp_dtype, expandable_segments.
        source: Folder or hub id of the weights; by default where `models.hub_id` says.
        quantization_config: Of a 4-bit base; by default what `quantization` says.

    Sources: QLoRA (Dettmers et al. 2023, sections 2 and 3) for NF4 and double quantization.
    """
    from transformers import AutoModelForCausalLM

    gpus.use_expandable_segments(recipe.expandable_segments)
    model = AutoModelForCausalLM.from_pretrained(
        source or models.hub_id(recipe.model),
        quantization_config=quantization_config or quantization(recipe),
        dtype=storage_dtype(recipe),
        device_map={"": gpus.device()},
        use_safetensors=True,
    )
    for module in model.modules():
        # On AVX512-BF16 CPUs an evaluation repacks the weights for a kernel without a backward:
        # training after it would silently lose every gradient that passes through the base.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            vars(module)["support_avx512bf16_for_cpu"] = False
    return prepare_base(model, recipe)


def prepare_base(model: Any, recipe: TrainRecipe) -> Any:
    """Freeze a base model that will carry adapters; with `kbit_upcast`, waste memory on purpose.

    PEFT's `prepare_model_for_kbit_training` turns every non-4-bit weight into float32, embeddings
    and head included: 4 bytes instead of 2 for each, and float32 activations between the layers.
    """
    model.config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(recipe.lora_rank is None)
        quantized = hasattr(parameter, "quant_type")
        if recipe.kbit_upcast and not quantized and parameter.dtype != torch.float32:
            parameter.data = parameter.data.to(torch.float32)
    return model


def add_adapters(model: Any, recipe: TrainRecipe) -> Any:
    """The model with trainable LoRA adapters (float32) on `recipe.lora_targets`.

    float32 is on purpose: an update of learning rate x gradient vanishes in 16-bit weights, and
    the gradient scaler refuses to unscale 16-bit gradients. Costs 4 bytes per parameter.

    Raises:
        ValueError: A target matches no linear layer of this model.

    Source: LoRA (Hu et al. 2021, section 4.1).
    """
    from peft import LoraConfig, get_peft_model

    if recipe.lora_rank is None:
        return model
    linear = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")
        }
    )
    missing = [t for t in recipe.lora_targets if t not in linear]
    if recipe.lora_targets != "all-linear" and missing:
        raise refusal(
            "lora_targets",
            f"name linear layers of {recipe.model}",
            Said(", ".join(missing)),
            f"it has {', '.join(linear)}",
        )
    compat.look_past()
    targets = recipe.lora_targets
    model.enable_input_require_grads()  # else a reentrant checkpoint cuts the gradient off
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none",
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # PEFT 0.21 asks transformers 5.23 under the old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def count_parameters(model: torch.nn.Module) -> tuple[int, int]:
    """Trainable and total parameters; a 4-bit weight counts its values, not its packed bytes."""
    trainable = total = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        total += state.shape.numel() if state is not None else parameter.numel()
        trainable += parameter.numel() if parameter.requires_grad else 0
    return trainable, total


# Field of a recipe: its value: who changes the model. "stock" leaves it.
USES: dict[str, dict[str, Callable[[Any], None]]] = {
    "norm": {"native": use_native_norm},
    "mlp": {"lean": use_lean_mlp, "compiled": compiled.use_compiled_mlp},
    "adapters": {"lean": use_lean_lora, "in_place": fused.use_adapters_in_place},
    "rotary": {"lean": use_lean_rotary, "compiled": compiled.use_compiled_rotary},
}
# Losses that take their gradient together with the logits.
HEAD_LOSSES = {"lean": True, "fused": losses.fused_loss, "compiled": compiled.compiled_loss}


def apply_levers(model: Any, recipe: TrainRecipe) -> Any:
    """Set attention, norm, MLP, adapters, rotary and checkpointing as the recipe says.

    Raises:
        ValueError: A lever for which this model's own code computes something else, or in which
            there is nothing to change; the message names the field.
    """
    base = unwrap(model)
    if recipe.loss != "full" and (odd := odd_head(base)):
        raise refusal(
            "loss",
            f"be 'full' for a model with {' and '.join(odd)}",
            recipe.loss,
            "chunks of logits would leave that out",
        )
    _set_attention(base, recipe)
    for field, uses in USES.items():
        value = getattr(recipe, field)
        if value != "stock":
            uses[value](base)
    if recipe.causal_padding:
        fused.use_causal_padding(base)
    if recipe.embedding == "host":
        use_host_embedding(base)
    if recipe.mlp_tile_tokens is not None:
        use_tiled_mlp(base, recipe.mlp_tile_tokens)
    checkpoint_layers(
        base,
        recipe.checkpointed_layers,
        offload=recipe.offload_checkpoints,
        keep_attention=recipe.keep_attention,
    )
    return model


def _set_attention(base: Any, recipe: TrainRecipe) -> None:
    if recipe.attention == "explicit_kv":
        use_explicit_kv_attention(base)
    elif recipe.attention == "eager":
        set_attention(base, "eager")
    else:
        use_stock_attention(base)
    if recipe.keep_attention and attention_of(base) == "eager":
        raise refusal(
            "keep_attention",
            f"be False for {type(base).__name__}, whose attention transformers writes out",
            True,
            "no kernel's output is there to keep",
        )


def autocast(recipe: TrainRecipe, device: str) -> torch.autocast:
    """The recipe's mixed precision as a context: autocast to amp_dtype, or nothing."""
    return torch.autocast(
        device,
        dtype=getattr(torch, recipe.amp_dtype or "float16"),
        enabled=recipe.amp_dtype is not None,
    )


def compute_loss(
    model: Any,
    batch: dict[str, torch.Tensor],
    recipe: TrainRecipe,
    num_items_in_batch: torch.Tensor | int | None = None,
) -> torch.Tensor:
    """Cross entropy of the labelled tokens, in float32, with or without building all the logits.

    Args:
        model: A causal language model, PEFT or not.
        batch: input_ids, labels (batch, seq; -100 is ignored), optionally attention_mask.
        recipe: Uses loss and loss_chunk_tokens.
        num_items_in_batch: Labelled tokens of the whole effective batch. The loss is the sum over
            tokens divided by it, so that micro batches add up; `None` divides by this batch's own.
    """
    if ranks.is_wrapped(model):
        return model(loss_of=(batch, recipe, num_items_in_batch))
    return loss_within(model, batch, recipe, num_items_in_batch)


def loss_within(
    model: Any,
    batch: dict[str, torch.Tensor],
    recipe: TrainRecipe,
    num_items_in_batch: torch.Tensor | int | None = None,
    whole: Any = None,
) -> torch.Tensor:
    """`compute_loss` inside the forward of a wrapper, or without one.

    Args:
        model, batch, recipe, num_items_in_batch: As for `compute_loss`.
        whole: Called for all the logits; by default the model.
    """
    if recipe.loss == "full":
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return (whole or model)(**batch, **extra).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = unwrap(model)
    hidden = base.model(**inputs).last_hidden_state  # (batch, seq, hidden)
    return chunked_loss(
        hidden,
        base.get_output_embeddings(),
        batch["labels"],
        recipe.loss_chunk_tokens,
        num_items_in_batch,
        lean=HEAD_LOSSES.get(recipe.loss, False),
        skip_unlabelled="attention_mask" in batch,
    )


def build_optimizer(model: torch.nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters.

    State per parameter: AdamW 8 bytes; 8-bit Adam 2.03 (8 for tensors below 4096 elements). The
    paged variant keeps it in memory that CUDA moves to the host when the GPU is full.

    With `flat_optimizer` its `flat` is the `fused.Flat` of them: `gather` goes before unscaling.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    flat = fused.Flat(trainable) if recipe.flat_optimizer else None
    made: Any = _optimizer_of(recipe)(
        [flat.parameter] if flat else trainable,
        lr=recipe.learning_rate,
        weight_decay=recipe.weight_decay,
    )
    if flat is not None:
        made.flat = flat
        made.register_step_post_hook(lambda *_: flat.clear())
    return made


def _optimizer_of(recipe: TrainRecipe) -> Callable[..., torch.optim.Optimizer]:
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit

    paged = recipe.optimizer == "paged_adamw_8bit" and gpus.device() == "cuda"
    return PagedAdamW8bit if paged else AdamW8bit  # no paging on a CPU


def training_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[dict[str, torch.Tensor]],
    recipe: TrainRecipe,
    scaler: torch.amp.GradScaler | None = None,
) -> torch.Tensor:
    """One optimizer step over the micro batches: accumulate, unscale, clip, update, clear.

    Args:
        batches: gradient_accumulation_steps dicts of input_ids, labels, maybe attention_mask.
        scaler: Needed for float16 autocast; `None` otherwise.

    Returns:
        The loss, a float32 scalar: mean over all labelled tokens of all micro batches.
    """
    batches = list(batches)
    num_items: Any = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in batches)
    num_items = num_items.clamp(min=1)  # no label anywhere: a loss of 0, and not NaN in all weights
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    losses = []
    for batch in batches:
        with ranks.exchanging(model, last=batch is batches[-1]):
            with autocast(recipe, batch["input_ids"].device.type):
                loss = compute_loss(model, batch, recipe, num_items)
            scaler.scale(loss).backward()
        losses.append(loss.detach())
        del loss  # its graph would keep the embeddings and their gradient through the next forward
    flat: fused.Flat | None = getattr(optimizer, "flat", None)
    if flat is not None:
        flat.gather()
    scaler.unscale_(optimizer)
    if recipe.max_grad_norm:  # 0 is "do not clip", as for Trainer
        trainable = [p for p in model.parameters() if p.requires_grad]
        torch.nn.utils.clip_grad_norm_(trainable, recipe.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    if flat is not None:  # a step that overflowed was none, and has cleared nothing
        flat.clear()
    return torch.stack(losses).sum()
