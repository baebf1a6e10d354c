"""The explorer's numbers: forecasts at the nodes of a grid, for every kind of card.

    python tools/explorer.py [--processes N] [--models NAME ...]
    python tools/explorer.py --restamp

The first makes what is missing of site/explorer/data.js: it keeps each node under build/explorer as
it goes, by the engine's checksum, and goes on from there when it is started again. The second is
for a change of the engine that changes no forecast: it forecasts a sample again and, if all of it
is the same, writes the new checksum.

Memory depends on a card's kernels, not on its size: cards that take the same kernels and the same
workspaces are one kind, whose step is run once and judged under the limit of each card. Between the
nodes the page shows the interval of those around. A node above which nothing can fit any card of
its kind ends its row.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import importlib.metadata
import itertools
import json
import os
import platform
import random
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fitcast import gpus
from fitcast.forecasting import store
from fitcast.forecasting.files import forecast_file
from fitcast.forecasting.forecast import run_stream
from fitcast.forecasting.verdict import TIGHT, Forecast, report
from fitcast.gpus import Gpu
from fitcast.memory.stream import Stream
from fitcast.recipe import TrainRecipe

DATA = ROOT / "site" / "explorer" / "data.js"
PARTS = ROOT / "build" / "explorer"
CONFIGS = ROOT / "tests" / "data" / "configs"
PREFIX = "window.FITCAST_DATA = "
UNIT = 512  # bytes; the allocator's blocks are multiples of it
SAMPLE = 12  # nodes that are forecast again before new checksums are written
SEED = 21

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass(frozen=True)
class Model:
    """A model of the page.

    Attributes:
        label: As people call it.
        hub_id: Where its weights are.
        preset: Its name in `fitcast.models`, if it has one.
        folder: Otherwise its config, under tests/data/configs.
        targets: Linear layers of its attention.
        file: Whether it is asked about in a file of TRL's command line, because a recipe cannot
            say it: a mixture of experts in 16 bits.
    """

    label: str
    hub_id: str
    preset: str | None = None
    folder: str | None = None
    targets: tuple[str, ...] = ATTENTION
    file: bool = False

    @property
    def local(self) -> str:
        """What the engine reads without the hub."""
        return self.preset or str(CONFIGS / str(self.folder))


MODELS = {
    "llama-3.1-8b": Model("Llama 3.1 8B", "unsloth/Meta-Llama-3.1-8B-Instruct", "llama-3.1-8b"),
    "qwen3-14b": Model("Qwen3 14B", "Qwen/Qwen3-14B", folder="qwen3-14b"),
    "qwen3-8b": Model("Qwen3 8B", "Qwen/Qwen3-8B", folder="qwen3-8b"),
    "llama-3.2-1b": Model("Llama 3.2 1B", "unsloth/Llama-3.2-1B-Instruct", "llama-3.2-1b"),
    "llama-3.2-3b": Model("Llama 3.2 3B", "unsloth/Llama-3.2-3B-Instruct", "llama-3.2-3b"),
    "phi-4-mini": Model(
        "Phi-4-mini 3.8B", "microsoft/Phi-4-mini-instruct", "phi-4-mini",
        targets=("qkv_proj", "o_proj"),
    ),
    "qwen3-32b": Model("Qwen3 32B", "Qwen/Qwen3-32B", folder="qwen3-32b"),
    "mistral-24b": Model(
        "Mistral Small 24B", "unsloth/Mistral-Small-24B-Instruct-2501", folder="mistral-24b"
    ),
    "gpt-oss-20b": Model(
        "gpt-oss 20B (16 bits)", "unsloth/gpt-oss-20b-BF16", folder="gpt-oss-20b", file=True
    ),
}  # fmt: skip
# A kind of card and the one that its steps are run on: the largest, past which nothing fits.
KINDS = {"volta": gpus.V100_32, "ampere": gpus.A100_80, "hopper": gpus.H200, "blackwell": gpus.B200}
LEAN: dict[str, Any] = dict(
    attention="explicit_kv", norm="native", mlp="lean", adapters="lean", rotary="lean",
    loss="lean", expandable_segments=True,
)  # fmt: skip
# Lever sets of the page: what they change of a `TrainRecipe`.
LEVERS: dict[str, dict[str, Any]] = {
    "usual": {},
    "lean": LEAN,
    "usual0": {"checkpointed_layers": 0},
    "lean0": LEAN | {"checkpointed_layers": 0},
}
Cell = tuple[int, int]  # micro batch, sequence
ROWS: list[Cell] = [(1, s) for s in (512, 1024, 2048, 4096, 8192)]
CELLS: dict[tuple[str, bool, bool], list[Cell]] = {  # adapters, whether layers forget, padded
    ("attention", True, False): [
        *ROWS, (2, 1024), (2, 2048), (2, 4096), (4, 1024), (4, 2048), (8, 1024),
    ],
    ("attention", True, True): [(2, 1024), (2, 2048), (2, 4096), (4, 2048)],
    ("attention", False, False): [*ROWS[:4], (2, 1024), (2, 2048), (4, 1024)],
    ("all-linear", True, False): [*ROWS[:4], (4, 2048)],
}  # fmt: skip
OF_FILES: list[Cell] = [*ROWS[1:4], (2, 2048)]  # whose forecasts take longer


class Row(NamedTuple):
    """Settings that differ in micro batch and sequence alone."""

    model: str
    kind: str
    adapters: str  # "attention" or "all-linear"
    levers: str
    padded: bool

    @property
    def key(self) -> str:
        """As the page looks it up."""
        padding = "padded" if self.padded else "full"
        return "|".join((self.model, self.kind, self.adapters, self.levers, padding))


def rows() -> Iterator[tuple[Row, list[Cell]]]:
    """The grid: every row and its cells, small ones first."""
    for name, kind in itertools.product(MODELS, KINDS):
        if MODELS[name].file:
            if kind != "volta":  # in bfloat16, and larger than those cards
                for levers in ("usual", "usual0"):
                    yield Row(name, kind, "attention", levers, False), OF_FILES
            continue
        for (adapters, forgets, padded), cells in CELLS.items():
            for levers in LEVERS:
                if forgets != levers.endswith("0"):
                    yield Row(name, kind, adapters, levers, padded), sorted(cells)


def cards_of(kind: str) -> list[Gpu]:
    """The cards whose kernels take what those of this kind take."""
    return [gpu for gpu in gpus.PRESETS.values() if _takes(gpu) == _takes(KINDS[kind])]


def _takes(gpu: Gpu) -> tuple[object, ...]:
    """What of a card decides memory, its size aside."""
    return (
        gpu.has_flash_attention,
        gpu.has_bfloat16,
        gpu.capability == (9, 0),  # attention by cuDNN
        gpu.workspace_bytes,
    )


def recipe_of(row: Row, cell: Cell) -> TrainRecipe:
    """The recipe that `fitcast forecast` is asked about with the page's command."""
    model, (micro_batch, sequence) = MODELS[row.model], cell
    recipe = TrainRecipe(
        model=model.local,
        lora_targets="all-linear" if row.adapters == "all-linear" else model.targets,
        micro_batch_size=micro_batch,
        sequence_length=sequence,
        padded=row.padded,
        **LEVERS[row.levers],
    )
    return recipe.for_gpu(KINDS[row.kind])


def trl_file(row: Row, cell: Cell, model: str) -> str:
    """The run as a file of TRL's command line, as the page shows it."""
    micro_batch, sequence = cell
    return (
        f"model_name_or_path: {model}\n"
        "dtype: bfloat16\n"
        "use_peft: true\n"
        "lora_r: 16\n"
        "lora_alpha: 32\n"
        "lora_dropout: 0.05\n"
        f"lora_target_modules: [{', '.join(MODELS[row.model].targets)}]\n"
        f"per_device_train_batch_size: {micro_batch}\n"
        f"max_length: {sequence}\n"
        "bf16: true\n"
        f"gradient_checkpointing: {'false' if row.levers.endswith('0') else 'true'}\n"
        "optim: paged_adamw_8bit\n"
    )


# --- one node ----------------------------------------------------------------------------------


def forecasts(row: Row, cell: Cell, streams: dict[str, Stream]) -> dict[str, Forecast]:
    """A node's forecast on the largest card of its kind and on those for which it may be tight.

    Args:
        row: Of the grid.
        cell: Its micro batch and sequence.
        streams: Of this cell on other kinds of cards; the one that is run here is added.
    """
    if MODELS[row.model].file:
        return _of_cards(row, lambda gpu: forecast_of_file(row, cell, gpu))
    recipe = recipe_of(row, cell)
    stream = streams[row.kind] = _stream(recipe, row.kind, streams)

    def judged(gpu: Gpu) -> Forecast:
        return report(stream, gpu, expandable=recipe.expandable_segments)

    return _of_cards(row, judged)


def _of_cards(row: Row, forecast: Any) -> dict[str, Forecast]:
    largest = KINDS[row.kind]
    found = {largest.name: forecast(largest)}
    seen = found[largest.name]
    for gpu in cards_of(row.kind):
        enough = seen.unlimited_reserved_bytes[1] <= gpu.usable_bytes
        hopeless = seen.peak_allocated_bytes > gpu.usable_bytes
        if gpu != largest and not enough and not hopeless:
            found[gpu.name] = forecast(gpu)
    return found


def _stream(recipe: TrainRecipe, kind: str, streams: dict[str, Stream]) -> Stream:
    """The step's memory on a kind of card.

    Blackwell's kernels are Ampere's here; only cuBLAS's workspaces are larger. So Ampere's stream
    is taken, where there is one. (A test forecasts both.)
    """
    if kind != "blackwell" or "ampere" not in streams:
        return run_stream(recipe, KINDS[kind])
    stream = copy.copy(streams["ampere"])
    stream.blocks = [
        block.resized(KINDS[kind].workspace_bytes)
        if (block.n_bytes, block.operation) == (gpus.A100_80.workspace_bytes, "empty.memory_format")
        else block
        for block in stream.blocks
    ]
    return stream


def forecast_of_file(row: Row, cell: Cell, gpu: Gpu) -> Forecast:
    """What `fitcast forecast run.yaml` says, with the model's config in 16 bits beside it."""
    with tempfile.TemporaryDirectory() as folder:
        config = json.loads((Path(MODELS[row.model].local) / "config.json").read_text("utf-8"))
        config.pop("quantization_config", None)
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        file = Path(folder) / "run.yaml"
        file.write_text(trl_file(row, cell, folder), encoding="utf-8")
        return forecast_file(str(file), gpu)


def node(row: Row, cell: Cell, found: dict[str, Forecast]) -> dict[str, Any]:
    """What the page shows of a node, in bytes and words."""
    seen = found[KINDS[row.kind].name]
    largest = max(
        (block for block in seen.largest if block.category not in ("weights", "adapters")),
        key=lambda block: block.n_bytes,
        default=None,
    )
    return {
        "cell": list(cell),
        "peak": seen.peak_allocated_bytes,
        "reserved": list(seen.unlimited_reserved_bytes),
        "composition": {name: n for name, n in seen.composition.items() if n},
        "where": [seen.peak_phase, seen.peak_operation, _short(seen.peak_module)],
        "block": largest and [
            largest.n_bytes, largest.category, largest.operation, _short(largest.module),
            list(largest.shape), str(largest.dtype).removeprefix("torch."),
        ],
        "tight": {
            name: [f.peak_reserved_bytes[0], f.retries]
            for name, f in found.items()
            if f.verdict == TIGHT
        },
    }  # fmt: skip


def _short(module: str | None) -> str:
    return (module or "").removeprefix("base_model.model.")


def hopeless(row: Row, cell: Cell, done: list[dict[str, Any]]) -> bool:
    """Whether a node of fewer tokens has a peak that no card of this kind holds."""
    limit = max(gpu.usable_bytes for gpu in cards_of(row.kind))
    return any(
        n["peak"] > limit and n["cell"][0] <= cell[0] and n["cell"][1] <= cell[1] for n in done
    )


# --- all nodes ---------------------------------------------------------------------------------


def families() -> list[list[tuple[Row, list[Cell]]]]:
    """Rows that differ in the kind of card alone; those that most people ask about first."""
    found: dict[tuple, list] = {}
    for row, cells in rows():
        found.setdefault((*row[2:], row.model), []).append((row, cells))
    asked = sorted(
        found,
        key=lambda of: (MODELS[of[3]].file, of[0] != "attention", of[2], of[1].endswith("0")),
    )
    return [found[of] for of in asked]


def make_family(family: list[tuple[Row, list[Cell]]], file: Path) -> None:
    """Forecast what is missing of one family, and append each node to a file of its own."""
    done = kept(file)
    with file.open("a", encoding="utf-8") as out:
        for cell in sorted({cell for _, cells in family for cell in cells}):
            streams: dict[str, Stream] = {}
            for row, cells in family:
                have = done.setdefault(row.key, [])
                if cell not in cells or any(n["cell"] == list(cell) for n in have):
                    continue
                if hopeless(row, cell, have):
                    continue
                made = node(row, cell, forecasts(row, cell, streams))
                have.append(made)
                out.write(json.dumps([row.key, made]) + "\n")
                out.flush()


def kept(file: Path) -> dict[str, list[dict[str, Any]]]:
    """The nodes of a file by row; a line that was cut off is none."""
    found: dict[str, list[dict[str, Any]]] = {}
    if file.exists():
        for line in file.read_text("utf-8").splitlines():
            try:
                key, made = json.loads(line)
            except ValueError:
                continue
            found.setdefault(key, []).append(made)
    return found


def make(models: Iterable[str], processes: int) -> dict[str, list[dict[str, Any]]]:
    """All nodes of these models, in as many processes."""
    folder = PARTS / store.engine()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    work = [
        (family, folder / f"{family[0][0].key.replace('|', '_')}.jsonl")
        for family in families()
        if family[0][0].model in models
    ]
    if processes < 2:
        for family, file in work:
            make_family(family, file)
    else:
        with ProcessPoolExecutor(processes) as pool:
            list(pool.map(make_family, *zip(*work, strict=True)))
    nodes: dict[str, list[dict[str, Any]]] = {}
    for family, file in work:
        found = kept(file)
        for row, cells in family:
            nodes[row.key] = [n for n in found[row.key] if tuple(n["cell"]) in cells]
    return nodes


# --- the page's data ---------------------------------------------------------------------------


def stamp() -> dict[str, Any]:
    """What the numbers depend on: the engine's source and the versions that it ran on."""
    libraries = {name: importlib.metadata.version(name) for name in store.LIBRARIES}
    machine = {"python": platform.python_version(), "machine": platform.machine()}
    return {"engine": store.engine(), "versions": libraries | machine}


def data(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Everything that the page knows, its words in a table and bytes of blocks in units."""
    words: dict[str, int] = {}

    def number(word: str) -> int:
        return words.setdefault(word, len(words))

    def packed(made: dict[str, Any]) -> list[Any]:
        block = made["block"]
        return [
            *made["cell"],
            _units(made["peak"]),
            *made["reserved"],
            [[number(name), _units(n)] for name, n in made["composition"].items()],
            [number(word) for word in made["where"]],
            block and [_units(block[0]), *map(number, block[1:4]), block[4], number(block[5])],
            [[name, *values] for name, values in made["tight"].items()],
        ]

    table = {key: [packed(n) for n in sorted(found[key], key=lambda n: n["cell"])] for key in found}
    return {
        "stamp": stamp(),
        "unit": UNIT,
        "cards": [_card(kind, gpu) for gpu in gpus.PRESETS.values() for kind in [_kind(gpu)]],
        "models": {name: _model(model) for name, model in MODELS.items()},
        "levers": LEVERS,
        "words": list(words),
        "rows": table,
    }


def _units(n_bytes: int) -> int:
    units, rest = divmod(n_bytes, UNIT)
    assert not rest, "the allocator rounds blocks"
    return units


def _kind(gpu: Gpu) -> str:
    return next(kind for kind in KINDS if gpu in cards_of(kind))


def _card(kind: str, gpu: Gpu) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "kind": kind,
        "total": gpu.total_bytes,
        "context": gpu.context_bytes,
        "dtype": gpus.mixed_precision(gpu).dtype,
    }


def _model(model: Model) -> dict[str, Any]:
    return {
        "label": model.label,
        "hub": model.hub_id,
        "asked": model.preset or model.hub_id,
        "targets": list(model.targets),
        "file": model.file,
    }


def write(content: dict[str, Any]) -> None:
    """The data as a script: a page that is opened as a file may load no other kind."""
    table = content["rows"]
    lines = ",\n".join(f"{json.dumps(key)}:{_json(table[key])}" for key in table)
    rest = json.dumps({k: v for k, v in content.items() if k != "rows"}, indent=1)
    DATA.write_text(f'{PREFIX}{rest[:-2]},\n "rows": {{\n{lines}\n}}}};\n', encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def read() -> dict[str, Any]:
    """What `write` wrote."""
    text = DATA.read_text("utf-8")
    return json.loads(text.removeprefix(PREFIX).rstrip().removesuffix(";"))


def row_of(key: str) -> Row:
    """The row of a key."""
    model, kind, adapters, levers, padding = key.split("|")
    return Row(model, kind, adapters, levers, padding == "padded")


def unpacked(content: dict[str, Any], packed: list[Any]) -> dict[str, Any]:
    """A node in bytes and words again."""
    words, (*cell, peak, low, high, parts, where, block, tight) = content["words"], packed
    return {
        "cell": cell,
        "peak": peak * UNIT,
        "reserved": [low, high],
        "composition": {words[name]: n * UNIT for name, n in parts},
        "where": [words[n] for n in where],
        "block": block
        and [block[0] * UNIT, *(words[n] for n in block[1:4]), block[4], words[block[5]]],
        "tight": {name: values for name, *values in tight},
    }


def forecast_again(content: dict[str, Any], count: int, seed: int) -> list[str]:
    """Forecast a sample of nodes again; the keys of those that are not as they were."""
    every = [(key, n) for key, nodes in content["rows"].items() for n in nodes]
    changed = []
    for key, packed in random.Random(seed).sample(every, count):
        row, before = row_of(key), unpacked(content, packed)
        cell = (packed[0], packed[1])
        if node(row, cell, forecasts(row, cell, {})) != before:
            changed.append(f"{key} at {cell[0]} x {cell[1]}")
    return changed


def restamp() -> str:
    """Write the engine's new checksum if a sample of the nodes is as it was.

    Raises:
        SystemExit: It is not.
    """
    content = read()
    if changed := forecast_again(content, SAMPLE, SEED):
        raise SystemExit(
            f"data must be made again: {len(changed)} of {SAMPLE} nodes differ, such as "
            f"{changed[0]}; run python tools/explorer.py"
        )
    write(content | {"stamp": stamp()})
    return f"{SAMPLE} nodes are as they were; stamped {store.engine()[:12]}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes the explorer's data.")
    parser.add_argument("--restamp", action="store_true", help="a sample only, then the checksum")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    asked = parser.parse_args()
    if asked.restamp:
        print(restamp())
        return
    found = make(asked.models, asked.processes)
    write(data(found))
    nodes = sum(map(len, found.values()))
    print(f"{nodes} nodes in {len(found)} rows, {DATA.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
