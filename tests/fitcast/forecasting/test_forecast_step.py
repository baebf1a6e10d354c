"""A reader's own step is forecast as the recipe's is; what would be counted wrong is refused."""

import dataclasses
import io

import bitsandbytes
import pytest
import safetensors.torch
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BatchEncoding

from course_utils.data import BUNDLED
from fitcast.forecasting.fake import fake_model
from fitcast.forecasting.forecast import forecast, forecast_step
from fitcast.gpus import T4
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import GIB, KIB, MIB

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # PEFT 0.21
RECIPE = TrainRecipe(
    model=BUNDLED,
    base="float32",
    lora_rank=None,
    optimizer="adamw",
    checkpointed_layers=0,
    micro_batch_size=8,
    sequence_length=128,
)


def steps(n: int):
    """n optimizer steps of `RECIPE`, as a reader would write them."""

    def step(model):
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(n):
            batch = {
                "input_ids": torch.zeros(8, 128, dtype=torch.long),
                "labels": torch.zeros(8, 128, dtype=torch.long),
            }
            qlora.training_step(model, optimizer, [batch], RECIPE)

    return step


@pytest.mark.slow
def test_two_steps_need_what_the_recipe_needs_and_one_needs_less():
    model = qlora.apply_levers(fake_model(BUNDLED, torch.float32), RECIPE)
    one, two = (forecast_step(model, steps(n)).peak_allocated_bytes for n in (1, 2))
    assert two == forecast(RECIPE, T4).peak_allocated_bytes
    assert one < 0.9 * two


def ids():
    return torch.zeros(8, 128, dtype=torch.long, device="cuda")


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def loop(model, optimizer=None, n=2):
    """A loop as people write it for a card: mixed precision, scaler, clipping, two steps."""
    model.to("cuda").train()
    optimizer = optimizer or torch.optim.AdamW(trained(model))
    scaler = torch.amp.GradScaler("cuda")
    for _ in range(n):
        x, y = ids(), torch.zeros(8, 128, dtype=torch.long).to(torch.device("cuda", 0))
        with torch.autocast("cuda", dtype=torch.float16):
            loss = model(input_ids=x, labels=y).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained(model), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()


def near(n_bytes):
    """Within some scalars and codes of 16 numbers, held longer or more often."""
    return pytest.approx(n_bytes, abs=32 * KIB)


def quantized(real):
    """The bundled model in 4 bits, with weights or without; the head stays in 16 bits."""
    options = {"quantization_config": qlora.quantization(QLORA), "dtype": torch.float16}
    if not real:
        return fake_model(BUNDLED, **options)
    return AutoModelForCausalLM.from_pretrained(BUNDLED, **options)


QLORA = dataclasses.replace(
    RECIPE, base="nf4", lora_rank=8, amp_dtype="float16", lora_targets="all-linear"
)


def adapted(model):
    """With a new config each time: PEFT writes into the one that it is given."""
    model.enable_input_require_grads()
    return get_peft_model(
        model,
        LoraConfig(
            r=8, lora_alpha=16, lora_dropout=QLORA.lora_dropout, target_modules="all-linear"
        ),
    )


@pytest.mark.slow
def test_autocast_on_cuda_is_autocast_without_a_gpu(recwarn):
    """As the recipe has it, whose forecasts are held against measured runs."""
    recipe = dataclasses.replace(RECIPE, amp_dtype="float16")
    model = fake_model(BUNDLED)
    assert forecast_step(model, loop).peak_bytes == near(forecast(recipe, T4).peak_bytes)
    assert not [warning for warning in recwarn if "CUDA" in str(warning.message)]
    assert not torch.is_autocast_enabled("cpu")


def with_adapters_inside(model):
    loop(adapted(model))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("inside", "real"),
    [
        pytest.param(True, True, id="inside-loaded"),
        pytest.param(True, False, id="inside-fake", marks=pytest.mark.slow),
        pytest.param(False, True, id="outside-loaded", marks=pytest.mark.slow),
        pytest.param(False, False, id="outside-fake", marks=pytest.mark.slow),
    ],
)
def test_a_4_bit_base_with_adapters(real, inside):
    """Loaded or fake, adapters added in the step or before it: as the recipe has it."""
    model = quantized(real)
    before = {name: id(p) for name, p in model.named_parameters()}
    whole = model if inside else adapted(model)
    f = forecast_step(whole, with_adapters_inside if inside else loop)
    assert f.peak_bytes == near(forecast(QLORA, T4).peak_bytes)
    weights = sum(p.nbytes for p in whole.parameters() if p.dtype != torch.float32)
    assert f.composition["weights"] >= weights and f.composition["adapters"] > 0
    if inside:  # no adapter is left behind
        assert {name: id(p) for name, p in model.named_parameters()} == before


@pytest.mark.slow
def test_an_8_bit_base():
    from transformers import BitsAndBytesConfig

    eight = {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "dtype": torch.float16}
    peaks = [
        forecast_step(model, with_adapters_inside).peak_bytes
        for model in (
            fake_model(BUNDLED, **eight),
            AutoModelForCausalLM.from_pretrained(BUNDLED, **eight),
        )
    ]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)
    assert min(peaks) > forecast(QLORA, T4).peak_bytes


@pytest.mark.slow
def test_a_compute_dtype_apart_from_autocast():
    """A 4-bit product dequantizes its weight to a dtype of its own: float32 is twice float16."""

    def step(model):
        body = adapted(model).get_base_model().model  # without the logits, which are larger
        body(
            torch.zeros(1, 128, dtype=torch.long, device="cuda")
        ).last_hidden_state.sum().backward()

    def of(dtype):
        model = quantized(real=False)
        layers = [layer for layer in model.modules() if hasattr(layer, "compute_dtype")]
        for layer in layers:
            layer.compute_dtype = dtype
        largest = max(layer.in_features * layer.out_features for layer in layers)
        return forecast_step(model, step).peak_bytes, largest

    (half, largest), (single, _) = of(torch.float16), of(torch.float32)
    assert single - half >= 2 * largest


@pytest.mark.parametrize(
    ("gib", "verdict"), [(1.2, "fits"), (1.03, "tight"), (0.97, "tight"), (0.95, "does not fit")]
)
@pytest.mark.parametrize("made", ["outside", pytest.param("inside", marks=pytest.mark.slow)])
def test_a_step_of_ones_own_may_be_tight(made, gib, verdict):
    """Weights, gradients, two averages and a temporary are 0.95 GiB; a card may have little more.

    Its state may go with the step or stay behind it.
    """
    model = torch.nn.Sequential(*(torch.nn.Linear(2**12, 2**12, device="meta") for _ in range(3)))
    optimizer = torch.optim.AdamW(model.parameters())

    def step(model):
        ours = optimizer if made == "outside" else torch.optim.AdamW(model.parameters())
        for _ in range(2):
            ours.zero_grad()
            model(torch.zeros(8, 2**12, device="cuda")).sum().backward()
            ours.step()

    card = dataclasses.replace(T4, total_bytes=int(gib * GIB) + T4.context_bytes)
    f = forecast_step(model, step, card)
    assert f.verdict == verdict, (f, f.unlimited_reserved_bytes)
    assert f.live_bytes >= sum(p.nbytes for p in model.parameters())  # it ends with its model


def test_an_output_that_is_kept_holds_its_logits():
    def step(kept):
        def run(model):
            output = model(input_ids=ids(), labels=ids())
            loss = output.loss
            if not kept:
                del output
            loss.backward()

        return run

    model = fake_model(BUNDLED)
    kept, dropped = (forecast_step(model, step(kept)).peak_bytes for kept in (True, False))
    logits = 8 * 128 * model.config.vocab_size * 4
    assert kept - dropped == pytest.approx(logits, rel=0.2)  # a freed hole may be larger


@pytest.mark.slow
@pytest.mark.parametrize(
    "real", [pytest.param(True, marks=pytest.mark.slow), False], ids=["loaded", "fake"]
)
def test_an_optimizer_made_outside_works_on_the_models_parameters(real):
    model = (
        AutoModelForCausalLM.from_pretrained(BUNDLED, dtype="float32")
        if real
        else fake_model(BUNDLED)
    )
    optimizer = torch.optim.AdamW(model.parameters())
    groups = [list(map(id, group["params"])) for group in optimizer.param_groups]
    outside = forecast_step(model, lambda model: loop(model, optimizer))
    assert outside.peak_bytes == forecast_step(model, loop).peak_bytes
    assert outside.composition["optimizer state"] > 0
    assert not optimizer.state and all(p.grad is None for p in model.parameters())
    assert groups == [list(map(id, group["params"])) for group in optimizer.param_groups]


def test_an_optimizer_over_other_tensors_is_refused():
    model, other = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(other.parameters())

    def step(model):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()

    with pytest.raises(ValueError, match="^step must make its optimizer itself, got one over real"):
        forecast_step(model, step)
    assert model.weight.grad is None


def wide():
    """A module of 4 MiB with gradients that somebody wants to keep."""
    module = torch.nn.Linear(2**10, 2**10, bias=False)
    module(torch.ones(1, 2**10)).sum().backward()
    return module


def as_it_is(module):
    """What a step must leave alone: the tensors themselves, their numbers, their gradients."""
    gradients = {name: (p.grad, p.grad.clone()) for name, p in module.named_parameters()}
    return {n: (p, p.dtype, p.detach().clone()) for n, p in module.named_parameters()}, gradients


def assert_as_it_was(module, before):
    tensors, gradients = before
    for name, p in module.named_parameters():
        assert p is tensors[name][0] and p.dtype == tensors[name][1]
        assert torch.equal(p, tensors[name][2])
        assert p.grad is gradients[name][0] and torch.equal(p.grad, gradients[name][1])


X = {"device": "cuda", "dtype": torch.float32}
USES = {
    "moved, then run": (lambda m: m.to("cuda")(torch.zeros(4, 2**10, **X)), 1),
    "run": (lambda m: m(torch.zeros(4, 2**10, **X)), 1),
    "moved": (lambda m: m.cuda(), 1),
    "halved": (lambda m: m.half()(torch.zeros(4, 2**10, **X).half()), 0.5),
    "trained": (lambda m: m.train()(torch.zeros(4, 2**10, **X)).sum().backward(), 2),
    "averaged": (lambda m: [p.mul_(0.9) for p in m.requires_grad_(False).parameters()], 1),
    "loaded": (lambda m: m.load_state_dict({"weight": torch.zeros(2**10, 2**10)}), 1),
}


@pytest.mark.parametrize("use", USES)
def test_a_real_module_beside_the_model_is_resident_and_left_as_it_was(use):
    """Its 4 MiB are on the card in backward, too, and a critic's gradients are as many again."""
    model, other = torch.nn.Linear(8, 8), wide()
    before = as_it_is(other)

    def step(model, use=use):
        USES[use][0](other) if use else None
        model(torch.zeros(4, 8, device="cuda")).sum().backward()

    alone, beside = (
        forecast_step(model, lambda model, use=use: step(model, use)).phase_peaks["backward"]
        for use in (None, use)
    )
    expected = USES[use][1] * 4 * MIB
    assert expected <= beside - alone < expected + MIB
    assert_as_it_was(other, before)
    assert model.weight.grad is None and type(other.weight) is torch.nn.Parameter


def test_two_real_modules_with_optimizers_of_their_own():
    """As a critic beside its actor; counted as if both stood in one module."""
    actor, critic = wide(), wide()
    optimizers = [torch.optim.AdamW(module.parameters()) for module in (actor, critic)]
    before = as_it_is(critic)

    def turns(actor, critic):
        x = torch.zeros(4, 2**10, device="cuda")
        critic(actor(x)).sum().backward()
        for optimizer in optimizers:
            optimizer.step()

    apart = forecast_step(actor, lambda actor: turns(actor, critic))
    assert apart.notes == ()
    both = torch.nn.ModuleList([actor, critic])
    assert apart.peak_bytes == forecast_step(both, lambda both: turns(*both)).peak_bytes
    assert apart.composition["optimizer state"] > 4 * 4 * MIB - 1
    assert apart.composition["gradients"] == 2 * 4 * MIB
    assert_as_it_was(critic, before)
    assert not any(optimizer.state for optimizer in optimizers)


def test_a_weight_that_two_modules_share_is_counted_once():
    model, head = wide(), torch.nn.Linear(2**10, 2**10, bias=False)
    head.weight = model.weight
    x = {"device": "cuda"}
    one, two = (
        forecast_step(model, lambda m, h=h: (h or m)(m(torch.zeros(1, 2**10, **x))).sum())
        for h in (None, head)
    )
    assert one.peak_bytes == two.peak_bytes and head.weight is model.weight


def test_a_real_parameter_of_no_module_is_refused_before_it_gets_a_gradient():
    model, prompt = torch.nn.Linear(8, 8), torch.nn.Parameter(torch.zeros(1, 8))
    with pytest.raises(ValueError, match=r"^step must reach parameters by .* shape \(1, 8\)"):
        forecast_step(model, lambda model: model(prompt).sum().backward())
    assert prompt.grad is None


OPTIMIZERS = {  # and the bytes of state beside 1024 x 8 float32 weights, within their counters
    "ASGD": (torch.optim.ASGD, 32 * KIB),
    "Adafactor": (torch.optim.Adafactor, 4 * KIB),
    "transformers": (transformers.Adafactor, 4 * KIB),
    "capturable": (lambda p: torch.optim.AdamW(p, capturable=True), 64 * KIB),
    "LAMB": (lambda p: bitsandbytes.optim.LAMB(p), 64 * KIB),
    "LAMB8bit": (lambda p: bitsandbytes.optim.LAMB8bit(p), 16 * KIB),
    "LARS": (lambda p: bitsandbytes.optim.LARS(p, lr=0.1, momentum=0.9), 32 * KIB),
}


def trains_with(make):
    def step(model):
        optimizer = make(model.parameters())
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.zeros(4, 8, device="cuda")).sum().backward()
            optimizer.step()

    return step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_that_scale_by_numbers_run(name):
    """Their state is what their papers say: an average, a row and a column, two bytes a weight."""
    make, expected = OPTIMIZERS[name]
    model = torch.nn.Linear(8, 1024, bias=False)
    item, state = torch.Tensor.item, forecast_step(model, trains_with(make))
    assert expected <= state.composition["optimizer state"] <= expected + 4 * KIB
    assert torch.Tensor.item is item and torch.tensor(2.0).item() == 2.0


def test_an_optimizer_that_branches_on_numbers_is_refused_by_its_name():
    def step(model):
        def closure():
            loss = model(torch.zeros(4, 8, device="cuda")).sum()
            loss.backward()
            return loss

        torch.optim.LBFGS(model.parameters()).step(closure)

    with pytest.raises(ValueError, match="^optimizer must not branch on numbers, got LBFGS"):
        forecast_step(torch.nn.Linear(8, 8), step)


def test_a_closure_s_question_is_refused_by_its_line():
    def step(model):
        torch.optim.ASGD(model.parameters()).step(lambda: model(torch.zeros(4, 8)).sum().item())

    with pytest.raises(ValueError, match="^step must not ask a tensor for its numbers.*item"):
        forecast_step(torch.nn.Linear(8, 8), step)


def runs(model):
    model(torch.zeros(4, 8, device="cuda")).sum().backward()


@pytest.mark.parametrize(
    ("model", "step", "gpu", "words"),
    [
        (
            "qwen3-0.6b",
            runs,
            T4,
            "^model must be a torch.nn.Module, got 'qwen3-0.6b'; .*fake_model",
        ),
        (
            torch.nn.Linear(8, 8),
            "train.py",
            T4,
            "^step must be a function .* got 'train.py'; .*def",
        ),
        (torch.nn.Linear(8, 8), runs, "L4", r"^gpu must be a card .* got 'L4'; .*preset\('L4'\)"),
        (torch.nn.Linear(8, 8), runs, None, "^gpu must be a card of fitcast, got None; "),
    ],
    ids=["name", "file", "card's name", "no card"],
)
def test_what_is_no_model_no_step_or_no_card_is_refused(model, step, gpu, words):
    with pytest.raises(ValueError, match=words):
        forecast_step(model, step, gpu)


def saves(model):
    torch.save(model.state_dict(), io.BytesIO())


def saves_safely(model):
    safetensors.torch.save(model.state_dict())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own compiler
@pytest.mark.filterwarnings("ignore:.*global hooks:UserWarning")
@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda model: runs(torch.compile(model)), "^step must not compile, got `.*compile"),
        (lambda model: runs(model.compile() or model), "^step must not compile, got `"),
        (saves, "^step must not save fake tensors, got `torch.save.*; save after the step"),
        (saves_safely, "^step must not save fake tensors, got `safetensors"),
    ],
    ids=["compiles", "compiles in place", "saves", "saves safely"],
)
def test_what_a_step_cannot_do_is_refused_by_its_line(step, words):
    with pytest.raises(ValueError, match=words) as refused:
        forecast_step(torch.nn.Linear(8, 8), step)
    assert "\n" not in str(refused.value) and "test_forecast_step.py" in str(refused.value)


def test_a_step_that_does_nothing_or_speaks_to_the_cpu_is_told_so():
    model = torch.nn.Linear(8, 8)
    assert "makes no tensor" in forecast_step(model, lambda model: None).notes[0]
    assert forecast_step(model, trains_with(torch.optim.AdamW)).notes == ()
    for step in (
        lambda model: model(torch.zeros(4, 8, device="cuda")).cpu(),
        lambda model: torch.zeros(4, 8, device="cpu"),
        lambda model: model(torch.zeros(4, 8, device="cuda")).to("cpu"),
    ):
        (note,) = forecast_step(model, step).notes
        assert "CPU" in note


def test_a_step_sees_one_card():
    def step(model):
        assert torch.cuda.is_available() and torch.cuda.device_count() == 1
        runs(model.to("cuda" if torch.cuda.is_available() else "cpu"))

    before = torch.cuda.is_available()
    assert forecast_step(torch.nn.Linear(8, 8), step).notes == ()
    assert torch.cuda.is_available() == before


ROWS = [torch.full((16,), float(row)) for row in range(12)]
LOADERS = {
    "a stack": {},
    "shuffled": {"shuffle": True},
    "in a dictionary": {"collate_fn": lambda rows: {"x": torch.stack(rows), "n": len(rows)}},
    "in a BatchEncoding": {"collate_fn": lambda rows: BatchEncoding({"x": torch.stack(rows)})},
    "made by others": {"num_workers": 1},
}


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if "others" in k else []) for k in LOADERS]
)
def test_batches_come_from_a_loader(kind):
    """As if each were made of zeros; seeds and collators may read numbers, which stay the run's."""
    loader = torch.utils.data.DataLoader(ROWS, batch_size=4, **LOADERS[kind])
    model, shapes = torch.nn.Linear(16, 16), []

    def step(model, batches):
        for batch in batches:
            x = (batch if isinstance(batch, torch.Tensor) else batch["x"]).to("cuda")
            shapes.append(tuple(x.shape))
            model(x).sum().backward()

    before = torch.random.get_rng_state()
    loaded = forecast_step(model, lambda model: step(model, loader))
    assert torch.equal(torch.random.get_rng_state(), before)
    made = forecast_step(model, lambda m: step(m, (torch.zeros(4, 16) for _ in range(3))))
    assert loaded.timeline == made.timeline
    assert shapes == 6 * [(4, 16)]


ASKED = {
    "loss.item()": (lambda loss: loss.item(), "keep loss.detach()"),
    "float(loss)": (lambda loss: float(loss), "keep loss.detach()"),
    "if loss > 1": (lambda loss: 1 if loss > 1 else 2, "the branch"),
    "loss.tolist()": (lambda loss: loss.tolist(), "keep loss.detach()"),
    "loss.detach().numpy()": (lambda loss: loss.detach().numpy(), "make an array"),
    ":.3f}": (lambda loss: f"{loss:.3f}", "print it after the step"),
    "(loss > 0).nonzero()": (lambda loss: (loss > 0).nonzero(), "slice"),
    "isfinite": (lambda loss: torch.isfinite(loss).all().item(), "keep loss.detach()"),
}


@pytest.mark.parametrize("line", ASKED)
def test_a_question_for_numbers_is_refused_by_its_line(line):
    question, remedy = ASKED[line]

    def step(model):
        question(model(torch.ones(1, 8)).sum())

    model = torch.nn.Linear(8, 1)
    with pytest.raises(ValueError, match="^step must not ask a tensor for its numbers") as refused:
        forecast_step(model, step)
    first = question.__code__.co_firstlineno
    assert f"in test_forecast_step.py, line {first}; " in str(refused.value)
    assert line in str(refused.value) and remedy in str(refused.value).rpartition("; ")[2]
    assert type(model.weight) is torch.nn.Parameter


def test_a_question_that_a_library_asks_names_both_lines():
    def step(model):
        torch.testing.assert_close(model.weight, model.weight + 1)

    with pytest.raises(ValueError, match="`torch.testing.assert_close"):
        forecast_step(torch.nn.Linear(8, 1), step)


def test_an_error_of_the_reader_s_own_stays_as_it_is():
    with pytest.raises(KeyError, match="labels"):
        forecast_step(torch.nn.Linear(8, 1), lambda model: {}["labels"])
