"""What merging adapters into their base will need: PEFT's own `merge_and_unload()`.

    forecast_merge("llama-3.1-8b", LoraConfig(...), gpu=T4, dtype="float16")

Not modelled: writing the files; adapters that are not in float32.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any

import torch

from fitcast.forecasting import base
from fitcast.forecasting.huggingface import with_targets
from fitcast.forecasting.plain_model import model_stream
from fitcast.forecasting.refusals import refuse_unknown
from fitcast.forecasting.verdict import Forecast, report
from fitcast.gpus import T4, Gpu
from fitcast.memory.report import replay
from fitcast.memory.stream import DeviceLedger, Stream
from fitcast.units import refusal, show_bytes

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel


def forecast_merge(
    model: str | PretrainedConfig | PreTrainedModel,
    peft_config: PeftConfig,
    *,
    gpu: Gpu = T4,
    dtype: str | torch.dtype | None = None,
    quantization_config: Any = None,
    expandable_segments: bool = False,
    **unknown: Any,
) -> Forecast:
    """What PEFT's `merge_and_unload()` will need on `gpu`, or in the host's memory.

    Args:
        model: As `forecast_run` takes it.
        peft_config: Of the adapters.
        gpu: The card; what the same takes of a host's memory is in `notes`.
        dtype: Of the weights that the adapters are merged into.
        quantization_config: Must be left out.
        expandable_segments: As PYTORCH_ALLOC_CONF says it.
        unknown: Must be none: a slip is answered with the keyword that was meant.

    Raises:
        ValueError: Weights in 4 or 8 bits; what the libraries refuse.
    """
    refuse_unknown(unknown, inspect.signature(forecast_merge).parameters, "forecast_merge")
    config = base.read_config(model)
    if base.quantization_of(config, quantization_config) is not None:
        raise refusal(
            "quantization_config", "be left out where adapters are merged", quantization_config,
            "load the base in 16 bits: 4 or 8 of them are too coarse for what was learned",
        )  # fmt: skip
    kept = base.dtype_of(dtype, model, config)
    kind = base.kind_of(model)
    adapters, assumed = with_targets(peft_config, base.meta_base(config, kept, None, kind))

    def merge(model: Any, ledger: DeviceLedger) -> None:
        with ledger.phase("merge"):
            model.merge_and_unload()

    stream = model_stream(
        lambda: base.meta_base(config, kept, None, kind).eval(), merge, gpu,
        dtype=kept, peft_config=adapters,
    )  # fmt: skip
    loaded = report(stream, gpu, expandable=expandable_segments).loaded_bytes
    once = {name: n for name, n in stream.marks.items() if name != "load"}  # no second merge
    seen = report(dataclasses.replace(stream, marks=once), gpu, expandable=expandable_segments)
    said = f"merged on the CPU it takes {show_bytes(host_bytes(stream, gpu), 'GiB')} of its memory"
    return dataclasses.replace(seen, loaded_bytes=loaded, notes=(*assumed, said))


def host_bytes(stream: Stream, gpu: Gpu) -> int:
    """Most bytes alive at once in the same steps on a CPU, which has no workspaces of cuBLAS."""
    blocks = stream.blocks
    events = [event for event in stream.events if blocks[event[1]].n_bytes != gpu.workspace_bytes]
    return replay(blocks, [], events, 0).peak_bytes
