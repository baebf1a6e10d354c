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


@pytest.mark.slow
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


def test_loss_in_chunks_is_cross_entropys():
    for case in cases("loss_in_chunks"):
        logits, labels, chunk = case.arguments
        rows = torch.tensor(logits, dtype=torch.float64)[:, :-1].flatten(0, 1)
        targets = torch.tensor(labels)[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(rows, targets, ignore_index=-100)
        most = max(part.numel() for part in rows.split(chunk))
        assert case.expected == [pytest.approx(loss.item(), rel=1e-9), most]


@pytest.mark.slow
def test_three_copies_of_the_logits_stand_at_the_engines_peak():
    """What the usual loss needs more than a chunked one is three copies more of the logits."""
    from dataclasses import replace

    from fitcast.forecasting.forecast import forecast
    from fitcast.gpus import T4
    from fitcast.recipe import TrainRecipe

    recipe = TrainRecipe(
        model="llama-3.2-1b",
        amp_dtype="float16",
        micro_batch_size=4,
        sequence_length=2048,
        checkpointed_layers="all",
        padded=True,
    )
    four, two = (
        forecast(replace(recipe, micro_batch_size=rows), T4).peak_allocated_bytes for rows in (4, 2)
    )
    bytes_of = SOLUTIONS["logits_bytes"].solution
    logits = bytes_of(4, 2048, 128_256, 1024)[0] - bytes_of(2, 2048, 128_256, 1024)[0]
    boundaries = 16 * 2 * 2048 * 2048 * 2  # layers, rows, tokens, width, bytes: they grow as well
    assert four - two == pytest.approx(logits + boundaries, rel=0.02)


def test_fewest_levers_is_what_trying_every_choice_finds():
    """Every choice as bits of a number, and the peak by an array."""
    numpy = pytest.importorskip("numpy")
    for case in cases("fewest_levers"):
        moments, left, budget = case.arguments
        table = numpy.array(moments, dtype=float)
        rest = numpy.array([numpy.inf if mib is None else mib for mib in left])
        found = [
            bits.bit_count()
            for bits in range(2 ** len(left))
            if all(left[p] is not None for p in range(len(left)) if bits >> p & 1)
            and numpy.where(
                [bits >> p & 1 for p in range(len(left))], numpy.minimum(table, rest), table
            )
            .sum(axis=1)
            .max()
            <= budget
        ]
        assert case.expected == min(found, default=-1)


@pytest.mark.slow
def test_labels_are_those_that_the_course_trains_with():
    from course_utils.topics import sources
    from fitcast.training import data

    tokenizer = sources.choose(None).tokenizer()
    messages = [
        {"role": "user", "content": "Where is order 7?"},
        {"role": "assistant", "content": "On its way."},
        {"role": "user", "content": "Since?"},
        {"role": "assistant", "content": "May."},
    ]

    def ids_of(some, header=False):
        text = tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=header)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    (row,) = data.encode([{"messages": messages}], tokenizer, 512)
    turns = []
    for n, message in enumerate(messages):
        before, whole = len(ids_of(messages[:n])) if n else 0, len(ids_of(messages[: n + 1]))
        spoken = len(ids_of(messages[:n], True)) if message["role"] == "assistant" else before
        ids = row["input_ids"]
        turns.append([message["role"], ids[before:spoken], ids[spoken:whole], []])
    assert SOLUTIONS["labels_of"].solution(turns) == list(row["labels"])


@pytest.mark.slow
def test_adapters_are_pefts():
    from fitcast import models
    from fitcast.forecasting.load import blueprint
    from fitcast.recipe import TrainRecipe
    from fitcast.step import qlora

    short = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
    short |= {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
    config = models.config("llama-3.2-1b")
    kv = config.num_key_value_heads * config.head_dim
    shape = config.num_hidden_layers, config.hidden_size, kv, config.intermediate_size, 16
    for targets in (["q", "k", "v", "o"], ["q", "v"], list(short)):
        recipe = TrainRecipe(
            model="llama-3.2-1b",
            base="float32",
            lora_rank=16,
            lora_targets=tuple(short[name] for name in targets),
        )
        counted = qlora.count_parameters(blueprint(recipe, config))[0]
        assert SOLUTIONS["adapter_parameters"].solution(*shape, targets) == counted


def test_base_is_what_bitsandbytes_stores():
    """On its CPU kernels: packed weights, 8-bit scales, and the float32 of each 256 of these."""
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in ((2048, 512), (10, 30), (640, 96)):
        packed, state = functional.quantize_4bit(
            torch.randn(shape), quant_type="nf4", compress_statistics=True
        )
        stored = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
        assert SOLUTIONS["base_bytes"].solution([list(shape)], 0) == stored
