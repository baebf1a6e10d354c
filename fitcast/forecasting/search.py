"""Which settings fit a GPU and train fastest; which single change saves what, at which price.

Every answer is a forecast: nothing is interpolated. Times are roofline times divided by the part of
its peaks that the card sustains (`Gpu.sustained`, a range): each operation takes as long as its
arithmetic at the peak rate or its traffic at the peak bandwidth, whichever is longer. On the
GPU-bound rows of tests/data/h200_steps.json that part is 0.56 to 0.64, stock attention or not. A
step of small operations takes as long as Python needs to launch them.

Not modelled: communication; transfers to the host (so `offload_checkpoints` and the embedding there
are tried only when nothing else fits).

Most settings of a search differ in how many layers forget, and those of a model cut to a few layers
are alike: `forecast.run_stream` keeps its runs, and `_Family.fewest` guesses where they share one.
Batches that cannot be faster than what was found are passed over (`_Bound`).
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fitcast.forecasting.checks import check_card, check_recipe
from fitcast.forecasting.fake import meta_model
from fitcast.forecasting.forecast import Forecast, checked_config, forecast
from fitcast.forecasting.launches import launch_rate
from fitcast.gpus import T4, Gpu, detect
from fitcast.recipe import WHOLE_NUMBERS, TrainRecipe
from fitcast.step.apply import BEST
from fitcast.step.levers import odd_head
from fitcast.units import GIB, show_bytes, with_article

# Levers that change no result and take fewer bytes and operations, by field: written out, and where
# torch.compile writes kernels.
LEAN = {name: value for name, (value, _) in BEST.items() if name != "attention"}
PLAIN = LEAN | {"adapters": "in_place", "flat_optimizer": True, "loss": "fused"}
COMPILED = PLAIN | {"mlp": "compiled", "rotary": "compiled", "loss": "compiled"}
TRITON = (7, 0)  # compute capability; source: torch/utils/_triton.py, `has_triton`
TILE_TOKENS = 4096  # of a tiled MLP: a few tiles of a long sequence, each still a large product
# Of host memory, for checkpoints: Colab's machine with a T4 has 12.7 GB in all, Python some of it.
PINNED_HOST_BYTES = 10 * GIB


class DoesNotFit(ValueError, MemoryError):
    """No setting of this recipe fits the GPU."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """One change of a recipe and what it does to peak and time.

    Attributes:
        change: What changes, in words.
        recipe: The recipe with this change.
        saved_bytes: Peak before minus peak after.
        speedup: Tokens per second after over before: above 1 is faster.
        forecast: Of the changed recipe.
    """

    change: str
    recipe: TrainRecipe
    saved_bytes: int
    speedup: float
    forecast: Forecast

    def __str__(self) -> str:
        sign = "-" if self.saved_bytes > 0 else "+"
        pace = (
            f"{self.speedup:.1f}x faster"
            if self.speedup >= 1.05
            else f"{1 / self.speedup:.1f}x slower"
            if self.speedup <= 0.95
            else "same speed"
        )
        return f"{self.change}: {sign}{show_bytes(abs(self.saved_bytes))}, {pace}"


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Settings that fit, their forecast and their speed on one GPU.

    Attributes:
        tokens_per_second: Estimated, on one GPU, between which bounds: those of `utilisation`, the
            part of its peaks that is reached. The card's `basis` says what that rests on.
        before: Forecast of the recipe as it came; `None` where that cannot run at all.
    """

    recipe: TrainRecipe
    forecast: Forecast
    tokens_per_second: tuple[float, float]
    utilisation: tuple[float, float]
    before: Forecast | None = None

    def hours(self, n_tokens: int) -> tuple[float, float]:
        """Fewest and most hours to train on `n_tokens`, padding counted, on all the GPUs."""
        slow, fast = (n * self.recipe.world_size * 3600 for n in self.tokens_per_second)
        return n_tokens / fast, n_tokens / slow

    @property
    def launch_basis(self) -> str:
        """What a launch was taken to cost, and whether that was measured here."""
        return str(launch_rate(self.forecast.gpu))


def tokens_per_second(recipe: TrainRecipe, f: Forecast, utilisation: float | None = None) -> float:
    """Tokens per second of one GPU, padding counted: the GPU's pace or Python's, the slower one.

    Args:
        recipe: What is run.
        f: Its forecast.
        utilisation: Part of its peaks that the card reaches; by default the middle of its range.

    Raises:
        ValueError: utilisation is not a fraction.
    """
    if utilisation is not None:
        _check_utilisation(utilisation)
    tokens = recipe.tokens_per_step / recipe.world_size
    return tokens / _seconds(f.gpu, f.ideal_seconds, f.operations, utilisation)


def _seconds(gpu: Gpu, ideal: float, operations: float, utilisation: float | None) -> float:
    """Of a step: the GPU's, or Python's if they are more."""
    reached = sum(gpu.sustained) / 2 if utilisation is None else utilisation
    return max(ideal / reached, operations * launch_rate(gpu).seconds)


def _check_utilisation(utilisation: float) -> None:
    if isinstance(utilisation, bool) or not 0 < utilisation <= 1:
        raise ValueError(
            f"utilisation must be above 0 and at most 1, got {utilisation!r}; leave it out for "
            "what the card sustains"
        )


def single_changes(recipe: TrainRecipe, num_layers: int) -> dict[str, dict]:
    """Every single change that makes sense for a recipe: what it is called -> the fields."""
    k = num_layers if recipe.checkpointed_layers == "all" else recipe.checkpointed_layers
    changes: dict[str, dict] = {
        "explicit K/V attention": {"attention": "explicit_kv"},
        "stock attention": {"attention": "stock"},
        "chunked loss": {"loss": "chunked"},
        "native RMSNorm": {"norm": "native"},
        "lean MLP": {"mlp": "lean"},
        "compiled MLP": {"mlp": "compiled"},
        "tiled MLP": {"mlp_tile_tokens": _tile(recipe)},
        "embedding in host memory": {"embedding": "host"},
        "lean rotary embedding": {"rotary": "lean"},
        "compiled rotary embedding": {"rotary": "compiled"},
        "causal padding": {"causal_padding": True},
        "no dropout in adapters": {"lora_dropout": 0.0},
        "4-bit base": {"base": "nf4"},
        "double quantization": {"double_quant": True},
        "no k-bit upcast": {"kbit_upcast": False},
        "8-bit optimizer": {"optimizer": "adamw_8bit"},
        "paged 8-bit optimizer": {"optimizer": "paged_adamw_8bit"},
        "no padding": {"padded": False},
        "expandable segments": {"expandable_segments": True},
    }
    if recipe.lora_rank is not None:
        changes["lean adapters"] = {"adapters": "lean"}
        changes["adapters in place"] = {"adapters": "in_place"}
        changes["lean loss"] = {"loss": "lean"}
        changes["fused loss"] = {"loss": "fused"}
        changes["compiled loss"] = {"loss": "compiled"}
        changes["adapters stepped as one"] = {"flat_optimizer": True}
        rank = max(1, recipe.lora_rank // 2)
        changes[f"rank {rank}"] = {"lora_rank": rank}
    if k:
        changes["checkpoints in host memory"] = {"offload_checkpoints": True}
        if k > 3:
            half = f"{k // 2} of {k} checkpoints in host memory"
            changes[half] = {"offload_checkpoints": k // 2}
        changes["keep attention's output"] = {"keep_attention": True}
        if k > 3:
            changes[f"keep attention's output in {k // 2} of {k}"] = {"keep_attention": k // 2}
    for wanted in (num_layers, num_layers // 2, 0):
        changes[f"{wanted} of {num_layers} layers checkpointed"] = {
            "checkpointed_layers": "all" if wanted == num_layers else wanted
        }
    if half := recipe.micro_batch_size // 2:
        changes[f"micro batch {half}, accumulated"] = {
            "micro_batch_size": half,
            "gradient_accumulation_steps": recipe.gradient_accumulation_steps * 2,
        }
    if (half := recipe.sequence_length // 2) > 1:
        changes[f"sequence {half}"] = {"sequence_length": half}
    return changes


def _tile(recipe: TrainRecipe) -> int:
    """Tokens of a tile: two tiles of a short sequence, more of a long one."""
    return min(TILE_TOKENS, max(1, recipe.sequence_length // 2))


def levers(
    recipe: TrainRecipe, gpu: Gpu = T4, progress: Callable[[str], None] = lambda text: None
) -> tuple[Lever, ...]:
    """Every single change of `recipe`, the one that saves most first.

    Args:
        progress: Told what is being weighed.

    Raises:
        ValueError: The recipe itself cannot run on `gpu`.
    """
    check_recipe(recipe)
    check_card(gpu)
    before = forecast(recipe, gpu)
    speed = tokens_per_second(recipe, before)
    found = []
    for name, fields in single_changes(recipe, checked_config(recipe).num_hidden_layers).items():
        try:
            changed = dataclasses.replace(recipe, **fields)
            if changed == recipe:
                continue
            progress(name)
            after = forecast(changed, gpu)
        except ValueError:  # a change that this recipe excludes, as offloading without checkpoints
            continue
        found.append(
            Lever(
                change=name,
                recipe=changed,
                forecast=after,
                saved_bytes=before.peak_allocated_bytes - after.peak_allocated_bytes,
                speedup=tokens_per_second(changed, after) / speed,
            )
        )
    return tuple(sorted(found, key=lambda lever: (-lever.saved_bytes, -lever.speedup)))


Tried = tuple[TrainRecipe, Forecast]


def fit(
    recipe: TrainRecipe,
    gpu: Gpu = T4,
    target_effective_batch: int | None = None,
    *,
    utilisation: float | None = None,
    pinned_host_bytes: int = PINNED_HOST_BYTES,
    compiled: bool = True,
    progress: Callable[[str], None] = lambda text: None,
    processes: int = 1,
) -> Fit:
    """The fastest micro batch, accumulation, k, loss, attention, kept attention that fit.

    They fit even at the forecast's upper bound (`margin_bytes` is not negative). Only micro batches
    of 1, 2, 4, ... are tried. Segments are always expandable; norm, MLP, adapters, rotary embedding
    and, under LoRA, loss and optimizer are those of few operations, as far as the model takes them:
    compiled where Triton runs and the host has time for their calls. If nothing fits, the MLP is
    tiled; then checkpoints wait in host memory, those of a quarter of the layers, or two, three,
    all but one; at last the embedding does. Model, adapters, sequence length, precision and
    gradients stay: none of these settings changes what is learnt.

    Args:
        target_effective_batch: Sequences behind one optimizer step; by default the recipe's own.
        utilisation: Part of the GPU's peaks that is reached, for times only; by default the range
            that the card sustains.
        pinned_host_bytes: Most that checkpoints may take of the host's memory.
        compiled: Whether torch.compile may be used, which needs a C compiler where the run will be.
        progress: Told what is being weighed.
        processes: That weigh at the same time. They are forks, so one does it all where PyTorch
            has threads or a GPU, which a fork does not survive.

    Raises:
        ValueError: The target is no multiple of world_size, or too large.
        DoesNotFit: Nothing fits.
    """
    if utilisation is not None:
        _check_utilisation(utilisation)
    num_layers = checked_config(recipe).num_hidden_layers
    per_gpu = _sequences_per_gpu(recipe, target_effective_batch)
    if not _may_fork():
        processes = 1
    heard = progress if processes < 2 else _unheard
    weigh = _Weigher(recipe, gpu, per_gpu, num_layers, heard, pinned_host_bytes, utilisation)
    parts = COMPILED if compiled and gpu.capability >= TRITON else PLAIN
    losses = _losses(recipe, parts["loss"])
    with _workers(processes) as pool:
        tried: list[Tried] = _kernels(weigh, pool)
        before = pool.submit(as_it_came, recipe, gpu)  # beside what this process weighs next
        quickest = min(tried, key=lambda pair: pair[1].ideal_seconds)[0]
        first = {"attention": quickest.attention} | _taken(weigh, parts, quickest.attention, losses)
        for stage in _stages(weigh, first):
            kept = (False, True) if stage["attention"] != "eager" else (False,)  # has no output
            families = [
                stage | {"loss": loss, "keep_attention": keep}
                for loss, keep in itertools.product(losses, kept)
            ]
            for found in _each(pool, _family, [(weigh, fields) for fields in families]):
                tried += found
            fitting: list[Tried] = [pair for pair in tried if weigh.room(pair[1]) >= 0]
            if fitting:
                best = max(fitting, key=lambda pair: tokens_per_second(*pair, utilisation))
                written = _written_out(weigh, best)
                best = max([best, *written], key=lambda pair: tokens_per_second(*pair, utilisation))
                return _found(best, utilisation, before.result())
    on_host = [f for _, f in tried if f.pinned_host_bytes <= pinned_host_bytes]
    lowest = min(f.gpu.context_bytes + f.unlimited_reserved_bytes[1] for f in on_host)
    raise DoesNotFit(
        f"recipe must fit {show_bytes(gpu.total_bytes)} of {with_article(gpu.name)}, "
        f"got at least {show_bytes(lowest)} with one sequence of "
        f"{recipe.sequence_length} tokens; shorten it, or take a smaller model"
    )


def _written_out(weigh: _Weigher, best: Tried) -> list[Tried]:
    """The same in plain PyTorch, if it fits: a compiled call takes the host longer.

    Where the step waits for the GPU, more traffic makes it no faster.
    """
    recipe, seen = best
    parts = {name: PLAIN[name] for name in COMPILED if getattr(recipe, name) == "compiled"}
    for_host = weigh.seconds(0, seen.operations)
    if not parts or weigh.seconds(seen.ideal_seconds, seen.operations) > for_host:
        return []
    fields = {name: getattr(recipe, name) for name in SEARCHED} | parts
    pair = weigh(recipe.micro_batch_size, fields)
    return [pair] if weigh.room(pair[1]) >= 0 else []


def as_it_came(recipe: TrainRecipe, gpu: Gpu) -> Forecast | None:
    """What a recipe needs before anything is changed; `None` where it cannot run, as others can."""
    try:
        return forecast(recipe, gpu)
    except ValueError:
        return None


def _found(best: Tried, utilisation: float | None, before: Forecast | None) -> Fit:
    """The answer, with the speeds at both ends of what is sustained."""
    recipe, seen = best
    ends = seen.gpu.sustained if utilisation is None else (utilisation, utilisation)
    low, high = (tokens_per_second(recipe, seen, part) for part in ends)
    return Fit(
        recipe=recipe,
        forecast=seen,
        tokens_per_second=(low, high),
        utilisation=ends,
        before=before,
    )


def _sequences_per_gpu(recipe: TrainRecipe, target: int | None) -> int:
    """Sequences of one GPU behind one optimizer step."""
    world, (_, most) = recipe.world_size, WHOLE_NUMBERS["gradient_accumulation_steps"]
    target = recipe.effective_batch_size if target is None else target
    if type(target) is not int or target not in range(world, world * most + 1, world):
        raise ValueError(
            f"target_effective_batch must be a multiple of world_size ({world}) up to "
            f"{world * most}, got {target!r}; try {world * 8}"
        )
    return target // world


def _losses(recipe: TrainRecipe, lean: str) -> tuple[str, ...]:
    """Losses worth weighing: under a frozen head a lean one costs nothing beside the full one."""
    if odd_head(meta_model(checked_config(recipe))):
        return ("full",)
    return ("full", "chunked") if recipe.lora_rank is None else (lean,)


def _taken(
    weigh: _Weigher, parts: dict[str, Any], attention: str, losses: tuple[str, ...]
) -> dict[str, Any]:
    """Those of the parts that the model takes, with the loss that is weighed first."""
    start = LEAST | {"attention": attention, "loss": losses[0]}
    wanted = {name: value for name, value in parts.items() if name != "loss"}
    if weigh.if_taken(1, start | wanted):
        return wanted
    taken: dict[str, Any] = {}
    for name, value in wanted.items():
        if weigh.if_taken(1, start | taken | {name: value}):
            taken[name] = value
    return taken


@dataclass(frozen=True)
class _Weigher:
    """Forecasts of one recipe with other settings.

    Attributes:
        per_gpu: Sequences of one GPU behind one optimizer step.
        progress: Told what is being weighed.
        pinned_host_bytes: Most that checkpoints may take of the host's memory.
        utilisation: As `tokens_per_second` takes it.
    """

    recipe: TrainRecipe
    gpu: Gpu
    per_gpu: int
    num_layers: int
    progress: Callable[[str], None]
    pinned_host_bytes: int
    utilisation: float | None

    def seconds(self, ideal: float, operations: float) -> float:
        """How long a step takes; all have the same tokens."""
        return _seconds(self.gpu, ideal, operations, self.utilisation)

    def room(self, f: Forecast) -> int:
        """Bytes that a forecast leaves: of the GPU or of the host's share, the fewer."""
        return min(f.margin_bytes, self.pinned_host_bytes - f.pinned_host_bytes)

    def __call__(self, micro: int, fields: dict[str, Any]) -> Tried:
        """The recipe with these settings and its forecast."""
        candidate = dataclasses.replace(
            self.recipe,
            micro_batch_size=micro,
            gradient_accumulation_steps=self.per_gpu // micro,
            expandable_segments=True,
            **fields,
        )
        self.progress(
            f"micro batch {micro}, {candidate.checkpointed_layers} layers checkpointed, "
            f"{candidate.loss} loss, {candidate.attention} attention"
        )
        return candidate, forecast(candidate, self.gpu)

    def if_taken(self, micro: int, fields: dict[str, Any]) -> Tried | None:
        """The same, or `None` if the model does not take a setting that the recipe has not."""
        try:
            return self(micro, fields)
        except ValueError:
            if all(getattr(self.recipe, name) == value for name, value in fields.items()):
                raise
            return None


# What a search sets beside batch and segments.
SEARCHED = ("attention", "checkpointed_layers", "keep_attention", "offload_checkpoints",
            "mlp_tile_tokens", "embedding", *COMPILED)  # fmt: skip
LEAST = {"checkpointed_layers": "all", "keep_attention": False, "offload_checkpoints": False}


def _kernels(weigh: _Weigher, pool: Executor) -> list[Tried]:
    """One sequence with each attention that the model takes; with the recipe's own if none.

    The stock one is last, so that who forecasts the recipe as it came has run it.
    """
    kinds = [(1, LEAST | {"attention": kind}) for kind in ("explicit_kv", "stock")]
    taken = [pair for pair in _each(pool, weigh.if_taken, kinds) if pair is not None]
    return taken[::-1] or [weigh(1, LEAST)]


def _stages(weigh: _Weigher, first: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Settings to search below, the next ones for when nothing fits, costlier each time."""
    yield first | {"offload_checkpoints": False}
    lean = dict(first)
    tiles = {"mlp_tile_tokens": weigh.recipe.mlp_tile_tokens or _tile(weigh.recipe)}
    if weigh.if_taken(1, LEAST | lean | tiles):
        lean |= tiles
        yield lean | {"offload_checkpoints": False}
    yield from _on_host(weigh, lean)


def _on_host(weigh: _Weigher, lean: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Checkpoints of ever more layers in host memory; then the embedding there, and they again."""
    last = weigh.num_layers - 1  # the layer whose checkpoint stays
    some = {max(2, last * quarters // 4) for quarters in (1, 2, 3, 4)}
    parts = [m for m in sorted(some) if m <= last]
    yield from (lean | {"offload_checkpoints": m} for m in parts)
    lean = lean | {"embedding": "host"}
    if weigh.if_taken(1, LEAST | lean):
        yield from (lean | {"offload_checkpoints": m} for m in (False, *parts))


def _may_fork() -> bool:
    """A fork survives neither PyTorch's threads nor a GPU."""
    return torch.get_num_threads() == 1 and detect() is None


def _unheard(text: str) -> None:
    """What a process beside this one weighs is said by nobody."""


class _Here(Executor):
    """Does at once, in this process, what a pool would do beside it."""

    def submit(self, function: Callable[..., Any], /, *items: Any, **options: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*items, **options))
        return done


def _workers(processes: int) -> Executor:
    """Who weighs with this process: nobody, or some beside it."""
    if processes < 2:
        return _Here()
    return ProcessPoolExecutor(processes - 1, mp_context=multiprocessing.get_context("fork"))


def _each(pool: Executor, function: Callable[..., Any], items: list[tuple[Any, ...]]) -> list[Any]:
    """The function of each of several arguments, the first one and who waits done by this process.

    What it has run itself, it need not run again for what comes later.
    """
    futures = [pool.submit(function, *item) for item in items[1:]]
    found = [function(*items[0])]
    here = {
        number: function(*items[number])
        for number in range(len(futures), 0, -1)
        if futures[number - 1].cancel()  # nobody has begun
    }
    found += [here[n] if n in here else future.result() for n, future in enumerate(futures, 1)]
    return found


def _family(weigh: _Weigher, fields: dict[str, Any]) -> list[Tried]:
    """All that is tried with these settings: micro batches, each with few layers that forget."""
    tried: list[Tried] = []
    m = fields["offload_checkpoints"]
    lowest = m + 1 if m else int(fields["keep_attention"])  # the last checkpoint stays
    _, largest = WHOLE_NUMBERS["micro_batch_size"]
    micro, kept, so_far = 1, weigh.num_layers // 2, None
    while micro <= largest and weigh.per_gpu % micro == 0:
        one = _Family(weigh, micro, fields, tried)
        if one.margin(weigh.num_layers) < 0:
            if fields["keep_attention"]:
                one.keep_in_most()
            break
        bound = so_far and so_far.doubled(one.weighed[weigh.num_layers])
        if bound and bound.loses(weigh, tried, more=True):
            break
        if bound and bound.loses(weigh, tried):
            micro, kept, so_far = micro * 2, kept // 2, bound
            continue
        k = one.fewest(lowest, guess=weigh.num_layers - kept)
        so_far = one.bound(k) if k > lowest else None  # what memory ends is known, or nothing
        micro, kept = micro * 2, (weigh.num_layers - k) // 2  # twice the tokens in half the layers
    return tried


Work = tuple[float, float]  # of a step: its ideal seconds and its operations


@dataclass(frozen=True)
class _Bound:
    """What a micro batch may come to at best, from what one of half its size has come to.

    Twice the tokens take twice the memory a layer, so that at most half as many layers keep what
    they make. An operation on twice the tokens takes at most twice as long, so that a layer spares
    a step no more by keeping it than before; and what a step gains by a still larger batch is at
    most what it has gained by this one, as its time is convex in the batch's inverse. One layer
    more stands for the allocator's rounding.

    Attributes:
        every: Work where all layers forget.
        spared: Work that a layer spares which keeps what it makes.
        kept: Layers that do, at most.
        gained: Work that this batch spares beside the one before.
        masked: Whether it has a mask, which those before it may not have.
    """

    every: Work
    spared: Work
    kept: int
    gained: Work
    masked: bool

    def doubled(self, every: Tried) -> _Bound | None:
        """Of twice the batch, given its work where all layers forget; nothing, if masks differ."""
        if every[0].has_mask != self.masked:
            return None
        now = _work(every)
        one, two = (max(0.0, old - new) for old, new in zip(self.every, now, strict=True))
        return dataclasses.replace(self, every=now, kept=self.kept // 2 + 1, gained=(one, two))

    def loses(self, weigh: _Weigher, tried: list[Tried], more: bool = False) -> bool:
        """Whether it is no faster than the best that fits; with `more` larger batches, too."""
        best = min(weigh.seconds(*_work(pair)) for pair in tried if weigh.room(pair[1]) >= 0)
        at_best = [
            work - self.kept * layer - more * gain
            for work, layer, gain in zip(self.every, self.spared, self.gained, strict=True)
        ]
        return weigh.seconds(*at_best) >= best


def _work(pair: Tried) -> Work:
    return pair[1].ideal_seconds, pair[1].operations


class _Family:
    """Settings that differ in k, the layers that forget, alone.

    Args:
        tried: Takes what is weighed.

    Attributes:
        weighed: k to the recipe with it and its forecast.
    """

    def __init__(
        self, weigh: _Weigher, micro: int, fields: dict[str, Any], tried: list[Tried]
    ) -> None:
        self._weigh, self._micro, self._fields, self._tried = weigh, micro, fields, tried
        self._margins: dict[int, int] = {}
        self.weighed: dict[int, Tried] = {}

    def margin(self, k: int) -> int:
        """What k leaves of the card, in bytes."""
        if k not in self._margins:
            pair = self._weigh(self._micro, self._fields | {"checkpointed_layers": k})
            self._tried.append(pair)
            self.weighed[k] = pair
            self._margins[k] = self._weigh.room(pair[1])
        return self._margins[k]

    def bound(self, k: int) -> _Bound | None:
        """What larger batches may come to, given the smallest k that fits; nothing, if that's all.

        Args:
            k: Weighed, as all layers are.
        """
        every, kept = self.weighed[self._weigh.num_layers], self._weigh.num_layers - k
        if not kept:
            return None
        both = zip(_work(every), _work(self.weighed[k]), strict=True)
        one, two = ((most - fewest) / kept for most, fewest in both)
        return _Bound(_work(every), (one, two), kept, (0.0, 0.0), every[0].has_mask)

    def fewest(self, lowest: int, guess: int) -> int:
        """The smallest k from `lowest` on that fits, given that all layers do.

        Each layer costs about the same, so the next guess lies on the line between the nearest k
        that fit and do not. Guesses between the ends are alike in the few layers that are run.
        """
        no, yes = lowest - 1, self._weigh.num_layers  # `no` does not fit, or is not asked for
        while no + 1 < yes:
            guess = min(yes - 1, max(no + 1, guess))
            if self.margin(guess) >= 0:
                yes = guess
            else:
                no = guess
            guess = self._between(no, yes)
        return yes

    def _between(self, no: int, yes: int) -> int:
        """Where the line through the margins of two k reaches zero."""
        if no not in self._margins:  # all that was weighed fits: from the line of the first two
            no = self._weigh.num_layers
        span = self._margins[yes] - self._margins[no]
        if span == 0 or yes == no:
            return yes - 1
        return yes - math.floor(self._margins[yes] * (yes - no) / span)

    def keep_in_most(self) -> None:
        """Weigh attention's output kept by as many of all layers as fit, given that all do not."""
        none, every = self._margin_kept(False), self.margin(self._weigh.num_layers)
        if none < 0:
            return
        each = (none - every) / self._weigh.num_layers
        n = min(int(none / each), self._weigh.num_layers - 1)
        while n > 1 and self._margin_kept(n) < 0:
            n -= 1

    def _margin_kept(self, n: int | bool) -> int:
        """What attention's output kept by the last n layers leaves, all layers forgetting."""
        fields = {"checkpointed_layers": "all", "keep_attention": n}
        pair = self._weigh(self._micro, self._fields | fields)
        self._tried.append(pair)
        return self._weigh.room(pair[1])
