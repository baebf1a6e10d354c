# %% [markdown]
# # 02 · What if we forget on purpose?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/02_what_if_we_forget_on_purpose.ipynb)
#
# **45 min** · runs anywhere; a GPU fills in the lines that say "measured". Exercise 02.3
# is for home.
#
# Lesson 01 found the thief: each layer keeps some twenty times its boundary until backward comes
# by. **Gradient checkpointing** keeps the boundary, forgets the rest, and computes it again. What
# does that save, what does it cost, and which of the numbers in circulation about it are true?
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *trace* by hand what a checkpointed chain holds and computes twice | B1 | exercise 02.1 |
# | *write* a checkpoint function: equal gradients, fewer bytes | B2 | exercise 02.2 |
# | *test* "30-40 % of the memory, +25-35 % time, O(√N)" against a count | B2 | sections 3, 4 |
# | *detect* adapters that silently do not train | B2 | section 5 |
# | *choose* how many layers forget, for a T4 and a length | B2 | exercise 02.3 |
#
# **Needs:** the four holders, layer boundary (lesson 01; or read its two entries in the glossary).
# **New concepts (5):** checkpoint · recomputation · segment · reentrant · k of n layers. Each is
# in the [glossary](glossary.md).

# %% [markdown]
# ## Set up
# On Colab this fetches the course and the one package that is missing there; elsewhere it does
# nothing. A second run changes nothing.

# %% tags=["setup"]
import os
import sys
if "course_utils" not in sys.modules:
    if "COLAB_RELEASE_TAG" in os.environ and not os.path.isdir("course"):
        os.system(f"{sys.executable} -m pip install -q --no-deps bitsandbytes==0.50.2 && "
                  "git clone -qb v0.1.0 https://github.com/course-authors/fit-the-fine-tune course")
    sys.path += [os.path.abspath("course"), os.path.abspath("..")]
from course_utils.topics.welcome import welcome
print(welcome())

# %% tags=["setup"]
import math
import time
import warnings
from dataclasses import replace
from functools import partial
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from course_utils import figures
from course_utils.exercises import lesson_02 as exercises
from course_utils.exercises.checks import show_prediction
from course_utils.topics.checkpointing import trace_chain
from fitcast import forecast, gpus, show_bytes
from fitcast.step import qlora

# %% tags=["setup"]
print(gpus.describe(gpus.detect()))

# %% [markdown]
# ## 1 · A chain of six, by hand
# Six steps, one after the other. Step *i* turns its input aᵢ into the next one, and its backward
# needs aᵢ again. The usual way: keep all six.
#
# The other way: keep a₁, a₃ and a₅, drop the rest. When backward wants to pass step 6, a₆ is gone;
# a₅ is not, so run step 5 once more. a₃ leads to a₄ in the same way, a₁ to a₂. Either way, an
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
# <details><summary>Hint 3</summary>Step 4 needs a₄: a₁, a₃, a₄. Step 3: a₁, a₃. Steps 2 and 1 go
# on in this way.</details>

# %% tags=["exercise"]
keep_all = ...  # six numbers, for example [6, 6, 6, 6, 6, 6]
keep_135 = ...

# %% tags=["check"]
exercises.check_traces({"keep_all": keep_all, "keep_135": keep_135})

# %% [markdown]
# ### Predict
# "Forward runs twice", people say. A plain training step runs 6 forward steps. How many does the
# step run that keeps a₁, a₃ and a₅?

# %% tags=["predict"]
predicted_steps = ...

# %% tags=["run"]
traces = {"keep a1 to a6": trace_chain(6, kept=range(1, 7)),
          "keep a1, a3, a5": trace_chain(6, kept=[1, 3, 5])}
runs = {name: sum("forward" in moment.action for moment in trace) for name, trace in traces.items()}
show_prediction(predicted_steps, show="{} forward steps".format, counted=runs["keep a1, a3, a5"])

# %% tags=["run"]
figures.chains(traces, steps=6)

# %% [markdown]
# ### Explain
# Not twice: what was kept needs no second run, and the last step of a **segment** (here: two steps
# that share one kept input) is not repeated either, because nobody asks for its output. What is
# kept is called a **checkpoint**. It is an *activation*, the input of a segment.
#
# You will read that "checkpointing stores gradients every few layers". Nothing in this picture is
# a gradient. "Gradient checkpointing" has its name from what it makes possible, not from what it
# stores; newer versions of transformers call it *activation* checkpointing. [Chen et al. 2016,
# section 3]

# %% [markdown]
# ## 2 · Write one
# A dozen lines do all of it, and writing them takes the magic out of the word.
#
# ## Exercise 02.2 · A checkpoint of your own
# *Hard, 12 minutes.* `Forget.apply(function, x)` is `function(x)`, but of all that the function
# computes only `x` waits for backward. Fill in the three gaps. Inside `forward` of an
# `autograd.Function` no graph is built, so nothing else is kept.
#
# The check trains three blocks with it. It wants gradients equal **to the bit**, of the input and
# of all weights, **and** no more bytes waiting for backward than each block's input.
#
# <details><summary>Hint 1</summary>What must be there in backward so that the function can run
# once more? That goes into <code>save_for_backward</code>.</details>
# <details><summary>Hint 2</summary>The second forward is <code>ctx.function(x)</code>. Backward
# through it starts from the gradient that came in.</details>
# <details><summary>Hint 3</summary>The gaps are <code>x</code>, <code>ctx.function(x)</code> and
# <code>...</code>: what does autograd hand to <code>backward</code>?</details>

# %% tags=["exercise"]
class Forget(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, x):
        ctx.function = function
        ctx.save_for_backward(...)  # what waits for backward?
        return function(x)

    @staticmethod
    def backward(ctx, grad):  # grad: the gradient of our output
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            output = ...  # forward, once more
        output.backward(...)  # gives x and the weights their gradients
        return None, x.grad  # one for each argument of forward; a function has none

# %% tags=["check"]
exercises.check_forget(Forget.apply)

# %% [markdown]
# That is all there is to it. PyTorch's own, `torch.utils.checkpoint.checkpoint`, does two things
# more: it replays the random numbers, so that dropout drops the same elements again, and it comes
# in two kinds.
#
# - `use_reentrant=True`, the older one, is your class: autograd runs *inside* a backward function.
# - `use_reentrant=False` puts a note in the place of each tensor that autograd wants to keep; the
#   first note to be opened triggers the recomputation. It stops as soon as the last note is
#   served: the "last step" of section 1.
#
# Section 5 shows why the difference can cost you a whole training run. [PyTorch:
# torch.utils.checkpoint]

# %% [markdown]
# ## 3 · On a real model
# The small Llama of lesson 01, all of its weights trained, 4 sequences of 128 tokens. transformers
# has a switch for it, and the switch has two names: `gradient_checkpointing_enable` in 5.15, which
# Colab has, `activation_checkpointing_enable` in 5.23. The property that tells whether it is on is
# `is_gradient_checkpointing` in the one, `is_activation_checkpointing` in the other. 5.23 takes the
# old names too, with a warning; version 6 will not. (`TrainingArguments` has the same two names.)

# %% tags=["run"]
from course_utils.data import BUNDLED
from fitcast import TrainRecipe
recipe = TrainRecipe(model=BUNDLED, base="float32", lora_rank=None, lora_dropout=0,
                     micro_batch_size=4, sequence_length=128, optimizer="adamw",
                     checkpointed_layers=0)
ids = torch.arange(4 * 128, device=gpus.device()).view(4, 128)
model = qlora.load_base(recipe)  # as `from_pretrained` gives it

# %% tags=["run"]
from fitcast import MemoryLedger
def kept_for_backward():
    with MemoryLedger(model, inputs=ids) as ledger:
        model(input_ids=ids, labels=ids)
    return ledger.report().saved_activation_bytes

before = kept_for_backward()

# %% tags=["run"]
old = not hasattr(type(model), "activation_checkpointing_enable")
model.gradient_checkpointing_enable() if old else model.activation_checkpointing_enable()
print("on:", model.is_gradient_checkpointing if old else model.is_activation_checkpointing)

# %% [markdown]
# It is on. So what waits for backward now, after a forward pass?

# %% tags=["run"]
print(f"switched on:         {kept_for_backward() / before:.2f} of before")
model.train()
print(f"after model.train(): {kept_for_backward() / before:.2f} of before")

# %% [markdown]
# Nothing happened! `from_pretrained` returns a model in evaluation mode, and a layer forgets only
# in training mode. The property looks at the switches: it says True in evaluation mode, and True
# if *one* layer of the model is switched on. Count bytes, or look at `model.training` too.
# (Trainer calls `model.train()` for you; your own loop does not.)
#
# One switch gets in its way: `use_cache`. The cache of keys and values is for generating text; a
# layer that runs twice would write into it twice. So a layer that forgets gets none, with a
# warning that people wonder about. Say `model.config.use_cache = False` when you train, and go to
# `model.eval()` to generate: else every new word is computed from all words before it.

# %% tags=["run"]
transformers.logging.set_verbosity_error()  # hides that warning
for mode in ("train", "eval"):
    getattr(model, mode)()
    cache = model(input_ids=ids, use_cache=True).past_key_values
    print(f"{mode:5} tokens in the cache:", 0 if cache is None else cache.get_seq_length())
del model, cache

# %% [markdown]
# ### Predict
# Now whole training steps, as in lesson 01: two of them, with the optimizer. The activations' own
# highest point falls to which fraction, when all four layers forget? ("Down to 30-40 %", says the
# folklore.)

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
    gradients = [p.grad.cpu() for p in model.parameters() if p.requires_grad]
    return ledger.report(), gradients, gpus.peak_allocated_bytes(above=before)

# %% tags=["run"]
build(recipe)(input_ids=ids, labels=ids).loss.backward()  # first, a GPU takes its work space
plain, plain_gradients, plain_measured = two_steps(recipe)
forgetful, gradients, measured = two_steps(replace(recipe, checkpointed_layers="all"))
ours, theirs = (max(report.timeline["activations"]) for report in (forgetful, plain))
show_prediction(predicted_fraction, show="{:.0%}".format, counted=ours / theirs)
print(f"the whole step's peak: {forgetful.peak_bytes / plain.peak_bytes:.0%}")
for name, report, seen in (("keeps", plain, plain_measured), ("forgets", forgetful, measured)):
    print(f"{name:8} counted {show_bytes(report.peak_bytes)}, measured: {show_bytes(seen)}")

# %% tags=["run"]
figures.memory_over_time(plain, "two training steps, everything kept")

# %% tags=["run"]
figures.memory_over_time(forgetful, "two training steps, every layer forgets")

# %% [markdown]
# ### Explain
# Forward hardly climbs: only boundaries stay, and the logits at its end. In backward each layer
# comes back for a moment (one tooth of the saw), last layer first, and is gone again. So what is
# left is *all boundaries plus one whole layer*, plus what no layer owns: the logits. And the peak
# has moved, from the loss to the first layer's return, when the gradients of all others are there.
# (With a vocabulary of 128 256 it stays at the loss: section 4 shows it.)
#
# Here that is a quarter of the activations and over half of the step. Both numbers belong to *four
# layers*; section 4 shows what depth makes of them. And the gradients?

# %% tags=["run"]
torch.testing.assert_close(gradients, plain_gradients)
equal = sum(map(torch.equal, gradients, plain_gradients))
print(f"{equal} of {len(gradients)} gradients equal to the last bit")
end_of_forward = forgetful.phases.index("backward") - 1
for holder in ("activations", "gradients"):
    print(f"{holder:12}", show_bytes(forgetful.timeline[holder][end_of_forward]))

# %% [markdown]
# The same operations on the same numbers give the same bits. And when forward is done, with
# everything stored that checkpointing stores, there is not a byte of gradients.

# %% [markdown]
# ## 4 · The three promises
# **"Forward runs twice, so +25-35 % time."** Time depends on the machine; work does not. Backward
# is about twice forward's work: one product for the inputs' gradients, one for the weights'. With
# LoRA the weights are frozen.
#
# ### Predict
# How much *more* work is a step in which every layer forgets, in percent of the step that keeps
# everything? All weights trained, and LoRA.

# %% tags=["predict"]
predicted_more_full = ...
predicted_more_lora = ...

# %% tags=["run"]
from course_utils.topics.checkpointing import WorkCounter
def work(recipe):
    model = build(recipe)
    with WorkCounter() as counter:
        loss = model(input_ids=ids, labels=ids).loss
        forward = counter.flops
        loss.backward()
    return forward, counter.flops

# %% tags=["run"]
more = {}
for name, rank in (("all weights", None), ("LoRA", 16)):
    one = replace(recipe, lora_rank=rank)
    forward, total = work(one)
    again = work(replace(one, checkpointed_layers="all"))[1] - total
    more[name] = 100 * again / total
    print(f"{name:12} forward 1, backward {total / forward - 1:.2f}, again {again / forward:.2f}")

# %% tags=["run"]
for predicted, name in ((predicted_more_full, "all weights"), (predicted_more_lora, "LoRA")):
    show_prediction(predicted, show="+{:.0f} %".format, **{name: more[name]})

# %% [markdown]
# ### Explain
# Not all of forward comes again: the head is no layer, and in each layer the last product (the
# MLP's way down) is the "last step" of section 1. So with all weights trained the price stays
# below the promise here; where the head weighs nothing, as in the stacks below, it is +26 %. With
# LoRA the *same* recomputation is compared with a smaller step (no gradients for frozen weights),
# so it weighs more. Work is not time: what only moves memory is missing from it, and a small model
# on a CPU is mostly that. A big model first, by forecast, as **QLoRA** trains it: the frozen base
# in 4 bits, adapters beside it, Adam's two averages in 8 bits (lesson 06):

# %% tags=["run"]
from fitcast import models as shapes
usual = TrainRecipe(model="llama-3.1-8b", amp_dtype="float16")  # nf4, rank 16, 8-bit Adam
big = replace(usual, sequence_length=512)
keeps, forgets = (forecast(replace(big, checkpointed_layers=k), gpus.T4) for k in (0, "all"))
print(f"QLoRA of Llama-3.1-8B, every layer forgets: work +{forgets.flops / keeps.flops - 1:.0%}")
print(f"vocabulary {shapes.config(big.model).vocab_size:,}: peak in {forgets.peak_phase} at",
      forgets.peak_operation)

# %% [markdown]
# A third more, for a QLoRA run; and its peak is the loss, as section 3 said. Now the clock, here:

# %% tags=["run"]
def seconds(model):
    start = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    gpus.synchronize()
    return time.perf_counter() - start

# %% tags=["run", "nbval-ignore-output"]
# loose: wall-clock times differ from run to run
for name, rank in (("all weights", None), ("LoRA", 16)):
    models = [build(replace(recipe, lora_rank=rank, checkpointed_layers=k)) for k in (0, "all")]
    runs = [[seconds(model) for model in models] for _ in range(15)]  # in turns
    keeps_all, forgets_all = map(min, zip(*runs, strict=True))  # others only slow it down
    print(f"{name}: {forgets_all / keeps_all:.2f} x the time")

# %% [markdown]
# (That need not be what the work says: a model this small mostly moves memory.)
#
# And on a GPU, recorded once: Llama-3.2-1B, 4 sequences of 1024 tokens. The time of a step, and its
# peak, as a share of the step that keeps everything. "H200 as a T4", in the last line, means a
# larger card with a T4's kernels, and so with a T4's bytes. The clock is the H200's. And here
# nothing held it to a T4's memory: some of these steps would not run there.

# %% tags=["recorded"]
from course_utils.topics import recorded
kept = {}
def line(row):
    first = kept.setdefault(row["name"].split(",")[0], row)
    slower = first["tokens_per_second"] / row["tokens_per_second"]
    share = row["peak_allocated_bytes"] / first["peak_allocated_bytes"]
    peak = show_bytes(row["peak_allocated_bytes"])
    return f"{row['name']:28} {slower:.2f} x the time, {peak:>9} = {share:4.0%}"

recorded.show("checkpointing", line)

# %% [markdown]
# LoRA pays the larger share, as the work said. The clock is less orderly than the work: it also
# pays for the launch of every kernel and for the allocator. So the promise is a fair middle, for
# nobody in particular: measure your own step, with and without.
#
# **"Memory grows like √N."** Here is where that is from: a chain of 64, cut into segments of *k*
# steps. The most that it holds at once:

# %% tags=["run"]
for k in (1, 2, 4, 8, 16, 32):
    trace = trace_chain(64, kept=range(1, 65, k))
    again = sum("again" in moment.action for moment in trace)
    print(f"segments of {k:2}: at most {max(len(moment.held) for moment in trace):2} held, "
          f"{again} steps computed again")

# %% [markdown]
# Segments of √64 = 8 hold the least, 15: eight checkpoints, and seven inputs of the segment that
# is being computed again. [Chen et al. 2016, section 4.1] So: 32 transformer layers, cut into six
# segments of about √32 layers?
#
# ### Predict
# Segments of how many layers hold the least memory, for 32 layers of our Llama: 1, 2 or 6?

# %% tags=["predict"]
predicted_segment = ...

# %% tags=["run"]
from course_utils.topics.checkpointing import build_stack, step_stack
narrow, stacks = replace(recipe, micro_batch_size=1), {}
for layers in (8, 16, 32):
    stack = build_stack(narrow, layers)
    for size in (0, 1, 2, round(math.sqrt(layers))):
        stacks[layers, size] = step_stack(stack, narrow, size)
held = {case: step.activation_bytes for case, step in stacks.items()}
best = min((1, 2, 6), key=lambda size: held[32, size])
show_prediction(predicted_segment, show="segments of {}".format, counted=best)

# %% tags=["run"]
for (layers, size), step in stacks.items():
    share = held[layers, size] / held[layers, 0]
    print(f"{layers:2} layers, {f'segments of {size}' if size else 'all kept':13}",
          f"{show_bytes(held[layers, size]):>9} = {share:4.0%},",
          f"work +{step.flops / stacks[layers, 0].flops - 1:.0%}")

# %% tags=["run"]
depths = [8, 16, 32]
lines = {"everything kept": [held[n, 0] for n in depths],
         "√N segments": [held[n, round(math.sqrt(n))] for n in depths],
         "each layer": [held[n, 1] for n in depths]}
figures.curves(depths, lines, "layers", "Activations at their highest, by what is a checkpoint")

# %% [markdown]
# ### Explain
# In Chen's chain, what waits *inside* a segment and what waits *between* two is the same: one
# tensor a step. A transformer layer keeps *r* boundaries inside and hands on one. N layers in
# segments of *k* hold about N / k boundaries and k · r inside the segment that came back: least at
# k = √(N / r). With r = 1 that is √N. With our r:

# %% tags=["run"]
from fitcast.forecasting.block import boundary_bytes, count_block
seven = TrainRecipe(model="llama-2-7b", base="float16", lora_rank=None, lora_dropout=0,
                    sequence_length=2048, checkpointed_layers=0)
for name, one in {"ours": narrow, "Llama-2-7B": seven}.items():
    r = count_block(one).saved_activation_bytes / boundary_bytes(one)
    print(f"{name:10} r = {r:4.1f}, best k = {math.sqrt(32 / r):.1f}; boundaries at k = 1, 2, 6:",
          *(f"{32 / k + k * r:.0f}" for k in (1, 2, 6)))

# %% [markdown]
# So √N segments hold more than twice as much as a checkpoint for each layer, *and* compute more
# again. "O(√N)" is a theorem about another chain; what transformers does is one checkpoint a
# layer, and its memory is linear in depth, with a small slope.
#
# **"Activations down to 30-40 %."** You have the percentages in the table above: no constant, but
# one that falls with depth. A *whole step's* peak may well end there, as one of the recorded ones
# does. Ask "of what, at which depth?" whenever you meet such a number.
#
# ## 5 · The adapters that did not train
# Back to your `Forget`, or PyTorch's `use_reentrant=True`. From the outside, a layer is now *one*
# function of *one* tensor, its input; the adapters inside it are out of autograd's sight. Our base
# is frozen, so the input of the first layer, the embeddings, needs no gradient. Then autograd
# concludes: neither does the output. Who calls transformers' switch is safe: it also calls
# `enable_input_require_grads()`, which marks the embeddings' output. Your own loop has to do it
# itself.

# %% tags=["run"]
from fitcast.step.levers import decoder_layers, unwrap
lora = replace(recipe, lora_rank=16, learning_rate=1e-2)
def adapted(layers_that_forget, use_reentrant=True):
    model = qlora.add_adapters(qlora.load_base(lora), lora).train()
    unwrap(model).disable_input_require_grads()  # add_adapters is careful; a loop may not be
    for layer in decoder_layers(model)[:layers_that_forget]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=use_reentrant)
    return model

# %% tags=["setup"]
def ten_steps(model):
    optimizer, losses = qlora.build_optimizer(model, lora), []
    with warnings.catch_warnings(record=True, action="always") as said:
        for _ in range(10):
            optimizer.zero_grad()
            losses.append(model(input_ids=ids, labels=ids).loss)
            losses[-1].backward()
            optimizer.step()
    print("the loss fell" if losses[-1] < losses[0] else "the loss did not fall")
    return sum(p.grad is not None for p in model.parameters()), {str(w.message) for w in said}

# %% [markdown]
# ### Predict
# Three of the four layers forget in this way. Each layer has 8 adapter tensors, 32 in all. How
# many get a gradient? And does the loss fall in ten steps?

# %% tags=["predict"]
predicted_tensors = ...

# %% tags=["run"]
tensors, warned = ten_steps(adapted(layers_that_forget=3))
show_prediction(predicted_tensors, show="{} of 32 tensors".format, counted=tensors)
print(*warned)

# %% [markdown]
# ### Explain
# The loss falls, the logs look healthy, and three quarters of the adapters are what they were at
# the start. The only sign is one line on stderr, in the middle of everything else that is printed
# there. (Your `Forget.apply` in the place of `partial(...)` does the same, without even that line:
# try it.) With *every* layer you are luckier, because then nothing at all leads back from the
# loss:

# %% tags=["raises-exception"]
with warnings.catch_warnings(action="ignore"):
    adapted(layers_that_forget=4)(input_ids=ids, labels=ids).loss.backward()

# %% [markdown]
# Either of two lines repairs it. `use_reentrant=False` sees the tensors inside the layer; or the
# embeddings' output is marked:

# %% tags=["run"]
sees_inside, marked = adapted(3, use_reentrant=False), adapted(3)
unwrap(marked).enable_input_require_grads()
for model in (sees_inside, marked):
    tensors, _ = ten_steps(model)
    assert tensors == 32
    print(tensors, "of 32 tensors")

# %% [markdown]
# A check worth a line in every training loop, after the first backward: *each* trained tensor has
# a gradient. Lesson 06 has it among its gates.

# %% [markdown]
# ## 6 · When is it needed, and how much of it?
# "On a T4, models over 3B parameters need gradient checkpointing." Here is a usual QLoRA recipe:
# 4-bit base, LoRA on q, k, v and o, 8-bit Adam, float16. `forecast` runs one of its training steps
# on fake tensors with a T4's kernels and allocator, and says what the T4 would hold at the peak.
# (How it does that, and how exact it is: lesson 06.)
#
# ### Predict
# One sequence of 2048 tokens, and one of 512. Llama-3.2-1B and Llama-3.1-8B. In how many of the
# four cases does a T4 need checkpointing?

# %% tags=["predict"]
predicted_cases = ...

# %% tags=["run"]
cases = {}
for model in ("llama-3.2-1b", "llama-3.1-8b"):
    for length in (512, 2048):
        for name, k in (("kept", 0), ("forgets", "all")):
            case = replace(usual, model=model, sequence_length=length, checkpointed_layers=k)
            cases[f"{model[-2:].upper()}, {length}: {name}"] = forecast(case, gpus.T4)
needs = sum(not step.fits for name, step in cases.items() if "kept" in name)
show_prediction(predicted_cases, show="{} of 4".format, forecast=needs)

# %% tags=["run"]
figures.compare(cases, gpus.T4, "Peak of a QLoRA step by model and tokens")

# %% [markdown]
# ### Explain
# The 8B model does without it, at 512 tokens; the 1B model needs it, at 2048, with the attention
# kernel that this recipe gets on a T4 (lesson 06 changes the kernel). What forgetting saves are
# activations, and they follow the *tokens* and the layers' width, not the number of weights. A rule
# with a model size and no length in it cannot be right. Ask the forecast; it takes seconds.
#
# **Spending what is left.** If a T4 has room to spare with every layer forgetting, that room is
# speed not bought. Let only the first *k* of *n* layers forget: each of the others costs memory and
# saves its second forward. Why the *first* ones? Backward begins at the last layer and frees what
# those had kept before it recomputes the first ones, so a recomputed layer never comes on top of
# all kept ones. `checkpointed_layers=k` in a recipe does it, on every version of transformers, by
# one attribute of the layers that remember: `layer.gradient_checkpointing = False`. (5.23 has
# `every_n_layers` of its own.)

# %% tags=["run"]
one_b = replace(usual, model="llama-3.2-1b", sequence_length=2048)
ks = [0, 4, 8, 12, 16]
steps = [forecast(replace(one_b, checkpointed_layers=k), gpus.T4) for k in ks]
figures.curves(ks, {"peak": [step.peak_allocated_bytes for step in steps]},
               "k of 16 layers forget", "Llama-3.2-1B, 1 x 2048 tokens", gpus.T4)

# %% [markdown]
# A straight line: every layer that remembers costs the same. Move the controls (with the mouse, or
# Tab and the arrow keys): which model, at which length, needs how much forgetting?

# %% tags=["run"]
figures.forgetting_explorer()

# %% [markdown]
# ## Exercise 02.3 · The smallest k
# *Medium, 8 minutes, at home.* Llama-3.1-8B, one sequence of 1024 tokens, on a T4. Leave two and a
# half GiB to the allocator's gaps (freed pieces, too small for the next tensor): 12 GiB for
# tensors. What is the smallest number of layers, of 32, that must forget? Two forecasts are enough
# to know. The check forecasts your answer, and one less.

# %% tags=["run"]
from fitcast import GIB
eight = replace(usual, sequence_length=1024)
budget_bytes = 12 * GIB
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
# ## For those who struggle
# The chain of six once more, with a₁ and a₄ kept: two segments of three. Cover the output and say,
# for each line, what is in memory and why.

# %% tags=["run"]
for moment in trace_chain(6, kept=[1, 4]):
    print(f"{moment.action:15}", " ".join(f"a{number}" for number in moment.held))

# %% [markdown]
# The core formula, with one case: N layers, each keeping r boundaries inside. Everything kept: N ·
# r. Each layer a checkpoint: N + r. With N = 4 and r = 17, that is 68 against 21. Halve the
# layers: 34 against 19. Who gains more from forgetting, the deep model or the shallow one?
#
# ## Go further
# - **Forget less, cleverly.** Keep attention's output too, one more boundary a layer, and
#   attention need not run again. With `kv = replace(one_b, attention="explicit_kv")` (lesson 06
#   explains it), compare the forecasts of `kv`, `replace(kv, keep_attention=True)` and
#   `replace(kv, offload_checkpoints=True)`: `peak_allocated_bytes` and `flops`. Which is worth its
#   price at 2048 tokens, which at 512? [Korthikanti et al. 2022, section 5]
# - **Dice.** Put a `torch.nn.Dropout(0.5)` into a block and train it through your `Forget`. Its
#   gradients are now wrong, and nothing says so. Repair it: `torch.get_rng_state()` in forward,
#   `torch.set_rng_state(...)` before the second run. PyTorch does it for you
#   (`preserve_rng_state`).
#
# ## Try with AI
# Ask an assistant:
#
# > I fine-tune Llama-3.1-8B with QLoRA (4-bit, r=16 on q, k, v, o, 8-bit Adam, fp16) on a T4, one
# > sequence of 1024 tokens. Do I need gradient checkpointing? What exactly does it store? How much
# > memory does it save, how much more computation does it cost, and should I use √N checkpoints?
#
# A right answer says that activations are stored, not gradients; that transformers checkpoints
# every layer, which for transformers is better than √N segments; asks about, or states, the kernel
# of attention; says that the extra work is less than one forward pass, but a larger share of a
# LoRA step than of full fine-tuning; and comes close to these numbers:

# %% tags=["run"]
for k in (0, 32):
    step = forecast(replace(eight, checkpointed_layers=k), gpus.T4)
    print(f"{k:2} layers forget: peak {show_bytes(step.peak_allocated_bytes)}, "
          f"{step.flops / 1e12:.0f} TFLOP a step, {'fits' if step.fits else 'does not fit'}")

# %% [markdown]
# ## What this lesson left out
# Checkpoints that are moved to the host's memory (lesson 06 has them as a lever); schedules that
# recompute more than once, for chains that are even longer (Griewank and Walther 2000); what
# `torch.compile` decides to recompute by itself; several GPUs. A saved *training* checkpoint, a
# file, is something else with the same name: lesson 06.
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
#
# ## To lesson 03
# With every layer forgetting, how many sequences of 2048 tokens does a T4 take in one forward pass
# of Llama-3.2-3B? `fits` asks whether the step can run at all. `margin_bytes` is what is left when
# the allocator's gaps are at their worst: below zero, it may run, and may not.

# %% tags=["run"]
three = replace(usual, model="llama-3.2-3b", sequence_length=2048)
for n in (1, 2, 3):
    step = forecast(replace(three, micro_batch_size=n), gpus.T4)
    print(f"{n}: {'fits' if step.fits else 'does not fit'},",
          f"margin {show_bytes(step.margin_bytes, 'GiB')}")

# %% [markdown]
# Two, safely. The recipe that you copied says "batch size 32". Is training on two at a time, often
# enough, the same? Lesson 03 asks: how big is my batch, really?
