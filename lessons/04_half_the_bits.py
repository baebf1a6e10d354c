# %% [markdown]
# # 04 · Half the bits, all the quality?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/04_half_the_bits.ipynb)
#
# **45 min** for those who have fine-tuned a transformer (the longest lesson: many take 55), 60 to
# 75 for others; two thirds in is a place to stop · runs anywhere; a GPU fills in the lines that say
# "measured".
#
# Checkpointing shrank what layers keep (lesson 02), small micro batches shrank it again (03), and
# neither, done right, changed a gradient. One factor is still untouched: every number of our small
# model has 4 bytes. Mixed precision gives many of them 2. It is sold with three promises, half the
# memory, twice the speed, the same quality. You will measure quality in section 2, memory in 3, and
# speed in "Go further".
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *explain* what a format's bits buy: range, and spacing | B1 | question 1 |
# | *predict* what autocast runs in 16 bits, and *find* the copies it makes | B2 | exercise 04.1 |
# | *explain* why trained weights stay in float32 | B1 | question 3 |
# | *choose* formats for a GPU, and *find* the mistake in a published recipe | B2 | exercise 04.2 |
#
# (B1: you can use it. B2: you can take it apart and build with it.)
#
# **Needs:** the four holders of memory and the ledger (lesson 01), checkpointing (02).
# **New concepts (5):** range and spacing · autocast · mixed precision's copies · vanishing update ·
# compute dtype. Each is in the [glossary](glossary.md).

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
import copy
import math
import tempfile
from dataclasses import replace
import torch
from course_utils import data, figures
from course_utils.exercises import lesson_04 as exercises
from course_utils.exercises.predictions import show_prediction
from course_utils.topics import precision
from fitcast import TrainRecipe, gpus, show_bytes
gpu = gpus.detect()
print(gpus.describe(gpu))

# %% [markdown]
# The recipe of lesson 01 again: the small Llama, all weights trained, float32, 4 sequences of 128
# tokens; and four examples to train on.

# %% tags=["setup"]
recipe = TrainRecipe(model=data.BUNDLED, base="float32", lora_rank=None, optimizer="adamw",
                     micro_batch_size=4, sequence_length=128, checkpointed_layers=0, lora_dropout=0)
batch = data.to_batch(list(data.encoded(recipe.sequence_length))[:4])
sixteen = gpus.mixed_precision(gpu).dtype or "bfloat16"  # 16 bits, as this machine likes them
print("16-bit format used here:", sixteen)

# %% [markdown]
# ## Five questions, before and after
# Five letters, `x` for "not yet".

# %% tags=["self-check"]
exercises.QUESTIONS

# %% tags=["self-check"]
before = ...  # for example "abcda"

# %% [markdown]
# ## 1 · Two ways to spend 16 bits
# A floating-point number is a sign, an exponent (which power of two?) and a fraction (where between
# this power and the next?). Here is 0.1 in three formats. (The exponent is stored plus 127, in
# float16 plus 15; you need not read the bits.)

# %% tags=["run"]
figures.bit_fields()

# %% [markdown]
# **Exponent bits buy range, fraction bits buy spacing.** bfloat16 is float32 with its fraction cut
# short and rounded; float16 trades three exponent bits for three more of fraction. In numbers:

# %% tags=["run"]
FORMATS = precision.FORMATS
for name, dtype in FORMATS.items():
    info = torch.finfo(dtype)
    print(f"{name:9} largest {info.max:8.3g}   smallest normal {info.tiny:8.3g}   "
          f"next after 1: {1 + info.eps:.9f}")

# %% [markdown]
# Seven fraction bits make 128 steps from 1 to 2, so 1.0078125 comes next: two to three decimal
# digits. float16 has eight times finer steps, but ends at 65 504 and has no normal number below
# 6.1e-05. [IEEE 754; `torch.finfo`]
#
# Which one hurts in training, coarse steps or a short range? Look where the numbers are. One real
# step, float32: the weights, what the linear layers put out, and the gradients of these outputs.

# %% tags=["run"]
from fitcast.step import qlora
from fitcast.training import trainer as training
model = training.build_model(recipe)
with precision.watch_linears(model) as watched:
    qlora.compute_loss(model, batch, recipe).backward()
figures.magnitudes({"weights": list(model.parameters()), "activations": watched.activations,
                    "gradients": watched.gradients}, say_landing=False)

# %% [markdown]
# The pale part of float16's bar is *subnormal*: numbers there lose a fraction bit with each power
# of two. This model's weights and activations sit comfortably in all three formats (in some larger
# ones single activations overflow float16). Gradients do not: most are a thousand to a million
# times smaller, and the smallest number that float16 holds with full precision lies in the middle
# of them.
#
# ### Predict
# Which share of the gradients, the third histogram, becomes exactly zero in float16? (0.5 for half.
# Those that are zero in float32 already do not count.)

# %% tags=["predict"]
predicted_lost = ...

# %% tags=["run"]
lost = {name: precision.land(watched.gradients, name).zero for name in ("float16", "bfloat16")}
show_prediction(predicted_lost, show="{:.2f}".format, **lost)

# %% [markdown]
# ### Explain
# Rounding a gradient to bfloat16 changes it by up to 0.4 %; to float16, by 0.05 %, *if* it is in
# range. A coarse step is noise: up here, down there, and a weight's gradient is a sum over hundreds
# of tokens, in which it averages out. A number out of range is not noise. Below, it is *always*
# zero; above, it is infinite, and one infinity soon makes every weight NaN (lesson 05). That is why
# **range matters more than precision** (a share of 0.09 here; it depends on model and batch, and
# lesson 05 shows when it hurts), and why float16 needs the trick of lesson 05, and bfloat16 does
# not. [Micikevicius et al., section 3.2]

# %% [markdown]
# ## 2 · Who decides? Autocast
# `torch.autocast` changes no weight and no line of the model. It looks at each *operation*, and
# casts what goes in. Here is one of our own. Inside a `TorchFunctionMode` each call of a function
# comes to `__torch_function__` first. Ours casts the arguments of products, lets those of all else
# be, and then makes the call.

# %% tags=["run"]
import torch.nn.functional as F
PRODUCTS = {F.linear, F.scaled_dot_product_attention}

def cast(x):
    is_float = torch.is_tensor(x) and x.is_floating_point()
    return x.to(FORMATS[sixteen]) if is_float else x

class MyAutocast(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            args = [cast(x) for x in args]
        return function(*args, **kwargs or {})

# %% tags=["run"]
losses = []
for ours_or_theirs in (MyAutocast(), torch.autocast(gpus.device(), FORMATS[sixteen])):
    with ours_or_theirs:
        losses.append(qlora.compute_loss(model, batch, recipe).item())
print("the same loss under torch.autocast:", losses[0] == losses[1])

# %% [markdown]
# Trainer's `fp16=True` is theirs, plus a scale for the loss (lesson 05). Theirs knows more
# operations than ours. Which?
#
# ### Predict
# Twelve operations are each given a float32 matrix under float16 autocast: linear, matmul, softmax,
# layer_norm, rms_norm, cross_entropy, sum, pow, exp, silu, embedding, and an addition to float32.
# How many return float16, on a GPU?

# %% tags=["predict"]
predicted_count = ...

# %% tags=["run"]
on_gpu, on_cpu = (precision.autocast_table(device) for device in ("cuda", "cpu"))
count = sum(given_float32 == "float16" for given_float32, _ in on_gpu.values())
table = [f"{'':17}given float32         given float16",
         f"{'':17}on a GPU   on a CPU   on a GPU   on a CPU"]
for name, on_a_gpu in on_gpu.items():
    pairs = zip(on_a_gpu, on_cpu[name], strict=True)
    table.append(f"{name:16} " + " ".join(f"{gpu:10} {cpu:10}" for gpu, cpu in pairs))
show_prediction(predicted_count, show="{:.0f} of 12".format, counted=count, also="\n".join(table))

# %% [markdown]
# ### Explain
# Three kinds of operations:
#
# - **products** go down to 16 bits: a GPU's *tensor cores*, built for nothing but products of small
#   matrices, are fast there, and add up in float32 inside;
# - **sums over many numbers and steep functions** go up to float32 on a GPU: softmax, norms, exp,
#   losses. (`rms_norm` joined them after torch 2.11: with Colab's 2.11 it returns float16 when
#   given float16.) The CPU's list trusts 16 bits more, so a model can behave differently there;
# - **the rest takes what comes**, and float32 wins where two formats meet.
#
# [`aten/src/ATen/autocast_mode.h`] And what is there to cast, in a real step of our model?

# %% tags=["run"]
mixed = replace(recipe, amp_dtype=sixteen)
with precision.OperationLog() as log, torch.autocast(gpus.device(), getattr(torch, sixteen)):
    loss = qlora.compute_loss(model, batch, mixed)
print("products with weights:", log.matmuls)
additions = {kind: count for (name, kind), count in log.counts.items() if name == "add"}
print("additions:            ", additions)

# %% [markdown]
# All products with weights (seven in each of four layers, and the head) run in 16 bits. What passes
# from layer to layer is still in float32: a float32 embedding, to which each layer adds twice
# (8 of the 25; norms and positions have the others).
#
# Does it learn the same? Fifteen steps on the four examples, in float32 and under autocast, and the
# difference of the losses after them. (Before each step, `stored` rounds the weights to what a
# format can hold. Here float32, which changes nothing.)

# %% tags=["setup"]
def fifteen_steps(recipe, model=None, stored="float32", learning_rate=5e-4):
    model = model or training.build_model(recipe)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, learning_rate, weight_decay=0.0)
    losses = []
    for _ in range(15):
        for weight in weights:
            weight.data = weight.data.to(FORMATS[stored]).float()  # rounded, if 16 bits
        losses.append(qlora.training_step(model, optimizer, [batch], recipe).item())
    return losses

# %% tags=["run"]
curves = {"float32": fifteen_steps(recipe), f"autocast {sixteen}": fifteen_steps(mixed)}
last = [losses[-1] for losses in curves.values()]
print("they differ by less than 0.05:", abs(last[0] - last[1]) < 0.05)
figures.losses(curves, "all weights trained, learning rate 5e-4")

# %% [markdown]
# The curves lie on each other: here the promise about quality holds, *for products in 16 bits, with
# sums in float32 and float32 weights*. This is what "mixed" means.

# %% [markdown]
# ## 3 · "Mixed precision halves memory"
# ### Predict
# Two training steps, as in lesson 01, once in float32 and once under autocast. The peak falls to
# which fraction?

# %% tags=["setup"]
from fitcast import MemoryLedger, forecast
def two_steps(recipe):
    model = training.build_model(recipe)
    optimizer = qlora.build_optimizer(model, recipe)
    shape = (recipe.micro_batch_size, recipe.sequence_length)
    ids = torch.randint(0, model.config.vocab_size, shape, device=gpus.device())
    dtype = FORMATS[recipe.amp_dtype or "bfloat16"]
    with MemoryLedger(model, inputs=ids) as ledger:
        for _ in range(2):
            with torch.autocast(ids.device.type, dtype, enabled=recipe.amp_dtype is not None):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return ledger.report()

# %% tags=["predict"]
predicted_fraction = ...

# %% tags=["run"]
full = two_steps(recipe)
memory_before = gpus.reset_peak()
half = two_steps(mixed)
measured = gpus.peak_allocated_bytes(above=memory_before)
show_prediction(predicted_fraction, show="{:.2f} of the peak".format,
                counted=half.peak_bytes / full.peak_bytes, also=[
    f"autocast, counted: {show_bytes(half.peak_bytes)}, measured: {show_bytes(measured)}",
    figures.compare({"float32": full, f"autocast {sixteen}": half}, title="peak of two steps")])

# %% [markdown]
# ### Explain
# Weights, gradients, optimizer state: float32 as before (section 4 says why). Only activations can
# shrink, and they have lost far less than half. (The share depends on the attention kernel, too:
# 0.94 with a T4's [recorded: an H200 as a T4, 2026-11-30].) See what is kept for backward, by
# format:

# %% tags=["run"]
weights = {block.shape for block in full.largest if block.category == "weights"}
for name, report in {"float32": full, f"autocast {sixteen}": half}.items():
    kept = {"in float32": 0, "in 16 bits": 0, "16-bit copies of weights": 0}
    for block in report.saved:
        is_copy = block.operation.startswith("_to_copy") and block.shape in weights
        kind = "in float32" if block.dtype.itemsize > 2 else "in 16 bits"
        kept["16-bit copies of weights" if is_copy else kind] += block.n_bytes // 2  # of two steps
    print(f"{name:19}", ", ".join(f"{show_bytes(n)} {kind}" for kind, n in kept.items() if n))

# %% [markdown]
# Norms, loss and boundaries stay in float32. The rest is in 16 bits, but a norm's output, which the
# float32 run keeps once, is now kept as a 16-bit copy for *each* product that reads it: three times
# for query, key and value, twice for gate and up. And there is a new kind: each float32 weight that
# a product reads needs a **16-bit copy**, alive until backward has used it. That is 2 bytes *more*
# for a weight, not 2 instead of 4.
#
# ### Predict
# Llama-3.2-1B in float32, frozen, adapters beside it, 512 tokens without checkpointing, on a T4.
# Now switch on autocast. The peak becomes how many times the peak without?

# %% tags=["predict"]
predicted_times = ...

# %% tags=["run"]
one_b = TrainRecipe(model="llama-3.2-1b", base="float32", lora_dropout=0, checkpointed_layers=0)
variants = {"float32 base": one_b, "the same, autocast": replace(one_b, amp_dtype="float16"),
            "float16 base, autocast": replace(one_b, base="float16", amp_dtype="float16")}
steps = {name: forecast(variant, gpus.T4) for name, variant in variants.items()}
without, with_autocast, _ = (step.peak_bytes for step in steps.values())
figure = figures.compare(steps, gpus.T4, "Llama-3.2-1B, LoRA, 1 x 512 tokens")
longer = [forecast(replace(variant, sequence_length=2048), gpus.T4).peak_bytes
          for variant in variants.values()]
at_2048 = (f"at 2048 tokens: autocast {longer[1] / longer[0]:.2f} x, with a float16 base "
           f"{longer[2] / longer[0]:.2f} x")
show_prediction(predicted_times, show="{:.2f} x".format, forecast=with_autocast / without,
                also=[figure, at_2048])

# %% [markdown]
# ### Explain
# Mixed precision made it *larger*: 16-bit copies of every frozen weight that a product reads, on
# top of the float32 originals, to save a part of the activations. (Copies follow the weights, what
# they save follows the tokens: at 2048 tokens it is 1.04 x.) With checkpointing only one layer's
# copies live at a time, or the head's, which here is larger than a layer; those of *trained*
# weights autocast keeps until it ends. (The figure books copies under activations.) What does save
# memory is something else, the third bar: **loading the frozen base in 16 bits**
# (`dtype=torch.float16`) halves *the weights*, and leaves only the adapters to copy. Autocast is
# for speed, and shrinks part of what follows the tokens; the storage format shrinks what follows
# the weights. Lesson 07 stores the base in 4 bits.

# %% [markdown]
# ## Exercise 04.1 · Count the copies
# *Medium, 6 minutes.* Given a float32 model, how many bytes of 16-bit copies *of its weights* does
# autocast make in one forward pass? Write the function; the check asks the ledger, for our model
# and for the shapes of Llama-3.2-1B and Llama-2-7B, and wants every byte.
#
# <details><summary>Hint 1</summary>Which operations went down to 16 bits in section 2? Whose
# weights do they read?</details>
# <details><summary>Hint 2</summary>Walk over <code>model.modules()</code> and pick
# <code>torch.nn.Linear</code>. Norms and embeddings are other classes.</details>
# <details><summary>Hint 3</summary><code>sum(... * m.weight.numel() for m in
# model.modules() if isinstance(m, torch.nn.Linear))</code></details>

# %% tags=["exercise"]
def copied_bytes(model):
    return ...

# %% tags=["check"]
exercises.check_copies(copied_bytes)

# %% [markdown]
# *Two thirds in, and a good place to stop. When you come back: run all cells above, then go on.*
#
# ## 4 · A thousand small updates
# Why not store the trained weights in 16 bits as well, and save the copies? A weight is 1.0. It
# receives 1000 updates of 0.0001. What is it afterwards?

# %% tags=["run"]
for name, dtype in FORMATS.items():
    weight = torch.tensor(1.0, dtype=dtype)
    for _ in range(1000):
        weight += 0.0001
    print(f"{name:9} {weight.item():.4f}")

# %% [markdown]
# The next number after 1 is 0.00098 away in float16, and an update of less than half of that rounds
# back, a **vanishing update**. Not "a little less is learned": *nothing* is, a thousand times.
# Whether a weight moves depends on its own size, and Adam's update is about the learning rate,
# whatever the gradient (it divides the gradient by its own usual size). So compare the two. Here,
# for the weights of our model and a learning rate for training all of them:

# %% tags=["run"]
figures.smallest_updates(2e-5, list(training.build_model(recipe).parameters()),
                         "the base's weights")

# %% [markdown]
# In bfloat16 8 % of the weights move, the smallest ones. Is that enough to learn?
#
# ### Predict
# Fifteen steps as in section 2, at this rate. With float32 weights the loss falls from 10.0 to 8.3.
# To what does it fall if the weights are stored in bfloat16?

# %% tags=["predict"]
predicted_loss = ...

# %% tags=["run"]
stored = {f"stored in {name}": fifteen_steps(recipe, stored=name, learning_rate=2e-5)
          for name in FORMATS}
show_prediction(predicted_loss, show="{:.1f}".format, bfloat16=stored["stored in bfloat16"][-1],
                also=figures.losses(stored, "all weights trained, learning rate 2e-5"))

# %% [markdown]
# ### Explain
# Stored in bfloat16 the model hardly learns: no error, no NaN, only a loss that falls about a sixth
# as far. (How many weights move depends on their size and your rate: measure yours with
# `precision.moved_share`.) Did range not matter more than precision (section 1)? For gradients it
# does: they are summed and thrown away. A stored weight needs spacing, because what is rounded off
# is gone. bfloat16 makes the safer gradient and the worse weight. (float16 loses less here, its
# steps being eight times finer; but loss scaling refuses weights stored in it, lesson 05.) So:
# **what is frozen, in 16 bits or fewer; what is trained, in float32.** [Micikevicius et al.,
# section 3.1] (Stochastic rounding or a compensation term are the exceptions.) With adapters, which
# are small (for the third bar of section 3, 13.00 MiB beside 2.30 GiB of frozen weights), that
# costs next to nothing, and PEFT does it by default (TRL, beside a 4-bit base, makes them bfloat16:
# lesson 07).

# %% [markdown]
# ## 5 · Which 16 bits, on which card?
# PyTorch has a function for this question: `torch.cuda.is_bf16_supported()`. It says True on a T4.
# [torch/cuda/\_\_init\_\_.py] Does a T4 compute in bfloat16? First ask the function (if there is
# a GPU here); the second cell says what this course answers for six cards. It goes by the *compute
# capability*, the version number of what an NVIDIA GPU's hardware can do. [NVIDIA, CUDA GPUs]

# %% tags=["run"]
module = torch.get_device_module(gpus.device())  # where there is a GPU, this is torch.cuda
ask = getattr(module, "is_bf16_supported", lambda **_: "not measured on cpu")
print("is_bf16_supported()                           ", ask())
print("is_bf16_supported(including_emulation=False)  ", ask(including_emulation=False))
made = torch.tensor([1.0], dtype=torch.bfloat16, device=gpus.device())
print("what the first one tries below capability 8.0:", made)

# %% tags=["run"]
for name in ("T4", "L4", "A10", "A100-40", "H100", "H200"):
    print(f"{name:8} {gpus.mixed_precision(gpus.preset(name)).reason}")

# %% [markdown]
# A T4 does not. Below 8.0 the function makes one tensor, as you just did, and says True if that
# works; it works on a CPU, too. That is *emulation*: the numbers are stored, but a T4's tensor
# cores know no bfloat16, so no product of such a run uses them. Trainer asks this function, and so
# accepts `bf16=True` on a T4. [T4 data sheet; transformers, `is_torch_bf16_gpu_available`] So ask
# for the compute capability, or say `including_emulation=False`, which asks for it. The recipe
# asks, too, and refuses. Its `amp_dtype="bfloat16"` is Trainer's `bf16=True`; the next cell fails
# on purpose, read its last line:

# %% tags=["raises-exception"]
replace(recipe, amp_dtype="bfloat16").check_on(gpus.T4)

# %% [markdown]
# A 4-bit base adds one more choice: in which format are its weights unpacked for a product? That is
# the **compute dtype** (`bnb_4bit_compute_dtype`). Two formats in one run mean casts. Here is a
# recipe with the formats and the optimizer of Hugging Face's own notebook for Colab [Hugging Face,
# "4-bit QLoRA"]:

# %% tags=["run"]
published = dict(exercises.PUBLISHED)
for name, value in published.items():
    print(f"{name:28}{value}")

# %% [markdown]
# ### Predict
# Run one training step with it. Four layers with seven 4-bit weights each, one product forward and
# one backward: 56. How many get operands in one 16-bit format and then run in the other?

# %% tags=["predict"]
predicted_products = ...

# %% tags=["run"]
products = exercises.run_published(published)
show_prediction(predicted_products, show="{:.0f}".format, counted=products.detours,
                also=f"of {products.seen.total()}, {products}")

# %% [markdown]
# ### Explain
# Forward's. The layer turns its input into the compute dtype, and the unpacked weight with it;
# autocast turns both into float16 for the product. Two casts more for every product, its input's
# and its weight's, and three bits less. Backward takes the gradient's format, which is float16: no
# detour. (From 8.0 on bitsandbytes multiplies some short micro batches in a kernel of its own that
# autocast does not reach; a T4 for fewer than 8 tokens only.) [bitsandbytes, nn/modules.py,
# autograd/\_functions.py, backends/cuda/ops.py]
#
# ## Exercise 04.2 · Find the mistake
# *Easy, 3 minutes.* Change **one** setting so that the recipe is right for a T4. The check runs a
# step and looks at every product with a 4-bit weight.
#
# <details><summary>Hint 1</summary>Which settings name a format?</details>
# <details><summary>Hint 2</summary>Two of them must agree, and a T4 has only one fast 16-bit
# format.</details>
# <details><summary>Hint 3</summary><code>published | {"bnb_4bit_compute_dtype": ...}</code>, with
# the format that <code>fp16=True</code> stands for.</details>

# %% tags=["exercise"]
corrected = ...

# %% tags=["check"]
exercises.check_published(corrected)

# %% [markdown]
# **Task:** the same recipe on an L4: which settings change?
# <details><summary>Answer</summary>From the published one two: <code>fp16=False</code>,
# <code>bf16=True</code>. The compute dtype is right there: one format throughout.</details>
#
# ## In your script
# Ask for the capability, load the frozen base in 16 bits, leave the adapters in float32, and let
# one answer, `bf16`, decide every format. (On Colab run `!pip uninstall -qy torchao` before: PEFT
# refuses the old one that is there, and nothing here uses it.)
#
# ```python
# import torch
# from peft import LoraConfig, get_peft_model
# from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
#
# on_gpu = torch.cuda.is_available()
# bf16 = on_gpu and torch.cuda.get_device_capability() >= (8, 0)
# fp16 = on_gpu and not bf16  # a T4
# sixteen = torch.bfloat16 if bf16 or not on_gpu else torch.float16
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=sixteen)
# # in 4 bits (transformers has it): quantization_config=BitsAndBytesConfig(load_in_4bit=True,
# #            bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=sixteen)
# model = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"]))
# rows = [{"input_ids": list(range(64)), "labels": list(range(64))}] * 4
# arguments = TrainingArguments("out", fp16=fp16, bf16=bf16, max_steps=1, report_to="none",
#                               save_strategy="no")
# Trainer(model, arguments, train_dataset=rows).train()
# print("frozen:", {p.dtype for p in model.parameters() if not p.requires_grad})
# print("trained:", {p.dtype for p in model.parameters() if p.requires_grad})
# if on_gpu:  # once more with dtype=torch.float32 in from_pretrained: what does the peak do?
#     print(f"peak: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB")
# ```
#
# <details><summary>Answer</summary>It rises by 2 bytes for each frozen number, and by up to 2 more
# for the 16-bit copies that a float32 base needs (section 3).</details>
#
# ## And now?
# The same five questions.

# %% tags=["self-check"]
after = ...

# %% tags=["self-check"]
exercises.QUESTIONS.score(before, after)

# %% [markdown]
# ## To lesson 05
# One number to take along, the smallest *subnormal* of float16:

# %% tags=["run"]
smallest = torch.finfo(torch.float16).smallest_normal * torch.finfo(torch.float16).eps
print(f"{smallest:.2e}")

# %% [markdown]
# On a T4 you have no other 16 bits, and section 1 showed gradients below that. Where did they go,
# and how do we get them back? Lesson 05 asks: where did my gradient go?

# %% [markdown]
# ## Go further (optional)
# Everything from here on is beyond the 45 minutes: take what you like.

# %% [markdown]
# ## Exercise 04.3 · How far to the next number?
# *Medium, 6 minutes.* Complete `spacing`: the distance from a positive normal number to the next
# larger one. `torch.finfo(dtype).eps` is the distance at 1; `math` has what else you need. The
# check compares with the next pattern of bits, in all three formats.
#
# <details><summary>Hint 1</summary>The distance is the same for all numbers from one power of two
# up to the next, and doubles there.</details>
# <details><summary>Hint 2</summary>At 1 it is eps. At 4? And at 5?</details>
# <details><summary>Hint 3</summary><code>power = math.floor(math.log2(x))</code></details>

# %% tags=["exercise"]
def spacing(x, dtype):
    power = ...
    return 2.0**power * torch.finfo(dtype).eps

# %% tags=["check"]
exercises.check_spacing(spacing)

# %% [markdown]
# ### Adapters in 16 bits
# The case of this course, adapters: fresh, and after some training. ("Some" is short and steep
# here: fifteen steps at 1e-2, fifty times the usual rate.)

# %% tags=["run"]
lora = replace(recipe, lora_rank=16)
fresh, trained = training.build_model(lora), training.build_model(lora)
print(f"loss after 15 steps: {fifteen_steps(lora, trained, learning_rate=1e-2)[-1]:.1f}")
adapters = {name: [p for p in model.parameters() if p.requires_grad]
            for name, model in {"fresh": fresh, "trained": trained}.items()}
for rate in (2e-4, 1e-5):
    shares = {n: precision.moved_share(a, rate, "bfloat16") for n, a in adapters.items()}
    print(f"rate {rate:g} moves, in bfloat16:", {n: f"{share:.0%}" for n, share in shares.items()})

# %% [markdown]
# At 2e-4, the usual rate, fresh adapters do well in 16 bits, because one of the two matrices (B)
# starts at zero, where floats are dense. It fails later, when the weights have grown and the
# schedule has brought the rate down. Go on from there, at 1e-5:

# %% tags=["run"]
for name in FORMATS:
    losses = fifteen_steps(lora, copy.deepcopy(trained), stored=name, learning_rate=1e-5)
    print(f"adapters stored in {name:9} the loss falls by {losses[0] - losses[-1]:.2f}")

# %% [markdown]
# In bfloat16 that is the run that stops learning (a small effect here); and float16 adapters cannot
# use loss scaling at all (lesson 05).
#
# Move the rate. Where does each format stop?

# %% tags=["run"]
figures.updates_explorer({"base weights": list(training.build_model(recipe).parameters()),
                          "fresh adapters": adapters["fresh"],
                          "trained adapters": adapters["trained"]})

# %% [markdown]
# ### Two more switches
# Such recipes often have a line `warmup_ratio=0.03` too. That one at least fails loudly: today's
# Trainer has `warmup_steps`, where a number below 1 is a share.

# %% tags=["raises-exception"]
recipe.to_training_arguments("out", warmup_ratio=0.03)

# %% [markdown]
# One more switch with a friendly name: `fp16_full_eval=True`, "evaluate in float16, half the
# memory". In which format are float32 adapters *after* one evaluation with it?

# %% tags=["run"]
from transformers import PrinterCallback, Trainer
arguments = recipe.to_training_arguments(tempfile.mkdtemp(), fp16_full_eval=True, disable_tqdm=True,
                                         dataloader_pin_memory=False)
trainer = Trainer(fresh, arguments, eval_dataset=[{k: v[0] for k, v in batch.items()}])
trainer.remove_callback(PrinterCallback)
trainer.evaluate()
print("afterwards:", {precision.name_of(weight.dtype) for weight in adapters["fresh"]})

# %% [markdown]
# It calls `model.to(torch.float16)`, **in place**, and nobody turns it back: evaluated before or
# between training, the run goes on with 16-bit adapters. With fp16 it then dies in the gradient
# scaler (lesson 05); without, it is the run of section 4. (An evaluation *inside* `train()` casts
# nothing.) Evaluate under autocast instead. [transformers/trainer.py, `evaluation_loop`]

# %% [markdown]
# ### "Twice as fast"
# A training step of our model by the clock of this machine, in float32 and under autocast:

# %% tags=["run", "nbval-ignore-output"]
# loose: wall-clock times differ from run to run
from fitcast.training import measurement
step_seconds = [measurement.measure_step(choice, training.build_model(choice)).seconds
                for choice in (recipe, mixed)]  # each the median of three steps
print(f"under autocast {step_seconds[0] / step_seconds[1]:.2f} x as fast")

# %% [markdown]
# Below 1 is slower, and that is no mistake of yours. Many CPUs have no 16-bit products: there the
# numbers are turned into float32 and back, each time. On a GPU a model this small mostly waits for
# its operations to be started, one by one; autocast adds some, its casts, and the result jumps from
# run to run. What can win is the *product*, where the hardware has units for it. How much faster is
# one on a T4's tensor cores, in float16, than in float32? By its data sheet, and here, if there is
# a GPU. (A TFLOP/s is 10¹² multiplications and additions a second.)

# %% tags=["run"]
sheet = gpus.T4.matmul_flops / gpus.T4.float32_flops
print(f"T4, by its data sheet: {sheet:.1f} x")
for name in FORMATS:
    flops = measurement.matmul_flops(name)
    print(f"{name:9} {f'{flops / 1e12:.1f} TFLOP/s' if flops else 'not measured on cpu'}")

# %% tags=["recorded"]
from course_utils.topics import recorded
recorded.show("matmul", lambda row: f"{row['name']:9} {row['flops'] / 1e12:6.1f} TFLOP/s")

# %% [markdown]
# The factor belongs to *products* that are large enough, and to the card. (The recorded one is an
# H200; pretending to be a T4 changes its memory and kernels, not its speed.) float16 and bfloat16
# run at about one speed where both have tensor cores; on a T4 only float16 has. A step also has
# norms, softmax, casts and an optimizer, which wait for memory and gain at most the factor 2 of
# smaller numbers. So a step never gains the factor of its products, and a small one can lose: only
# a measurement of *your* step tells.

# %% [markdown]
# ### For those who struggle
# One number by hand. Store 5.3 in bfloat16.
#
# 1. Power of two: 4 <= 5.3 < 8, so the power is 2 and numbers are 4 x (1 + fraction).
# 2. Spacing: seven fraction bits cut 4 ... 8 into 128 steps of 4 / 128 = 0.03125.
# 3. Steps: (5.3 - 4) / 0.03125 = 41.6, so it is stored as step 42: 4 + 42 x 0.03125 = 5.3125.
# 4. An update moves it when it is larger than half a step, 0.015625.

# %% tags=["run"]
print("power:", math.floor(math.log2(5.3)))
number = torch.tensor(5.3, dtype=torch.bfloat16)
print(number.item(), precision.bits(5.3, "bfloat16"))
print((number + 0.015).item(), (number + 0.017).item())

# %% [markdown]
# 42 is 0101010 in binary: find it in the bits. Then do the same for 5.3 in float16 (ten fraction
# bits).
#
# ### An open question
# Adam's second average is v = 0.999 v + 0.001 g². Keep it in bfloat16, in a loop of 5000 steps with
# g = 1, starting at v = 0. Where does it stop, and what does that do to the learning rate? (Compare
# 0.001 with half the spacing.) 8-bit Adam survives with fewer bits: look up "block-wise
# quantization", and say what it does that bfloat16 does not.
#
# ### Try with AI
# Ask an assistant:
#
# > I fine-tune Llama-3.2-1B with LoRA on a T4 in float32 and want to halve the memory with mixed
# > precision. Which flags do I set, in which formats are base, adapters, gradients and Adam's state
# > then, and what happens to the peak at 1 x 512 tokens without checkpointing?
#
# A right answer says that `fp16=True` alone *raises* the peak, because the frozen float32 base gets
# 16-bit copies; that the base must be loaded in float16 for the memory; that adapters, their
# gradients and Adam's state stay in float32; that bf16 is only emulated on a T4; and it comes close
# to these numbers:

# %% tags=["run"]
for name, step in steps.items():
    print(f"{name:24}{show_bytes(step.peak_bytes):>10}")

# %% [markdown]
# ## What this lesson left out
# The 2 + 2 + 12 bytes a parameter that you may have read: they count another scheme, 16-bit weights
# and gradients beside a float32 copy [ZeRO, section 3.1]. float8 and TF32 (neither on a T4);
# dynamic range tricks such as stochastic rounding, which makes 16-bit weights learn again; bf16
# optimizers with a compensation term; what CUDA's own attention kernels keep (a T4's keeps more
# than the CPU's does here).
#
# ## Sources
# - IEEE 754-2019: formats; Kalamkar et al. 2019, [A study of
#   BFLOAT16](https://arxiv.org/abs/1905.12322)
# - Micikevicius et al. 2018, [Mixed precision training](https://arxiv.org/abs/1710.03740), section
#   3
# - Rajbhandari et al. 2020, [ZeRO](https://arxiv.org/abs/1910.02054), section 3.1: 2 + 2 + 12 bytes
# - PyTorch, [Automatic mixed precision](https://docs.pytorch.org/docs/stable/amp.html), and
#   [autocast_mode.h](https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/autocast_mode.h)
# - PyTorch,
#   [torch/cuda/\_\_init\_\_.py](https://github.com/pytorch/pytorch/blob/main/torch/cuda/__init__.py):
#   `is_bf16_supported`
# - Hugging Face, [4-bit QLoRA](https://huggingface.co/blog/4bit-transformers-bitsandbytes) and the
#   [notebook](https://colab.research.google.com/drive/1VoYNfYDKcKRQRor98Zbf2-9VQTtGJ24k) to it
# - NVIDIA, [CUDA GPUs](https://developer.nvidia.com/cuda-gpus): compute capabilities; [T4 data
#   sheet](https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf)
#
# New terms are in the [glossary](glossary.md).
