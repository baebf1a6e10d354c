"""Model shapes by name: everything about a model except its weights.

A shape is a Hugging Face config, so that forecast and real run build the same classes from it.
No weights are downloaded here. Not modelled: vision towers, mixtures of experts.
"""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_LLAMA3 = dict(
    model_type="llama",
    vocab_size=128256,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_theta=500000.0,
    bos_token_id=128000,
    eos_token_id=128001,
)
_QWEN3 = dict(
    model_type="qwen3",
    vocab_size=151936,
    max_position_embeddings=40960,
    rms_norm_eps=1e-6,
    rope_theta=1000000.0,
    tie_word_embeddings=True,
)
# Fields of a config that decide how many weights there are.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "vocab_size",
)
# Each from the config.json of the hub id beside it (ungated copies where the original is gated).
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _LLAMA3
    | dict(
        hub_id="unsloth/Llama-3.2-1B-Instruct",
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "llama-3.2-3b": _LLAMA3
    | dict(
        hub_id="unsloth/Llama-3.2-3B-Instruct",
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "llama-3.1-8b": _LLAMA3
    | dict(
        hub_id="unsloth/Meta-Llama-3.1-8B-Instruct",
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=False,
    ),
    "llama-2-7b": dict(
        hub_id="NousResearch/Llama-2-7b-hf",
        model_type="llama",
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
    ),
    "phi-4-mini": dict(
        hub_id="microsoft/Phi-4-mini-instruct",
        model_type="phi3",
        vocab_size=200064,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=32,
        num_attention_heads=24,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        partial_rotary_factor=0.75,
        original_max_position_embeddings=4096,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=199999,
        eos_token_id=199999,
        pad_token_id=199999,
    ),
    "qwen3-0.6b": _QWEN3
    | dict(
        hub_id="Qwen/Qwen3-0.6B",
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "qwen3-1.7b": _QWEN3
    | dict(
        hub_id="Qwen/Qwen3-1.7B",
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    ),
    "smollm2-1.7b": dict(
        hub_id="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        model_type="llama",
        vocab_size=49152,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=32,
        num_key_value_heads=32,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_theta=130000.0,
        tie_word_embeddings=True,
    ),
}
NAMES = tuple(SHAPES)
HUB_SECONDS = 5.0  # for one answer


def hub_id(model: str) -> str:
    """Where the weights of `model` are: a hub id, or the local path that was given.

    Args:
        model: Name in `NAMES`, a path that exists, or owner/name on the hub.

    Raises:
        ValueError: None of these.
    """
    if model in SHAPES:
        return SHAPES[model]["hub_id"]
    if model.startswith((".", "/", "~")) and not os.path.exists(model):  # no owner is called so
        raise refusal(
            "model", "be a folder that exists", model, "check the path, and where it starts from"
        )
    if os.path.exists(model) or _names_a_repository(model):
        return model
    close = difflib.get_close_matches(model.lower().strip("/"), NAMES, n=1, cutoff=0.8)
    hint = (
        f"did you mean {close[0]!r}?"
        if close
        else "or give owner/name as on the hub, or a folder with a config.json"
    )
    raise refusal("model", f"be one of {', '.join(NAMES)}", model, hint)


def _names_a_repository(model: str) -> bool:
    """Whether the hub's client takes it as owner/name; what it refuses, it does not tell apart."""
    if model.count("/") != 1:
        return False
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(model)
    except HFValidationError:
        return False
    return True


def config(model: str) -> PretrainedConfig:
    """The Hugging Face config of a model: preset name, folder, `config.json` path or hub id.

    Only a hub id needs the network.

    Args:
        model: As in `TrainRecipe.model`.

    Raises:
        ValueError: Unknown name, a config.json of no model_type that transformers knows, or a hub
            that does not answer.
        FileNotFoundError: A local path holds no config.json.
    """
    from transformers import AutoConfig

    source = hub_id(model)
    if model in SHAPES:
        fields = {key: value for key, value in SHAPES[model].items() if key != "hub_id"}
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    path = Path(source)
    if path.exists():
        path = path if path.is_file() else path / "config.json"
        return _config_from_file(path)
    try:  # what was downloaded before is read without the hub
        return AutoConfig.from_pretrained(source, local_files_only=not hub_answers(source))
    except OSError as error:
        raise refusal(
            "model",
            "be reachable on the hub",
            model,
            f"check the spelling and the network, or use one of {', '.join(NAMES)}",
        ) from error


def about_sizes(model: object) -> tuple[str, ...]:
    """A sentence where a config.json leaves sizes to transformers' defaults, else none.

    Args:
        model: As `config` takes it; what is no file or folder here leaves nothing open.
    """
    path = Path(str(model))
    if not isinstance(model, str | Path) or str(model) in SHAPES or not path.exists():
        return ()
    found = json.loads((path if path.is_file() else path / "config.json").read_text("utf-8"))
    known = config(str(model))
    whole, names = known.get_text_config(decoder=True), known.attribute_map
    inner = {**found, **(found.get("text_config") or {})}
    absent = [
        f"{name}={getattr(whole, name)}"
        for name in SIZES
        if getattr(whole, name, None) is not None and not {name, names.get(name)} & set(inner)
    ]
    if not absent:
        return ()
    return (f"{path} does not say {', '.join(absent)}: these are transformers' defaults",)


def hub_answers(repository: str) -> bool:
    """Whether the hub says anything about a model, be it no, within some seconds.

    transformers would ask six times, and wait in between, for half a minute.

    Args:
        repository: owner/name.
    """
    import huggingface_hub
    from huggingface_hub import errors

    library_error: type[Exception] = errors.HfHubHTTPError.__bases__[0]  # httpx's, or its heir's
    url = huggingface_hub.hf_hub_url(repository, "config.json")
    try:
        huggingface_hub.get_hf_file_metadata(url, timeout=HUB_SECONDS)
    except errors.HfHubHTTPError as error:  # gated, unknown; 5xx is as good as silence
        return error.response is None or error.response.status_code < 500
    except (library_error, OSError):
        return False
    return True


def _config_from_file(path: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    if not path.is_file():
        missing = refusal(
            "model",
            "hold a config.json",
            Said(f"{path} which does not exist"),
            "give the folder that `save_pretrained` wrote",
        )
        raise FileNotFoundError(str(missing))
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        return AutoConfig.for_model(fields.pop("model_type"), **fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # transformers lists all the types that it knows: some hundreds
        reason, unknown, _ = str(error).partition(". Should contain one of")
        raise refusal(
            "model",
            "be a Hugging Face config.json with a known model_type",
            Said(f"{path} ({reason})"),
            _nearest_types(path) if unknown else "save one with config.save_pretrained",
        ) from error


def _nearest_types(path: Path) -> str:
    """What to change where transformers does not know the model_type of a config.json."""
    from transformers import CONFIG_MAPPING

    kind = str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    close = difflib.get_close_matches(kind, CONFIG_MAPPING)
    return f"did you mean {' or '.join(close)}?" if close else "update transformers if it is newer"
