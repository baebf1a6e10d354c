"""Evaluation: losses against plain PyTorch, intervals against theory, answers one by one."""

import dataclasses
import math

import pytest
import torch
from transformers import AutoTokenizer

from course_utils import data
from course_utils.data import BUNDLED
from course_utils.topics import tickets
from course_utils.topics.tickets import score
from fitcast.recipe import TrainRecipe
from fitcast.training import evaluation, trainer
from fitcast.training.data import encode
from fitcast.training.evaluation import Interval, paired_bootstrap

RECIPE = TrainRecipe(model=BUNDLED, sequence_length=128)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(data.bundled_model_dir())


@pytest.fixture(scope="module")
def model():
    return trainer.build_model(RECIPE)


@pytest.mark.parametrize("loss", ["full", "chunked"])
def test_loss_of_each_answer_equals_plain_cross_entropy(model, tokenizer, loss):
    """Three rows at a time, as they would be trained, and each loss is the row's own."""
    rows = encode(data.load_instructions(split="heldout"), tokenizer, 128)
    rows = rows.select(range(4))
    model.train()
    seen = []
    hook = model.get_base_model().model.register_forward_hook(
        lambda module, inputs, output: seen.append(len(output.last_hidden_state))
    )
    found = evaluation.answer_losses(
        model, rows, dataclasses.replace(RECIPE, loss=loss, micro_batch_size=3)
    )
    hook.remove()
    assert model.training and seen == [3, 1]
    model.eval()
    for row, loss in zip(rows, found, strict=True):
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0].double()
        start = row["labels"].count(-100)
        answer = torch.tensor(row["input_ids"][start:])
        picked = logits[start - 1 : -1].log_softmax(-1).gather(1, answer[:, None])
        assert loss == pytest.approx(-picked.mean().item(), rel=1e-4)


def test_an_evaluation_wakes_nothing_up(model, tokenizer):
    """A module that was put into evaluation mode by hand is still there, also after an error."""
    rows = encode(data.load_instructions(split="heldout"), tokenizer, 128).select(range(1))
    model.train()
    asleep = [module for module in model.modules() if isinstance(module, torch.nn.Dropout)]
    assert asleep and all(module.training for module in asleep)
    for module in asleep:
        module.eval()
    evaluation.answer_losses(model, rows, RECIPE)
    evaluation.generate(model, tokenizer, ["Hello"], RECIPE, max_new_tokens=1)
    with pytest.raises(KeyError):
        evaluation.answer_losses(model, [{"input_ids": [1, 2]}], RECIPE)
    assert model.training and not any(module.training for module in asleep)
    model.train()


def test_batched_generation_equals_one_by_one(model, tokenizer):
    prompts = data.load_instructions(split="heldout")["prompt"][:3]
    together = evaluation.generate(model, tokenizer, prompts, RECIPE, max_new_tokens=12)
    alone = [
        evaluation.generate(model, tokenizer, [p], RECIPE, max_new_tokens=12)[0] for p in prompts
    ]
    assert together == alone and all(together) and not any("<|" in text for text in together)


def test_free_text_is_scored_by_words_in_common():
    expected = ["The cat sat on the mat.", "No."]
    score = tickets.score(["the cat, the mat!", "Yes"], expected)
    # 4 words of 4 and 4 of 6 in common: F1 = 2 * 4 / (4 + 6); the other has none
    assert score.correct == pytest.approx(0.8 / 2)
    assert "40% of the words in common" in str(score)
    assert tickets.score(expected, expected).correct == 1


def test_score_counts_structure_and_content_apart():
    right = data.load_instructions(split="heldout")["answer"][:2]
    wrong = right[0].replace("Order: ", "Order: 9")
    result = score([right[0], wrong, "I am sorry."], [right[0], right[0], right[1]])
    assert (result.structure, result.correct) == (pytest.approx(2 / 3), pytest.approx(1 / 3))
    assert str(result) == "67% have the structure, 33% are right"
    with pytest.raises(ValueError, match=r"answers must be as many as expected \(2.*got 1"):
        score(["one"], right)


def test_interval_is_that_of_theory():
    """A large sample's bootstrap interval is mean +- 1.96 standard errors."""
    random = torch.Generator().manual_seed(0)
    before = torch.randn(2000, generator=random) * 5
    change = 0.3 + torch.randn(2000, generator=random)
    found = paired_bootstrap(before.tolist(), (before + change).tolist())
    error = 1.96 * change.std().item() / math.sqrt(2000)
    assert found.mean == pytest.approx(change.mean().item(), abs=1e-5)
    assert found.low == pytest.approx(found.mean - error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + error, abs=0.1 * error)


@pytest.mark.parametrize("examples", [2, 5, 20, 60, 200])
def test_interval_covers_the_truth_about_95_times_in_100(examples):
    """Percentiles alone: 50 of 100 for 2 examples, 83 for 5."""
    random = torch.Generator().manual_seed(examples)
    covered = 0
    for seed in range(300):
        change = torch.randn(examples, generator=random).tolist()
        found = paired_bootstrap([0.0] * examples, change, resamples=500, seed=seed)
        covered += found.low <= 0 <= found.high
    assert 0.92 <= covered / 300 <= 0.98


def test_interval_follows_the_skew_of_the_changes():
    """A few large losses: the interval reaches farther to their side, as Student's t does not."""
    random = torch.Generator().manual_seed(0)
    change = (2 * torch.randn(90, generator=random)).exp().tolist()
    found = paired_bootstrap([0.0] * 90, change)
    assert found.high - found.mean > 1.05 * (found.mean - found.low)


def test_students_quantile_is_that_of_the_tables():
    # NIST/SEMATECH e-Handbook of Statistical Methods, 1.3.6.7.2, upper 0.025
    table = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 19: 2.093, 30: 2.042, 100: 1.984}
    assert {df: round(evaluation.student_quantile(df), 3) for df in table} == table
    assert evaluation.student_quantile(10**9) == pytest.approx(1.96, abs=0.003)


def test_interval_is_paired_repeatable_and_refuses_nonsense():
    assert paired_bootstrap([1, 2, 3], [2, 3, 4]) == Interval(1.0, 1.0, 1.0)
    assert str(paired_bootstrap([1, 2, 3], [2, 3, 4])) == "+1.00 [+1.00, +1.00]"
    assert paired_bootstrap([1, 2, 9], [2, 1, 4]) == paired_bootstrap([1, 2, 9], [2, 1, 4])
    for before, after in (([1.0], [2.0]), ([1, 2], [1, 2, 3])):
        with pytest.raises(ValueError, match="same length of at least 2"):
            paired_bootstrap(before, after)
