# %% [markdown]
# # 06 · What does the usual recipe waste?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/06_what_does_the_usual_recipe_waste.ipynb)
#
# **45 min** for those who have fine-tuned a transformer, 60 to 75 for others · runs anywhere; what
# says "measured" was recorded on a GPU.
#
# Lesson 05 left every part working, on a model that fits anywhere. Now the model has 8 billion
# weights, the card is a T4, the recipe is the one that the guides teach, and it runs out of memory.
# Whose memory is it? You will write the repair of the largest part yourself, see what each other
# change buys, and take the lines home.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *name* what a QLoRA step holds at its peak, and its attention's kernel | B1 | sections 1, 2 |
# | *write* a loss that never builds all logits, with an equal gradient | B2 | exercise 06.1 |
# | *choose* levers for a budget by what each one buys | B2 | exercise 06.2 |
#
# (B1: you can use it. B2: you can take it apart and build with it.)
#
# **Needs:** the four holders and the logits term (lesson 01), checkpoint, k of n layers and the
# three verdicts (02), token weighting (03). Each is in the [glossary](glossary.md) too.
# **New concepts (4):** padded and packed · grouped-query attention · loss in chunks · lever. Each
# is in the [glossary](glossary.md).

# %% [markdown]
# ## Set up
# On Colab, and on Kaggle with *Internet* on, this fetches the course and the one package that is
# missing there; elsewhere it does nothing. A second run changes nothing.

# %% tags=["setup"]
import os
import sys
if "course_utils" not in sys.modules:
    hosted = {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"} & set(os.environ)
    if hosted and not os.path.isdir("course"):
        os.system(f"{sys.executable} -m pip install -q --no-deps bitsandbytes==0.50.2 && "
                  "git clone -qb v0.1.0 https://github.com/course-authors/fit-the-fine-tune course")
    sys.path += [os.path.abspath("course"), os.path.abspath("..")]
from course_utils.topics.welcome import welcome
print(welcome())

# %% tags=["setup"]
from dataclasses import replace
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from course_utils import figures
from course_utils.exercises import lesson_06 as exercises
from course_utils.exercises.predictions import show_prediction
from course_utils.topics import ladder
from fitcast import T4, TrainRecipe, forecast, show_bytes

# %% [markdown]
# ## Five questions, before and after
# Five letters, `x` for "not yet".

# %% tags=["self-check"]
exercises.QUESTIONS

# %% tags=["self-check"]
before = ...  # for example "abcda"

# %% [markdown]
# ## 1 · Whose peak is it?
# *The usual recipe* is that of PEFT's guide, without its k-bit preparation, which costs more ("Go
# further"): a base in 4 bits (NF4, quantized twice), adapters of rank 16 on q, k, v and o with
# dropout 0.05, and, as in Hugging Face's own notebook, 8-bit paged Adam and float16. [PEFT,
# "Quantization"; Hugging Face, "4-bit QLoRA"] Every layer forgets (gradient checkpointing). The
# model is Llama-3.1-8B, the batch is ours: 4 rows of 2048 tokens.
#
# There are two worlds. Rows of different length are **padded** to the longest, and a *mask* hides
# the padding from attention. Rows that are **packed** (cut from one long text), of equal length, or
# alone need no mask, if nothing is filled up. Keep both in sight: it matters. Which is yours? Where
# `batch["attention_mask"].all()` is true, nothing is masked. (But TRL's `packing=True` has no such
# key: it keeps examples apart by their positions, from which a mask is made: for attention that is
# the padded world, in one long row; `packing_strategy="wrapped"` is what we call packed.) [TRL,
# sft_config.py; transformers, masking_utils.py]

# %% tags=["setup"]
no_mask = TrainRecipe(model="llama-3.1-8b", amp_dtype="float16", lora_rank=16, lora_dropout=0.05,
                      micro_batch_size=4, sequence_length=2048, checkpointed_layers="all")
padded = replace(no_mask, padded=True)

# %% [markdown]
# ### Predict
# The 4-bit weights take 5.32 GiB. How high is the peak of a training step, in GiB?

# %% tags=["predict"]
predicted_gib = ...

# %% tags=["run"]
from fitcast import GIB
steps = {"no mask": forecast(no_mask, T4), "padded": forecast(padded, T4)}
figure = figures.compare(steps, T4, "Llama-3.1-8B, 4 x 2048 tokens, the usual recipe")
where = f"it stands in {steps['padded'].peak_phase}, at {steps['padded'].peak_operation}"
logits = f"one float32 copy of the logits: {show_bytes(4 * 2048 * 128_256 * 4)}"
show_prediction(predicted_gib, show="{:.2f} GiB".format, also=[where, logits, figure],
                **{name: step.peak_allocated_bytes / GIB for name, step in steps.items()})

# %% [markdown]
# ### Explain
# A good quarter of the peak is weights; adapters, gradients and optimizer are dust. The peak stands
# where the loss goes backward, and three float32 copies of the **logits**, of 3.91 GiB each, stand
# there with it: more than twice the weights. (One waits for backward, so the figure books it with
# the activations.) The rest of the activations are what forgetting layers keep, 32 boundaries. (The
# line is at 14.42 GiB: of a T4's 14.56, CUDA's context takes the rest.) So there is one large thing
# to take away. First, though, one that is slow.

# %% [markdown]
# ## 2 · Attention: which kernel?
# Llama has **grouped-query attention**: 32 heads ask, but only 8 have keys and values, and four
# share one. Somebody must repeat those 8. With a mask, transformers does. Without one it leaves
# that to PyTorch's SDPA (`enable_gqa=True`). Three of its kernels matter here (cuDNN's needs a
# newer card):
#
# - *FlashAttention* takes groups, but does not run on a T4.
# - The *memory-efficient* one runs on a T4; it takes no groups.
# - *Math* runs on a T4 and takes groups, but writes out a score for each pair of tokens.
#
# [transformers, sdpa_attention.py; PyTorch, sdp_utils.cpp] The repair is to repeat first:

# %% tags=["run"]
def attention(query, key, value):  # (batch, heads, sequence, head width)
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)

query, key, value = torch.randn(1, 32, 64, 16), *torch.randn(2, 1, 8, 64, 16)
grouped = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
print("the same:", torch.allclose(attention(query, key, value), grouped, atol=1e-6))
print("all scores of a layer, float32:", show_bytes(4 * 32 * 2048**2 * 4))

# %% [markdown]
# ### Predict
# Repeating costs two tensors of the query's size. On a T4 with room enough, how many times as fast
# would the whole training step of the usual recipe be, without a mask? And padded? (Ten forecasts:
# the cell takes a minute or two.)

# %% tags=["predict"]
predicted_speedup = ...
predicted_speedup_padded = ...

# %% tags=["run"]
twins = ladder.twins()
for predicted, world in ((predicted_speedup, "no_mask"), (predicted_speedup_padded, "padded")):
    usual, repeated = (getattr(twin, world) for twin in twins[:2])
    faster = repeated.ideal_tokens_per_second / usual.ideal_tokens_per_second
    show_prediction(predicted, show="{:.1f} times".format, **{f"forecast, {world}": faster})

# %% [markdown]
# ### Explain
# Without a mask about twice as fast, padded not at all: there transformers had repeated already. (A
# row *alone* counts as "no mask": transformers drops one that hides nothing. Filled up to a
# `max_length` or a multiple of 8, it is padded.) So when somebody promises you twice the speed, ask
# for their batches. (And not a byte is saved, in either world: this peak is the logits'.)

# %% [markdown]
# ## 3 · The logits: never all at once
# The loss needs each row of logits only for a moment: its softmax, one number out of it, and the
# row may go. So take some rows at a time, a **loss in chunks**. What must not wait for backward
# must be forgotten, and that you have: `checkpoint` (lesson 02).
#
# ## Exercise 06.1 · A loss in chunks
# *Hard, 11 minutes.* Complete the function: the mean cross entropy over all positions whose label
# is not -100. `hidden` is (B, S, H), `labels` (B, S); `head(rows)` turns (n, H) into logits (n, V).
# The head is frozen. The check wants loss and gradient equal to those of the usual loss, to 1e-6,
# **and** no more than 6 MiB in use on top of what was there, where all logits are 8 MiB.
#
# <details><summary>Hint 1</summary>Position i predicts label i + 1, within its row: the last
# position of a row and the first label have no partner. Then flatten both.</details>
# <details><summary>Hint 2</summary>A chunk's share is a <em>sum</em> (<code>F.cross_entropy(...,
# reduction="sum")</code>); divide once, by the targets that are not -100. A plain loop would keep
# each chunk's logits for backward.</details>
# <details><summary>Hint 3</summary><code>rows = hidden[:, :-1].flatten(0, 1)</code>; in the loop
# <code>total + checkpoint(summed, chunk, wanted, use_reentrant=False)</code>, with
# <code>summed(chunk, wanted)</code>, a function that calls head and cross entropy.</details>

# %% tags=["exercise"]
def my_loss(hidden, head, labels, chunk_tokens):
    rows = ...     # (tokens, H): each position that predicts something
    targets = ...  # (tokens,): the label that it must predict
    total = ...
    for chunk, wanted in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        total = ...
    return ...

# %% tags=["check"]
exercises.check_chunked(my_loss)

# %% [markdown]
# Yours computes each chunk's logits twice. Where the head is frozen even that can go: the gradient
# of cross entropy is known as soon as the logits are (softmax minus one at the target), so take it
# at once. That is `loss="lean"` in this course, `fitcast.chunked_loss(..., lean=True)` in a script.
# With transformers' Trainer, or in a loop of your own, the logits are yours to take away.
#
# ### Predict
# Now *only* the loss is chunked, attention stays as it was. How high is the peak, in GiB, without a
# mask? And padded?

# %% tags=["predict"]
predicted_gib_no_mask = ...
predicted_gib_padded = ...

# %% tags=["run"]
chunked = {"no mask": forecast(replace(no_mask, loss="chunked"), T4),
           "padded": forecast(replace(padded, loss="chunked"), T4)}
figure = figures.compare(chunked, T4, "the usual recipe, and only the loss in chunks")
scores = sum(block.n_bytes == 2 * GIB for block in chunked["no mask"].largest)
half = forecast(replace(padded, micro_batch_size=2, gradient_accumulation_steps=2), T4)
halved = f"all logits, 2 rows at a time: {show_bytes(half.peak_allocated_bytes)}, {half.verdict}"
also = {"no mask": f"tensors of 2.00 GiB: {scores}", "padded": [halved, figure]}
for predicted, (name, step) in zip((predicted_gib_no_mask, predicted_gib_padded),
                                   chunked.items(), strict=True):
    show_prediction(predicted, show="{:.2f} GiB".format, also=also[name],
                    **{name: step.peak_allocated_bytes / GIB})

# %% [markdown]
# ### Explain
# Padded, the run fits: one change, and nothing else was needed. (Halve the micro batch instead, and
# accumulate? 12.40 GiB, *tight*, and nearly half of it still logits. The loss in chunks takes that
# half away; section 5 spends what is free.)
#
# Without a mask there is a second summit behind the first, attention's scores: 2.00 GiB a copy, and
# one layer's backward holds four. At this micro batch, then, two changes are needed and neither is
# enough alone. Take the highest one, look again: the peak is a *moment*, not a sum. (TRL's
# SFTTrainer takes the loss in chunks by itself, from 1.16 on: your peaks are then about these.
# Padded, it fits already, and sections 4 and 5 gain some speed; without a mask section 2's repair
# makes it fit, and faster.)

# %% [markdown]
# ## 4 · What each lever buys
# A **lever** is a change that leaves loss and gradient as they were, up to rounding, and moves
# bytes or time. There are more: PyTorch's own RMSNorm, leaner pieces of code ("Go further"),
# checkpoints in the host's memory. And one change is none by this definition, and counted here: no
# adapter dropout, which regularizes.
#
# ### Predict
# Padded rows. How many times as fast as the usual recipe is the step with the two levers so far,
# PyTorch's RMSNorm, lean pieces and no dropout?

# %% tags=["predict"]
predicted_all_levers = ...

# %% tags=["run"]
usual, lean = twins[0].padded, twins[3].padded
faster = lean.ideal_tokens_per_second / usual.ideal_tokens_per_second
figure = figures.two_worlds(twins, T4, "Llama-3.1-8B, 4 x 2048; each row keeps those above")
show_prediction(predicted_all_levers, show="{:.1f} times".format, forecast=faster,
                also=[figure, ladder.peaks(twins), ladder.speeds(twins)])

# %% [markdown]
# ### Explain
# Padded, the levers bring the run from "does not fit" to "fits" and little speed; without a mask,
# both. Forecast and measured bytes agree to a hundredth of a GiB. Speeds are ranges, since a T4's
# cooling and power cap decide: the forecast takes what T4s were seen to sustain, the measured ones
# are a larger card's with a T4's kernels and without its memory limit, and only their ratios carry
# over, roughly. Host checkpoints buy the last GiBs and trade the bus for it: when you need them.

# %% [markdown]
# ## 5 · Memory that is left
# Nine GiB of fourteen: is that better than fourteen? Memory that is left over is often speed that
# was not bought. Spend it on layers that need not forget (k of n, lesson 02), smaller micro batches
# if need be. `fitcast fit` tries what counts, one forecast each, and names what should be the
# fastest. Recorded within a T4's memory, 8 sequences of 2048 behind each step: all without a mask
# (padded rows were not recorded here), with every lever except checkpoints on the host, and a lean
# MLP (hence 8.99 GiB, not 9.16). The last column is times the usual recipe's speed. First, every
# layer forgets:

# %% tags=["run"]
print(ladder.table(ladder.rungs("fit", ["micro batch 4, all layers checkpointed"])))

# %% [markdown]
# ### Predict
# And with the memory spent: how many times the usual recipe's speed has the fastest, on the larger
# card?

# %% tags=["predict"]
predicted_spent = ...

# %% tags=["run"]
spent, base = ladder.fastest("fit", 1)[0].measured, ladder.usual("llama-3.1-8b").measured
faster = spent["tokens_per_second"] / base["tokens_per_second"]
show_prediction(predicted_spent, show="{:.2f} times".format, measured=faster)

# %% [markdown]
# The four fastest:

# %% tags=["run"]
print(ladder.table(ladder.fastest("fit", 4)))

# %% [markdown]
# A seventh more speed, for memory that lay idle: little beside the 2.5 times that the levers bought
# without a mask. Padded they bought 1.1 times (section 4), so there this may be as much again.
# (13.16 GiB *fits* where section 3's 12.40 was *tight*: the verdict counts the allocator's gaps,
# and these recipes leave fewer. And lesson 02's 8B at 1 x 2048 did *not* fit with nothing
# forgotten: the levers took the scores and the logits.)
#
# ("What fit picks" is what it picked on that day; today it picks the first row's setting, with more
# levers.) Ask it yourself if you like, a minute or two, in a terminal (on Colab and Kaggle first
# the install of "In your script", then `!` before it): `fitcast fit --model llama-3.1-8b
# --sequence-length 2048
# --target-effective-batch 8 --lora-dropout 0`; `--padded` for padded rows.
#
# A small model makes it plain. Llama-3.2-1B, 8 padded rows of 512 tokens, with the levers: should
# its layers forget? And how many times the work is a step in which all do?

# %% tags=["run"]
levers = dict(attention="explicit_kv", loss="lean", norm="native", lora_dropout=0.0)
small = replace(padded, model="llama-3.2-1b", micro_batch_size=8, sequence_length=512, **levers)
every, none = (forecast(replace(small, checkpointed_layers=k), T4) for k in ("all", 0))
for name, step in {"all layers forget": every, "no layer forgets": none}.items():
    print(f"{name}: {show_bytes(step.peak_allocated_bytes)}, {step.verdict}, "
          f"{step.flops / 1e12:.1f} TFLOP a step")
print(f"forgetting: {every.flops / none.flops:.1f} times the work")

# %% [markdown]
# No: it fits either way, and 1.3 times the work would be paid for nothing. Move the levers
# (mouse, or Tab and the arrow keys). **Task:** 8B, set to padded, `loss` full. Which of the other
# levers makes it fit at 4 x 2048?
# <details><summary>Answer</summary>None: the logits stand at the
# peak whatever else you pull, and the rank moves megabytes.</details>

# %% tags=["run"]
figures.levers_explorer()

# %% [markdown]
# ## Exercise 06.2 · Phi-4-mini in 6 GiB
# *Medium, 4 minutes.* Phi-4-mini, 32 packed sequences of 2048 tokens a step: the usual recipe does
# not fit a T4. Write one that learns **the same** (dropout may go), peaks at 6 GiB or less, and is
# at least **twice** as fast, both by forecast. One lever is not enough. Then say: were the rows
# padded, which of yours would do nothing for speed?
# <details><summary>Answer</summary>The attention: with a mask, transformers repeats already.
# </details>
#
# <details><summary>Hint 1</summary>Which term is the largest at the peak? It need not exist at
# once.</details>
# <details><summary>Hint 2</summary>Without a mask, speed hangs on the attention kernel.</details>
# <details><summary>Hint 3</summary>Two are enough: <code>replace(exercises.PHI, attention=...,
# loss=...)</code>, with values as in section 5's <code>levers</code>.</details>

# %% tags=["exercise"]
phi_recipe = ...  # replace(exercises.PHI, ...)

# %% tags=["check"]
exercises.check_phi(phi_recipe)

# %% [markdown]
# And yours? Print `batch["attention_mask"].all()` of your own run, then say which two levers you
# would pull first, and why.
# <details><summary>On a T4</summary>If the logits, tokens of a micro batch x vocabulary x 12 bytes,
# are your largest term: the loss in chunks (TRL from 1.16 on has done it). Then, `True`: section
# 2's kernel, where heads are grouped; `False`, or no such key (TRL's `packing=True`): what section
# 5 buys with the memory. (On a card from 8.0 on FlashAttention takes groups: expect nothing from
# that kernel; the logits stay.)</details>
#
# ## In your script
# Two lines, on TRL's own trainer; `apply_levers` says what it changed and what it left, and why; it
# takes `checkpointed_layers=18`, too (section 5). With transformers' Trainer it puts the loss in
# chunks as well; TRL (1.16 on) has done that already: what you gain there is section 2's kernel
# where nothing is masked, and otherwise a tenth or so (section 4). (Where `trl` or `fitcast` is
# missing, as on Colab: `!pip install trl git+https://github.com/course-authors/fit-the-fine-tune`,
# and `!pip uninstall -qy torchao`, which is too old for PEFT there.)
#
# ```python
# import os
# os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # before torch: TRL refuses two cards in one process
# import torch
# from datasets import Dataset
# from peft import LoraConfig
# from transformers import AutoModelForCausalLM
# from trl import SFTConfig, SFTTrainer
#
# import fitcast
#
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.float32)
# rows = Dataset.from_list([{"text": "A row of your own text. " * 20}] * 8)
# arguments = SFTConfig("out", max_steps=2, per_device_train_batch_size=2, max_length=128,
#                       bf16=False, fp16=torch.cuda.is_available())  # bf16 is TRL's default
# adapters = LoraConfig(target_modules=["q_proj", "v_proj"])
# trainer = SFTTrainer(model, arguments, train_dataset=rows, peft_config=adapters)
# for weight in filter(lambda weight: weight.requires_grad, trainer.model.parameters()):
#     weight.data = weight.data.float()  # beside 4 bits TRL makes it bfloat16, where fp16 stops
# print(fitcast.apply_levers(trainer.model))
# trainer.train()
#
# base = trainer.model.get_base_model()  # and in a loop of your own, without a trainer:
# ids = torch.arange(64, device=base.device).view(1, 64)
# loss = fitcast.chunked_loss(base.model(ids).last_hidden_state, base.lm_head, labels=ids)
# print(f"in chunks {loss:.2f}, the model's own {base.eval()(ids, labels=ids).loss:.2f}")
# ```
#
# What `apply_levers` says of this model, a lever a line: `attention: explicit_kv`, `norm: native`,
# `mlp: lean`, `adapters: lean`, `rotary: lean`, and `loss: TRL's own where its trainer asks for it,
# else lean where the head is frozen, else chunked`.
#
# ## And now?
# The same five questions.

# %% tags=["self-check"]
after = ...

# %% tags=["self-check"]
exercises.QUESTIONS.score(before, after)

# %% [markdown]
# ## To lesson 07
# The run fits a T4. Does it learn something, can it be trusted, and what do you take home? Lesson
# 07: your model, your data, the whole run.

# %% [markdown]
# ## Go further (optional)
# Everything from here on is beyond the 45 minutes: take what you like.
#
# ### The usual recipe, line by line
# Each argument goes to the versions that you have, each habit to the forecast, for the run of
# section 1 without a mask. How many of the thirteen lines just work, would you say?

# %% tags=["run"]
from course_utils.topics import usual_recipe
lines = usual_recipe.judge(no_mask)
print(*lines, sep="\n")
print(sum(line.verdict == "works" for line in lines), "of", len(lines), "just work")

# %% [markdown]
# *Refused* lines fail at construction, which is the friendly way. (transformers 5.23 renames
# `gradient_checkpointing`; with 5.15, as on Colab, one line more just works.) Those that are
# accepted cost more: k-bit "preparation" makes embeddings and head float32, then every layer's
# boundary with them. A compute dtype that is not autocast's casts every weight at every use. And
# *paged* Adam: CUDA may move its state to the host, but bitsandbytes pages tensors of 100 000
# elements or more only, and at rank 16 on q, k, v, o not one matrix of an 8B model has as many.
# [bitsandbytes, optim/optimizer.py]
#
# ### The lean pieces, one by one
# Measured, no mask; from *the usual recipe* down each row keeps those above (the first two ran
# within a T4's memory):

# %% tags=["recorded"]
from course_utils.topics import recorded
recorded.show("ladder", lambda row: f"{row['name']:32}" + (
    f"{show_bytes(row['peak_allocated_bytes']):>10}{row['tokens_per_second']:>8,.0f} tokens/s"
    if row["peak_allocated_bytes"] else row["outcome"]))

# %% [markdown]
# *Loss with its gradient* multiplies by the head once, not twice. *Adapters in one product* and
# *lean rotary embedding* make fewer trips of the same numbers through memory. *Lean MLP* keeps one
# wide tensor less in the layer that is being computed, for a little time. Each is a short function
# with its reasons: `fitcast/step/lean.py`.
#
# ### Long rows
# At long lengths the widest tensors are the MLP's. It treats each token alone, so it can be
# computed in *tiles* of tokens, each again in backward. One row of 16 384 tokens, levers pulled:

# %% tags=["run"]
long = replace(no_mask, micro_batch_size=1, sequence_length=16_384, mlp="lean", adapters="lean",
               rotary="lean", **levers)
for tile in (None, 2048):
    step = forecast(replace(long, mlp_tile_tokens=tile), T4)
    print(f"tiles of {tile} tokens: {show_bytes(step.peak_allocated_bytes)}, {step.verdict}")

# %% [markdown]
# ### For those who struggle
# Two rows of logits, three words, targets 0 and 2, logits (2, 0, 0) and (0, 0, 1). The loss of a
# row is log(sum of exp) minus the target's logit: 2.24 - 2 = 0.24 and 1.55 - 1 = 0.55. Their mean
# is 0.40. In chunks of one row: 0.24, forget the row; + 0.55, forget the row; divide by 2. Two
# numbers had to stay, not six.

# %% tags=["run"]
logits = torch.tensor([[2.0, 0, 0], [0, 0, 1]])
print(F.cross_entropy(logits, torch.tensor([0, 2]), reduction="none").tolist())

# %% [markdown]
# ### Open questions
# - With the gradient taken at once (`lean=True`), forward does backward's work. What must a
#   `no_grad` evaluation do? (`fitcast/step/lean.py` answers.)
# - Sweep `loss_chunk_tokens` from 64 to 8192 by forecast, peak and `flops`. When do larger chunks
#   stop being worth their bytes?
#
# ### Try with AI
# > I fine-tune Llama-3.1-8B with QLoRA on a T4: 4-bit base, gradient checkpointing, batch 4,
# > sequence length 2048, gradient accumulation 8. CUDA out of memory. Name the largest holders at
# > the peak in GiB, and the order in which you would change settings.
#
# A right answer asks whether rows are padded, names the logits before the weights, and does not
# start with the rank. What single changes save, padded:

# %% tags=["run"]
changes = {"rank 8": dict(lora_rank=8), "sequence 1024": dict(sequence_length=1024),
           "micro batch 2, accumulated": dict(micro_batch_size=2, gradient_accumulation_steps=2),
           "loss in chunks": dict(loss="chunked")}
for name, change in changes.items():
    step = forecast(replace(padded, **change), T4)
    saved = steps["padded"].peak_allocated_bytes - step.peak_allocated_bytes
    print(f"{name:27}saves {show_bytes(saved):>9}: {show_bytes(step.peak_allocated_bytes)}, "
          f"reserved up to {show_bytes(step.unlimited_reserved_bytes[1])}, {step.verdict}")

# %% [markdown]
# *Tight* with a peak of 12.35 GiB: the gaps are in what is *reserved*. Section 5's recipes leave
# fewer by `expandable_segments=True`.

# %% [markdown]
# ## What this lesson left out
# Kernels of one's own (Triton, Liger, Unsloth's), `torch.compile` (`fitcast fit` may pick it),
# attention with a sliding window, models whose head is trained.
#
# ## Sources
# - PEFT, [Quantization](https://huggingface.co/docs/peft/developer_guides/quantization), and
#   Hugging Face, [4-bit QLoRA](https://huggingface.co/blog/4bit-transformers-bitsandbytes) with its
#   notebook: the usual recipe
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314), sections 2 to 4
# - Ainslie et al. 2023, [GQA](https://arxiv.org/abs/2305.13245): why heads share keys and values
# - PyTorch,
#   [sdp_utils.cpp](https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp):
#   which attention kernel runs, and why
# - transformers,
#   [sdpa_attention.py](https://github.com/huggingface/transformers/blob/main/src/transformers/integrations/sdpa_attention.py):
#   `use_gqa_in_sdpa`
# - Wijmans et al. 2024, [Cut your losses](https://arxiv.org/abs/2411.09009): a kernel that never
#   writes the logits to memory at all
#
# New terms are in the [glossary](glossary.md).
