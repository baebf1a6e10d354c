# %% [markdown]
# # 01 · Where does the memory go?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/01_where_does_the_memory_go.ipynb)
#
# **45 min** for those who have fine-tuned a transformer, 60 to 75 for others; a place to stop comes
# half-way, after some 25 minutes (others: 40) · runs anywhere; a GPU fills in the lines that say
# "measured".
#
# "CUDA out of memory", and the weights alone would have fitted. Who took the rest? In this lesson
# you guess, then count every byte of a training step, and see which guesses were off, and by how
# much.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *name* the four holders of memory and *say* when each comes and goes | B1 | section 1 |
# | *calculate* what one transformer layer keeps for backward, to the byte | B2 | exercise 01.1 |
# | *predict* how memory grows with batch and length | B1 | section 3 |
# | *analyse* a peak: which tensor, which operation, how many copies | B2 | exercise 01.2 |
#
# (B1: you can use it. B2: you can take it apart and build with it.)
#
# **Needs:** a PyTorch training loop you can read, and a transformer layer's parts by name: norms,
# attention with query, key and value, an MLP. No earlier lesson.
# **New concepts (5):** the four holders · tensors kept for backward · layer boundary · attention
# kernel · the logits term. Each is in the [glossary](glossary.md).

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
import gc
import warnings
from dataclasses import replace
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from course_utils import data, figures
from course_utils.exercises import lesson_01 as exercises
from course_utils.exercises.predictions import show_prediction
from fitcast import MIB, MemoryLedger, gpus, show_bytes
warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated")
print(gpus.describe(gpus.detect()))

# %% [markdown]
# ## Five questions, before and after
# What do you know already? Five letters, `x` for "not yet". You will answer the same five at the
# end. Nobody else sees it.

# %% tags=["self-check"]
exercises.QUESTIONS

# %% tags=["self-check"]
before = ...  # for example "abcda"

# %% [markdown]
# ## The whole game first
# Llama-3.2-3B, all of its weights trained, 4 sequences of 1024 tokens, and a T4 that we only
# pretend to have: the tensors below have shapes and no numbers, so a step of a 3B model runs
# anywhere. Of the 14.56 GiB CUDA itself takes a little; 14.42 GiB are left, and the `MemoryLedger`
# refuses what would need more.

# %% tags=["run"]
def two_steps(model, ids, budget_bytes=None):
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    with MemoryLedger(model, inputs=ids, budget_bytes=budget_bytes) as ledger:
        for _ in range(2):
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.report()

# %% tags=["setup"]
from fitcast import fake_tensors, models
from fitcast.forecasting.fake import meta_model, on_fake_tensors
from fitcast.step import compat
compat.look_past()  # Colab's torchao is older than PEFT wants it; nothing here uses it
def on_a_t4(model):
    with fake_tensors():
        ids = torch.zeros(4, 1024, dtype=torch.long)
        return two_steps(on_fake_tensors(model), ids, gpus.T4.usable_bytes)

shape = models.config("llama-3.2-3b")  # its sizes, no weights

# %% [markdown]
# The next cell fails on purpose. Read its last line only. (If "run all" stops here, run the cells
# after it.)

# %% tags=["raises-exception"]
model = meta_model(shape, torch.float32)
on_a_t4(model)

# %% [markdown]
# It died in the third of 28 layers, in its first forward pass. Now three changed lines:

# %% tags=["run"]
model = meta_model(shape, torch.float16)                                              # 1
model = get_peft_model(model, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))  # 2
model.gradient_checkpointing_enable()                                                 # 3
print("two steps done, peak", show_bytes(on_a_t4(model).peak_bytes))

# %% [markdown]
# It trains (on a real T4, whose allocator leaves gaps, *tightly*: lesson 02). Weights in 16 bits
# (1), only small *adapters* beside them trained (2: LoRA; 16 is their inner width), what layers
# computed forgotten and computed again (3). Take any one of the three away (1: back to `float32`;
# 2, 3: comment it out) and it dies again. Guess where each time (in a layer, in the head, in the
# optimizer?), then try it. (Two minutes; put the line back.)
# <details><summary>Answer</summary>Without 1 in the head, on the way forward; without 2 in the
# optimizer's step; without 3 in the 19th of the 28 layers, on the way forward. (Counted with the
# CPU's attention kernel: a real T4's keeps more, section 3, and dies earlier.)</details>
#
# The same three lines with numbers in the tensors, on the small model that the course carries. Its
# first loss is worse than a blind guess among its 1280 tokens (ln 1280 = 7.2): it learned on
# customers' talk, in prose, and is *sure* of that; these texts are filled-in forms.

# %% tags=["run"]
small = AutoModelForCausalLM.from_pretrained(data.BUNDLED, use_safetensors=True,
                                             dtype=torch.float16)                          # 1
small = get_peft_model(small, LoraConfig(r=16, target_modules=["q_proj", "v_proj"]))       # 2
small.config.use_cache = False
small.gradient_checkpointing_enable()                                                      # 3
text = "\n".join(data.load_instructions()["answer"][:3])
ids = data.tokenizer()(text, return_tensors="pt")["input_ids"].to(gpus.device())
small = small.to(gpus.device()).train()
start = small(input_ids=ids, labels=ids).loss.item()
for _ in range(10):
    two_steps(small, ids)
end = small(input_ids=ids, labels=ids).loss.item()
print(f"loss {start:.0f}, after 20 steps at least 4 lower:", end < start - 4)

# %% [markdown]
# Why do these three help, and which would *your* run need? That is the course. This lesson finds
# out who had the memory. (Lesson 02 is line 3, 04 is line 1; line 2 comes back in Go further.)

# %% [markdown]
# ## 1 · Four holders, one training step
# *Forward* computes the loss of a batch; *backward* (PyTorch's *autograd* does it) computes for
# each weight its *gradient*, how the loss changes with it; the *optimizer* then moves the weight.
# Adam, the usual one, keeps two running averages of each gradient, its *state*.
#
# Here is the small Llama again, with **all** of its weights trained in float32: 4 layers, 192
# numbers wide, a vocabulary of 1280; 4 sequences of 128 tokens. Who holds memory? Three holders you
# can find by asking the objects that you have:

# %% tags=["run"]
memory_before = gpus.reset_peak()
model = AutoModelForCausalLM.from_pretrained(data.BUNDLED, use_safetensors=True,
                                             dtype=torch.float32)
model = model.to(gpus.device()).train()
ids = torch.randint(0, 1280, (4, 128), device=gpus.device())
optimizer = torch.optim.AdamW(model.parameters())
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
weights = list(model.parameters())
holders = {"weights": sum(w.nbytes for w in weights),
           "gradients": sum(w.grad.nbytes for w in weights),
           "optimizer state": sum(t.nbytes for s in optimizer.state.values() for t in s.values())}
for name, n_bytes in holders.items():
    print(f"{name:16}{show_bytes(n_bytes):>10} = {n_bytes / holders['weights']:.2f} x weights")

# %% [markdown]
# Gradients are as large as the weights, Adam's state is twice that: remember it with its condition,
# *when every weight is trained, in float32*, 4 + 4 + 8 bytes a parameter. The fourth holder no
# object shows: what forward leaves behind, so that backward can use it. The gradient of `w * x`
# with respect to `w` is `x`, so somebody has to keep `x`. Autograd does, and it lets you watch. (A
# *storage* is the piece of memory behind a tensor, `data_ptr()` its address: each counts once.)

# %% tags=["run"]
def kept_for_backward(model, ids):
    storages = {}
    def note(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()  # two tensors may share one storage
        return tensor.detach()  # the tensor itself could hold the node that holds it: a leak
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss  # holds the graph, and with it the tensors
    mine = {w.untyped_storage().data_ptr() for w in model.parameters()} | {ids.data_ptr()}
    return sum(n for address, n in storages.items() if address not in mine)

# %% [markdown]
# ### Predict
# The weights take 5.82 MiB, the batch of token ids 4 KiB. How many bytes does forward keep for
# backward: fewer than the weights, as many, several times as many? Write, for example, `8 * MIB`. A
# wrong guess teaches more.

# %% tags=["predict"]
predicted_kept = ...

# %% tags=["run"]
kept = kept_for_backward(model, ids)
share = f"= {kept / holders['weights']:.1f} x weights"
show_prediction(predicted_kept, counted_by_your_hooks=kept, also=share)

# %% [markdown]
# ### Explain
# The largest holder is none of the three that you could ask. It is the one that follows the *data*,
# and this lesson takes it apart.
#
# Your dozen lines add up one moment. The `MemoryLedger` does the same for every operation: it books
# each storage from its first byte to its last reference. Two whole steps. Guess first: in which of
# the two is the peak, and in forward, in backward or in the optimizer's step?

# %% tags=["run"]
optimizer = None
gc.collect()  # an optimizer refers to itself: its state is freed only now
model.zero_grad()
gpus.reset_peak()
full = two_steps(model, ids)
measured = gpus.peak_allocated_bytes(above=memory_before)
print("peak, counted: ", show_bytes(full.peak_bytes))
print("peak, measured:", show_bytes(measured))
figures.memory_over_time(full, "two training steps, all weights trained")

# %% [markdown]
# Read it from left to right. **Forward** climbs: every layer leaves tensors behind. **Backward**
# descends: it uses them up, last layer first, and leaves gradients. The **optimizer step** creates
# Adam's two averages, once; they stay. `zero_grad()` lets the gradients go: their band, the one
# above the weights, ends. Adam's averages stay: the second step starts higher than the first, and
# the peak belongs to
# the *second* step, at the first moment of its backward, in the loss (section 4): whoever probes a
# batch size runs two. *Temporaries*, the thin band on top, live for a few operations. (On a GPU
# both numbers can be higher: its kernels keep other tensors, and its allocator rounds sizes up.)

# %% [markdown]
# ## 2 · What does one layer keep?
# Layer *i* has its own set of kept tensors, aᵢ in the picture, until backward has passed it. A
# Llama layer, from its input to its output: norm → query, key, value → query and key rotated by
# position → attention → a linear layer → added to the input; norm → gate and up (two linear layers)
# → silu of gate, times up → down → added.

# %% tags=["run"]
figures.forward_backward(layers=4)

# %% [markdown]
# ### Predict
# One layer of our model receives a tensor of shape (4, 128, 192): 384 KiB in float32. That is the
# **layer boundary**. How many times its size does the layer keep for backward?

# %% tags=["predict"]
predicted_ratio = ...

# %% tags=["setup"]
from fitcast import TrainRecipe, count_block
# a recipe: the settings of one training step; `replace` gives a copy with some changed
recipe = TrainRecipe(model=data.BUNDLED, base="float32", lora_rank=None, lora_dropout=0,
                     micro_batch_size=4, sequence_length=128, optimizer="adamw",
                     checkpointed_layers=0)  # micro batch: the sequences of one forward pass

# %% tags=["setup"]
def as_rows(layer, per_token):  # how the list is printed
    rows = []
    for tensor in layer.saved:
        what = tensor.operation.split(".")[0]  # the ledger made up the first one
        who = f"{tensor.module or 'the layer itself'} · {what}" if rows else "the layer's input"
        rows.append(f"{tensor.n_bytes // per_token:5}  {who}")
    return [*rows, f"{layer.saved_activation_bytes // per_token:5}  numbers for each token, in all"]

# %% tags=["run"]
from fitcast.forecasting.block import boundary_bytes
layer = count_block(recipe)  # one layer under the ledger
rows = as_rows(layer, per_token=4 * 4 * 128)  # 4 bytes, 4 sequences of 128 tokens
show_prediction(predicted_ratio, show="{:.2f} x the boundary".format, also="\n".join(rows),
                counted=layer.saved_activation_bytes / boundary_bytes(recipe))

# %% [markdown]
# ### Explain
# The list has every kept tensor in order, as numbers per token, with its maker. Each is an operand
# of a product, or the input or output of a function, whichever its derivative needs:
#
# - the two norms keep their input, one number (1 / root mean square: `rsqrt`), the normalised
#   input, and the result, which is the operand of the linear layers behind them (two `mul`);
# - attention keeps value, query and key (both rotated: two `add`), its output, and one number for
#   each query head; key and value are narrow: two heads of theirs serve six of the query;
# - the MLP keeps four tensors of its inner width, 384.
#
# (`mm` is a matrix product.) An addition itself keeps nothing: `add` in the list names who *made* a
# tensor that the operation behind it needs. Weights do not count: they are there anyway. (A formula
# that you will meet counts the boundary, and nothing else: Go further.) [PyTorch: autograd
# mechanics, "Saved tensors"]

# %% [markdown]
# ## Exercise 01.1 · Bytes of a given layer
# *Medium, 8 minutes.* Complete the formula: how many numbers does a layer keep for each token, all
# in float32, given its widths? (In 16 bits the norms keep more: Go further.) (Ours has `hidden`
# 192, `kv` 64 for key and for value each, `intermediate` 384, `heads` 6.) The check counts three
# layers with the ledger, from ours to one of Llama-2-7B, and wants **every byte**.
#
# <details><summary>Hint 1</summary>Group the list of section 2: which lines have the width 192, 64,
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
exercises.check_saved_numbers(numbers_kept)

# %% [markdown]
# *Half-way, and a good place to stop. When you come back: run all cells above, then go on.*
#
# ## 3 · Two laws
# An **attention kernel** is the code that computes attention. transformers' *eager* is the formula,
# product by product. Its default, SDPA, is one operation, PyTorch's `scaled_dot_product_attention`,
# which picks a kernel by GPU, dtype and mask.
#
# ### Predict
# A layer of Llama-2-7B, and twice the text, 4096 tokens in place of 2048. What the layer keeps
# grows by which factor with eager attention? And with SDPA? And, eager again, with twice the
# *sequences*, two of 2048 tokens in place of one?

# %% tags=["predict"]
predicted_factor_eager = ...
predicted_factor_sdpa = ...
predicted_factor_batch = ...

# %% tags=["setup"]
seven = TrainRecipe(model="llama-2-7b", base="float16", lora_rank=None, lora_dropout=0,
                    sequence_length=2048, checkpointed_layers=0)

# %% tags=["run"]
lengths = [512, 1024, 2048, 4096]
kept = {name: [count_block(replace(seven, attention=kind, sequence_length=length))
               .saved_activation_bytes for length in lengths]
        for name, kind in (("eager", "eager"), ("SDPA", "stock"))}
factors = {name: line[3] / line[2] for name, line in kept.items()}
figure = figures.curves(lengths, kept, "tokens in the sequence", "What a layer of Llama-2-7B keeps")
times = "{:.2f} x".format
twice = count_block(replace(seven, attention="eager", micro_batch_size=2)).saved_activation_bytes
show_prediction(predicted_factor_eager, show=times, counted_with_eager=factors["eager"])
show_prediction(predicted_factor_sdpa, show=times, counted_with_SDPA=factors["SDPA"])
show_prediction(predicted_factor_batch, show=times, also=figure,
                counted_with_two_sequences=twice / kept["eager"][2])

# %% [markdown]
# ### Explain
# **Sequence: it depends on the kernel.** Eager attention also keeps the scores of every pair of
# positions, for every head: a straight part plus a quadratic one, so doubling gives a factor
# between 2 and 4, the closer to 4 the longer the text. SDPA's line is straight: the kernel that it
# picks here never writes scores to memory, keeps one number for each query and head, and computes
# the scores again [FlashAttention, section 3.1]. (Not everywhere: for Llama 3 without a mask a T4
# gets a kernel that does write them. Lesson 02, section 5, sees the 1B model keep nearly eight
# times as much for four times the tokens.) **Batch: always linear**, because every tensor in the
# list of section 2 has the batch as a factor.
#
# (The bar "usual estimate" counts one boundary a layer: Go further.) Move the controls (with the
# mouse, or Tab and the arrow keys). **Task:** Llama-2-7B at 1 x 2048 tokens, eager. How many
# sequences can SDPA take before it keeps more than that? (The control knows 1, 2, 4; the line
# between them is straight.)
# <details><summary>Answer</summary>Three: three times SDPA's 11.38 GiB is less than eager's 35.38
# GiB. Of the control's choices 2 keep less, 4 more.</details>

# %% tags=["run"]
figures.layers_explorer()

# %% [markdown]
# ## 4 · The term that few count
# The last thing that forward computes before the loss are the **logits**: for each token one number
# for each word of the vocabulary. Llama-3.2-1B has 128 256 words. In come 4 sequences of 1024 token
# ids.
#
# ### Predict
# How many bytes is *one* float32 copy of the logits? (The ids themselves: 4 x 1024 x 8 bytes, 32
# KiB.)

# %% tags=["predict"]
predicted_logits = ...

# %% tags=["run"]
big_model = on_fake_tensors(meta_model(models.config("llama-3.2-1b"), torch.float16))
with fake_tensors(), MemoryLedger(big_model) as ledger:
    big_ids = torch.zeros(4, 1024, dtype=torch.long)
    big_model(input_ids=big_ids, labels=big_ids).loss.backward()
big = ledger.report()
rows = "\n".join(f"{show_bytes(t.n_bytes):>11}  {t.dtype}  {t.shape}  {t.operation}"
                 for t in big.largest[:6])
show_prediction(predicted_logits, counted=big.largest[0].n_bytes,
                peak_of_forward_and_backward=big.peak_bytes,
                also=["The largest at the peak:", rows])

# %% [markdown]
# ### Explain
# 32 KiB went in. The loss turns the 16-bit logits into float32 for safety (a copy that is soon
# freed), its log-softmax keeps one for backward, and backward makes two more before that one can
# go: three copies; keep `out = model(...)` alive during backward, as many loops do, and the 16-bit
# logits stay too. (Most of what else stands at the peak is what its 16 layers keep, with the CPU's
# kernel; on a T4 it is far more.) This is the **logits term**. Whoever counts "layers x something"
# misses it, because the output head, `lm_head`, is none of the layers. [transformers:
# `ForCausalLMLoss` in loss/loss_utils.py]

# %% tags=["run"]
tensors = [tensor for tensor in full.largest if tensor.shape]  # without single numbers
print(len(tensors), "tensors were alive at the peak of section 1, the largest first")

# %% [markdown]
# ## Exercise 01.2 · The logits at the peak
# *Easy, 5 minutes.* Each of `tensors` has `n_bytes`, `shape`, `category` and `operation`. How many
# bytes of section 1's peak, in all, have the shape of the logits, the vocabulary (1280) as their
# last dimension? And how many copies is that, made by which operations? (The check names them when
# you are right.)
#
# <details><summary>Hint 1</summary>Print the shapes of <code>tensors[:6]</code> first.</details>
# <details><summary>Hint 2</summary>The embedding matrix is (1280, 192): its <em>last</em> dimension
# is another one.</details>
# <details><summary>Hint 3</summary><code>sum(t.n_bytes for t in tensors if ...)</code></details>

# %% tags=["exercise"]
logits_at_peak = ...

# %% tags=["check"]
exercises.check_logits_at_peak(logits_at_peak, full, vocab_size=1280)

# %% [markdown]
# ## In your script
# No course, no `fitcast`: PyTorch's own instruments, for any model. (This one: a download of 1 GB,
# which takes a while, and 494 million weights at 16 bytes [Qwen2.5-0.5B]; without a GPU its tensors
# take over 8 GiB of the computer's own memory.) Two steps, because of Adam. The snapshot
# shows who held what, and which line of yours allocated it: drop the file on
# [pytorch.org/memory_viz](https://pytorch.org/memory_viz). (`nvidia-smi` shows more than the peak:
# CUDA's context, and memory that PyTorch keeps for later. `torch.cuda.empty_cache()` hands that to
# other processes; for your own it makes no room. [PyTorch: CUDA semantics])
#
# Guess before you run it: how far above the first three holders is the peak, and who is there?
# <details><summary>What to expect</summary>The three are 7.36 GiB; the peak on a T4 is above 9 GiB,
# by forecast. This time it is not the data: 512 tokens are few, and the peak is in the optimizer's
# step, where PyTorch's AdamW takes all weights at once and holds a temporary of their size.
# <code>AdamW(..., fused=True)</code> needs none and stays below 9 GiB. With 2048 tokens the data
# win, and a T4 is too small.</details>
#
# ```python
# import torch
# from transformers import AutoModelForCausalLM
#
# on_gpu = torch.cuda.is_available()
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.float32)
# if on_gpu:
#     torch.cuda.memory._record_memory_history(max_entries=100_000)
# model = model.to("cuda" if on_gpu else "cpu").train()
# ids = torch.randint(0, model.config.vocab_size, (1, 512), device=model.device)
# optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
# for _ in range(2):
#     model(input_ids=ids, labels=ids).loss.backward()
#     optimizer.step()
#     optimizer.zero_grad()
# held, peak = 16 * model.num_parameters() / 2**30, torch.cuda.max_memory_allocated() / 2**30
# print(f"weights, gradients, state {held:.2f} GiB, peak {peak:.2f} (0: no GPU, not measured)")
# if on_gpu:
#     torch.cuda.memory._dump_snapshot("two_steps.pickle")
# ```
#
# Now put in your own model's id and length. (First its weights times 16 bytes: of a model of 1B not
# even the first three fit a T4. Where it runs out of memory, it does not come to the snapshot: put
# the loop into `try:`, the last two lines into `finally:`.) Before you look, write down which of
# the four holders leads at the peak.
#
# ## And now?
# The same five questions.

# %% tags=["self-check"]
after = ...

# %% tags=["self-check"]
exercises.QUESTIONS.score(before, after)

# %% [markdown]
# ## To lesson 02
# A layer keeps some seventeen times its boundary (in float32; one of Llama-2-7B in 16 bits 22.8),
# and LoRA alone leaves well over half of section 1's peak (Go further). What if we kept *only* the
# boundaries, and computed the rest again when backward asks for it? Lesson 02 asks: what if we
# forget on purpose?

# %% [markdown]
# ## Go further (optional)
# Everything from here on is beyond the 45 minutes: take what you like.

# %% [markdown]
# ### The usual estimate
# You will meet this formula for activation memory: layers x batch x sequence x hidden x 2 bytes
# (numbers of 16 bits). For Llama-2-7B (32 layers, hidden 4096) at one sequence of 2048 tokens it
# gives 512 MiB. [Korthikanti et al. 2022, section 5: 2sbhL, full recomputation]
#
# ### Predict
# How much do the 32 layers really keep, with SDPA? In bytes: 2 GiB would be `2048 * MIB`.

# %% tags=["predict"]
predicted_layers = ...

# %% tags=["run"]
estimate = 32 * boundary_bytes(seven)
sdpa = 32 * count_block(seven).saved_activation_bytes
eager = 32 * count_block(replace(seven, attention="eager")).saved_activation_bytes
rows = {"usual estimate": estimate, "SDPA": sdpa, "eager": eager}
figure = figures.compare({name: {"activations": kept} for name, kept in rows.items()},
                         title="Llama-2-7B: what 32 layers keep, 1 x 2048 tokens")
times = f"of the estimate: SDPA {sdpa / estimate:.1f} x, eager {eager / estimate:.1f} x"
show_prediction(predicted_layers, counted=sdpa, counted_with_eager=eager, usual_estimate=estimate,
                also=[times, figure])

# %% [markdown]
# ### Explain
# The usual estimate counts one tensor a layer: the boundary. Section 2 counted what lies *between*
# two boundaries, here over twenty times as much, and eager attention adds its scores. Remember the
# estimate all the same: checkpointing, lesson 02, makes it come true.

# %% [markdown]
# ### LoRA to the rescue?
# LoRA freezes the weights and trains two thin matrices beside some of them. It is sold as the cure
# for memory. So:
#
# ### Predict
# The two steps of section 1 with rank-16 adapters on attention's four linear layers: q, k, v and o.
# The peak falls to which fraction? (0.1 would be a tenth.)

# %% tags=["predict"]
predicted_fraction = ...

# %% tags=["setup"]
from fitcast.step import qlora
def steps_of(recipe, budget_bytes=None):
    model = qlora.add_adapters(qlora.load_base(recipe), recipe)
    shape = (recipe.micro_batch_size, recipe.sequence_length)
    ids = torch.randint(0, model.config.vocab_size, shape, device=gpus.device())
    return two_steps(model, ids, budget_bytes)

# %% tags=["run"]
lora = steps_of(replace(recipe, lora_rank=16))
show_prediction(predicted_fraction, show="{:.2f} of the peak".format,
                counted=lora.peak_bytes / full.peak_bytes,
                also=figures.compare({"all weights": full, "LoRA": lora}, title="at the peak"))

# %% [markdown]
# ### Explain
# Gradients and optimizer state all but vanish: they follow the *trained* parameters. Most of the
# activations stay, because the gradient must still travel through every frozen layer down to the
# first adapter, and needs the same operands on its way. Only what a frozen weight's own gradient
# would have read goes: the norms' normalised inputs, and the inputs of linear layers without an
# adapter. And for a layer of Llama-2-7B, trained as people do, in 16 bits with float32 adapters?

# %% tags=["run"]
adapted = replace(seven, lora_rank=16, amp_dtype="float16")
everywhere = replace(adapted, lora_targets="all-linear")
for name, variant in {"all weights": seven, "LoRA on q, k, v, o": adapted,
                      "LoRA on every linear layer": everywhere}.items():
    ratio = count_block(variant).saved_activation_bytes / boundary_bytes(variant)
    print(f"{name:27}{ratio:5.1f} x the boundary")

# %% [markdown]
# A few boundaries out of over twenty; and with adapters on every linear layer even more is kept,
# since each adapter keeps a 16-bit copy of its input of its own. "LoRA cures out of memory" holds
# only while activations are the smaller part. [LoRA, section 4.2: the saving it claims is optimizer
# state]

# %% [markdown]
# ## Exercise 01.3 · The largest batch
# *Medium, 8 minutes.* This is what too much looks like, on a pretended card of 120 MiB.

# %% tags=["raises-exception"]
steps_of(replace(recipe, micro_batch_size=32), budget_bytes=120 * MIB)

# %% [markdown]
# How many sequences of 128 tokens fit on that card, when all weights are trained for two steps or
# more? Two runs are enough to know; you need no search. (Not from batch 1: on a GPU its peak is in
# the optimizer's step.) The check *runs* your answer within 120 MiB, and one more.

# %% tags=["run"]
two, four = (steps_of(replace(recipe, micro_batch_size=size)) for size in (2, 4))
print("micro batch 2:", show_bytes(two.peak_bytes))
print("micro batch 4:", show_bytes(four.peak_bytes))

# %% [markdown]
# <details><summary>Hint 1</summary>As long as the peak is in backward, memory is linear in the
# batch: a part that is always there, and a part for each sequence.</details>
# <details><summary>Hint 2</summary>The difference of the two runs is two sequences. Take it from
# the first run: what is left is there for any batch.</details>
# <details><summary>Hint 3</summary><code>(120 * MIB - fixed) // (...)</code></details>

# %% tags=["exercise"]
largest_batch = ...

# %% tags=["check"]
exercises.check_largest_batch(largest_batch, steps_of, recipe, budget_bytes=120 * MIB)

# %% [markdown]
# ### A formula from a paper, term by term
# Korthikanti et al. count for GPT's layer sequence x batch x hidden x (34 + 5 x heads x sequence /
# hidden) bytes. The second part are the scores, which SDPA does not keep. The first is 34 / 2 = 17
# boundaries: 5.5 in attention, 9.5 in the MLP, 2 in the norms, dropout masks among them. And ours?

# %% tags=["run"]
ours, boundary = {}, boundary_bytes(seven)
for tensor in count_block(seven).saved:
    part = "norms" if "norm" in tensor.module else tensor.module.split(".")[0].split("_")[-1]
    ours[part] = ours.get(part, 0) + tensor.n_bytes / boundary
print({part: round(boundaries, 1) for part, boundaries in ours.items()})
print(f"in all {sum(ours.values()):.1f} boundaries")

# %% [markdown]
# Llama's norms work in float32 and keep that copy (two boundaries) beside the 16-bit ones. Its MLP
# has a gate, so four inner tensors where GPT has two, and no dropout. A formula belongs to *one*
# architecture; count yours. [Korthikanti et al. 2022, section 4]
#
# ### For those who struggle
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
tiny = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
x = torch.ones(2, 3)
with MemoryLedger(tiny, inputs=x) as ledger:
    y = tiny(x)
print(ledger.report().saved_activation_bytes, "bytes kept for backward")

# %% [markdown]
# Change ReLU to `torch.nn.SiLU()`. Its derivative needs its *input*; now two tensors of 2 x 4 are
# kept. Predict, then run.
#
# ### An open question
# Qwen3-0.6B keeps far more per boundary than Llama does. Run `count_block(replace(seven,
# model="qwen3-0.6b"))`, print its `saved` list as in section 2, and find the two reasons.
# (Compare `head_dim x heads` with `hidden_size`, and look for norms where Llama has none.)
#
# ### Try with AI
# Ask an assistant:
#
# > I train all weights of Llama-2-7B in 16 bits, batch 1, sequence length 2048, without gradient
# > checkpointing. How much memory do the activations of the 32 layers take? State the formula, say
# > what it leaves out, and say what changes with FlashAttention and with LoRA on q, k, v, o.
#
# A right answer says that layers x batch x sequence x hidden x 2 bytes counts only the boundaries,
# asks or states which attention kernel runs, says that LoRA changes it little, mentions the logits,
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
# The CUDA context and cuBLAS workspaces, the allocator's rounding and fragmentation (a `forecast`
# has them, the ledger has not); dropout masks; kernels that keep something else on a GPU than on a
# CPU; autocast.
#
# ## Sources
# - Rajbhandari et al. 2020, [ZeRO](https://arxiv.org/abs/1910.02054), section 3: who holds what
# - Korthikanti et al. 2022, [Reducing activation recomputation](https://arxiv.org/abs/2205.05198),
#   section 4: a layer's activations, term by term; section 5: what is left when all is recomputed
# - Dao et al. 2022, [FlashAttention](https://arxiv.org/abs/2205.14135), section 3
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685), section 4
# - PyTorch, [Autograd mechanics](https://docs.pytorch.org/docs/stable/notes/autograd.html): saved
#   tensors; [CUDA semantics](https://docs.pytorch.org/docs/stable/notes/cuda.html): memory
#   management; [Understanding CUDA memory usage](https://docs.pytorch.org/docs/stable/torch_cuda_memory.html)
# - Qwen, [Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B): model card
# - transformers,
#   [loss_utils.py](https://github.com/huggingface/transformers/blob/main/src/transformers/loss/loss_utils.py)
#
# New terms are in the [glossary](glossary.md).
