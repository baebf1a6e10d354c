# %% [markdown]
# # 02 · What if we forget on purpose?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/02_what_if_we_forget_on_purpose.ipynb)
#
# **45 min** for those who have fine-tuned a transformer and written an `autograd.Function`, 55 for
# those who have not written one, 60 to 75 for others; a place to stop comes after some 25 minutes
# (others: 40) · runs anywhere; a GPU fills in the lines that say "measured".
#
# Lesson 01 found who had the memory: each layer keeps some seventeen times its boundary, the tensor
# that it hands to the next layer, until backward comes by. **Gradient checkpointing** keeps the
# boundary, forgets the rest, and computes it again. What does that save, and what does it cost?
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *trace* by hand what a checkpointed chain holds and computes twice | B1 | exercise 02.1 |
# | *write* a checkpoint function: equal gradients, fewer bytes | B2 | exercise 02.2 |
# | *test* what forgetting saves and costs against a count | B2 | sections 3, 4 |
# | *choose* how many layers forget on a T4 | B2 | section 5, roughly; exactly: 02.3 (Go further) |
#
# (B1: you can use it. B2: you can take it apart and build with it.)
#
# **Needs:** the four holders, layer boundary (lesson 01; or read its two entries in the glossary).
# **New concepts (5):** checkpoint · recomputation · segment · QLoRA · k of n layers. Each is
# in the [glossary](glossary.md).

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
import time
import warnings
from dataclasses import replace
from functools import partial
import torch
from torch.utils.checkpoint import checkpoint
from course_utils import figures
from course_utils.exercises import lesson_02 as exercises
from course_utils.exercises.predictions import show_prediction
from course_utils.topics import checkpointing
from fitcast import MemoryLedger, TrainRecipe, forecast, gpus

# %% tags=["setup"]
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
print(gpus.describe(gpus.detect()))

# %% [markdown]
# ## Five questions, before and after
# Five letters, `x` for "not yet".

# %% tags=["self-check"]
exercises.QUESTIONS

# %% tags=["self-check"]
before = ...  # for example "abcda"

# %% [markdown]
# ## 1 · A chain of six, by hand
# Six steps, one after the other. Step *i* turns its input aᵢ into the next one, and its backward
# needs aᵢ again. (In lesson 01 aᵢ was all that layer *i* keeps; here it is one tensor.) The usual
# way: keep all six. The other way: keep a₁, a₃ and a₅. When backward wants to pass step 6, a₆ is
# gone; a₅ is not, so run step 5 once more. a₃ leads to a₄ in the same way, a₁ to a₂. Either way, an
# input is freed as soon as its own backward step is through.
#
# ## Exercise 02.1 · Two traces
# *Easy, 5 minutes.* Take a pencil. How many inputs are in memory *while* backward runs step 6,
# then 5, 4, 3, 2, 1? One list for "keep all", one for "keep a₁, a₃, a₅". Count an input that was
# computed again too.
#
# <details><summary>Hint 1</summary>Keep all: while backward runs step 6 all six are there. Then a₆
# is freed.</details>
# <details><summary>Hint 2</summary>Keep a₁, a₃, a₅: step 6 needs a₆, so a₁, a₃, a₅ and a₆ are
# there: 4. Step 5 needs a₅, which was kept: a₁, a₃, a₅.</details>
# <details><summary>Hint 3</summary>Step 4 needs a₄, which is gone; a₃ is there, so step 3 is run
# once more.</details>

# %% tags=["exercise"]
keep_all = ...  # six numbers, for example [6, 6, 6, 6, 6, 6]
keep_135 = ...

# %% tags=["check"]
exercises.check_traces({"keep_all": keep_all, "keep_135": keep_135})

# %% [markdown]
# Your counts beside those of a chain that is run:

# %% tags=["run"]
exercises.draw_traces(keep_all, keep_135)

# %% [markdown]
# ### Predict
# Does forward run twice then? Plain training of this chain runs 6 forward steps. How many are run
# when only a₁, a₃ and a₅ are kept?

# %% tags=["predict"]
predicted_steps = ...

# %% tags=["run"]
traces = {"keep a1 to a6": checkpointing.trace_chain(6, kept=range(1, 7)),
          "keep a1, a3, a5": checkpointing.trace_chain(6, kept=[1, 3, 5])}
runs = {name: sum("forward" in moment.action for moment in trace) for name, trace in traces.items()}
show_prediction(predicted_steps, show="{} forward steps".format, counted=runs["keep a1, a3, a5"],
                also=figures.chains(traces, steps=6))

# %% [markdown]
# ### Explain
# Not twice: the last step of a **segment** (here: two steps that share one kept input) is not
# repeated, because nobody asks for its output. What is kept is a **checkpoint**, an *activation*
# and no gradient; running a stretch again is **recomputation**. [Chen et al. 2016, section 3]

# %% [markdown]
# ## 2 · Write one
# Once written, it is no magic.
#
# ## Exercise 02.2 · A checkpoint of your own
# *Hard, 12 minutes* (20, if you never saw an `autograd.Function`). `Forget.apply(function, x)` is
# `function(x)`, but nothing that the function computes waits for backward, only its input `x`.
# Write both methods. What an `autograd.Function` gives you: inside both methods no graph
# (autograd's record of what was computed) is built, so nothing else is kept. `ctx` is an object
# that both share: `ctx.save_for_backward(x)` keeps a tensor, `(x,) = ctx.saved_tensors` is it
# again, `ctx.anything = ...` keeps any object. `grad` is the gradient of your output; return one
# gradient for each argument of `forward`, `None` for those that have none. (Hints are there to be
# opened.) The check wants gradients equal **to the bit**, **and** no more bytes waiting for
# backward than `x`.
#
# <details><summary>Hint 1</summary>Forward keeps the function and <code>x</code>. Backward runs the
# function once more, this time with a graph, and then backward through that graph.</details>
# <details><summary>Hint 2</summary>Inside <code>backward</code> autograd is off:
# <code>torch.enable_grad()</code>. The second run must not reach into the first graph:
# <code>detach()</code> its input, then <code>requires_grad_()</code>.</details>
# <details><summary>Hint 3</summary><code>output = ctx.function(x)</code>, then
# <code>output.backward(grad)</code>: it gives the weights their gradients, and
# <code>x.grad</code> is what you return.</details>

# %% tags=["exercise"]
class Forget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        ...

    @staticmethod
    def backward(ctx, grad):
        ...

# %% tags=["check"]
exercises.check_forget(Forget.apply)

# %% [markdown]
# PyTorch's own, `torch.utils.checkpoint.checkpoint`, also replays the random numbers, so that
# dropout drops the same elements again. With `use_reentrant=True` it is your class;
# `use_reentrant=False` is the one to use (why: Go further), and stops as soon as backward has what
# it asked for (section 1's last step), where your class runs on to the end. [PyTorch:
# torch.utils.checkpoint]
#
# *A good place to stop. When you come back: run all cells above, then go on.*

# %% [markdown]
# ## 3 · On a real model
# transformers has a switch, `gradient_checkpointing_enable` (transformers 5.23 renames it
# `activation_checkpointing_enable`; the old name, which older versions know too, still works,
# warns, and goes in v6. This notebook hides the warning.) The small Llama of lesson 01, all weights
# trained, 4 sequences of 128 tokens; what waits for backward after a forward pass?

# %% tags=["setup"]
from course_utils.exercises.lesson_01 import FULL as recipe  # all weights, Adam, float32
from fitcast import show_bytes
from fitcast.step import qlora
ids = torch.arange(4 * 128, device=gpus.device()).view(4, 128)

# %% tags=["run"]
def kept_for_backward(model):
    with MemoryLedger(model, inputs=ids) as ledger:
        model(input_ids=ids, labels=ids, use_cache=False)
    return ledger.report().saved_activation_bytes

model = qlora.load_base(recipe)  # as `from_pretrained` gives it, in float32
everything = kept_for_backward(model)
model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
print(f"switched on:         {kept_for_backward(model) / everything:.2f} of before")
model.train()
print(f"after model.train(): {kept_for_backward(model) / everything:.2f} of before")

# %% [markdown]
# At first nothing happened! `from_pretrained` returns a model in evaluation mode, and a layer
# forgets only in training mode. (Trainer calls `model.train()`; your own loop must.)
#
# ### Predict
# Whole training steps, as in lesson 01: two, with the optimizer. The activations' own highest point
# falls to which fraction, when all four layers forget? (Everything kept: four layers with some 17
# boundaries each. Forgetting: four boundaries, and one layer at a time.)

# %% tags=["predict"]
predicted_fraction = ...

# %% tags=["setup"]
def build(recipe):
    torch.manual_seed(recipe.seed)
    model = qlora.add_adapters(qlora.load_base(recipe), recipe)
    return qlora.apply_levers(model, recipe).train()

# %% tags=["setup"]
def two_steps(recipe):
    before, model = gpus.reset_peak(), build(recipe)
    optimizer = qlora.build_optimizer(model, recipe)
    with MemoryLedger(model, inputs=ids) as ledger:
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    return ledger.report(), gpus.peak_allocated_bytes(above=before)

# %% tags=["run"]
build(recipe)(input_ids=ids, labels=ids).loss.backward()  # first, a GPU takes its work space
plain, plain_measured = two_steps(recipe)
forgetful, measured = two_steps(replace(recipe, checkpointed_layers="all"))
ours, theirs = (max(report.timeline["activations"]) for report in (forgetful, plain))
measured = (f"the whole step's peak: {forgetful.peak_bytes / plain.peak_bytes:.0%}; "
            f"measured: {show_bytes(plain_measured)} -> {show_bytes(measured)}")
show_prediction(predicted_fraction, show="{:.0%}".format, counted=ours / theirs, also=[
    measured, figures.memory_over_time(plain, "two training steps, everything kept"),
    figures.memory_over_time(forgetful, "two training steps, every layer forgets")])

# %% [markdown]
# ### Explain
# Forward hardly climbs: only boundaries stay, and the logits at its end. In backward each layer
# comes back for a moment (one tooth of the saw), and is gone again. So the activations have two
# summits. At the end of forward: *all boundaries plus the logits*, which no layer owns (the share
# after `model.train()` above). At the first tooth, the logits gone: *all boundaries plus one whole
# layer*, which is more here; with a large vocabulary the logits are more. The dot, the peak of the
# whole step, stands on the last tooth: fewer boundaries are left there, but the other layers'
# gradients have come. (The two pictures differ in scale: compare the numbers at their dots.) The
# hint alone gives 21 of 68; the layer's own input is counted twice there, and the run that keeps
# all has logits and the last norm, too. Both shares belong to *four layers*: the more layers, the
# smaller.

# %% [markdown]
# ## 4 · What does it cost?
# "Only 30 percent additional running time cost", says the paper that made checkpoints known. [Chen
# et al. 2016, abstract] Time depends on the machine, work does not. Backward's is about twice
# forward's: one product for the inputs' gradients, one for the weights'. With LoRA the weights are
# frozen, and the second product falls away.
#
# ### Predict
# How much *more* work is a step in which every layer forgets, in percent of the step that keeps
# everything? All weights trained, and LoRA.

# %% tags=["predict"]
predicted_more_full = ...
predicted_more_lora = ...

# %% tags=["run"]
def work(recipe):
    model = build(recipe)
    with checkpointing.WorkCounter() as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.flops

for name, predicted, rank in (("all weights", predicted_more_full, None),
                              ("LoRA", predicted_more_lora, 16)):
    keeps, forgets = (work(replace(recipe, lora_rank=rank, checkpointed_layers=k))
                      for k in (0, "all"))
    show_prediction(predicted, show="+{:.0f} %".format,
                    **{f"counted, {name}": 100 * (forgets / keeps - 1)})

# %% [markdown]
# ### Explain
# All of forward again: that is one part of three (backward is two), a third more; with LoRA one of
# two, a half more. But not all of it is run again:
#
# | of this small model's forward | share |
# |---|---|
# | all | 1 |
# | output head, none of the layers | − 1/7 |
# | each layer's last product, the "last step" of section 1 | − 0.17 (a little over 1/6) |
# | run again | 0.69 |
# | a third of that (all weights), a half (LoRA) | 0.23, 0.34 |
#
# Counted (on a CPU) are 22 % and 32 %, because backward is a little more than two forwards, or one.
# Other models have other shares of head and last product: count yours.

# %% [markdown]
# ## 5 · When is it needed, and how much of it?
# From which size on does a T4 need it: 1B, 3B, 8B? See whether size alone can say. Three verdicts:
# **fits**, the forecast's upper bound lies within the card; **tight**, it runs if the allocator is
# lucky with the gaps between its pieces; **does not fit**.
#
# ### Predict
# One sequence of 2048 tokens, and one of 512. Llama-3.2-1B and Llama-3.1-8B, by **QLoRA**: the
# frozen base in 4 bits, adapters beside it (its settings: lesson 07). *Which* of these four do not
# fit on a T4 when no layer forgets? `forecast` runs the step on tensors without numbers, as a T4
# would.

# %% tags=["predict"]
predicted_cases = ...  # for example {"1B, 512", "8B, 2048"}

# %% tags=["run"]
usual = TrainRecipe(model="llama-3.1-8b", amp_dtype="float16")
sizes = {"1B": "llama-3.2-1b", "8B": "llama-3.1-8b"}
cases = {f"{size}, {length}: {name}": forecast(replace(
             usual, model=sizes[size], sequence_length=length, checkpointed_layers=k), gpus.T4)
         for size in sizes for length in (512, 2048)
         for name, k in (("kept", 0), ("forgets", "all"))}
needs = {name.removesuffix(": kept") for name, step in cases.items()
         if "kept" in name and step.verdict == "does not fit"}
show_prediction(predicted_cases, forecast=needs,
                also=figures.compare(cases, gpus.T4, "Peak of a QLoRA step by model and tokens"))

# %% [markdown]
# ### Explain
# On a T4, one sequence at a time, the 8B model does without it at 512 tokens; the 1B model, with
# the usual attention, needs it at 2048. What forgetting saves are activations, and they follow
# micro batch, *length*, and the layers' width and number. Length counts most: for Llama 3 without a
# mask (one row alone needs none), a T4's kernel keeps the scores of every pair: four times the
# tokens, and in the 1B model 12.51 GiB of activations in place of 1.63. (Lesson 06 mends that
# kernel, and with it nothing need forget here.) So the 1B model has room for these 2048 tokens as
# 4 x 512 or 2 x 1024, and not as 1 x 2048:

# %% tags=["run"]
for rows in (4, 2, 1):
    same_tokens = replace(usual, model=sizes["1B"], micro_batch_size=rows,
                          sequence_length=2048 // rows, checkpointed_layers=0)
    step = forecast(same_tokens, gpus.T4)
    print(f"{rows} x {2048 // rows:4}: {show_bytes(step.peak_allocated_bytes)}, {step.verdict}")

# %% [markdown]
# If a T4 has room to spare with every layer forgetting, that room is speed not bought. Let only the
# first *k* of *n* layers forget (**k of n layers**): each of the others costs the same memory and
# saves its second forward. The *first* ones, because backward frees what the last ones had kept
# before it comes to them (Go further counts it). Where the peak is at the logits, as with Llama 3
# above, either choice holds nearly the same; the first are no worse. It is one attribute of the
# layers that remember, `layer.gradient_checkpointing = False`, set after the switch: the script
# below does it.
#
# Move the controls (with the mouse, or Tab and the arrow keys). **Task:** Llama-3.2-3B on a T4,
# micro batch 1. Which share of the layers must forget at 2048 tokens? And at 1024? What does each
# layer that remembers cost at 2048?
# <details><summary>Answer</summary>Of the control's choices three quarters: with half of them the
# tensors alone are too many for the card. At 1024 tokens none: the upper bar says "fits". A layer
# costs <code>(23.53 - 5.45) / 28 = 0.65</code> GiB. So for any number: leave 2 of the 14 GiB for
# gaps; 12 less 5.45 is room for ten layers that remember, and 18 must forget.</details>

# %% tags=["run"]
figures.forgetting_explorer()

# %% [markdown]
# ## In your script
# The switch, pulled by hand, so that some layers can remember (Trainer's own,
# `gradient_checkpointing=True`, turns on all of them when training begins.) And the line that every
# loop with adapters should have once: does *each* trained tensor get a gradient? (Lesson 01's
# model: a download of 1 GB if you skipped it [Qwen2.5-0.5B].) You should see 12 layers and an empty
# list. (`use_cache = False`, since a layer that runs twice would fill the cache twice.) On Colab,
# `!pip uninstall -qy torchao` before: PEFT refuses the old one there.
#
# ```python
# import torch
# from peft import LoraConfig, get_peft_model
# from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
#
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.float32)
# model.config.use_cache = False
# model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
# model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
# for layer in (layers := model.get_base_model().model.layers)[12:]:  # the first 12 of 24 forget
#     layer.gradient_checkpointing = False
# rows = [{"input_ids": list(range(128)), "labels": list(range(128))}] * 8
# arguments = TrainingArguments("out", max_steps=2, per_device_train_batch_size=2,
#                               report_to="none", save_strategy="no")
# trainer = Trainer(model, arguments, train_dataset=rows)
# trainer.train()
# batch = {name: torch.tensor([row], device=model.device) for name, row in rows[0].items()}
# model(**batch).loss.backward()
# missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
# print(sum(x.gradient_checkpointing for x in layers), "layers forget; no gradient ([]?):", missing)
# ```
#
# (In transformers 5.23 Trainer's switch is `activation_checkpointing=True`, and takes every n-th
# layer with `activation_checkpointing_kwargs={"every_n_layers": 2}`; "the first k" needs the loop.)
#
# And your own model, *by QLoRA, as in section 5*? Guess the verdict with k = 0 and with k = "all",
# and the k that you would set; then ask, in a cell here:
#
# ```python
# forecast(replace(usual, model="Qwen/Qwen2.5-0.5B", sequence_length=2048,
#                  checkpointed_layers=0), gpus.T4).verdict
# ```
#
# ## And now?
# The same five questions.

# %% tags=["self-check"]
after = ...

# %% tags=["self-check"]
exercises.QUESTIONS.score(before, after)

# %% [markdown]
# ## To lesson 03
# With every layer forgetting, a T4 takes two sequences of 2048 tokens at a time of Llama-3.2-3B by
# QLoRA; a third is *tight* (`forecast` says so). The recipe that you copied says "batch size 32".
# Is training on two at a time, often enough, the same? Lesson 03 asks: how big is my batch, really?

# %% [markdown]
# ## Go further (optional)
# Everything from here on is beyond the 45 minutes: take what you like.

# %% [markdown]
# ## Exercise 02.3 · The smallest k
# *Medium, 6 minutes.* Llama-3.1-8B, one sequence of 1024 tokens, on a T4. Leave two and a half GiB
# to the gaps between the allocator's pieces: 12 GiB for tensors. What is the smallest number of
# layers, of 32, that must forget? Two forecasts are enough to know. The check forecasts your
# answer, and one less.

# %% tags=["run"]
eight = replace(usual, sequence_length=1024)
budget_bytes = 12 * 2**30
for k in (32, 24):
    step = forecast(replace(eight, checkpointed_layers=k), gpus.T4)
    print(f"k = {k}: {show_bytes(step.peak_allocated_bytes)}")

# %% [markdown]
# <details><summary>Hint 1</summary>The line is straight. What does each layer cost that
# remembers?</details>
# <details><summary>Hint 2</summary>The difference of the two forecasts, divided by 8. How many of
# these fit between the forecast for k = 32 and 12 GiB?</details>
# <details><summary>Hint 3</summary>That many layers can remember, rounded down; the other ones, 32
# minus that, must forget.</details>

# %% tags=["exercise"]
smallest_k = ...

# %% tags=["check"]
exercises.check_smallest_k(smallest_k, eight, gpus.T4, budget_bytes)

# %% [markdown]
# ### The first or the last?
# Two of our small model's four layers forget. Which two? The peak of forward and backward:

# %% tags=["run"]
from fitcast.step.levers import decoder_layers, unwrap
for name, forget in {"first": (0, 1), "last": (2, 3)}.items():
    model = build(replace(recipe, checkpointed_layers="all"))
    for number, layer in enumerate(decoder_layers(model)):
        layer.gradient_checkpointing = number in forget
    with MemoryLedger(model, inputs=ids) as ledger:
        model(input_ids=ids, labels=ids).loss.backward()
    print(f"the {name} two forget: {show_bytes(ledger.report().peak_bytes)}")

# %% [markdown]
# ### "Memory grows like √N"
# Here is where that is from: a chain of 64, cut into segments of *k* steps. The most that it holds
# at once:

# %% tags=["run"]
for k in (1, 2, 4, 8, 16, 32):
    trace = checkpointing.trace_chain(64, kept=range(1, 65, k))
    again = sum("again" in moment.action for moment in trace)
    print(f"segments of {k:2}: at most {max(len(moment.held) for moment in trace):2} held, "
          f"{again} steps computed again")

# %% [markdown]
# Segments of √64 = 8 hold the least, 15: eight checkpoints, and seven inputs of the segment that
# is being computed again. [Chen et al. 2016, section 4.1] In a chain, what waits *inside* a step
# and what waits *between* two is the same: one tensor. A transformer layer keeps *r* boundaries
# inside and hands on one. N layers in segments of *k* hold about N / k boundaries and k · r inside
# the segment that came back: least at k = √(N / r), where it is 2 √(N · r). That is √N again, with
# a large factor, and it begins to matter only when √(N / r) passes 1:

# %% tags=["run"]
from fitcast.forecasting.block import boundary_bytes, count_block
seven = TrainRecipe(model="llama-2-7b", base="float16", lora_rank=None, lora_dropout=0,
                    sequence_length=2048, checkpointed_layers=0)
r = count_block(seven).saved_activation_bytes / boundary_bytes(seven)
for layers in (16, 32, 64, 80):
    held = {k: layers / k + k * r for k in (1, 2, 6)}
    print(f"{layers} layers of Llama-2-7B, r = {r:.1f}: best k {(layers / r) ** 0.5:.1f};",
          "boundaries at", ", ".join(f"k = {k}: {n:.1f}" for k, n in held.items()))

# %% [markdown]
# Up to 45 layers (2 · r) one checkpoint a layer, which is what transformers does, is best; at 64
# and 80 segments of two already hold less. Counted, not estimated, for stacks of our small layers:

# %% tags=["run"]
narrow, held = replace(recipe, micro_batch_size=1), {}
for layers in (8, 16, 32):
    stack = checkpointing.build_stack(narrow, layers)
    plain_flops = checkpointing.step_stack(stack, narrow, 0).flops
    for size in (1, 2, round(layers**0.5)):
        step = checkpointing.step_stack(stack, narrow, size)
        held[layers, size] = step.activation_bytes
        print(f"{layers:2} layers, segments of {size}: {show_bytes(step.activation_bytes):>9}, "
              f"work +{step.flops / plain_flops - 1:.0%}")

# %% [markdown]
# ### The adapters that did not train
# The default, `use_reentrant=False`, is safe. But an older script may say `True`, and an older loop
# may switch layers on by hand. With `True` a layer is, to autograd, *one* function of *one* tensor,
# its input; the adapters inside it are out of sight. Our base is frozen, so the input of the first
# layer, the embeddings, needs no gradient, and autograd concludes: neither does the output. (The
# switch of transformers 5 also calls `enable_input_require_grads()`, which marks the embeddings'
# output: with it, either kind trains everything.)

# %% tags=["run"]
lora = replace(recipe, lora_rank=16, learning_rate=1e-2)
def by_hand(layers_that_forget, use_reentrant):
    model = qlora.add_adapters(qlora.load_base(lora), lora).train()
    unwrap(model).disable_input_require_grads()  # add_adapters is careful; a loop may not be
    for layer in decoder_layers(model)[:layers_that_forget]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
    return model

# %% tags=["run"]
for use_reentrant in (False, True):
    model = by_hand(3, use_reentrant)
    with warnings.catch_warnings(record=True, action="always") as said:
        model(input_ids=ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"use_reentrant={use_reentrant}: {sum(p.grad is not None for p in trained)} of",
          f"{len(trained)} tensors have a gradient", *{str(w.message) for w in said})

# %% [markdown]
# The loss would fall, the logs look healthy, and three quarters of the adapters would stay what
# they were. With *every* layer you are luckier, because then nothing at all leads back from the
# loss:

# %% tags=["raises-exception"]
with warnings.catch_warnings(action="ignore"):
    by_hand(4, use_reentrant=True)(input_ids=ids, labels=ids).loss.backward()

# %% [markdown]
# ### The clock
# Recorded once: Llama-3.2-1B, 4 sequences of 1024 tokens. (A larger card with a T4's kernels: the
# bytes are a T4's, the clock is an H200's, and nothing held it to a T4's memory.)

# %% tags=["recorded"]
from course_utils.topics import recorded
recorded.show("checkpointing", checkpointing.beside_the_first())

# %% [markdown]
# LoRA pays the larger share, as the work said. And here? A model this small mostly moves memory, so
# this need not be what the work says:

# %% tags=["run", "nbval-ignore-output"]
# loose: wall-clock times differ from run to run
def seconds(model):
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    gpus.synchronize()
    return time.perf_counter() - start

for name, rank in (("all weights", None), ("LoRA", 16)):
    models = [build(replace(recipe, lora_rank=rank, checkpointed_layers=k)) for k in (0, "all")]
    runs = [[seconds(model) for model in models] for _ in range(6)]  # in turns
    keeps_all, forgets_all = map(min, zip(*runs, strict=True))  # others only slow it down
    print(f"{name}: {forgets_all / keeps_all:.2f} x the time")

# %% [markdown]
# ### For those who struggle
# The chain of six once more, with a₁ and a₄ kept: two segments of three. Cover the output and say,
# for each line, what is in memory and why.

# %% tags=["run"]
for moment in checkpointing.trace_chain(6, kept=[1, 4]):
    print(f"{moment.action:15}", " ".join(f"a{number}" for number in moment.held))

# %% [markdown]
# The core formula, with one case: N layers, each keeping r boundaries inside. Everything kept: N ·
# r. Each layer a checkpoint: N + r. With N = 4 and r = 17, that is 68 against some 21. Halve the
# layers: 34 against 19. Divide: who gains more from forgetting, the deep model or the shallow one?
#
# ### Open questions
# - **Forget less, cleverly.** Keep attention's output too, one more boundary a layer, and
#   attention need not run again. With `kv = replace(usual, model="llama-3.2-1b",
#   sequence_length=2048, attention="explicit_kv")` compare the forecasts of `kv`, `replace(kv,
#   keep_attention=True)` and `replace(kv, offload_checkpoints=True)`: `peak_allocated_bytes` and
#   `flops`. Which is worth its price at 2048 tokens, which at 512? [Korthikanti et al. 2022,
#   section 5]
# - **Dice.** Put a `torch.nn.Dropout(0.5)` into a block and train it through your `Forget`. Its
#   gradients are now wrong, and nothing says so. Repair it: `torch.get_rng_state()` in forward,
#   `torch.set_rng_state(...)` before the second run (both from `torch.cuda` for tensors on
#   a GPU). PyTorch does it for you (`preserve_rng_state`).
#
# ### Try with AI
# Ask an assistant:
#
# > I fine-tune Llama-3.1-8B with QLoRA (4-bit, r=16 on q, k, v, o, 8-bit Adam, fp16) on a T4, one
# > sequence of 1024 tokens. Do I need gradient checkpointing? What exactly does it store? How much
# > memory does it save, how much more computation does it cost, and should I use √N checkpoints?
#
# A right answer says that activations are stored, not gradients; that transformers checkpoints
# every layer, which at 32 layers holds less than √N segments do; asks about, or states, the kernel
# of attention, on which it depends whether you need it; says that the extra work is less than one
# forward pass, but a larger share of a LoRA step than of full fine-tuning; and comes close to these
# numbers, for rows without a mask:

# %% tags=["run"]
for k in (0, 32):
    step = forecast(replace(eight, checkpointed_layers=k), gpus.T4)
    print(f"{k:2} layers forget: peak {show_bytes(step.peak_allocated_bytes)}, "
          f"{step.flops / 1e12:.0f} TFLOP a step, {step.verdict}")

# %% [markdown]
# ## What this lesson left out
# Checkpoints that are moved to the host's memory; schedules that recompute more than once, for
# chains that are even longer (Griewank and Walther 2000); what `torch.compile` decides to recompute
# by itself; several GPUs. A saved *training* checkpoint, a file, is something else with the same
# name.
#
# ## Sources
# - Chen et al. 2016, [Training Deep Nets with Sublinear Memory
#   Cost](https://arxiv.org/abs/1604.06174), sections 3 and 4
# - Korthikanti et al. 2022, [Reducing activation recomputation](https://arxiv.org/abs/2205.05198),
#   section 5: what to keep and what to recompute
# - PyTorch, [torch.utils.checkpoint](https://docs.pytorch.org/docs/stable/checkpoint.html): the
#   two kinds, and what each needs
# - transformers,
#   [modeling_layers.py](https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_layers.py):
#   `GradientCheckpointingLayer`, training mode and cache
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314), section 3: why 4 bits need
#   this
#
# New terms are in the [glossary](glossary.md).
