"""Gates: open for a healthy model, shut for each illness; nothing is changed by asking."""

import dataclasses

import pytest
import torch
from transformers import AutoTokenizer

from course_utils import data
from course_utils.data import BUNDLED
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe
from fitcast.training import gates, trainer
from fitcast.training.data import collate, encode


@pytest.fixture(scope="module")
def recipe():
    return TrainRecipe(
        model=BUNDLED, micro_batch_size=2, sequence_length=128, lora_targets="all-linear"
    )


@pytest.fixture(scope="module")
def rows():
    tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())
    return encode(data.load_instructions().select(range(2)), tokenizer, 128)


@pytest.fixture
def quick(monkeypatch):
    """For the tests that are not about the third gate."""
    monkeypatch.setattr(gates, "OVERFIT_STEPS", 1)


def verdicts(model, recipe, rows):
    found = gates.check_gates(model, rows, recipe, pad_token_id=0)
    return {finding.name: finding.fix is None for finding in found.findings}, found


@pytest.mark.parametrize(
    "attention", [pytest.param("stock", marks=pytest.mark.slow), "explicit_kv"]
)
def test_a_healthy_model_passes_and_stays_as_it_was(recipe, rows, attention):
    recipe = dataclasses.replace(recipe, attention=attention)
    model = trainer.build_model(recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    passed, found = verdicts(model, recipe, rows)
    names = ("step 0", "gradients", "overfit", "attention", "longest")
    assert passed == dict.fromkeys(names, True)
    assert found.require() is found
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) and parameter.grad is None, name


@pytest.mark.slow
def test_trained_adapters_shut_the_first_gate(recipe, rows, quick):
    model = trainer.build_model(recipe)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.1)
    passed, found = verdicts(model, recipe, rows)
    assert not passed["step 0"] and passed["gradients"]
    with pytest.raises(ValueError, match="step 0 must let the run pass.*build the model afresh"):
        found.require()


def test_a_cut_graph_shuts_the_second_gate(recipe, rows, quick, monkeypatch):
    model = trainer.build_model(recipe)
    loss = gates.qlora.compute_loss
    monkeypatch.setattr(
        gates.qlora,
        "compute_loss",
        lambda model, *a: (
            loss(model, *a) * 0 + sum(p.sum() * 0 for p in model.parameters() if p.requires_grad)
        ),
    )
    passed, found = verdicts(model, recipe, rows)
    assert not passed["gradients"] and "norm is 0" in repr(found)


@pytest.mark.slow
def test_labels_that_cannot_be_learned_shut_the_third_gate(recipe, rows):
    model = trainer.build_model(recipe)
    row, vocab_size = rows[0], model.config.vocab_size
    start = row["labels"].count(-100)
    contradictory = [
        row
        | {
            "labels": row["labels"][:start]
            + [(token + 311 * n) % vocab_size for token in row["labels"][start:]]
        }
        for n in range(2)
    ]
    small = dataclasses.replace(recipe, lora_rank=1, lora_targets=("q_proj",))
    assert not verdicts(trainer.build_model(small), small, contradictory)[0]["overfit"]
    assert verdicts(model, recipe, rows)[0]["overfit"]


@pytest.mark.slow
def test_written_scores_shut_the_fourth_gate(recipe, rows, quick):
    recipe = dataclasses.replace(recipe, attention="eager")
    model = trainer.build_model(recipe)
    batch = collate(list(rows), 0)
    assert gates.attention_kernel(model, batch, recipe) == "scores"
    assert "set attention='explicit_kv'" in repr(verdicts(model, recipe, rows)[1])


@pytest.mark.slow
def test_the_longest_rows_run_out_of_memory_in_the_first_minute(recipe, rows, quick):
    """Under a ledger that refuses what a small card would refuse."""
    model = trainer.build_model(recipe)
    batch = collate(list(rows), 0)
    wide = {name: tensor.repeat(1, 8) for name, tensor in batch.items()}
    with MemoryLedger(model) as ledger:
        assert gates.check_longest(model, batch, recipe).fix is None
    budget = ledger.report().peak_bytes
    with MemoryLedger(model, budget_bytes=budget):
        found = gates.check_longest(model, wide, recipe)
    tokens = wide["input_ids"].shape[1]
    assert found.found == f"2 x {tokens} tokens: out of memory"
    assert found.fix.startswith("halve micro_batch_size")
    assert all(p.grad is None for p in model.parameters())


def test_the_gate_takes_the_longest_rows_wherever_they_are(recipe, rows, quick, monkeypatch):
    short = {name: values[:8] for name, values in rows[0].items()}
    asked = []
    monkeypatch.setattr(
        gates,
        "check_longest",
        lambda model, batch, recipe: asked.append(batch) or gates.Finding("longest", "seen"),
    )
    verdicts(trainer.build_model(recipe), recipe, [rows[0], rows[0], *rows, rows[1] | short])
    assert asked[0]["input_ids"].shape[1] == max(len(row["input_ids"]) for row in rows)
