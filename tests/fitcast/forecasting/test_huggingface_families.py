"""Every causal language model of the installed transformers: a forecast, or one sentence."""

import contextlib
from pathlib import Path

import pytest
from peft import LoraConfig
from transformers import CONFIG_MAPPING, AutoConfig, TrainingArguments
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as FAMILIES

from fitcast.forecasting.by_trainer import family_targets
from fitcast.forecasting.forecast import forecast
from fitcast.forecasting.huggingface import forecast_run
from fitcast.recipe import TrainRecipe

CONFIGS = Path(__file__).parents[2] / "data" / "configs"
FAST = ("gemma2", "mamba")
# Families that people train: these must be forecast, not only refused well.
WANTED = {
    "apertus",
    "bloom",
    "cohere2",
    "deepseek_v3",
    "falcon",
    "falcon_h1",
    "gemma",
    "gemma2",
    "gemma3_text",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoehybrid",
    "jamba",
    "lfm2",
    "llama",
}
TOKENS = {"vocab_size": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "n_routed_experts": 4, "num_experts": 4,
    "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "n_group": 1, "topk_group": 1,
}  # fmt: skip


def configs(kind):
    """Configs of a family, the smallest first; not every family can have these sizes."""
    try:
        plain = CONFIG_MAPPING[kind]()
    except Exception as error:  # a class that refuses its own defaults
        pytest.skip(f"no config to try: {type(error).__name__}")
    text = plain.get_text_config(decoder=True)
    if text is not plain:  # a model with a tower beside it
        yield with_two_layers(plain, text)
        return
    known = set(plain.to_dict())
    for sizes in (TOKENS | SMALL, TOKENS | {"num_hidden_layers": 2}, {"num_hidden_layers": 2}):
        try:
            yield type(plain)(**{name: n for name, n in sizes.items() if name in known})
        except Exception:  # a config class checks its fields as it likes
            continue
    yield plain


def with_two_layers(plain, text):
    """The defaults of a config with parts, its text part cut short."""
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count:
            setattr(text, name, value[:2])
    with contextlib.suppress(NotImplementedError):  # ProphetNet's is a sum of two
        text.num_hidden_layers = 2
    return plain


def arguments(tmp_path, checkpointing):
    return TrainingArguments(
        output_dir=str(tmp_path), report_to="none", per_device_train_batch_size=2,
        activation_checkpointing=checkpointing,
    )  # fmt: skip


def answers(kind, tmp_path):
    """What is said about a family, until it is a forecast: sentences, then perhaps a forecast."""
    for config in configs(kind):
        for checkpointing in (True, False):
            try:
                yield forecast_run(
                    config, arguments(tmp_path, checkpointing), peft_config=LoraConfig(),
                    sequence_length=32, dtype="float32",
                )  # fmt: skip
                return
            except ValueError as error:
                yield str(error)


@pytest.mark.one_fast
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=() if k in FAST else pytest.mark.slow) for k in FAMILIES]
)
def test_a_family_is_forecast_or_refused_in_one_sentence(kind, tmp_path):
    *sentences, last = answers(kind, tmp_path)
    if isinstance(last, str):
        sentences.append(last)
    else:
        assert last.peak_allocated_bytes > last.loaded_bytes > 0
    for sentence in sentences:
        assert "\n" not in sentence and " must " in sentence and len(sentence) < 700
    assert kind not in WANTED or not isinstance(last, str), sentences


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "folder", [pytest.param(f, marks=pytest.mark.slow) for f in sorted(CONFIGS.iterdir())],
    ids=lambda folder: folder.name,
)  # fmt: skip
def test_a_config_that_people_have_is_forecast_or_refused_in_one_sentence(folder, tmp_path):
    try:
        seen = forecast_run(
            str(folder), arguments(tmp_path, True), peft_config=LoraConfig(), sequence_length=64
        )
    except ValueError as error:
        assert "\n" not in str(error) and " must " in str(error)
    else:
        assert seen.peak_allocated_bytes > seen.loaded_bytes > 0


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["dbrx", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma-3n-e2b-text", "mamba"))],
)
def test_a_recipe_of_what_does_not_run_is_refused_in_one_sentence(name, tmp_path):
    """Reported: tracebacks of 80 and 202 lines, and one before anything had run."""
    folder = CONFIGS / name
    if not folder.is_dir():
        folder = tmp_path / name
        AutoConfig.for_model(name).save_pretrained(folder)
    targets = family_targets(str(folder))
    with pytest.raises(ValueError, match=" must ") as refused:
        forecast(TrainRecipe(model=str(folder), sequence_length=64, lora_targets=targets))
    assert "\n" not in str(refused.value)
