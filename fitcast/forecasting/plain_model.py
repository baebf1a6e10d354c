"""A model without a trainer on tensors without numbers: its weights placed, then used by a script.

Not modelled: what the script does on the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from fitcast.cuda import experts
from fitcast.cuda.trainers import pretend_trainer
from fitcast.forecasting import base, layers
from fitcast.forecasting.place import place
from fitcast.forecasting.stage import card, few_layers, up_to_step, with_adapters
from fitcast.gpus import Gpu
from fitcast.memory.layers import Layers
from fitcast.memory.stream import DeviceLedger, Stream

Script = Callable[[Any, DeviceLedger], None]  # uses the model, and may set marks


def model_stream(
    make: Callable[[], Any],
    script: Script,
    gpu: Gpu,
    *,
    dtype: torch.dtype,
    peft_config: Any = None,
    quantization_config: Any = None,
    padded: bool = False,
) -> Stream:
    """Memory events of load and `script`; of few layers where they repeat.

    Args:
        make: The model on meta, a new one each time.
        script: Takes the model and the ledger.
        gpu: The card.
        dtype: Of the weights that are not quantized.
        peft_config: Of adapters.
        quantization_config: As given to `from_pretrained`.
        padded: Whether masks hide padding.

    Raises:
        ValueError: What the libraries refuse, as one sentence.
    """

    def play(model: Any, rhythm: layers.Rhythm | None) -> Stream:
        ledger = DeviceLedger()
        if quantization_config is not None:
            base.quantize(model, quantization_config)
        if peft_config is not None:
            model = with_adapters(model, peft_config, checkpointing=False).eval()
        path = layers.path_of(model)
        ledger.layers = Layers() if rhythm is None or path is None else rhythm.named(path)
        with pretend_trainer(), card(model, gpu, ledger, padded=padded, routing=experts.EVEN):
            place(model, dtype, ledger)
            ledger.watch(model)
            ledger.mark("ready")
            script(model, ledger)
            ledger.mark("step")
        return up_to_step(ledger)

    return few_layers(make, play)
