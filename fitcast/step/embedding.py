"""The embedding's weights in host memory: a step reads few of its rows, and trains none.

Not modelled: an embedding that computes more than a look-up; generation, for which transformers
puts token ids where a model's first parameter is.

Shapes: B batch, S sequence, H hidden, V vocabulary.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F

from fitcast.units import refusal


def on_host(weight: torch.Tensor) -> torch.Tensor:
    """The weights' copy in host memory; of a model on meta its loader has to put them there."""
    return weight.detach() if weight.is_meta else weight.detach().to("cpu")


def look_up(ids: torch.Tensor, weight: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Rows of a weight in host memory, (batch, seq, hidden), on the device."""
    return F.embedding(ids.to("cpu"), weight).to(device)


def use_host_embedding(model: Any) -> None:
    """Keep a frozen embedding on the host and send the rows of each batch to the GPU.

    Saves the weights, (vocab, hidden): 1 GiB of an 8B model. Costs a copy of (batch, seq, hidden) a
    micro batch, before which the host waits for the GPU once.

    Raises:
        ValueError: The embedding is trained, adapted or saved beside adapters, is the head's weight
            too, or is not plainly looked up.
    """
    embedding = model.get_input_embeddings()
    if why := _cannot_leave(embedding, model.get_output_embeddings()):
        raise refusal("embedding", f"be 'stock' for an embedding that {why[0]}", "host", why[1])
    weight = embedding.weight
    embedding.weight = torch.nn.Parameter(on_host(weight), requires_grad=False)
    embedding.forward = MethodType(_forward, embedding)
    embedding.device_of_rows = weight.device
    embedding._apply = MethodType(_stay, embedding)


def _stay(self: Any, move: Any, recurse: bool = True) -> Any:
    """`model.to(device)` leaves the weights where they are, and rows go where the model went."""
    self.device_of_rows = move(torch.empty(0, device=self.device_of_rows)).device
    return self


def _forward(self: Any, ids: torch.Tensor) -> torch.Tensor:
    return look_up(ids, self.weight, self.device_of_rows)


def _cannot_leave(embedding: Any, head: Any) -> tuple[str, str] | None:
    """What an embedding is that has to stay on the GPU, and why."""
    if hasattr(embedding, "modules_to_save"):
        return "is in modules_to_save", "it is trained where the rest is"
    if hasattr(embedding, "base_layer"):
        return "has an adapter", "its rows are more than the weight's"
    if type(embedding) is not torch.nn.Embedding or embedding.max_norm is not None:
        return f"is a {type(embedding).__name__} of its own", "its rows are more than the weight's"
    if embedding.weight.requires_grad:
        return "is trained", "freeze it, or train adapters only"
    if head is not None and getattr(head, "weight", None) is embedding.weight:
        return "is the head's weight, too", "the head multiplies by it on the GPU: nothing is saved"
    return None
