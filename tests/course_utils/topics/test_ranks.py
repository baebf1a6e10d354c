"""Two real processes against one optimizer step written out; clean ends when something fails."""

import contextlib
import dataclasses
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from course_utils.data import BUNDLED
from course_utils.topics import ranks
from fitcast import gpus as hardware
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.training.gradients import in_float64, relative_error

ONE = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_rank=None,
    optimizer="adamw",
    micro_batch_size=2,
    gradient_accumulation_steps=4,
    sequence_length=16,
)
TWO = dataclasses.replace(ONE, gradient_accumulation_steps=2, world_size=2)


def uneven():
    """8 rows of 16 tokens; the first half has two labels each."""
    ids = torch.randint(1280, (8, 16), generator=torch.Generator().manual_seed(0))
    labels = ids.clone()
    labels[:4, 3:] = -100
    return {"input_ids": ids, "labels": labels}


def written_out(batch):
    """One AdamW step on the whole batch, by PyTorch's own mean loss."""
    model = in_float64(qlora.load_base(ONE)).train()
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    optimizer = torch.optim.AdamW(model.parameters(), lr=ONE.learning_rate, weight_decay=0.0)
    logits = model(input_ids=batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten()).backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.fixture(scope="module")
def expected():
    return written_out(uneven())


def test_one_rank_does_what_is_written_out(expected):
    assert relative_error(ranks.update(ONE, uneven()), expected) < 1e-12


@pytest.mark.slow
def test_two_processes_make_the_same_update(expected):
    found = ranks.launch(TWO, uneven())
    assert relative_error(found["tokens"], expected) < 1e-12
    assert relative_error(found["ranks"], expected) > 0.1  # a mean of ranks' means is another one


@pytest.mark.slow
def test_a_failing_rank_is_one_sentence(expected):
    batch = uneven()
    batch["input_ids"] = batch["input_ids"] + 5000  # beyond the vocabulary
    with pytest.raises(RuntimeError, match=r"^a rank failed: IndexError: index out of range"):
        ranks.launch(TWO, batch)


@pytest.fixture
def started(monkeypatch):
    """Every process that `launch` starts, with its command and environment."""
    seen = []

    class Popen(subprocess.Popen):
        def __init__(self, command, **options):
            super().__init__(command, **options)
            seen.append(SimpleNamespace(process=self, command=command, env=options["env"]))

    monkeypatch.setattr(ranks.subprocess, "Popen", Popen)
    return seen


def running(word: str) -> list[int]:
    """Processes that have this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it may end while we look
            if word in path.read_text():
                found.append(int(path.parent.name))
    return found


@pytest.mark.slow
def test_ranks_that_take_too_long_are_ended(started, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/their/own")
    long = {name: tensor.repeat(500, 16) for name, tensor in uneven().items()}
    recipe = dataclasses.replace(TWO, gradient_accumulation_steps=1000)
    with pytest.raises(TimeoutError, match=r"^2 ranks did not finish in 8 s and were ended; "):
        ranks.launch(recipe, long, timeout_s=8)
    command = started[0].command
    assert started[0].process.returncode is not None and running(command[-1]) == []
    assert "--rdzv-endpoint 127.0.0.1:0" in " ".join(command)
    assert "--local-addr 127.0.0.1" in " ".join(command)
    assert started[0].env["PYTHONPATH"].endswith(f"{os.pathsep}/their/own")
    assert started[0].env["GLOO_SOCKET_IFNAME"] in ("lo", "lo0")


@pytest.mark.parametrize(
    ("recipe", "weigh", "words"),
    [
        (
            dataclasses.replace(ONE, micro_batch_size=4),
            "tokens",
            r"^batch must have 16 rows \(micro batch x accumulation x world size\), got 8; ",
        ),
        (ONE, "rows", "^weigh must be one of tokens, ranks, got 'rows'; "),
    ],
)
def test_what_does_not_go_together_is_refused(recipe, weigh, words):
    with pytest.raises(ValueError, match=words):
        ranks.update(recipe, uneven(), weigh)


@pytest.mark.parametrize(("gpus", "where"), [(0, "cpu"), (1, "cpu"), (2, "meta"), (3, "meta")])
def test_ranks_compute_on_gpus_when_each_has_one(monkeypatch, gpus, where):
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)
    monkeypatch.setattr(hardware, "device", lambda: "meta")  # stands for the GPU
    assert ranks.place(uneven(), world_size=2)["labels"].device.type == where
