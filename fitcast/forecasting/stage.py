"""Somebody's trainer on tensors without numbers: made, its weights placed, its data stood in for.

A step is then whatever the trainer's own methods do on it (`huggingface`, `other_steps`). Not
modelled: data loading, logging, saving: they are switched off in a copy of the arguments.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from fitcast.cuda import experts
from fitcast.cuda.kernels import CudaKernels
from fitcast.cuda.libraries import pretend_cuda
from fitcast.cuda.trainers import mixed_precision, padding, pretend_trainer, trl_kernels
from fitcast.forecasting import base, depth, fake, images, layers
from fitcast.forecasting.answers import Answers, lists
from fitcast.forecasting.own_errors import of_reader
from fitcast.forecasting.place import place, place_weights
from fitcast.forecasting.refusals import explained
from fitcast.gpus import Gpu
from fitcast.memory.layers import Layers
from fitcast.memory.stream import DeviceLedger, Stream, work_recorder
from fitcast.units import refusal

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PretrainedConfig, PreTrainedModel, TrainingArguments

MICRO_BATCHES = 2  # of a step; the third does to memory what the second did
ROWS = 64  # of the data set that stands for the reader's; one step takes at most two batches
REFERENCE = "reference."  # before the names of modules of a second model
# Arguments of TRL's configs about texts and their tokenizer: rows here are token ids already.
ABOUT_TEXT = (
    "assistant_only_loss",
    "chat_template_kwargs",
    "chat_template_path",
    "completion_only_loss",
    "dataset_kwargs",
    "dataset_text_field",
    "eos_token",
    "pad_token",
)


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
        target: A row's label where it has one for all of it, as for a classifier; else `None`.
        images: In each row, for a model with a vision tower.
        reference: Config of the second model that DPO compares with, or `None`.
        flash: The FlashAttention that was asked for, which `attention` stands for, or `None`.
        routing: Of loops over experts: `experts.EVEN` or `experts.WORST`.
        texts: In each row of packed ones whose bounds are kept: 2 for several, or 1.
        assumed: Sentences about what the script did not say.
    """

    config: PretrainedConfig
    kind: type[PreTrainedModel] | None
    arguments: TrainingArguments
    trainer: type
    dtype: torch.dtype
    sequence_length: int
    padded: bool
    target: Any = None
    images: int = 0
    peft_config: PeftConfig | None = None
    quantization_config: Any = None
    attention: str | None = None
    flash: str | None = None
    reference: PretrainedConfig | None = None
    trainer_options: dict[str, Any] = field(default_factory=dict)
    routing: str = experts.EVEN
    texts: int = 2
    assumed: tuple[str, ...] = ()


@dataclass
class Stage:
    """A trainer whose weights are where they would be on the card, ready to be used."""

    run: Run
    trainer: Any
    ledger: DeviceLedger
    collated: dict[int, Any]  # rows in a batch -> one as the collator makes it

    def batches(self, count: int, size: int) -> list[Any]:
        """`count` batches of `size` rows, on the device."""
        if is_online(self.run.trainer):
            return [self.collated[size]] * count  # prompts as text
        batches: list[Any] = [
            {name: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v
             for name, v in self.collated[size].items()}
            for _ in range(count)
        ]  # fmt: skip
        self.ledger.note_inputs(batches)
        return batches

    def stream(self) -> Stream:
        """What happened to memory up to the mark "step"."""
        return up_to_step(self.ledger)


def up_to_step(ledger: DeviceLedger) -> Stream:
    """A ledger's stream up to the mark "step", its events in a list of its own: frees go on."""
    stream = ledger.stream()
    stream.events = stream.events[: stream.marks["step"]]
    return stream


def few_layers(
    make: Callable[[], PreTrainedModel],
    play: Callable[[PreTrainedModel, layers.Rhythm | None], Stream],
    *,
    may_repeat: bool = True,
) -> Stream:
    """The stream of what `play` does to a model, of few layers where they repeat.

    Args:
        make: The model on meta, a new one each time: `play` uses it up.
        play: Takes the model and how its layers repeat, where some were cut off.
        may_repeat: Whether few of its layers tell of all.

    Raises:
        ValueError: What the libraries refuse, as one sentence.
    """
    model = make()
    rhythm, kind = layers.rhythm(model), model.config.model_type
    try:
        with quietly():
            if rhythm is not None and may_repeat:
                layers.shorten(model, rhythm.run)
                with contextlib.suppress(depth.NotRepeating):
                    return depth.deepen(play(model, rhythm), rhythm.counts)
                model = make()
            return play(model, None)
    except Exception as error:  # other people's code, which may do anything
        raise (of_reader(error) or explained(error, kind)) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Inside, libraries keep their advice to themselves: the script will hear it when it runs."""
    from transformers.utils import logging as transformers_logging

    fakes = logging.getLogger("torch._subclasses.fake_tensor")  # prints what it raises as well
    verbosity, level = transformers_logging.get_verbosity(), fakes.level
    transformers_logging.set_verbosity_error()
    fakes.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        fakes.setLevel(level)


def bare(run: Run) -> PreTrainedModel:
    """The run's model on meta, as its class makes it."""
    return base.meta_base(run.config, run.dtype, run.attention, run.kind)


@contextlib.contextmanager
def staged(
    run: Run, gpu: Gpu, model: PreTrainedModel, rhythm: layers.Rhythm | None = None
) -> Iterator[Stage]:
    """Make the trainer over `model`, which may have fewer layers, and place its weights.

    Args:
        run: What is to be run.
        gpu: The card.
        model: Of `bare`; it is used up.
        rhythm: How its layers repeat, where some were cut off.
    """
    ledger = DeviceLedger()
    if run.quantization_config is not None:
        base.quantize(model, run.quantization_config)
    with tempfile.TemporaryDirectory() as folder, pretend_trainer():
        trainer = make_trainer(run, folder, model, rhythm)
        reference = getattr(trainer, "ref_model", None)
        ledger.layers = _layers(trainer.model, reference, rhythm)
        collated = _collated(run, trainer, model)
        packed = () if reads_bounds(run, gpu) else packed_shapes(collated)
        with (
            images.unchecked(run.images),
            card(
                trainer.model, gpu, ledger, padded=run.padded, routing=run.routing, packed=packed
            ),
        ):  # fmt: skip
            place(trainer.model, run.dtype, ledger)
            ledger.watch(trainer.model)
            if reference is not None:
                with ledger.phase("load"):
                    place_weights(reference, run.dtype, ledger, prefix=REFERENCE)
                ledger.watch_too(reference, REFERENCE)
            yield Stage(run, trainer, ledger, collated)


@contextlib.contextmanager
def card(
    model: torch.nn.Module,
    gpu: Gpu,
    ledger: DeviceLedger,
    *,
    padded: bool,
    routing: str,
    packed: Collection[tuple[int, ...]] = (),
) -> Iterator[None]:
    """Inside, what is computed is computed on `gpu`, on tensors without numbers.

    Args:
        model: Whose experts are routed.
        gpu: The card.
        ledger: Books what happens.
        padded: Whether masks hide padding.
        routing: Of loops over experts.
        packed: As `fake_tensors` takes it.
    """
    answers = Answers()
    with contextlib.ExitStack() as stack:
        for context in (padding(padded), trl_kernels(), lists(), experts.grouped_products(gpu),
            experts.routing(model, routing, answers), pretend_cuda(gpu), fake.fake_tensors(packed),
            answers,  # below the ledger: how many hold a gradient is counted from the top
            ledger,
            CudaKernels(gpu, on_work=work_recorder(ledger, gpu)),
        ):  # fmt: skip
            stack.enter_context(context)
        yield


def _layers(model: Any, reference: Any, rhythm: layers.Rhythm | None) -> Layers:
    """Which layer a module of the trainer's model belongs to, or of the one beside it."""
    path = layers.path_of(model)
    if path is None or rhythm is None:
        return Layers()
    beside = None if reference is None else REFERENCE + str(layers.path_of(reference))
    return rhythm.named(path) if beside is None else rhythm.named(path, beside)


# --- the trainer -------------------------------------------------------------------------------


def make_trainer(run: Run, folder: str, model: Any, rhythm: layers.Rhythm | None = None) -> Any:
    """The trainer of the run's class over a model on meta."""
    from transformers import PrinterCallback, ProgressCallback

    arguments = quiet(run.arguments, folder)
    options = dict(run.trainer_options)
    if is_trl(run.trainer):
        options.setdefault("processing_class", tokenizer())
        options["peft_config"] = copy.deepcopy(run.peft_config)  # PEFT writes into it
    elif run.peft_config is not None:
        model = with_adapters(model, run.peft_config, bool(arguments.gradient_checkpointing))
    second = None if run.reference is None else _second(run, run.reference, rhythm)
    if is_online(run.trainer):
        options.setdefault("reward_funcs", no_reward)
    elif second is not None:
        options["ref_model"] = second
    precision = "fp16" if arguments.fp16 else "bf16" if arguments.bf16 else "no"
    with mixed_precision(precision), _rows_are_ready(run.trainer, second):
        trainer = run.trainer(model=model, args=arguments, train_dataset=rows_of(run), **options)
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    if is_online(run.trainer):
        trainer._generate = lambda prompts: given_texts(run, len(prompts))
    return trainer


def with_adapters(model: Any, peft_config: PeftConfig, checkpointing: bool) -> Any:
    """The model as a script hands it to a Trainer: adapted, and able to be checkpointed."""
    from peft import get_peft_model

    if checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, copy.deepcopy(peft_config))


def _second(run: Run, config: PretrainedConfig, rhythm: layers.Rhythm | None) -> Any:
    """The model that DPO compares with, on meta, as deep as the first one."""
    model = base.meta_base(config, run.dtype, run.attention, run.kind)
    if rhythm is not None:
        layers.shorten(model, rhythm.run)
    if run.quantization_config is not None:
        base.quantize(model, run.quantization_config)
    return model


@contextlib.contextmanager
def _rows_are_ready(trainer: type, second: Any = None) -> Iterator[None]:
    """Inside, TRL's trainers leave the rows as they are: token ids, with a reference's answers.

    GRPO's makes its second model itself, and is given `second`.
    """
    module = sys.modules.get("trl.trainer.dpo_trainer")
    online = sys.modules.get("trl.trainer.grpo_trainer")
    with contextlib.ExitStack() as stack:
        if second is not None and hasattr(online, "create_model_from_path"):
            stack.enter_context(
                mock.patch.object(online, "create_model_from_path", lambda *_, **__: second)
            )
        for name in ("_prepare_dataset", "_precompute_ref_logps"):
            if hasattr(trainer, name):
                stack.enter_context(
                    mock.patch.object(trainer, name, lambda _, rows, *__, **___: rows)
                )
        if hasattr(module, "hash_module"):  # names a file of answers by the weights' numbers
            stack.enter_context(mock.patch.object(module, "hash_module", lambda _: ""))
        yield


def quiet(arguments: TrainingArguments, folder: str) -> TrainingArguments:
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
    for name, default in about_text(arguments).items():
        setattr(quiet, name, default)
    for name in ("use_vllm", "activation_offloading", "log_completions"):
        if getattr(quiet, name, False):
            setattr(quiet, name, False)  # `notes` says what is not modelled of them
    assert quiet.device.type == "cpu"  # asked for now, because asking resets accelerate's state
    return quiet


def about_text(arguments: TrainingArguments) -> dict[str, Any]:
    """Arguments about texts that the script has set, and what each is by default."""
    return {
        one.name: one.default
        for one in dataclasses.fields(arguments)
        if one.name in ABOUT_TEXT and getattr(arguments, one.name) != one.default
    }


def is_trl(trainer: type) -> bool:
    """Whether a trainer's class is TRL's, or built on one of them."""
    return any(kind.__module__.startswith("trl.") for kind in trainer.__mro__)


def is_preference(trainer: type) -> bool:
    """Whether it learns from pairs, as TRL's DPOTrainer does."""
    return any(kind.__name__ == "DPOTrainer" for kind in trainer.__mro__)


def is_online(trainer: type) -> bool:
    """Whether it learns from texts that it has made itself, as TRL's GRPOTrainer does."""
    return any(kind.__name__ == "GRPOTrainer" for kind in trainer.__mro__)


def is_reward(trainer: type) -> bool:
    """Whether it learns which of two texts is better, as TRL's RewardTrainer does."""
    return any(kind.__name__ == "RewardTrainer" for kind in trainer.__mro__)


def trainer_of(arguments: TrainingArguments) -> type:
    """The class that these arguments belong to: Trainer, or TRL's of the same name.

    Raises:
        ValueError: They belong to a class that is not known here.
    """
    import transformers

    kind = type(arguments)
    if kind.__module__.startswith("trl."):
        import trl

        found = getattr(trl, kind.__name__.replace("Config", "Trainer"), None)
        if found is not None:
            return found
    elif isinstance(arguments, transformers.TrainingArguments):
        return transformers.Trainer
    raise refusal(
        "arguments", "be TrainingArguments or one of TRL's configs", kind.__name__,
        "or say trainer=YourTrainer",
    )  # fmt: skip


# --- its data ----------------------------------------------------------------------------------


def rows_of(run: Run) -> Any:
    """A data set of token ids, each row as long as the longest of the reader's."""
    length = run.sequence_length
    if not is_trl(run.trainer):
        labels = [0] * length if run.target is None else run.target
        row = {"input_ids": [0] * length, "labels": labels}
        return [row | {"attention_mask": [1] * length}] * ROWS
    from datasets import Dataset

    row: dict[str, Any] = {"input_ids": [0] * length, "labels": [0] * length}
    if is_online(run.trainer):
        row = {"prompt": "<s>"}
    if is_reward(run.trainer):
        row = {"chosen_ids": [0] * length, "rejected_ids": [0] * length}
    if packs_texts(run.arguments):
        halves = [length - length // 2, length // 2]
        row["seq_lengths"] = halves if run.texts > 1 else [length]
    if is_preference(run.trainer):
        row = {"prompt_ids": [0], "chosen_ids": [0] * (length - 1)}
        row["rejected_ids"] = row["chosen_ids"]
        if getattr(run.arguments, "precompute_ref_log_probs", False):
            row |= {"ref_chosen_logps": 0.0, "ref_rejected_logps": 0.0}
    return Dataset.from_list([row] * ROWS)


def packs_texts(arguments: Any) -> bool:
    """Whether SFT puts several texts into a row and their bounds into its batches.

    "wrapped" packing cuts rows out of one stream and forgets the bounds. Source:
    trl/trainer/sft_trainer.py, `padding_free` (TRL 1.16).
    """
    strategy = getattr(arguments, "packing_strategy", "")
    return bool(getattr(arguments, "packing", False)) and strategy.startswith("bfd")


def packed_shapes(collated: dict[int, Any]) -> set[tuple[int, ...]]:
    """Shapes of the batches that hold several texts in a row, by what transformers sees in them.

    Args:
        collated: As the trainer's collator makes them, with their numbers.
    """
    from transformers.masking_utils import find_packed_sequence_indices

    every = [one["position_ids"] for one in collated.values() if "position_ids" in one]
    return {tuple(ids.shape) for ids in every if find_packed_sequence_indices(ids) is not None}


def reads_bounds(run: Run, gpu: Gpu) -> bool:
    """Whether attention is told where texts end, and needs no mask: FlashAttention's is."""
    return run.flash is not None and gpu.has_flash_attention


def may_hold_one_text(run: Run, gpu: Gpu) -> bool:
    """Whether a batch of packed texts may be one text alone, which has no mask: a long one is."""
    alone = run.arguments.per_device_train_batch_size == 1
    return alone and packs_texts(run.arguments) and not reads_bounds(run, gpu)


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """What a text is worth is the host's business."""
    return [0.0] * len(completions)


def given_texts(run: Run, count: int) -> tuple[Any, ...]:
    """What GRPO's `_generate` gives back: prompts and completions as long as they may be.

    Source: trl/trainer/grpo_trainer.py, `_generate` (TRL 1.16).

    Raises:
        ValueError: A row has no room for a completion.
    """
    arguments: Any = run.arguments
    completion = arguments.max_completion_length
    prompt = run.sequence_length - completion
    if prompt < 1:
        raise refusal(
            "sequence_length", f"be more than max_completion_length ({completion})",
            run.sequence_length, "it is prompt and completion together",
        )  # fmt: skip
    texts = [[0] * completion] * count
    return [[0] * prompt] * count, texts, None, [""] * count, None, {}, None, None


def _collated(run: Run, trainer: Any, model: PreTrainedModel) -> dict[int, Any]:
    """A batch of each size that the arguments name."""
    rows, arguments = rows_of(run), run.arguments
    if is_online(run.trainer):
        every: Any = arguments
        size = every.per_device_train_batch_size
        return {size: [rows[0]] * size * every.steps_per_generation}
    names = ("per_device_train_batch_size", "per_device_eval_batch_size",
             "precompute_ref_batch_size")  # fmt: skip
    sizes = {size for name in names if (size := getattr(arguments, name, None))}
    made = {size: trainer.data_collator([rows[i % ROWS] for i in range(size)]) for size in sizes}
    return {size: {**one, **images.beside(one, model, run.images)} for size, one in made.items()}


def tokenizer() -> Any:
    """A tokenizer of three words: TRL asks for one, and no text is read."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "<pad>": 2}, unk_token="<s>"))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
