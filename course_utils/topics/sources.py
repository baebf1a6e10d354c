"""Where a run's model and data come from: this package, the hub, or chance. Decided once.

Without a GPU: the bundled model and data, and the hub is not even asked. With one: a model and real
instructions from the hub; when it does not answer, random weights at the model's real shape with
the bundled data, and `Source` says so.

Not modelled: private repositories, other hubs, a download that breaks off half-way.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils import data as bundled
from fitcast import models
from fitcast.gpus import Gpu
from fitcast.training import random_weights
from fitcast.training.preflight import ask_hub
from fitcast.units import Said, refusal

if TYPE_CHECKING:
    from datasets import Dataset

AUTO, BUNDLED_NAME = "auto", "bundled"
MODELS = ("llama-3.2-1b", "qwen3-1.7b", "phi-4-mini")  # the first is the default
HELDOUT_EXAMPLES = 200  # enough for an interval, and a minute on a T4
SETTINGS = {  # what a recipe needs to know about its model, beyond the name
    BUNDLED_NAME: {
        "lora_targets": "all-linear",
        "sequence_length": 104,
        "checkpointed_layers": 1,
        "learning_rate": 7e-3,
        "max_grad_norm": 0.3,
    },
    "phi-4-mini": {"lora_targets": ("qkv_proj", "o_proj")},  # its projections are fused
}
DEFAULTS = {
    "lora_targets": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "sequence_length": 1024,
    "checkpointed_layers": "all",
    "learning_rate": 2e-4,
}


@dataclass(frozen=True, kw_only=True)
class Source:
    """A model and its data, found.

    Attributes:
        model: For `TrainRecipe.model`: a name, or the folder of random weights.
        weights: "bundled", "hub" or "random".
        data: "bundled" or "dolly", for `course_utils.data.load_instructions`.
        settings: Fields of a recipe that suit this model.
        tokenizer_from: Folder or hub id of the tokenizer.
        said: What was decided and why, in a sentence.
    """

    model: str
    weights: str
    data: str
    settings: dict[str, Any]
    tokenizer_from: str
    said: str

    def __str__(self) -> str:
        return self.said

    def tokenizer(self) -> Any:
        """The tokenizer that goes with model and data."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.tokenizer_from)

    def instructions(self) -> tuple[Dataset, Dataset]:
        """Examples to train on and examples held out, columns `prompt` and `answer`."""
        train, heldout = (bundled.load_instructions(self.data, split) for split in bundled.SPLITS)
        return train, heldout.select(range(min(HELDOUT_EXAMPLES, len(heldout))))


def settings_of(model: str) -> dict[str, Any]:
    """Fields of a recipe that suit a model, by its name."""
    return DEFAULTS | SETTINGS.get(model, {})


def choose(gpu: Gpu | None, model: str = AUTO, folder: str | Path = ".") -> Source:
    """The source of a run on this machine.

    Args:
        gpu: What `gpus.detect()` found.
        model: A name in `MODELS`, "bundled", or "auto": the bundled one without a GPU, else the
            first of `MODELS`.
        folder: Where random weights are written, if they must be.

    Raises:
        ValueError: No such model; a large one without a GPU; a gated or misspelt one.
    """
    if model == AUTO:
        model = BUNDLED_NAME if gpu is None else MODELS[0]
    if model == BUNDLED_NAME:
        folder = str(bundled.bundled_model_dir())
        return Source(
            model=folder,
            weights="bundled",
            data="bundled",
            settings=SETTINGS[model],
            tokenizer_from=folder,
            said="Model and data of the course: no download, runs anywhere.",
        )
    if model not in MODELS:
        known = ", ".join((AUTO, BUNDLED_NAME, *MODELS))
        raise refusal("model", f"be one of {known}", model, "pick one of these")
    if gpu is None:
        raise refusal(
            "model",
            "be 'bundled' or 'auto' without a GPU",
            model,
            "switch Runtime > Change runtime type to T4",
        )
    settings, repository = settings_of(model), models.hub_id(model)
    answer = ask_hub(repository)
    if answer in ("gated", "unknown"):
        raise refusal(
            "model",
            "be open to you on the hub",
            Said(f"{repository}, which is {answer}"),
            f"pick another of {', '.join(MODELS)}, or log in",
        )
    if answer == "silent":
        return Source(
            model=str(random_weights.write(model, folder)),
            weights="random",
            data="bundled",
            settings=settings,
            tokenizer_from=str(bundled.bundled_model_dir()),
            said=f"The hub does not answer: random weights in the shape of {model}, and the "
            "bundled data. Memory and speed hold, words and losses do not.",
        )
    data = "dolly" if ask_hub(bundled.DOLLY, "dataset") == "open" else "bundled"
    return Source(
        model=model,
        weights="hub",
        data=data,
        settings=settings,
        tokenizer_from=repository,
        said=f"{repository} from the hub; data: {data}.",
    )
