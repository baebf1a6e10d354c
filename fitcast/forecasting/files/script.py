"""What a file says, in Hugging Face's names, before their objects are made of it."""

from __future__ import annotations

import dataclasses
import importlib
import re
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fitcast import models
from fitcast.forecasting.files.reading import Values
from fitcast.gpus import Gpu
from fitcast.recipe import RENAMED
from fitcast.units import Said, refusal, with_article

if TYPE_CHECKING:
    from transformers import TrainingArguments

# Arguments of a Trainer that change no byte of its training step, under old and new names.
QUIET = re.compile(
    r"output_dir|overwrite_output_dir|do_(train|eval|predict)|logging_.*|log_.*|plot_loss"
    r"|(save|eval|evals?|saves)_.*|evaluation_strategy|report_to|run_name|project|hub_.*"
    r"|push_to_hub.*|resume_from_checkpoint|load_best_model_at_end|metric_for_best_model"
    r"|greater_is_better|dataloader_.*|num_train_epochs|max_steps|learning_rate|lr_.*|warmup_.*"
    r"|weight_decay|adam_.*|seed|data_seed|disable_tqdm|ddp_.*|local_rank|debug|tf32"
    r"|include_.*|group_by_length|length_column_name|remove_unused_columns|label_smoothing_factor"
    r"|full_determinism|ignore_data_skip|skip_memory_metrics|prediction_loss_only"
    r"|per_device_eval_batch_size|use_cpu|no_cuda|trackio_.*|trust_remote_code"
)
# Those that do, and that making or running the class cannot show here.
NOT_MODELLED = {
    "deepspeed": "DeepSpeed's engine is not run; the forecast is that of one whole copy",
    "fsdp": "FSDP's shards are not run; the forecast is that of one whole copy",
    "fsdp_config": "FSDP's shards are not run; the forecast is that of one whole copy",
    "torch_compile": "inductor's kernels keep other tensors than eager ones",
    "use_liger_kernel": "Liger's Triton kernels replace the model's own",
    "liger_kernel_config": "Liger's Triton kernels replace the model's own",
    "auto_find_batch_size": "the batch size that is asked for is forecast",
    "accelerator_config": "accelerate's own options are not followed",
    "parallelism_config": "other parallelism than data parallel is not run",
}
NEW_NAMES = {old: new for new, old in RENAMED.items()}


@dataclass
class Script:
    """A run.

    Attributes:
        tool: Whose file it was.
        model: Name, folder or hub id.
        arguments: Fields of `config_class`.
        config_class: "TrainingArguments", or "SFTConfig" or "DPOConfig" of TRL.
        lora: Fields of a `LoraConfig`, or `None` where all weights train.
        quantization: Fields of a `BitsAndBytesConfig`, or `None`.
        dtype: As given to `from_pretrained`; `None` is the checkpoint's own.
        attention: As `attn_implementation`.
        sequence_length: Tokens in a row.
        padded: Whether rows are padded; `None` leaves it to the forecast.
        notes: What is not modelled or was not understood.
    """

    tool: str
    model: str
    arguments: dict[str, Any]
    config_class: str = "TrainingArguments"
    lora: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    dtype: str | None = None
    attention: str | None = None
    sequence_length: int | None = None
    padded: bool | None = None
    notes: list[str] = field(default_factory=list)

    def training_arguments(self, gpu: Gpu) -> TrainingArguments:
        """The object that the tool would make.

        Raises:
            ValueError: transformers or TRL refuses a value; its reason is in the text.
        """
        from fitcast.cuda.trainers import arguments_as_on

        make: Any = config_class(self.config_class)
        names = {f.name for f in dataclasses.fields(make)}
        fields = {
            NEW_NAMES.get(name, name) if NEW_NAMES.get(name) in names else name: value
            for name, value in self.arguments.items()
        }
        try:
            with arguments_as_on(gpu), warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # of names that the tools still use
                return make(output_dir="unused", use_cpu=True, report_to="none", **fields)
        except (ValueError, TypeError) as error:
            raise refusal(
                f"{self.tool}'s file",
                f"have values that {self.config_class} accepts",
                Said(" ".join(str(error).split())[:300]),
                "mend the value that it names",
            ) from error

    def options(self) -> dict[str, Any]:
        """What `forecast_run` takes beside model, arguments and card."""
        from peft import LoraConfig
        from transformers import BitsAndBytesConfig

        return {
            "peft_config": LoraConfig(**self.lora) if self.lora else None,
            "quantization_config": self.quantization and BitsAndBytesConfig(**self.quantization),
            "dtype": self.dtype,
            "attn_implementation": self.attention,
            "sequence_length": self.sequence_length,
            "padded": self.padded,
        }


def config_class(name: str) -> type:
    """transformers' or TRL's class of arguments.

    Raises:
        ValueError: It is TRL's, and TRL is not installed.
    """
    if name == "TrainingArguments":
        from transformers import TrainingArguments

        return TrainingArguments
    try:
        return getattr(importlib.import_module("trl"), name)
    except ImportError as error:
        raise refusal(
            "trl", "be installed to forecast its trainers", Said("none"), "pip install trl"
        ) from error


def known_model(name: str | None, key: str) -> str:
    """The model of a file: a preset where it is one on the hub, which then needs no network.

    Raises:
        ValueError: None is named.
    """
    if not name:
        raise refusal(key, "name the model", Said("none"), f"write {key}: owner/name")
    presets = {shape["hub_id"]: preset for preset, shape in models.SHAPES.items()}
    return presets.get(name, name)


def pass_on(values: Values, name: str) -> dict[str, Any]:
    """The keys that are fields of a class of arguments, taken as its fields want them."""
    found = {}
    for f in dataclasses.fields(config_class(name)):  # pyright: ignore[reportArgumentType]
        key = f.name
        if key not in values.left or QUIET.fullmatch(key) or key in NOT_MODELLED:
            values.taken.add(key)
        elif isinstance(f.default, bool) or key in ("bf16", "fp16"):
            found[key] = values.yes_no(key)
        elif isinstance(f.default, int):
            found[key] = values.whole(key)
        elif isinstance(f.default, float):
            found[key] = values.number(key)
        else:
            found[key] = values.raw(key)
    return found


def refuse_bfloat16(gpu: Gpu, key: str = "bf16") -> None:
    """A run in bfloat16 on a card that has none: PyTorch emulates it there, and crawls.

    Raises:
        ValueError: The card has none.
    """
    if not gpu.has_bfloat16:
        raise refusal(
            key,
            f"be false on {with_article(gpu.name)}, which has no bfloat16",
            True,
            "write fp16: true, or ask for another card",
        )
