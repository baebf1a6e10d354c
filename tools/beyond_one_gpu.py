"""Author's tool: the numbers of lessons/beyond_one_gpu.md, as recorded and from today's forecast.

    python -m tools.beyond_one_gpu          # writes them into the page, between its markers

How the script ran on one GPU and on two; then what each GPU holds when a QLoRA run is replicated
(DDP) and when it is sharded (FSDP). The one-GPU column is the forecast; the others are arithmetic
on it, which the page explains. Not modelled: FSDP's own bookkeeping, fragmentation of gathered
layers.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from course_utils.topics import ladder, recorded
from fitcast import models
from fitcast.forecasting.load import blueprint
from fitcast.gpus import T4
from fitcast.units import show_bytes
from tools import stamp

PAGE = ROOT / "lessons" / "beyond_one_gpu.md"
START, END = "<!-- numbers: python -m tools.beyond_one_gpu -->", "<!-- end of numbers -->"
NF4_BYTES = 0.516  # a weight in NF4 with double quantization, scales included
PREFETCHED = 2  # layers gathered at once: the one at work and the next one
SHARDED = ("weights", "adapters", "gradients", "optimizer state")
PCIE_BYTES_PER_SECOND = 12e9  # PCIe 3.0 x 16 less a quarter


def layer_bytes(rung: ladder.Rung) -> tuple[int, int]:
    """Bytes of one decoder layer's frozen weights, and of all that is in no layer."""
    config = models.config(rung.recipe.model)
    layers = outside = 0.0
    for name, parameter in blueprint(rung.recipe, config).named_parameters():
        if "lora_" not in name:
            n_bytes = parameter.numel() * (NF4_BYTES if hasattr(parameter, "quant_type") else 2)
            if ".layers." in name:
                layers += n_bytes
            else:
                outside += n_bytes
    return int(layers / config.num_hidden_layers), int(outside)


def per_gpu(rung: ladder.Rung, n: int) -> dict[str, int]:
    """Bytes by holder on each of `n` GPUs under FSDP's full sharding; n = 1 is the forecast."""
    held = dict(rung.forecast.composition)
    if n > 1:
        held |= {holder: held[holder] // n for holder in SHARDED}
        layer, outside = layer_bytes(rung)
        held["gathered"] = PREFETCHED * layer + outside - outside // n
    return held


def table() -> str:
    """The page's table: what a GPU holds, alone, replicated, and sharded over 2 and 4."""
    rung = next(r for r in ladder.ladder() if r.name == "native RMSNorm")
    columns = {
        "one GPU, or DDP on each": per_gpu(rung, 1),
        "FSDP on 2": per_gpu(rung, 2),
        "FSDP on 4": per_gpu(rung, 4),
    }
    lines = [
        f"{rung.recipe.model}, {rung.recipe.micro_batch_size} x "
        f"{rung.recipe.sequence_length} tokens on each GPU, the levers of lesson 06:",
        "",
        "| at the peak | " + " | ".join(columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for holder in (*SHARDED, "gathered", "activations", "temporaries"):
        lines.append(
            f"| {holder} | "
            + " | ".join(show_bytes(held.get(holder, 0), "GiB") for held in columns.values())
            + " |"
        )
    lines.append(
        "| **in all** | "
        + " | ".join(f"**{show_bytes(sum(held.values()), 'GiB')}**" for held in columns.values())
        + " |"
    )
    layer, outside = layer_bytes(rung)
    moved = 2 * (rung.forecast.composition["weights"] // 2)  # half arrives, in each of two passes
    tokens = rung.recipe.micro_batch_size * rung.recipe.sequence_length
    work = tokens / rung.ideal_tokens_per_second
    lines += [
        "",
        f"One layer is {show_bytes(layer)}, what is outside (embeddings, head) "
        f"{show_bytes(outside)}. On two T4s each micro batch moves {show_bytes(moved)} over "
        f"PCIe, about {moved / PCIE_BYTES_PER_SECOND:.1f} s beside {work:.0f} s of work (by "
        f"the forecast's arithmetic for a {T4.name}).",
    ]
    return "\n".join(lines)


def several_gpus() -> str:
    """The commands, and how they ran on one GPU and on more."""
    rows, now = recorded.rows("gpus"), stamp.facts()
    lines = [
        "```",
        f"git clone -qb {now.tag} {now.repository} course && cd course",
        "python -m pip install -q .                     # what is missing, nothing else",
        "torchrun --nproc-per-node 2 tools/train_many_gpus.py --out run",
        "accelerate launch --num_processes 2 tools/train_many_gpus.py --out run   # the same",
        "```",
        "",
        "| GPUs | micro batch x accumulation x GPUs | tokens a second | loss after "
        f"{rows[0]['steps']} steps |",
        "|---:|---|---:|---:|",
    ]
    for row in rows:
        ranks, micro, steps, rest = re.search(
            r"(\d+) x (\d+) x (\d+) = (.*) a step", row["shared"]
        ).groups()
        lines.append(
            f"| {ranks} | {micro} x {steps} x {ranks} = {rest} | "
            f"{row['tokens_per_second']:,.0f} | {row['losses'][-1]:.4f} |"
        )
    model = re.search(r"shape of ([\w.-]+),", rows[0]["shared"])[1]
    return "\n".join((*lines, "", f"{model}, random weights. Measured: {recorded.stamp(rows)}."))


def with_numbers(page: str) -> str:
    """The page with today's numbers between its markers."""
    head, *parts = page.split(START)
    return head + "".join(
        f"{START}\n{block()}\n{END}{part.split(END)[1]}"
        for block, part in zip((several_gpus, table), parts, strict=True)
    )


if __name__ == "__main__":
    PAGE.write_text(with_numbers(PAGE.read_text("utf-8")), "utf-8")
