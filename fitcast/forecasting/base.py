"""The base model of a run, on meta: its config, its dtype, its class, its quantizer.

What a checkpoint says about its own quantization is honoured where bitsandbytes stored it, and
refused by name where something else did (GPTQ, AWQ, MXFP4, FP8): it is never taken for NF4.

Sources: transformers/quantizers/base.py and quantizer_bnb_4bit.py; auto_factory.py.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from fitcast import models
from fitcast.forecasting.refusals import first_line
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

BITSANDBYTES = "bitsandbytes"
FAMILY_PAGE = "see the model's own page for the class that it needs"


def read_config(model: Any) -> PretrainedConfig:
    """The config of a name, a folder, a hub id, a model or itself: a copy of its own.

    Raises:
        ValueError: It is none of these, or transformers cannot read it.
    """
    if isinstance(model, (str, os.PathLike)):
        try:
            return models.config(str(model))
        except (ValueError, FileNotFoundError) as error:
            if "must" in str(error):  # says already what to change
                raise
            raise _unreadable(model, error) from error
        except Exception as error:  # a config class may do anything with its fields
            raise _unreadable(model, error) from error
    config = getattr(model, "config", model)
    if not hasattr(config, "model_type"):
        raise refusal(
            "model", "be a name, a folder, a config or a model of transformers", type(model),
            "for a module of your own write a step and use forecast_step",
        )  # fmt: skip
    return copy.deepcopy(config)


def _unreadable(model: object, error: Exception) -> ValueError:
    return refusal(
        "model", "have a config that transformers accepts",
        Said(f"{model} ({first_line(error)})"), "mend the field that it names",
    )  # fmt: skip


def dtype_of(given: Any, model: Any, config: PretrainedConfig) -> torch.dtype:
    """The dtype that `from_pretrained` would load: what was given, else the checkpoint's."""
    if isinstance(given, torch.dtype):
        return given
    if given not in (None, "auto"):
        found = getattr(torch, str(given), None)
        if not isinstance(found, torch.dtype):
            raise refusal("dtype", "be a dtype of torch", given, "for example dtype='float16'")
        return found
    if isinstance(model, torch.nn.Module):
        return model.dtype  # pyright: ignore[reportReturnType]  (of transformers' models)
    preset = isinstance(model, str) and model in models.SHAPES  # bfloat16 on the hub, all of them
    for part in (config, text_config(config)):
        own = getattr(part, "dtype", None)
        if isinstance(own, torch.dtype):
            return own
    return torch.bfloat16 if preset else torch.float32


def kind_of(model: Any) -> Any:
    """The class of a model that is given as one; `None` for a name, a folder or a config."""
    return type(model) if isinstance(model, torch.nn.Module) else None


def text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part about language, of a model that also sees or hears."""
    try:
        return config.get_text_config(decoder=True)
    except (AttributeError, ValueError):  # a config of its own making, or with two decoders
        return config


def quantization_of(config: PretrainedConfig, given: Any) -> Any:
    """How the weights will be stored: as the checkpoint is, else as `from_pretrained` was told.

    Args:
        config: Of the model; may carry a `quantization_config` of its own.
        given: What the script gives to `from_pretrained`, or `None`.

    Returns:
        A `BitsAndBytesConfig`, or `None` for weights in the run's dtype.

    Raises:
        ValueError: Another library stored the checkpoint, or would store the weights.
    """
    from transformers import BitsAndBytesConfig

    own = getattr(config, "quantization_config", None)
    own = own or getattr(text_config(config), "quantization_config", None)
    for field_name, asked in (("model", own), ("quantization_config", given)):
        if asked is None:
            continue
        method = _method(asked)
        if method == BITSANDBYTES:
            return BitsAndBytesConfig.from_dict(dict(asked)) if isinstance(asked, Mapping) \
                else asked  # fmt: skip
        if getattr(given, "dequantize", False) and _method(given) == method:
            return None  # loaded in 16 bits, as asked
        raise refusal(
            field_name, "be stored in 16 or 32 bits, or in bitsandbytes's 4 or 8",
            Said(f"quant_method {method}"),
            "take the checkpoint in 16 bits and a BitsAndBytesConfig",
        )  # fmt: skip
    return None


def _method(asked: Any) -> str:
    if isinstance(asked, Mapping):
        method = asked.get("quant_method")
        if method is None and (asked.get("load_in_4bit") or asked.get("load_in_8bit")):
            return BITSANDBYTES
    else:
        method = getattr(asked, "quant_method", None)
    return str(getattr(method, "value", method))


def meta_base(
    config: PretrainedConfig,
    dtype: torch.dtype,
    attention: str | None = None,
    kind: type[PreTrainedModel] | None = None,
) -> PreTrainedModel:
    """The model without memory, as training has it.

    Args:
        config: Of a causal language model, or of one with a vision tower beside it.
        dtype: Of its weights.
        attention: As `attn_implementation`; by default the model's own.
        kind: Its class; by default the checkpoint's.

    Raises:
        ValueError: transformers has no such class, or cannot build it.
    """
    options = {"attn_implementation": attention} if attention else {}
    config = copy.deepcopy(config)  # building a model writes into it
    for part in (config, text_config(config)):
        part.__dict__.pop("quantization_config", None)
    try:
        with torch.device("meta"):
            model = _maker(config, kind)(config, dtype=dtype, **options)
    except Exception as error:  # a model class may do anything with its config
        raise refusal(
            "model", "be a causal language model that transformers can build",
            Said(f"a config of kind {config.model_type!r} ({first_line(error)})"), FAMILY_PAGE,
        ) from error  # fmt: skip
    return model.train()


def _maker(config: PretrainedConfig, kind: type[PreTrainedModel] | None) -> Any:
    """Makes the model: of the class given, of the checkpoint's, else as AutoModelForCausalLM.

    Raises:
        ValueError: transformers has no class for it that predicts text.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if kind is not None:
        return kind._from_config

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if found is not None and hasattr(found, "get_output_embeddings"):
            return found._from_config
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText):
        if type(config) in auto._model_mapping:
            return auto.from_config
    raise ValueError(f"{type(config).__name__} belongs to no such class")


def quantize(model: PreTrainedModel, quantization_config: Any) -> None:
    """Prepare a model on meta as its quantizer does before the weights arrive."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization_config)
    quantizer.pre_quantized = False
    quantizer.preprocess_model(model=model, device_map=None)
    marks = {
        "hf_quantizer": quantizer,
        "is_quantized": True,
        "quantization_method": quantization_config.quant_method,
        "is_loaded_in_4bit": bool(getattr(quantization_config, "load_in_4bit", False)),
        "is_loaded_in_8bit": bool(getattr(quantization_config, "load_in_8bit", False)),
    }
    for name, value in marks.items():
        setattr(model, name, value)
    model.config.quantization_config = quantization_config
    model.tie_weights()  # new layers have weights of their own until the end of loading


def learned_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has a learned embedding for; `None` where it computes them."""
    limit = getattr(text_config(model.config), "max_position_embeddings", None)
    words = model.get_input_embeddings()
    for module in model.modules():
        learned = isinstance(module, torch.nn.Embedding) and module is not words
        if limit and learned and 0 <= module.num_embeddings - limit <= 2:  # OPT's has two more
            return limit
    return None
