"""The forecast of somebody's Trainer is that Trainer, run on tensors without numbers.

    arguments = SFTConfig(per_device_train_batch_size=4, max_length=2048, fp16=True, ...)
    forecast_run("llama-3.1-8b", arguments, peft_config=LoraConfig(...),
                 quantization_config=BitsAndBytesConfig(load_in_4bit=True, ...), gpu=T4)

The class that would train is made with a model on the meta device, quantized by transformers' own
quantizer and adapted by PEFT; its weights are placed as loading places them; then its own `train()`
takes one optimizer step. So accelerate's wrappers, TRL's loss and casts, the optimizer that
`optim` names and whatever a new release changes come along by themselves.

What is pretended is in `cuda.trainers`, what is answered in `answers`. Not modelled: data loading,
logging, saving, and what `NOT_MODELLED` lists, each of which is named when it is asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from fitcast import models
from fitcast.cuda import experts
from fitcast.forecasting import base, checks, layers
from fitcast.forecasting import images as pictures
from fitcast.forecasting.refusals import keywords_of, refuse_unknown
from fitcast.forecasting.stage import (
    MICRO_BATCHES,
    Run,
    Stage,
    about_text,
    bare,
    few_layers,
    is_online,
    is_preference,
    is_reward,
    may_hold_one_text,
    packs_texts,
    reads_bounds,
    staged,
    trainer_of,
)
from fitcast.forecasting.verdict import Forecast, report
from fitcast.gpus import T4, Gpu
from fitcast.memory.stream import DeviceLedger, Stream
from fitcast.step.overflow import float16_warning
from fitcast.step.targets import attention_targets, peft_targets
from fitcast.units import Said, refusal, show_bytes, with_article

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

Script = Callable[[Stage], None]
# Arguments that change memory and that running the class does not show: field -> why.
NOT_MODELLED = {
    "torch_compile": "inductor's kernels keep other tensors than eager ones",
    "deepspeed": "DeepSpeed's engine is not run",
    "fsdp": "FSDP's shards are not run here",
    "use_liger_kernel": "Liger's Triton kernels replace the model's own",
    "auto_find_batch_size": "the batch size that is asked for is forecast",
    "torch_empty_cache_steps": "the cache is not emptied in between",
    "activation_offloading": "activations that wait in the host's memory are counted on the card",
    "use_vllm": "vLLM's engine has memory of its own on the same card",
    "parallelism_config": "other parallelism than data parallel is not run",
}


def forecast_run(
    model: str | PretrainedConfig | PreTrainedModel,
    arguments: TrainingArguments,
    *,
    gpu: Gpu = T4,
    peft_config: PeftConfig | None = None,
    quantization_config: Any = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    sequence_length: int | None = None,
    padded: bool | None = None,
    images: int = 0,
    expandable_segments: bool = False,
    trainer: type | None = None,
    **trainer_options: Any,
) -> Forecast:
    """What one optimizer step of a Hugging Face training run will need on `gpu`.

    Args:
        model: A preset's name, a hub id, a folder, a config, or a model (on meta or real: only its
            config is used).
        arguments: `TrainingArguments`, `SFTConfig`, `DPOConfig`: as the script makes them.
        gpu: The card.
        peft_config: As given to `get_peft_model` or to the trainer.
        quantization_config: As given to `from_pretrained`.
        dtype: As given to `from_pretrained`; by default the checkpoint's own.
        attn_implementation: As given to `from_pretrained`.
        sequence_length: Tokens in a row; by default `arguments.max_length`.
        padded: Whether rows are padded; by default, unless the batch is one row or is packed.
        images: In each row, for a model with a vision tower; their tokens are among the row's.
        expandable_segments: As PYTORCH_ALLOC_CONF says it.
        trainer: The class, if it is none of transformers' or TRL's that belongs to `arguments`.
        trainer_options: What else the class takes, such as `compute_loss_func`.

    Returns:
        A `Forecast`, whose `notes` say what was assumed and what is not modelled.

    Raises:
        ValueError: The run cannot be made; the library's own reason is in the text.
    """
    run = describe_run(
        model, arguments, peft_config=peft_config, quantization_config=quantization_config,
        dtype=dtype, attn_implementation=attn_implementation, sequence_length=sequence_length,
        padded=padded, images=images, trainer=trainer, **trainer_options,
    )  # fmt: skip
    return forecast_script(
        run, gpu, train_one_step, expandable=expandable_segments,
        micro_batches=arguments.gradient_accumulation_steps,
    )  # fmt: skip


def forecast_script(
    run: Run, gpu: Gpu, script: Script, *, micro_batches: int = 1, expandable: bool = False
) -> Forecast:
    """What `script` will need on `gpu`, once the run's trainer and weights are there.

    Args:
        run: Of `describe_run`.
        gpu: The card.
        script: Uses the stage, and sets the marks "ready" and "step" around what is asked about.
        micro_batches: How many the step has, as `report` takes it.
        expandable: As `report` takes it.
    """
    checks.check_card(gpu)

    went_back = False

    def seen(run: Run) -> Forecast:
        nonlocal went_back
        stream = run_stream(run, gpu, script)
        went_back = any(phase == "backward" for _, _, phase in stream.events)
        return report(stream, gpu, micro_batches=micro_batches, expandable=expandable)

    even, said = seen(run), (*run.assumed, *notes(run, gpu))
    if script is train_one_step and not went_back:
        said += ("the step has no backward pass: nothing trains in it",)
    if may_hold_one_text(run, gpu):
        even, sentence = _larger(even, seen(dataclasses.replace(run, texts=1)))
        said += (sentence,)
    if experts.expert_loops(bare(run)):
        worst = seen(dataclasses.replace(run, routing=experts.WORST)).peak_allocated_bytes
        said += (
            "tokens are spread evenly over the experts; if all of them went to the same ones, the "
            f"peak would be {show_bytes(worst, 'GiB')}",
        )
    return dataclasses.replace(even, notes=said)


def _larger(several: Forecast, one: Forecast) -> tuple[Forecast, str]:
    """Of rows with several texts and with one, the one that needs more; and what both need."""
    peaks = [show_bytes(f.peak_allocated_bytes, "GiB") for f in (several, one)]
    said = (
        f"a row of several texts needs {peaks[0]}, and one that a single text fills, which has no "
        f"mask, {peaks[1]}: this is the larger"
    )
    return max(several, one, key=lambda f: f.peak_allocated_bytes), said


def notes(run: Run, gpu: Gpu) -> tuple[str, ...]:
    """What a forecast of this run assumes, and what it does not model, a sentence each."""
    said = [
        f"{name}={getattr(run.arguments, name)!r} is not modelled: {why}"
        for name, why in NOT_MODELLED.items()
        if getattr(run.arguments, name, None) not in (None, False, "", [], {})
    ]
    said += _about_texts(run.arguments)
    rows = "padded to" if run.padded else "without padding,"
    labels = "every token has a label" if run.target is None else "each has one label"
    if is_reward(run.trainer):
        labels = "two of them make a pair"
    if is_online(run.trainer):
        said.append("generation is left out of this step: forecast_generation says what it needs")
    if run.padded:
        said.append(
            "reserved memory is that of batches of one length: those of many lengths leave more in "
            "the allocator's cache (10 to 30 % in three measured runs), which it gives back when "
            "memory runs out"
        )
    said.append(f"rows are {rows} {run.sequence_length} tokens, and {labels}")
    return (*said, *_about_attention(run, gpu), *_about_the_model(run, gpu))


def _about_attention(run: Run, gpu: Gpu) -> list[str]:
    """Which kernel stands for FlashAttention, and what keeps packed texts apart."""
    said, arguments = [], run.arguments
    if run.flash is not None:
        said.append(
            f"attn_implementation: {run.flash} is forecast as PyTorch's own kernel, sdpa"
            + (", with a mask where rows are padded" if run.padded else "")
        )
        if not gpu.has_flash_attention:
            said.append(f"{with_article(gpu.name)} has no FlashAttention: {run.flash} stops there")
    rows = arguments.per_device_train_batch_size
    joined = packs_texts(arguments) or (getattr(arguments, "padding_free", False) and rows > 1)
    if joined and not reads_bounds(run, gpu):
        tokens = rows * run.sequence_length
        said.append(
            f"a batch is one row of {tokens} tokens, and a mask of {tokens} x {tokens} keeps its "
            "texts apart: FlashAttention needs none"
        )
    return said


def _about_texts(arguments: TrainingArguments) -> list[str]:
    """What the script says of texts that no forecast reads."""
    names = about_text(arguments)
    said = [f"{', '.join(names)}: about texts only, and rows here are token ids"] if names else []
    if "chat_template_path" in names:
        said.append("tokens that chat_template_path adds to the vocabulary are not counted")
    return said


def _about_the_model(run: Run, gpu: Gpu) -> list[str]:
    text, said = base.text_config(run.config), []
    limit = getattr(text, "max_position_embeddings", None)
    if limit and run.sequence_length > limit:
        said.append(
            f"rows are longer than the {limit} positions that the model was made for "
            "(max_position_embeddings): memory is as said, quality is another matter"
        )
    if text is not run.config:
        said.append(_about_images(run))
    in_float16 = run.arguments.fp16 or (run.dtype == torch.float16 and not run.arguments.bf16)
    for kind in dict.fromkeys((run.config.model_type, text.model_type)):
        warning = float16_warning(kind, gpu) if in_float16 else None
        if warning is not None:
            said.append(warning)
            break
    if getattr(run.quantization_config, "load_in_8bit", False):
        said.append("8-bit layers keep no outlier columns, which depend on the numbers")
    return said


def _about_images(run: Run) -> str:
    if run.images:
        return f"each row holds {run.images} images, whose tokens are among its own"
    return "batches hold text only (images=0): the rest of the model is counted by its weights"


def run_stream(run: Run, gpu: Gpu, script: Script | None = None) -> Stream:
    """Memory events of load and `script`, by default one step; of few layers where they repeat.

    Raises:
        ValueError: What the libraries refuse, as one sentence.
    """
    alike = run.reference is None or run.reference.to_dict() == run.config.to_dict()

    def play(model: PreTrainedModel, rhythm: layers.Rhythm | None) -> Stream:
        with staged(run, gpu, model, rhythm) as stage:
            (script or train_one_step)(stage)
        return stage.stream()

    return few_layers(lambda: bare(run), play, may_repeat=alike)


def train_one_step(stage: Stage) -> None:
    """One optimizer step of the trainer's `train()`, between the marks "ready" and "step"."""
    train(stage, lambda ledger: ledger.mark("step"), ready=True)


def train(stage: Stage, at_end: Callable[[DeviceLedger], None], *, ready: bool = False) -> None:
    """One optimizer step; `at_end` is called when it is done, before anything else is.

    Args:
        stage: Whose trainer.
        at_end: Takes the ledger.
        ready: Whether the mark "ready" is set before.
    """
    arguments, trainer = stage.run.arguments, stage.trainer
    if getattr(arguments, "precompute_ref_log_probs", False):
        _ask_reference(stage)
    count = min(MICRO_BATCHES, arguments.gradient_accumulation_steps)
    batches = stage.batches(count, arguments.per_device_train_batch_size)
    trainer.get_train_dataloader = lambda: batches
    trainer.add_callback(_end_of_step(stage.ledger, at_end))
    if ready:
        stage.ledger.mark("ready")
    trainer.train()
    if not trainer.state.global_step:
        raise refusal(
            "trainer", "take an optimizer step in its train()",
            Said(f"none from {stage.run.trainer.__name__}"),
            "call super().train() in it, or forecast a loop of your own with forecast_step",
        )  # fmt: skip


def _ask_reference(stage: Stage) -> None:
    """DPO's pass over the data before training, for one batch: phase "reference"."""
    arguments: Any = stage.run.arguments
    trainer = stage.trainer
    size = arguments.precompute_ref_batch_size or arguments.per_device_train_batch_size
    with stage.ledger.phase("reference"):
        trainer.compute_ref_log_probs(trainer.model, *stage.batches(1, size))


def _end_of_step(ledger: DeviceLedger, at_end: Callable[[DeviceLedger], None]) -> Any:
    from transformers import TrainerCallback

    class EndOfStep(TrainerCallback):
        """Ends the run with its first optimizer step."""

        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = True
            at_end(ledger)
            return control

    return EndOfStep()


def describe_run(
    model: str | PretrainedConfig | PreTrainedModel,
    arguments: TrainingArguments,
    *,
    peft_config: PeftConfig | None = None,
    quantization_config: Any = None,
    dtype: str | torch.dtype | None = None,
    attn_implementation: str | None = None,
    sequence_length: int | None = None,
    padded: bool | None = None,
    images: int = 0,
    trainer: type | None = None,
    **trainer_options: Any,
) -> Run:
    """What is to be run, from what a script holds: the arguments of `forecast_run`.

    Raises:
        ValueError: No such model or keyword, no length, rows longer than learned positions.
    """
    trainer = trainer or trainer_of(arguments)
    checks.check_trainer(trainer)
    _check_keywords(trainer, trainer_options)
    checks.check_objects(arguments, peft_config, trainer_options)
    config = base.read_config(model)
    pictures.check(config, images)
    length = checks.length_of(sequence_length, arguments)
    attention, flash = checks.attention_of(attn_implementation, config)
    kept_dtype = base.dtype_of(dtype, model, config)
    kind = base.kind_of(model)
    if kind is None and is_reward(trainer):
        kind = checks.reward_model(config)
    empty = base.meta_base(config, kept_dtype, attention, kind)
    _check_length(length, empty)
    checks.check_labels(empty, trainer, trainer_options)
    peft_config, targets = with_targets(peft_config, empty)
    assumed = (*targets, *models.about_sizes(model), *_about_kernels(empty))
    return Run(
        config=config,
        kind=kind,
        arguments=arguments,
        trainer=trainer,
        dtype=kept_dtype,
        sequence_length=length,
        padded=_has_padding(arguments, trainer) if padded is None else padded,
        target=checks.target_of(empty),
        images=images,
        peft_config=peft_config,
        quantization_config=base.quantization_of(config, quantization_config),
        attention=attention,
        flash=flash,
        reference=_reference(config, arguments, trainer, peft_config, trainer_options),
        trainer_options=trainer_options,
        assumed=assumed,
    )


def _about_kernels(model: PreTrainedModel) -> tuple[str, ...]:
    """Whose scan or recurrence is computed by the model's own code here, and by kernels there."""
    if not hasattr(sys.modules[type(model).__module__], "causal_conv1d_fn"):
        return ()
    return (
        f"{model.config.model_type} runs its own slow code here, as a card does without the "
        "packages of its kernels (causal_conv1d, mamba_ssm, fla), which keep other tensors",
    )


def _check_keywords(trainer: type, given: dict[str, Any]) -> None:
    """What is neither `forecast_run`'s nor the trainer's is a slip."""
    theirs, others = keywords_of(trainer)
    known = theirs | {"ref_model"} | set(inspect.signature(forecast_run).parameters)
    refuse_unknown(given, known, f"the forecast or {trainer.__name__}", others=others)


def _has_padding(arguments: TrainingArguments, trainer: type) -> bool:
    """Whether a batch has rows of several lengths, each in a row of its own."""
    packed = getattr(arguments, "packing", False) or getattr(arguments, "padding_free", False)
    several = is_preference(trainer) or is_online(trainer) or is_reward(trainer)
    alone = arguments.per_device_train_batch_size == 1 and not several
    return not (packed or alone)


def _reference(
    config: PretrainedConfig, arguments: TrainingArguments, trainer: type, peft_config: Any,
    trainer_options: dict[str, Any],
) -> PretrainedConfig | None:  # fmt: skip
    """Of the second model that DPO and GRPO load: the one given, else a copy without adapters."""
    given = trainer_options.pop("ref_model", None)
    if given is not None:
        return base.read_config(given)
    computed_before = getattr(arguments, "precompute_ref_log_probs", False)
    compares = is_preference(trainer) and not computed_before
    compares |= is_online(trainer) and getattr(arguments, "beta", 0.0) != 0.0
    needs_one = compares and peft_config is None
    return config if needs_one else None


def _check_length(length: int, model: PreTrainedModel) -> None:
    """Learned positions end; computed ones go on."""
    limit = base.learned_positions(model)
    if limit is not None and length > limit:
        raise refusal(
            "sequence_length", f"be at most {limit} for {model.config.model_type}", length,
            "its positions are learned, and it has no more of them",
        )  # fmt: skip


def with_targets(
    peft_config: PeftConfig | None, model: PreTrainedModel
) -> tuple[PeftConfig | None, tuple[str, ...]]:
    """Adapters' targets, where the script names none and PEFT does not know the family."""
    named = any(getattr(peft_config, f"target_{kind}", True) for kind in ("modules", "parameters"))
    kind = model.config.model_type
    if peft_config is None or named:
        return peft_config, ()
    targets, whose = peft_targets(kind), "PEFT's choice"
    if not targets:
        targets = attention_targets(layers.decoder(model)) or "all-linear"
        whose = "a choice made here, since PEFT makes none"
    filled: Any = copy.deepcopy(peft_config)
    filled.target_modules = targets if isinstance(targets, str) else set(targets)
    named = targets if isinstance(targets, str) else ", ".join(targets)
    return filled, (f"adapters are on {named}: {whose} for {kind}",)
