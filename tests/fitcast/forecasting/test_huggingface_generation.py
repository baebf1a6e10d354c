"""The forecast of `generate()` against a real one on a CPU, and against the size of a KV cache."""

from unittest import mock

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from fitcast.forecasting import generation, layers
from fitcast.forecasting.generation import forecast_generation
from fitcast.gpus import T4
from fitcast.memory.ledger import MemoryLedger
from fitcast.units import GIB

PROMPT, NEW, BATCH = 96, 33, 4
CONFIG = LlamaConfig(
    vocab_size=2048, hidden_size=256, intermediate_size=256, num_hidden_layers=6,
    num_attention_heads=4, num_key_value_heads=2, head_dim=64,
)  # fmt: skip
ASKED = {"prompt_tokens": PROMPT, "new_tokens": NEW, "batch_size": BATCH, "dtype": "float32",
         "attn_implementation": "eager"}  # fmt: skip


def real_peaks():
    """Peaks of reading the prompt and of all that follows, on real tensors."""
    model = LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager").eval()
    ids = torch.ones(BATCH, PROMPT, dtype=torch.long)
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    peaks = []
    for new in (1, NEW):
        settings = GenerationConfig(
            max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None
        )
        with MemoryLedger(model) as ledger:
            model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
        peaks.append(ledger.report().peak_bytes)
    return peaks


@pytest.mark.slow
def test_generation_is_that_of_a_real_model():
    seen = forecast_generation(CONFIG, **ASKED)
    prefill, whole = real_peaks()
    assert seen.phase_peaks["prefill"] - T4.workspace_bytes == pytest.approx(prefill, rel=5e-3)
    assert seen.peak_allocated_bytes - T4.workspace_bytes == pytest.approx(whole, rel=5e-3)


@pytest.mark.parametrize(("new", "tokens"), [(2, PROMPT + 1), (NEW, PROMPT + NEW - 1)])
def test_the_cache_has_the_size_of_its_keys_and_values(new, tokens):
    stream = generation.generation_stream
    with mock.patch.object(generation, "generation_stream", wraps=stream) as made:
        forecast_generation(CONFIG, **ASKED | {"new_tokens": new})
        seen = generation.cache_bytes(stream(*made.call_args.args))
    layer_count, kv_heads, head_dim, n_bytes = 6, 2, 64, 4
    assert seen == 2 * layer_count * BATCH * kv_heads * tokens * head_dim * n_bytes


@pytest.mark.slow
def test_few_layers_give_every_byte_of_many():
    few = forecast_generation(CONFIG, **ASKED)
    with mock.patch.object(layers, "rhythm", lambda _: None):
        whole = forecast_generation(CONFIG, **ASKED)
    assert few.phase_peaks == whole.phase_peaks
    assert few.notes == whole.notes


@pytest.mark.slow
def test_a_long_text_of_8b_is_weights_and_cache():
    """16 bits: 14.96 GiB of weights; 128 KiB a token in 32 layers, 8 heads of 128."""
    seen = forecast_generation(
        "llama-3.1-8b", prompt_tokens=1024, new_tokens=32768 - 1024 + 1, dtype="float16"
    )
    assert seen.notes[0] == "the cache holds 4.00 GiB for 1 x 32768 tokens"
    assert seen.loaded_bytes == pytest.approx(14.96 * GIB, rel=1e-3)
    assert seen.phase_peaks["decode"] > seen.loaded_bytes + 4 * GIB


@pytest.mark.slow
def test_sliding_windows_keep_no_more_than_their_width():
    """Of Gemma 3's layers five in six see 512 tokens (its config), so its cache grows slowly."""
    asked = {"prompt_tokens": 4096, "dtype": "float16"}
    config = "tests/data/configs/gemma-3-1b"
    short, long = (
        generation.cache_bytes(stream)
        for stream in (_stream(config, 100, asked), _stream(config, 4196, asked))
    )
    full_layers, kv_heads, head_dim, n_bytes = 26 // 6, 1, 256, 2
    assert long - short == 2 * full_layers * kv_heads * head_dim * n_bytes * 4096


def _stream(config, new, asked):
    with mock.patch.object(
        generation, "generation_stream", wraps=generation.generation_stream
    ) as made:
        forecast_generation(config, new_tokens=new, **asked)
    return generation.generation_stream(*made.call_args.args)


@pytest.mark.parametrize(
    ("field", "value"), [("prompt_tokens", 0), ("new_tokens", 1), ("batch_size", 1.5)]
)
def test_numbers_that_cannot_be_are_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be a whole number from"):
        forecast_generation(CONFIG, **ASKED | {field: value})
