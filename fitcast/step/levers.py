"""The levers that make a fine-tune fit, each one small function that says what it saves and why.

Every lever works alone on any Llama-like Hugging Face model, and leaves loss and gradients as they
were (up to rounding). A lever refuses, by name, a model whose own code computes something else,
and a model in which it finds nothing to change. Not modelled: RMSNorms that multiply by 1 + weight
(Gemma), attention with a soft cap, sinks or a bias.

Shapes: B batch, S sequence, H hidden, V vocabulary, T tokens (B x S).
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fitcast.step.alike import alike, random_numbers, real_numbers, stand_in
from fitcast.step.host import HostCheckpoints
from fitcast.units import Said, refusal

ATTENTION_KERNELS = [
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,  # what Hopper takes
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
]
# What some models hand to their attention beside the scaled product, under transformers' names.
BEYOND_THE_PRODUCT = ("softcap", "s_aux", "sinks", "position_bias", "indices", "block_indices")


def unwrap(model: Any) -> Any:
    """The Hugging Face model inside a PEFT model (or the model itself)."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def explicit_kv_attention(
    module: torch.nn.Module | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Attention with every key/value head repeated for its query heads before the kernel sees it.

    Saves the attention scores, (batch, heads, seq, seq) in float32, on GPUs without FlashAttention:
    with grouped-query attention and no mask, transformers asks the kernel to repeat the heads, the
    memory-efficient kernel cannot, and PyTorch falls back to writing all scores out. Repeating them
    costs two tensors of the query's size.

    Args:
        module: The attention layer; says whether attention is causal where `is_causal` does not.
        query: (batch, heads, seq, head_dim).
        key, value: (batch, kv_heads, seq, head_dim).
        attention_mask: `None` for plain causal attention, else (batch, 1, seq, seq); a sliding
            window is in it.
        dropout: Probability of dropping a weight.
        scaling: Of the scores; `None` is head_dim ** -0.5.
        is_causal: Whether a position sees no later one, where there is no mask.
        more: What else transformers hands over, most of it for other kernels.

    Returns:
        (batch, seq, heads, head_dim) and `None` for the weights, which are never built.

    Raises:
        ValueError: The model's scores are more than a scaled product: a soft cap, sinks, a bias.

    Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp, `can_use_mem_efficient_attention`;
    transformers/integrations/sdpa_attention.py.
    """
    for name in BEYOND_THE_PRODUCT:
        if more.get(name) is not None:
            raise _not_on_a_kernel(f"a model whose attention has {name}")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    groups = query.shape[1] // key.shape[1]
    output = F.scaled_dot_product_attention(
        query,
        _repeat_heads(key, groups),
        _repeat_heads(value, groups),
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=bool(is_causal) and attention_mask is None and query.shape[2] > 1,
    )
    return output.transpose(1, 2).contiguous(), None


def _not_on_a_kernel(whom: str) -> ValueError:
    return refusal(
        "attention",
        f"be 'stock' or 'eager' for {whom}",
        "explicit_kv",
        "the kernels know a scaled product with a mask, and nothing else",
    )


def _repeat_heads(x: torch.Tensor, groups: int) -> torch.Tensor:
    batch, heads, seq, head_dim = x.shape
    if groups == 1:
        return x
    return (
        x[:, :, None]
        .expand(batch, heads, groups, seq, head_dim)
        .reshape(batch, heads * groups, seq, head_dim)
    )


def use_explicit_kv_attention(model: Any) -> None:
    """Make `explicit_kv_attention` the attention of a Hugging Face model.

    Raises:
        ValueError: transformers runs this model on none of PyTorch's kernels (Gemma 2 caps its
            scores, gpt-oss has sinks, Inkling a bias of positions), or lets nobody replace its
            attention.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    try:
        model.get_correct_attn_implementation("sdpa")
    except ValueError as error:
        raise _not_on_a_kernel(type(model).__name__) from error
    if _has_position_bias(model):  # transformers says that SDPA runs it, and leaves the bias out
        raise _not_on_a_kernel(f"{type(model).__name__}, whose attention has position_bias")
    AttentionInterface.register("explicit_kv", explicit_kv_attention)
    AttentionMaskInterface.register("explicit_kv", sdpa_mask)
    set_attention(model, "explicit_kv")


def _has_position_bias(model: Any) -> bool:
    """Whether a model's own attention takes a bias: soft caps and sinks may be given as `None`."""
    homes = {sys.modules[type(module).__module__] for module in model.modules()}
    own = [getattr(home, "eager_attention_forward", None) for home in homes]
    return any("position_bias" in inspect.signature(eager).parameters for eager in own if eager)


def use_stock_attention(model: Any) -> None:
    """The attention that transformers gives this model by itself: PyTorch's kernels, else eager."""
    model.set_attn_implementation(model.get_correct_attn_implementation(None))


def set_attention(model: Any, name: Literal["explicit_kv", "eager"]) -> None:
    """Set a model's attention by the name that transformers has for it, and see that it is set.

    Raises:
        ValueError: The model has an attention that cannot be replaced; transformers only warns.
    """
    model.set_attn_implementation(name)
    if attention_of(model) != name:
        raise refusal(
            "attention",
            f"be 'stock' for {type(model).__name__}",
            name,
            "its layers do not ask transformers' AttentionInterface for a function",
        )


def attention_of(model: Any) -> str:
    """The name of a model's attention, as transformers has it: "sdpa", "eager", "explicit_kv"."""
    return model.config.get_text_config()._attn_implementation


def use_native_norm(model: torch.nn.Module) -> None:
    """Compute every RMSNorm with PyTorch's own `rms_norm`.

    Saves the float32 copies of the hidden states, (batch, seq, hidden) x 4 bytes, that the
    step-by-step version keeps for backward: the fused kernel keeps its input and one number a row.
    Norms without a weight stay as they are.

    Raises:
        ValueError: A norm with a weight that computes something else: Gemma's multiplies by
            1 + weight in float32, which PyTorch's would round to 16 bits. Or no RMSNorm at all.

    Source: aten/src/ATen/native/layer_norm.cpp, `_fused_rms_norm`.
    """
    norms = [
        module
        for module in model.modules()
        if type(module).__name__.endswith("RMSNorm") and getattr(module, "weight", None) is not None
    ]
    if not norms:
        raise refusal(
            "norm",
            "be 'stock' for a model without RMSNorms with a weight",
            "native",
            "nothing would change",
        )
    for norm in norms:
        if not _multiplies_by_weight(norm):
            raise refusal(
                "norm",
                f"be 'stock' for a model with {type(norm).__name__}",
                "native",
                "PyTorch's is x / rms(x) x weight, this model's is not",
            )
    for norm in norms:
        norm.forward = MethodType(_native_norm, norm)


def _native_norm(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(
        hidden_states,  # (B, S, H), or (B, S, heads, head_dim)
        self.weight.shape,
        self.weight.to(hidden_states.dtype),
        _epsilon(self),
    )


def _epsilon(norm: Any) -> float | None:
    """What an RMSNorm adds to the mean square; Llama's name for it, or PyTorch's."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


@real_numbers()
def _multiplies_by_weight(norm: Any) -> bool:
    """Whether a norm's own forward is PyTorch's `rms_norm`, asked with another weight."""
    if isinstance(norm, torch.nn.RMSNorm):
        return True  # it is PyTorch's
    shape = tuple(norm.weight.shape)
    weight = random_numbers(*shape)
    x = 1e-3 * random_numbers(2, 3, *shape, seed=1)  # so small that epsilon weighs, too
    # `torch.rms_norm`: in a forecast, a stand-in without numbers has the place of `F.rms_norm`
    return alike(
        lambda: type(norm).forward(stand_in(norm, weight=weight), x),
        lambda: torch.rms_norm(x, shape, weight, _epsilon(norm)),
    )


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    """The model's transformer layers, first to last.

    Raises:
        ValueError: They are not where a Llama's are.
    """
    base = unwrap(model)
    layers = getattr(getattr(base, "model", None), "layers", None)
    if layers is None:
        raise refusal(
            "model",
            "have its layers in model.layers, as Llama does",
            Said(type(base).__name__),
            "see fitcast.models.NAMES",
        )
    return list(layers)


def checkpoint_layers(
    model: torch.nn.Module,
    k: int | Literal["all"] = "all",
    *,
    offload: bool | int = False,
    keep_attention: bool | int = False,
) -> None:
    """Let the first `k` layers forget their activations and recompute them in backward.

    Saves what k layers keep, except one boundary (batch, seq, hidden) each; costs k forward passes.
    The last layers are the ones that remember: backward frees theirs before it recomputes the first
    ones, so a recomputed layer never comes on top of all the kept ones.

    Args:
        model: A Hugging Face model with `GradientCheckpointingLayer`s, or a PEFT model around it.
        k: How many layers; "all" or 0 to num_layers.
        offload: Keep the boundaries in pinned host memory instead of on the GPU: True those of all
            k layers; a number below k those of the first ones, each fetched a layer ahead of time.
            Later ones are needed sooner, and bound to be on the GPU at the peak.
        keep_attention: Keep attention's output too, (batch, seq, hidden) a layer, and recompute
            only the rest: True in all k layers; a number up to k in the last ones of them, whose
            backward comes first and frees them first.

    Raises:
        ValueError: k is larger than the number of layers, or the layers cannot forget.

    Source: Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", section 3.
    """
    layers = decoder_layers(model)
    k = len(layers) if k == "all" else k
    if not 0 <= k <= len(layers):
        raise refusal(
            "checkpointed_layers",
            f"be from 0 to {len(layers)}, the layers of this model",
            k,
            "use 'all' for every layer",
        )
    if k and not all(hasattr(layer, "gradient_checkpointing") for layer in layers):
        raise refusal(
            "checkpointed_layers",
            f"be 0 for layers of {type(layers[0]).__name__}",
            k,
            "they are no GradientCheckpointingLayer of transformers and would forget nothing",
        )
    m = k if offload is True else int(offload)
    if m and not m <= k - (offload is not True):
        raise refusal(
            "offload_checkpoints",
            f"be True or below {k}, the layers that are checkpointed",
            offload,
            "the last one's checkpoint is needed at once",
        )
    kept = k if keep_attention is True else int(keep_attention)
    if kept > k:
        raise refusal(
            "keep_attention",
            f"be True or at most {k}, the layers that are checkpointed",
            keep_attention,
            "the other layers keep everything",
        )
    host = HostCheckpoints(ahead=offload is not True)
    unwrap(model).host_checkpoints = host if m else None
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < k
        layer._gradient_checkpointing_func = partial(
            _checkpoint, _where(host, index, m), index >= k - kept
        )


def _where(host: HostCheckpoints, index: int, m: int) -> Callable:
    """A context for a layer's forward pass: its checkpoint waits on the host, or stays."""
    if index < m:
        return partial(host.of_layer, first=index == 0)
    return host.behind if m and index == m else contextlib.nullcontext


def _checkpoint(waits: Callable, keep_attention: bool, function: Callable, *args: Any) -> Any:
    extra: dict[str, Any] = {}
    if keep_attention:
        extra["context_fn"] = partial(create_selective_checkpoint_contexts, ATTENTION_KERNELS)
    with waits():
        return checkpoint(function, *args, use_reentrant=False, **extra)


def pinned_host_bytes(model: Any) -> int:
    """Host memory that a model's checkpoints have locked so far."""
    host = getattr(unwrap(model), "host_checkpoints", None)
    return 0 if host is None else host.n_bytes


def odd_head(model: Any) -> tuple[str, ...]:
    """Names of what a model does to its logits beside the product with its head: mostly none."""
    config = model.config.get_text_config()
    odd = [
        name
        for name in ("logits_scaling", "logit_scale", "final_logit_softcapping")
        if getattr(config, name, None) not in (None, 1)
    ]
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        odd.append("a bias of its head")
    if not odd and not _logits_are_the_heads(model):
        odd.append(f"logits not seen to be its head's product ({type(model).__name__})")
    return tuple(odd)


@real_numbers()
def _logits_are_the_heads(model: Any) -> bool:
    """Whether a model's forward hands out what its head gives, its layers and head replaced."""
    from transformers.modeling_outputs import MoeModelOutputWithPast  # has what the others have

    head = model.get_output_embeddings()
    names = [name for name, module in model.named_children() if module is head]
    vocabulary = model.config.get_text_config().vocab_size
    hidden = 100 * random_numbers(1, 2, vocabulary)  # (B, S, V), so large that a cap would bite
    trunk = MoeModelOutputWithPast(last_hidden_state=hidden)

    def forward() -> torch.Tensor:
        pieces = {"model": lambda *_, **__: trunk, names[0]: lambda rows: rows}
        ids = torch.zeros(1, 2, dtype=torch.long, device="cpu")
        return type(model).forward(stand_in(model, **pieces), input_ids=ids).logits

    return alike(forward, lambda: hidden)
