"""Every choice of a training run in one validated, immutable object.

The same `TrainRecipe` goes to the forecast (no GPU needed) and to the real run, so the two cannot
disagree about what was asked. Change one with `dataclasses.replace`. Needs no torch.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

from fitcast import gpus, models
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from transformers import TrainingArguments

# field: (smallest, largest); the largest catches a slip of the keyboard, not a real run
WHOLE_NUMBERS = {
    "micro_batch_size": (1, 4096),
    "gradient_accumulation_steps": (1, 65536),
    "world_size": (1, 4096),
    "sequence_length": (2, 1_048_576),
    "loss_chunk_tokens": (1, 1_048_576),
    "lora_alpha": (1, 4096),
    "max_steps": (1, 10_000_000),
    "seed": (0, 2**32 - 1),
    "logging_steps": (1, 1_000_000),
    "save_steps": (1, 1_000_000),
}
FRACTIONS = {
    "lora_dropout": 1.0,
    "learning_rate": 1.0,
    "warmup_fraction": 1.0,
    "weight_decay": 1.0,
    "max_grad_norm": 1000.0,
}
# field: (the word that is allowed, too; smallest, largest)
WHOLE_OR = {
    "checkpointed_layers": ("all", 0, 1000),
    "lora_rank": (None, 1, 4096),
    "mlp_tile_tokens": (None, 1, 1_048_576),
}
BELOW_ONE = {
    "lora_dropout": "1 drops every input, use 0.05",
    "warmup_fraction": "transformers takes 1 for one step, use 0.03",
}
TRAINER_OPTIM = {
    "adamw": "adamw_torch",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
# today's name of an argument: the one before, between transformers 5.15 and 5.23
RENAMED = {
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """A training run: what is trained, in which precision, on which batch, with which levers.

    Attributes:
        model: Name in `models.NAMES`, a folder with a config.json, or a hub id. A path is taken,
            too, and becomes text.
        base: How the frozen weights are stored. "nf4" is bitsandbytes' 4 bits.
        double_quant: Whether nf4's scales are quantized too (0.516 instead of 0.563 bytes each).
        kbit_upcast: Whether every non-4-bit weight becomes float32, as PEFT's
            `prepare_model_for_kbit_training` does.
        lora_rank: Rank of the adapters; `None` trains the weights themselves.
        lora_alpha: Adapters' output is scaled by lora_alpha / lora_rank.
        lora_dropout: Probability of dropping an adapter's input.
        lora_targets: Names of the linear layers with adapters, or "all-linear".
        amp_dtype: Autocast's dtype; `None` computes in the dtype of the weights.
        micro_batch_size: Sequences in one forward pass on one GPU.
        gradient_accumulation_steps: Micro batches summed before the optimizer steps.
        world_size: Data-parallel processes.
        sequence_length: Tokens in each sequence; where lengths differ, in the longest.
        padded: Whether batches carry an attention mask, as padded ones do; see `has_mask`.
        checkpointed_layers: How many layers recompute their activations in backward, or "all".
        offload_checkpoints: Whether what checkpointing keeps waits in host memory; a number from 2
            on for that of so many layers, the first ones, fetched a layer ahead of time.
        attention: Who computes attention: "stock" as transformers does, "explicit_kv" with the
            key/value heads repeated first, "eager" with the scores written out.
        keep_attention: Whether checkpointed layers keep attention's output; a number from 2 on for
            that of so many, the last ones.
        causal_padding: Whether training forgets the mask of padded batches, where all padding is
            behind, which no token of a causal model sees (`fused.use_causal_padding`).
        loss: "full" builds all logits, "chunked" `loss_chunk_tokens` rows of them at a time,
            "lean" likewise and with its gradient, so that backward recomputes none; "fused" is lean
            in fewer operations, "compiled" in one kernel of torch.compile a chunk.
        norm: "stock" RMSNorm as in transformers, "native" as PyTorch's one fused operation.
        mlp: "stock", "lean" to keep one tensor less (`lean.SwiGLU`), or "compiled" to keep as
            little and compute what stands between its products in one kernel (`compiled.SwiGLU`).
        mlp_tile_tokens: Tokens that an MLP computes at a time, each tile again in backward
            (`tiles.Tiled`); `None` is all at once.
        embedding: "stock" on the GPU, "host" with its weights in host memory, where rows are looked
            up and sent; for a frozen one that is not the head's weight, too.
        adapters: "stock" as PEFT adds them, "lean" in one product (`lean.use_lean_lora`), or
            "in_place" likewise, into the base's output (`fused.use_adapters_in_place`).
        rotary: "stock" position embedding, "lean" with half the memory traffic (`lean.Rotary`), or
            "compiled" in one kernel (`compiled.Rotary`).
        optimizer: Name in `CHOICES["optimizer"]`.
        flat_optimizer: Whether it steps all adapters as one parameter (`fused.Flat`), in a few
            operations rather than a few for each.
        expandable_segments: Whether CUDA's allocator grows one segment rather than cutting many
            (PYTORCH_ALLOC_CONF), which leaves fewer holes.
        learning_rate: The highest, after the warm-up; then it falls linearly to 0.
        weight_decay: Part of a weight that learning_rate x it takes away in each step.
        max_grad_norm: Gradients longer than this are scaled down to it; 0 leaves them.
        warmup_fraction: Part of `max_steps` over which the learning rate rises.
        max_steps: Optimizer steps.
        logging_steps: Optimizer steps between two lines of Trainer's log. `training.train` keeps
            a line of each step, whatever stands here.
        save_steps: Optimizer steps between two checkpoints.
        seed: Of the adapters, of dropout and of the order of the data.

    Raises:
        ValueError: A field is out of range; the message says what to change.

    Example:
        >>> recipe = TrainRecipe(model="llama-3.1-8b", gradient_accumulation_steps=16)
        >>> recipe.effective_batch_size
        16
    """

    model: str
    base: Literal["nf4", "float16", "bfloat16", "float32"] = "nf4"
    double_quant: bool = True
    kbit_upcast: bool = False
    lora_rank: int | None = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.05
    lora_targets: tuple[str, ...] | Literal["all-linear"] = ("q_proj", "k_proj", "v_proj", "o_proj")
    amp_dtype: Literal[None, "float16", "bfloat16"] = None
    micro_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    world_size: int = 1
    sequence_length: int = 512
    padded: bool = False
    checkpointed_layers: int | Literal["all"] = "all"
    offload_checkpoints: bool | int = False
    attention: Literal["stock", "explicit_kv", "eager"] = "stock"
    keep_attention: bool | int = False
    causal_padding: bool = False
    loss: Literal["full", "chunked", "lean", "fused", "compiled"] = "full"
    loss_chunk_tokens: int = 512
    norm: Literal["stock", "native"] = "stock"
    mlp: Literal["stock", "lean", "compiled"] = "stock"
    mlp_tile_tokens: int | None = None
    embedding: Literal["stock", "host"] = "stock"
    adapters: Literal["stock", "lean", "in_place"] = "stock"
    rotary: Literal["stock", "lean", "compiled"] = "stock"
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "paged_adamw_8bit"
    flat_optimizer: bool = False
    expandable_segments: bool = False
    learning_rate: float = 2e-4
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_fraction: float = 0.03
    max_steps: int = 100
    logging_steps: int = 10
    save_steps: int = 50
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "model", str(self.model))  # a Path would not be JSON
        models.hub_id(self.model)  # raises with the nearest name
        if isinstance(self.lora_targets, list):  # as it comes back from JSON
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        for field, choices in CHOICES.items():
            _check_choice(field, getattr(self, field), choices)
        for field, bounds in WHOLE_NUMBERS.items():
            _check_whole(field, getattr(self, field), *bounds)
        for field, (word, *bounds) in WHOLE_OR.items():
            if getattr(self, field) != word:
                _check_whole(field, getattr(self, field), *bounds, word=repr(word))
        for field, high in FRACTIONS.items():
            _check_fraction(field, getattr(self, field), high)
        for field in SWITCHES:
            _check_switch(field, getattr(self, field))
        for field, remedy in BELOW_ONE.items():
            if getattr(self, field) == 1:
                raise refusal(field, "be below 1", getattr(self, field), remedy)
        _check_targets(self.lora_targets)
        self._check_full_fine_tune()
        self._check_checkpoints()
        self._check_host_pace()

    def _check_full_fine_tune(self) -> None:
        """What cannot be when the weights themselves are trained."""
        if self.lora_rank is not None:
            return
        if self.base == "nf4":
            raise refusal(
                "lora_rank",
                "be a number when base is 'nf4'",
                None,
                "4-bit weights cannot be trained, set lora_rank=16 or base='float32'",
            )
        if self.embedding == "host":
            raise refusal(
                "embedding",
                "be 'stock' when lora_rank is None",
                "host",
                "it is trained, where the rest is",
            )
        if self.loss not in ("full", "chunked"):
            raise refusal(
                "loss",
                "be 'full' or 'chunked' when lora_rank is None",
                self.loss,
                f"the {self.loss} loss gives the head no gradient",
            )
        if self.flat_optimizer:
            raise refusal(
                "flat_optimizer",
                "be False when lora_rank is None",
                True,
                "all weights would be copied into one; it is for adapters",
            )

    def _check_checkpoints(self) -> None:
        """What checkpoints are for has to be there: a layer that forgets, an output to keep."""
        for field in ("offload_checkpoints", "keep_attention"):
            if not isinstance(getattr(self, field), bool):
                _check_whole(field, getattr(self, field), 2, 1000)
        for field in ("offload_checkpoints", "keep_attention"):
            if getattr(self, field) and self.checkpointed_layers == 0:
                raise refusal(
                    field,
                    "be False when checkpointed_layers is 0",
                    getattr(self, field),
                    "no layer forgets, set checkpointed_layers='all'",
                )
        k, m = self.checkpointed_layers, self.offload_checkpoints
        if m is not True and k != "all" and 0 < k <= m:
            raise refusal(
                "offload_checkpoints",
                "be True or below checkpointed_layers",
                m,
                "the last one's checkpoint is needed at once",
            )
        if self.keep_attention is not True and k != "all" and 0 < k < self.keep_attention:
            raise refusal(
                "keep_attention",
                "be True or at most checkpointed_layers",
                self.keep_attention,
                "the other layers keep everything",
            )
        if self.keep_attention and self.attention == "eager":
            raise refusal(
                "keep_attention",
                "be False when attention is 'eager'",
                True,
                "no kernel's output is there to keep, set attention='explicit_kv'",
            )

    def _check_host_pace(self) -> None:
        """What spares operations has to have some to spare."""
        if self.causal_padding and not self.padded:
            raise refusal(
                "causal_padding",
                "be False when padded is False",
                True,
                "there is no mask to forget, set padded=True",
            )
        if self.flat_optimizer and self.world_size > 1:
            raise refusal(
                "flat_optimizer",
                "be False when world_size is above 1",
                True,
                "processes average gradients in pieces of their own",
            )

    @property
    def effective_batch_size(self) -> int:
        """Sequences behind one optimizer step: micro batch x accumulation x world size."""
        return self.micro_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens (padding counted) behind one optimizer step."""
        return self.effective_batch_size * self.sequence_length

    @property
    def has_mask(self) -> bool:
        """Whether attention sees a mask. A row alone is as long as its batch, padded or not.

        transformers drops a mask that hides nothing (masking_utils, `_ignore_causal_mask_sdpa`).
        """
        return self.padded and self.micro_batch_size > 1

    def check_on(self, gpu: gpus.Gpu) -> None:
        """Refuse a recipe whose precision `gpu` does not compute in.

        Args:
            gpu: The card that it would run on.

        Raises:
            ValueError: bfloat16 (autocast or base) on a GPU that only emulates it; 16-bit weights
                that are trained with a scaler, which cannot unscale their gradients.
        """
        if self.lora_rank is None and self.base != "float32" and self.amp_dtype == "float16":
            raise refusal(
                "base",
                "be 'float32' when all weights are trained in float16",
                self.base,
                "a scaler cannot unscale 16-bit gradients; or set lora_rank=16",
            )
        for field in ("amp_dtype", "base"):
            if getattr(self, field) == "bfloat16" and not gpu.has_bfloat16:
                raise refusal(
                    field,
                    f"be 'float16' on a {gpu.name}",
                    "bfloat16",
                    gpus.mixed_precision(gpu).reason,
                )

    def for_gpu(self, gpu: gpus.Gpu | None) -> TrainRecipe:
        """The same recipe in the precision that suits `gpu` (`None`: float32 on a CPU)."""
        return dataclasses.replace(self, amp_dtype=gpus.mixed_precision(gpu).dtype)

    def to_training_arguments(self, output_dir: str, **overrides: Any) -> TrainingArguments:
        """`transformers.TrainingArguments` for this recipe, on transformers 5.15 and later.

        Checkpointing is left off: `qlora.checkpoint_layers` decides layer by layer, and Trainer
        would switch every layer on again. `world_size` is what the launcher (torchrun) makes it.

        Args:
            output_dir: Folder of the checkpoints.
            overrides: Any TrainingArguments field, under its newest name.

        Raises:
            ValueError: An override that this version of transformers does not know.
        """
        from transformers import TrainingArguments

        accepted = inspect.signature(TrainingArguments).parameters
        settings = self.trainer_settings() | overrides
        for new, old in RENAMED.items():
            if new in settings and new not in accepted:
                settings[old] = settings.pop(new)
        for name in settings:
            if name not in accepted:
                raise refusal(
                    name,
                    "be a field of TrainingArguments",
                    Said("a name that this version does not have"),
                    "see its release notes",
                )
        quiet: dict[str, Any] = dict(
            per_device_eval_batch_size=self.micro_batch_size,
            logging_steps=self.logging_steps,
            logging_nan_inf_filter=False,  # the filter replaces a NaN loss by an older, finite one
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=gpus.device() == "cuda",  # elsewhere it only warns
        )
        return TrainingArguments(output_dir, **quiet | settings)

    def trainer_settings(self) -> dict[str, Any]:
        """The fields of TrainingArguments that this recipe decides, by name.

        They are one run's identity: `train` refuses an override that says otherwise.
        """
        return dict(
            per_device_train_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self.gradient_accumulation_steps,
            max_steps=self.max_steps,
            learning_rate=self.learning_rate,
            weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
            warmup_steps=self.warmup_fraction,  # below 1: a fraction of max_steps
            optim=TRAINER_OPTIM[self.optimizer],
            fp16=self.amp_dtype == "float16",
            bf16=self.amp_dtype == "bfloat16",
            save_steps=self.save_steps,
            seed=self.seed,
            data_seed=self.seed,
        )


HINTS = get_type_hints(TrainRecipe)
CHOICES = {name: get_args(hint) for name, hint in HINTS.items() if get_origin(hint) is Literal}
SWITCHES = [name for name, hint in HINTS.items() if hint is bool]


def _check_choice(field: str, value: object, choices: tuple) -> None:
    if value not in choices:
        raise refusal(
            field, f"be one of {', '.join(map(str, choices))}", value, "pick one of these"
        )


def _check_whole(field: str, value: object, low: int, high: int, word: str = "") -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        rule = f"be a whole number from {low} to {high}" + (f" or {word}" if word else "")
        raise refusal(field, rule, value, f"for example {field}={min(max(low, 8), high)}")


def _check_fraction(field: str, value: Any, high: float) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= high:
        raise refusal(field, f"be a number from 0 to {high:g}", value, "see TrainRecipe's defaults")


def _check_switch(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise refusal(field, "be True or False", value, "drop the quotes or the number")


def _check_targets(targets: object) -> None:
    if targets == "all-linear":
        return
    named = isinstance(targets, tuple) and all(isinstance(t, str) and t for t in targets)
    if not targets or not named:
        raise refusal(
            "lora_targets",
            "be a tuple of layer names or 'all-linear'",
            targets,
            "for example ('q_proj', 'v_proj')",
        )
