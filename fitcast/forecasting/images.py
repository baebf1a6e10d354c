"""Images in the rows of a batch: what a model with a vision tower is given beside its tokens.

The tower then runs with the rest of the step, so that what its layers keep (where adapters or
gradients reach it) and what they need for a moment are counted. An image's own tokens are among
the row's. Not modelled: towers whose grid follows each picture's size, which are refused.
"""

from __future__ import annotations

import contextlib
import inspect
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from fitcast.units import refusal

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

CHANNELS = 3
# transformers' own switch for checks that compare an image's tokens with its features: they ask
# tensors for numbers. Source: transformers/utils/import_utils.py, `torch_compilable_check`.
NO_CHECKS = {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}


def check(config: PretrainedConfig, images: int) -> None:
    """Raise unless a row of this model can hold so many images.

    Raises:
        ValueError: No whole number, no vision tower, or one without a fixed image size.
    """
    if not isinstance(images, int) or images < 0:
        raise refusal("images", "be a whole number from 0", images, "say how many a row holds")
    if images and _size(config) is None:
        has = getattr(config, "vision_config", None) is not None
        why = "it has no vision tower"
        if has:
            why = (
                "its tower's grid follows each picture's size: write the step with pictures of "
                "yours and use forecast_step"
            )
        raise refusal("images", f"be 0 for {config.model_type}", images, why)


def _size(config: PretrainedConfig) -> int | None:
    """Pixels along a side of the images that the tower was made for, or `None`."""
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    return size if isinstance(size, int) else None


def beside(batch: Any, model: PreTrainedModel, images: int) -> dict[str, torch.Tensor]:
    """What a batch holds besides, in float32 as processors make it.

    Args:
        batch: With `input_ids`, (rows, tokens).
        model: Whose config says the image's size, and whose `forward` what else it takes.
        images: In each row.

    Returns:
        `pixel_values`, (rows x images, 3, side, side), and token types where `forward` knows them.
    """
    if not images:
        return {}
    ids, side = batch["input_ids"], _size(model.config)
    assert side is not None  # `check` has seen to it
    more = {"pixel_values": torch.zeros(len(ids) * images, CHANNELS, side, side)}
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        more["token_type_ids"] = torch.zeros_like(ids)
    return more


@contextlib.contextmanager
def unchecked(images: int) -> Iterator[None]:
    """Inside, transformers does not ask whether tokens and features of the images agree."""
    with mock.patch.dict(os.environ, NO_CHECKS if images else {}):
        yield
