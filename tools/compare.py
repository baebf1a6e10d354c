"""Author's tool: what others estimate for steps that were measured, beside the forecast.

    python -m tools.compare           # rewrites README's table from tests/data/estimates.json
    python -m tools.compare --ask     # asks everybody again (needs `pip install fitcheck-llm`)

The rows are the measured steps of tests/data/h200_steps.json in the usual recipe (full loss,
transformers' attention, all layers checkpointed or none). Compared is the peak in tensors, without
CUDA's context and the allocator's slack, which only some of the tools know. Asked are:

- `fitcast.forecast`;
- fitcheck-llm, by its Python interface: its total less its overhead;
- `accelerate estimate-memory`: what it says for training in 4 bits, and where it says nothing, for
  loading in 4 bits, which is what people read off it;
- LLaMA-Factory's table of requirements for QLoRA in 4 bits, 7B (github.com/hiyouga/LLaMA-Factory,
  README, "Hardware Requirement");
- the formula in circulation: half a byte a parameter, 16 bytes a trained one (weight, gradient,
  Adam's two), and batch x sequence x hidden x layers numbers of 2 bytes.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from typing import Any

from fitcast import models
from fitcast.units import GB, MIB
from tools.surroundings import ROOT

MEASURED = ROOT / "tests" / "data" / "h200_steps.json"
ESTIMATES = ROOT / "tests" / "data" / "estimates.json"
NAMES = {"llama-1b": "llama-3.2-1b", "llama-8b": "llama-3.1-8b"}
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
TABLE = re.compile(
    r"(?<=<!-- estimates: python -m tools.compare -->\n).*?(?=<!-- end of estimates -->)", re.DOTALL
)
FACTORY_7B_GB = 6  # LLaMA-Factory's README: QLoRA, 4 bits, 7B
WHO = {
    "fitcast": "`fitcast forecast`",
    "fitcheck": "[fitcheck-llm](https://pypi.org/project/fitcheck-llm/)",
    "formula": "parameters / 2 + 16 x trained + batch x sequence x hidden x layers x 2",
    "factory": "[LLaMA-Factory's table](https://github.com/hiyouga/LLaMA-Factory), 7B (8B rows)",
    "accelerate": "`accelerate estimate-memory --dtypes int4`",
}


def rows() -> list[dict[str, Any]]:
    """The measured steps that all of them can be asked about."""
    measured = json.loads(MEASURED.read_text("utf-8"))["rows"]
    layers = {"llama-1b": 16, "llama-8b": 32}
    return [
        row
        for row in measured
        if (row["loss"], row["attention"]) == ("full", "stock")
        and row["checkpointed_layers"] in (0, layers[row["model"]])
    ]


def config_of(row: dict[str, Any]):
    """The model's config; these rows were measured with a head of its own."""
    config = models.config(NAMES[row["model"]])
    config.tie_word_embeddings = False
    return config


@cache
def parameters(name: str) -> int:
    """Parameters of a row's model, with a head of its own, counted on its meta model."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of({"model": name})).num_parameters()


def trained(config) -> int:
    """Parameters of LoRA with r = 16 on q, k, v and o."""
    heads = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    widths = [(config.hidden_size, heads), (heads, config.hidden_size)]
    widths += [(config.hidden_size, shared)] * 2
    return 16 * config.num_hidden_layers * sum(a + b for a, b in widths)


def fitcast_bytes(row: dict[str, Any], config) -> int:
    from fitcast import TrainRecipe, forecast
    from tools.measure_runs import H200_WITH_T4_KERNELS

    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        recipe = TrainRecipe(
            model=folder,
            amp_dtype="float16",
            lora_dropout=row["lora_dropout"],
            micro_batch_size=row["micro_batch_size"],
            sequence_length=row["sequence_length"],
            checkpointed_layers=row["checkpointed_layers"],
        )
        return forecast(recipe, H200_WITH_T4_KERNELS).peak_allocated_bytes


def fitcheck_bytes(row: dict[str, Any], config) -> int:
    import fitcheck

    model = fitcheck.ModelConfig(
        name=row["model"],
        num_params=parameters(row["model"]),
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        head_dim=config.head_dim,
        tie_word_embeddings=False,
    )
    training = fitcheck.TrainingConfig(
        precision="fp16",
        quantization="nf4",
        double_quant=True,
        optimizer="adam8bit",
        batch_size=row["micro_batch_size"],
        seq_len=row["sequence_length"],
        lora_rank=16,
        lora_targets=list(TARGETS),
        grad_checkpoint=row["checkpointed_layers"] > 0,
    )
    said = fitcheck.estimate(model, training, fitcheck.get_gpu("t4"))
    return round((said.total_mib - said.overhead_mib) * MIB)


def accelerate_bytes(row: dict[str, Any], config) -> int:
    """Its answer for training, and without one its size for loading, as its command prints them."""
    from accelerate.commands.estimate import estimate_training_usage

    float32_bytes = 4 * parameters(row["model"])
    training = max(estimate_training_usage(float32_bytes, "int4").values())
    return training if training != -1 else float32_bytes // 8


def factory_bytes(row: dict[str, Any], config) -> int | None:
    return FACTORY_7B_GB * GB if row["model"] == "llama-8b" else None


def formula_bytes(row: dict[str, Any], config) -> int:
    tokens = row["micro_batch_size"] * row["sequence_length"]
    activations = tokens * config.hidden_size * config.num_hidden_layers * 2
    return parameters(row["model"]) // 2 + 16 * trained(config) + activations


ASKED = {
    "fitcast": fitcast_bytes,
    "fitcheck": fitcheck_bytes,
    "formula": formula_bytes,
    "factory": factory_bytes,
    "accelerate": accelerate_bytes,
}


def ask(names: tuple[str, ...] = tuple(ASKED)) -> list[dict[str, int | None]]:
    """What each of them says for each row, in bytes; None where it has no answer."""
    return [{name: ASKED[name](row, config_of(row)) for name in names} for row in rows()]


def table() -> str:
    """README's table: how far off each is, at the median and at worst."""
    known = json.loads(ESTIMATES.read_text("utf-8"))
    measured = [row["peak_allocated_bytes"] for row in rows()]
    lines = ["| who says it | steps | off by, median | at worst |", "|---|---:|---:|---:|"]
    for name, label in WHO.items():
        off = [
            abs(said[name] / peak - 1)
            for said, peak in zip(known["rows"], measured, strict=True)
            if said[name] is not None
        ]
        label += f" {known['versions'][name]}" if name in known["versions"] else ""
        lines.append(f"| {label} | {len(off)} | {statistics.median(off):.2%} | {max(off):.1%} |")
    return "\n".join(lines) + "\n"


def readme(text: str) -> str:
    """README with the table of now."""
    return TABLE.sub(lambda _: table(), text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ask", action="store_true", help="ask everybody again")
    if parser.parse_args().ask:
        versions = {"fitcheck": version("fitcheck-llm"), "accelerate": version("accelerate")}
        known = {"versions": versions, "rows": ask()}
        ESTIMATES.write_text(json.dumps(known, indent=1) + "\n", "utf-8")
    path = ROOT / "README.md"
    path.write_text(readme(path.read_text("utf-8")), "utf-8")
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
