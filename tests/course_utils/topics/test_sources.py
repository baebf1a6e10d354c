"""Sources: one decision on every machine; nothing is downloaded, and chance says so."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from course_utils import data
from course_utils.data import BUNDLED
from course_utils.topics import sources
from fitcast import gpus, models
from fitcast.forecasting.load import blueprint
from fitcast.recipe import TrainRecipe
from fitcast.training import random_weights
from fitcast.training.data import encode


@pytest.fixture
def hub(monkeypatch):
    """What the hub answers, by kind of repository; a test fills it in."""
    answers = {}
    monkeypatch.setattr(sources, "ask_hub", lambda _, kind="model": answers[kind])

    def made(model, folder):
        found = Path(folder, f"{model}-random")
        found.mkdir(exist_ok=True)
        return found

    monkeypatch.setattr(random_weights, "write", made)
    return answers


@pytest.mark.parametrize("gpu", [None, gpus.T4])
def test_the_bundled_model_asks_no_hub(hub, gpu):
    source = sources.choose(gpu, "bundled")
    assert (source.model, source.weights, source.data) == (BUNDLED, "bundled", "bundled")
    assert source.tokenizer().pad_token_id is not None
    assert sources.choose(None) == source, "and it is what a machine without a GPU gets"


def test_a_large_model_needs_a_gpu(hub):
    with pytest.raises(ValueError, match="without a GPU, got 'phi-4-mini'; switch Runtime"):
        sources.choose(None, "phi-4-mini")


@pytest.mark.parametrize("gpu", [None, gpus.T4])
def test_an_unknown_model_is_refused(hub, gpu):
    with pytest.raises(ValueError, match="model must .*llama-3.2-1b"):
        sources.choose(gpu, "llama-3.2-1")


def test_any_model_of_the_hub_and_any_folder_will_do(hub, tmp_path):
    hub |= {"model": "open", "dataset": "open"}
    source = sources.choose(gpus.T4, "Qwen/Qwen2.5-0.5B-Instruct")
    assert source.model == source.tokenizer_from == "Qwen/Qwen2.5-0.5B-Instruct"
    assert source.settings["lora_targets"] == "all-linear"
    folder = sources.choose(None, tmp_path)
    assert (folder.model, folder.weights) == (str(tmp_path), "folder")


def test_data_of_ones_own_set_length_and_steps():
    asked = [{"prompt": f"How much is {n} plus {n}?", "completion": f"{2 * n}"} for n in range(50)]
    source = sources.choose(None, data=asked)
    longest = max(len(row["input_ids"]) for row in encode(source.own, source.tokenizer(), 1024))
    assert 0 <= source.settings["sequence_length"] - longest < 8
    train, heldout = source.conversations()
    assert len(train) + len(heldout) == 50 and 2 <= len(heldout) <= 20
    # a step sees 4 x 4 sequences, and an example of few is seen about ten times
    assert 10 * len(train) <= 16 * source.settings["max_steps"] < 10 * len(train) + 16
    assert "50 conversations" in str(source) and source.data == "own"
    with pytest.raises(ValueError, match=r"data, row 0 must hold messages"):
        sources.choose(None, data=[{"text": "x"}])


def test_an_open_hub_gives_model_and_data(hub):
    hub |= {"model": "open", "dataset": "open"}
    source = sources.choose(gpus.T4)
    assert (source.model, source.weights, source.data) == ("llama-3.2-1b", "hub", "dolly")
    assert source.tokenizer_from == "unsloth/Llama-3.2-1B-Instruct"
    hub |= {"model": "cached", "dataset": "silent"}
    assert sources.choose(gpus.T4).data == "bundled"


@pytest.mark.parametrize("answer", ["gated", "unknown"])
def test_a_closed_model_is_refused_with_a_way_on(hub, answer):
    hub["model"] = answer
    with pytest.raises(ValueError, match=f"Qwen/Qwen3-1.7B, which is {answer}; pick another of"):
        sources.choose(gpus.T4, "qwen3-1.7b")


def test_a_silent_hub_gives_random_weights_and_says_so(hub, tmp_path):
    hub["model"] = "silent"
    source = sources.choose(gpus.T4, "phi-4-mini", folder=tmp_path)
    assert (source.weights, source.data) == ("random", "bundled")
    assert source.model == f"{tmp_path}/phi-4-mini-random"
    assert "Memory and speed hold, words and losses do not" in str(source)
    assert source.tokenizer_from == str(data.bundled_model_dir())
    beside = AutoTokenizer.from_pretrained(source.model)  # as `pipeline` asks an adapter's base
    assert beside.chat_template == source.tokenizer().chat_template
    assert not list(Path(source.model).glob("*.part"))


@pytest.mark.parametrize("model", ["phi-4-mini", "mine"])
def test_a_model_is_found_from_wherever_the_lesson_goes_on(hub, tmp_path, monkeypatch, model):
    """Lesson 07 leaves the folder in which the learner's model, or random weights, are."""
    hub["model"] = "silent"
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    source = sources.choose(gpus.T4, model)
    assert Path(source.model).parent == tmp_path


@pytest.mark.parametrize("model", ["bundled", *sources.MODELS])
def test_settings_suit_every_model(hub, model):
    hub |= {"model": "open", "dataset": "open"}
    source = sources.choose(gpus.T4, model)
    recipe = TrainRecipe(model=source.model, amp_dtype="float16", **source.settings)
    adapted = blueprint(
        recipe, models.config(source.model)
    )  # raises when a target matches no layer
    names = {n.split(".")[-4] for n, p in adapted.named_parameters() if "lora_A" in n}
    assert {"o_proj"} < names


def test_heldout_examples_are_few_and_never_trained_on(monkeypatch):
    monkeypatch.setattr(sources, "HELDOUT_EXAMPLES", 7)
    train, heldout = sources.choose(None).conversations()
    assert len(heldout) == 7 < len(train)
    asked = [{one[0]["content"] for one in part["messages"]} for part in (train, heldout)]
    assert not asked[0] & asked[1]


# --- random weights ------------------------------------------------------------------------------


@pytest.fixture
def shape(tmp_path):
    folder = tmp_path / "tiny"
    config = models.config("llama-3.2-1b")
    config.update(
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 128,
        }
    )
    config.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_random_weights_load_at_their_shape(shape, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    folder = random_weights.write(shape, tmp_path, dtype)
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    weights = dict(model.named_parameters())
    assert {p.dtype for p in weights.values()} == {dtype}
    assert torch.equal(weights["model.norm.weight"], torch.ones(64, dtype=dtype))
    projection = weights["model.layers.0.self_attn.q_proj.weight"].float()
    assert 0.018 < projection.std() < 0.022 and projection.unique().numel() > 1000
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert dataclasses.replace(TrainRecipe(model=BUNDLED), model=str(folder)).model == str(folder)


def test_random_weights_are_written_once_and_whole(shape, tmp_path):
    first = random_weights.write(shape, tmp_path)
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert random_weights.write(shape, tmp_path) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    assert not list(tmp_path.glob("*.part"))
