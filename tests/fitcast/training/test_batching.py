"""Batching: gradients against one big batch, the search against trying every size, state intact."""

import copy
import gc
import re
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from course_utils.data import BUNDLED
from course_utils.figures import batches
from fitcast.forecasting.fake import fake_model, fake_tensors
from fitcast.memory.ledger import MemoryLedger
from fitcast.training import batching
from fitcast.training.batching import Probe, Search, largest_micro_batch, split
from fitcast.training.gradients import gradient, in_float64, relative_error
from fitcast.units import MIB


@pytest.fixture(autouse=True, scope="module")
def small_heap():
    """A search collects garbage after each failure; spare it what pytest has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def build(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            use_cache=False,
        )
    )
    return in_float64(model) if dtype == torch.float64 else model


def labelled(*counts, tokens=24):
    """One row for each count: how many of its tokens carry a label; padded on the right."""
    ids = torch.randint(128, (len(counts), tokens), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    for row, count in enumerate(counts):
        labels[row, 1 + count :] = -100
    mask = torch.ones_like(ids)
    mask[0, 20:] = 0
    labels[0, 20:] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


UNEVEN = labelled(19, 1, 2, 23, 0, 0, 5)  # rows 4 and 5, a micro batch, carry no label at all


def gradient_of(model, add, *arguments):
    model.zero_grad()
    add(model, *arguments)
    return gradient(model)


def at_once(model, batch):
    model(**batch).loss.backward()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_gradients_add_up_to_the_whole_batchs(dtype, tolerance, size):
    model = build(dtype)
    whole = gradient_of(model, at_once, UNEVEN)
    parts = gradient_of(model, batching.accumulate, split(UNEVEN, size))
    assert relative_error(parts, whole) < tolerance


def test_the_loss_is_the_whole_batchs():
    model = build()
    expected = model(**UNEVEN).loss
    loss = batching.accumulate(model, split(UNEVEN, 2))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert not loss.requires_grad


def test_a_mean_of_means_is_another_gradient():
    """What the equality above guards against is far from equal."""
    model, batch = build(), labelled(1, 1, 1, 19)

    def add_means(model, micro_batches):
        for micro_batch in micro_batches:
            (model(**micro_batch).loss / len(micro_batches)).backward()

    whole = gradient_of(model, at_once, batch)
    assert relative_error(gradient_of(model, add_means, split(batch, 1)), whole) > 0.5


def test_accumulation_adds_and_neither_clears_nor_steps():
    model = build()
    weights = copy.deepcopy(model.state_dict())
    once = gradient_of(model, batching.accumulate, [UNEVEN])
    batching.accumulate(model, [UNEVEN])
    assert relative_error(gradient(model), 2 * once) < 1e-12
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_no_label_at_all_is_refused():
    batch = labelled(0, 0)
    with pytest.raises(ValueError, match="^micro_batches must hold .* got 0; a mean over no token"):
        batching.accumulate(build(), [batch])


@pytest.mark.parametrize("size", [0, -1, 1.5, "2"])
def test_bad_split_is_refused(size):
    with pytest.raises(ValueError, match="^micro_batch_size must be a whole number"):
        split(UNEVEN, size)


def test_split_loses_no_row():
    parts = split(UNEVEN, 3)
    assert [len(part["labels"]) for part in parts] == [3, 3, 1]
    assert all(
        torch.equal(torch.cat([part[name] for part in parts]), UNEVEN[name]) for name in UNEVEN
    )


def test_the_number_of_micro_batches_costs_no_memory():
    def peak(number):
        batch = labelled(*[20] * 2 * number)
        model = build()
        with MemoryLedger(model, inputs=batch) as ledger:
            batching.accumulate(model, split(batch, 2))
        report = ledger.report()
        return report.peak_bytes - report.composition["inputs"]

    assert peak(2) == peak(6)


class Counter(torch.nn.Module):
    """Counts its forward passes in a buffer, as batch norm does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, x):
        self.seen += 1
        return x


class Trained:
    """A small model with dropout, something in its optimizer and something in its gradients."""

    def __init__(self, optimizer=torch.optim.AdamW):
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, 256), Counter(), torch.nn.Dropout(0.5), torch.nn.Linear(256, 8)
        )
        self.optimizer = optimizer(self.model.parameters(), lr=0.01)
        self.steps = 0

    def backward(self, size):
        self.model(torch.ones(16 * size, 64).uniform_()).square().mean().backward()

    def step(self):
        self.backward(4)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def search(self, budget_bytes=MIB, **options):
        return largest_micro_batch(
            self.backward, self.model, self.optimizer, budget_bytes=budget_bytes, **options
        )

    def state(self):
        """Everything that a search must leave alone."""
        model, optimizer = self.model, self.optimizer
        return copy.deepcopy(
            [
                model.state_dict(),
                [p.grad for p in model.parameters()],
                optimizer.state_dict(),
                torch.get_rng_state(),
                [module.training for module in model.modules()],
            ]
        )


def same(left, right):
    if isinstance(left, torch.Tensor):
        return isinstance(right, torch.Tensor) and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def fits(trained, size, budget_bytes, accumulated=2, steps=2):
    """Whether a copy trains: the search's question, asked plainly."""
    trained = copy.deepcopy(trained)
    trained.optimizer.zero_grad()
    trained.model.train()
    try:
        with MemoryLedger(trained.model, optimizer=trained.optimizer, budget_bytes=budget_bytes):
            for _ in range(steps):
                for _ in range(accumulated):
                    trained.backward(size)
                trained.optimizer.step()
                trained.optimizer.zero_grad()
    except torch.OutOfMemoryError:
        return False
    return True


@pytest.mark.parametrize("budget_kib", [350, 400, 500, 800])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_search_finds_what_trying_every_size_finds(budget_kib, accumulated):
    trained, budget_bytes = Trained(), budget_kib * 1024
    size = 0
    while fits(trained, size + 1, budget_bytes, accumulated):
        size += 1
    search = trained.search(budget_bytes, gradient_accumulation_steps=accumulated)
    assert search.micro_batch_size == size
    assert len(search.probes) <= 2 * (size + 1).bit_length()
    for probe in search.probes:
        assert probe.fits == (probe.micro_batch_size <= size)
        assert (probe.peak_bytes is not None) == probe.fits
        assert not probe.fits or probe.peak_bytes <= budget_bytes


def test_nothing_fits_and_everything_fits():
    assert Trained().search(100 * 1024).micro_batch_size == 0
    assert Trained().search(64 * MIB, upper=11).micro_batch_size == 11
    assert Trained().search(64 * MIB, upper=1).micro_batch_size == 1


def test_an_optimizer_step_is_included():
    """Adam's state is there before any step was taken, SGD has none."""
    budget_bytes = 800 * 1024
    adam, sgd = (
        Trained(kind).search(budget_bytes).micro_batch_size
        for kind in (torch.optim.AdamW, torch.optim.SGD)
    )
    assert adam < sgd


def test_the_step_after_the_first_is_included():
    """A card on which the first update runs, and the second, with Adam's state, does not."""
    trained, eight = Trained(), lambda size: trained.backward(8 * size)
    budget_bytes = next(
        kib * 1024 for kib in range(200, 2000, 10) if fits(Trained(), 8, kib * 1024, steps=1)
    )
    assert not fits(Trained(), 8, budget_bytes)
    search = largest_micro_batch(eight, trained.model, trained.optimizer, budget_bytes=budget_bytes)
    assert search.micro_batch_size == 0


class Counting(torch.optim.SGD):
    """Counts its steps in its group, as schedule-free optimizers do."""

    def step(self, closure=None):
        self.param_groups[0]["k"] = self.param_groups[0].get("k", 0) + 1
        super().step()


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        Counting,
        lambda parameters, lr: torch.optim.SGD(parameters, lr, momentum=0.9),
    ],
    ids=["AdamW", "counting", "momentum"],
)
@pytest.mark.parametrize("before", ["nothing", "steps", "gradients", "modes"])
def test_search_leaves_all_as_it_was(optimizer, before):
    trained = Trained(optimizer)
    for _ in range(0 if before == "nothing" else 3):
        trained.step()
    if before == "gradients":
        trained.backward(4)
    if before == "modes":
        trained.model.eval()
        trained.model[2].train()
    state = trained.state()
    search = trained.search(800 * 1024)
    assert search.micro_batch_size > 0 and not all(probe.fits for probe in search.probes)
    assert same(trained.state(), state)


def test_training_goes_on_as_if_nothing_had_been_searched():
    undisturbed, searched = Trained(), Trained()
    for trained in (undisturbed, searched):
        torch.manual_seed(3)
        trained.step()
        if trained is searched:
            trained.search()
        trained.step()
    assert same(searched.state(), undisturbed.state())


def test_frozen_weights_are_not_copied():
    trained = Trained()
    trained.model[0].requires_grad_(False)
    frozen = trained.model[0].weight
    with MemoryLedger() as ledger, batching.unchanged(trained.model, trained.optimizer):
        pass
    copies = [block.shape for block in ledger.report().largest if block.category != "inputs"]
    assert tuple(frozen.shape) not in copies


def test_probes_train():
    """In eval mode there is no dropout mask, and a checkpointed layer does not forget."""
    trained, seen = Trained(), set()
    trained.model.eval()
    backward = trained.backward

    def watched(size):
        seen.add(trained.model.training)
        backward(size)

    largest_micro_batch(watched, trained.model, trained.optimizer, upper=2, budget_bytes=MIB)
    assert seen == {True} and not trained.model.training


def test_a_failed_attempt_leaves_no_tensor_to_the_next():
    trained, left, leaks = Trained(), [], []

    def backward(size):
        leaks.extend(tensor for tensor in left if tensor() is not None)
        x = torch.ones(16 * size, 64)
        left.append(weakref.ref(x))
        frame = SimpleNamespace()
        try:
            trained.model(x).square().mean().backward()
        except torch.OutOfMemoryError as error:
            frame.why = error  # local variable, exception, traceback, frame: a cycle
            raise

    search = largest_micro_batch(
        backward, trained.model, trained.optimizer, budget_bytes=800 * 1024
    )
    assert not all(probe.fits for probe in search.probes)
    gc.collect()
    assert leaks == [] and all(tensor() is None for tensor in left)


@pytest.mark.parametrize(
    "message",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
        "CUDA out of memory. Tried to allocate 20.00 MiB",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_libraries_words_for_a_full_card_are_known(message):
    trained = Trained()

    def backward(size):
        if size > 5:
            raise RuntimeError(message)
        trained.backward(size)

    search = largest_micro_batch(backward, trained.model, trained.optimizer, budget_bytes=64 * MIB)
    assert search.micro_batch_size == 5


def test_another_error_comes_through_and_leaves_all_as_it_was():
    trained = Trained()
    trained.step()
    state = trained.state()

    def backward(size):
        trained.backward(size)
        if size == 4:
            raise RuntimeError("The size of tensor a (4) must match")

    with pytest.raises(RuntimeError, match="The size of tensor a"):
        largest_micro_batch(backward, trained.model, trained.optimizer, budget_bytes=64 * MIB)
    assert same(trained.state(), state)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="a GPU limits memory by itself")
def test_a_cpu_needs_a_budget():
    with pytest.raises(ValueError, match="^budget_bytes must be a number of bytes on a CPU, got N"):
        Trained().search(None)


def test_upper_must_be_positive():
    with pytest.raises(ValueError, match="^upper must be at least 1, got 0"):
        Trained().search(upper=0)


@pytest.mark.slow
def test_search_works_on_models_that_are_not_there():
    model = fake_model(BUNDLED)
    optimizer = torch.optim.SGD(model.parameters())

    def backward(size):
        ids = torch.zeros(size, 64, dtype=torch.long)
        batching.accumulate(model, [{"input_ids": ids, "labels": ids}], num_items=1)

    with fake_tensors():
        search = largest_micro_batch(backward, model, optimizer, budget_bytes=40 * MIB)
    assert 1 < search.micro_batch_size < 20
    weights = sum(p.nbytes for p in model.parameters())
    assert all(probe.peak_bytes > 2 * weights for probe in search.probes if probe.fits)


DRAWN = {
    "updates": (
        lambda: batches.updates(
            [("accumulate", 1.0), ("accumulate", 2.0), ("update", 2.0), ("clear", 0.0)], "two"
        ),
        "over 2 micro batches and 1 optimizer steps: two.*accumulate 0.5, accumulate 1.0, update",
    ),
    "token_shares": (lambda: batches.token_shares([1, 9]), "1 tokens: 5, 9 tokens: 0.56"),
    "attempts": (
        lambda: batches.attempts(Search(1, [Probe(1, True, MIB), Probe(2, False, None)]), 2 * MIB),
        "1: fits, peak 1.00 MiB; micro batch   2: out of memory. Largest that fits: 1",
    ),
}


@pytest.mark.parametrize("name", DRAWN)
def test_pictures_say_what_they_show(name):
    draw, words = DRAWN[name]
    figure = draw()
    assert figure.png.startswith(b"\x89PNG") and len(figure.png) > 5000
    assert re.search(words, figure.alt), figure.alt
