"""The levers that make a fine-tune fit, each one small function that says what it saves and why.

Every lever works alone on any Llama-like Hugging Face model, and leaves loss and gradients as they
were (up to rounding). Not modelled: heads with a bias or a soft cap, sliding windows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from types import MethodType

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fitcast.step.lean import head_loss
from fitcast.units import IGNORED

ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,  # what Hopper takes
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]


def unwrap(model: torch.nn.Module) -> torch.nn.Module:
    """The Hugging Face model inside a PEFT model (or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def explicit_kv_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, **_
):
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
        query,
        _repeat_heads(key, groups),
        _repeat_heads(value, groups),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=attention_mask is None and query.shape[2] > 1,
    )
    return output.transpose(1, 2).contiguous(), None


def _repeat_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    batch, heads, seq, head_dim = x.shape
    if groups == 1:
        return x
    return (
        x[:, :, None]
        .expand(batch, heads, groups, seq, head_dim)
        .reshape(batch, heads * groups, seq, head_dim)
    )


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
        return F.rms_norm(
            hidden_states,
            self.weight.shape,
            self.weight.to(hidden_states.dtype),
            self.variance_epsilon,
        )

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
            module.forward = MethodType(forward, module)


def decoder_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's transformer layers, first to last."""
    return list(unwrap(model).model.layers)


def checkpoint_layers(
    model: torch.nn.Module,
    k: int | str = "all",
    *,
    offload: bool = False,
    keep_attention: bool = False,
) -> None:
    """Let the first `k` layers forget their activations and recompute them in backward.

    Saves what k layers keep, except one boundary (batch, seq, hidden) each; costs k forward passes.
    The last layers are the ones that remember: backward frees theirs before it recomputes the first
    ones, so a recomputed layer never comes on top of all the kept ones.

    Args:
        model: A Hugging Face model with `GradientCheckpointingLayer`s, or a PEFT model around it.
        k: How many layers; "all" or 0 to num_layers.
        offload: Keep the boundaries in pinned host memory instead of on the GPU.
        keep_attention: Keep attention's output too, (batch, seq, hidden) a layer, and recompute
            only the rest.

    Raises:
        ValueError: k is larger than the number of layers.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 3.
    """
    layers = decoder_layers(model)
    k = len(layers) if k == "all" else k
    if not 0 <= k <= len(layers):
        raise ValueError(
            f"checkpointed_layers must be from 0 to {len(layers)}, the layers of this "
            f"model, got {k}; use 'all' for every layer"
        )
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < k
        layer._gradient_checkpointing_func = partial(_checkpoint, offload, keep_attention)


def _checkpoint(offload: bool, keep_attention: bool, function: Callable, *args):
    extra = {}
    if keep_attention:
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
    on_host = torch.autograd.graph.saved_tensors_hooks(to_host, from_host)
    with on_host if offload else contextlib.nullcontext():
        return checkpoint(function, *args, use_reentrant=False, **extra)


def to_host(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
    """A copy in host memory, pinned so that the GPU need not wait for it, and where it was."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def from_host(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
    """The tensor back on its device."""
    device, host = packed
    return host.to(device, non_blocking=True)


def chunked_loss(
    hidden: torch.Tensor,
    head: torch.nn.Module,
    labels: torch.Tensor,
    chunk_tokens: int = 512,
    num_items_in_batch: torch.Tensor | int | None = None,
    *,
    lean: bool = False,
    skip_unlabelled: bool = False,
) -> torch.Tensor:
    """Cross entropy from hidden states, `chunk_tokens` rows of logits at a time.

    Saves the logits, (batch x seq, vocab): three float32 copies of them at the peak of the usual
    loss. Each chunk forgets its logits and computes them again in backward, so at most one chunk's
    exist. Costs one more product with the head, or nothing with `lean`.

    PyTorch 2.13 has `F.linear_cross_entropy`, which gives the same (a test holds them together).
    It is not used, because Colab's 2.11 lacks it, and `lean` takes less time.

    Args:
        hidden: (batch, seq, hidden).
        head: The output embedding, hidden -> vocab.
        labels: (batch, seq); each position's target is the next one's label.
        chunk_tokens: Rows of logits alive at once.
        num_items_in_batch: What to divide the sum by; `None` means this batch's labelled tokens.
        lean: Take the gradient together with the logits (`lean.head_loss`; needs a frozen head).
        skip_unlabelled: Compute no logits for prompts and padding. Finding them makes the CPU wait
            for the GPU, so it is worth it for padded batches and not for packed ones.
    """
    rows, targets = hidden.flatten(0, 1), F.pad(labels, (0, 1), value=IGNORED)[:, 1:].reshape(-1)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORED).sum()
    if skip_unlabelled:
        rows, targets = _labelled(rows, targets)
    if lean:
        return head_loss(rows, head.weight, targets, chunk_tokens) / num_items_in_batch
    total = torch.zeros((), dtype=torch.float32, device=hidden.device)
    for chunk, wanted in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        total = total + checkpoint(_summed_loss, chunk, head, wanted, use_reentrant=False)
    return total / num_items_in_batch


def odd_head(model: torch.nn.Module) -> str:
    """What a model does to its logits beside the product with its head; "" for nothing."""
    config = model.config.get_text_config()
    odd = [
        name
        for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
        if getattr(config, name, None) not in (None, 1)
    ]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        odd.append("a bias of its head")
    return " and ".join(odd)


def _labelled(rows: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions with a label; all of them on fake tensors, which have no values to tell."""
    if isinstance(targets, FakeTensor):
        return rows, targets
    kept = (targets != IGNORED).nonzero().squeeze(1)
    return rows.index_select(0, kept), targets.index_select(0, kept)


def _summed_loss(rows: torch.Tensor, head: torch.nn.Module, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(head(rows).float(), targets, reduction="sum")
