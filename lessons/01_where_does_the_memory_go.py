# %% [markdown]
# # 01 · Where does the memory go?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/01_where_does_the_memory_go.ipynb)
#
# **45 min** · runs anywhere; a GPU fills in the lines that say "measured".
#
# "CUDA out of memory", and the weights alone would have fitted. Who took the rest? In this lesson
# you guess, then count every byte of a training step, and see which guesses were off, and by how
# much.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *name* the four holders of memory and *say* when each comes and goes | B1 | sections 1, 5 |
# | *calculate* what one transformer layer keeps for backward, to the byte | B2 | exercise 01.1 |
# | *predict* how memory grows, and *find* the largest batch that fits | B2 | exercise 01.2 |
# | *analyse* a peak: which tensor, which operation, how many copies | B2 | exercise 01.3 |
#
# **Needs:** a PyTorch training loop you can read. No earlier lesson.
# **New concepts (5):** the four holders · tensors kept for backward · layer boundary · attention
# kernel · the logits term. Each is in the [glossary](glossary.md).

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
from dataclasses import replace
import torch
from course_utils import figures
from course_utils.data import BUNDLED
from course_utils.exercises.checks import show_prediction
from fitcast import MemoryLedger, TrainRecipe, gpus
from fitcast.forecasting.block import count_block
from fitcast.step import qlora
print(gpus.describe(gpus.detect()))

# %% [markdown]
# ## 1 · Four holders, one training step
# The course carries a small Llama with it: 4 layers, 192 numbers wide, a vocabulary of 1280. We
# train **all** of its weights in float32 on 4 sequences of 128 tokens. Any token ids will do:
# memory depends on shapes, not on words.
#
# The `MemoryLedger` watches each operation and books every tensor's storage, from its first byte to
# its last reference. What it wraps is the loop that you know. Of the lines below, "counted" is the
# ledger's and "measured" the GPU's own, where there is one. "Forecast" needs neither: it runs the
# step on tensors that have shapes and no numbers, as your GPU would, or a T4 if you have none.

# %% tags=["setup"]
recipe = TrainRecipe(model=BUNDLED, base="float32", lora_rank=None, lora_dropout=0,
                     micro_batch_size=4, sequence_length=128, optimizer="adamw",
                     checkpointed_layers=0)

def two_steps(recipe, budget_bytes=None):
    model = qlora.add_adapters(qlora.load_base(recipe), recipe)
    optimizer = qlora.build_optimizer(model, recipe)
    shape = (recipe.micro_batch_size, recipe.sequence_length)
    ids = torch.randint(0, model.config.vocab_size, shape, device=gpus.device())
    with MemoryLedger(model, inputs=ids, budget_bytes=budget_bytes) as ledger:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.report()

# %% [markdown]
# ### Predict
# The weights take 5.82 MiB. How high is the peak of these two steps? Write it in bytes, for example
# `8 * MIB`. A guess is enough; a wrong one teaches more.

# %% tags=["predict"]
predicted_peak = ...

# %% tags=["run"]
from fitcast import forecast
before = gpus.reset_peak()
full = two_steps(recipe)
measured = gpus.peak_allocated_bytes(above=before)
step = forecast(recipe, gpus.detect() or gpus.T4)
show_prediction(predicted_peak, counted=full.peak_bytes, forecast=step.peak_allocated_bytes,
                measured=measured)

# %% tags=["run"]
figures.memory_over_time(full, "two training steps, all weights trained")

# %% [markdown]
# ### Explain
# Read it from left to right. **Forward** climbs: every layer leaves tensors behind. **Backward**
# descends: it uses them up, last layer first, and leaves gradients. The **optimizer step**
# creates Adam's two averages, once; they never go away. So the second step starts higher than the
# first, and the peak belongs to the *second* step: whoever probes a batch size without an
# optimizer step probes too low. *Temporaries*, the thin band on top, live for a few operations and
# wait for nobody. (The forecast is higher: a GPU needs work space for its products too, and its
# attention writes out scores here that the CPU's does not; lesson 06 gives it a better one.)
#
# Now the folklore: "gradients are as large as the weights, Adam's state is twice that".

# %% tags=["run"]
from fitcast import show_bytes
for holder in ("weights", "gradients", "optimizer state", "activations", "inputs"):
    n_bytes = max(full.timeline[holder])
    ratio = n_bytes / full.composition["weights"]
    print(f"{holder:16}{show_bytes(n_bytes):>10} = {ratio:.3f} x weights")

# %% [markdown]
# True, *when every weight is trained and all of it is float32*: 4 + 4 + 8 = 16 bytes a parameter.
# Note the last two lines. The batch of token ids, which some budgets book with
# half a gigabyte, is kilobytes. And the largest holder is none of the three that folklore names: it
# is what forward leaves behind for backward. That is the one this lesson takes apart.

# %% [markdown]
# ## 2 · What does one layer keep?
# Backward needs numbers that only forward had: the gradient of `w * x` with respect to `w` is `x`.
# So autograd keeps a set of tensors for each layer, a₁ … aₙ, until backward has passed.

# %% tags=["run"]
figures.forward_backward(layers=4)

# %% [markdown]
# ### Predict
# One layer of our model receives a tensor of shape (4, 128, 192): 384 KiB in float32. That is the
# **layer boundary**. How many times its size does the layer keep for backward?

# %% tags=["predict"]
predicted_ratio = ...

# %% tags=["run"]
from fitcast.forecasting.block import boundary_bytes
layer = count_block(recipe)
show_prediction(predicted_ratio, show="{:.2f} x the boundary".format,
                counted=layer.saved_activation_bytes / boundary_bytes(recipe))

# %% [markdown]
# `count_block` runs one layer under the ledger, on **fake tensors**: they know their shape and hold
# no numbers, so that it works for a layer of any size. Here is the list, in order, as numbers per
# token (4 bytes each), with each tensor's maker. Its keeper is whoever reads it next: the norm
# keeps the sum in the middle. The first line is the input.

# %% tags=["run"]
tokens = recipe.micro_batch_size * recipe.sequence_length
for kept in layer.saved:
    made_by = f"{kept.module or 'the layer itself'} · {kept.operation.split('.')[0]}"
    print(f"{kept.n_bytes // (4 * tokens):5}  {made_by}")
print(f"{layer.saved_activation_bytes // (4 * tokens):5}  in all")

# %% [markdown]
# ### Explain
# Each line is an operand of a product, or the input or output of a function, whichever its
# derivative needs:
#
# - the two norms keep their input, one number (1 / root mean square), the normalised input, and the
#   result, which is the operand of the linear layers behind them;
# - attention keeps query and key after rotation, and value (key and value are narrow: two heads
#   serve six queries), its output, and one number for each head;
# - the MLP keeps four tensors of its inner width, 384.
#
# Additions keep nothing. Weights do not count: they are there anyway.
# [PyTorch: autograd mechanics, "Saved tensors"]

# %% [markdown]
# ## Exercise 01.1 · Bytes of a given layer
# *Medium, 8 minutes.* Complete the formula: how many numbers does a layer keep for each token,
# given its widths? The check counts three layers with the ledger, from ours to one of Llama-2-7B,
# and wants **every byte**.
#
# <details><summary>Hint 1</summary>Group the list above: which lines have the width 192, 64, 384,
# 6?</details>
# <details><summary>Hint 2</summary>Attention: query and output are <code>hidden</code> wide, key
# and value <code>kv</code>. What is left?</details>
# <details><summary>Hint 3</summary><code>attention = 2 * hidden + 2 * kv + ...</code>; the MLP is
# four times the same thing.</details>

# %% tags=["exercise"]
def numbers_kept(hidden, kv, intermediate, heads):
    norms = 2 * (3 * hidden + 1)
    attention = ...
    mlp = ...
    return norms + attention + mlp

# %% tags=["check"]
from course_utils.exercises import lesson_01 as exercises
exercises.check_saved_numbers(numbers_kept)

# %% [markdown]
# ## 3 · The usual estimate
# You will meet this formula for activation memory: layers x batch x sequence x hidden x 2 bytes.
# For Llama-2-7B (32 layers, hidden 4096) at one sequence of 2048 tokens it gives 512 MiB; at
# batch 8, 4 GiB. If so, 7B in 16 bits and the activations of one sequence fit a T4 together.
#
# ### Predict
# How much do the 32 layers really keep, with the attention that transformers uses today (PyTorch's
# `scaled_dot_product_attention`, SDPA)? In bytes: 2 GiB would be `2048 * MIB`.

# %% tags=["predict"]
predicted_kept = ...

# %% tags=["run"]
seven = TrainRecipe(model="llama-2-7b", base="float16", lora_rank=None, lora_dropout=0,
                    sequence_length=2048, checkpointed_layers=0)
estimate = 32 * boundary_bytes(seven)
sdpa = 32 * count_block(seven).saved_activation_bytes
eager = 32 * count_block(replace(seven, attention="eager")).saved_activation_bytes
show_prediction(predicted_kept, counted=sdpa, counted_with_eager=eager,
                usual_estimate=estimate, usual_estimate_at_batch_8=8 * estimate)
print(f"of the estimate: SDPA {sdpa / estimate:.1f} x, eager {eager / estimate:.1f} x")

# %% tags=["run"]
from fitcast.forecasting.block import weight_bytes
rows = {"usual estimate": estimate, "SDPA": sdpa, "eager": eager}
figures.compare({name: {"weights": weight_bytes(seven), "activations": kept}
                 for name, kept in rows.items()}, gpus.T4,
                "Llama-2-7B: weights and activations, 1 x 2048 tokens")

# %% [markdown]
# ### Explain
# The usual estimate counts one tensor a layer: the boundary. Section 2 counted what lies *between*
# two boundaries, and that is over twenty times as much. **Eager** attention also keeps the scores
# of every pair of positions, for every head. **SDPA** picks a kernel; the one it picks here never
# writes them to memory, keeps one number for each row instead and recomputes them [FlashAttention,
# section 3.1]. (On a T4 it may pick one that does: lesson 06.) The formula of Korthikanti et al.
# for GPT's layer, sequence x batch x hidden x (34 + 5 x heads x sequence / hidden) bytes, has the
# same two parts: one that SDPA keeps, one that only eager has.
#
# (The dashed line lies a little below the T4's 14.56 GiB: CUDA itself takes the rest.) Remember the
# estimate all the same: lesson 02 makes it come true.

# %% [markdown]
# ## 4 · Two laws
# ### Predict
# Double the sequence from 2048 to 4096 tokens. What one layer keeps grows by which factor with
# eager attention? And with SDPA?

# %% tags=["predict"]
predicted_factor_eager = ...
predicted_factor_sdpa = ...

# %% tags=["run"]
lengths = [512, 1024, 2048, 4096]
kept = {name: [count_block(replace(seven, attention=kind, sequence_length=length))
               .saved_activation_bytes for length in lengths]
        for name, kind in (("eager", "eager"), ("SDPA", "stock"))}
factors = {name: line[3] / line[2] for name, line in kept.items()}
times = "{:.2f} x".format
show_prediction(predicted_factor_eager, show=times, counted_with_eager=factors["eager"])
show_prediction(predicted_factor_sdpa, show=times, counted_with_SDPA=factors["SDPA"])

# %% tags=["run"]
figures.curves(lengths, kept, "sequence length, tokens", "What a layer of Llama-2-7B keeps")

# %% [markdown]
# ### Explain
# **Sequence: it depends on the kernel.** SDPA's line, with this one, is straight. Eager's is a
# straight part plus a quadratic one (the scores), so doubling gives a factor between 2 and 4, the
# closer to 4 the longer the text. **Batch: always linear**, because every kept tensor has the batch
# as a factor. To the byte? And what does twice the bytes per number do?

# %% tags=["run"]
eightfold, wide = replace(seven, micro_batch_size=8), replace(seven, base="float32")
for name, variant in {"batch 8": eightfold, "float32": wide}.items():
    ratio = count_block(variant).saved_activation_bytes / kept["SDPA"][2]
    print(f"{name}: {ratio:.2f} x")

# %% [markdown]
# Eight times the batch, exactly eight times the bytes. Twice the bytes per number, but *less* than
# twice the memory: in 16 bits the norms still work in float32, and keep float32 copies.
#
# Move the controls (with the mouse, or Tab and the arrow keys). Where is the estimate's verdict
# wrong?

# %% tags=["run"]
figures.layers_explorer()

# %% [markdown]
# ## Exercise 01.2 · The largest batch
# *Medium, 8 minutes.* This is what too much looks like, on a pretended card of 120 MiB. The ledger
# refuses the allocation that a GPU would refuse.

# %% tags=["raises-exception"]
from fitcast import MIB
two_steps(replace(recipe, micro_batch_size=32), budget_bytes=120 * MIB)

# %% [markdown]
# How many sequences of 128 tokens fit on that card, when all weights are trained for two steps or
# more? Two runs are enough to know; you need no search. The check *runs* your answer within 120
# MiB, and one more.

# %% tags=["run"]
one, two = (two_steps(replace(recipe, micro_batch_size=size)) for size in (1, 2))
print("micro batch 1:", show_bytes(one.peak_bytes))
print("micro batch 2:", show_bytes(two.peak_bytes))

# %% [markdown]
# <details><summary>Hint 1</summary>Memory is linear in the batch: a part that is always there,
# and a part for each sequence.</details>
# <details><summary>Hint 2</summary>The difference of the two runs is one sequence. Subtract it from
# the first run: what is left is there for any batch.</details>
# <details><summary>Hint 3</summary><code>(120 * MIB - fixed) // (...)</code></details>

# %% tags=["exercise"]
largest_batch = ...

# %% tags=["check"]
exercises.check_largest_batch(largest_batch, two_steps, recipe, budget_bytes=120 * MIB)

# %% [markdown]
# ## 5 · LoRA to the rescue?
# LoRA freezes the weights and trains two thin matrices beside some of them. It is sold as the cure
# for memory. So:
#
# ### Predict
# The same two steps with rank-16 adapters on attention's four linear layers: q, k, v and o. The
# peak falls to which fraction of the peak in section 1? (0.1 would be a tenth.)

# %% tags=["predict"]
predicted_fraction = ...

# %% tags=["run"]
lora = two_steps(replace(recipe, lora_rank=16))
show_prediction(predicted_fraction, show="{:.2f} of the peak".format,
                counted=lora.peak_bytes / full.peak_bytes)
figures.compare({"all weights": full, "LoRA": lora}, title="at the peak of two steps")

# %% [markdown]
# ### Explain
# Gradients and optimizer state all but vanish: they follow the *trained* parameters. Most of the
# activations stay, because the gradient must still travel through every frozen layer down to the
# first adapter, and needs the same operands on its way. Only what a frozen weight's own gradient
# would have read goes: the norms' normalised inputs, and the inputs of linear layers without an
# adapter.
#
# How much is that for a layer of Llama-2-7B, trained as people do, in 16 bits with float32
# adapters?

# %% tags=["run"]
adapted = replace(seven, lora_rank=16, amp_dtype="float16")
everywhere = replace(adapted, lora_targets="all-linear")
for name, variant in {"all weights": seven, "LoRA on q, k, v, o": adapted,
                      "LoRA on every linear layer": everywhere}.items():
    ratio = count_block(variant).saved_activation_bytes / boundary_bytes(variant)
    print(f"{name:27}{ratio:5.1f} x the boundary")

# %% [markdown]
# A few boundaries out of over twenty; and with adapters on every linear layer even more is kept,
# since each adapter keeps a 16-bit copy of its input of its own. So "gradients as large as the
# weights, Adam twice that" becomes "as large as the *adapters*", and "LoRA cures out of memory"
# holds only while activations are the smaller part. [LoRA, section 4.2: the saving it claims is
# optimizer state]

# %% [markdown]
# ## 6 · The term nobody mentions
# The last thing forward computes are the **logits**: for each token one number for each word of the
# vocabulary. Llama-3.2-1B has a vocabulary of 128 256. In come 4 sequences of 1024 token ids.
#
# ### Predict
# How many bytes is *one* float32 copy of the logits? (The ids themselves: 4 x 1024 x 8 bytes, 32
# KiB.)

# %% tags=["predict"]
predicted_logits = ...

# %% tags=["run"]
from fitcast import fake_model, fake_tensors
model = fake_model("llama-3.2-1b", torch.float16)  # its shapes, without its weights
with fake_tensors(), MemoryLedger(model) as ledger:
    ids = torch.zeros(4, 1024, dtype=torch.long)
    model(input_ids=ids, labels=ids).loss.backward()
big = ledger.report()
show_prediction(predicted_logits, counted=big.largest[0].n_bytes,
                peak_of_the_step=big.peak_bytes)

# %% tags=["run"]
for block in big.largest[:6]:
    print(f"{show_bytes(block.n_bytes):>11}  {block.dtype}  {block.shape}  {block.operation}")

# %% [markdown]
# ### Explain
# 32 KiB went in. The loss turns the 16-bit logits into float32 for safety, its softmax keeps a copy
# for backward, and backward makes two more before the first can go: three copies, more than all the
# weights of this model. Whoever counts "layers x something" misses them, because the head is no
# layer; once lesson 02 has shrunk the layers, they *are* the peak. Lesson 06 removes them.
# [transformers: `ForCausalLMLoss` in loss/loss_utils.py]

# %% [markdown]
# ## Exercise 01.3 · The biggest tensor at the peak
# *Easy, 5 minutes.* Back to the report of section 1, `full`. `full.largest` lists the tensors alive
# at its peak, each with `n_bytes`, `shape`, `category` and `operation`. How many bytes of the peak
# have the shape of the logits, the vocabulary (1280) as their last dimension?
#
# <details><summary>Hint 1</summary>Print the shapes of <code>full.largest[:6]</code>
# first.</details>
# <details><summary>Hint 2</summary>The embedding matrix is (1280, 192): its <em>last</em> dimension
# is another one.</details>
# <details><summary>Hint 3</summary><code>sum(t.n_bytes for t in full.largest if
# ...)</code></details>

# %% tags=["exercise"]
logits_at_peak = ...

# %% tags=["check"]
exercises.check_logits_at_peak(logits_at_peak, full, vocab_size=1280)

# %% [markdown]
# ## For those who struggle
# One small case by hand. Two tokens of 3 numbers go through Linear(3 → 4), ReLU, Linear(4 → 1).
#
# | operation | backward needs | numbers | bytes |
# |---|---|---|---|
# | Linear(3 → 4) | its input | 2 x 3, the caller's own | 0 more |
# | ReLU | its output: where is it above 0? | 2 x 4 | 32 |
# | Linear(4 → 1) | its input, which *is* ReLU's output | the same storage | 0 more |
#
# So 32 bytes. The ledger agrees:

# %% tags=["run"]
small = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
x = torch.ones(2, 3)
with MemoryLedger(small, inputs=x) as ledger:
    y = small(x)
print(ledger.report().saved_activation_bytes, "bytes kept for backward")

# %% [markdown]
# Change ReLU to `torch.nn.SiLU()`. Its derivative needs its *input*; now two tensors of 2 x 4 are
# kept. Predict, then run.
#
# ## Go further
# Qwen3-0.6B keeps far more per boundary than Llama does. Run `count_block(replace(seven,
# model="qwen3-0.6b"))`, print its `saved` list as in section 2, and find the two reasons.
# (Compare `head_dim x heads` with `hidden_size`, and look for norms where Llama has none.) And if
# you do not believe the ledger: `torch.autograd.graph.saved_tensors_hooks` hands you each tensor
# that autograd keeps. Count one layer with it; mind storages that two tensors share.
#
# ## Try with AI
# Ask an assistant:
#
# > I train all weights of Llama-2-7B in 16 bits, batch 1, sequence length 2048, without gradient
# > checkpointing. How much memory do the activations of the 32 layers take? State the formula, say
# > what it leaves out, and say what changes with FlashAttention and with LoRA on q, k, v, o.
#
# A right answer says that layers x batch x sequence x hidden x 2 bytes counts only the boundaries,
# asks or states which attention kernel runs, says that LoRA hardly changes it, mentions the logits,
# and comes close to these numbers:

# %% tags=["run"]
answers = {
    "boundaries only": estimate, "SDPA or Flash": sdpa, "eager": eager,
    "SDPA, LoRA on q, k, v, o": 32 * count_block(adapted).saved_activation_bytes,
    "one float32 copy of the logits": 2048 * 32000 * 4,
}
for name, n_bytes in answers.items():
    print(f"{name:32}{show_bytes(n_bytes):>10}")

# %% [markdown]
# ## What this lesson left out
# The CUDA context and cuBLAS workspaces, the allocator's rounding and fragmentation (`forecast` has
# them, the ledger has not); dropout masks; kernels that keep something else on a GPU than on a
# CPU (a T4 has no FlashAttention: lesson 06); autocast (lesson 04).
#
# ## Sources
# - Rajbhandari et al. 2020, [ZeRO](https://arxiv.org/abs/1910.02054), section 3: who holds what
# - Korthikanti et al. 2022, [Reducing activation recomputation](https://arxiv.org/abs/2205.05198),
#   section 4: a layer's activations, term by term
# - Dao et al. 2022, [FlashAttention](https://arxiv.org/abs/2205.14135), section 3
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685), section 4
# - PyTorch, [Autograd mechanics](https://docs.pytorch.org/docs/stable/notes/autograd.html): saved
#   tensors
# - transformers,
#   [loss_utils.py](https://github.com/huggingface/transformers/blob/main/src/transformers/loss/loss_utils.py)
#
# New terms are in the [glossary](glossary.md).
#
# ## To lesson 02
# One number to take along. A layer keeps this many times its boundary:

# %% tags=["run"]
print(f"{sdpa / estimate:.1f}")

# %% [markdown]
# What if we kept *only* the boundaries, and computed the rest again when backward asks for it?
# Then the usual estimate would come true. What would it cost? Lesson 02 asks: what if we forget
# on purpose?
