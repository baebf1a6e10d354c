"""What generating text will need: the model's own `generate()`, on tensors without numbers.

    forecast_generation("llama-3.1-8b", prompt_tokens=2048, new_tokens=512, gpu=T4, dtype="float16")

The prompt is read and one token is made; then the model's own cache is filled up to the last token,
by its own `update`, and that token is made. In between nothing happens that is not between these
two. Not modelled: beams, speculative decoding, caches that are not made by `generate()`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from fitcast.forecasting import base, layers
from fitcast.forecasting.plain_model import model_stream
from fitcast.forecasting.refusals import refuse_unknown
from fitcast.forecasting.verdict import Forecast, report
from fitcast.gpus import T4, Gpu
from fitcast.memory.stream import DeviceLedger, Stream
from fitcast.units import refusal, show_bytes

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Text:
    """What is to be written.

    Attributes:
        config, kind, dtype, attention, quantization_config, peft_config: Of the model.
        batch, prompt, new: Prompts at once, tokens of each, tokens to make.
        options: What else `generate()` takes.
    """

    config: PretrainedConfig
    kind: type[PreTrainedModel] | None
    dtype: torch.dtype
    attention: str | None
    quantization_config: Any
    peft_config: PeftConfig | None
    batch: int
    prompt: int
    new: int
    options: dict[str, Any]


def forecast_generation(
    model: str | PretrainedConfig | PreTrainedModel,
    *,
    prompt_tokens: int,
    new_tokens: int,
    batch_size: int = 1,
    gpu: Gpu = T4,
    peft_config: PeftConfig | None = None,
    quantization_config: Any = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    expandable_segments: bool = False,
    **generate_options: Any,
) -> Forecast:
    """What `model.generate()` will need on `gpu`, from the weights' loading to the last token.

    Args:
        model: As `forecast_run` takes it.
        prompt_tokens: Of each prompt.
        new_tokens: To be made for each, at least 2.
        batch_size: Prompts at once; several have padding between them.
        gpu: The card.
        peft_config: Of adapters that were not merged.
        quantization_config, dtype, attn_implementation: As given to `from_pretrained`.
        expandable_segments: As PYTORCH_ALLOC_CONF says it.
        generate_options: What else `generate()` takes, such as `do_sample`.

    Returns:
        A `Forecast` with phases "prefill" and "decode"; its notes say how large the cache is.

    Raises:
        ValueError: No such model; numbers that cannot be; what the libraries refuse.
    """
    numbers = {"prompt_tokens": (prompt_tokens, 1), "new_tokens": (new_tokens, 2),
               "batch_size": (batch_size, 1)}  # fmt: skip
    for field, (value, least) in numbers.items():
        if type(value) is not int or value < least:
            raise refusal(field, f"be a whole number from {least}", value, "count tokens and rows")
    _check_keywords(generate_options)
    config = base.read_config(model)
    kind = base.kind_of(model)
    text = Text(
        config=config,
        kind=kind,
        dtype=base.dtype_of(dtype, model, config),
        attention=attn_implementation,
        quantization_config=base.quantization_of(config, quantization_config),
        peft_config=peft_config,
        batch=batch_size,
        prompt=prompt_tokens,
        new=new_tokens,
        options=generate_options,
    )
    stream = generation_stream(text, gpu)
    said = (
        f"the cache holds {show_bytes(cache_bytes(stream), 'GiB')} for {batch_size} x "
        f"{prompt_tokens + new_tokens - 1} tokens",
    )
    seen = report(stream, gpu, expandable=expandable_segments)
    return dataclasses.replace(seen, notes=said)


def _check_keywords(given: dict[str, Any]) -> None:
    """GenerationConfig takes any word, and says nothing of one that nobody reads."""
    from transformers import GenerationConfig

    known = vars(GenerationConfig()).keys() | inspect.signature(forecast_generation).parameters
    refuse_unknown(given, known, "the forecast or GenerationConfig")


def generation_stream(text: Text, gpu: Gpu) -> Stream:
    """Memory events of load, prompt and last token.

    Raises:
        ValueError: What the libraries refuse, as one sentence.
    """

    def write(model: Any, ledger: DeviceLedger) -> None:
        with ledger.phase("prefill"):
            cache = _generate(model, text, text.prompt, None)
        if text.new > 2 and _layers_of(cache):  # the first new token is in it by now
            with ledger.phase("decode"):
                _fill(cache, text.new - 3, layers.path_of(model), ledger)
                _generate(model, text, text.prompt + text.new - 1, cache)
        ledger.mark("cached")

    return model_stream(
        lambda: base.meta_base(text.config, text.dtype, text.attention, text.kind).eval(),
        write, gpu, dtype=text.dtype, peft_config=text.peft_config,
        quantization_config=text.quantization_config, padded=text.batch > 1,
    )  # fmt: skip


def _generate(model: Any, text: Text, tokens: int, cache: Any) -> Any:
    """Read so many tokens, less those of the cache, and make one; the cache afterwards.

    Two are made after a prompt, because the first one's cache entry is made with the second.
    """
    from transformers import GenerationConfig

    made = 2 if cache is None else 1
    settings = GenerationConfig(
        **{"max_new_tokens": made, "do_sample": False, "pad_token_id": 0, "eos_token_id": None,
           "bos_token_id": None, "return_dict_in_generate": True} | text.options
    )  # fmt: skip
    ids = torch.zeros(text.batch, tokens, dtype=torch.long)
    given = {} if cache is None else {"past_key_values": cache}
    with _makes(made):
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings, **given
        )
    return getattr(out, "past_key_values", None)


@contextlib.contextmanager
def _makes(tokens: int) -> Iterator[None]:
    """Inside, `generate()` is done after so many tokens; it would look for the end by numbers.

    Source: transformers/generation/utils.py, `_has_unfinished_sequences`.
    """
    from transformers import GenerationMixin

    to_make = iter([True] * tokens)

    def unfinished(self: Any, *args: Any, **kwargs: Any) -> bool:
        return next(to_make, False)

    with mock.patch.object(GenerationMixin, "_has_unfinished_sequences", unfinished):
        yield


def _layers_of(cache: Any) -> list[Any]:
    """The cache's layers that hold keys and values."""
    return [
        layer
        for layer in getattr(cache, "layers", ())
        if isinstance(getattr(layer, "keys", None), torch.Tensor)
    ]


def _fill(cache: Any, tokens: int, path: str | None, ledger: DeviceLedger) -> None:
    """Append keys and values of so many tokens to each layer of the cache, by its own `update`."""
    if tokens < 1:
        return
    for number, layer in enumerate(cache.layers):
        if layer not in _layers_of(cache):
            continue
        with ledger.inside(f"{path}.{number}"):
            keys, values = (
                torch.empty(*old.shape[:-2], tokens, old.shape[-1], dtype=old.dtype)
                for old in (layer.keys, layer.values)
            )
            layer.update(keys, values)


def cache_bytes(stream: Stream) -> int:
    """Bytes of keys, values and states at the last token: what goes when the cache goes."""
    gone = stream.events[stream.marks["cached"] : stream.marks["step"]]
    return sum(stream.blocks[block].n_bytes for sign, block, _ in gone if sign < 0)
