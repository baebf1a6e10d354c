"""What one transformer layer keeps for backward, counted on fake tensors of any model's shape.

The layer runs alone, as one in the middle of the network: its input needs a gradient. Not modelled:
embedding, head and loss, the optimizer, what CUDA's kernels keep instead of the CPU's (`forecast`
does). The bytes equal those of a real layer on a CPU.
"""

from __future__ import annotations

import torch

from fitcast import models
from fitcast.forecasting.checks import check_recipe
from fitcast.forecasting.fake import fake_tensors, meta_model, on_fake_tensors
from fitcast.forecasting.load import blueprint
from fitcast.memory.ledger import MemoryLedger
from fitcast.memory.report import MemoryReport
from fitcast.recipe import TrainRecipe
from fitcast.step.levers import decoder_layers, unwrap
from fitcast.step.qlora import apply_levers, autocast, storage_dtype


def boundary_bytes(recipe: TrainRecipe) -> int:
    """Bytes of what one layer hands to the next: (micro batch, sequence, hidden).

    Example:
        >>> boundary_bytes(TrainRecipe(model="llama-2-7b", base="float16", sequence_length=2048))
        16777216
    """
    hidden_size = models.config(recipe.model).hidden_size
    tokens = recipe.micro_batch_size * recipe.sequence_length
    return tokens * hidden_size * storage_dtype(recipe).itemsize


def weight_bytes(recipe: TrainRecipe) -> int:
    """Bytes of all the model's weights, adapters not counted, in the recipe's 16 or 32 bits."""
    model = meta_model(models.config(recipe.model), storage_dtype(recipe))
    return sum(parameter.nbytes for parameter in model.parameters())


def count_block(recipe: TrainRecipe) -> MemoryReport:
    """The ledger of one layer's forward pass: what it keeps, tensor by tensor.

    Args:
        recipe: Uses model, base (not nf4), lora_*, amp_dtype, micro_batch_size, sequence_length,
            padded, checkpointed_layers ("all" or 0), attention, norm, mlp, adapters and rotary.

    Returns:
        A report; `saved_activation_bytes` is what waits for backward.

    Raises:
        ValueError: A 4-bit base, or a layer that is not called like a Llama's.
    """
    check_recipe(recipe)
    if recipe.base == "nf4":
        raise ValueError(
            "base must be float16, bfloat16 or float32 here, got 'nf4'; a frozen "
            "weight's bits do not change what a layer keeps"
        )
    config = models.config(recipe.model)
    config.num_hidden_layers = 1
    model = on_fake_tensors(apply_levers(blueprint(recipe, config), recipe))
    layer = decoder_layers(model)[0]
    batch, seq = recipe.micro_batch_size, recipe.sequence_length
    dtype = storage_dtype(recipe)
    with fake_tensors():
        mask = None
        if recipe.has_mask or recipe.attention == "eager":
            mask = torch.zeros(batch, 1, seq, seq, dtype=dtype)
        rotary_emb = unwrap(model).model.rotary_emb
        rotary = rotary_emb(torch.empty(1, dtype=dtype), torch.arange(seq)[None])
        with MemoryLedger(layer, inputs=(rotary, mask)) as ledger, autocast(recipe, "cpu"):
            boundary = torch.randn(batch, seq, config.hidden_size, dtype=dtype, requires_grad=True)
            output = layer(boundary, position_embeddings=rotary, attention_mask=mask)
        report = ledger.report()
        del output  # it held the graph, and with it everything that the layer keeps, until here
    return report
