"""The assignments' solutions against PyTorch, transformers and the course's own instruments."""

import math

import pytest

from course_utils.data import BUNDLED
from instructor.assignment import load, names, numbers

torch = pytest.importorskip("torch")

SOLUTIONS = {exercise.function: exercise for name in names() for exercise in load(name).exercises}
STUDENTS = ("s1", "s2", "s3", "s4")


def cases(function: str) -> list:
    (name,) = [n for n in names() if SOLUTIONS[function] in load(n).exercises]
    return [
        case
        for student in STUDENTS
        for case in SOLUTIONS[function].cases(numbers(name, student, "a secret for tests"))
    ]


def test_effective_batch_is_the_recipes():
    from fitcast.recipe import TrainRecipe

    for case in cases("effective_batch_size"):
        micro, accumulation, ranks = case.arguments
        recipe = TrainRecipe(
            model=BUNDLED,
            micro_batch_size=micro,
            gradient_accumulation_steps=accumulation,
            world_size=ranks,
        )
        assert recipe.effective_batch_size == case.expected


def test_learning_rate_is_transformers():
    from transformers import get_linear_schedule_with_warmup

    for case in cases("learning_rate"):
        step, steps, percent, peak = case.arguments
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=peak)
        schedule = get_linear_schedule_with_warmup(
            optimizer, math.ceil(percent * steps / 100), steps
        )
        assert case.expected == pytest.approx(peak * schedule.lr_lambdas[0](step), rel=1e-9)


def test_steps_and_lines_are_trainers():
    """`scheduled` lets Trainer run; small runs, as it takes a while."""
    from course_utils.topics.trainer_log import scheduled

    for examples, micro, accumulation, epochs, every in ((27, 4, 2, 2, 3), (20, 2, 4, 2, 2)):
        steps, _, lines = scheduled(examples, micro, accumulation, 1, epochs, 0.1, every)
        ours = SOLUTIONS["last_update"].solution(examples, micro * accumulation, epochs)
        assert ours[0] == steps
        assert (
            SOLUTIONS["last_line"].solution(examples, micro, accumulation, epochs, every)[0]
            == lines
        )


def test_token_weighting_is_cross_entropys():
    """Micro batches of random tokens: their combined mean and gradient are the whole batch's."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(5, 7, generator=random, dtype=torch.float64, requires_grad=True)
    sizes = [[3, 40], [11, 1, 25]]
    data = [
        [
            (
                torch.randn(n, 5, generator=random, dtype=torch.float64),
                torch.randint(7, (n,), generator=random),
            )
            for n in rank
        ]
        for rank in sizes
    ]

    def loss(inputs, labels):
        return torch.nn.functional.cross_entropy(inputs @ weights, labels)

    def gradient(of):
        return torch.autograd.grad(of, weights)[0].flatten().tolist()

    flat = [pair for rank in data for pair in rank]
    whole = loss(torch.cat([x for x, _ in flat]), torch.cat([y for _, y in flat]))
    ranks = [[[len(y), gradient(loss(x, y))] for x, y in rank] for rank in data]
    assert SOLUTIONS["combined_gradient"].solution(ranks) == pytest.approx(gradient(whole))
    mean = SOLUTIONS["mean_over_tokens"].solution(
        [loss(x, y).item() for x, y in flat], [len(y) for _, y in flat]
    )
    assert mean == pytest.approx(whole.item(), rel=1e-12)


def test_trace_is_the_lessons():
    from course_utils.topics.checkpointing import trace_chain

    for case in cases("trace"):
        moments = trace_chain(*case.arguments)
        assert case.expected == [
            max(len(moment.held) for moment in moments),
            sum("again" in moment.action for moment in moments),
        ]


def test_scores_are_what_eager_keeps_more_than_sdpa():
    from dataclasses import replace

    from fitcast.forecasting.block import count_block
    from fitcast.recipe import TrainRecipe

    sdpa = TrainRecipe(
        model="llama-2-7b",
        base="float16",
        lora_rank=None,
        lora_dropout=0,
        sequence_length=256,
        micro_batch_size=2,
        checkpointed_layers=0,
    )
    eager = replace(sdpa, attention="eager")
    more = count_block(eager).saved_activation_bytes - count_block(sdpa).saved_activation_bytes
    kept = SOLUTIONS["kept_scores"].solution
    assert kept(2, 32, 256, "eager") - kept(2, 32, 256, "sdpa") == more


def test_limits_are_torchs():
    for dtype, widths in (
        (torch.float16, (5, 10)),
        (torch.bfloat16, (8, 7)),
        (torch.float32, (8, 23)),
    ):
        info = torch.finfo(dtype)
        assert SOLUTIONS["limits"].solution(*widths) == [
            info.max,
            info.tiny,
            info.smallest_normal * info.eps,
            info.eps,
        ]


def test_bits_are_torchs():
    for width, dtype in ((5, torch.float16), (8, torch.bfloat16)):
        patterns = torch.arange(-(2**15), 2**15, 37, dtype=torch.int16)
        found = patterns.view(dtype)
        for pattern, number in zip(patterns.tolist(), found.tolist(), strict=True):
            if math.isfinite(number):
                bits = f"{pattern % 2**16:016b}"
                assert SOLUTIONS["number_from"].solution(bits, width) == number


def test_updates_are_torchs():
    for case in cases("updated"):
        weight, update, times, bits = case.arguments
        stored = torch.tensor(weight, dtype={10: torch.float16, 7: torch.bfloat16}[bits])
        for _ in range(times):
            stored = (stored.double() + update).to(stored.dtype)
        assert case.expected == stored.item()


def test_bytes_of_training_are_torchs():
    layer = torch.nn.Linear(64, 32)
    adam = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 64)).sum().backward()
    adam.step()
    state = sum(
        value.nbytes
        for entry in adam.state.values()
        for name, value in entry.items()
        if name != "step"
    )
    held = sum(p.nbytes + p.grad.nbytes for p in layer.parameters()) + state
    parameters = sum(p.numel() for p in layer.parameters())
    assert SOLUTIONS["training_bytes"].solution(parameters, 2048, "float32") == held
    assert sum(SOLUTIONS["holders"].solution(parameters, parameters, 4)) == held


def test_lost_gradients_are_torchs():
    edges = [
        edge * nudge
        for edge in (2**-25, 2**-14, 65504.0, 65520.0)
        for nudge in (1 - 2**-20, 1.0, 1 + 2**-20)
    ]
    for numbers_, scale in [(edges, 1.0), *(case.arguments for case in cases("lost_gradients"))]:
        gradients = torch.tensor(numbers_, dtype=torch.float64)
        landed = (gradients * scale).to(torch.float16)
        lost = (landed == 0) & (gradients != 0)
        assert SOLUTIONS["lost_gradients"].solution(numbers_, scale) == [
            int(lost.sum()),
            int(landed.isinf().sum()),
        ]


def test_scaler_is_torchs():
    for case in cases("run_scaler"):
        (scale, good_steps), steps, ceiling, interval = case.arguments
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=interval)
        scaler.load_state_dict(scaler.state_dict() | {"_growth_tracker": good_steps})
        weight = torch.nn.Parameter(torch.ones(1))
        optimizer, skipped = torch.optim.SGD([weight], lr=1.0), 0
        for _ in range(steps):
            before = weight.item()
            optimizer.zero_grad()
            overflows = scaler.get_scale() > ceiling
            scaler.scale(weight.sum() * (math.inf if overflows else 1e-3)).backward()
            scaler.step(optimizer)
            scaler.update()
            skipped += weight.item() == before
        assert case.expected == [
            scaler.get_scale(),
            scaler.state_dict()["_growth_tracker"],
            skipped,
        ]


def test_clipping_is_torchs():
    for case in cases("what_arrives"):
        gradients, scale, max_norm = case.arguments
        if None in gradients:
            assert case.expected == []
            continue
        weight = torch.nn.Parameter(torch.zeros(len(gradients), dtype=torch.float64))
        weight.grad = torch.tensor(gradients, dtype=torch.float64) / scale
        torch.nn.utils.clip_grad_norm_(weight, max_norm)
        assert case.expected == pytest.approx(weight.grad.tolist(), rel=2e-6)  # its epsilon 1e-6
