"""One model over several cards by a device map: which card holds what, and what each one pays.

Who holds what is transformers' own answer to `device_map="auto"` ("balanced" is the same), which
counts weights and nothing else, and leaves a small model on one card. The step runs on fake tensors
with copies where accelerate's hooks make theirs: what a module is given is sent to its card, what
the model answers comes back to the first one. A result lies where its inputs do. So the last card,
with the head, pays for logits and loss as well, and the first one for a copy of the logits, which
nobody reads.

The cards work one after the other: nothing here trains faster than one.

Its releases answer differently: of 8B, transformers 5.17 gives the first of two T4s four layers,
5.23 fourteen. So the forecast asks the one that is installed, and holds for that one.

Compared with four runs on two H200s held to a T4's memory, Llama-3.1-8B and Qwen3-14B without
levers, two of them placed by transformers 5.17 while it loaded them: the peaks of all eight cards
lie 0.05 to 0.2 % below the forecast, and what was reserved within its interval.

Not modelled: offload to the host, which transformers chooses when the cards do not suffice, and a
loss that multiplies with the head itself, which finds labels and head on different cards (both
refused).

Sources: transformers/integrations/accelerate.py, `_get_device_map`; accelerate/big_modeling.py,
`dispatch_model`, and hooks.py, `AlignDevicesHook`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map
from transformers.quantizers.auto import AutoHfQuantizer

from fitcast import models
from fitcast.cuda.kernels import CudaKernels
from fitcast.forecasting import fake
from fitcast.forecasting.place import ADDED
from fitcast.forecasting.ranks import packed_model, report_rank, step_stream
from fitcast.forecasting.verdict import Forecast, work_of_step
from fitcast.gpus import Gpu
from fitcast.memory.report import tensors_in
from fitcast.memory.stream import DeviceLedger, Stream, work_recorder
from fitcast.recipe import TrainRecipe
from fitcast.step import qlora, ranks
from fitcast.step.levers import unwrap
from fitcast.units import refusal, show_bytes

FIRST = 0  # the card of the inputs, to which answers come back


class CardsLedger(DeviceLedger):
    """Notes for each block on which card it lies: where it was sent, or where its inputs lie."""

    def __init__(self) -> None:
        super().__init__()
        self.cards: list[int] = []
        self.now = FIRST  # where the latest operation ran
        self.sent_to: int | None = None
        self._beside: Iterator[int] = iter(())  # cards of a list of inputs, one a result

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        every = [t for t in tensors_in((args, kwargs or {})) if self._block_of(t) is not None]
        if inputs := [t for t in every if t.dim()] or every:  # scalars may lie anywhere
            self.now = self.card(inputs[0])
        joined = bool(args) and isinstance(args[0], (list, tuple))
        self._beside = map(self.card, args[0]) if joined else iter(())
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _add(self, *args: Any, **kwargs: Any) -> int:
        block = super()._add(*args, **kwargs)
        beside = next(self._beside, self.now)
        self.cards.append(beside if self.sent_to is None else self.sent_to)
        return block

    def card(self, tensor: Any) -> int:
        """Where a tensor lies."""
        block = self._block_of(tensor)
        return self.now if block is None else self.cards[block]

    @contextlib.contextmanager
    def on(self, card: int) -> Iterator[None]:
        """What is made inside is made on `card`."""
        before, self.sent_to = self.sent_to, card
        try:
            yield
        finally:
            self.sent_to, self.now = before, card


class CardsKernels(CudaKernels):
    """Libraries keep a workspace for each thread on each card."""

    def __init__(self, gpu: Gpu, ledger: CardsLedger) -> None:
        super().__init__(gpu, on_work=work_recorder(ledger, gpu))
        self._ledger = ledger
        self._of_each: dict[int, dict] = {}

    def _take_workspace(self, library: str, n_bytes: int) -> None:
        self._workspaces = self._of_each.setdefault(self._ledger.now, {})
        super()._take_workspace(library, n_bytes)


def forecast_device_map(recipe: TrainRecipe, gpu: Gpu, *, cards: int = 2) -> Forecast:
    """The forecast of the card that needs most; its notes say what each one holds and needs.

    Args:
        recipe: Its micro batch goes through all cards.
        gpu: Each of them.
        cards: How many.

    Raises:
        ValueError: The cards do not hold the model, or a lever wants all on one of them.
    """
    _check(recipe)
    recipe.check_on(gpu)
    config = models.config(recipe.model)
    placed = map_of(recipe, gpu, config, cards)
    stream, of_block = stream_of_cards(recipe, gpu, config, placed)
    seen = [
        report_rank(stream_of_card(stream, of_block, card), gpu, recipe) for card in range(cards)
    ]
    worst = max(seen, key=lambda f: f.unlimited_reserved_bytes[1])
    work = work_of_step(stream, recipe.gradient_accumulation_steps)
    notes = [_note(card, f, placed) for card, f in enumerate(seen)]
    return dataclasses.replace(
        worst,
        operations=work.operations,
        flops=work.flops,
        ideal_seconds=work.seconds,
        notes=(*worst.notes, *notes),
    )


def _check(recipe: TrainRecipe) -> None:
    if recipe.loss != "full":
        raise refusal(
            "loss", "be 'full' with a device map", recipe.loss,
            "a chunked one finds labels and head on different cards",
        )  # fmt: skip
    if recipe.embedding == "host":
        raise refusal(
            "embedding", "be 'stock' with a device map", recipe.embedding,
            "accelerate puts it on the first card",
        )  # fmt: skip


def map_of(recipe: TrainRecipe, gpu: Gpu, config: Any, cards: int = 2) -> dict[str, int]:
    """Path of a module -> its card, as `from_pretrained(..., device_map="auto")` places them.

    Args:
        recipe: Its base is quantized or not.
        gpu: Each card, empty but for its CUDA context.
        config: Of the model.
        cards: How many.

    Raises:
        ValueError: They do not hold the model.
    """
    accelerate = importlib.import_module("transformers.integrations.accelerate")
    model: Any = fake.meta_model(config, qlora.storage_dtype(recipe))
    quantizer = None
    if quantization := qlora.quantization(recipe):
        quantizer = AutoHfQuantizer.from_config(quantization)
        quantizer.pre_quantized = False
        quantizer.preprocess_model(model=model, device_map=None)
    limits = dict.fromkeys(range(cards), gpu.usable_bytes)
    too_large = refusal(
        "model", f"fit {cards} x {gpu.name}", recipe.model, "take fsdp2, if need be with offload"
    )
    counting = importlib.import_module("accelerate.utils.modeling")
    try:
        with mock.patch.object(counting, "logger"):  # it warns that this machine has no such card
            placed = accelerate._get_device_map(model, "auto", limits, quantizer)
    except ValueError as error:  # a quantized model that would go to the host in part
        raise too_large from error
    if not set(placed.values()) <= set(limits):
        raise too_large
    return placed


def _note(card: int, seen: Forecast, placed: dict[str, int]) -> str:
    held = [path for path, number in placed.items() if number == card]
    if not held:
        return f"card {card} holds nothing"
    span = f"from {held[0]} to {held[-1]}" if held[0] else "all of the model"
    peak = show_bytes(seen.peak_allocated_bytes)
    return f"card {card}, {span}: {seen.verdict}, peak {peak} in tensors"


def stream_of_cards(
    recipe: TrainRecipe, gpu: Gpu, config: Any, placed: dict[str, int], *, warmed: bool = True
) -> tuple[Stream, list[int]]:
    """The events of one step on all cards, and the card of each block.

    Args:
        recipe: What is trained.
        gpu: Each card.
        config: Of the model.
        placed: Path of a module -> its card.
        warmed: Whether transformers loads it, which asks each card for all its weights at once and
            gives them back: they come to lie in one segment.
    """
    model = packed_model(recipe, config)
    ledger, card_of = CardsLedger(), ranks.device_in(placed)

    def device_of(name: str) -> str:
        ledger.sent_to = card_of(name)
        return "cpu"

    def warm_up() -> None:
        for card, n_bytes in _weights_of(model, card_of, qlora.storage_dtype(recipe)).items():
            with ledger.on(card):
                torch.empty(n_bytes * warmed, dtype=torch.uint8)

    def loaded() -> None:
        ledger.sent_to, ledger.now = None, FIRST
        _dispatch(unwrap(model), placed, ledger)

    qlora.apply_levers(model, recipe)
    kernels = CardsKernels(gpu, ledger)
    stream = step_stream(ledger, model, recipe, gpu, kernels=kernels, device_of=device_of,
                         warm_up=warm_up, loaded=loaded)  # fmt: skip
    return stream, ledger.cards


def _weights_of(
    model: torch.nn.Module, card_of: Callable[[str], int], dtype: torch.dtype
) -> dict[int, int]:
    """Card -> bytes of the weights that it will hold, adapters aside."""
    sizes: dict[int, int] = {}
    for name, parameter in model.named_parameters():
        if not ADDED.search(name):
            itemsize = dtype.itemsize if parameter.is_floating_point() else parameter.itemsize
            card = card_of(name)
            sizes[card] = sizes.get(card, 0) + parameter.numel() * itemsize
    return sizes


class _Send(torch.autograd.Function):
    """A copy on another card; backward, the gradient's copy where the tensor came from."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, ledger: CardsLedger, card: int) -> torch.Tensor:
        ctx.ledger, ctx.back = ledger, ledger.card(tensor)
        with ledger.on(card):
            return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        with ctx.ledger.on(ctx.back):
            return gradients[0].clone(), None, None


def _sent(values: Any, ledger: CardsLedger, card: int) -> Any:
    """Nested values with every tensor on `card`."""

    def one(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or ledger.card(value) == card:
            return value
        return _Send.apply(value, ledger, card)

    return tree_map(one, values)


def _dispatch(base: torch.nn.Module, placed: dict[str, int], ledger: CardsLedger) -> None:
    """Hooks where `dispatch_model` puts them: on each module of the map, and on the model."""
    for path, card in placed.items():
        base.get_submodule(path).register_forward_pre_hook(
            lambda _, args, kwargs, card=card: _sent((args, kwargs), ledger, card),
            with_kwargs=True,
        )
    base.register_forward_hook(lambda _, inputs, answer: _sent(answer, ledger, FIRST))


def stream_of_card(stream: Stream, cards: list[int], card: int) -> Stream:
    """One card's part of the events.

    Args:
        stream: Of all cards.
        cards: The card of each block.
        card: Whose part.
    """
    mine = [cards[block] == card for _, block, _ in stream.events]
    before = [0]
    for own in mine:
        before.append(before[-1] + own)
    return dataclasses.replace(
        stream,
        events=[event for event, own in zip(stream.events, mine, strict=True) if own],
        marks={name: before[n] for name, n in stream.marks.items()},
        work=[],
    )
