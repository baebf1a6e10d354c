# %% [markdown]
# # 05 · Where did my gradient go?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/05_where_did_my_gradient_go.ipynb)
#
# **45 min** for those who have fine-tuned a transformer, 60 to 75 for others; half-way there is a
# place to stop · runs anywhere; a GPU runs the same cells faster.
#
# An fp16 gradient can be wrong by more than its own length, without an error or a warning: small
# parts, below 2.98e-08, half of float16's smallest number (lesson 04), become zero. In this lesson
# you find out how many vanish, get them back with one multiplication, and write the machine that
# does it in every fp16 run. People break it in four ways: two you run, the other two in "Go
# further".
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *recognise* gradients that flush to zero, *predict* the best scale | B1 | exercise 05.1 |
# | *implement* a dynamic loss scaler, equal to PyTorch's | B2 | exercise 05.2 |
# | *recognise* a mistake by a number (*order* a step: Go further) | B2 | section 4 |
#
# (B1: you can use it. B2: you can take it apart and build with it.)
#
# **Needs:** formats and autocast (lesson 04); the effective batch (03).
# **New concepts (5):** flush to zero · loss scaling · overflow and skipped step · dynamic scale ·
# unscaling. Each is in the [glossary](glossary.md).

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
import warnings
from dataclasses import replace
import torch
from course_utils import data, figures
from course_utils.exercises import lesson_05 as exercises
from course_utils.exercises.predictions import show_prediction
from fitcast import TrainRecipe, build_model, gpus
from fitcast.step import qlora
print(gpus.describe(gpus.detect()))

# %% [markdown]
# LoRA as on a T4, 2 sequences in a micro batch, 16 micro batches in a step; the small model that
# comes with the course, in two states: fresh, and after some training.

# %% tags=["setup"]
recipe = TrainRecipe(model=data.BUNDLED, base="float32", lora_rank=16, lora_dropout=0,
                     micro_batch_size=2, gradient_accumulation_steps=16, sequence_length=128,
                     checkpointed_layers=0, optimizer="adamw", learning_rate=3e-3)
rows = data.encoded(recipe.sequence_length)
batch = data.to_batch(list(rows)[:recipe.micro_batch_size])
num_items = recipe.gradient_accumulation_steps * int((batch["labels"][:, 1:] != -100).sum())

# %% tags=["setup"]
fresh, trained = build_model(recipe), build_model(recipe)
optimizer = qlora.build_optimizer(trained, recipe)
losses = [qlora.training_step(trained, optimizer, [batch], recipe).item() for _ in range(20)]
print(f"loss {losses[0]:.0f}, after 20 steps on this micro batch {losses[-1]:.1f}")

# %% [markdown]
# ## Five questions, before and after
# Five letters, `x` for "not yet".

# %% tags=["self-check"]
exercises.QUESTIONS

# %% tags=["self-check"]
before = ...  # for example "abcda"

# %% [markdown]
# ## 1 · Where are the gradients?
# There are two kinds: gradients that travel back from layer to layer (the *layers'*;
# `watch_linears` collects those that arrive at each linear layer's output), and those that stay, at
# the trained weights (the *adapters'*). Under fp16 autocast both are computed in float16; the
# second kind is then stored in float32. Here all is float32 first, so that nothing is lost yet.
# (This micro batch is one of 16, and its loss is its share of the step's, lesson 03. So gradients
# are 16 times smaller than if it were alone, and more of them vanish than in lesson 04.) Guess
# before you run: what share of the layers' gradients becomes zero in float16?

# %% tags=["setup"]
from course_utils.topics import precision
from course_utils.topics.precision import land
def gradients_of(model):
    model.zero_grad()
    with precision.watch_linears(model) as watched:
        qlora.compute_loss(model, batch, recipe, num_items).backward()
    weights = [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]
    return {"layers' gradients": watched.gradients, "adapters' gradients": weights}

# %% tags=["run"]
groups = gradients_of(trained)
flushed = land(groups["layers' gradients"]).zero
print(f"{flushed:.0%} of the layers' gradients become zero")
figures.magnitudes(groups, ("float16",), title="after 20 steps, scale 1")

# %% [markdown]
# The first dotted line is float16's smallest number; down to half of it numbers still round up.
# Those that are smaller are **flushed to zero**. (Those that are zero in float32 already do not
# count.)
# Between the first and the second line they are *subnormal*, with fewer bits the further left.
#
# On the right there is room: the whole picture is shifted to the left of float16's range.
# Multiplying by a power of two shifts it back, and costs no precision.
#
# ### Predict
# How far? Read it off the picture: which power of two is best after these 20 steps: as large as it
# can be, and nothing overflows? (Write 10 for a scale of 2¹⁰ = 1024.)

# %% tags=["predict"]
predicted_power = ...

# %% tags=["run"]
from fitcast.training.gradients import gradient, relative_error
states = {name: [tensor for group in gradients_of(model).values() for tensor in group]
          for name, model in {"fresh": fresh, "trained": trained}.items()}
for name, state in states.items():
    for power in (0, 4, 10, 16, 21, 24):
        landing = land(state, scale=2.0**power)
        print(f"{name:8} scale 2**{power:<2}  {landing.zero:4.0%} become zero   "
              f"{'some' if landing.infinite else 'none'} infinite")

# %% [markdown]
# ### Explain
# The small ones come back long before the large ones overflow. And the right scale *moves*: here,
# as the loss falls, the largest gradients get smaller, leaving room for more (see both states at
# 2²¹); a hard batch makes them grow again. (The layers' and the adapters' gradients are counted
# together here.) Your own number waits until you have calculated it:
#
# ## Exercise 05.1 · The best scale
# *Easy, 5 minutes.* `trained_gradients` below has all of them, after training. Which is the largest
# power of two (the scale itself, 1024 and not 10) under which none passes 65 504, float16's
# largest? `land(trained_gradients, scale=...)` says what a scale does.
#
# <details><summary>Hint 1</summary>Which gradient overflows first?</details>
# <details><summary>Hint 2</summary><code>max(g.abs().max().item() for g in
# trained_gradients)</code></details>
# <details><summary>Hint 3</summary><code>2.0 ** math.floor(math.log2(... /
# largest))</code></details>

# %% tags=["exercise"]
trained_gradients = states["trained"]
best_scale = ...

# %% tags=["check"]
exercises.check_best_scale(best_scale, trained_gradients)

# %% [markdown]
# Once you have an answer, your prediction beside it:

# %% tags=["run"]
if best_scale is not ...:
    best_power = max(power for power in range(40)
                     if land(states["trained"], scale=2.0**power).infinite == 0)
    show_prediction(predicted_power, show="scale 2**{:.0f}".format, computed=best_power)
else:
    print("after exercise 05.1")

# %% [markdown]
# Move the scale. When do the last ones leave the left, when do the first ones leave on the right?
# <details><summary>Answer</summary>At 2²⁰ hardly one is left of the range; at 2²⁴ the first ones
# overflow, the adapters'.</details>

# %% tags=["run"]
figures.scale_explorer(groups)

# %% [markdown]
# ## 2 · Scale the loss, by hand
# To shift all gradients, multiply *one* number: the loss. The chain rule carries the factor to
# every gradient; before the optimizer sees them, divide it out again (**unscale**), in float32.
# ### Predict
# At scale 1, where 14 % of the layers' gradients become zero: by how many percent is the adapters'
# gradient wrong? (Relative error of the whole vector; write 10 for 10 %.)

# %% tags=["predict"]
predicted_error = ...

# %% tags=["run"]
def scaled_gradient(scale=1.0, amp=None, model=trained):
    model.zero_grad()
    dtype = precision.FORMATS[amp or "float16"]  # autocast is off without amp
    with torch.autocast(gpus.device(), dtype, enabled=amp is not None):
        loss = qlora.compute_loss(model, batch, recipe, num_items)
    (loss * scale).backward()      # scale, backward
    return gradient(model) / scale  # unscale

# %% tags=["run"]
exact = scaled_gradient()
errors = {power: relative_error(scaled_gradient(2.0**power, "float16"), exact)
          for power in (*range(-8, 24, 4), 23, 24)}
small = (f"wrong at 2**-8: {errors[-8]:.0f} times its length; "
         f"at 2**-4: {errors[-4]:.1f} of it; at 2**8: {errors[8]:.1%}")
show_prediction(predicted_error, show="{:.0f} %".format, measured=100 * errors[0],
                also=[small, figures.scale_window(errors, "adapters, after 20 steps")])

# %% [markdown]
# ### Explain
# At scale 1 the numbers that vanish are the small ones, and they carry little of the
# sum: this model's gradient is nearly right *without* any scaling. But look at the slope on the
# left: a gradient 16 times smaller, after more accumulation or at a lower loss, is as badly off as
# this one at a scale of 2⁻⁴; 256 times smaller, and it is noise. No error, no warning. (How can it
# be wrong by more than its length, if numbers vanish? At the head a token's gradients sum to zero:
# one is large and negative, the others small and positive. The small ones vanish, and nothing
# balances the large one.)
#
# The grey window (an error of at most 2 %) is many powers of two wide. Scale 1 stands just left of
# it; its right edge, 2²³, is the answer to exercise 05.1. The 0.3 % that are left inside are
# float16's rounding: no scale mends that. Loss scaling means: stay in it, near the right edge,
# whatever the model does. [Micikevicius et al., section 3.2] (bfloat16 needs none of this: it has
# float32's exponent. Lesson 04.)

# %% [markdown]
# *Half-way, and a good place to stop. When you come back: run all cells above, then go on.*
#
# ## 3 · Overflow, and a scale that looks after itself
# Right of the window a gradient is infinite. What does one step with it do? One micro batch
# overflows, the gradients are *clipped* (made smaller by one factor until their norm is at most 1),
# and the optimizer steps all the same. How many of the weights survive, would you say?

# %% tags=["run"]
victim = copy.deepcopy(trained)
scaled_gradient(2.0**28, "float16", victim)              # too high: leaves its gradients behind
adapters = [weight for weight in victim.parameters() if weight.requires_grad]
torch.nn.utils.clip_grad_norm_(adapters, 1.0)            # "but I clip!"
torch.optim.AdamW(adapters).step()
nan = sum(int(weight.isnan().sum()) for weight in adapters) / sum(w.numel() for w in adapters)
print(f"{nan:.0%} of the adapters' weights are NaN")

# %% [markdown]
# On its way back an infinity meets a zero, or minus infinity: that is NaN, and what it touches is
# NaN, here every gradient. Clipping is no protection: the norm is NaN, so is the factor. (Were a
# single gradient infinite, the factor would be zero: that one becomes NaN, all others vanish.)
# [torch/nn/utils/clip_grad.py]
#
# So a scaler looks before the step. It does four things:
#
# 1. multiply the loss by the scale;
# 2. after backward, divide the gradients by it, and look whether one is not finite;
# 3. if so, **skip** the optimizer's step, and halve the scale;
# 4. after 2000 good steps in a row, double it.
#
# The first three, written out, beside `torch.amp.GradScaler`: both train a single layer whose
# gradient is 0.25, from a scale that is far too high.

# %% tags=["run"]
class MyScaler:
    def __init__(self, scale):
        self.number = scale
    def scale(self, loss): return loss * self.number                     # 1

    def step(self, optimizer):
        weights = optimizer.param_groups[0]["params"]
        for weight in weights:
            weight.grad /= self.number                                   # 2
        self.finite = all(weight.grad.isfinite().all() for weight in weights)
        if self.finite:                                                  # 3
            optimizer.step()
    def update(self):
        if not self.finite:
            self.number /= 2                                             # 3

# %% tags=["setup"]
def run(scaler, steps=60, injected=()):
    weight = torch.nn.Parameter(torch.ones(1, 4, device=gpus.device()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    for step in range(1, steps + 1):
        with torch.autocast(gpus.device(), torch.float16):
            output = torch.nn.functional.linear(torch.ones_like(weight), weight)
        scaler.scale(output.float().sum() * (math.inf if step in injected else 0.25)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

# %% tags=["run"]
mine, theirs = MyScaler(2.0**24), torch.amp.GradScaler(gpus.device(), init_scale=2.0**24)
run(mine)
run(theirs)
print(f"after 60 steps: 2**{math.log2(mine.number):.0f}, 2**{math.log2(theirs.get_scale()):.0f}")

# %% [markdown]
# Both stop where the scaled gradient fits below 65 504: 0.25 x 2¹⁷ = 32 768 does, 0.25 x 2¹⁸ =
# 65 536 does not. With number 4 the scale never stops moving.
#
# ### Predict
# PyTorch's scaler starts at 2¹⁶ and, so that we see it, grows after 10 good steps instead of 2000;
# in step 25 we inject an overflow. How many of the 60 steps are skipped?

# %% tags=["predict"]
predicted_skipped = ...

# %% tags=["run"]
scaler = precision.TracedScaler(gpus.device(), init_scale=2.0**16, growth_interval=10)
run(scaler, injected=[25])
skipped = sum(step.skipped for step in scaler.trace)
figure = figures.loss_scale(scaler.trace, "grows after 10 good steps; overflow injected in step 25")
show_prediction(predicted_skipped, show="{:.0f} steps".format, measured=skipped, also=figure)

# %% [markdown]
# ### Explain
# The scaler finds the ceiling by bumping into it: a skipped step at each bump, then one power of
# two below. With 2000 in place of 10 that costs a run at its ceiling one step in 2001.
# [torch/amp/grad_scaler.py]
#
# ## Exercise 05.2 · Your own scaler
# *Medium, 10 minutes.* Write the rule. Given the scale, how many good steps in a row there have
# been, and whether this step overflowed: return the next scale, the next count, and whether this
# step is skipped. The check runs it beside `torch.amp.GradScaler` for 200 steps with ten injected
# overflows and compares all three after every step.
#
# <details><summary>Hint 1</summary>Two cases: overflow, or a good step. The second has two cases
# again.</details>
# <details><summary>Hint 2</summary>This step counts: it is good step number
# <code>good_steps + 1</code>. After growing, counting starts at 0.</details>
# <details><summary>Hint 3</summary><code>if overflow: return scale / 2, 0, True</code>, then
# <code>if good_steps + 1 == growth_interval: …</code></details>

# %% tags=["exercise"]
def next_state(scale, good_steps, overflow, growth_interval):
    if overflow:
        return ...
    return ...

# %% tags=["check"]
exercises.check_scaler(next_state)

# %% [markdown]
# ## 4 · Four ways to get it wrong
# A step now has nine parts: scale, backward, unscale, look, clip, step, schedule, clear, adjust the
# scale. Four mistakes are common, and none raises an error (one may warn, once).
#
# ### (a) Clip before unscale
# ### Predict
# The gradient's norm is below 1, so clipping to `max_norm=1` should change nothing. Scale 65 536,
# clip first, unscale then: what is the norm that reaches the optimizer?

# %% tags=["predict"]
predicted_norm = ...

# %% tags=["run"]
wrong, right = (torch.nn.Parameter(torch.zeros_like(exact)) for _ in range(2))
wrong.grad, right.grad = exact * 65536, exact * 65536
returned = torch.nn.utils.clip_grad_norm_(wrong, max_norm=1.0)  # clip, unscale
wrong.grad /= 65536
right.grad /= 65536                                             # unscale, clip
torch.nn.utils.clip_grad_norm_(right, max_norm=1.0)
show_prediction(predicted_norm, show="{:.1e}".format, clip_first=wrong.grad.norm().item(),
                unscale_first=right.grad.norm().item(),
                also=f"clip_grad_norm_, called first, returned {returned:,.0f}")

# %% [markdown]
# ### Explain
# Clipping compared 65 536 times the norm with 1. Adam half *hides* the bug (it divides by the
# gradient's own size: 0.6 of the learning rate in its first step, where 1.0 is right; Go further);
# the norm that `clip_grad_norm_` returned shows it. Call `scaler.unscale_(optimizer)` before you
# clip.
#
# ### The other three
# A log has the loss, norm, scale and learning rate of each step. Where would you see each of these?
#
# (b) **Step despite infinity**, as in section 3. `scaler.step(optimizer)` looks first,
# `optimizer.step()` does not.
#
# (c) **The scaler is not in the checkpoint.** A new one starts at 65 536: a resumed run
# whose scale was lower loses steps again, one whose scale was higher works below it for thousands
# of steps. `scaler.state_dict()` is five numbers: save them.
#
# (d) **The schedule moves on in skipped steps.** The warm-up may be over before training has begun.
# (Numbers, and a step for you to put in order: Go further.)
#
# <details><summary>Where you see them</summary>(b) Loss and norm are NaN from one step on, for
# good. (c) The scale jumps at the resume; if up, norms are not finite for some steps. (d) The rate
# rises before the first finite norm.</details>

# %% [markdown]
# ## In your script
# A loop of your own, in the right order. (A norm of `inf` or `nan` in the first steps is the
# scaler, finding its level. A scale that keeps falling, below 1, is not: the infinities then come
# from forward, from a derivative at 0 or from a weight that is NaN, and no scale mends those.
# `last.pt` takes 5.5 GiB: 494 million weights, 12 bytes each with Adam's state [Qwen2.5-0.5B].)
#
# On a GPU, Trainer's `fp16=True` does the same, with two surprises: its `global_step` and
# `max_steps` count skipped steps, and where every loss is NaN its log says 0.0. Watch `grad_norm`.
# (Both are run in Go further.)
#
# ```python
# import torch
# from transformers import AutoModelForCausalLM
#
# device = "cuda" if torch.cuda.is_available() else "cpu"
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.float32).to(device)
# optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)  # what is trained is float32
# scaler = torch.amp.GradScaler(device)
# ids = torch.randint(0, 1000, (2, 64), device=device)
# for step in range(4):  # accumulating: autocast to backward for each share (03), the rest once
#     with torch.autocast(device, torch.float16):
#         loss = model(input_ids=ids, labels=ids).loss
#     scaler.scale(loss).backward()
#     scaler.unscale_(optimizer)  # before anything looks at the gradients
#     norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
#     scaler.step(optimizer), scaler.update()  # skips when a gradient is not finite
#     # a schedule: `if norm.isfinite(): schedule.step()`
#     optimizer.zero_grad()
#     print(f"step {step}: norm {norm:.2f}, scale {scaler.get_scale():.0f}")
# torch.save([part.state_dict() for part in (model, optimizer, scaler)], "last.pt")
# ```
#
# And yours? Print `scaler.get_scale()` (Trainer's is `trainer.accelerator.scaler`; `None` with bf16
# or without a GPU: nothing to watch) at steps 0, 100 and 1000 of your own run: which way does it
# move, and why?
# <details><summary>Answer</summary>By step 1000 of a fresh run it has stayed or fallen, never
# risen: to double takes 2000 good steps in a row. If it fell, 65 536 was too high for your
# loss.</details>
#
# ## And now?
# The same five questions.

# %% tags=["self-check"]
after = ...

# %% tags=["self-check"]
exercises.QUESTIONS.score(before, after)

# %% [markdown]
# ## To lesson 06
# Every part works now, on a model that fits anywhere. Lesson 06 takes one of 8 billion weights, the
# usual recipe, and asks: what does it waste?

# %% [markdown]
# ## Go further (optional)
# Everything from here on is beyond the 45 minutes: take what you like.
#
# ## Exercise 05.3 · The right order
# *Medium, 8 minutes.* Complete the step. Return whether it stepped. The check compares weights and
# learning rate with PyTorch's scaler over twelve steps, four of which overflow. (`scale` is given;
# adjusting it was exercise 05.2.)
#
# <details><summary>Hint 1</summary>After backward: unscale, look, clip, step, schedule, clear.
# Which of them happen in a step that overflowed?</details>
# <details><summary>Hint 2</summary>Unscale: <code>for weight in weights: weight.grad /=
# scale</code>. Look: <code>all(weight.grad.isfinite().all() for weight in weights)</code></details>
# <details><summary>Hint 3</summary>Clip, <code>optimizer.step()</code> and
# <code>scheduler.step()</code> stand below <code>if finite:</code>;
# <code>optimizer.zero_grad()</code> does not.</details>

# %% tags=["exercise"]
def careful_step(loss, weights, optimizer, scheduler, scale, max_norm):
    (loss * scale).backward()
    ...
    finite = ...
    return finite

# %% tags=["check"]
exercises.check_step(careful_step)

# %% [markdown]
# ### What Adam makes of a clipped gradient
# And Adam? In its first step an update is rate x g / (|g| + 1e-08):

# %% tags=["run"]
print(f"clip_grad_norm_, called first, returns {returned / exact.norm():,.0f} times the norm")
for name, weight in {"clip first": wrong, "unscale first": right}.items():
    share = (weight.grad.abs() / (weight.grad.abs() + 1e-8)).mean()
    print(f"{name:14} Adam's updates: {share:.1f} of the learning rate, on average")

# %% [markdown]
# ### (c) The scaler is not in the checkpoint
# ### Predict
# The single layer of section 3, its gradient 0.25, starts at scale 2²⁴, finds its level, and is
# interrupted after 30 steps. You resume with model, optimizer and schedule, and a *new* scaler, at
# 2²⁴ again. How many steps are lost again?

# %% tags=["predict"]
predicted_lost_again = ...

# %% tags=["run"]
first, new, restored = (precision.TracedScaler(gpus.device(), init_scale=2.0**24) for _ in range(3))
run(first, steps=30)
restored.load_state_dict(first.state_dict())
run(new, steps=30)
run(restored, steps=30)
lost = [sum(step.skipped for step in scaler.trace) for scaler in (first, new, restored)]
show_prediction(predicted_lost_again, show="{:.0f} steps".format, new_scaler=lost[1],
                restored_scaler=lost[2])

# %% [markdown]
# ### Explain
# Skipped steps are lost data, and the resumed run is no longer the run that was interrupted: it
# skips steps that the other would have taken.
#
# ### (d) The schedule moves on in skipped steps
# The same start at 2²⁴, with a warm-up: the rate rises over 10 steps from a tenth to the full rate.
# The very first update that is not skipped should have a tenth. It depends on who waits:

# %% tags=["run"]
def first_rate(scaler, waits, warm_up=10):
    weight = torch.nn.Parameter(torch.ones(1, 4, device=gpus.device()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, (n + 1) / warm_up))
    while not scaler.trace or scaler.trace[-1].skipped:
        rate = schedule.get_last_lr()[0]
        scaler.scale(weight.half().float().sum() * 0.25).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if not (waits and scaler.trace[-1].skipped):
            schedule.step()
    return rate

# %% tags=["run"]
for always in (False, True):
    scaler = precision.TracedScaler(gpus.device(), init_scale=2.0**24)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rate = first_rate(scaler, waits=not always)
    print(f"schedule {'steps always' if always else 'waits'}: {rate:.1f} of the full rate")
too_early = rate
print("PyTorch warned:", str(caught[0].message).split(". ")[0])

# %% [markdown]
# The warm-up was nearly over before training had begun: the untrained adapters get almost the full
# rate at once, the very thing that a warm-up prevents. You may have seen PyTorch's warning about
# the order of `lr_scheduler.step()` and `optimizer.step()` in a loop whose order was right. This is
# what it means: the scaler skipped the first step. It is said once, and only when it is the *first*
# step that is skipped.

# %% [markdown]
# ### When a scaler cannot help, and when none is needed
# Lesson 04 kept the adapters in float32. Here is the other reason. Adapters in float16 have float16
# gradients; dividing *those* by the scale would flush them right there. PyTorch refuses:

# %% tags=["raises-exception"]
weight = torch.nn.Parameter(torch.ones(4, device=gpus.device(), dtype=torch.float16))
scaler = torch.amp.GradScaler(gpus.device())
scaler.scale(weight.sum()).backward()
scaler.unscale_(torch.optim.SGD([weight], lr=0.1))

# %% [markdown]
# This is what a run says, at its first step, after an evaluation before training with
# `fp16_full_eval`, or a careless `model.half()`. The cure: `.float()` for everything that is
# trained.
#
# And bfloat16, without any scaling? Three things: how many of the layers' gradients it flushes; the
# adapters' gradient's error beside that of float16 at a scale of 2⁸; and its error at 2²⁰ beside
# its own at scale 1 (`True`: the same to a hundredth).

# %% tags=["run"]
flushed = land(groups["layers' gradients"], "bfloat16").zero
print(f"flushed to zero: {flushed:.4f}")
coarse, shifted = (relative_error(scaled_gradient(scale, "bfloat16"), exact)
                   for scale in (1.0, 2.0**20))
print("error of bfloat16 at scale 1 above that of float16 in its window:", coarse > errors[8])
print("the same at scale 2**20:", math.isclose(coarse, shifted, rel_tol=1e-2))

# %% [markdown]
# bfloat16 has float32's exponent, so a scale would shift numbers within a range that holds them
# all: the error is the same at both scales. It is larger than float16's, for want of three fraction
# bits, and training does not mind (lesson 04). With `bf16=True` Trainer makes no scaler.
# On a T4 that is not an option: it emulates bfloat16.

# %% [markdown]
# ### What Trainer does with `fp16=True`
# All of it. Watch it: ten steps, the scale starting far too high, a warm-up of half the run.
# (Without a GPU accelerate, the library under Trainer, leaves scaler and autocast out, and says
# nothing; `trace_scaler` puts them in.)

# %% tags=["setup"]
from transformers import PrinterCallback, Trainer
short = replace(recipe, amp_dtype="float16", micro_batch_size=1, gradient_accumulation_steps=1,
                max_steps=10, save_steps=5, logging_steps=1, warmup_fraction=0.5)
folder = tempfile.mkdtemp()
arguments = short.to_training_arguments(folder, disable_tqdm=True, dataloader_pin_memory=False)

# %% [markdown]
# ### Predict
# The log will say `global_step = 10`. How many of the ten steps does the scaler let through, when
# the scale starts at 2²⁰? (From section 1 you know where the fresh state begins to overflow. But
# there each example was one of 32 behind a step; here it is the whole step, and its gradient
# larger.)

# %% tags=["predict"]
predicted_steps = ...

# %% tags=["run"]
trainer = Trainer(copy.deepcopy(fresh), arguments, train_dataset=rows, data_collator=data.collate)
trainer.remove_callback(PrinterCallback)
scaler = precision.trace_scaler(trainer, init_scale=2.0**20)
_ = trainer.train()
let_through = sum(not step.skipped for step in scaler.trace)
table = ["step   scale   skipped   learning rate   gradient norm"]
for step, log in zip(scaler.trace, trainer.state.log_history, strict=False):
    norm = "finite" if math.isfinite(log["grad_norm"]) else "not finite"
    table.append(f"{log['step']:4}   2**{math.log2(step.scale):.0f}   {step.skipped!s:7} "
                 f"{log['learning_rate']:14.4f}    {norm}")
saved = [name for name in os.listdir(f"{folder}/checkpoint-5") if "scaler" in name]
table.append(f"in the checkpoint: {saved}")
show_prediction(predicted_steps, show="{:.0f} steps".format, measured=let_through,
                also="\n".join(table))

# %% [markdown]
# ### Explain
# Section 1's fresh state bore 2¹⁶, and no longer 2²¹. An example alone weighs 32 = 2⁵ times what it
# weighs among 32, so five to nine halvings from 2²⁰ were to be expected. Each is a skipped step.
# (The first that is let through is at rate zero, as in lesson 03, and changes nothing: linear
# warm-up starts there.) Trainer unscales before it clips, skips, lets the schedule wait, and saves
# the scaler. But `global_step` counts skipped steps, and so do `max_steps` and the epoch: their
# data are gone. The first steps of an fp16 run with a gradient norm of `nan` in the log are no
# reason to stop; a scale that keeps falling is. [transformers/trainer.py; accelerate/optimizer.py,
# `step_was_skipped`]
#
# A *loss* of NaN you would not see. Let Trainer go on with the adapters that section 3 ruined:

# %% tags=["run"]
arguments.logging_nan_inf_filter = True  # Trainer's default; the recipe switches it off
ruined = Trainer(victim, arguments, train_dataset=rows, data_collator=data.collate)
ruined.remove_callback(PrinterCallback)
_ = ruined.train()
print("loss of the model:", qlora.compute_loss(victim, batch, recipe).item())
print("losses in the log:", [log["loss"] for log in ruined.state.log_history if "loss" in log])

# %% [markdown]
# `logging_nan_inf_filter` writes down, in place of a loss that is not finite, the average of those
# since the last line of the log: zero here, where there are none. [transformers/trainer.py] The
# gradient norm is not filtered: watch that, or switch the filter off.

# %% [markdown]
# ### For those who struggle
# Three numbers by hand. The gradients are 3e-8, 2e-6 and 0.5; float16 keeps nothing below 2.98e-8,
# half its smallest number (from there up 5.96e-8 is nearer), and nothing above 65 504.
#
# | scale | 3e-8 becomes | 2e-6 becomes | 0.5 becomes |
# |---|---|---|---|
# | 1 | 6e-8, twice too large | 2e-6, five bits of it | 0.5 |
# | 1024 | 3.1e-5, one bit short | 0.002, fine | 512, fine |
# | 262 144 | 0.0079, fine | 0.52, fine | 131 072: **infinite** |

# %% tags=["run"]
numbers = torch.tensor([3e-8, 2e-6, 0.5])
for scale in (1, 1024, 262144):
    stored = (numbers * scale).half()
    print(f"{scale:7}  ", *(f"{number:9.2e}" for number in stored.tolist()))

# %% [markdown]
# Which powers of two are good for all three? Try. (2¹¹ to 2¹⁶: above, 0.5 overflows; below, 3e-8
# lacks bits.)
#
# ### An open question
# *Two losses, one scaler.* Add a second loss whose gradients are a million times smaller (multiply
# it by 1e-6), and find a scale for both: is there a window? Then give each loss a scale of its own,
# unscale each before adding, and compare with float32. What does this say about a loss that sums
# over tokens instead of averaging?
#
# ### Try with AI
# Give an assistant this loop and ask for all mistakes, and for the number by which each is seen:
#
# > ```
# > scaler.scale(loss).backward()
# > torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
# > scaler.step(optimizer)
# > scheduler.step()
# > scaler.update()
# > optimizer.zero_grad()
# > torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
# >             "scheduler": scheduler.state_dict()}, "last.pt")
# > ```
#
# A right answer finds three mistakes about the scale: clipping before `unscale_` (the norm that
# reaches the optimizer is at most 1 / scale, however large the gradient); the schedule in skipped
# steps (after a start at 2²⁴ the first update has most of the full rate); no scaler in the
# checkpoint (steps are lost again after a resume where the scale was lower). `scaler.step` does
# look for infinities. (It also saves over its only good checkpoint, and without the random state
# and the position in the data.) For the runs of this lesson the numbers are:

# %% tags=["run"]
print(f"norm when clipped first:    {wrong.grad.norm():.1e}, and 1 / scale is {1 / 65536:.1e}")
print(f"norm when unscaled first:   {right.grad.norm():.1e}")
print(f"first update's rate:        {too_early:.1f} of the full rate instead of a tenth")
print(f"steps lost after a resume:  {lost[1]} instead of {lost[2]}")

# %% [markdown]
# ## What this lesson left out
# Scales per layer or per tensor (float8 needs them); `GradScaler` with several optimizers, and with
# sharded models (all ranks must skip together); gradient clipping by value; stochastic rounding.
#
# ## Sources
# - Micikevicius et al. 2018, [Mixed precision training](https://arxiv.org/abs/1710.03740), sections
#   3.2 and 4
# - PyTorch, [grad_scaler.py](https://github.com/pytorch/pytorch/blob/main/torch/amp/grad_scaler.py)
#   and [AMP examples](https://docs.pytorch.org/docs/stable/notes/amp_examples.html): clipping
# - accelerate,
#   [optimizer.py](https://github.com/huggingface/accelerate/blob/main/src/accelerate/optimizer.py)
#   and scheduler.py: skipped steps
# - transformers,
#   [trainer.py](https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py):
#   `_save_scaler`, `_inner_training_loop`
# - Qwen, [Qwen2.5-0.5B](https://huggingface.co/Qwen/Qwen2.5-0.5B): model card
#
# New terms are in the [glossary](glossary.md).
