"""Arguments about texts stop no forecast: its rows are token ids, and no text is read."""

import dataclasses

import pytest
from transformers import LlamaConfig, TrainingArguments

from fitcast.forecasting.huggingface import forecast_run

trl = pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # deprecated is not gone
TINY = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
SMALL = dict(output_dir="unused", report_to="none", per_device_train_batch_size=2, bf16=False)
SFT = SMALL | dict(max_length=32)
TEXTS = dict(
    assistant_only_loss=True, chat_template_path="no/such-template", completion_only_loss=True,
    dataset_kwargs={"skip_prepare_dataset": False}, dataset_text_field="body",
    eos_token="<|im_end|>", pad_token="<|endoftext|>",
)  # fmt: skip


@pytest.mark.slow
def test_what_is_said_of_texts_changes_no_byte():
    """Reported: `assistant_only_loss` and `eos_token` ended in "please report it"."""
    arguments = trl.SFTConfig(**SFT, **TEXTS)
    seen, plain = forecast_run(TINY, arguments), forecast_run(TINY, trl.SFTConfig(**SFT))
    assert seen.peak_allocated_bytes == plain.peak_allocated_bytes
    said = [note for note in seen.notes if note not in plain.notes]
    assert said[0].endswith("about texts only, and rows here are token ids")
    assert set(said[0].partition(":")[0].split(", ")) == set(TEXTS)
    assert said[1:] == ["tokens that chat_template_path adds to the vocabulary are not counted"]
    assert (arguments.eos_token, arguments.assistant_only_loss) == ("<|im_end|>", True)  # a copy


# Another value than the default where its kind does not tell one: closed choices, mappings, ...
OTHERS = {
    "activation_offloading": True,
    "cache_implementation": "dynamic",
    "f_divergence_type": "js_divergence",
    "importance_sampling_level": "sequence",
    "log_completions_hub_repo": None,  # for `log_completions` only
    "max_length": 24,
    "max_completion_length": 24,
    "multi_objective_aggregation": "normalize_then_sum",
    "pad_to_multiple_of": 8,
    "packing_strategy": "wrapped",
    "scale_rewards": "batch",
    "truncation_mode": "keep_end",
}
LOSSES = {"SFTConfig": "dft", "DPOConfig": ["ipo"], "GRPOConfig": "grpo"}
# What TRL refuses on a card as well: in a model that is dense, without packing, without beta.
REFUSED = {"router_aux_loss_coef", "padding_free", "sync_ref_model"}


def other(field, kind):
    """A value of a field that is not its default; `None` where there is none to give."""
    if field.name in OTHERS or field.name == "loss_type":
        return OTHERS[field.name] if field.name in OTHERS else LOSSES[kind.__name__]
    if isinstance(field.default, bool):
        return not field.default
    if isinstance(field.default, int):
        return field.default * 2 or 1
    if isinstance(field.default, float):
        return field.default / 2 or 1.0
    by_type = {"dict": {}, "list": [1.0], "bool": True, "int": 2, "float": 0.5, "str": "word"}
    return next(value for name, value in by_type.items() if name in str(field.type))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SFTConfig", "DPOConfig", "GRPOConfig"])
def test_no_argument_of_trl_ends_in_please_report_it(name):
    kind = getattr(trl, name)
    common = {field.name for field in dataclasses.fields(TrainingArguments)}
    online = name == "GRPOConfig"
    usual = SMALL | dict(num_generations=2, max_completion_length=16) if online else SFT
    options = {"sequence_length": 32} if online else {}
    refused = {}
    for field in dataclasses.fields(kind):
        # a server's words change nothing without one
        if field.name in common | {"num_generations"} or field.name.startswith("vllm_"):
            continue
        arguments = kind(**usual | {field.name: other(field, kind)})
        try:
            forecast_run(TINY, arguments, **options)
        except ValueError as error:
            refused[field.name] = str(error)
    assert refused.keys() <= REFUSED
    assert all("change the argument that it names" in text for text in refused.values())


def test_what_trl_refuses_by_itself_is_the_scripts_to_change():
    with pytest.raises(ValueError, match="padding_free=True.*; change the argument that it names"):
        forecast_run(TINY, trl.SFTConfig(**SFT, padding_free=True))
