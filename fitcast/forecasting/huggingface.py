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
import os
import tempfile
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from fitcast import models
from fitcast.cuda import experts
from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.cuda.trainers import (
    mixed_precision_as_on_a_gpu,
    padding,
    pretend_trainer,
    trl_kernels,
)
from fitcast.forecasting import depth, fake, layers
from fitcast.forecasting.answers import Answers
from fitcast.forecasting.forecast import Forecast, report
from fitcast.forecasting.place import place
from fitcast.gpus import T4, Gpu
from fitcast.memory.layers import Layers
from fitcast.memory.stream import DeviceLedger, Stream, work_recorder
from fitcast.units import Said, refusal

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
        arguments: `TrainingArguments`, `SFTConfig`, ...
        trainer: The class that trains.
        dtype: Of the weights that are not quantized, as `from_pretrained(dtype=...)` loads them.
        sequence_length: Tokens in a row of the batch.
        padded: Whether masks hide padding.
        routing: Of loops over experts: `experts.EVEN` or `experts.WORST`.
    """

    config: PretrainedConfig
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
    return report(run_stream(run, gpu), gpu, micro_batches=micro_batches)


def notes(run: Run) -> tuple[str, ...]:
    """What a forecast of this run assumes, and what it does not model, a sentence each."""
    said = [
        f"{name}={getattr(run.arguments, name)!r} is not modelled: {why}"
        for name, why in NOT_MODELLED.items()
        if getattr(run.arguments, name, None) not in (None, False, "", [], {})
    ]
    rows = "padded to" if run.padded else "without padding,"
    return (*said, f"rows are {rows} {run.sequence_length} tokens, and every token has a label")


def run_stream(run: Run, gpu: Gpu) -> Stream:
    """Memory events of load and first step; of few layers where they repeat."""
    model = meta_base(run)
    rhythm = layers.rhythm(model)
    if rhythm is not None:
        layers.shorten(model, rhythm.run)
        with contextlib.suppress(depth.NotRepeating):
            return depth.deepen(_train(run, gpu, model, rhythm), rhythm.counts)
        model = meta_base(run)
    return _train(run, gpu, model)


def meta_base(run: Run) -> PreTrainedModel:
    """The model without memory."""
    from transformers import AutoModelForCausalLM

    options = {"attn_implementation": run.attention} if run.attention else {}
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(run.config, dtype=run.dtype, **options)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise refusal(
            "model", "be a causal language model that transformers can build",
            Said(f"a config of kind {run.config.model_type!r} ({error})"),
            "see the model's own page for the class that it needs",
        ) from error  # fmt: skip
    return model.train()


def _quantize(model: PreTrainedModel, quantization_config: Any) -> None:
    """Source: transformers/quantizers/base.py and quantizer_bnb_4bit.py."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization_config)
    quantizer.pre_quantized = False
    quantizer.preprocess_model(model=model, device_map=None)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = quantization_config.quant_method
    model.config.quantization_config = quantization_config
    model.is_loaded_in_4bit = bool(getattr(quantization_config, "load_in_4bit", False))
    model.is_loaded_in_8bit = bool(getattr(quantization_config, "load_in_8bit", False))


def _train(
    run: Run, gpu: Gpu, model: PreTrainedModel, rhythm: layers.Rhythm | None = None
) -> Stream:
    """Make the trainer, place the weights, take one optimizer step of its `train()`."""
    ledger = DeviceLedger()
    if run.quantization_config is not None:
        _quantize(model, run.quantization_config)
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


def _trainer(
    run: Run, folder: str, ledger: DeviceLedger, model: PreTrainedModel
) -> tuple[Any, dict[str, Any]]:
    """The trainer over a model on meta, and a batch as its collator makes it."""
    from transformers import PrinterCallback, ProgressCallback

    arguments = _quiet(run.arguments, folder)
    options = dict(run.trainer_options)
    rows = _rows(run)
    if "trl" in run.trainer.__module__:
        options.setdefault("processing_class", _tokenizer())
        options["peft_config"] = run.peft_config
    elif run.peft_config is not None:
        from peft import get_peft_model

        if arguments.gradient_checkpointing:
            model.enable_input_require_grads()
        model = get_peft_model(model, run.peft_config)
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

    quiet = copy.copy(arguments)
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
    if "trl" not in run.trainer.__module__:
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
    config = _config(model)
    length = sequence_length or getattr(arguments, "max_length", None)
    if not isinstance(length, int) or length < 2:
        raise refusal(
            "sequence_length", "be a whole number of at least 2 tokens", length,
            "TrainingArguments do not say how long a row is: give the longest of yours",
        )  # fmt: skip
    packed = getattr(arguments, "packing", False) or getattr(arguments, "padding_free", False)
    alone = arguments.per_device_train_batch_size == 1
    return Run(
        config=config,
        arguments=arguments,
        trainer=trainer or trainer_of(arguments),
        dtype=_dtype(dtype, model, config),
        sequence_length=length,
        padded=not (packed or alone) if padded is None else padded,
        peft_config=peft_config,
        quantization_config=quantization_config,
        attention=attention,
        trainer_options=trainer_options,
    )


def _config(model: Any) -> PretrainedConfig:
    if isinstance(model, (str, os.PathLike)):
        return models.config(str(model))
    config = getattr(model, "config", model)  # a model's, or the config itself
    if not hasattr(config, "model_type"):
        raise refusal(
            "model", "be a name, a folder, a config or a model of transformers", type(model),
            "for a module of your own write a step and use forecast_step",
        )  # fmt: skip
    return copy.deepcopy(config)


def _dtype(dtype: Any, model: Any, config: PretrainedConfig) -> torch.dtype:
    """The dtype that `from_pretrained` would load: what was given, else the checkpoint's."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in (None, "auto"):
        found = getattr(torch, str(dtype), None)
        if not isinstance(found, torch.dtype):
            raise refusal("dtype", "be a dtype of torch", dtype, "for example dtype='float16'")
        return found
    if isinstance(model, torch.nn.Module):
        return model.dtype
    own = getattr(config, "dtype", None)
    preset = isinstance(model, str) and model in models.SHAPES  # bfloat16 on the hub, all of them
    return own if isinstance(own, torch.dtype) else torch.bfloat16 if preset else torch.float32


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
