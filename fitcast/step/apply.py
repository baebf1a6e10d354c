"""The levers on a model of somebody's own script: Trainer, SFTTrainer and loops become lean.

    trainer = Trainer(model=model, args=arguments, ...)
    print(fitcast.apply_levers(trainer.model))
    trainer.train()

Losses and gradients stay what they were, up to rounding. A lever that is asked for by name and that
this model cannot take is refused with the reason; one that is not named is left, and said to be.

The loss is changed where every trainer gets it: in the model's own forward, when it is given labels
and trains. TRL's trainers ask for none there: from 1.16 on they have a chunked loss of their own,
and keep it. Losses that want the logits while training (label smoothing, distillation, a
`compute_loss_func`) get the model's own. Not modelled: adapters that are added later.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any, Literal

import torch

from fitcast.recipe import CHOICES
from fitcast.step import fused
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
)
from fitcast.step.losses import chunked_loss
from fitcast.step.qlora import HEAD_LOSSES, USES
from fitcast.step.tiles import use_tiled_mlp
from fitcast.units import Said, refusal

# What each lever is called beside the model's own code, and who pulls it.
BEST: dict[str, tuple[str, Callable[[Any], None]]] = {
    "attention": ("explicit_kv", use_explicit_kv_attention),
    "norm": ("native", use_native_norm),
    "mlp": ("lean", use_lean_mlp),
    "adapters": ("lean", use_lean_lora),
    "rotary": ("lean", use_lean_rotary),
}
PULLED = (*BEST, "loss")  # unless they are named
STOCK = ("stock", "full")
# Arguments of forward for which the model's own code runs: what they ask for is in the logits.
WANT_LOGITS = ("fused_lm_head", "shift_labels", "logits_to_keep", "return_dict")


@dataclass(frozen=True)
class Levers:
    """What was changed, and what was left and why; prints as lines.

    Attributes:
        applied: Lever -> what it is now, as "norm": "native".
        left: Lever -> why the model's own code stays.
    """

    applied: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        changed = [f"{name}: {value}" for name, value in self.applied.items()]
        return "\n".join([*changed, *(f"{name}: left, {why}" for name, why in self.left.items())])


def apply_levers(
    model: Any,
    *,
    attention: str | None = None,
    norm: str | None = None,
    mlp: str | None = None,
    adapters: str | None = None,
    rotary: str | None = None,
    loss: str | None = None,
    loss_chunk_tokens: int = 512,
    mlp_tile_tokens: int | None = None,
    embedding: Literal["stock", "host"] = "stock",
    causal_padding: bool = False,
    checkpointed_layers: int | Literal["all"] | None = None,
    offload_checkpoints: bool | int = False,
    keep_attention: bool | int = False,
) -> Levers:
    """Make a model lean in place, adapters or not; by default with all that it can take.

    Call it on `trainer.model`: what comes later (adapters that a trainer adds) is not seen.

    Args:
        model: A causal language model of transformers, or a PEFT model around one.
        attention: "explicit_kv" repeats key and value heads, so that a card without FlashAttention
            writes no scores out; "eager"; "stock" leaves it.
        norm: "native" is PyTorch's own RMSNorm; "stock".
        mlp: "lean" keeps one tensor less, "compiled" as little in one kernel; "stock".
        adapters: "lean" adds LoRA's share in one product, "in_place" into the base's output;
            "stock".
        rotary: "lean" has half the memory traffic, "compiled" one kernel; "stock".
        loss: "chunked" builds `loss_chunk_tokens` rows of logits at a time, "lean" likewise with
            their gradient, for a head that is frozen, "fused" and "compiled" in fewer operations;
            "full". By default lean where the head is frozen, else chunked. What is compiled is so
            by torch.compile, in the first step.
        loss_chunk_tokens: Rows of logits alive at once.
        mlp_tile_tokens: Tokens that an MLP computes at a time; `None` is all at once.
        embedding: "host" keeps a frozen one's weights in host memory and sends rows; "stock".
        causal_padding: Forget the mask of batches whose padding is all behind.
        checkpointed_layers: The first k layers, or "all", forget their activations; `None` leaves
            that to the trainer. Whoever switches gradient checkpointing on later gets this one.
        offload_checkpoints: Keep what they need in host memory; a number: of so many layers.
        keep_attention: Keep attention's output, too; a number: the last so many of them.

    Returns:
        What was changed and what was left.

    Raises:
        ValueError: A lever that was named and that this model cannot take: a soft cap, sinks, DoRA,
            `lora_bias`, an activation other than SiLU, nothing to change; or no such value.
    """
    base, found = unwrap(model), Levers()
    if not hasattr(base, "get_output_embeddings"):
        raise refusal(
            "model", "be a causal language model of transformers, or PEFT's around one",
            Said(type(base).__name__), "give trainer.model",
        )  # fmt: skip
    asked = dict(attention=attention, norm=norm, mlp=mlp, adapters=adapters, rotary=rotary)
    for name, value in asked.items():
        _pull(base, name, value, found)
    _use_loss(base, loss, loss_chunk_tokens, found)
    _use_where_asked(base, mlp_tile_tokens, embedding, found)
    if causal_padding:
        fused.use_causal_padding(base)
        found.applied["causal_padding"] = "True"
    if checkpointed_layers is not None:
        _use_checkpoints(base, checkpointed_layers, offload_checkpoints, keep_attention)
        found.applied["checkpointed_layers"] = str(checkpointed_layers)
    elif offload_checkpoints or keep_attention:
        raise refusal(
            "checkpointed_layers", "be given with offload_checkpoints or keep_attention", None,
            'write checkpointed_layers="all"',
        )  # fmt: skip
    return found


def _pull(base: Any, name: str, value: str | None, found: Levers) -> None:
    """Pull one lever; a model that cannot take it is an error if it was named, else a remark."""
    best, use = BEST[name]
    if value is not None and value not in CHOICES[name]:
        raise refusal(name, f"be one of {', '.join(CHOICES[name])}", value, f"for example {best!r}")
    if value in STOCK:
        found.left[name] = "as asked"
        return
    if value == "eager":
        use = functools.partial(set_attention, name="eager")
    elif name in USES and value is not None:
        use = USES[name][value]
    try:
        use(base)
    except ValueError as error:
        if value is not None:
            raise
        found.left[name] = str(error)
    else:
        found.applied[name] = value or best


def _use_where_asked(base: Any, tile: int | None, embedding: str, found: Levers) -> None:
    """What costs time on short sequences, and is pulled by name alone."""
    if tile is not None:
        use_tiled_mlp(base, tile)
        found.applied["mlp_tile_tokens"] = str(tile)
    if embedding not in CHOICES["embedding"]:
        raise refusal("embedding", "be stock or host", embedding, "for example 'host'")
    if embedding == "host":
        use_host_embedding(base)
        found.applied["embedding"] = embedding


def _use_checkpoints(
    base: Any, k: int | Literal["all"], offload: bool | int, keep: bool | int
) -> None:
    """Now, and whenever a trainer switches its own gradient checkpointing on."""
    if keep and attention_of(base) == "eager":
        raise refusal(
            "keep_attention", f"be False for {type(base).__name__}, whose attention is written out",
            True, "no kernel's output is there to keep",
        )  # fmt: skip
    checkpoint_layers(base, k, offload=offload, keep_attention=keep)

    def again(self: Any, *_: Any, **__: Any) -> None:
        checkpoint_layers(self, k, offload=offload, keep_attention=keep)

    base.gradient_checkpointing_enable = MethodType(again, base)


def _use_loss(base: Any, loss: str | None, chunk_tokens: int, found: Levers) -> None:
    """Let forward compute the loss in chunks when it is given labels and trains."""
    if loss is not None and loss not in CHOICES["loss"]:
        raise refusal("loss", f"be one of {', '.join(CHOICES['loss'])}", loss, "for example 'lean'")
    odd = odd_head(base)
    if getattr(base.config.get_text_config(), "output_router_logits", False):
        odd += ("a router's loss",)
    if loss == "full" or odd and loss is None:
        found.left["loss"] = "as asked" if loss == "full" else f"the model has {' and '.join(odd)}"
        return
    if odd:
        raise refusal(
            "loss", f"be 'full' for a model with {' and '.join(odd)}", loss,
            "chunks of logits would leave that out",
        )  # fmt: skip
    if not hasattr(base, "_stock_forward"):  # applied again: around the model's own, once
        base._stock_forward = base.forward
    base._loss, base._loss_chunk_tokens = loss or "auto", chunk_tokens
    base.forward = MethodType(_like(type(base).forward), base)
    ours = loss or "lean where the head is frozen, else chunked"
    if _is_trls(base):
        ours = f"TRL's own where its trainer asks for it, else {ours}"
    found.applied["loss"] = ours


def _is_trls(base: Any) -> bool:
    """Whether TRL's trainer put a forward there that takes the loss in chunks, and will ask for it.

    Source: trl/trainer/utils.py, `add_fused_lm_head`.
    """
    code = getattr(base._stock_forward, "__code__", None)
    return "fused_lm_head" in getattr(code, "co_varnames", ())


def _like(stock: Callable) -> Callable:
    """`_forward_with_loss` with the signature of a model's own, which Trainer reads."""

    @functools.wraps(stock)
    def forward(self: Any, *args: Any, **inputs: Any) -> Any:
        return _forward_with_loss(self, *args, **inputs)

    return forward


def _forward_with_loss(
    self: Any, *args: Any, labels: Any = None, num_items_in_batch: Any = None, **inputs: Any
) -> Any:
    """Forward of a causal language model whose loss never builds all logits.

    Args:
        labels: (batch, seq); without, and outside of training, the model's own forward runs.
        num_items_in_batch: Labelled tokens of the whole effective batch.
        args, inputs: What the model takes.
    """
    if labels is None or not self.training or any(inputs.get(name) for name in WANT_LOGITS):
        more = {"labels": labels, "num_items_in_batch": num_items_in_batch}
        given = {name: value for name, value in more.items() if value is not None}
        return self._stock_forward(*args, **given, **inputs)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    head = self.get_output_embeddings()
    hidden = _trunk(self)(*args, **inputs).last_hidden_state  # (B, S, H)
    loss = chunked_loss(
        hidden,
        head,
        labels,
        self._loss_chunk_tokens,
        num_items_in_batch,
        lean=HEAD_LOSSES.get(self._loss, self._loss == "auto" and _is_frozen(head)),
    )
    return CausalLMOutputWithPast(loss=loss)  # pyright: ignore[reportArgumentType]


def _trunk(base: Any) -> Any:
    """What gives hidden states: `base_model` is the model itself where its prefix names no part.

    Llama 4's text model has the prefix of the one with images; `odd_head` saw it call `model`.
    """
    return base.model if base.base_model is base else base.base_model


def _is_frozen(head: Any) -> bool:
    return type(head) is torch.nn.Linear and head.bias is None and not head.weight.requires_grad
