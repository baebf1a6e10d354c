"""Classifiers: a row has one label, of the kind that the model's own loss takes in a real run."""

import functools

import pytest
import torch
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    LlamaConfig,
    Qwen2Config,
    Qwen2ForSequenceClassification,
    Trainer,
    TrainingArguments,
)  # fmt: skip

from fitcast.forecasting.huggingface import forecast_run

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # deprecated is not gone
LENGTH = 16
TINY = dict(
    vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
    num_attention_heads=4,
)  # fmt: skip
# Labels of a data set as transformers' documentation has them, by what is to be learned.
CASES = {
    "five classes": (dict(num_labels=5), 3),
    "a number": (dict(num_labels=1), 0.5),
    "several at once": (
        dict(num_labels=5, problem_type="multi_label_classification"),
        [0.0, 1.0, 0.0, 1.0, 0.0],
    ),
    "several numbers": (dict(num_labels=3, problem_type="regression"), [0.5, 1.5, 2.5]),
}


def arguments(folder="unused", **options):
    return TrainingArguments(
        folder, per_device_train_batch_size=2, use_cpu=True, report_to="none", max_steps=1,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip


@pytest.fixture
def labels(monkeypatch):
    """Shape and dtype of the labels of each batch."""
    seen, forward = [], BertForSequenceClassification.forward

    @functools.wraps(forward)  # Trainer reads its arguments, and drops other columns
    def spy(self, *args, labels=None, **options):
        seen.append((tuple(labels.shape), labels.dtype))
        return forward(self, *args, labels=labels, **options)

    monkeypatch.setattr(BertForSequenceClassification, "forward", spy)
    return seen


@pytest.mark.parametrize(
    "case", [pytest.param(one, marks=() if one[0] == "f" else pytest.mark.slow) for one in CASES]
)
def test_labels_are_those_of_a_real_run(case, labels, tmp_path):
    """Reported: "Expected input batch_size to match target batch_size", ours to mend."""
    options, label = CASES[case]
    model = BertForSequenceClassification(BertConfig(**TINY, **options))
    row = {"input_ids": [1] * LENGTH, "attention_mask": [1] * LENGTH, "labels": label}
    Trainer(model, arguments(str(tmp_path)), train_dataset=[row] * 4).train()
    real = set(labels)
    labels.clear()
    seen = forecast_run(model, arguments(), sequence_length=LENGTH)
    assert set(labels) == real and len(real) == 1
    assert any(note.endswith("each has one label") for note in seen.notes)


@pytest.mark.slow
def test_a_decoder_may_be_a_classifier():
    config = Qwen2Config(**TINY, num_key_value_heads=2, num_labels=5, pad_token_id=0)
    with torch.device("meta"):
        model = Qwen2ForSequenceClassification(config)
    seen = forecast_run(model, arguments(), sequence_length=LENGTH)
    assert seen.composition["weights"] >= 4 * sum(p.numel() for p in model.parameters())


def test_a_reward_model_scores_pairs():
    trl = pytest.importorskip("trl")
    config = trl.RewardConfig(
        "unused", per_device_train_batch_size=1, bf16=False, use_cpu=True, report_to="none"
    )
    seen = forecast_run(LlamaConfig(**TINY), config, sequence_length=LENGTH)
    assert "rows are padded to 16 tokens, and two of them make a pair" in seen.notes
    assert seen.composition["inputs"] >= 2 * 2 * LENGTH * 8  # ids and mask of both texts


def test_a_model_without_a_loss_of_labels_is_refused():
    model = BertForQuestionAnswering(BertConfig(**TINY))
    with pytest.raises(ValueError, match="^model must .*QuestionAnswering; .* forecast_step"):
        forecast_run(model, arguments(), sequence_length=LENGTH)
