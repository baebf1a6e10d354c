"""QLoRA in parts: load in 4 bits, add adapters, and the levers that make the rest fit.

Each lever is one small function, usable alone on any Llama-like Hugging Face model. The forecast
runs this very code on fake tensors, so what it predicts is what trains.

Not modelled: mixtures of experts, encoder-decoders, models whose head has a bias or a soft cap.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import MethodType

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from . import hardware, shapes
from .recipe import TrainRecipe


def storage_dtype(recipe: TrainRecipe) -> torch.dtype:
    """Dtype of every weight that is not quantized: the base's own, or for nf4 autocast's.

    A 16-bit checkpoint kept in another dtype than autocast's would be copied at every use.
    """
    name = (recipe.amp_dtype or "float32") if recipe.base == "nf4" else recipe.base
    return getattr(torch, name)


def load_base(recipe: TrainRecipe, source: str | None = None) -> torch.nn.Module:
    """The frozen base model on the device, in 4 bits (nf4) or in `recipe.base`.

    Args:
        recipe: Uses model, base, double_quant, kbit_upcast, amp_dtype.
        source: Folder or hub id of the weights; by default where `shapes.hub_id` says.

    Sources: QLoRA (Dettmers et al. 2023, sections 2 and 3) for NF4 and double quantization.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",  # the default is fp4
        bnb_4bit_use_double_quant=recipe.double_quant,
        bnb_4bit_compute_dtype=storage_dtype(recipe),  # the default, float32, is slow on a GPU
    ) if recipe.base == "nf4" else None
    model = AutoModelForCausalLM.from_pretrained(
        source or shapes.hub_id(recipe.model), quantization_config=quantization,
        dtype=storage_dtype(recipe), device_map={"": hardware.device()})
    for module in model.modules():
        # On AVX512-BF16 CPUs an evaluation repacks the weights for a kernel without a backward:
        # training after it would silently lose every gradient that passes through the base.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return prepare_base(model, recipe)


def prepare_base(model: torch.nn.Module, recipe: TrainRecipe) -> torch.nn.Module:
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


def add_adapters(model: torch.nn.Module, recipe: TrainRecipe) -> torch.nn.Module:
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
    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules()
                     if isinstance(module, torch.nn.Linear) and not name.endswith("lm_head")})
    missing = [t for t in recipe.lora_targets if t not in linear]
    if recipe.lora_targets != "all-linear" and missing:
        raise ValueError(f"lora_targets must name linear layers of {recipe.model}, got "
                         f"{', '.join(missing)}; it has {', '.join(linear)}")
    targets = recipe.lora_targets
    model.enable_input_require_grads()  # else a reentrant checkpoint cuts the gradient off
    config = LoraConfig(
        r=recipe.lora_rank, lora_alpha=recipe.lora_alpha, lora_dropout=recipe.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        bias="none", task_type="CAUSAL_LM")
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


# --- levers ---------------------------------------------------------------------------------------


def apply_levers(model: torch.nn.Module, recipe: TrainRecipe) -> torch.nn.Module:
    """Set attention, norm and checkpointing of the model as the recipe says."""
    base = unwrap(model)
    if recipe.attention == "explicit_kv":
        use_explicit_kv_attention(base)
    else:
        base.set_attn_implementation("eager" if recipe.attention == "eager" else "sdpa")
    if recipe.norm == "native":
        use_native_norm(base)
    checkpoint_layers(base, recipe.checkpointed_layers, offload=recipe.offload_checkpoints)
    return model


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The Hugging Face model inside a PEFT model (or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def explicit_kv_attention(module, query, key, value, attention_mask, dropout=0.0, scaling=None,
                          **_):
    """Attention with every key/value head repeated for its query heads before the kernel sees it.

    Saves the attention scores, (batch, heads, seq, seq) in float32, on GPUs without FlashAttention:
    with grouped-query attention and no mask, transformers asks the kernel to repeat the heads, the
    memory-efficient kernel cannot, and PyTorch falls back to writing all scores out. Repeating them
    costs two tensors of the query's size.

    Args:
        query: (batch, heads, seq, head_dim).
        key, value: (batch, kv_heads, seq, head_dim).
        attention_mask: `None` for plain causal attention, else (batch, 1, seq, seq).

    Returns:
        (batch, seq, heads, head_dim) and `None` for the weights, which are never built.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `can_use_mem_efficient_attention`.
    """
    groups = query.shape[1] // key.shape[1]
    output = F.scaled_dot_product_attention(
        query, _repeat_heads(key, groups), _repeat_heads(value, groups), attn_mask=attention_mask,
        dropout_p=dropout, scale=scaling, is_causal=attention_mask is None and query.shape[2] > 1)
    return output.transpose(1, 2).contiguous(), None


def _repeat_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    batch, heads, seq, head_dim = x.shape
    if groups == 1:
        return x
    return x[:, :, None].expand(batch, heads, groups, seq, head_dim).reshape(
        batch, heads * groups, seq, head_dim)


def use_explicit_kv_attention(model: torch.nn.Module) -> None:
    """Make `explicit_kv_attention` the attention of a Hugging Face model."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register("explicit_kv", explicit_kv_attention)
    AttentionMaskInterface.register("explicit_kv", sdpa_mask)
    model.set_attn_implementation("explicit_kv")


def use_native_norm(model: torch.nn.Module) -> None:
    """Compute every RMSNorm with PyTorch's own `rms_norm`.

    Saves the float32 copies of the hidden states, (batch, seq, hidden) x 4 bytes, that the
    step-by-step version keeps for backward: the fused kernel keeps its input and one number a row.

    Source: aten/src/ATen/native/layer_norm.cpp, `_fused_rms_norm`.
    """
    def forward(self, hidden_states):
        return F.rms_norm(hidden_states, self.weight.shape, self.weight.to(hidden_states.dtype),
                          self.variance_epsilon)

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's transformer layers, first to last."""
    return list(unwrap(model).model.layers)


def checkpoint_layers(model: torch.nn.Module, k: int | str = "all", offload: bool = False) -> None:
    """Let the first `k` layers forget their activations and recompute them in backward.

    Saves what k layers keep, except one boundary (batch, seq, hidden) each; costs k forward passes.
    The last layers are the ones that remember: backward frees theirs before it recomputes the first
    ones, so a recomputed layer never comes on top of all the kept ones.

    Args:
        model: A Hugging Face model with `GradientCheckpointingLayer`s, or a PEFT model around it.
        k: How many layers; "all" or 0 to num_layers.
        offload: Keep the boundaries in pinned host memory instead of on the GPU.

    Raises:
        ValueError: k is larger than the number of layers.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 3.
    """
    layers = decoder_layers(model)
    k = len(layers) if k == "all" else k
    if not 0 <= k <= len(layers):
        raise ValueError(f"checkpointed_layers must be from 0 to {len(layers)}, the layers of this "
                         f"model, got {k}; use 'all' for every layer")
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < k
        layer._gradient_checkpointing_func = _checkpoint_on_host if offload else _checkpoint


def _checkpoint(function: Callable, *args):
    return checkpoint(function, *args, use_reentrant=False)


def _checkpoint_on_host(function: Callable, *args):
    with torch.autograd.graph.saved_tensors_hooks(to_host, from_host):
        return checkpoint(function, *args, use_reentrant=False)


def to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    """A copy in host memory, pinned so that the GPU need not wait for it, and where it was."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def from_host(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    """The tensor back on its device."""
    device, host = packed
    return host.to(device, non_blocking=True)


# --- the step ------------------------------------------------------------------------------------


def compute_loss(model: torch.nn.Module, batch: dict, recipe: TrainRecipe,
                 num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
    """Cross entropy of the labelled tokens, in float32, with or without building all the logits.

    Args:
        model: A causal language model, PEFT or not.
        batch: input_ids, labels (batch, seq; -100 is ignored), optionally attention_mask.
        recipe: Uses loss and loss_chunk_tokens.
        num_items_in_batch: Labelled tokens of the whole effective batch. The loss is the sum over
            tokens divided by it, so that micro batches add up; `None` divides by this batch's own.
    """
    if recipe.loss == "full":
        extra = {} if num_items_in_batch is None else {"num_items_in_batch": num_items_in_batch}
        return model(**batch, **extra).loss
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    base = unwrap(model)
    hidden = base.model(**inputs).last_hidden_state  # (batch, seq, hidden)
    return chunked_loss(hidden, base.get_output_embeddings(), batch["labels"],
                        recipe.loss_chunk_tokens, num_items_in_batch)


def chunked_loss(hidden: torch.Tensor, head: torch.nn.Module, labels: torch.Tensor,
                 chunk_tokens: int = 512, num_items_in_batch: torch.Tensor | int | None = None,
                 ) -> torch.Tensor:
    """Cross entropy from hidden states, `chunk_tokens` rows of logits at a time.

    Saves the logits, (batch x seq, vocab): up to four float32 copies of them at the peak of the
    usual loss. Each chunk forgets its logits and computes them again in backward, so at most one
    chunk's exist. Costs one more product with the head.

    Args:
        hidden: (batch, seq, hidden).
        head: The output embedding, hidden -> vocab.
        labels: (batch, seq); each position's target is the next one's label.
        chunk_tokens: Rows of logits alive at once.
        num_items_in_batch: What to divide the sum by; `None` means this batch's labelled tokens.
    """
    targets = F.pad(labels, (0, 1), value=-100)[:, 1:].reshape(-1)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != -100).sum()
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for rows, wanted in zip(hidden.flatten(0, 1).split(chunk_tokens), targets.split(chunk_tokens),
                            strict=True):
        total = total + checkpoint(_summed_loss, rows, head, wanted, use_reentrant=False)
    return total / num_items_in_batch


def _summed_loss(rows: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(rows).float(), targets, reduction="sum")


def build_optimizer(model: torch.nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """The recipe's optimizer over the trainable parameters.

    State per parameter: AdamW 8 bytes; 8-bit Adam 2.03 (8 for tensors below 4096 elements). The
    paged variant keeps it in memory that CUDA moves to the host when the GPU is full.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    settings = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trainable, **settings)
    import bitsandbytes as bnb

    paged = recipe.optimizer == "paged_adamw_8bit" and hardware.device() == "cuda"
    kind = bnb.optim.PagedAdamW8bit if paged else bnb.optim.AdamW8bit  # no paging on a CPU
    return kind(trainable, **settings)


def training_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: Iterable[dict],
                  recipe: TrainRecipe, scaler: torch.amp.GradScaler | None = None) -> torch.Tensor:
    """One optimizer step over the micro batches: accumulate, unscale, clip, update, clear.

    Args:
        batches: gradient_accumulation_steps dicts of input_ids, labels, maybe attention_mask.
        scaler: Needed for float16 autocast; `None` otherwise.

    Returns:
        The loss, a float32 scalar: mean over all labelled tokens of all micro batches.
    """
    batches = list(batches)
    num_items = sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    losses = []
    for batch in batches:
        device = batch["input_ids"].device.type
        with torch.autocast(device, dtype=getattr(torch, recipe.amp_dtype or "float16"),
                            enabled=recipe.amp_dtype is not None):
            loss = compute_loss(model, batch, recipe, num_items)
        scaler.scale(loss).backward()
        losses.append(loss.detach())
    scaler.unscale_(optimizer)
    trainable = [p for p in model.parameters() if p.requires_grad]
    torch.nn.utils.clip_grad_norm_(trainable, recipe.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).sum()
