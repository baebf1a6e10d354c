"""Other steps than training on labels, against the same step done for real on a CPU.

The forecasts are CUDA's: attention is eager here, whose tensors are the same on both, and the two
workspaces that cuBLAS keeps on a card are taken off.
"""

import contextlib
from unittest import mock

import pytest
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from fitcast.forecasting import layers, stage
from fitcast.forecasting.huggingface import forecast_run
from fitcast.forecasting.other_steps import forecast_evaluation, forecast_resume
from fitcast.gpus import T4
from fitcast.memory.ledger import MemoryLedger

LENGTH = 128
CONFIG = LlamaConfig(
    vocab_size=8192, hidden_size=64, intermediate_size=128, num_hidden_layers=4,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
WORKSPACES = 2 * T4.workspace_bytes
QUIET = {
    "report_to": "none", "use_cpu": True, "max_steps": 1, "save_strategy": "no",
    "disable_tqdm": True, "logging_strategy": "no", "per_device_train_batch_size": 2,
}  # fmt: skip
# TRL's configs use the old name, of which transformers warns.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated")
ASKED = {"sequence_length": LENGTH, "dtype": "float32", "attn_implementation": "eager"}
PAIRS = {name: value for name, value in ASKED.items() if name != "sequence_length"}
ADAPTERS = LoraConfig(task_type="CAUSAL_LM")


def real_model():
    return LlamaForCausalLM._from_config(CONFIG, attn_implementation="eager")


def no_metrics(_):
    return {}


def real_evaluation(arguments, rows, compute_metrics):
    """Peak of the trainer's own `evaluate` after its own `train`, on real tensors."""
    row = {"input_ids": [0] * LENGTH, "labels": [0] * LENGTH, "attention_mask": [1] * LENGTH}
    model = real_model()
    trainer = Trainer(
        model=model, args=arguments, train_dataset=[row] * 2, eval_dataset=[row] * rows,
        compute_metrics=compute_metrics,
    )  # fmt: skip
    trainer.train()
    with MemoryLedger(model, optimizer=trainer.optimizer.optimizer) as ledger:
        trainer.evaluate()
    return ledger.report().peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("metrics", "rows", "changes"),
    [
        (no_metrics, 16, {}),
        pytest.param(None, 16, {}, marks=pytest.mark.slow),
        pytest.param(no_metrics, 32, {}, marks=pytest.mark.slow),
        pytest.param(no_metrics, 16, {"prediction_loss_only": True}, marks=pytest.mark.slow),
        pytest.param(None, 8, {"per_device_eval_batch_size": 4}, marks=pytest.mark.slow),
    ],
)
def test_evaluation_is_that_of_a_real_trainer(tmp_path, metrics, rows, changes):
    arguments = TrainingArguments(output_dir=str(tmp_path), **QUIET, **changes)
    seen = forecast_evaluation(
        CONFIG, arguments, compute_metrics=metrics, eval_rows=rows, padded=False, **ASKED
    )
    measured = real_evaluation(arguments, rows, metrics)
    assert seen.peak_phase == "evaluation"
    assert seen.peak_allocated_bytes - WORKSPACES == pytest.approx(measured, rel=2e-3)


@pytest.mark.slow
def test_logits_that_go_to_the_host_do_not_pile_up(tmp_path):
    """Four batches, moved away after every second one, peak as two batches do."""

    def peak(rows, **changes):
        arguments = TrainingArguments(output_dir=str(tmp_path), **QUIET, **changes)
        asked = {"compute_metrics": no_metrics, "padded": False} | ASKED
        return forecast_evaluation(CONFIG, arguments, eval_rows=rows, **asked).peak_allocated_bytes

    moved, few, many = peak(32, eval_accumulation_steps=2), peak(16), peak(32)
    assert moved == pytest.approx(few, rel=1e-3)
    assert many > 1.5 * moved


def test_logits_that_pile_up_are_said(tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), **QUIET)
    seen = forecast_evaluation(CONFIG, arguments, compute_metrics=no_metrics, **ASKED)
    assert "the logits of all 2 batches stay on the card until its end" in seen.notes
    assert seen.notes[-1].endswith("give eval_rows")
    with pytest.raises(ValueError, match="^eval_rows must be a positive whole number, got 0"):
        forecast_evaluation(CONFIG, arguments, eval_rows=0, **ASKED)


def preferences(tmp_path, **changes):
    import trl

    changes = QUIET | {"max_steps": 2} | changes  # in the second the optimizer has its state
    return trl.DPOConfig(
        output_dir=str(tmp_path), max_length=LENGTH + 1, bf16=False, **changes
    )  # so many tokens are predicted that the allocator has nothing to round


def real_preferences(arguments, peft_config):
    """Peak of TRL's own step on pairs, on real tensors."""
    import trl

    row = {"prompt_ids": [0], "chosen_ids": [0] * LENGTH, "rejected_ids": [0] * LENGTH}
    second = None if peft_config or arguments.precompute_ref_log_probs else real_model()
    with stage._rows_are_ready(trl.DPOTrainer):
        if arguments.precompute_ref_log_probs:
            row |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
        trainer = trl.DPOTrainer(
            model=real_model(), ref_model=second, args=arguments, peft_config=peft_config,
            train_dataset=Dataset.from_list([row] * 4), processing_class=stage.tokenizer(),
        )  # fmt: skip
    with MemoryLedger(trainer.model) as ledger:
        trainer.train()
    return ledger.report().peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [ADAPTERS, None])
@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_preferences_are_those_of_a_real_trainer(tmp_path, peft_config, precompute):
    """Without TRL's Triton kernels on both sides: a CPU has none."""
    arguments = preferences(tmp_path, precompute_ref_log_probs=precompute)
    with mock.patch.object(stage, "trl_kernels", contextlib.nullcontext):
        seen = forecast_run(CONFIG, arguments, peft_config=peft_config, **PAIRS)
    measured = real_preferences(arguments, peft_config)
    assert seen.phase_peaks["backward"] - WORKSPACES == pytest.approx(measured, rel=2e-3)


@pytest.mark.slow
def test_a_second_model_costs_its_weights(tmp_path):
    """Reference log-probabilities that are computed before save it; adapters need none."""
    weights = sum(p.nbytes for p in real_model().parameters())
    second = forecast_run(CONFIG, preferences(tmp_path), **PAIRS)
    before = forecast_run(CONFIG, preferences(tmp_path, precompute_ref_log_probs=True), **PAIRS)
    adapters = forecast_run(CONFIG, preferences(tmp_path), peft_config=ADAPTERS, **PAIRS)
    saved = second.peak_allocated_bytes - before.peak_allocated_bytes
    assert saved == pytest.approx(weights, rel=2e-3)
    assert second.composition["weights"] == pytest.approx(2 * weights, rel=2e-3)
    assert adapters.composition["weights"] == pytest.approx(weights, rel=2e-3)
    assert before.phase_peaks["reference"] > before.composition["weights"]


@pytest.mark.slow
def test_few_layers_of_two_models_give_every_byte_of_many(tmp_path):
    deep = LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": 9})
    arguments = preferences(tmp_path)
    few = forecast_run(deep, arguments, **PAIRS)
    with mock.patch.object(layers, "rhythm", lambda _: None):
        whole = forecast_run(deep, arguments, **PAIRS)
    assert few.peak_allocated_bytes == whole.peak_allocated_bytes
    assert few.composition == whole.composition
    assert few.loaded_bytes == whole.loaded_bytes


def from_its_own_texts(tmp_path, **changes):
    import trl

    changes = QUIET | {"max_steps": 2, "per_device_train_batch_size": 4} | changes
    return trl.GRPOConfig(
        output_dir=str(tmp_path), num_generations=4, max_completion_length=64, bf16=False, **changes
    )


def real_update(arguments, peft_config):
    """Peak of TRL's own update on given texts, on real tensors."""
    import trl

    second = mock.patch(
        "trl.trainer.grpo_trainer.create_model_from_path", lambda *_, **__: real_model()
    )
    with second:
        trainer = trl.GRPOTrainer(
            model=real_model(), reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=arguments, peft_config=peft_config, processing_class=stage.tokenizer(),
            train_dataset=Dataset.from_list([{"prompt": "<s>"}] * 8),
        )  # fmt: skip

    def texts(prompts):
        made = [[0] * 64] * len(prompts)
        asked = [[0] * (LENGTH - 63)] * len(prompts)
        return asked, made, None, [""] * len(prompts), None, {}, None, None

    trainer._generate = texts
    with MemoryLedger(trainer.model) as ledger:
        trainer.train()
    return ledger.report().peak_bytes


@pytest.mark.slow
@pytest.mark.parametrize("peft_config", [ADAPTERS, None])
@pytest.mark.parametrize("beta", [0.0, 0.1])
@pytest.mark.filterwarnings("ignore")
def test_an_update_on_given_texts_is_that_of_a_real_trainer(tmp_path, peft_config, beta):
    """GRPO without vLLM; with `beta` it compares with the model before, which is a second one."""
    arguments = from_its_own_texts(tmp_path, beta=beta)
    with mock.patch.object(stage, "trl_kernels", contextlib.nullcontext):
        asked = ASKED | {"sequence_length": LENGTH + 1}
        seen = forecast_run(CONFIG, arguments, peft_config=peft_config, **asked)
    measured = real_update(arguments, peft_config)
    assert seen.peak_allocated_bytes - WORKSPACES == pytest.approx(measured, rel=3e-3)


@pytest.mark.filterwarnings("ignore")
def test_a_row_has_room_for_a_completion(tmp_path):
    asked = ASKED | {"sequence_length": 64}
    with pytest.raises(ValueError, match="^sequence_length must be more than max_completion_l"):
        forecast_run(CONFIG, from_its_own_texts(tmp_path), peft_config=ADAPTERS, **asked)


def resumed(tmp_path, optim, **more):
    config = LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": 8, "hidden_size": 256})
    arguments = TrainingArguments(output_dir=str(tmp_path), optim=optim, **QUIET)
    return (f(config, arguments, **ASKED, **more) for f in (forecast_resume, forecast_run))


@pytest.mark.slow
def test_a_resumed_run_has_two_numbers_a_weight_before_its_first_step(tmp_path):
    """AdamW's, in float32: as large as two copies of the model; then its step is any other."""
    again, first = resumed(tmp_path, "adamw_torch")
    states = 2 * first.composition["weights"]
    assert again.composition["optimizer state"] == pytest.approx(states, rel=1e-3)
    assert again.phase_peaks["resume"] == pytest.approx(again.loaded_bytes + states, rel=1e-3)
    assert again.peak_allocated_bytes == pytest.approx(first.peak_allocated_bytes, rel=1e-4)


@pytest.mark.slow
def test_paged_state_comes_back_onto_the_card(tmp_path):
    """bitsandbytes' `load_state_dict` moves it there, and pages it no more."""
    paged, first = resumed(tmp_path, "paged_adamw_8bit")
    plain, _ = resumed(tmp_path, "adamw_bnb_8bit")
    assert paged.composition["optimizer state"] == plain.composition["optimizer state"]
    assert paged.composition["optimizer state"] > 2 * first.composition["optimizer state"]


@pytest.mark.slow
def test_adapters_are_there_twice_while_they_are_read(tmp_path):
    again, first = resumed(tmp_path, "sgd", peft_config=LoraConfig(r=256, task_type="CAUSAL_LM"))
    adapters = first.composition["adapters"]
    assert again.phase_peaks["resume"] == pytest.approx(first.resident_bytes + adapters, rel=2e-3)
