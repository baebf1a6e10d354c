"""The same mathematics with less kept and less moved: MLP, adapters, rotary written whole.

PyTorch keeps what each operation asks for. Where we know the whole expression, its backward needs
less. Each piece replaces a forward method and can be used alone. A model whose own code computes
something else is refused, and so is one in which there is nothing to replace. Not modelled:
activations other than SiLU, DoRA and other variants of LoRA, several adapters active at once
(those take the usual path).

Shapes: B batch, S sequence, H hidden, I intermediate, r rank.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
import torch.nn.functional as F

from fitcast.step.alike import alike, random_numbers, real_numbers, stand_in
from fitcast.units import refusal


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, keeping its two inputs.

    Saves silu(gate), (batch, seq, intermediate): the usual expression keeps it as a factor of the
    product. Costs one more silu in backward.

    Source: Shazeer 2020, "GLU Variants Improve Transformer".
    """

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)  # (B, S, I) each
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        grad_gate = torch.ops.aten.silu_backward(grad * up, gate)
        return grad_gate, F.silu(gate).mul_(grad)


def _separate_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(SwiGLU.apply(self.gate_proj(x), self.up_proj(x)))


def _fused_mlp(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(SwiGLU.apply(*self.gate_up_proj(x).chunk(2, dim=-1)))


def use_lean_mlp(model: torch.nn.Module) -> None:
    """Let every gated MLP of the model (Llama, Qwen, Mistral, Phi) compute with `SwiGLU`.

    Raises:
        ValueError: An MLP that computes something else (another activation, factors of its own), or
            no gated MLP at all.
    """
    mlps = gated_mlps(model)
    if not mlps:
        raise _nothing_to_change("mlp", "lean", "a gated MLP (gate_proj, up_proj, down_proj)")
    for module in mlps:
        if not _computes_swiglu(module):
            raise refusal(
                "mlp",
                f"be 'stock' for a model with {type(module).__name__}{_activation(module)}",
                "lean",
                "the lean one is down(silu(gate) x up) and nothing else",
            )
    for module in mlps:
        module.forward = MethodType(_lean_mlp(module), module)


def gated_mlps(model: torch.nn.Module) -> list[torch.nn.Module]:
    """The model's MLPs of two or three products, the last of which is `down_proj`."""
    return [module for module in model.modules() if hasattr(module, "down_proj")]


def _lean_mlp(mlp: torch.nn.Module) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    return _separate_mlp if hasattr(mlp, "gate_proj") else _fused_mlp


@real_numbers()
def _computes_swiglu(mlp: torch.nn.Module) -> bool:
    """Whether an MLP's own forward is the lean one, its products replaced by small ones."""
    small, x = with_small_products(mlp), random_numbers(2, 3, HIDDEN, seed=9)
    return alike(lambda: type(mlp).forward(small, x), lambda: _lean_mlp(mlp)(small, x))


HIDDEN, INNER = 4, 6  # of an MLP that is asked what it computes


def with_small_products(mlp: torch.nn.Module) -> torch.nn.Module:
    """A stand-in for a gated MLP whose products are small ones with random numbers."""
    sizes = {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "gate_up_proj": (2 * INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    products = {
        name: partial(F.linear, weight=random_numbers(*size, seed=seed))
        for seed, (name, size) in enumerate(sizes.items())
        if hasattr(mlp, name)
    }
    return stand_in(mlp, **products)


def _activation(mlp: torch.nn.Module) -> str:
    """Which activation an MLP has, as part of an error: ", whose activation is GELUTanh"."""
    activation = getattr(mlp, "act_fn", getattr(mlp, "activation_fn", None))
    return "" if activation is None else f", whose activation is {type(activation).__name__}"


def use_lean_lora(model: torch.nn.Module) -> None:
    """Let each adapter of a linear layer add its share to the base's output in one matrix product.

    Saves time, not bytes: PEFT clones the base's output, scales the adapter's and adds the two,
    three more trips of (batch, seq, out) through memory for each adapted layer.

    Raises:
        ValueError: Adapters that are more than two matrices (DoRA, `lora_bias`, ...), or none.
    """
    from peft.tuners.lora import LoraLayer

    adapted = [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) and isinstance(module.get_base_layer(), torch.nn.Linear)
    ]
    if not adapted:
        raise _nothing_to_change("adapters", "lean", "LoRA on a linear layer")
    for module in adapted:
        if more := [name for name in module.lora_A if not _is_two_matrices(module, name)]:
            raise refusal(
                "adapters",
                f"be 'stock' for LoRA with {_more_than_two_matrices(module, more[0])}",
                "lean",
                "the lean ones add the product of two matrices and nothing else",
            )
    for module in adapted:
        module.forward = MethodType(_lean_lora, module)


def _lean_lora(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args or kwargs or not _is_one_plain_adapter(self, x):
        return type(self).forward(self, x, *args, **kwargs)
    name = self.active_adapters[0]
    base = self.base_layer(x)  # (B, S, out)
    down = F.linear(self.lora_dropout[name](x), self.lora_A[name].weight)  # (B, S, r)
    up = self.lora_B[name].weight * self.scaling[name]  # (out, r)
    return torch.addmm(base.flatten(0, -2), down.flatten(0, -2), up.T).view_as(base)


def _is_one_plain_adapter(layer: Any, x: torch.Tensor) -> bool:
    """Whether the layer's output is the base's plus B A x, and nothing needs a cast.

    Without autocast a 16-bit base's numbers and the adapters' need PEFT's casts.
    """
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return False
    name = layer.active_adapters[0]
    return (
        name in layer.lora_A  # the active one may sit on other layers
        and _is_two_matrices(layer, name)
        and (torch.is_autocast_enabled(x.device.type) or x.dtype == layer.lora_A[name].weight.dtype)
    )


def _is_two_matrices(layer: Any, name: str) -> bool:
    """Whether PEFT adds B A x and nothing more. Source: peft/tuners/lora/layer.py, `forward`."""
    return name not in layer.lora_variant and not layer.lora_bias.get(name, False)


def _more_than_two_matrices(layer: Any, name: str) -> str:
    """What makes an adapter more, as part of an error."""
    variant = layer.lora_variant.get(name)
    return "lora_bias" if variant is None else type(variant).__name__


class Rotary(torch.autograd.Function):
    """Each pair (a, b) of x turned by its position's angle: (a cos - b sin, b cos + a sin).

    Saves time, not bytes: half the trips of x through memory that negating, joining, two products
    and a sum take. Backward is the same turn, the other way.

    Source: Su et al. 2021, "RoFormer", section 3.2.2.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _turn(x, cos, sin, torch.result_type(x, cos))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turn(grad, cos, -sin, ctx.dtype), None, None


def _turn(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    turned = torch.empty_like(x, dtype=dtype)
    (a, b), (to_a, to_b) = x.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(a, cos, out=to_a).addcmul_(b, sin, value=-1)
    torch.mul(b, cos, out=to_b).addcmul_(a, sin)
    return turned


def apply_rotary(
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    unsqueeze_dim: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Query and key, (batch, heads, seq, head_dim), turned by `Rotary`.

    Args:
        query: (batch, heads, seq, head_dim).
        key: (batch, kv_heads, seq, head_dim).
        cos, sin: (batch, seq, rotated); only the first `rotated` of each head's numbers are turned,
            and the second half of these angles repeats the first.
        unsqueeze_dim: Where the heads are, in query and key.
    """
    rotated = cos.shape[-1]
    cos, sin = (t[..., : rotated // 2].unsqueeze(unsqueeze_dim) for t in (cos, sin))
    if rotated == query.shape[-1]:
        return Rotary.apply(query, cos, sin), Rotary.apply(key, cos, sin)
    query, key = (
        torch.cat([Rotary.apply(x[..., :rotated], cos, sin), x[..., rotated:]], dim=-1)
        for x in (query, key)
    )
    return query, key


ROTARY = "apply_rotary_pos_emb"  # transformers' name for it, in each model's own file


def use_lean_rotary(model: torch.nn.Module, rotary: Callable = apply_rotary) -> None:
    """Let every attention layer of the model turn its query and key with `apply_rotary`.

    transformers calls a function of the model's file; each layer gets its forward method again,
    with that one name looked up elsewhere.

    Args:
        model: Whose layers.
        rotary: Who turns in the place of `apply_rotary`, and as it does.

    Raises:
        ValueError: The model pairs its numbers in another way (neighbours, as GLM and Cohere), or
            no layer turns any.
    """
    turning = [
        (module, forward)
        for module in model.modules()
        if ROTARY in (forward := inspect.unwrap(type(module).forward)).__code__.co_names
    ]
    if not turning:
        raise _nothing_to_change("rotary", "lean", f"a layer that calls {ROTARY}")
    for module, forward in turning:
        if not _turns_alike(forward.__globals__[ROTARY]):
            raise refusal(
                "rotary",
                f"be 'stock' for {type(module).__name__}",
                "lean",
                "the lean one pairs number i with i + half, this model does not",
            )
    for module, forward in turning:
        module.forward = MethodType(_with_rotary(forward, rotary), module)


def _with_rotary(forward: Any, rotary: Callable) -> FunctionType:
    """The same function, in whose eyes `apply_rotary_pos_emb` is another one."""
    ours = FunctionType(
        forward.__code__,
        forward.__globals__ | {ROTARY: rotary},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    return ours


@functools.cache
@real_numbers()
def _turns_alike(stock: Callable) -> bool:
    """Whether a model's own function turns random numbers as `apply_rotary` does."""
    query, key = random_numbers(2, 1, 2, 3, 8)  # (batch, heads, seq, head_dim) each
    angles = random_numbers(1, 3, 4, seed=1).repeat(1, 1, 2)
    given = query, key, angles.cos(), angles.sin()
    return alike(lambda: stock(*given), lambda: apply_rotary(*given))


def _nothing_to_change(field: str, value: str, wanted: str) -> ValueError:
    return refusal(field, f"be 'stock' for a model without {wanted}", value, "nothing would change")
