"""Forecasts on disk: what was worked out once is read the next time, in another process too.

A file's name is a checksum of all that its content depends on: the question (recipe, what the
model's config says, card), the source of the engine and the versions of the libraries whose code it
runs. So a file is never out of date, only no longer asked for. They lie in the user's cache folder;
FITCAST_CACHE names another one, and `FITCAST_CACHE=0` keeps everything in memory.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch

import fitcast
from fitcast.forecasting.verdict import Forecast
from fitcast.gpus import Gpu
from fitcast.memory.report import Block

KEPT = 256  # files; one of 8B takes about 0.3 MB
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
OFF = ("0", "off", "no", "false")
BLOCKS = ("largest", "saved")
TUPLES = ("peak_reserved_bytes", "unlimited_reserved_bytes", "notes")


def folder() -> Path | None:
    """Where forecasts are kept; `None` if they are not to be."""
    said = os.environ.get("FITCAST_CACHE", "").strip()
    if said.lower() in OFF:
        return None
    if said:
        return Path(said).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "fitcast"


@functools.cache
def engine() -> str:
    """A checksum of the engine's source and of the versions that it runs on."""
    digest = hashlib.sha256()
    root = Path(fitcast.__file__).parent
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root)}\n".encode() + file.read_bytes())
    for name in LIBRARIES:
        digest.update(f"{name} {_version(name)}\n".encode())
    digest.update(f"{platform.python_version()} {platform.machine()}".encode())
    return digest.hexdigest()


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def read(question: str, gpu: Gpu) -> Forecast | None:
    """The forecast that was kept for a question, or `None`; a file that is damaged is none."""
    file = _file(question)
    if file is None:
        return None
    try:
        kept = json.loads(gzip.decompress(file.read_bytes()))
        forecast = _forecast(kept, gpu)
        file.touch()  # the least recently used ones are dropped first
    except (OSError, EOFError, ValueError, TypeError, KeyError, AttributeError):
        return None
    return forecast


def write(question: str, forecast: Forecast) -> None:
    """Keep a forecast, whole or not at all. A disk that is full or read-only is no error."""
    file = _file(question)
    if file is None:
        return
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_data(forecast), separators=(",", ":"))
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".part", delete=False) as part:
            try:
                part.write(gzip.compress(text.encode(), compresslevel=1, mtime=0))
                part.close()
                os.replace(part.name, file)
            except BaseException:
                os.unlink(part.name)
                raise
        _drop_old(file.parent)


def _file(question: str) -> Path | None:
    where = folder()
    if where is None:
        return None
    name = hashlib.sha256(f"{engine()} {question}".encode()).hexdigest()
    return where / f"{name}.json.gz"


def _drop_old(where: Path) -> None:
    files = sorted(where.glob("*.json.gz"), key=lambda file: file.stat().st_mtime)
    for file in files[:-KEPT]:
        file.unlink(missing_ok=True)


def _data(forecast: Forecast) -> dict[str, Any]:
    """A forecast in JSON's types. The card is part of the question."""
    fields = {name: value for name, value in vars(forecast).items() if name != "gpu"}
    return fields | {name: [_block(b) for b in fields[name]] for name in BLOCKS}


def _block(block: Block) -> list[Any]:
    dtype = str(block.dtype).removeprefix("torch.")
    return [
        block.n_bytes, block.category, block.operation, block.module, block.phase,
        list(block.shape), dtype, block.saved,
    ]  # fmt: skip


def _as_block(
    n_bytes: int, category: str, operation: str, module: str, phase: str, shape: list[int],
    dtype: str, saved: bool,
) -> Block:  # fmt: skip
    return Block(
        n_bytes, category, operation, module, phase, tuple(shape), getattr(torch, dtype), saved
    )


def _forecast(kept: dict[str, Any], gpu: Gpu) -> Forecast:
    lists = {name: [_as_block(*values) for values in kept[name]] for name in BLOCKS}
    tuples = {name: tuple(kept[name]) for name in TUPLES}
    fields: dict[str, Any] = kept | lists | tuples
    return Forecast(**fields, gpu=gpu)
