"""Formats against numpy and struct, autocast against itself on real tensors, the traced scaler
against PyTorch's and against the rule in its documentation."""

import math
import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from course_utils.figures import base
from course_utils.figures import numbers as number_figures
from course_utils.topics import precision
from course_utils.topics.precision import FORMATS, ScalerStep, TracedScaler

finite = st.floats(allow_nan=False, allow_infinity=False, width=32)


def stored_bits(value: float, name: str) -> int:
    """The bits by the standard library; bfloat16 is float32 rounded to its upper half."""
    if name == "float16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    whole = struct.unpack("<I", struct.pack("<f", value))[0]
    if name == "float32":
        return whole
    return (whole + 0x7FFF + ((whole >> 16) & 1)) >> 16  # ties to even


@pytest.mark.parametrize("name", FORMATS)
@given(value=st.floats(-60000, 60000, width=32))
def test_bits_are_those_in_memory(name, value):
    parts = precision.bits(value, name).split()
    assert [len(part) for part in parts] == {
        "float32": [1, 8, 23],
        "float16": [1, 5, 10],
        "bfloat16": [1, 8, 7],
    }[name]
    assert int("".join(parts), 2) == stored_bits(value, name)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@given(
    numbers=st.lists(finite, min_size=1, max_size=40).filter(any),
    scale=st.sampled_from([1.0, 1024.0, 65536.0]),
)
def test_landing_is_that_of_numpy(numbers, scale):
    given_numbers = np.array([x for x in numbers if x], dtype=np.float64) * scale
    landed = np.abs(given_numbers.astype(np.float16).astype(np.float64))
    landing = precision.land([torch.tensor(numbers, dtype=torch.float64)], "float16", scale)
    assert landing.zero == np.mean(landed == 0)
    assert landing.infinite == np.mean(np.isinf(landed))
    assert landing.normal == np.mean((landed >= 2.0**-14) & np.isfinite(landed))
    total = landing.zero + landing.subnormal + landing.normal + landing.infinite
    assert total == pytest.approx(1)


def test_landing_by_hand():
    edges = torch.tensor([2.0**-25, 2.0**-24, 2.0**-14, 65504.0, 65536.0, math.nan, 0.0])
    landing = precision.land([edges[:3], edges[3:]])  # 2**-25 is a tie, and goes to even: zero
    assert landing == precision.Landing(1 / 6, 1 / 6, 2 / 6, 2 / 6)
    assert precision.land([edges[:5]], "bfloat16").normal == 1


def test_landing_needs_a_number():
    with pytest.raises(ValueError, match="tensors must hold a non-zero number, got none"):
        precision.land([torch.zeros(3)])


@pytest.mark.parametrize(
    "use",
    [
        lambda: precision.bits(1.0, "float8"),
        lambda: precision.land([torch.ones(1)], "fp16"),
        lambda: precision.moved_share([torch.ones(1)], 1.0, "half"),
    ],
)
def test_unknown_format_is_refused(use):
    with pytest.raises(ValueError, match="format must be one of float32, float16, bfloat16, got"):
        use()


@given(
    st.lists(st.floats(-100, 100, width=16), min_size=1, max_size=30),
    st.sampled_from([1e-2, 1e-4, 1e-6]),
)
def test_moved_share_is_that_of_numpy(numbers, update):
    weights = np.array(numbers, dtype=np.float16)
    moved = np.mean((weights.astype(np.float64) + update).astype(np.float16) != weights)
    assert precision.moved_share([torch.tensor(weights)], update, "float16") == moved


def test_watched_gradients_are_those_of_autograd():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.SiLU(), torch.nn.Linear(8, 2))
    with precision.watch_linears(model) as watched:
        model(torch.ones(3, 4)).square().sum().backward()
    hidden = model[0](torch.ones(3, 4)).detach().requires_grad_()
    out = model[2](torch.nn.functional.silu(hidden))
    wanted = torch.autograd.grad(out.square().sum(), [out, hidden])
    assert all(
        torch.equal(ours, theirs) for ours, theirs in zip(watched.gradients, wanted, strict=True)
    )
    assert torch.equal(watched.activations[1], out)
    model(torch.ones(3, 4)).sum().backward()
    assert len(watched.gradients) == 2  # the hooks are gone


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_table_is_what_autocast_does_to_real_tensors(name):
    dtype, table = FORMATS[name], precision.autocast_table("cpu", name)
    with torch.autocast("cpu", dtype=dtype):
        for column, kind in enumerate((torch.float32, dtype)):
            for operation, run in precision._operations(torch.ones(4, 4, dtype=kind)).items():
                assert precision.name_of(run().dtype) == table[operation][column], operation


def test_table_of_a_gpu_is_pytorchs_list():
    """docs.pytorch.org/docs/stable/amp.html, "CUDA Ops that can autocast"."""
    table = precision.autocast_table("cuda")
    assert {table[name] for name in ("linear", "matmul")} == {("float16", "float16")}
    up = ("softmax", "layer_norm", "cross_entropy", "sum", "pow", "exp")
    assert {table[name] for name in up} == {("float32", "float32")}
    assert table["silu"] == ("float32", "float16")
    assert not torch.is_autocast_enabled("cuda") and not torch.is_autocast_enabled("cpu")


def test_log_counts_products_forward_and_backward():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
    with precision.OperationLog() as log:
        model(torch.ones(3, 4)).sum().backward()
    assert log.matmuls == {"float32": 5}  # 2 forward, 2 weights' gradients, 1 hidden gradient
    with precision.OperationLog() as log, torch.autocast("cpu", dtype=torch.bfloat16):
        model(torch.ones(3, 4))
    assert log.matmuls == {"bfloat16": 2}


def rule(scale: float, good_steps: int, overflow: bool, interval: int) -> tuple[float, int]:
    """As the documentation of `torch.amp.GradScaler` says it."""
    if overflow:
        return scale * 0.5, 0
    return (scale * 2.0, 0) if good_steps + 1 == interval else (scale, good_steps + 1)


@pytest.mark.parametrize("interval", [3, 7, 20])
def test_traced_scaler_is_pytorchs_step_by_step(interval):
    random = torch.Generator().manual_seed(interval)
    overflows = (torch.rand(200, generator=random) < 0.1).tolist()
    ours, theirs = (
        kind("cpu", init_scale=1024.0, growth_interval=interval)
        for kind in (TracedScaler, torch.amp.GradScaler)
    )
    scale, good_steps = 1024.0, 0
    weights = {s: torch.nn.Parameter(torch.ones(2)) for s in (ours, theirs)}
    for step, overflow in enumerate(overflows):
        before = ours.get_scale()
        for scaler, weight in weights.items():
            optimizer = torch.optim.SGD([weight], lr=1e-3)
            scaler.scale(weight.sum() * (math.inf if overflow else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            weight.grad = None
        scale, good_steps = rule(scale, good_steps, overflow, interval)
        assert ours.trace[step] == ScalerStep(before, overflow)
        assert (ours.get_scale(), ours.state_dict()["_growth_tracker"]) == (scale, good_steps)
        assert ours.state_dict() == theirs.state_dict()
        assert torch.equal(weights[ours], weights[theirs])
    assert 0 < sum(step.skipped for step in ours.trace) < 200


NUMBERS = [torch.tensor([1e-8, 1e-6, 0.1, 1e6])]
DRAWN = {
    "bit_fields": (number_figures.bit_fields, "float16 0 01011 1001100110"),
    "magnitudes": (
        lambda: number_figures.magnitudes({"gradients": NUMBERS}),
        "25% become zero, 25% are subnormal, 25% normal, 25% infinite",
    ),
    "scaled": (
        lambda: number_figures.magnitudes({"gradients": NUMBERS}, scale=1024.0),
        "times 1,024. In float16, gradients: 0% become zero, 25% are subnormal, 50% normal",
    ),
    "magnitudes to guess from": (
        lambda: number_figures.magnitudes(
            {"gradients": [torch.tensor([0.3, 0.4, 1e-8])]}, say_landing=False
        ),
        "magnitudes. gradients are most often between 2**-2 and 2**-1.",
    ),
    "scale_window": (
        lambda: number_figures.scale_window({0: 0.1, 8: 1e-3, 16: math.inf}),
        "At most 2% from 2**8 to 2**8, more below, infinite from 2**16.",
    ),
    "smallest_updates": (
        lambda: number_figures.smallest_updates(1e-4, [torch.tensor([1.0, 1e-3])]),
        "float32 100%, float16 50%, bfloat16 50%",
    ),
    "loss_scale": (
        lambda: number_figures.loss_scale([ScalerStep(65536.0, True), ScalerStep(32768.0, False)]),
        "From 65,536 to 32,768, at most 65,536; steps skipped: 1.",
    ),
}


@pytest.mark.one_fast
@pytest.mark.parametrize(("draw", "words"), DRAWN.values(), ids=DRAWN)
def test_figure_says_what_it_shows(draw, words):
    figure = draw()
    assert isinstance(figure, base.Figure) and figure.png.startswith(b"\x89PNG")
    assert words in figure.alt
    assert figure.png == draw().png
