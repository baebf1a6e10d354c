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

import contextlib
import copy
import dataclasses
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fitcast.cuda import experts
from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.cuda.trainers import (
    mixed_precision_as_on_a_gpu,
    padding,
    pretend_trainer,
    trl_kernels,
)
from fitcast.forecasting import base, depth, fake, layers
from fitcast.forecasting.answers import Answers
from fitcast.forecasting.place import place
from fitcast.forecasting.refusals import explained
from fitcast.forecasting.verdict import Forecast, report
from fitcast.gpus import T4, Gpu
from fitcast.memory.layers import Layers
from fitcast.memory.stream import DeviceLedger, Stream, work_recorder
from fitcast.step.overflow import float16_warning
from fitcast.step.targets import attention_targets, peft_targets
from fitcast.units import refusal, show_bytes

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

MICRO_BATCHES = 2  # of a step; the third does to memory what the second did
ROWS = 64  # of the data set that stands for the reader's; one step takes at most two batches
# Arguments that change memory and that running the class does not show: field -> why.
NOT_MODELLED = {
    "torch_compile": "inductor's kernels keep other tensors than eager ones",
    "deepspeed": "DeepSpeed's engine is not run",
    "fsdp": "FSDP's shards are not run here",
    "use_liger_kernel": "Liger's Triton kernels replace the model's own",
    "auto_find_batch_size": "the batch size that is asked for is forecast",
    "torch_empty_cache_steps": "the cache is not emptied in between",
    "parallelism_config": "other parallelism than data parallel is not run",
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is to be run, in the names of the script.

    Attributes:
        config: Of the model.
        kind: The model's class, or `None` for the checkpoint's.
        arguments: `TrainingArguments`, `SFTConfig`, ...
        trainer: The class that trains.
        dtype: Of the weights that are not quantized, as `from_pretrained(dtype=...)` loads them.
        sequence_length: Tokens in a row of the batch.
        padded: Whether masks hide padding.
        routing: Of loops over experts: `experts.EVEN` or `experts.WORST`.
        assumed: Sentences about what the script did not say.
    """

    config: PretrainedConfig
    kind: type[PreTrainedModel] | None
    arguments: TrainingArguments
    trainer: type
    dtype: torch.dtype
    sequence_length: int
    padded: bool
    peft_config: PeftConfig | None = None
    quantization_config: Any = None
    attention: str | None = None
    trainer_options: dict[str, Any] = field(default_factory=dict)
    routing: str = experts.EVEN
    assumed: tuple[str, ...] = ()


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
        expandable_segments: As PYTORCH_ALLOC_CONF says it.
        trainer: The class, if it is none of transformers' or TRL's that belongs to `arguments`.
        trainer_options: What else the class takes, such as `compute_loss_func`.

    Returns:
        A `Forecast`, whose `notes` say what was assumed and what is not modelled.

    Raises:
        ValueError: The run cannot be made; the library's own reason is in the text.
    """
    run = _described(
        model, arguments, peft_config, quantization_config, dtype, attn_implementation,
        sequence_length, padded, trainer, trainer_options,
    )  # fmt: skip
    micro_batches = arguments.gradient_accumulation_steps
    even = report(
        run_stream(run, gpu), gpu, micro_batches=micro_batches, expandable=expandable_segments
    )
    said = (*run.assumed, *notes(run, gpu))
    if experts.expert_loops(_bare(run)):
        worst = report(run_stream(dataclasses.replace(run, routing=experts.WORST), gpu), gpu)
        said += (
            "tokens are spread evenly over the experts; if all of them went to the same ones, the "
            f"peak would be {show_bytes(worst.peak_allocated_bytes, 'GiB')}",
        )
    return dataclasses.replace(even, notes=said)


def notes(run: Run, gpu: Gpu) -> tuple[str, ...]:
    """What a forecast of this run assumes, and what it does not model, a sentence each."""
    said = [
        f"{name}={getattr(run.arguments, name)!r} is not modelled: {why}"
        for name, why in NOT_MODELLED.items()
        if getattr(run.arguments, name, None) not in (None, False, "", [], {})
    ]
    rows = "padded to" if run.padded else "without padding,"
    said.append(f"rows are {rows} {run.sequence_length} tokens, and every token has a label")
    return (*said, *_about_the_model(run, gpu))


def _about_the_model(run: Run, gpu: Gpu) -> list[str]:
    text, said = base.text_config(run.config), []
    limit = getattr(text, "max_position_embeddings", None)
    if limit and run.sequence_length > limit:
        said.append(
            f"rows are longer than the {limit} positions that the model was made for "
            "(max_position_embeddings): memory is as said, quality is another matter"
        )
    if text is not run.config:
        said.append("batches hold text only: what else the model has is counted by its weights")
    in_float16 = run.arguments.fp16 or (run.dtype == torch.float16 and not run.arguments.bf16)
    for kind in dict.fromkeys((run.config.model_type, text.model_type)):
        warning = float16_warning(kind, gpu) if in_float16 else None
        if warning is not None:
            said.append(warning)
            break
    if getattr(run.quantization_config, "load_in_8bit", False):
        said.append("8-bit layers keep no outlier columns, which depend on the numbers")
    return said


def run_stream(run: Run, gpu: Gpu) -> Stream:
    """Memory events of load and first step; of few layers where they repeat.

    Raises:
        ValueError: What the libraries refuse, as one sentence.
    """
    model = _bare(run)
    rhythm = layers.rhythm(model)
    try:
        with _quietly():
            if rhythm is not None:
                layers.shorten(model, rhythm.run)
                with contextlib.suppress(depth.NotRepeating):
                    return depth.deepen(_train(run, gpu, model, rhythm), rhythm.counts)
                model = _bare(run)
            return _train(run, gpu, model)
    except Exception as error:  # other people's code, which may do anything
        raise explained(error, run.config.model_type) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Inside, libraries keep their advice to themselves: the script will hear it when it runs."""
    from transformers import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)


def _bare(run: Run) -> PreTrainedModel:
    return base.meta_base(run.config, run.dtype, run.attention, run.kind)


def _train(
    run: Run, gpu: Gpu, model: PreTrainedModel, rhythm: layers.Rhythm | None = None
) -> Stream:
    """Make the trainer, place the weights, take one optimizer step of its `train()`."""
    ledger = DeviceLedger()
    if run.quantization_config is not None:
        base.quantize(model, run.quantization_config)
    kernels = CudaKernels(gpu, on_work=work_recorder(ledger, gpu))
    with tempfile.TemporaryDirectory() as folder, pretend_trainer():
        trainer, batch = _trainer(run, folder, ledger, model)
        ledger.layers = _layers(trainer.model, rhythm)
        answers = Answers()
        with contextlib.ExitStack() as stack:
            for context in (padding(run.padded), trl_kernels(), experts.grouped_products(gpu),
                experts.routing(trainer.model, run.routing, answers), pretend_cuda(gpu),
                fake.fake_tensors(),
                answers,  # below the ledger: how many hold a gradient is counted from the top
                ledger,
                kernels,
            ):  # fmt: skip
                stack.enter_context(context)
            place(trainer.model, run.dtype, ledger)
            ledger.watch(trainer.model)
            batches = [
                {name: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
                 for name, v in batch.items()}
                for _ in range(run.arguments.gradient_accumulation_steps)
            ]  # fmt: skip
            ledger.note_inputs(batches)
            trainer.get_train_dataloader = lambda: batches[:MICRO_BATCHES]
            ledger.mark("ready")
            trainer.train()
    stream = ledger.stream()
    stream.events = stream.events[: stream.marks["step"]]  # a list of its own: frees go on
    return stream


def _layers(model: torch.nn.Module, rhythm: layers.Rhythm | None) -> Layers:
    """Which layer a module of the trainer's model belongs to."""
    path = layers.path_of(model)
    return Layers() if path is None or rhythm is None else rhythm.named(path)


def _trainer(run: Run, folder: str, ledger: DeviceLedger, model: Any) -> tuple[Any, dict[str, Any]]:
    """The trainer over a model on meta, and a batch as its collator makes it."""
    from transformers import PrinterCallback, ProgressCallback

    arguments = _quiet(run.arguments, folder)
    options = dict(run.trainer_options)
    rows = _rows(run)
    if is_trl(run.trainer):
        options.setdefault("processing_class", _tokenizer())
        options["peft_config"] = copy.deepcopy(run.peft_config)  # PEFT writes into it
    elif run.peft_config is not None:
        from peft import get_peft_model

        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
        model = get_peft_model(model, copy.deepcopy(run.peft_config))
    trainer = run.trainer(
        model=model, args=arguments, train_dataset=rows, callbacks=[_end_of_step(ledger)], **options
    )
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    mixed_precision_as_on_a_gpu(trainer.accelerator, precision)
    size = arguments.per_device_train_batch_size
    return trainer, trainer.data_collator([rows[i] for i in range(size)])


def _end_of_step(ledger: DeviceLedger) -> Any:
    from transformers import TrainerCallback

    class EndOfStep(TrainerCallback):
        """Marks the end of the optimizer step and ends the run there."""

        def on_step_end(self, args, state, control, **kwargs):
            ledger.mark("step")
            control.should_training_stop = True
            return control

    return EndOfStep()


def _quiet(arguments: TrainingArguments, folder: str) -> TrainingArguments:
    """A copy that computes as asked for, and neither logs, nor saves, nor asks for a GPU."""
    from transformers.trainer_utils import IntervalStrategy, SaveStrategy

    quiet: Any = copy.copy(arguments)
    quiet.__dict__.pop("_setup_devices", None)  # a cached property: the device of this process
    quiet.output_dir, quiet.use_cpu, quiet.report_to = folder, True, []
    quiet.logging_strategy = quiet.eval_strategy = IntervalStrategy.NO
    quiet.save_strategy = SaveStrategy.NO
    quiet.load_best_model_at_end = quiet.push_to_hub = quiet.dataloader_pin_memory = False
    quiet.disable_tqdm, quiet.torch_compile = True, False
    quiet.gradient_accumulation_steps = min(MICRO_BATCHES, arguments.gradient_accumulation_steps)
    quiet.max_steps = 1
    if hasattr(quiet, "dataset_kwargs"):  # the rows are token ids already
        quiet.dataset_kwargs = {**(quiet.dataset_kwargs or {}), "skip_prepare_dataset": True}
    assert quiet.device.type == "cpu"  # asked for now, because asking resets accelerate's state
    return quiet


def _rows(run: Run) -> Any:
    """A data set of token ids, each row as long as the longest of the reader's."""
    length = run.sequence_length
    row = {"input_ids": [0] * length, "labels": [0] * length}
    if not is_trl(run.trainer):
        return [row | {"attention_mask": [1] * length}] * ROWS
    from datasets import Dataset

    return Dataset.from_list([row] * ROWS)


def _tokenizer() -> Any:
    """A tokenizer of three words: TRL asks for one, and no text is read."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _described(
    model, arguments, peft_config, quantization_config, dtype, attention, sequence_length, padded,
    trainer, trainer_options,
) -> Run:  # fmt: skip
    config = base.read_config(model)
    length = sequence_length or getattr(arguments, "max_length", None)
    if not isinstance(length, int) or length < 2:
        raise refusal(
            "sequence_length", "be a whole number of at least 2 tokens", length,
            "TrainingArguments do not say how long a row is: give the longest of yours",
        )  # fmt: skip
    packed = getattr(arguments, "packing", False) or getattr(arguments, "padding_free", False)
    alone = arguments.per_device_train_batch_size == 1
    kept_dtype = base.dtype_of(dtype, model, config)
    kind: Any = type(model) if isinstance(model, torch.nn.Module) else None
    bare = base.meta_base(config, kept_dtype, attention, kind)
    _check_length(length, bare)
    peft_config, assumed = _with_targets(peft_config, bare)
    return Run(
        config=config,
        kind=kind,
        arguments=arguments,
        trainer=trainer or trainer_of(arguments),
        dtype=kept_dtype,
        sequence_length=length,
        padded=not (packed or alone) if padded is None else padded,
        peft_config=peft_config,
        quantization_config=base.quantization_of(config, quantization_config),
        attention=attention,
        trainer_options=trainer_options,
        assumed=assumed,
    )


def _check_length(length: int, model: PreTrainedModel) -> None:
    """Learned positions end; computed ones go on."""
    limit = base.learned_positions(model)
    if limit is not None and length > limit:
        raise refusal(
            "sequence_length", f"be at most {limit} for {model.config.model_type}", length,
            "its positions are learned, and it has no more of them",
        )  # fmt: skip


def _with_targets(
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


def is_trl(trainer: type) -> bool:
    """Whether a trainer's class is TRL's, or built on one of them."""
    return any(kind.__module__.startswith("trl.") for kind in trainer.__mro__)


def trainer_of(arguments: TrainingArguments) -> type:
    """The class that these arguments belong to: Trainer, or TRL's of the same name.

    Raises:
        ValueError: They belong to a class that is not known here.
    """
    import transformers

    kind = type(arguments)
    if kind.__module__.startswith("trl."):
        import trl

        return getattr(trl, kind.__name__.replace("Config", "Trainer"))
    if isinstance(arguments, transformers.TrainingArguments):
        return transformers.Trainer
    raise refusal(
        "arguments", "be TrainingArguments or one of TRL's configs", kind.__name__,
        "or say trainer=YourTrainer",
    )  # fmt: skip
