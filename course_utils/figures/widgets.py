"""Controls that redraw a figure: move a slider, see the memory move.

Without a running kernel (GitHub, a printed page, a headless run) the picture at the default
settings stands there, with its alt text. Not offered: animation, saving what a learner chose.
"""

from __future__ import annotations

import asyncio
import functools
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import ipywidgets

from course_utils.figures.base import LINES, Figure, compare
from course_utils.figures.numbers import magnitudes, smallest_updates
from course_utils.topics.sources import settings_of
from fitcast import models
from fitcast.forecasting.block import boundary_bytes, count_block
from fitcast.gpus import preset
from fitcast.recipe import TrainRecipe
from fitcast.units import GIB

# Where an explorer's axis ends, whatever its controls say: a bar that moves is then seen to move.
LAYERS_AXIS_BYTES = 48 * GIB
ADAPTERS_AXIS_BYTES = 3 * GIB
# Bytes that Adam remembers for a trained parameter: two float32 averages; or two of a byte, with a
# float32 scale for every 256 of them.
ADAM_BYTES = {"8-bit Adam": 2 * (1 + 4 / 256), "Adam": 8}
CARDS_IN_AXIS = 2
CARDS = ("T4", "L4", "A10", "A100-40", "H100", "H200")  # a slider of all presets is too fine
PAUSE = 0.05  # seconds between two pictures that nobody has asked for yet
VIEW = "application/vnd.jupyter.widget-view+json"


def control(name: str, choices: Any) -> ipywidgets.ValueWidget:
    """A control named after the setting: a slider, or a tick box for yes and no.

    Args:
        name: Its underscores become spaces in the label beside the control.
        choices: True or False for a tick box, else a sequence whose first item is the default; the
            slider orders numbers itself and leaves words in their order.
    """
    look = {
        "description": name.replace("_", " "),
        "style": {"description_width": "11em"},
        "layout": {"width": "34em", "max_width": "95%"},
    }
    if isinstance(choices, bool):
        return ipywidgets.Checkbox(value=choices, **look)
    # No menu over words: JupyterLab takes the arrow keys from it, to move to the next cell.
    options = list(choices) if isinstance(choices[0], str) else sorted(choices)
    slider = ipywidgets.SelectionSlider(
        options=options, value=choices[0], continuous_update=False, **look
    )
    if slider.style.has_trait("handle_color"):  # not in ipywidgets 7; white on white otherwise
        slider.style.handle_color = LINES[0]
    return slider


class Explorer:
    """Controls above a figure that follows them.

    Pictures are drawn between two cells, never beside one: JupyterLab makes a move in a thread of
    its own, and what a forecast or a ledger watches is the whole process. While a reader looks at
    one picture, its neighbours are drawn.

    Args:
        draw: Takes one keyword argument for each control, returns a `Figure`. A `ValueError` that
            it raises (a combination that cannot be) is shown in place of the picture.
        choices: For each argument its choices, as `control` takes them.
    """

    def __init__(self, draw: Callable[..., Figure], **choices: bool | Sequence) -> None:
        self.draw = draw
        self.controls = {name: control(name, values) for name, values in choices.items()}
        self.figure = draw(**self.settings)  # the default: a mistake in it may raise
        self._shown = {tuple(self.settings.values()): self.figure.as_html()}  # each is drawn once
        self.picture = ipywidgets.HTML(*self._shown.values())
        self.box = ipywidgets.VBox([*self.controls.values(), self.picture])
        for widget in self.controls.values():
            widget.observe(self._moved, names="value")
        try:
            self._cells = asyncio.get_running_loop()
        except RuntimeError:  # a script: nobody moves anything but the script itself
            self._cells = None
        self._ahead: asyncio.TimerHandle | None = None  # the next picture that nobody asked for

    @property
    def settings(self) -> dict[str, Any]:
        """What the controls say now."""
        return {name: widget.value for name, widget in self.controls.items()}

    def _moved(self, change: Any) -> None:
        if self._cells is None:
            self._redraw()
        else:
            self._cells.call_soon_threadsafe(self._redraw_in, self._cells, change.owner)

    def _redraw(self) -> None:
        self.picture.value = self._look(**self.settings)

    def _redraw_in(self, cells: asyncio.AbstractEventLoop, moved: ipywidgets.Widget) -> None:
        self._redraw()
        self._look_ahead(cells, moved)

    def _look(self, **settings: Any) -> str:
        """The picture at these settings, or why there is none."""
        key = tuple(settings.values())
        if key not in self._shown:
            try:
                self._shown[key] = self.draw(**settings).as_html()
            except ValueError as error:
                self._shown[key] = f"<p role='status'>{html.escape(str(error))}</p>"
        return self._shown[key]

    def _look_ahead(self, cells: asyncio.AbstractEventLoop, moved: ipywidgets.Widget) -> None:
        """Draw what the next move may show, one by one, until that move is made."""
        ahead = iter(self._next_settings(moved))

        def wait() -> None:  # in the pauses the kernel runs cells and shows moves
            self._ahead = cells.call_later(PAUSE, draw_one)

        def draw_one() -> None:
            if settings := next(ahead, None):
                self._look(**settings)
                wait()

        if self._ahead:
            self._ahead.cancel()
        wait()

    def _next_settings(self, moved: ipywidgets.Widget) -> list[dict[str, Any]]:
        """One move away: all that the moved control can say, the nearest first; then the others."""
        here, found = self.settings, []
        for name, widget in self.controls.items():
            options = list(getattr(widget, "options", (False, True)))
            steps = [
                (abs(options.index(option) - options.index(here[name])), option)
                for option in options
            ]
            found += [
                (widget is not moved, step, here | {name: option})
                for step, option in steps
                if step == 1 or (step and widget is moved)
            ]
        return [settings for *_, settings in sorted(found, key=lambda one: one[:2])]

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict, dict]:
        data, metadata = self.figure._repr_mimebundle_()
        view = {"version_major": 2, "version_minor": 0, "model_id": self.box.model_id}
        return data | {VIEW: view}, metadata


def layers_explorer() -> Explorer:
    """What a model's layers keep for backward in 16 bits, by the usual estimate and counted."""

    def draw(attention: str, trained: str, **settings: Any) -> Figure:
        recipe = TrainRecipe(
            base="float16",
            amp_dtype="float16",
            checkpointed_layers=0,
            lora_rank=16 if trained == "LoRA" else None,
            lora_dropout=0.0,
            attention="eager" if attention == "eager" else "stock",
            **settings,
        )
        layers = models.config(recipe.model).num_hidden_layers
        rows = {
            "usual estimate": boundary_bytes(recipe),
            "what layers keep": count_block(recipe).saved_activation_bytes,
        }
        return compare(
            {name: {"activations": layers * n_bytes} for name, n_bytes in rows.items()},
            None,
            f"{recipe.model}, {attention}, {trained}: {recipe.micro_batch_size} x "
            f"{recipe.sequence_length:,} tokens",
            LAYERS_AXIS_BYTES,
        )

    return Explorer(
        draw,
        model=("llama-2-7b", "llama-3.1-8b", "llama-3.2-3b", "llama-3.2-1b"),
        micro_batch_size=(1, 2, 4, 8),
        sequence_length=(1024, 256, 512, 2048, 4096),
        attention=("SDPA", "eager"),
        trained=("all weights", "LoRA"),
    )


def levers_explorer() -> Explorer:
    """The usual QLoRA recipe on a GPU and the same with levers pulled, at the forecast's peak."""
    from fitcast.forecasting.forecast import forecast

    def draw(gpu: str, rows: str, layers_that_forget: str, **settings: Any) -> Figure:
        names = ("attention", "loss", "norm", "lora_dropout")
        levers = {name: settings.pop(name) for name in names}
        targets = settings_of(settings["model"])["lora_targets"]
        usual = TrainRecipe(
            amp_dtype="float16", lora_targets=targets, padded=rows == "padded", **settings
        )
        layers = models.config(usual.model).num_hidden_layers
        pulled = replace(usual, **levers, checkpointed_layers=_share(layers, layers_that_forget))
        bars = {"the usual recipe": usual, "with these levers": pulled}
        return compare(
            {name: forecast(one, preset(gpu)) for name, one in bars.items()},
            preset(gpu),
            f"{usual.model}, QLoRA, {rows}: {usual.micro_batch_size} x "
            f"{usual.sequence_length:,} tokens",
            CARDS_IN_AXIS * preset(gpu).usable_bytes,
        )

    return Explorer(
        draw,
        model=("llama-3.1-8b", "phi-4-mini", "llama-3.2-1b"),
        micro_batch_size=(4, 1, 2, 8),
        sequence_length=(2048, 512, 1024, 4096),
        rows=("no mask", "padded"),
        attention=("explicit_kv", "stock"),
        loss=("chunked", "full"),
        norm=("native", "stock"),
        lora_dropout=(0.0, 0.05),
        lora_rank=(16, 4, 8, 64),
        layers_that_forget=("100 %", "75 %", "50 %", "25 %", "0 %"),
        gpu=CARDS,
    )


def adapters_explorer() -> Explorer:
    """What adapters need for themselves: weights, gradients and the optimizer's averages."""

    def draw(model: str, rank: int, optimizer: str) -> Figure:
        attention = settings_of(model)["lora_targets"]
        rows = {}
        for name, targets in {"attention": attention, "every linear layer": "all-linear"}.items():
            trained = rank * _adapters_of_rank_1(model, targets)
            rows[f"on {name}"] = {
                "adapters": 4 * trained,
                "gradients": 4 * trained,
                "optimizer state": round(ADAM_BYTES[optimizer] * trained),
            }
        title = f"{model}: adapters of rank {rank}, {optimizer}"
        return compare(rows, None, title, ADAPTERS_AXIS_BYTES)

    return Explorer(
        draw,
        model=("llama-3.1-8b", "phi-4-mini", "llama-3.2-1b"),
        rank=(16, 4, 8, 32, 64),
        optimizer=tuple(ADAM_BYTES),
    )


@functools.cache
def _adapters_of_rank_1(model: str, targets: tuple[str, ...] | Literal["all-linear"]) -> int:
    """Parameters that PEFT trains in a model of that name; a rank of r has r times as many."""
    from fitcast.forecasting.load import blueprint
    from fitcast.step import qlora

    recipe = TrainRecipe(model=model, lora_rank=1, lora_targets=targets)
    return qlora.count_parameters(blueprint(recipe, models.config(model)))[0]


def updates_explorer(weights: dict[str, Sequence]) -> Explorer:
    """Which weights an update of a learning rate's size moves, in each format."""

    def draw(learning_rate: float, of: str) -> Figure:
        return smallest_updates(learning_rate, weights[of], of)

    return Explorer(draw, of=tuple(weights), learning_rate=(2e-4, 1e-6, 1e-5, 5e-5, 1e-3, 1e-2))


def scale_explorer(groups: dict[str, Sequence]) -> Explorer:
    """Where gradients land in float16 when their loss is scaled."""

    def draw(scale: int) -> Figure:
        return magnitudes(groups, ("float16",), scale, f"scale {scale:,}")

    return Explorer(draw, scale=tuple(2**power for power in (8, 0, 4, 12, 16, 20, 24, 28, 32)))


def forgetting_explorer() -> Explorer:
    """The peak of a QLoRA step by forecast: no layer, some and every layer forgets."""
    from fitcast.forecasting.forecast import forecast

    def draw(gpu: str, layers_that_forget: str, **settings: Any) -> Figure:
        recipe = TrainRecipe(amp_dtype="float16", **settings)
        layers = models.config(recipe.model).num_hidden_layers
        some = _share(layers, layers_that_forget)
        rows = {
            f"{k} of {layers} layers": forecast(replace(recipe, checkpointed_layers=k), preset(gpu))
            for k in (0, some, layers)
        }
        return compare(
            rows,
            preset(gpu),
            f"{recipe.model}, {recipe.micro_batch_size} x "
            f"{recipe.sequence_length:,}: layers that forget",
            CARDS_IN_AXIS * preset(gpu).usable_bytes,
        )

    return Explorer(
        draw,
        model=("llama-3.2-3b", "llama-3.2-1b", "llama-3.1-8b"),
        micro_batch_size=(1, 2, 4, 8),
        sequence_length=(2048, 256, 512, 1024, 4096),
        layers_that_forget=("50 %", "25 %", "75 %"),
        gpu=CARDS,
    )


def split_explorer() -> Explorer:
    """The peak of a QLoRA update by forecast: cut into micro batches, and all at once."""
    from fitcast.forecasting.forecast import forecast

    def draw(gpu: str, effective_batch: int, micro_batch: int, **settings: Any) -> Figure:
        card, rows = preset(gpu), {}
        for size in (micro_batch, effective_batch):
            steps = effective_batch // size
            recipe = TrainRecipe(
                micro_batch_size=size, gradient_accumulation_steps=steps, **settings
            ).for_gpu(card)
            # Two micro batches need as much as any larger number of them.
            rows[f"{size} x {steps}"] = forecast(
                replace(recipe, gradient_accumulation_steps=min(steps, 2)), card
            )
        return compare(
            rows,
            card,
            f"{recipe.model}: {effective_batch} sequences of "
            f"{recipe.sequence_length:,} tokens behind an update",
            CARDS_IN_AXIS * card.usable_bytes,
        )

    return Explorer(
        draw,
        model=("llama-3.2-3b", "llama-3.2-1b", "llama-3.1-8b"),
        effective_batch=(32, 8, 16, 64),
        micro_batch=(2, 1, 4, 8),
        sequence_length=(2048, 256, 512, 1024),
        gpu=CARDS,
    )


def ranks_explorer(recipe: TrainRecipe, known: Mapping[str, Any]) -> Explorer:
    """What each of several ranks holds at the peak of a step, by forecast: DDP and FSDP2.

    Args:
        recipe: For llama-3.1-8b, 2 x 2048 tokens; the controls change that.
        known: Its forecasts on two T4s, as the first picture shows them.
    """
    from fitcast.forecasting.forecast import forecast
    from fitcast.forecasting.ranks import forecast_ranks

    def draw(ranks: int, gpu: str, **settings: Any) -> Figure:
        targets = settings_of(settings["model"])["lora_targets"]
        card, one = preset(gpu), replace(recipe, lora_targets=targets, **settings)
        rows = known
        if (one, ranks, gpu) != (recipe, 2, "T4"):
            rows = {"one card": forecast(one, card)} | {
                f"{strategy} on {ranks}": forecast_ranks(
                    one, card, strategy=strategy, world_size=ranks
                )
                for strategy in ("ddp", "fsdp2")
            }
        return compare(
            rows,
            card,
            f"{one.model}, QLoRA: {one.micro_batch_size} x "
            f"{one.sequence_length:,} tokens on each of {ranks}",
            card.usable_bytes,
        )

    return Explorer(
        draw,
        model=("llama-3.1-8b", "llama-3.2-1b", "phi-4-mini"),
        ranks=(2, 4, 8),
        micro_batch_size=(2, 1, 4),
        sequence_length=(2048, 512, 1024),
        gpu=("T4", "L4", "A10"),
    )


def _share(layers: int, percent: str) -> int:
    return round(layers * int(percent.removesuffix(" %")) / 100)
