"""Forgetting on purpose: the trace against real autograd, work against PyTorch's own counter."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from course_utils.data import BUNDLED
from course_utils.topics import checkpointing
from course_utils.topics.checkpointing import (
    WorkCounter,
    build_stack,
    in_segments,
    step_stack,
    trace_chain,
)
from fitcast.memory.ledger import MemoryLedger
from fitcast.recipe import TrainRecipe

RECIPE = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_rank=None,
    lora_dropout=0.0,
    checkpointed_layers=0,
    optimizer="adamw",
    micro_batch_size=1,
    sequence_length=32,
)


class Sine(torch.nn.Module):
    """A step that keeps exactly its input for backward."""

    def forward(self, x):
        return x.sin()


class Sines(TorchDispatchMode):
    """Counts the sines that are computed, not only begun."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten.sin.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("steps", "size"), [(6, 2), (6, 3), (6, 6), (7, 3), (12, 4), (5, 0)])
def test_trace_is_what_pytorch_does(steps, size):
    trace = trace_chain(steps, kept=range(1, steps + 1, size or 1))
    x, upstream = torch.ones(256, requires_grad=True), torch.ones(256)
    with MemoryLedger(inputs=(x, upstream)) as ledger, Sines() as sines:
        in_segments([Sine()] * steps, x, size).backward(upstream)
    # the chain's own input is a1; everything else that waits for backward is an activation
    held = 1 + max(ledger.report().timeline["activations"]) // x.nbytes
    assert held == max(len(moment.held) for moment in trace)
    assert sines.count == sum("forward" in moment.action for moment in trace)


@given(st.integers(1, 40), st.data())
def test_every_backward_step_finds_its_input_and_frees_it(steps, data):
    kept = {1} | data.draw(st.sets(st.integers(1, steps)))
    trace = trace_chain(steps, kept)
    backward = [moment for moment in trace if moment.action.startswith("backward")]
    assert [moment.held[-1] for moment in backward] == list(range(steps, 0, -1))
    assert backward[-1].held == (1,)
    again = sum("again" in moment.action for moment in trace)
    assert again == steps - len(kept)  # what was dropped is computed once more, and only that


@pytest.mark.parametrize("root", [3, 5, 8, 10])
def test_square_root_is_best_on_a_chain(root):
    def most(size):
        trace = trace_chain(root**2, kept=range(1, root**2 + 1, size))
        return max(len(moment.held) for moment in trace)

    assert most(root) == min(map(most, range(1, root**2))) == 2 * root - 1
    assert most(1) == most(root**2) == root**2


@pytest.mark.parametrize("kept", [[], [2], [1, 7], [0, 1]])
def test_impossible_checkpoints_are_refused(kept):
    with pytest.raises(ValueError, match=r"kept must be numbers from 1 to 6 with 1 among them"):
        trace_chain(6, kept)


@pytest.fixture(scope="module")
def stack():
    return build_stack(RECIPE, num_layers=6)


@functools.cache
def stepped(size):
    return step_stack(build_stack(RECIPE, num_layers=6), RECIPE, size)


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_segments_change_no_bit_of_a_gradient(size):
    plain, segments = stepped(0), stepped(size)
    assert len(plain.gradients) == 6 * 9
    assert all(map(torch.equal, plain.gradients, segments.gradients))
    assert any(gradient.abs().max() > 0 for gradient in plain.gradients)
    # one segment around everything holds all of it again, when backward begins
    fewer = segments.activation_bytes < plain.activation_bytes
    assert fewer if size < 6 else segments.activation_bytes == plain.activation_bytes


def test_activations_are_what_autograd_saves(stack):
    """Without checkpoints: the storages that saved_tensors_hooks see, weights and inputs aside."""
    step = step_stack(stack, RECIPE, 0)
    x = torch.randn(1, RECIPE.sequence_length, stack.config.hidden_size, requires_grad=True)
    rotary = stack.rotary_emb(x.detach(), torch.arange(RECIPE.sequence_length)[None])
    known = {t.untyped_storage().data_ptr() for t in (*stack.parameters(), x, *rotary)}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = in_segments(stack.layers, x, 0, position_embeddings=rotary)
    assert step.activation_bytes == sum(saved.values())
    del y


def test_least_memory_is_a_checkpoint_for_each_layer():
    held = {size: stepped(size).activation_bytes for size in (1, 2, round(math.sqrt(6)), 3)}
    assert min(held, key=held.get) == 1


def test_recomputation_leaves_out_the_last_product():
    """Each layer comes again but for down_proj, whose output nobody asks for."""
    config = build_stack(RECIPE, num_layers=1).config
    down = 2 * RECIPE.sequence_length * config.intermediate_size * config.hidden_size
    model = build_stack(RECIPE, num_layers=6)
    x = torch.ones(1, RECIPE.sequence_length, config.hidden_size)
    rotary = model.rotary_emb(x, torch.arange(RECIPE.sequence_length)[None])
    with WorkCounter() as forward:
        in_segments(model.layers, x, 0, position_embeddings=rotary)
    assert stepped(1).flops - stepped(0).flops == forward.flops - 6 * down


def test_work_is_counted_as_pytorch_counts_it():
    model = build_stack(replace(RECIPE, sequence_length=16), num_layers=2)
    ids = torch.zeros(2, 16, dtype=torch.long)
    with sdpa_kernel(SDPBackend.MATH):  # two products, which PyTorch's counter knows
        with FlopCounterMode(display=False) as theirs:
            model(input_ids=ids).last_hidden_state.sum().backward()
        with WorkCounter() as ours:
            model(input_ids=ids).last_hidden_state.sum().backward()
    assert ours.flops == theirs.get_total_flops() > 0


def test_attention_on_a_cpu_is_counted():
    query = torch.randn(2, 3, 16, 8, requires_grad=True)
    forward = 2 * 2 * 2 * 3 * 16 * 16 * 8  # two products of 2 x batch x heads x seq x seq x dim
    with WorkCounter() as work:
        output = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        assert work.flops == forward
        output.sum().backward()
    assert work.flops == forward + 2.5 * forward  # the scores again, and four products


def test_pytorchs_counter_would_disturb_the_ledger(stack):
    """Why `WorkCounter` exists: remove it when this fails."""

    def highest(counter):
        x = torch.ones(1, 32, stack.config.hidden_size, requires_grad=True)
        rotary = stack.rotary_emb(x.detach(), torch.arange(32)[None])
        with MemoryLedger(stack, inputs=(x, rotary)) as ledger, counter:
            in_segments(stack.layers, x, 1, position_embeddings=rotary).sum().backward()
        return max(ledger.report().timeline["activations"])

    assert highest(FlopCounterMode(display=False)) > 1.5 * highest(WorkCounter())


def test_recorded_rows_stand_beside_the_first_of_their_kind():
    line = checkpointing.beside_the_first()
    rows = [("LoRA, 0 layers", 100.0, 4), ("LoRA, 8 layers", 80.0, 1), ("all, 0 layers", 50.0, 8)]
    said = [
        line({"name": name, "tokens_per_second": speed, "peak_allocated_bytes": gib * 2**30})
        for name, speed, gib in rows
    ]
    assert [text.split("layers")[1].split() for text in said] == [
        ["1.00", "x", "the", "time,", "4.00", "GiB", "=", "100%"],
        ["1.25", "x", "the", "time,", "1.00", "GiB", "=", "25%"],
        ["1.00", "x", "the", "time,", "8.00", "GiB", "=", "100%"],
    ]
