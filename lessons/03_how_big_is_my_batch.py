# %% [markdown]
# # 03 · How big is my batch, really?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/03_how_big_is_my_batch.ipynb)
#
# **45 min** for those who have fine-tuned a transformer, 60 to 75 for others; two thirds in is a
# place to stop · runs anywhere; a GPU fills in the lines that say "measured".
#
# A T4 trains a 3B model on two sequences of 2048 tokens at a time if every layer forgets; a third
# is *tight* (lesson 02). You want 32 behind each update, so you add up sixteen times two. Is that
# the same as 32 at once? It is, if you divide by the right number. Many loops do not.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *write* an accumulation whose gradient equals the full batch's | B2 | exercise 03.1 |
# | *design* an effective batch of 32 that fits a T4 and loses little time | B2 | exercise 03.2 |
# | *calculate* a run's steps and log lines | B1 | section 1; ends of epochs: 03.3 (Go further) |
#
# (B1: you can use it. B2: you can take it apart and build with it.)
#
# **Needs:** the four holders of memory (lesson 01), k of n layers (lesson 02).
# **New concepts (3):** effective batch · optimizer step · token weighting. Each is in the
# [glossary](glossary.md).

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
import gc
import math
import time
import torch
from dataclasses import replace
from transformers import Trainer
from course_utils import data, figures
from course_utils.exercises import lesson_03 as exercises
from course_utils.exercises.predictions import show_prediction
from fitcast import TrainRecipe, gpus, show_bytes
from fitcast.training import batching
print(gpus.describe(gpus.detect()))

# %% [markdown]
# The model of lesson 01, micro batches of 2 (a **micro batch** is what goes forward at once), and
# 32 examples, customers' messages and their answers.

# %% tags=["setup"]
recipe = TrainRecipe(model=data.BUNDLED, base="float32", lora_rank=None, lora_dropout=0,
                     micro_batch_size=2, gradient_accumulation_steps=16, sequence_length=128,
                     optimizer="adamw", checkpointed_layers=0)
tokenizer = data.tokenizer()
rows = list(data.encoded(recipe.sequence_length))
batch = data.to_batch(rows[:32])
print(len(rows), "examples; a batch of 32 has the shape", tuple(batch["input_ids"].shape))

# %% [markdown]
# ## Five questions, before and after
# Five letters, `x` for "not yet".

# %% tags=["self-check"]
exercises.QUESTIONS

# %% tags=["self-check"]
before = ...  # for example "abcda"

# %% [markdown]
# ## 1 · Thirty-two, two at a time
# An update needs the gradient of many sequences; memory wants few at once. PyTorch has the way out
# built in: `backward()` *adds* to `.grad`. So micro batch after micro batch goes forward and
# backward, the gradients pile up, and then comes one **optimizer step** for all of them. Two
# updates of 2 x 4 sequences; after each `backward()` we measure the length of what lies in `.grad`
# (all of it as one long vector: its norm):

# %% tags=["run"]
from fitcast.step import qlora
from fitcast.training.gradients import gradient, in_float64, relative_error
model, events = qlora.load_base(recipe), []
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
micro_batches = batching.split(batch, 2)
for four in (micro_batches[:4], micro_batches[4:8]):
    for micro_batch in four:
        loss = model(**micro_batch).loss / len(four)
        loss.backward()                                   # adds to .grad
        events.append(("accumulate", gradient(model).double().norm().item()))
    optimizer.step()
    events.append(("update", events[-1][1]))
    optimizer.zero_grad()
    events.append(("clear", 0.0))
figures.updates(events, "two updates of 2 x 4 sequences")

# %% [markdown]
# Accumulate four times, update, clear. (The first update has made the second's gradient shorter:
# comment `optimizer.step()` out and see.) Forget *clear*, and the second update contains the first
# one's gradient again. The sequences behind an update are the **effective batch**: micro batch
# (`per_device_train_batch_size`) x accumulation steps (`gradient_accumulation_steps`) x world size,
# the number of processes that share the work (torchrun: one a GPU; a notebook is one process: there
# count its GPUs). Trainer has an argument for two of them, and none for the product.
#
# ### Predict
# 64 sequences, as 32 micro batches of 2, accumulation 4, `logging_steps=4`. How many lines with a
# loss does Trainer log? And what is the learning rate of the first update? (It trains twice for the
# answer: give it some seconds.)

# %% tags=["predict"]
predicted_lines = ...

# %% tags=["run"]
from course_utils.topics.trainer_log import trainer_log
short = replace(recipe, gradient_accumulation_steps=4, max_steps=8, warmup_fraction=0.5)
log = trainer_log(short, rows, tokenizer, logging_steps=4)
table = [f"optimizer step {line['step']}: learning rate {line['learning_rate']:.1e}"
         for line in trainer_log(short, rows, tokenizer, logging_steps=1)]
show_prediction(predicted_lines, show="{:.0f} lines".format, logged=len(log),
                also="\n".join(["with logging_steps=1:", *table]))

# %% [markdown]
# ### Explain
# 32 micro batches make 8 optimizer steps, and those are what Trainer counts: `logging_steps`,
# `save_steps`, `eval_steps`, `warmup_steps` and `max_steps` alike. Only
# `gradient_accumulation_steps` counts micro batches. The *learning rate* moves once an update, too:
# it rises through the *warm-up*, here half of the run, 4 steps, then it falls. With a warm-up it
# starts at **zero**, so the first update changes nothing at all. (Go further has the rest: what is
# left at the end of an epoch.) [transformers: `get_linear_schedule_with_warmup`]

# %% [markdown]
# ## 2 · The same gradient?
# Section 1 did what comes to mind first: each micro batch's mean loss, divided by their number.

# %% tags=["run"]
def add_means(model, micro_batches):
    for micro_batch in micro_batches:
        loss = model(**micro_batch).loss / len(micro_batches)
        loss.backward()

def gradient_of(model, add, *arguments):
    model.zero_grad()
    add(model, *arguments)
    return gradient(model)

def all_at_once(model, batch):
    model(**batch).loss.backward()

# %% [markdown]
# First with 32 rows that carry equally many labels. All at once, or 2 x 16? The *relative error* is
# the length of the difference of the two gradients divided by that of the right one. (In float64,
# no rounding can hide a mistake.)

# %% tags=["run"]
ids = batch["input_ids"][:, :64]
even, exact = {"input_ids": ids, "labels": ids}, in_float64(copy.deepcopy(model))
in_parts = gradient_of(exact, add_means, batching.split(even, 2))
error = relative_error(in_parts, gradient_of(exact, all_at_once, even))
print("equal, to 1e-12:", error < 1e-12)

# %% [markdown]
# Equal but for rounding. Accumulation is no approximation. Now our 32 examples, where only the
# answer is learned: the label of each token outside it is -100, which the loss skips. Chat data
# have short answers and long ones. To see what that does we make it extreme: of 28 of the 32
# answers we leave only the first token.

# %% tags=["run"]
uneven = data.to_batch(exercises.keep_first_token(rows[:32], of_answers=28))
micro_batches = batching.split(uneven, 2)
print("labelled tokens:", [batching.labelled_tokens(one) for one in micro_batches])

# %% [markdown]
# ### Predict
# `add_means` again, against the whole batch at once. What is the relative error of its gradient? (0
# is equal; 1 is as far off as a gradient of zero.)

# %% tags=["predict"]
predicted_error = ...

# %% tags=["run"]
def error_of_means(batch):
    means = gradient_of(model, add_means, batching.split(batch, 2))
    return relative_error(means, gradient_of(model, all_at_once, batch))

figure = figures.token_shares([batching.labelled_tokens(one) for one in micro_batches],
                              "28 short answers, 4 long ones")
by_chance = data.to_batch(exercises.cut_by_chance(rows[:32]))
milder = (f"no answer cut: {error_of_means(batch):.2f}, each cut to a random length, more short "
          f"than long: {error_of_means(by_chance):.2f}")
show_prediction(predicted_error, show="{:.2f}".format, mean_of_means=error_of_means(uneven),
                also=[figure, milder])

# %% [markdown]
# ### Explain
# The error is longer than the gradient itself. The loss of the whole batch is a mean over *tokens*.
# A mean of micro batches' means gives each *micro batch* the same say, so a token of a short answer
# counts dozens of times as much as a token of a long one: fourteen of sixteen shares go to first
# tokens. Uncut, our answers are about equally long, and the error is 0.00: nobody would notice this
# bug. Random lengths lie between. Yours? In your script print
# `(batch["labels"][:, 1:] != -100).sum()` for a few batches of `trainer.get_train_dataloader()`.
#
# The right way is **token weighting**: sum over a micro batch's tokens, divide by the labelled
# tokens of *all* micro batches, which must be counted before the first backward. The bug was
# reported in 2023 and sat in transformers' Trainer until October 2024 [transformers issue 24725;
# "Fixing Gradient Accumulation"].

# %% [markdown]
# ## Exercise 03.1 · Gradients that add up
# *Medium, 7 minutes.* Write the accumulation. `model(**micro_batch).loss` is the *mean* over the
# micro batch's labelled tokens. (Each token is predicted from those before it, so nothing predicts
# a row's first one, and its label does not count.) The check compares with the full batch's
# gradient, in float64 to 1e-12, **and** wants the peak of a single micro batch (a quarter more is
# granted).
#
# <details><summary>Hint 1</summary>Mean times number is sum. Which number do you divide by, and
# when do you know it?</details>
# <details><summary>Hint 2</summary>Count the labels that are not -100. Position 0 is nobody's
# target: <code>labels[:, 1:]</code>. (<code>batching.labelled_tokens</code> does both.)</details>
# <details><summary>Hint 3</summary>Inside the loop <code>loss = model(**micro_batch).loss * ... /
# total</code>. At the dots: what makes a sum of this micro batch's mean?</details>

# %% tags=["exercise"]
def add_gradients(model, micro_batches):
    total = ...
    for micro_batch in micro_batches:
        loss = ...
        loss.backward()

# %% tags=["check"]
exercises.check_accumulation(add_gradients)

# %% [markdown]
# Trainer counts an update's labelled tokens first and hands them to the loss as
# **`num_items_in_batch`**. If your own `compute_loss` does not hand that argument on, Trainer still
# believes that the loss is divided already, and no longer divides. The usual override, and the
# repaired one. It asks Trainer's own `compute_loss`, which hands the count on, and on several GPUs
# multiplies by their number (Go further says why):

# %% tags=["run"]
class Forgetful(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss

class Repaired(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

update = replace(recipe, max_steps=1)
logs = {kind.__name__: trainer_log(update, rows[:32], tokenizer, kind, logging_steps=1)[0]
        for kind in (Trainer, Forgetful, Repaired)}
for name, log in logs.items():
    factor = log["grad_norm"] / logs["Trainer"]["grad_norm"]
    print(f"{name:9} gradient {factor:4.1f} x, loss {log['loss'] / logs['Trainer']['loss']:4.1f} x")

# %% [markdown]
# Sixteen times, once for each accumulation step (8 in a notebook with two GPUs, where our 32 rows
# are used up after 8: run on two H200s). The update hardly shows it: Trainer shortens a gradient
# that is longer than 1 (*clipping*, lesson 05), and Adam divides by its size. The log does: if its
# first loss is not that of an evaluation on the same rows, look here first.
#
# (Many heads for *classification* take `num_items_in_batch` and ignore it: with plain Trainer
# BERT's loss is 16 times too large at 16 steps of accumulation [transformers issue 47688]. Set
# `trainer.model_accepts_loss_kwargs = False`.)

# %% [markdown]
# *A good place to stop. When you come back: run all cells above, then go on.*
#
# ## 3 · What does memory see?
# ### Predict
# Two updates under the ledger, with 32 sequences at a time, then with 2. The micro batch shrinks to
# a sixteenth. The peak of 2 x 16 is which fraction of the peak of 32 x 1?

# %% tags=["predict"]
predicted_fraction = ...

# %% tags=["setup"]
from fitcast import MemoryLedger
def two_updates(recipe):
    model = qlora.load_base(recipe)
    optimizer = qlora.build_optimizer(model, recipe)
    shape = (recipe.effective_batch_size, recipe.sequence_length)
    ids = torch.randint(0, model.config.vocab_size, shape, device=gpus.device())
    micro_batches = batching.split({"input_ids": ids, "labels": ids}, recipe.micro_batch_size)
    with MemoryLedger(model, inputs=micro_batches) as ledger:
        for _ in range(2):
            batching.accumulate(model, micro_batches)
            optimizer.step()
            optimizer.zero_grad()
    return ledger.report()

# %% tags=["run"]
at_once = two_updates(replace(recipe, micro_batch_size=32, gradient_accumulation_steps=1))
start = gpus.reset_peak()
in_parts = two_updates(recipe)
measured = f"2 x 16, measured: {show_bytes(gpus.peak_allocated_bytes(above=start))}"
bars = figures.compare({"32 x 1": at_once, "2 x 16": in_parts}, title="peak of two updates")
few = two_updates(replace(recipe, gradient_accumulation_steps=4))
line = figures.memory_over_time(few, "two updates of 2 x 4 sequences")
show_prediction(predicted_fraction, show="{:.3f} of the peak".format, also=[measured, bars, line],
                counted=in_parts.peak_bytes / at_once.peak_bytes)

# %% [markdown]
# ### Explain
# **Activations follow the micro batch.** Weights and optimizer state do not care. Gradients do, the
# other way round: 32 x 1 has none yet at its peak, at 2 x 16 they lie, 5.82 MiB, beside every later
# forward. These three are more than half of what 2 x 16 needs, so the peak falls by less than a
# factor of 16. The timeline shows that the second micro batch costs the gradients, and every
# further one nothing: each one's tensors are gone before the next one's come.
#
# **Task:** read off the bars what 4 x 8 needs. To check it, count:
# `two_updates(replace(recipe, micro_batch_size=4, gradient_accumulation_steps=8))`.
# <details><summary>Answer</summary>Weights, gradients and Adam's two averages stay, four times 5.82
# MiB; the rest of the bar doubles; on a CPU, of 40.18 MiB: <code>2 * 40.18 - 4 * 5.82</code>, which
# is 57.</details>

# %% [markdown]
# ## 4 · Thirty-two on a T4
# Llama-3.2-3B by QLoRA, rows of 2048 tokens without padding, a T4 (padded rows: lesson 06). Three
# numbers are yours: micro batch, accumulation steps, and how many of the 28 layers forget. ("At
# best" are the seconds at the card's peak rates, which no step reaches. They are fair to what
# forgetting costs, and hardly see that larger micro batches run faster: Go further measures that.)

# %% tags=["run"]
three = TrainRecipe(model="llama-3.2-3b", sequence_length=2048, amp_dtype="float16")

def try_out(micro_batch_size, checkpointed_layers):
    step = exercises.effective_batch_step(three, micro_batch_size, checkpointed_layers, gpus.T4)
    seconds = exercises.seconds_an_update(step, micro_batch_size)
    print(f"{micro_batch_size} at a time, {checkpointed_layers} layers forget: {step.verdict}, "
          f"peak {show_bytes(step.peak_allocated_bytes)}, at best {seconds:.0f} s an update")

try_out(2, 28)
try_out(2, 14)

# %% [markdown]
# ## Exercise 03.2 · Effective batch 32 on a T4
# *Medium, 8 minutes.* Choose the three numbers. The check wants 32 sequences behind an update, the
# verdict *fits*, and an update that, by forecast, takes at most 10 % longer than the fastest plan
# that fits; it forecasts other plans as well, give it some seconds.
#
# <details><summary>Hint 1</summary>What does a micro batch of 1 cost in these seconds, with every
# layer forgetting? <code>try_out(1, 28)</code></details>
# <details><summary>Hint 2</summary>Half the sequences at a time free several GiB. What could they
# buy?</details>
# <details><summary>Hint 3</summary>Layers that remember save their second forward. Lower
# <code>checkpointed_layers</code> until the verdict is no longer "fits".</details>

# %% tags=["exercise"]
plan = {"micro_batch_size": ...,
        "gradient_accumulation_steps": ...,
        "checkpointed_layers": ...}

# %% tags=["check"]
exercises.check_effective_batch(plan, three, gpus.T4)

# %% [markdown]
# So: the largest micro batch that fits *comfortably*, unless its room buys more as layers that need
# not forget; accumulation for the rest. Which of the two wins, a clock says: these seconds hardly
# see what a small micro batch costs, so time yours and 2 x 16 with all layers forgetting.
#
# Move the controls (with the mouse, or Tab and the arrow keys); they begin with two at a time,
# every layer forgetting. **Task:** at which lengths does a micro batch of 4 fit? And of 8?
# <details><summary>Answer</summary>4 up to 1024 tokens, 8 up to 512: each needs what 2 x 2048
# needs. Up to 2048 tokens a sequence, memory follows the tokens of a micro batch. Beyond, the
# scores outgrow the logits: in rows without a mask a T4's attention writes one for every pair of
# tokens (lesson 06), and 1 x 8192, beyond this slider, needs nearly twice what 4 x 2048
# needs.</details>

# %% tags=["run"]
figures.split_explorer()

# %% [markdown]
# ## In your script
# The three numbers in Trainer, a `compute_loss` that hands the count on, and the first thing to
# look at: the script's own two lines, "before training" and "first update". (Trainer prints lines
# in braces around them. With rows of your own evaluate a few hundred: the two are not equal to the
# last digit then, but not 16 times off.)
#
# ```python
# import torch
# from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
#
# class MyTrainer(Trainer):
#     def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
#         loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
#         # here: what you do with them
#         # try loss = model(**inputs).loss here: the second line is 16 times the first (2 GPUs: 8)
#         return (loss, outputs) if return_outputs else loss
#
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B", dtype=torch.float32)
# rows = [{"input_ids": list(range(64)), "labels": list(range(64))}] * 32
# arguments = TrainingArguments(
#     "out", per_device_train_batch_size=2, gradient_accumulation_steps=16, max_steps=1,
#     logging_steps=1, report_to="none", save_strategy="no",
# )
# trainer = MyTrainer(model, arguments, train_dataset=rows)
# print("before training:", trainer.evaluate(rows)["eval_loss"])  # the rows of the first update
# trainer.train()
# first = next(line["loss"] for line in trainer.state.log_history if "loss" in line)
# print("first update:", first)  # the same, if all is right
# ```
#
# ## And now?
# The same five questions.

# %% tags=["self-check"]
after = ...

# %% tags=["self-check"]
exercises.QUESTIONS.score(before, after)

# %% [markdown]
# ## To lesson 04
# The activations of section 3 are numbers of 4 bytes. Would 2 do? Lesson 04 asks: half the bits,
# all the quality?

# %% [markdown]
# ## Go further (optional)
# Everything from here on is beyond the 45 minutes: take what you like.

# %% [markdown]
# ## Exercise 03.3 · What a run counts
# *Easy, 5 minutes.* Complete the function. (`ranks` is the number of processes that share the
# work.) The check lets Trainer run, four times: with epochs that do not divide evenly, with several
# of them, and as one of two processes. What is left at the end of an *epoch* makes an update, too,
# a short one; and a share of a warm-up step counts as a whole one.
#
# <details><summary>Hint 1</summary>Seven micro batches with accumulation 4: Trainer makes an update
# of four, and at the end of the epoch one of the three that are left.</details>
# <details><summary>Hint 2</summary><code>math.ceil</code> for each epoch; then times the
# epochs.</details>
# <details><summary>Hint 3</summary><code>steps = epochs * math.ceil(... / accumulation)</code>. A
# share of a warm-up step rounds up as well; a line comes each time <code>logging_steps</code> goes
# into the step's number.</details>

# %% tags=["exercise"]
def what_it_counts(examples, micro_batch_size, accumulation, ranks, epochs, warmup, logging_steps):
    micro_batches = math.ceil(examples / (micro_batch_size * ranks))  # an epoch's, per process
    steps = ...         # optimizer steps of all epochs
    warmup_steps = ...  # warmup is a share of the steps, for example 0.03
    log_lines = ...
    return steps, warmup_steps, log_lines

# %% tags=["check"]
exercises.check_schedule(what_it_counts)

# %% [markdown]
# ### How many fit?
# Fewer, larger matrix products are faster, so one looks for the largest micro batch. As one writes
# it in a hurry, with five faults:

# %% tags=["run"]
def usual_search(model, tokenizer):
    size = 1
    while True:
        try:
            texts = tokenizer(["Test " * 100] * size, padding=True, truncation=True,
                              max_length=512, return_tensors="pt").to(model.device)
            model(**texts, labels=texts["input_ids"]).loss.backward()
            model.zero_grad()
            size *= 2
        except torch.OutOfMemoryError:
            gc.collect()  # clean up
            return size // 2

# %% [markdown]
# We give it a pretended card of 120 MiB: a ledger with a budget, which refuses what that card would
# refuse. Then `largest_micro_batch`, whose attempts are whole updates with the longest sequences.

# %% tags=["run"]
card = 120 * 2**20
probed = qlora.load_base(recipe)
with MemoryLedger(probed, budget_bytes=card):
    print("the usual search says:", usual_search(probed, tokenizer))

# %% [markdown]
# ### Predict
# We train on sequences of 512 tokens, with accumulation. How many really fit in a micro batch on
# this card?

# %% tags=["predict"]
predicted_largest = ...

# %% tags=["run"]
def backward(size):
    ids = torch.randint(0, probed.config.vocab_size, (size, 512), device=gpus.device())
    batching.accumulate(probed, [{"input_ids": ids, "labels": ids}])

optimizer = qlora.build_optimizer(probed, recipe)
found = batching.largest_micro_batch(backward, probed, optimizer, budget_bytes=card)
show_prediction(predicted_largest, show="{:.0f} sequences".format, found=found.micro_batch_size,
                also=figures.attempts(found, card, "512 tokens, on a card of 120 MiB"))

# %% [markdown]
# ### Explain
# 1. **The text.** `max_length=512` cuts, it does not fill. Probe with your longest sequences.
# 2. **No optimizer step.** Adam's state appears in the first one; only the step after it shows the
#    peak. And with accumulation, gradients lie beside every forward pass.
# 3. **It cleans up inside `except`.** There the exception is still alive, and with it the frames
#    that it came through, and with them every tensor that was there. Leave `except` first. [PyTorch
#    FAQ]
# 4. **It labels the padding.** No question of memory; but copied into training, it teaches the
#    model to write padding.
# 5. **It only doubles.** Sizes between two powers of 2 are never tried.
#
# *Probing for memory* means: whole updates, the worst data, the failure left before the next
# attempt.

# %% [markdown]
# ### What each fault of the usual search is worth

# %% tags=["run"]
test_tokens = len(tokenizer("Test " * 100)["input_ids"])
print(f"'Test ' * 100 has {test_tokens} tokens here, not 512")
state_bytes = 2 * sum(p.nbytes for p in probed.parameters())
print("the optimizer state that it never met:", show_bytes(state_bytes))

# %% tags=["run"]
try:
    with MemoryLedger(probed, budget_bytes=card) as ledger:
        backward(16)
except torch.OutOfMemoryError:
    gc.collect()
    print("alive, cleaned up inside except:", show_bytes(ledger.live_bytes))
gc.collect()
print("alive, cleaned up after it:     ", show_bytes(ledger.live_bytes))

# %% [markdown]
# `largest_micro_batch` doubles until it fails, then halves the interval; and all that it trained
# with is afterwards as it was. To the bit? In the middle of a run, with gradients and optimizer
# state:

# %% tags=["run"]
def everything():
    return copy.deepcopy({"weights": probed.state_dict(), "optimizer": optimizer.state_dict(),
                          "gradients": [p.grad for p in probed.parameters()],
                          "modes": [module.training for module in probed.modules()],
                          "random state": torch.get_rng_state()})

# %% tags=["run"]
probed.zero_grad()
backward(1)
optimizer.step()
as_it_was = everything()
batching.largest_micro_batch(backward, probed, optimizer, budget_bytes=card)
torch.testing.assert_close(everything(), as_it_was, rtol=0, atol=0)
print("as they were, to the bit:", ", ".join(as_it_was))

# %% [markdown]
# ## Exercise 03.4 · A search of your own
# *Medium, 8 minutes.* `train(size)` trains with `size` sequences and raises
# `torch.OutOfMemoryError` if they are too many. Return the largest size from 0 to `upper` that
# trains. The check counts attempts (14 at most for `upper` 64), looks whether the last failure's
# tensors are gone when you try again, and wants every other error to come through.
#
# <details><summary>Hint 1</summary>Keep two numbers: the largest size that trained, and the
# smallest that did not. They start at 0 and <code>upper + 1</code>.</details>
# <details><summary>Hint 2</summary>While more than 1 lies between them, try the middle. In
# <code>except</code> only note that it failed.</details>
# <details><summary>Hint 3</summary><code>fits = True</code>, <code>try: train(middle)</code>,
# <code>except torch.OutOfMemoryError: fits = False</code>; after it <code>good, bad = (middle,
# bad) if fits else (..., ...)</code>.</details>

# %% tags=["exercise"]
def largest_that_trains(train, upper):
    good, bad = 0, upper + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        fits = ...
        good, bad = ..., ...
    return good

# %% tags=["check"]
exercises.check_search(largest_that_trains)

# %% [markdown]
# ### Two processes, one update
# The third factor. With two GPUs you start two processes, **ranks**, each with the whole model and
# half of the batch; `DistributedDataParallel` (DDP) averages their gradients before the optimizer
# steps. Their number is the **world size**. (A notebook with two GPUs is one process, which takes
# both: there the factor is their number.) `torchrun` starts them:
#
#     torchrun --nproc-per-node 2 your_script.py
#
# The next cells do that with the course's own script,
# [ranks.py](../course_utils/topics/ranks.py): 2 sequences x 8 micro batches x 2 ranks, the uneven
# batch of section 2, one optimizer step in float64. Rank 0 takes the first 16 rows, all short; rank
# 1 the other 16, the four long answers among them. Two GPUs talk through NVIDIA's NCCL;
# without two GPUs the ranks are two processes on the CPU, and talk through gloo.
#
# ### Predict
# Each rank divides its loss by its *own* labelled tokens, then DDP takes the mean. What is the
# relative error of the update, against one process with 2 x 16?

# %% tags=["predict"]
predicted_error_of_ranks = ...

# %% tags=["run"]
from course_utils.topics import ranks
halves = replace(recipe, gradient_accumulation_steps=8, world_size=2)
assert halves.effective_batch_size == recipe.effective_batch_size
shared = ranks.place(uneven, halves.world_size)  # on the GPUs, if there is one for each rank
alone = ranks.update(recipe, shared)
together = ranks.launch(halves, shared)
show_prediction(predicted_error_of_ranks, show="{:.2f}".format,
                each_rank_by_its_own_tokens=relative_error(together["ranks"], alone))

# %% tags=["run"]
assert relative_error(together["tokens"], alone) < 1e-12
print("divided by all ranks' tokens: the update of one process, to 1e-12")

# %% [markdown]
# ### Explain
# The same bug one floor up: DDP's average is a mean of ranks' means. The cure is the same, too: add
# up the labelled tokens of all ranks (`all_reduce`) before the first backward. Trainer does it
# unless you switch `average_tokens_across_devices` off.
#
# Memory, by the way: each rank holds weights, gradients and optimizer state of its own. A second
# GPU at best halves the time of an update, not the memory. [PyTorch: DistributedDataParallel]

# %% [markdown]
# ## Exercise 03.5 · A rank's share of the loss
# *Medium, 4 minutes.* Each rank has the *sum* of its tokens' losses. DDP takes the **mean** of the
# ranks' gradients. Which loss must a rank call `backward()` on, so that the result is the gradient
# of the mean over all tokens? The check differentiates, with 2 and with 4 ranks.
#
# <details><summary>Hint 1</summary>With one rank: the sum by the number of tokens.</details>
# <details><summary>Hint 2</summary>With two, DDP adds both gradients and divides by 2. You do not
# want that division.</details>
# <details><summary>Hint 3</summary><code>loss_sum * ... / all_tokens</code>. At the dots: what
# undoes DDP's division?</details>

# %% tags=["exercise"]
def loss_of_rank(loss_sum, my_tokens, all_tokens, world_size):
    return ...

# %% tags=["check"]
exercises.check_rank_loss(loss_of_rank)

# %% [markdown]
# ### Does it cost time?
# Does training take longer with accumulation? And is an A10 (24 GB) with 8 x 4 faster than a T4
# with 2 x 16?
#
# ### Predict
# An update of 2 x 4 sequences and one of 8 x 1: the first needs how many times the floating-point
# operations? And how many times the T4's tokens per second does the A10 train, with Llama-3.2-3B,
# adapters and a lean loss and attention? (65 and 125 TFLOP/s in 16 bits, 320 and 600 GB/s [T4 and
# A10 data sheets].)

# %% tags=["predict"]
predicted_work = ...
predicted_speedup = ...

# %% tags=["run"]
from course_utils.topics.checkpointing import WorkCounter
def work_of(model, rows, tokens, micro_batch_size):
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    micro_batches = batching.split({"input_ids": ids, "labels": ids}, micro_batch_size)
    with fake_tensors(), WorkCounter() as work:
        batching.accumulate(model, micro_batches, num_items=1)
    return work.flops

# %% tags=["run"]
from fitcast import fake_model, fake_tensors
small = fake_model(data.BUNDLED)
work = {size: work_of(small, 8, 128, size) for size in (8, 2)}
show_prediction(predicted_work, show="{:.2f} x".format, counted=work[2] / work[8])

# %% [markdown]
# ### Explain
# No more work. Accumulate 16 micro batches of the same size, and the *update* takes longer, because
# it has 16 times the tokens; a *token* does not. What costs is cutting the same tokens into 16
# pieces: 16 times as many kernels to start, and all weights read 16 times an update. Whether you
# feel it depends on the size of a piece. Here, on this machine:

# %% tags=["run", "nbval-ignore-output"]
# loose: seconds of this machine
for size in (32, 32, 2, 1):  # the first one warms up
    pieces, start = batching.split(even, size), time.perf_counter()
    gradient_of(model, batching.accumulate, pieces)
    gpus.synchronize()
    seconds = time.perf_counter() - start
    print(f"{size:2} x {32 // size:2}: {even['labels'].numel() / seconds:7,.0f} tokens/s")

# %% [markdown]
# And on a GPU, Llama-3.2-1B with a lean loss and attention, 2048 tokens a sequence. (An H200 with a
# T4's kernels and memory limit: the speed is an H200's, look at how it grows.)

# %% tags=["recorded"]
from course_utils.topics import recorded
for row in recorded.rows("menu"):
    if row["name"].startswith("llama-3.2-1b, ours"):
        size, speed = row["recipe"]["micro_batch_size"], row["tokens_per_second"]
        print(f"micro batch {size:2}: {speed:7,.0f} tokens/s")
print(f"[recorded: {recorded.stamp(recorded.rows('menu'))}]")

# %% [markdown]
# Larger pieces are faster, and less and less so: once a piece fills the GPU, doubling it buys next
# to nothing. So: the largest micro batch that fits *comfortably*, unless the room buys layers that
# need not forget (section 4); and accumulation for the rest.
#
# Now the two cards. The forecast gives the memory, and the time if every operation ran at the data
# sheet's peak, in FLOP/s or in bytes/s, whichever takes longer. Long steps reach a
# part of that (`gpus.T4.sustained`, and `gpus.T4.basis` says where from), so look at the ratio.

# %% tags=["run"]
from fitcast import forecast
usual = TrainRecipe(model="llama-3.2-3b", sequence_length=2048)
levers = replace(usual, loss="chunked", attention="explicit_kv")
speeds, table = {}, []

# %% tags=["run"]
for name, choice in {"usual": usual, "levers": levers}.items():
    for gpu, size in ((gpus.T4, 2), (gpus.A10, 8)):
        run = replace(choice, micro_batch_size=size, gradient_accumulation_steps=2).for_gpu(gpu)
        step = forecast(run, gpu)  # two micro batches need as much memory as more (section 3)
        speeds[name, gpu.name] = run.tokens_per_step / step.ideal_seconds
        table.append(
            f"{name:6} {gpu.name:3} {size} x {32 // size:2} {run.amp_dtype:8}  peak "
            f"{show_bytes(step.peak_bytes)}, {step.verdict}")

# %% tags=["run"]
show_prediction(predicted_speedup, show="{:.1f} x".format,
                forecast_with_levers=speeds["levers", "A10"] / speeds["levers", "T4"],
                forecast_usual=speeds["usual", "A10"] / speeds["usual", "T4"],
                also="\n".join(table))

# %% [markdown]
# **Which is faster?** The A10, by what the data sheets promise, if both run the same kernels. With
# the usual recipe and rows without a mask the T4 would fall far behind, if the A10's 8 x 4 fitted:
# it has no FlashAttention, and what replaces it there writes every score. That is a kernel's doing,
# not accumulation's.
#
# **What differs in memory?** Four times the sequences in a micro batch, four times the activations
# and logits; and with the usual loss the A10's 8 x 4 does not even fit its 24 GB. "Larger card,
# larger micro batch" has to be checked like anything else.
#
# **Is quality different?** Both update on 32 sequences, and section 2 showed that the gradient is
# the same, to rounding. What differs is the 16-bit format, float16 on one, bfloat16 on the other.

# %% [markdown]
# ### For those who struggle
# Two micro batches. The first has four tokens, each with loss 1; the second has one token, with
# loss 5.
#
# | | sum | tokens | mean |
# |---|---|---|---|
# | micro batch 1 | 4 | 4 | 1 |
# | micro batch 2 | 5 | 1 | 5 |
# | all tokens | 9 | 5 | **1.8** |
# | mean of the two means | | | **3** |
#
# The lonely token counts a half instead of a fifth. Token weighting divides each *sum* by 5:

# %% tags=["run"]
losses = [torch.tensor([1.0, 1, 1, 1]), torch.tensor([5.0])]
tokens = sum(len(micro_batch) for micro_batch in losses)
print("token-weighted:", sum(micro_batch.sum().item() / tokens for micro_batch in losses))
print("mean of means: ", sum(micro_batch.mean().item() for micro_batch in losses) / len(losses))

# %% [markdown]
# Give the second micro batch three more tokens with loss 5. Which of the two numbers moves, and why
# do they agree now?
#
# ### Open questions
# Repair the usual search one fault at a time, and run it after each repair on the card of 120 MiB.
# Then find the data that break `model(**micro_batch).loss * n / total`: a micro batch whose answers
# were all cut off has no label, its mean is 0/0, and NaN times zero is NaN. `batching.accumulate`
# survives it; why?
#
# ### Try with AI
# Ask an assistant:
#
# > I fine-tune with Trainer on two GPUs under torchrun: 10 000 examples,
# > per_device_train_batch_size 2, gradient_accumulation_steps 16, 3 epochs, warm-up 3 %,
# > logging_steps 16. What is the effective batch size? How many optimizer steps, warm-up steps and
# > log lines do I get? Does the gradient equal that of one batch of that size, and what do I save
# > in memory?
#
# A right answer rounds up for each epoch, counts everything in optimizer steps, says that the
# gradient is equal only if the loss is divided by the labelled tokens of all micro batches *and*
# ranks, that activations follow the micro batch of 2, and has these numbers:

# %% tags=["run"]
asked = replace(recipe, gradient_accumulation_steps=16, world_size=2)
per_epoch = math.ceil(10_000 / (asked.micro_batch_size * asked.world_size))
steps = 3 * math.ceil(per_epoch / asked.gradient_accumulation_steps)
print("effective batch:", asked.effective_batch_size, "· optimizer steps:", steps)
print("warm-up steps:", math.ceil(0.03 * steps), "· log lines with a loss:", steps // 16)

# %% [markdown]
# ## What this lesson left out
# Whether 32 is a good number: larger batches make calmer gradients and fewer updates, and past a
# point they only cost [McCandlish et al.]. The learning rate, which should follow the effective
# batch. Batch norm, which sees micro batches (LLMs have none). Sharding weights and state over GPUs
# (ZeRO, FSDP). Fragmentation: on a real card leave a little below the largest that fits.
#
# ## Sources
# - transformers [issue 24725](https://github.com/huggingface/transformers/issues/24725) (July 2023)
#   and Hugging Face, [Fixing Gradient Accumulation](https://huggingface.co/blog/gradient_accumulation)
#   (October 2024): the mean of means
# - transformers, [trainer.py](https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py):
#   `_get_num_items_in_batch`, `training_step`
# - PyTorch, [FAQ](https://docs.pytorch.org/docs/stable/notes/faq.html): "My out of memory exception
#   handler can't allocate memory"
# - PyTorch, [DistributedDataParallel](https://docs.pytorch.org/docs/stable/notes/ddp.html) and
#   [torchrun](https://docs.pytorch.org/docs/stable/elastic/run.html)
# - NVIDIA, data sheets:
#   [T4](https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/tesla-t4/t4-tensor-core-datasheet-951643.pdf),
#   [A10](https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a10/pdf/a10-datasheet.pdf)
# - McCandlish et al. 2018, [An empirical model of large-batch training](https://arxiv.org/abs/1812.06162)
#
# New terms are in the [glossary](glossary.md).
