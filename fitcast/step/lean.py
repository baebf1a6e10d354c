"""The same mathematics with less kept and less moved: MLP, adapters, rotary, loss written whole.

PyTorch keeps what each operation asks for. Where we know the whole expression, its backward needs
less. Each piece replaces a forward method and can be used alone. Not modelled: activations other
than SiLU, heads with a bias, several adapters active at once (those take the usual path).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import _disable_current_modes

from fitcast.units import IGNORED


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping its two inputs.

    Saves silu(gate), (batch, seq, intermediate): the usual expression keeps it as a factor of the
    product. Costs one more silu in backward.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    @staticmethod
    def forward(ctx, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


def use_lean_mlp(model: torch.nn.Module) -> None:
    """Let every gated MLP of the model (Llama, Qwen, Mistral, Phi) compute with `SwiGLU`.

    Raises:
        ValueError: The model's activation is not SiLU.
    """
    if model.config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            f"mlp must be 'stock' for a model with {model.config.hidden_act}, got "
            "'lean'; the lean one is written for silu"
        )

    def separate(self, x):
        return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))

    def fused(self, x):
        return self.down_proj(SwiGLU.apply(*self.gate_up_proj(x).chunk(2, dim=-1)))

    for module in model.modules():
        if hasattr(module, "down_proj"):
            forward = separate if hasattr(module, "gate_proj") else fused
            module.forward = MethodType(forward, module)


def use_lean_lora(model: torch.nn.Module) -> None:
    """Let each adapter add its share to the base's output in one matrix product.

    Saves time, not bytes: PEFT clones the base's output, scales the adapter's and adds the two,
    three more trips of (batch, seq, out) through memory for each adapted layer.
    """
    from peft.tuners.lora import LoraLayer

    def forward(self, x, *args, **kwargs):
        plain = len(self.active_adapters) == 1 and not (self.disable_adapters or self.merged)
        name = self.active_adapters[0] if plain else None
        # Without autocast a 16-bit base's numbers and the adapters' need PEFT's casts.
        alike = plain and (
            torch.is_autocast_enabled(x.device.type) or x.dtype == self.lora_A[name].weight.dtype
        )
        if not alike or args or kwargs:
            return type(self).forward(self, x, *args, **kwargs)
        base = self.base_layer(x)  # (batch, seq, out)
        down = F.linear(self.lora_dropout[name](x), self.lora_A[name].weight)  # (batch, seq, r)
        up = self.lora_B[name].weight * self.scaling[name]  # (out, r)
        return torch.addmm(base.flatten(0, -2), down.flatten(0, -2), up.T).view_as(base)

    for module in model.modules():
        if isinstance(module, LoraLayer) and hasattr(module, "base_layer"):
            module.forward = MethodType(forward, module)


class Rotary(torch.autograd.Function):
    """Each pair (a, b) of x turned by its position's angle: (a cos - b sin, b cos + a sin).

    Saves time, not bytes: half the trips of x through memory that negating, joining, two products
    and a sum take. Backward is the same turn, the other way.

    Source: Su et al. 2021, "RoFormer", section 3.2.2.
    """

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turn(x, cos, sin, torch.result_type(x, cos))

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.dtype), None, None


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype):
    turned = torch.empty_like(x, dtype=dtype)
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin)
    return turned


def apply_rotary(query, key, cos, sin, unsqueeze_dim: int = 1):
    """Query and key, (batch, heads, seq, head_dim), turned by `Rotary`.

    Args:
        cos, sin: (batch, seq, rotated); only the first `rotated` of each head's numbers are turned,
            and the second half of these angles repeats the first.
    """
    rotated = cos.shape[-1]
    cos, sin = (t[..., : rotated // 2].unsqueeze(unsqueeze_dim) for t in (cos, sin))
    if rotated == query.shape[-1]:
        return Rotary.apply(query, cos, sin), Rotary.apply(key, cos, sin)
    return tuple(
        torch.cat([Rotary.apply(x[..., :rotated], cos, sin), x[..., rotated:]], dim=-1)
        for x in (query, key)
    )


def use_lean_rotary(model: torch.nn.Module) -> None:
    """Let every attention layer of the model turn its query and key with `apply_rotary`.

    transformers calls a function of the model's file; each layer gets its forward method again,
    with that one name looked up elsewhere.

    Raises:
        ValueError: The model pairs its numbers in another way (neighbours, as GLM and Cohere).
    """
    stock = "apply_rotary_pos_emb"
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        if stock in forward.__code__.co_names:
            if not _turns_alike(forward.__globals__[stock]):
                raise ValueError(
                    f"rotary must be 'stock' for {type(module).__name__}, got 'lean'; "
                    "the lean one pairs number i with i + half, this model does not"
                )
            ours = FunctionType(
                forward.__code__,
                forward.__globals__ | {stock: apply_rotary},
                forward.__name__,
                forward.__defaults__,
                forward.__closure__,
            )
            ours.__kwdefaults__ = forward.__kwdefaults__
            module.forward = MethodType(ours, module)


@functools.cache
def _turns_alike(stock: Callable) -> bool:
    """Whether a model's own function turns random numbers as `apply_rotary` does."""
    with _disable_current_modes():  # real numbers, also where a forecast runs on fake ones
        random = torch.Generator().manual_seed(0)
        query, key = torch.randn(2, 1, 2, 3, 8, generator=random)  # (batch, heads, seq, head_dim)
        angles = torch.randn(1, 3, 4, generator=random).repeat(1, 1, 2)
        turned = [f(query, key, angles.cos(), angles.sin()) for f in (stock, apply_rotary)]
        return all(torch.allclose(*pair, atol=1e-6) for pair in zip(*turned, strict=True))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets, chunk_tokens):
        grad_hidden = torch.empty_like(hidden)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunks = (tensor.split(chunk_tokens) for tensor in (hidden, targets, grad_hidden))
        for rows, wanted, grad in zip(*chunks, strict=True):
            wanted, labelled = wanted.clamp(min=0)[:, None], (wanted != IGNORED)[:, None]
            logits = F.linear(rows, weight).float()  # (chunk, vocab), the only tensor of its size
            logits -= logits.amax(-1, keepdim=True)  # logsumexp would hold a second one
            at_target = logits.gather(1, wanted)
            sums = logits.exp_().sum(-1, keepdim=True)
            total += ((sums.log() - at_target) * labelled).sum()
            # d loss / d logits = softmax(logits) - one at the target
            probabilities = logits.div_(sums)
            probabilities.scatter_add_(1, wanted, -torch.ones_like(sums))
            grad.copy_(probabilities.mul_(labelled).to(weight.dtype) @ weight)
        ctx.save_for_backward(grad_hidden)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_total, None, None, None


def head_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk_tokens: int = 512
) -> torch.Tensor:
    """Summed cross entropy of a frozen head, its gradient taken while the logits are there.

    Saves all but `chunk_tokens` rows of logits, like `levers.chunked_loss`, and the second product
    with the head that recomputing costs: cross entropy's gradient is known as soon as the logits
    are, so forward keeps it, (tokens, hidden), and backward only scales it.

    Args:
        hidden: (tokens, hidden).
        weight: (vocab, hidden), frozen.
        targets: (tokens,), -100 where there is none.

    Returns:
        The sum over labelled tokens, a float32 scalar.
    """
    return _HeadLoss.apply(hidden, weight, targets, chunk_tokens)
