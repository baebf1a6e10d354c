"""Author's tool: the course on one page, its numbers computed when it is written.

    python -m tools.cheat_sheet        # writes lessons/cheat_sheet.md

The words stand here; sizes come from the forecast, speeds from the recorded runs. A test holds the
committed page against what this writes today.
"""

import dataclasses

from course_utils.topics import ladder, recorded
from fitcast import models
from fitcast.forecasting.forecast import Forecast, forecast
from fitcast.forecasting.search import levers, tokens_per_second
from fitcast.gpus import T4
from fitcast.recipe import TrainRecipe
from fitcast.units import GIB, show_bytes
from tools.notebooks import LESSONS

PAGE = LESSONS / "cheat_sheet.md"
# Levers in the order to try them, and words for those whose name says too little: first what costs
# nothing, last what changes what is learnt.
CHANGES = {
    "lean loss": "only the loss in chunks",
    "explicit K/V attention": "only explicit K/V attention",
    "native RMSNorm": None,
    "micro batch 2, accumulated": None,
    "checkpoints in host memory": None,
    "rank 8": None,
    "sequence 1024": "sequence 1024 (the model sees less)",
}
USUAL = TrainRecipe(
    model="llama-3.1-8b", amp_dtype="float16", sequence_length=2048, micro_batch_size=4
)

TEMPLATE = """\
# Cheat sheet · make it fit

Example throughout: {example}. Forecasts are for a T4 ({t4}).

## Count

| what | bytes | in the example |
|---|---|---:|
| weights, nf4 twice quantized | 0.516 x linear layers' parameters + 2 x the rest | {weights} |
| adapters, gradients, 8-bit Adam | (4 + 4 + 2.03) x trainable; AdamW 4 + 4 + 8 | {trainable} |
| boundary of a layer | micro batch x sequence x hidden x 2 | {boundary} |
| all layers checkpointed | layers x boundary + what one layer keeps | {checkpointed} |
| no layer checkpointed | layers x what one layer keeps | {kept} |
| logits | micro batch x sequence x vocabulary x 12 (three float32 copies) | {logits} |
| scores, on a T4 without mask | micro batch x heads x sequence² x 4, several | {scores} |
| token ids | micro batch x sequence x 8 | {ids} |

effective batch = micro batch x accumulation x GPUs. Memory follows the micro batch only. Peak =
the highest *moment*, not the sum of the table.

## Out of memory? From the top

{levers}

Speeds are tokens/s beside the usual recipe's, by forecast. No mask: rows packed end to end, of
equal length, or alone; padded: a mask hides the filling (TRL's `packing=True` has one, too, if you
do not say `packing_strategy="wrapped"`). TRL's SFTTrainer has its loss in chunks as it comes, from
1.16 on. Without a mask logits and attention scores make two peaks: lower both, or the other one
stays (lesson 06). Lowering the rank saves almost nothing. For your run: `fitcast levers --model
llama-3.1-8b --micro-batch-size 4 --sequence-length 2048 --padded`, with your model, batch, length
and world; `fitcast fit` picks the fastest that fits.

## On a T4

- `fp16=True`, never `bf16`: `torch.cuda.is_bf16_supported()` counts emulation (lesson 04).
- `bnb_4bit_compute_dtype` = the AMP dtype, quant type `nf4`, double quant: no default is right.
- Load with `dtype=torch.float16`; skip `prepare_model_for_kbit_training`: it makes embeddings and
  head float32 ({upcast} more at the peak). With `use_reentrant=True` call
  `enable_input_require_grads()`.
- TRL makes adapters beside 4 bits bfloat16: `.float()` them before `train()` (lesson 07). Its
  `learning_rate` is 2e-5, a tenth of what adapters usually get. [TRL, sft_config.py]
- Adapters stay float32; no `fp16_full_eval` before training; unscale, then clip (lesson 05).
- No FlashAttention (elementwise Triton does run): where no mask is given, repeat key/value heads
  yourself (lesson 06).
- A search for the largest micro batch needs an optimizer step in it, full-length sequences, and
  cleans up *after* `except` (lesson 03).
- Divide the loss by `num_items_in_batch`, not by micro batches (lesson 03).
- Checkpointing forgets activations, not gradients; k of n layers spends what is left (lesson 02).
- Save to a temporary name, then rename; copy to Drive; resume from the last whole checkpoint.
- Two of them: DDP for speed, FSDP2 where weights are what is large; a process each (`torchrun`,
  `accelerate launch`). Or hide one before torch is imported (`CUDA_VISIBLE_DEVICES=0`): plain
  `python` doubles Trainer's batch (in 4 bits all of it on one card), and TRL refuses (lesson 08).

## What it bought

{bought}
"""


def table(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, ("---", *["---:"] * (len(head) - 1)), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def holders(f: Forecast) -> str:
    return show_bytes(f.composition["activations"])


def page() -> str:
    """The whole page as Markdown."""
    config, usual = models.config(USUAL.model), forecast(USUAL, T4)
    tokens = USUAL.micro_batch_size * USUAL.sequence_length
    chunked = dataclasses.replace(USUAL, loss="chunked", attention="explicit_kv")
    every, none = (
        forecast(dataclasses.replace(chunked, checkpointed_layers=k), T4) for k in ("all", 0)
    )
    upcast = forecast(dataclasses.replace(USUAL, kbit_upcast=True), T4)
    at_peak = usual.composition
    worlds = (USUAL, dataclasses.replace(USUAL, padded=True))
    in_chunks = tuple(dataclasses.replace(world, loss="lean") for world in worlds)
    ranked = [
        ("change", "saved: no mask", "padded", "speed: no mask", "padded"),
        both("loss in chunks and explicit K/V attention", worlds),
        both("explicit K/V attention, loss already in chunks", in_chunks),
    ]
    single = [{lever.change: lever for lever in levers(world, T4)} for world in worlds]
    for name, words in CHANGES.items():
        found = [of[name] for of in single]
        saved = (show_bytes(lever.saved_bytes) for lever in found)
        speed = (f"{lever.speedup:.1f}x" for lever in found)
        ranked.append((words or name, *saved, *speed))
    return TEMPLATE.format(
        example=f"Llama-3.1-8B, {USUAL.micro_batch_size} x {USUAL.sequence_length} tokens, rank "
        f"{USUAL.lora_rank} on q, k, v, o",
        t4=show_bytes(T4.total_bytes),
        weights=show_bytes(at_peak["weights"]),
        trainable=show_bytes(
            sum(
                max(usual.timeline[holder])
                for holder in ("adapters", "gradients", "optimizer state")
            )
        ),
        boundary=show_bytes(tokens * config.hidden_size * 2),
        checkpointed=holders(every),
        kept=holders(none),
        logits=show_bytes(tokens * config.vocab_size * 12),
        scores=show_bytes(
            USUAL.micro_batch_size * config.num_attention_heads * USUAL.sequence_length**2 * 4
        )
        + " each",
        ids=show_bytes(tokens * 8),
        levers=table(ranked),
        upcast=show_bytes(upcast.peak_allocated_bytes - usual.peak_allocated_bytes),
        bought=bought(),
    )


def both(name: str, worlds: tuple[TrainRecipe, ...]) -> tuple[str, ...]:
    """A row of what is won by having both levers that need each other where there is no mask."""
    saved, speed = [], []
    for world in worlds:
        changed = dataclasses.replace(world, loss="lean", attention="explicit_kv")
        before, after = forecast(world, T4), forecast(changed, T4)
        saved.append(show_bytes(before.peak_allocated_bytes - after.peak_allocated_bytes))
        faster = tokens_per_second(changed, after) / tokens_per_second(world, before)
        speed.append(f"{faster:.1f}x")
    return (name, *saved, *speed)


def bought() -> str:
    """The usual recipe and the levers, in both worlds: peak, verdict, measured peak, speed."""
    pairs = ladder.twins()

    def half(rung: ladder.Rung, first: ladder.Rung) -> tuple[str, str]:
        seen = rung.measured.get("peak_allocated_bytes")
        low, high = ladder.pace(rung)
        times = rung.ideal_tokens_per_second / first.ideal_tokens_per_second
        peak = f"{rung.forecast.peak_allocated_bytes / GIB:.2f}"
        measured = f" ({seen / GIB:.2f})" if seen else ""
        return f"{peak}{measured}, {rung.forecast.verdict}", f"{low:,.0f}-{high:,.0f}, {times:.1f}x"

    lines = [("each row keeps those above", "no mask: GiB", "tokens/s", "padded: GiB", "tokens/s")]
    for pair in pairs:
        first = pairs[0]
        no_mask, padded = half(pair.no_mask, first.no_mask), half(pair.padded, first.padded)
        lines.append((pair.name, *no_mask, *padded))
    seen = [row for pair in pairs for row in (pair.no_mask.measured, pair.padded.measured) if row]
    return (
        f"{table(lines)}\n\nForecast for a T4, speeds between what it sustains at "
        f"least and at most; in brackets\nmeasured: {recorded.stamp(seen)}."
    )


def main() -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    main()
