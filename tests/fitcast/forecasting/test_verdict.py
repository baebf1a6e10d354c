"""Does it run on the card: what a real T4 said of twelve settings at its boundary, and why."""

import json
from pathlib import Path

import pytest
import torch

from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.forecasting import depth, fake
from fitcast.forecasting.forecast import checked_config, forecast
from fitcast.forecasting.load import blueprint, place_weights
from fitcast.forecasting.verdict import SLACK, moments, report
from fitcast.gpus import T4, Gpu
from fitcast.memory.report import Block
from fitcast.memory.stream import DeviceLedger, Stream, work_recorder
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora
from fitcast.units import GIB, MIB

QWEN2 = {
    "model_type": "qwen2",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
}
SHAPES = {
    "qwen2.5-7b": QWEN2
    | {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
        "tie_word_embeddings": False,
    },
    "qwen2.5-coder-1.5b": QWEN2
    | {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    },
    "deepseek-coder-1.3b": {
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32256,
        "tie_word_embeddings": False,
        "max_position_embeddings": 16384,
        "rms_norm_eps": 1e-6,
    },
    "mistral-7b-v0.3": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0,
        "sliding_window": None,
    },
}
CONFIGS = Path(__file__).parents[2] / "data" / "configs"
SLOW = pytest.mark.slow
# Model, sequences of 1024 tokens, whether a Tesla T4 ran them: 4-bit base without double
# quantization, everything else in float32, LoRA r=16 on q, k, v, o, AdamW, all layers checkpointed.
# Source: github.com/Anassbzdd/fitcheck, final-t4-20260921-verdicts.json (measured 2026-09-21).
T4_ROWS = [
    ("qwen2.5-7b", 2, False),
    pytest.param("mistral-7b-v0.3", 7, True, marks=SLOW),
    pytest.param("qwen2.5-7b", 1, True, marks=SLOW),
    pytest.param("mistral-7b-v0.3", 6, True, marks=SLOW),
    pytest.param("llama-3.2-3b", 4, True, marks=SLOW),
    pytest.param("llama-3.2-3b", 5, False, marks=SLOW),
    pytest.param("llama-3.2-1b", 5, True, marks=SLOW),
    pytest.param("llama-3.2-1b", 6, False, marks=SLOW),
    pytest.param("qwen2.5-coder-1.5b", 4, True, marks=SLOW),
    pytest.param("qwen2.5-coder-1.5b", 5, False, marks=SLOW),
    pytest.param("deepseek-coder-1.3b", 14, True, marks=SLOW),
    pytest.param("deepseek-coder-1.3b", 15, True, marks=SLOW),
]


def recipe_of(model, micro_batch_size, folder):
    if model in SHAPES:
        (folder / "config.json").write_text(json.dumps(SHAPES[model]))
        model = str(folder)
    return TrainRecipe(
        model=model,
        double_quant=False,
        kbit_upcast=True,
        amp_dtype="float16",
        attention="explicit_kv",
        lora_dropout=0.0,
        optimizer="adamw",
        micro_batch_size=micro_batch_size,
        sequence_length=1024,
    )


def stream_of_their_loop(recipe, gpu):
    """Their step has no autocast, and its output lives until the optimizer is done."""
    config = checked_config(recipe)
    counts = depth.kinds(config.num_hidden_layers, config.num_hidden_layers)
    config.num_hidden_layers = depth.run_layers(counts)[0]
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[: config.num_hidden_layers]
    ledger = DeviceLedger()
    kernels = CudaKernels(gpu, on_work=work_recorder(ledger, gpu))
    model = blueprint(recipe, config)
    with pretend_cuda(gpu), fake.fake_tensors(), ledger, kernels:
        place_weights(model, recipe, ledger)
        ledger.watch(model)
        qlora.apply_levers(model, recipe).train()
        optimizer = qlora.build_optimizer(model, recipe)
        ids = torch.zeros(recipe.micro_batch_size, recipe.sequence_length, dtype=torch.long)
        ledger.note_inputs([ids])
        ledger.mark("ready")

        def one_step():
            output = model(input_ids=ids, labels=ids)
            output.loss.backward()
            optimizer.step()

        one_step()
        optimizer.zero_grad(set_to_none=True)
        ledger.mark("step")
    return depth.deepen(ledger.stream(), counts)


@pytest.mark.parametrize(("model", "micro_batch_size", "ran"), T4_ROWS)
def test_verdicts_of_a_real_t4_at_its_boundary(tmp_path, model, micro_batch_size, ran):
    recipe = recipe_of(model, micro_batch_size, tmp_path)
    assert report(stream_of_their_loop(recipe, T4), T4).fits is ran


@pytest.mark.slow
def test_the_course_step_does_not_fit_where_theirs_ran_out(tmp_path):
    """Its first step would; in the second, AdamW's state lies where the logits were."""
    f = forecast(recipe_of("qwen2.5-7b", 2, tmp_path), T4)
    assert f.peak_allocated_bytes < T4.usable_bytes
    assert not f.fits


def stream_of(*events):
    """A stream: ("+", 30) allocates the next block, of 30 MiB, and ("-", 0) frees the first."""
    blocks, played, marks = [], [], {}
    for what, n in events:
        if what == "mark":
            marks[n] = len(played)
            continue
        if what == "+":
            blocks.append(
                Block(n * MIB, "activations", "empty", "", "forward", (n * MIB,), torch.uint8)
            )
        played.append((1 if what == "+" else -1, len(blocks) - 1 if what == "+" else n, "forward"))
    return Stream(blocks, played, marks)


def card_of(mebibytes):
    return Gpu(
        name="small",
        total_bytes=(mebibytes + 1) * MIB,
        context_bytes=MIB,
        capability=(7, 5),
        multiprocessors=40,
        matmul_flops=65e12,
        float32_flops=8.1e12,
        bandwidth=320e9,
    )


LOADED = (("+", 20), ("mark", "load"), ("mark", "ready"))
# 30 MiB come and go; then 12 MiB that stay are put where they were, and 18 are left.
STATE_IN_THE_HOLE = stream_of(*LOADED, ("+", 30), ("-", 1), ("+", 12))


def test_a_first_step_may_fit_and_the_second_not():
    assert moments(STATE_IN_THE_HOLE).later == [(1, 1, "forward"), (-1, 1, "forward")]
    assert not report(STATE_IN_THE_HOLE, card_of(79)).fits  # 20, 30 with the 12 in it, 30 again
    assert report(STATE_IN_THE_HOLE, card_of(80)).fits


def test_cached_memory_is_given_back_before_a_verdict():
    """Each of the two would fit; so do both in turn, since the first one's segment can go."""
    in_turn = stream_of(*LOADED, ("+", 30), ("-", 1), ("+", 40), ("-", 2))
    assert report(in_turn, card_of(60)).fits
    assert report(in_turn, card_of(60)).unlimited_reserved_bytes[1] > 60 * MIB
    assert not report(in_turn, card_of(59)).fits


# Run for 8 steps within a T4's 14.42 GiB on an H200 (torch 2.11, 2026-11-29): each ran, with
# exactly one allocator retry; memory reserved then, where it was noted.
MEASURED_TIGHT = [
    ("llama-3.2-3b", 6, 1024, 12.30),
    pytest.param("qwen3-1.7b", 3, 2048, 12.72, marks=SLOW),
    pytest.param("llama-3.1-8b", 1, 3328, 14.02, marks=SLOW),
    pytest.param(str(CONFIGS / "gemma-3-1b"), 1, 4096, None, marks=SLOW),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "micro_batch_size", "length", "gib"), MEASURED_TIGHT)
def test_tight_runs_are_called_so_with_their_retry(model, micro_batch_size, length, gib):
    recipe = TrainRecipe(
        model=model,
        amp_dtype="float16",
        micro_batch_size=micro_batch_size,
        sequence_length=length,
    )
    f = forecast(recipe, T4)
    assert (f.verdict, f.retries, f.fits) == ("tight", 1, True)
    low, high = f.peak_reserved_bytes
    assert high == T4.usable_bytes < f.unlimited_reserved_bytes[1] and f.margin_bytes < 0
    if gib:
        assert low <= gib * GIB + 10 * MIB <= high
        assert low + SLACK == pytest.approx(gib * GIB, abs=10 * MIB)  # the replay's own
    assert str(f).startswith(
        "tight on a T4 (14.56 GiB)"
    ) and "gives cached memory back once" in str(f)


def test_each_verdict_has_its_bounds():
    """80 MiB at most at once, in segments of 20, 30 and 30 MiB."""
    roomy = report(STATE_IN_THE_HOLE, card_of(400))
    assert roomy.verdict == "fits" and roomy.retries == 0
    assert roomy.peak_reserved_bytes == roomy.unlimited_reserved_bytes
    close = report(STATE_IN_THE_HOLE, card_of(100))
    assert close.verdict == "tight" and close.retries == 0
    assert "by less than the bounds are apart" in str(close)
    short = report(STATE_IN_THE_HOLE, card_of(79))
    assert short.verdict == "does not fit" and not short.fits
    assert short.peak_reserved_bytes == short.unlimited_reserved_bytes
