"""Texts packed into one row: attention gets the mask that a real run of the trainer gives it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fitcast.forecasting.huggingface import forecast_run
from fitcast.forecasting.stage import tokenizer
from fitcast.gpus import A100, T4

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # deprecated is not gone
LENGTH, ROWS = 256, 2
TINY = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
WRAPPED = dict(packing=True, packing_strategy="wrapped")


def arguments(folder="unused", rows=ROWS, length=LENGTH, **options):
    return trl.SFTConfig(
        folder, max_length=length, per_device_train_batch_size=rows, bf16=False, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, max_steps=1, **options,
    )  # fmt: skip


@pytest.fixture
def masks(monkeypatch):
    """Shape and dtype of each mask that attention gets, `None` for none."""
    seen, attention = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module, query, key, value, mask, **options):
        seen.append(None if mask is None else (tuple(mask.shape), mask.dtype))
        return attention(module, query, key, value, mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "sdpa", spy)
    return seen


def train(arguments, text):
    """A real step on texts of `text` tokens."""
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [1] * text, "labels": [1] * text}] * 8)
    model = LlamaForCausalLM(TINY)
    trl.SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=tokenizer()
    ).train()


CASES = {
    "bfd": (dict(packing=True), LENGTH // 2),
    "bfd, one row": (dict(packing=True, rows=1), LENGTH // 2),
    "bfd, one text": (dict(packing=True, rows=1), LENGTH),
    "wrapped": (WRAPPED, LENGTH // 2),
    "padding_free": (dict(padding_free=True, length=None), LENGTH),
    "padding_free, one row": (dict(padding_free=True, length=None, rows=1), LENGTH),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name == "bfd" else pytest.mark.slow) for name in CASES]
)
def test_attention_gets_the_mask_of_a_real_run(case, masks, tmp_path):
    """Reported: packed texts were forecast without the mask that keeps them apart."""
    options, text = CASES[case]
    train(arguments(str(tmp_path), **options), text)
    real = set(masks)
    masks.clear()
    forecast_run(TINY, arguments(**options), sequence_length=LENGTH)
    assert len(real) == 1
    if case in ("bfd, one row", "bfd, one text"):  # by the texts, the one or the other
        assert real < set(masks) == {((1, 1, LENGTH, LENGTH), torch.bool), None}
    else:
        assert set(masks) == real


def test_the_mask_is_counted_and_said():
    packed, wrapped = (
        forecast_run(TINY, arguments(length=1024, **options))
        for options in (dict(packing=True), WRAPPED)
    )
    mask = (ROWS * 1024) ** 2  # a byte each; sdpa makes it one of float32, with the first kept
    more = packed.peak_allocated_bytes - wrapped.peak_allocated_bytes
    assert mask < more < 6 * mask
    assert any("a mask of 2048 x 2048 keeps its texts apart" in note for note in packed.notes)
    assert not any("mask" in note for note in wrapped.notes)


@pytest.mark.parametrize("gpu", [A100, T4], ids=lambda gpu: gpu.name)
def test_flash_attention_is_forecast_where_it_is_not_installed(gpu, masks):
    """Reported: it was refused as if the model were none that predicts text."""
    flash = "flash_attention_2"
    options = dict(gpu=gpu, attn_implementation=flash)
    seen = forecast_run(TINY, arguments(packing=True), **options)
    assert f"attn_implementation: {flash} is forecast as PyTorch's own kernel, sdpa" in seen.notes
    stops = f"a T4 has no FlashAttention: {flash} stops there"
    assert (stops in seen.notes) == (gpu is T4) == (masks[0] is not None)


def test_an_attention_that_nobody_has_is_a_slip():
    with pytest.raises(ValueError, match="^attn_implementation must .* did you mean 'sdpa'"):
        forecast_run(
            TINY, TrainingArguments("unused"), attn_implementation="spda", sequence_length=8
        )
