# %% [markdown]
# # 03 · How big is my batch, really?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/03_how_big_is_my_batch.ipynb)
#
# **45 min** · runs anywhere; a GPU fills in the lines that say "measured". Exercise 03.3
# is for home.
#
# So you train a 3B model on two sequences at a time, sixteen times over: a T4 takes two with room
# to spare, if every layer forgets, and a third only with luck (lesson 02). You hope that it is the
# same as 32 at once. It is, if you divide by the right number. Many loops do not.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *calculate* optimizer steps, warm-up and log lines of any run | B1 | exercise 03.1 |
# | *write* an accumulation whose gradient equals the full batch's | B2 | exercise 03.2 |
# | *build* a search for the largest micro batch that survives its failures | B2 | exercise 03.3 |
# | *explain* what several GPUs change in the loss, and *compare* two cards | B2 | exercise 03.4 |
#
# **Needs:** the four holders of memory (lesson 01).
# **New concepts (5):** effective batch · optimizer step · token weighting · rank and world size ·
# probing for memory. Each is in the [glossary](glossary.md).

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
import copy
import gc
import math
import time
import torch
from dataclasses import replace
from course_utils import data
from course_utils.data import BUNDLED
from fitcast import MemoryLedger, TrainRecipe, gpus
from fitcast.training import batching
from fitcast.training.data import collate, encode
print(gpus.describe(gpus.detect()))

# %% tags=["setup"]
from transformers import AutoTokenizer, Trainer

# %% [markdown]
# The recipe of lesson 01, cut into micro batches of 2; and 32 examples, customers' messages and
# their answers. Only the answer's tokens carry labels, only they are learned; every other label is
# -100, which the loss skips.

# %% tags=["setup"]
recipe = TrainRecipe(model=BUNDLED, base="float32", lora_rank=None, lora_dropout=0,
                     micro_batch_size=2, gradient_accumulation_steps=16, sequence_length=128,
                     optimizer="adamw", checkpointed_layers=0)
tokenizer = AutoTokenizer.from_pretrained(data.bundled_model_dir())
rows = list(encode(data.load_instructions(), tokenizer, recipe.sequence_length))

def to_batch(rows):
    batch = collate(rows, tokenizer.pad_token_id)
    return {name: tensor.to(gpus.device()) for name, tensor in batch.items()}

batch = to_batch(rows[:32])
print(len(rows), "examples; a batch of 32 has the shape", tuple(batch["input_ids"].shape))

# %% [markdown]
# ## 1 · Thirty-two, two at a time
# An update needs the gradient of many sequences; memory wants few at once. PyTorch has the way out
# built in: `backward()` *adds* to `.grad`. So micro batch after micro batch goes forward and
# backward, the gradients pile up, and then comes one **optimizer step** for all of them.
#
# $$\text{effective batch} = \text{micro batch} \times \text{accumulation steps} \times
# \text{world size}$$
#
# World size is the number of processes that share the work (section 5). In `TrainingArguments` the
# three stand in three places, and their product in none:

# %% tags=["run"]
arguments = recipe.to_training_arguments("unused")
product = (arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
           * arguments.world_size)
assert product == recipe.effective_batch_size
print(arguments.per_device_train_batch_size, "x", arguments.gradient_accumulation_steps, "x",
      arguments.world_size, "=", product, "sequences behind an update")

# %% [markdown]
# Here are two updates, of 2 x 4 sequences each. After each event we measure the length of the
# gradient that lies in `.grad`.

# %% tags=["run"]
from fitcast.step import qlora
model, events = qlora.load_base(recipe), []
optimizer = qlora.build_optimizer(model, recipe)
eight = batching.split(batch, 2)[:8]

# %% tags=["run"]
from fitcast.training.gradients import gradient
for four in (eight[:4], eight[4:]):
    tokens = sum(map(batching.labelled_tokens, four))
    for micro_batch in four:
        batching.accumulate(model, [micro_batch], tokens)  # forward, backward
        events.append(("accumulate", gradient(model).double().norm().item()))
    optimizer.step()
    optimizer.zero_grad()
    events += [("update", events[-1][1]), ("clear", 0.0)]

# %% tags=["run"]
from course_utils import figures
figures.updates(events, "two updates of 2 x 4 sequences")

# %% [markdown]
# Accumulate, accumulate, accumulate, accumulate, update, clear. Forget *clear*, and the second
# update contains the first one's gradient again.
#
# ### Predict
# A tip that goes around: set `logging_steps` to `gradient_accumulation_steps`, so that each update
# is logged once. So: 64 sequences, as 32 micro batches of 2, accumulation 4, `logging_steps=4`.
# How many lines does Trainer log?

# %% tags=["predict"]
predicted_lines = ...

# %% tags=["run"]
from course_utils.exercises.checks import show_prediction
from course_utils.topics.trainer_log import trainer_log
short = replace(recipe, gradient_accumulation_steps=4, max_steps=8, warmup_fraction=0.5)
log = trainer_log(short, rows, tokenizer, logging_steps=4)
show_prediction(predicted_lines, show="{:.0f} lines".format, logged=len(log))

# %% tags=["run"]
for line in trainer_log(short, rows, tokenizer, logging_steps=1):
    print(f"optimizer step {line['step']}: learning rate {line['learning_rate']:.1e}")

# %% [markdown]
# ### Explain
# 32 micro batches make 8 optimizer steps, and those are what Trainer counts: `logging_steps`,
# `save_steps`, `eval_steps`, `warmup_steps` and `max_steps` alike. The tip logs every *fourth*
# update; `logging_steps=1` is what it wanted. Only `gradient_accumulation_steps` counts micro
# batches.
#
# The schedule moves once an update, too: half of 8 is 4 steps of warm-up. And look at the first
# line: linear warm-up starts at **zero**, so the first update changes nothing at all. Warm-up of
# 3 % of 100 steps is 3 steps, one of which does nothing.
# [transformers: `get_linear_schedule_with_warmup`]

# %% [markdown]
# ## Exercise 03.1 · What a run counts
# *Easy, 5 minutes.* Complete the function. (`ranks` is the number of processes that share the
# work.) The check lets Trainer run, four times: with epochs that do not divide evenly, with several
# of them, and as one of two processes.
#
# <details><summary>Hint 1</summary>Seven micro batches with accumulation 4: Trainer makes an update
# of four, and at the end of the epoch one of the three that are left.</details>
# <details><summary>Hint 2</summary><code>math.ceil</code> for each epoch; then times the
# epochs.</details>
# <details><summary>Hint 3</summary><code>steps = epochs * math.ceil(... / accumulation)</code>. A
# share of a warm-up step rounds up as well; a line comes each time <code>logging_steps</code> goes
# into the step's number.</details>

# %% tags=["exercise"]
from course_utils.topics import ranks
def what_it_counts(examples, micro_batch_size, accumulation, ranks, epochs, warmup, logging_steps):
    micro_batches = math.ceil(examples / (micro_batch_size * ranks))  # an epoch's, per process
    steps = ...         # optimizer steps of all epochs
    warmup_steps = ...  # warmup is a share of the steps, for example 0.03
    log_lines = ...
    return steps, warmup_steps, log_lines

# %% tags=["check"]
from course_utils.exercises import lesson_03 as exercises
exercises.check_schedule(what_it_counts)

# %% [markdown]
# ## 2 · The same gradient?
# This is accumulation as most tutorials write it: each micro batch's loss, divided by their number.

# %% tags=["run"]
def add_means(model, micro_batches):
    for micro_batch in micro_batches:
        loss = model(**micro_batch).loss / len(micro_batches)
        loss.backward()

# %% tags=["setup"]
def gradient_of(model, add, *arguments):
    model.zero_grad()
    add(model, *arguments)
    return gradient(model)

# %% [markdown]
# First with 32 rows that carry equally many labels: 63 each. All at once, or 2 x 16? The *relative
# error* is the length of the difference of the two gradients by the length of the right one. We
# compare in float32, and once more in float64, where no rounding can hide a mistake.

# %% tags=["run"]
from fitcast.training.gradients import in_float64, relative_error
model, exact = qlora.load_base(recipe), in_float64(qlora.load_base(recipe))
ids = batch["input_ids"][:, :64]
even = {"input_ids": ids, "labels": ids}
for network, tolerance in ((model, 1e-6), (exact, 1e-12)):
    at_once = gradient_of(network, batching.accumulate, [even])
    in_parts = gradient_of(network, add_means, batching.split(even, 2))
    assert relative_error(in_parts, at_once) < tolerance
    print(f"{network.dtype}: equal, to {tolerance:g}")

# %% [markdown]
# Equal but for rounding: a sum in another order. Accumulation is no approximation.
#
# Now a batch as chat data has it: most answers are a word, some are long. Of 28 of the 32 answers
# only the first token is left.

# %% tags=["run"]
uneven_rows = [dict(row) for row in rows[:32]]
for row in uneven_rows[:28]:
    answer = row["labels"].index(next(label for label in row["labels"] if label != -100))
    row["labels"] = [label if at <= answer else -100 for at, label in enumerate(row["labels"])]
uneven = to_batch(uneven_rows)
micro_batches = batching.split(uneven, 2)
print("labelled tokens:", [batching.labelled_tokens(one) for one in micro_batches])

# %% [markdown]
# ### Predict
# `add_means` again, against the whole batch at once. What is the relative error of its gradient? (0
# is equal; 1 is as far off as a gradient of zero.)

# %% tags=["predict"]
predicted_error = ...

# %% tags=["run"]
whole = gradient_of(model, batching.accumulate, [uneven])
means = gradient_of(model, add_means, micro_batches)
show_prediction(predicted_error, show="{:.2f}".format,
                mean_of_means=relative_error(means, whole))

# %% tags=["run"]
figures.token_shares([batching.labelled_tokens(one) for one in micro_batches],
                           "28 short answers, 4 long ones")

# %% [markdown]
# ### Explain
# The error is longer than the gradient itself. The loss of the whole batch is a mean over *tokens*.
# A mean of micro batches' means gives each *micro batch* the same say, so a token of a short answer
# counts dozens of times as much as a token of a long one. The model learns first words.
#
# The right way is **token weighting**: sum over a micro batch's tokens, divide by the labelled
# tokens of *all* micro batches, which must be counted before the first backward.

# %% tags=["run"]
for network, tolerance in ((model, 1e-6), (exact, 1e-12)):
    at_once = gradient_of(network, batching.accumulate, [uneven])
    in_parts = gradient_of(network, batching.accumulate, micro_batches)
    assert relative_error(in_parts, at_once) < tolerance
    print(f"{network.dtype}: equal, to {tolerance:g}")

# %% [markdown]
# This bug was reported in 2023, sat in transformers' Trainer until October 2024, and is still in
# every loop that divides by `len(micro_batches)` [transformers issue 24725; "Fixing Gradient
# Accumulation"]. Trainer now counts an update's labelled tokens first and hands them to the loss as
# **`num_items_in_batch`**. It agrees with us:

# %% tags=["run"]
one_update = replace(recipe, max_steps=1)
logged = trainer_log(one_update, uneven_rows, tokenizer, logging_steps=1)[0]
assert math.isclose(logged["grad_norm"], whole.double().norm().item(), rel_tol=1e-5)
print("Trainer's gradient is as long as ours, to 1e-5")

# %% [markdown]
# But whoever writes their own `compute_loss` and drops that argument is on their own: Trainer
# believes that the loss is divided already, and no longer divides. Even rows, the usual override:

# %% tags=["run"]
class Forgetful(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return model(**inputs).loss

right = trainer_log(one_update, rows[:32], tokenizer, logging_steps=1)[0]
wrong = trainer_log(one_update, rows[:32], tokenizer, Forgetful, logging_steps=1)[0]
print(f"gradient {wrong['grad_norm'] / right['grad_norm']:.1f} times as long, "
      f"loss {wrong['loss'] / right['loss']:.1f} times as high")

# %% [markdown]
# Times the accumulation steps. The update hardly shows it: clipping cuts the gradient to length 1
# anyway, and Adam divides by its size. The log does. If the first logged loss is not the loss of an
# evaluation on the same rows, look here first.

# %% [markdown]
# ## Exercise 03.2 · Gradients that add up
# *Medium, 7 minutes.* Write the accumulation. `model(**micro_batch).loss` is the *mean* over the
# micro batch's labelled tokens. The check compares with the full batch's gradient, in float64 to
# 1e-12, **and** wants the peak of a single micro batch (a quarter more is granted).
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
# ## 3 · What does memory see?
# Two updates under the ledger, once with 32 sequences at a time, once with 2.

# %% tags=["setup"]
def two_updates(recipe, budget_bytes=None):
    model = qlora.load_base(recipe)
    optimizer = qlora.build_optimizer(model, recipe)
    shape = (recipe.effective_batch_size, recipe.sequence_length)
    ids = torch.randint(0, model.config.vocab_size, shape, device=gpus.device())
    micro_batches = batching.split({"input_ids": ids, "labels": ids}, recipe.micro_batch_size)
    with MemoryLedger(model, inputs=micro_batches, budget_bytes=budget_bytes) as ledger:
        for _ in range(2):
            batching.accumulate(model, micro_batches)
            optimizer.step()
            optimizer.zero_grad()
    return ledger.report()

# %% [markdown]
# ### Predict
# The micro batch shrinks to a sixteenth. The peak of 2 x 16 is which fraction of the peak of 32 x
# 1?

# %% tags=["predict"]
predicted_fraction = ...

# %% tags=["run"]
from fitcast import show_bytes
at_once = two_updates(replace(recipe, micro_batch_size=32, gradient_accumulation_steps=1))
before = gpus.reset_peak()
in_parts = two_updates(recipe)
show_prediction(predicted_fraction, show="{:.3f} of the peak".format,
                counted=in_parts.peak_bytes / at_once.peak_bytes)
print("2 x 16, counted: ", show_bytes(in_parts.peak_bytes))
print("2 x 16, measured:", show_bytes(gpus.peak_allocated_bytes(above=before)))

# %% tags=["run"]
figures.compare({"32 x 1": at_once, "2 x 16": in_parts}, title="at the peak of two updates")

# %% [markdown]
# ### Explain
# **Activations follow the micro batch.** Weights and optimizer state do not care, so the peak falls
# by less than a factor of 16. The timeline shows why the *number* of micro batches costs nothing:
# each one's tensors are gone before the next one's come.

# %% tags=["run"]
few = two_updates(replace(recipe, gradient_accumulation_steps=4))
figures.memory_over_time(few, "two updates of 2 x 4 sequences")

# %% [markdown]
# Four hills in each update, and valleys between them: not down to the weights, because the
# gradients stay. That is all that accumulation costs in memory. Without it they are cleared before
# the next forward.

# %% tags=["run"]
peaks = {}
for n in (1, 2, 4, 16):
    report = in_parts if n == 16 else two_updates(replace(recipe, gradient_accumulation_steps=n))
    peaks[n] = report.peak_bytes - report.composition["inputs"]  # token ids: 2 KiB a micro batch
    print(f"2 x {n:2}: {show_bytes(peaks[n])}")
assert peaks[2] == peaks[4] == peaks[16]
print("more than without:", show_bytes(peaks[2] - peaks[1]), "· gradients:",
      show_bytes(max(in_parts.timeline["gradients"])))

# %% [markdown]
# ## 4 · How many fit?
# The micro batch is what memory sees, so make it as large as it gets: fewer, larger matrix products
# are faster (section 6, which has the exception). A search for it is in many tutorials. It looks
# like this:

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
# refuse. (The card of lesson 01 again; there, sequences had 128 tokens.)

# %% tags=["run"]
from fitcast import MIB
card = 120 * MIB
model = qlora.load_base(recipe)
with MemoryLedger(model, budget_bytes=card):
    usual_answer = usual_search(model, tokenizer)
print("the usual search says:", usual_answer)

# %% [markdown]
# ### Predict
# We train on sequences of 512 tokens, with accumulation. How many really fit in a micro batch on
# this card?

# %% tags=["predict"]
predicted_largest = ...

# %% tags=["run"]
def backward(size):
    ids = torch.randint(0, model.config.vocab_size, (size, 512), device=gpus.device())
    batching.accumulate(model, [{"input_ids": ids, "labels": ids}])

# %% tags=["run"]
optimizer = qlora.build_optimizer(model, recipe)
on_the_card = batching.largest_micro_batch(backward, model, optimizer, budget_bytes=card)
show_prediction(predicted_largest, show="{:.0f} sequences".format,
                found=on_the_card.micro_batch_size)

# %% tags=["run"]
figures.attempts(on_the_card, card, "512 tokens, all weights trained, on a card of 120 MiB")

# %% [markdown]
# Two, with a CPU's kernels. (On a GPU it may be one: attention there writes out its scores; lesson
# 06.) And here is what the usual search's answer does in the first real step:

# %% tags=["raises-exception"]
with MemoryLedger(model, budget_bytes=card):
    backward(usual_answer)

# %% [markdown]
# ### Explain
# Four faults; here is what each is worth.

# %% tags=["run"]
test_tokens = len(tokenizer("Test " * 100)["input_ids"])
print(f"'Test ' * 100 has {test_tokens} tokens here, not 512")
state_bytes = 2 * sum(p.nbytes for p in model.parameters())
print("the optimizer state that it never met:", show_bytes(state_bytes))

# %% tags=["run"]
try:
    with MemoryLedger(model, budget_bytes=card) as ledger:
        backward(usual_answer)
except torch.OutOfMemoryError:
    gc.collect()
    print("alive, cleaned up inside except:", show_bytes(ledger.live_bytes))
gc.collect()
print("alive, cleaned up after it:     ", show_bytes(ledger.live_bytes))

# %% tags=["run"]
padding = int((batch["attention_mask"] == 0).sum())
print(f"padding in our 32 examples: {padding} of {batch['labels'].numel()} positions")

# %% [markdown]
# 1. **The text.** `max_length=512` cuts, it does not fill. Probe with your longest sequences.
# 2. **No optimizer step.** Adam's state appears in the first one; only the step after it shows the
#    peak (lesson 01). And with accumulation, gradients lie beside every forward pass.
# 3. **It cleans up inside `except`.** There the exception is still alive, and with it the frames
#    that it came through, and with them every tensor that was there when memory ran out. Nothing is
#    freed; a retry from there starts on a full card. Leave `except` first. [PyTorch FAQ]
# 4. **It labels the padding.** No question of memory; but copied into training, it teaches the
#    model to write padding.
#
# And it tries powers of two only. `largest_micro_batch` doubles until it fails, then halves the
# interval; an attempt is a whole update, optimizer step included; and all that it trained with is
# afterwards as it was. To the bit? In the middle of a run, with gradients and optimizer state:

# %% tags=["run"]
def everything():
    return copy.deepcopy({"weights": model.state_dict(), "optimizer": optimizer.state_dict(),
                          "gradients": [p.grad for p in model.parameters()],
                          "modes": [module.training for module in model.modules()],
                          "random state": torch.get_rng_state()})

# %% tags=["run"]
backward(1)
optimizer.step()
before = everything()
batching.largest_micro_batch(backward, model, optimizer, budget_bytes=card)
torch.testing.assert_close(everything(), before, rtol=0, atol=0)
print("as they were, to the bit:", ", ".join(before))

# %% [markdown]
# The search works on anything that trains, so also on a model that is not there: Llama-3.2-1B on
# fake tensors (lesson 01), all weights trained in 16 bits (to count bytes only: lesson 04 says why
# nobody trains so), on a T4 that we pretend to have.

# %% tags=["run"]
from fitcast import fake_model
big = fake_model("llama-3.2-1b", torch.float16)

def backward_of_big(size):
    ids = torch.zeros(size, 1024, dtype=torch.long)
    batching.accumulate(big, [{"input_ids": ids, "labels": ids}], num_items=1)

# %% tags=["run"]
from fitcast import fake_tensors
with fake_tensors():
    on_a_t4 = batching.largest_micro_batch(
        backward_of_big, big, torch.optim.AdamW(big.parameters()),
        gradient_accumulation_steps=1, budget_bytes=gpus.T4.usable_bytes)
print(*on_a_t4.probes, sep="\n")

# %% [markdown]
# ## Exercise 03.3 · A search of your own
# *Medium, 8 minutes, at home.* `train(size)` trains with `size` sequences and raises
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
# ## 5 · Two processes, one update
# The third factor. With two GPUs you start two processes, **ranks**, each with the whole model and
# half of the batch; `DistributedDataParallel` (DDP) averages their gradients before the optimizer
# steps. Their number is the **world size**. `torchrun` starts them:
#
#     torchrun --nproc-per-node 2 your_script.py
#
# The next cells do that with the course's own script,
# [ranks.py](../course_utils/topics/ranks.py): 2 sequences x 8 micro batches x 2 ranks, the uneven
# batch of section 2, one optimizer step in float64. Rank 0 takes the first 16 rows, all short; rank
# 1 the other 16, the four long answers among them. Two GPUs talk through NCCL; on a machine without
# two GPUs the ranks are two processes on the CPU, and talk through gloo.
#
# ### Predict
# Each rank divides its loss by its *own* labelled tokens, then DDP takes the mean. What is the
# relative error of the update, against one process with 2 x 16?

# %% tags=["predict"]
predicted_error_of_ranks = ...

# %% tags=["run"]
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
# ## Exercise 03.4 · A rank's share of the loss
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
# ## 6 · Does it cost time?
# "Training time increases with accumulation", says the folklore. And: is an A10 (24 GB) with 8 x 4
# faster than a T4 with 2 x 16?
#
# ### Predict
# An update of 2 x 4 sequences and one of 8 x 1: the first needs how many times the floating-point
# operations? And how many times the T4's tokens per second does the A10 train, with Llama-3.2-3B,
# adapters and lesson 06's levers? (65 and 125 TFLOP/s in 16 bits, 320 and 600 GB/s [T4 and A10 data
# sheets].)

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
small = fake_model(BUNDLED)
work = {size: work_of(small, 8, 128, size) for size in (8, 2)}
show_prediction(predicted_work, show="{:.2f} x".format, counted=work[2] / work[8])

# %% [markdown]
# ### Explain
# No more work. An *update* with accumulation 16 takes longer than one without, because it has
# 16 times the tokens; a *token* does not. What accumulation does cost is the form of the work:
# the same products in 16 pieces, so 16 times as many kernels to start, and all weights read 16
# times an update. Whether you feel it depends on the size of a piece. Here, on this machine:

# %% tags=["run", "nbval-ignore-output"]
# loose: seconds of this machine
for size in (32, 32, 2, 1):  # the first one warms up
    pieces, start = batching.split(even, size), time.perf_counter()
    gradient_of(model, batching.accumulate, pieces)
    gpus.synchronize()
    seconds = time.perf_counter() - start
    print(f"{size:2} x {32 // size:2}: {even['labels'].numel() / seconds:7,.0f} tokens/s")

# %% [markdown]
# And on a GPU, Llama-3.2-1B with the levers of lesson 06, 2048 tokens a sequence. (An H200 with a
# T4's kernels and memory limit: the speed is an H200's, look at how it grows.)

# %% tags=["recorded"]
from course_utils.topics import recorded
for row in recorded.rows("menu"):
    if row["name"].startswith("llama-3.2-1b, ours"):
        size, speed = row["recipe"]["micro_batch_size"], row["tokens_per_second"]
        print(f"micro batch {size:2}: {speed:7,.0f} tokens/s")
print(f"[recorded: {recorded.stamp(recorded.rows('menu'))}]")

# %% [markdown]
# Larger pieces are faster, and less and less so: once a piece fills the GPU, doubling it buys
# nothing. So: the largest micro batch that fits *comfortably*, unless the room buys layers that
# need not forget (lessons 02, 06); and accumulation for the rest.
#
# Now the two cards. The forecast gives the memory, and the time if every operation ran at the data
# sheet's peak, in FLOP/s or in bytes/s, whichever takes longer. No step gets there; we take
# `utilisation` of it, on both cards: on an H200, large steps reached 0.56 to 0.64
# [[search.py](../fitcast/forecasting/search.py), from
# [h200_steps.json](../tests/data/h200_steps.json)].

# %% tags=["run"]
usual = TrainRecipe(model="llama-3.2-3b", sequence_length=2048)
levers = replace(usual, loss="chunked", attention="explicit_kv")  # both are lesson 06's
utilisation, speeds = 0.6, {}

# %% tags=["run"]
from fitcast import forecast
for name, choice in {"usual": usual, "levers": levers}.items():
    for gpu, size in ((gpus.T4, 2), (gpus.A10, 8)):
        run = replace(choice, micro_batch_size=size, gradient_accumulation_steps=2).for_gpu(gpu)
        step = forecast(run, gpu)  # two micro batches need as much memory as more (section 3)
        speeds[name, gpu.name] = utilisation * run.tokens_per_step / step.ideal_seconds
        print(f"{name:6} {gpu.name:3} {size} x {32 // size:2} {run.amp_dtype:8}  peak "
              f"{show_bytes(step.peak_bytes)}, {'fits' if step.fits else 'does not fit'}; "
              f"{speeds[name, gpu.name]:.0f} tokens/s")

# %% tags=["run"]
show_prediction(predicted_speedup, show="{:.1f} x".format,
                forecast_with_levers=speeds["levers", "A10"] / speeds["levers", "T4"],
                forecast_usual=speeds["usual", "A10"] / speeds["usual", "T4"])

# %% [markdown]
# **Which is faster?** The A10, by what the data sheets promise, if both run the same kernels. With
# the usual recipe the T4 falls far behind: it has no FlashAttention, and what replaces it writes
# every score to memory. That is a kernel's doing, not accumulation's.
#
# **What differs in memory?** Four times the sequences in a micro batch, four times the activations
# and logits; and with the usual loss the A10's 8 x 4 does not even fit its 24 GB. "Larger card,
# larger micro batch" has to be checked like anything else.
#
# **Is quality different?** Both update on 32 sequences, and section 2 asserted that the gradient is
# the same, to rounding. What differs is the 16-bit format, float16 on one, bfloat16 on the other:
# lesson 04.
#
# Move the controls: which split fits where?

# %% tags=["run"]
figures.split_explorer()

# %% [markdown]
# ## For those who struggle
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
# ## Go further
# Repair the usual search one fault at a time, and run it after each repair on the card of 120 MiB.
# Which fault cost how much? Then find the data that break `model(**micro_batch).loss * n / total`:
# a micro batch whose answers were all cut off has no label, its mean is 0/0, and NaN times zero is
# NaN. `batching.accumulate` survives it; why?
#
# ## Try with AI
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
print("warm-up steps:", math.ceil(0.03 * steps), "· log lines:", steps // 16)

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
#
# ## To lesson 04
# One number to take along. One more sequence of 512 tokens costs:

# %% tags=["run"]
peaks = []
for size in (1, 2):
    model.zero_grad()
    with MemoryLedger(model) as ledger:
        backward(size)
    peaks.append(ledger.report().peak_bytes)
print(show_bytes(peaks[1] - peaks[0]))

# %% [markdown]
# Nearly all of it numbers of 4 bytes. Would 2 do? Lesson 04 asks: half the bits, all the quality?
