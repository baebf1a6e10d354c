# %% [markdown]
# # 07 · Everything together: QLoRA on a T4
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/07_qlora_on_a_t4.ipynb)
#
# **45 min** · runs anywhere; a GPU fills in the lines that say "measured".
#
# Can a fine-tune of 8B on a T4 be made to fit, and be trusted? Lesson 05 left all parts working,
# each alone, on a model that fits anywhere. Here they meet: one recipe from check-list to exported
# model, and you try to break it on the way. At the end an 8B model trains on a T4, at a size where
# the usual recipe runs out of memory.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *calculate* what adapters add and *explain* each row of the memory budget | B1 | exercise 07.1 |
# | *prepare* labels that teach the answer and nothing else | B1 | exercise 07.2 |
# | *adjust* a recipe to a budget without changing what is learned | B2 | exercise 07.3 |
# | *judge* a fine-tune: baseline, control, interval, reloaded export | B2 | sections 5, 9 and 10 |
#
# **Needs:** the four holders of memory (lesson 01), k of n layers (02), accumulation (03), mixed
# precision (04), loss scaling (05). **New concepts (5):** NF4 · baseline and control · gates ·
# atomic checkpoint · merging. Each is in the [glossary](glossary.md).

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
import tempfile
from dataclasses import replace
from pathlib import Path
import torch
from course_utils import figures
from course_utils.topics import ladder as closing_act, sources
from fitcast import TrainRecipe, gpus, models
from fitcast.training import evaluation, trainer
os.chdir(tempfile.mkdtemp())  # checkpoints of this lesson go here

# %% [markdown]
# ## 1 · One recipe, three machines
# This cell decides what is trained, and no other asks. Without a GPU: the course's own small Llama
# and its data. With one: Llama-3.2-1B and real instructions (dolly), or another model by its name
# (`"qwen3-1.7b"`, `"phi-4-mini"`). If the hub does not answer, random weights in the model's shape;
# it will say so. The 8B model comes in section 12. (What is *learned* below was measured on the
# small Llama and its tickets. For a large model memory and speed are recorded, what it learns from
# dolly is not: your run is the one that tells.)

# %% tags=["setup"]
gpu = gpus.detect()
source = sources.choose(gpu, model="auto")
print(gpus.describe(gpu))
print(source)

# %% tags=["setup"]
recipe = TrainRecipe(
    model=source.model, base="nf4", double_quant=True,        # 4-bit weights, frozen
    lora_rank=16, lora_alpha=32, lora_dropout=0.0,
    micro_batch_size=8, gradient_accumulation_steps=4,        # 32 sequences a step
    padded=True,                                              # texts of different lengths
    attention="explicit_kv", loss="lean",                     # four levers: section 12
    norm="native", adapters="lean",
    optimizer="paged_adamw_8bit", warmup_fraction=0.05, max_steps=56, save_steps=28, seed=1,
    **source.settings,                                        # what suits this model; a tiny
).for_gpu(gpu)                                                # one bears a large rate
print(source.settings)
print(recipe.effective_batch_size, "sequences and", f"{recipe.tokens_per_step:,}", "tokens a step")

# %% [markdown]
# What will it need? The forecast runs this very step on tensors without numbers, as a T4 would
# allocate them:

# %% tags=["run"]
from fitcast import forecast
planned = forecast(recipe.for_gpu(gpus.T4), gpus.T4)
print(planned)

# %% [markdown]
# *In tensors* is what is alive; *of the device* adds the allocator's holes and CUDA's own share.
# "Fits" looks at both.
#
# Most runs that die, die of something that was known before they started. So look first: this
# takes seconds, and no download has begun.

# %% tags=["run"]
from fitcast import preflight
preflight(recipe, gpu, planned=planned).require()

# %% [markdown]
# And this is how it refuses: a large model without a GPU; then a recipe that asks a T4 for
# bfloat16, and for more memory than it has.

# %% tags=["run"]
found = preflight(replace(recipe, model="llama-3.2-1b", amp_dtype=None), None).findings[0]
print(f"{found.name}: {found.found}; {found.fix}")

# %% tags=["raises-exception"]
greedy = replace(recipe, micro_batch_size=4096, loss="full", checkpointed_layers=0)
greedy = greedy.for_gpu(gpus.T4)
too_much = forecast(greedy, gpus.T4)
preflight(replace(greedy, amp_dtype="bfloat16"), gpus.T4, planned=too_much).require()

# %% [markdown]
# The first line is lesson 04's trap: without it the run would be accepted, and crawl.

# %% [markdown]
# ## 2 · Load in 4 bits, add adapters
# **NF4** stores each weight as one of 16 values, placed where normally distributed weights are
# dense; a scale for every 64 weights says how large they are. Double quantization stores the scales
# themselves in 8 bits, with one float32 for 256 of them: 1/2 + 1/64 + 4/(64 x 256) bytes a weight.
# Products are computed in float16, the 16 bits that a T4 has. The base is frozen: 4-bit numbers
# cannot be trained. What trains are **adapters** beside linear layers: A (rank x in), then B (out x
# rank), thin float32 matrices whose product is added to what W computes.
#
# ### Predict
# Adapters of rank 16, on the layers that `source.settings` names, of a model with these sizes
# (`all-linear`: q, k, v, o and the MLP's three; every linear layer but the head). Which share of
# all parameters is trained, in percent? (Tied: embeddings and head are one matrix. People say
# "about 0.1 %".)

# %% tags=["setup"]
sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
         "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings")
print({size: getattr(models.config(recipe.model), size) for size in sizes})

# %% tags=["predict"]
predicted_percent = ...

# %% tags=["run"]
from course_utils.exercises.predictions import printed, show_prediction
from course_utils.topics import budget
from fitcast.step import qlora
model = trainer.build_model(recipe)
trainable, total = qlora.count_parameters(model)
show_prediction(predicted_percent, show="{:.2f} %".format, counted=100 * trainable / total,
                also=[printed(model.print_trainable_parameters),
                      printed(budget.show_share, "llama-3.2-1b")])

# %% [markdown]
# ### Explain
# The share is a property of the *shape*, not of LoRA: an adapter costs rank x (in + out)
# parameters where the layer has in x out. A layer 192 wide has few weights for its edges, so the
# bundled model's share is large; a billion parameters make it a fraction of a percent. Quote a
# count, not a share. (`print_trainable_parameters()` prints, and returns None: no use in an
# f-string.) "4 bits save 75 %" is true of the weights that become 4-bit; embeddings and head do
# not, and in a small model they are much of it. "Llama-3.2-1B in 4 bits takes 1.24 GB" is said,
# too: 1.24 billion is its number of *parameters*, its bytes stand above. [LoRA, section 4.2]

# %% [markdown]
# ## Exercise 07.1 · Count the adapters
# *Easy, 6 minutes.* How many parameters do adapters of rank `r` add on q, k, v and o? `q` and `o`
# are hidden x hidden; `k` and `v` go from hidden to kv. The check counts three real models.
#
# <details><summary>Hint 1</summary>An adapter on a layer in → out is A, of shape (r, in), and B,
# of shape (out, r).</details>
# <details><summary>Hint 2</summary>q and o: <code>r * (hidden + hidden)</code> each. k and
# v?</details>
# <details><summary>Hint 3</summary><code>layers * r * (4 * hidden + 2 * (...))</code>
# </details>

# %% tags=["exercise"]
def lora_parameters(layers, hidden, kv, r):
    return ...

# %% tags=["check"]
from course_utils.exercises import lesson_07 as exercises
exercises.check_trainable(lora_parameters)

# %% [markdown]
# ## 3 · The budget, line by line
# Now one training step of this recipe, on a model that is thrown away afterwards. Every holder,
# beside the formula for it; the forecast is a T4's, in 16 bits, the count is this machine's.

# %% tags=["run"]
from fitcast.training import measurement
step = measurement.measure_step(recipe, trainer.build_model(recipe), steps=1)
budget.show(budget.checklist(recipe, model, planned, step.report))

# %% tags=["run"]
figures.memory_over_time(step.report, "one optimizer step: four micro batches, then Adam")

# %% [markdown]
# (Each row of the table is that holder's own highest moment; the figure's colours are those of one
# moment, the peak.) Adapters and gradients are what their formulas say. Four rows are not:
#
# - *Weights.* Each 4-bit layer has small tables of its own, dust in a large model; and a CPU keeps
#   the embeddings in float32.
# - *Optimizer state.* 8-bit Adam has a byte for each of its two averages and a float32 scale for
#   every 256 of them, 2.03 bytes a parameter. A matrix of fewer than 4096 elements keeps 2 x 4
#   bytes: in the small model all but the MLP's wide ones. *Paged* means that CUDA may move them to
#   the host; bitsandbytes does so from 100 000 elements on, and at rank 16 on q, k, v, o not one
#   matrix of an 8B model has as many. [bitsandbytes, optim/optimizer.py]
# - *Activations.* The formula counts the layers' boundaries. A layer keeps many times that inside
#   (lesson 01), unless it forgets (lesson 02).
# - *Temporaries.* The formula is the full loss: three float32 copies of all logits (lesson 01).
#   This recipe builds 512 rows of them at a time. (A T4 adds 16 MiB of work space for its
#   products.)
#
# Without a GPU you see four equal hills, and a small one beside each, where the one layer that
# forgets is computed again. Activations follow the *micro* batch; only gradients survive from hill
# to hill.
#
# ### Predict
# Two budgets that circulate for a T4: "8B: base 5 GB, activations 4-8, **10-14 in all**" and
# "Phi-4-mini: base 3.5 GB, activations 1-2, batch 0.5-1, **6-7 in all**". Both at micro batch 4;
# the length is rarely given, we take 2048 tokens. By which factor is the 8B total off, at its upper
# end?

# %% tags=["predict"]
predicted_factor = ...

# %% tags=["run"]
from course_utils.topics import recorded
eight_b = closing_act.usual("llama-3.1-8b")
tables = []
for one in closing_act.rungs("budgets"):
    tables += [f"{one.name}, usual recipe: what circulates, a T4's forecast, a count on a GPU",
               printed(budget.compare, one.name, one.forecast, one.measured)]
tables.append(f"[recorded: {recorded.stamp(recorded.rows('budgets'))}]")
show_prediction(predicted_factor, show="{:.2f}".format, also=tables,
                forecast=eight_b.forecast.peak_bytes / 14e9)

# %% [markdown]
# ### Explain
# The rows for small things are right, or too small to matter. The largest row is *missing*: at the
# peak stand the logits, tokens x vocabulary, in float32 copies (lesson 01). A "batch" of token ids
# is kilobytes. Base weights
# are not parameters x 0.5 (nor is the quoted claim): embeddings and head stay at 16 bits. Gradients
# are 0 B because these runs take one micro batch a step: at the peak none exists yet. With
# accumulation they lie beside the next micro batch (lesson 03). And where the activations' row
# agrees, that is an accident: the levers below halve them, and leave batch, length, width and depth
# alone. Forecast and GPU agree in every row.

# %% [markdown]
# ## 4 · Data: learn the answer, not the question
# ### Exercise 07.2 · Labels
# *Easy, 5 minutes.* A prompt goes in, an answer comes out, both in the model's **chat template**,
# so that it sees the marks that it was trained with. We want the loss on the answer only: a label
# of -100 is skipped. Complete the function, for a row of token ids whose first `n` belong to the
# prompt.
#
# <details><summary>Hint 1</summary>Labels are as many as tokens.</details>
# <details><summary>Hint 2</summary>The model shifts by itself: label i belongs to token
# i.</details>
# <details><summary>Hint 3</summary><code>[-100] * n + ...</code></details>

# %% tags=["exercise"]
def labels_of(ids, n):
    return ...

# %% tags=["run"]
from fitcast.training import data
tokenizer = source.tokenizer()
train_set, heldout = source.instructions()
rows, heldout_rows = (data.encode(part, tokenizer, recipe.sequence_length)
                      for part in (train_set, heldout))
prompt_lengths = [row["labels"].count(data.IGNORED) for row in rows]
print(len(rows), "examples to train,", len(heldout_rows), "held out")

# %% tags=["check"]
exercises.check_labels(labels_of, rows, prompt_lengths)

# %% tags=["run"]
n = prompt_lengths[0]
print("read:   ", tokenizer.decode(rows[0]["input_ids"][:n]))
print("learned:", tokenizer.decode(rows[0]["input_ids"][n:]))
read = [len(row["input_ids"]) for row in rows]
learned_tokens = [all - prompt for all, prompt in zip(read, prompt_lengths, strict=True)]
figures.lengths(read, learned_tokens, recipe.sequence_length)

# %% [markdown]
# The end token is learned too, else generation never stops. No prompt is in both sets: the split
# is by a hash of the prompt, so it stays the same when the data grow. Padding is skipped by the
# loss, and paid for in time.

# %% [markdown]
# ## 5 · Baseline: what can it do already?
# A result without a **baseline** is an anecdote. Before any training: the loss on held-out
# answers, and what the model writes.

# %% tags=["run"]
from course_utils.topics import tickets
before = evaluation.answer_losses(model, heldout_rows, recipe)
answers = evaluation.generate(model, tokenizer, heldout["prompt"], recipe)
print(f"held-out loss {sum(before) / len(before):.1f} nats a token")
baseline = tickets.score(answers, heldout["answer"])
print(baseline)
print(f"\n{heldout['prompt'][0]}\n  -> {answers[0]}")

# %% [markdown]
# Without a GPU: the bundled model chats. It has learned English of a kind, and no ticket was in
# what it read. Its loss is worse than guessing among 1280 tokens would be (ln 1280 = 7.2): it is
# *sure* that no ticket comes.

# %% [markdown]
# ## 6 · Gates
# Four questions that cost seconds now, or a night later:

# %% tags=["run"]
from fitcast.training import gates
gates.check_gates(model, rows, recipe, tokenizer.pad_token_id).require()

# %% [markdown]
# *Step 0*: B starts as zeros, so fresh adapters change nothing, exactly [LoRA, section 4.1]; else
# an upcast, a dropout or an old run has. *Gradients*: every trained tensor has one, and it is
# finite; with reentrant checkpoints on a frozen base some have none, silently (lesson 02).
# *Overfit*: whoever cannot halve the loss of one batch will not learn a data set; afterwards the
# adapters are put back. *Attention*: on a T4, grouped-query attention without a mask falls back to
# a kernel that writes all scores, sequence x sequence; repeating keys and values first avoids it.

# %% [markdown]
# ## 7 · Train
# `transformers.Trainer` with four changes: the course's loss and optimizer, refusal of what would
# fail silently, speed and memory in every step's log, checkpoints that are whole or not there. In a
# notebook you see the bar, the loss and the memory move; headless runs stay quiet.

# %% tags=["run"]
from fitcast.training import checkpoints
watcher = figures.Watcher(recipe, planned.peak_allocated_bytes, "QLoRA")
drive = checkpoints.on_drive("fit_the_fine_tune_07")  # None where no Google Drive is mounted
run = trainer.train(recipe, model, rows, tokenizer, "run", drive=drive, on_step=watcher)
figures.losses({"training": run.losses}, "QLoRA, effective batch 32")

# %% tags=["run", "nbval-ignore-output"]
# loose: speed is this machine's
print(watcher.line())

# %% [markdown]
# ## 8 · Survive
# Colab ends sessions when it likes. So let us do it first: another process trains the same recipe
# and is killed with SIGKILL, which no program can catch, as soon as it has done step 4.
# Checkpoints were due every 3 steps. We resume and go on to step 5.
#
# ### Predict
# How many of these 5 losses will differ, in any digit, from those of the run above?

# %% tags=["predict"]
predicted_different = ...

# %% tags=["run"]
from course_utils.topics import survival
frequent = replace(recipe, save_steps=3)
status = survival.train_and_kill(frequent, rows, tokenizer, "killed", at_step=4)
rest = trainer.train(frequent, trainer.build_model(recipe), rows, tokenizer, "killed", stop_at=5)
different = sum(one != other for one, other in zip(rest.losses, run.losses[:5], strict=True))
show_prediction(predicted_different, show="{} of 5".format, measured=different)
print("exit status", status)
assert evaluation.largest_shift(rest.losses, run.losses[:5]) < 0.05

# %% [markdown]
# ### Explain
# Steps 1 to 3 come from the killed run's log, 4 and 5 are done again. On a CPU not "close": equal,
# bit for bit. (A GPU's attention adds up its gradients in no fixed
# order, so there the last digits may differ.) A checkpoint that restores only the weights gives a
# curve that looks right and is another run. It takes the adapters, the optimizer's state, the
# schedule, the gradient scaler, the random state and the position in the data.
#
# "So save often"? A process that runs out of memory in the middle of a save leaves half a file,
# under the right name. Here it happens to the usual save, and the file cannot be read:

# %% tags=["raises-exception"]
state, no_memory, no_disk = {"step": 56, "weights": torch.ones(1000)}, *survival.ACCIDENTS
torch.save(state, "last.pt")            # a good checkpoint, and then a save that dies over it:
with survival.dies_in_a_save(no_memory):
    survival.attempt(torch.save, state, "last.pt")
torch.load("last.pt")

# %% [markdown]
# The course's saves go to a hidden folder first, are flushed to the disk and listed with
# checksums; then one rename, which the file system does entirely or not at all. The same accident,
# a full disk, and SIGKILL in the middle of a save:

# %% tags=["run"]
for accident in (no_memory, no_disk):
    with survival.dies_in_a_save(accident):
        survival.attempt(survival.save_whole, Path("run", "checkpoint-57"), state)
print("killed:", survival.kill_in_a_save(Path("run", "checkpoint-57")))
last = checkpoints.find_last("run", drive)
print(last.name, "is whole:", len(checkpoints.verify(last)["files"]), "files, each as listed")

# %% [markdown]
# In a run, memory or a disk that ends costs one save and a warning; a kill costs the steps since
# the last checkpoint. If Google Drive is mounted before section 7
# (`google.colab.drive.mount("/content/drive")`), each checkpoint is copied there under the same
# rule, and in a new session section 7 goes on from it. To start anew, delete the folder there.

# %% [markdown]
# ## 9 · What did it learn?
# ### Predict
# Which share of the held-out messages gets a ticket that is right in *all six* fields? In
# percent. (With free text: which share of the words is in common with the expected answer?)

# %% tags=["predict"]
predicted_right = ...

# %% tags=["run"]
after = evaluation.answer_losses(model, heldout_rows, recipe)
new_answers = evaluation.generate(model, tokenizer, heldout["prompt"], recipe)

# %% tags=["run", "nbval-ignore-output"]
# loose: shares and losses differ by a little between CPU types
learned = tickets.score(new_answers, heldout["answer"])
loss = (f"held-out loss {sum(before) / len(before):.2f} -> {sum(after) / len(after):.2f}, change "
        f"and 95 % interval {evaluation.paired_bootstrap(before, after)}")
show_prediction(predicted_right, show="{:.0f} %".format, measured=100 * learned.correct,
                also=[str(learned), loss, f"{heldout['prompt'][0]}\n{new_answers[0]}"])

# %% [markdown]
# ### Explain
# The interval comes from a **paired bootstrap**: draw the held-out examples again and again, with
# replacement, and look at the mean change of each draw. Paired, because a message that is hard
# before is hard after. An interval far from zero says that the change is not luck of the draw. It
# does not say *what* was learned [Efron & Tibshirani, chapter 13].
#
# For that, a **control**: the same recipe on the same messages, where every message got the
# answer of another one. What the control learns as well, the labels did not teach.

# %% tags=["run"]
shuffled = data.encode(data.shuffled_answers(train_set, seed=0), tokenizer,
                         recipe.sequence_length)
control_model = trainer.build_model(recipe)

# %% tags=["run", "nbval-ignore-output"]
# loose: shares and losses differ by a little between CPU types
control = trainer.train(recipe, control_model, shuffled, tokenizer, "control",
                         on_step=figures.Watcher(recipe, title="control"))
control_losses = evaluation.answer_losses(control_model, heldout_rows, recipe)
control_answers = evaluation.generate(control_model, tokenizer, heldout["prompt"], recipe)
controlled = tickets.score(control_answers, heldout["answer"])
print(f"held-out loss {sum(control_losses) / len(control_losses):.2f};", controlled)

# %% tags=["run"]
figures.losses({"true answers": run.losses, "shuffled answers": control.losses},
               "the run and its control")

# %% [markdown]
# The control's loss falls a long way too: it learns the words and the layout of a ticket, which
# every answer shares, true or not. It cannot learn to fill one in. Whoever measures only that the
# loss fell, or that the answers look right, believes the control. So judge by what nothing but the
# labels can teach:

# %% tags=["run"]
print("loss down by 30 % or more:          ", sum(after) < 0.7 * sum(before))
if source.weights == "bundled":  # a ticket's fields are right or wrong; free text has no such line
    print("more than 85 % have it all right:   ", min(learned.structure, learned.correct) > 0.85)
    print("of the control's less than 10 % do: ", controlled.correct < 0.1)

# %% tags=["run"]
print("below the baseline beyond chance:", evaluation.paired_bootstrap(before, after).high < 0)
print("below the control beyond chance: ",
      evaluation.paired_bootstrap(control_losses, after).high < 0)
print("more right than the control:     ", learned.correct > controlled.correct)
with model.disable_adapter():
    again = evaluation.answer_losses(model, heldout_rows, recipe)
print("adapters off is the baseline:    ", again == before)

# %% [markdown]
# The last line is the promise of LoRA: the base is untouched, and the switch is exact.

# %% [markdown]
# ## 10 · Take it home
# The adapter alone is a small file, and useless without the base. *Merging* adds B A to the
# weights and gives a plain model. But which weights? The adapter was trained beside NF4. So there
# are two candidates: the **original** 16-bit weights, and the weights **dequantized** from NF4.
#
# ### Predict
# Merged into the original weights, which are *better*: by how many nats does the worst of 32
# held-out examples' losses move from what you measured?

# %% tags=["predict"]
predicted_shift = ...

# %% tags=["run"]
def shift(loaded):
    losses = evaluation.answer_losses(loaded, heldout_rows.select(range(32)), recipe)
    return evaluation.largest_shift(losses, after[:32])

# %% tags=["run"]
from fitcast.training import export
sizes = {"adapter": export.save_adapter(model, "adapter")}
model = control_model = None  # one after the other, so that a T4 has room for each
shifts = {"adapter": shift(export.load_adapter(recipe, "adapter"))}
for base in ("original", "dequantized"):
    sizes[base] = export.save_merged(export.merge(recipe, "adapter", base), base)
    shifts[base] = shift(merged := export.load_merged(recipe, base))
shipped = evaluation.generate(merged, tokenizer, heldout["prompt"][:1], recipe)

# %% tags=["run", "nbval-ignore-output"]
# loose: the shifts differ by a little between CPU types
from fitcast import show_bytes
table = "\n".join(
    f"{kind:12}{show_bytes(sizes[kind]):>12}   largest shift {shifts[kind]:.6f} nats"
    for kind in ("adapter", "dequantized", "original"))
show_prediction(predicted_shift, show="{:.3f} nats".format, measured=shifts["original"],
                also=table)

# %% [markdown]
# ### Explain
# Reloaded, the adapter is exact. Dequantized, the difference is float16's rounding in the file.
# The original weights are closer to what was pre-trained and *farther* from what was fine-tuned:
# the adapter had learned to make up for NF4's errors too. Whichever you ship, evaluate **that
# file**. [QLoRA, section 4]

# %% tags=["run"]
print("adapter exact:", shifts["adapter"] == 0)
print("dequantized closer than original:", shifts["dequantized"] < shifts["original"])
print("the file answers as the model did:", shipped == new_answers[:1])

# %% [markdown]
# ## 11 · The usual recipe, line by line
# You will meet this one on a hundred pages: 4 bits, `bfloat16` compute with `fp16=True`, learning
# rate 2e-4, 3 epochs, 3 % warm-up, paged 8-bit Adam. Here each argument goes to the versions that
# you have, each habit to the forecast, for Llama-3.1-8B at 4 x 2048 on a T4. How many of the
# thirteen lines just work, would you say?

# %% tags=["run"]
from course_utils.topics import usual_recipe
lines = usual_recipe.judge(eight_b.recipe)
print(*lines, sep="\n")
print(sum(line.verdict == "works" for line in lines), "of", len(lines), "just work")

# %% [markdown]
# *Refused* lines fail at construction, which is the friendly way. Those that are accepted cost
# more: k-bit "preparation" makes embeddings and head float32, then every layer's boundary with
# them, and autocast needs the head in 16 bits beside it. A compute dtype that is not autocast's
# casts every weight at every use. And a lever's worth depends on what stands beside it: alone the
# loss in chunks lowers the peak only to the next summit, which is attention's.

# %% [markdown]
# ## 12 · The closing act: an 8B model on a T4
# Llama-3.1-8B, 4 sequences of 2048 tokens, every layer checkpointed, 4-bit base. A T4 has 14.56
# GiB, of which CUDA keeps some.
#
# ### Predict
# You now pull every lever of this lesson: explicit keys and values, the loss in chunks, native
# RMSNorm, no adapter dropout, a lean MLP, checkpoints in the host's memory. From the usual recipe's
# peak, down to how many GiB?

# %% tags=["predict"]
predicted_gib = ...

# %% tags=["run"]
from fitcast import GIB
ladder = closing_act.ladder()
fit_a_t4 = [rung for rung in ladder if rung.forecast.fits]
smallest = min(fit_a_t4, key=lambda rung: rung.forecast.peak_allocated_bytes)
preparation = closing_act.rungs("ladder", names=("with k-bit upcast",))
bytes_of = {rung.name: rung.forecast.composition for rung in ladder}
speed_of = {rung.name: rung.measured["tokens_per_second"] for rung in ladder}
figure = figures.ladder(bytes_of, speed_of, gpus.T4,
                        "Llama-3.1-8B, 4 x 2048 tokens; each rung keeps those above",
                        recorded.rows("ladder")[0]["gpu"])

# %% tags=["run"]
from fitcast.forecasting.search import tokens_per_second
show_prediction(predicted_gib, show="{:.2f} GiB".format,
                usual=eight_b.forecast.peak_allocated_bytes / GIB,
                smallest=smallest.forecast.peak_allocated_bytes / GIB,
                also=[str(closing_act.table(preparation + ladder)), "held to a T4's memory:",
                      str(closing_act.held_to_a_t4()), figure])

# %% [markdown]
# ### Explain
# Bytes carry over to a T4. Speeds are those of the GPU that the last line names, with a T4's
# kernels: ratios carry over roughly; for 8B on a T4 expect hundreds of tokens a second, not
# thousands.
#
# - *K-bit upcast*, the preparation that PEFT offers: more float32, less speed (section 11).
# - *Explicit keys and values* move no byte at this peak, and double the speed: attention leaves the
#   kernel that writes scores in float32.
# - *The loss in chunks* takes the logits off the peak: the step from "no" to "fits".
# - *No dropout* and *native RMSNorm* remove copies that each layer keeps; the norm also saves trips
#   through memory. *With its gradient*: the head is multiplied once, not twice.
# - *Adapters in one product*, *lean rotary embedding*: fewer trips of the same numbers. *Expandable
#   segments* leave the allocator fewer holes: nothing at this peak, less in reserve.
# - *Lean MLP* keeps one wide tensor less in the layer that is being computed, for a little time.
# - *Checkpoints on the host* trade the PCIe bus for memory: for the last GiB, not for speed.
#
# Forecast and measurement differ by kilobytes, so one can *choose* by forecast. `fitcast fit
# --model llama-3.1-8b --micro-batch-size 4` weighs the settings that count, one forecast each.
# Below the fastest two that were measured within a T4's memory, fit's choice among them. Are they
# those with the fewest bytes?

# %% tags=["run"]
best = closing_act.fastest("fit", 2)
print(closing_act.table(best))

# %% [markdown]
# No: memory that is left over is speed that was not bought. They spend it on layers that need not
# forget (lesson 02). And `fit` ranks by arithmetic: where the runner-up is as close as here, try it
# too. Now the run of this section here, on *your* GPU, if there is one: the fastest rung that fits,
# with room for what this notebook still holds. Random weights in the real shape, for the same bytes
# and the same time without a download of `16 GB` (`weights="hub"` takes the real ones).

# %% tags=["run"]
merged = None
closing_act.release()
quickest = max(fit_a_t4, key=lambda rung: rung.measured["tokens_per_second"])
print(closing_act.train_here(quickest.recipe, gpu))

# %% [markdown]
# The same levers for smaller models, at 2048 tokens: the largest micro batch that ran.

# %% tags=["run"]
print(closing_act.largest_micro_batches())

# %% [markdown]
# And what did it cost? 50 optimizer steps of the 8B model, random weights, the same data, 1 x 2048
# tokens a step: with the stock code, and with ours. Dropout is off in both.

# %% tags=["run"]
curves = {row["name"]: row["losses"] for row in recorded.rows("curves")}
for name, line in curves.items():
    print(f"{name:6} loss {line[0]:.4f} -> {line[-1]:.4f}")
print(f"largest difference {evaluation.largest_shift(*curves.values()):.5f} nats",
      f"[recorded: {recorded.stamp(recorded.rows('curves'))}]")

# %% [markdown]
# Nothing that float16 would notice: these levers change where numbers stand, not what is learned.
# One lever of the ladder does: dropout regularizes. Switch it off knowingly.
#
# Turn the levers yourself. Which one moves the peak, and which is decoration? Try the rank.

# %% tags=["run"]
figures.levers_explorer()

# %% [markdown]
# ## Exercise 07.3 · The same lesson in less memory and less time
# *Medium, 8 minutes.* Phi-4-mini, 32 sequences of 2048 tokens a step: the usual recipe does not fit
# a T4. Write a recipe that learns **the same** (same model, adapters, sequence length, 32 sequences
# a step; dropout may go), keeps its peak in tensors at or below **6 GiB** on a T4 and is at least
# **twice** as fast, both by forecast. Start from `replace(exercises.PHI, ...)`. One lever is not
# enough.
#
# <details><summary>Hint 1</summary>Which term is the largest at the peak? It need not exist at
# once.</details>
# <details><summary>Hint 2</summary>Do not build the logits. And speed hangs on the attention
# kernel.</details>
# <details><summary>Hint 3</summary><code>replace(exercises.PHI, attention="explicit_kv",
# loss="chunked", norm=..., lora_dropout=...)</code></details>

# %% tags=["exercise"]
phi_recipe = ...

# %% tags=["check"]
exercises.check_budget(phi_recipe, exercises.PHI, budget_bytes=6 * GIB, speedup=2)

# %% [markdown]
# ## For those who struggle
# LoRA by hand. A layer computes y = W x with a frozen 3 x 2 matrix W. Rank 1: A is 1 x 2, B is 3
# x 1.
#
# | | numbers | trained |
# |---|---|---|
# | W | 3 x 2 = 6 | no |
# | A | 1 x 2 = 2, random | yes |
# | B | 3 x 1 = 3, zeros | yes |
#
# y = W x + (alpha / rank) B (A x). With B = 0 the second part is 0: step 0 is the base model.
# Five numbers get a gradient and two optimizer states each; W gets neither. At 4096 x 4096 and
# rank 16 that is 131 072 numbers beside 16 777 216.
#
# ## Go further
# - Train once more with `replace(recipe, lora_targets=("q_proj", "v_proj"))`, the choice of the
#   first LoRA paper, and compare with the interval of `evaluation.paired_bootstrap`. Is the
#   difference larger than the interval? Then try `base="float32"`: what did 4 bits cost?
# - Two T4s (Kaggle gives them): [beyond one GPU](beyond_one_gpu.md) runs this recipe under
#   `torchrun` with the same 32 sequences a step, and works out what FSDP would add.
# - A loop of your own: `forecast_step(fake_model("llama-3.2-1b"), step, T4)` (all three from
#   `fitcast`) says what `step(model)` needs, before you have a GPU. Let `step` make its optimizer
#   and take two steps; lesson 01 says why.
#
# ## Try with AI
# Give an assistant each of these, and check it against the course's own planner.
#
# > 1. I fine-tune Llama-3.1-8B with QLoRA on a T4: 4-bit base, gradient checkpointing, batch 4,
# >    sequence length 2048, gradient accumulation 8. CUDA out of memory. Name the largest holders
# >    at the peak in GiB, and the order in which you would change settings.
# > 2. On a T4 I train with micro batch 2 and accumulation 16, on an A10 (24 GB) with 8 and 4. What
# >    differs: gradient, memory, speed, quality?
# > 3. I have 50 000 conversations of 500 tokens, two T4s and 24 hours. Three epochs. Which model
# >    can I afford, and how many optimizer steps of 32 sequences is that?
#
# A right answer to 1 names the logits (among the temporaries) before the weights, and does not
# start with the rank. What single changes save, from the usual recipe:

# %% tags=["run"]
from fitcast.forecasting.search import single_changes
print({holder: show_bytes(n) for holder, n in eight_b.forecast.composition.items() if n > GIB})
changes = single_changes(eight_b.recipe, num_layers=32)
for name in ("rank 8", "sequence 1024", "micro batch 2, accumulated", "chunked loss"):
    one = forecast(replace(eight_b.recipe, **changes[name]), gpus.T4)
    peak = one.peak_allocated_bytes
    saved = eight_b.forecast.peak_allocated_bytes - peak
    print(f"{name:28}saves {show_bytes(saved):>10}, peak {show_bytes(peak)}: "
          f"{'fits' if one.fits else 'does not fit'}")

# %% [markdown]
# Two of the peaks are almost as high as each other, and only one fits: between tensors are holes,
# and there is room only if the allocator can give unused memory back. That close, do not count on
# it.
#
# The order follows from the table. "Over 14 GB reduce the batch, then the sequence, then the rank",
# as people say, ends with what saves least. A shorter sequence changes what is learned; explicit
# keys and values *and* the chunked loss fit the run as it is (section 12).
#
# A right answer to 2 is that of lesson 03, "Does it cost time?": 32 sequences behind each update
# and the same gradient, but for the rounding of float16 here and bfloat16 there; activations and
# logits four times as large on the A10; and it asks for the model and the length before it says
# "fits". For Llama-3.2-1B at 2048 tokens, usual recipe:

# %% tags=["run"]
t4 = replace(eight_b.recipe, model="llama-3.2-1b", micro_batch_size=2,
             gradient_accumulation_steps=16)
a10 = replace(t4, micro_batch_size=8, gradient_accumulation_steps=4).for_gpu(gpus.A10)
for one, card in ((t4, gpus.T4), (a10, gpus.A10)):
    planned_step = forecast(one, card)
    low, high = (tokens_per_second(one, planned_step, part) for part in card.sustained)
    speed = f"{low:,.0f} to {high:,.0f} tokens a second"
    print(f"{one.effective_batch_size} sequences, {speed if planned_step.fits else 'no speed'}; "
          f"{planned_step}")

# %% [markdown]
# A right answer to 3 multiplies before it recommends: tokens, steps (rounded up for each epoch, as
# in lesson 03), hours. With this lesson's levers, on two T4s, between the lowest and the highest
# part of its peak rates that a T4 sustains (`gpus.T4.basis` says where they are from); `fit(...)`
# finds the settings too, and its `.hours(tokens)` lies between:

# %% tags=["run"]
tokens, lean = 3 * 50_000 * 500, replace(smallest.recipe, offload_checkpoints=False)
print(f"{tokens:,} tokens, {3 * -(-50_000 // 32):,} optimizer steps")  # -(-a // b): up
for name in ("llama-3.2-1b", "llama-3.1-8b"):
    one = replace(lean, model=name, micro_batch_size=16, sequence_length=512, world_size=2)
    planned_step = forecast(one, gpus.T4)
    low, high = (tokens_per_second(one, planned_step, part) for part in gpus.T4.sustained)
    print(f"{name}: {planned_step.verdict}, {low:,.0f} to {high:,.0f} tokens a second on each T4, "
          f"{tokens / (2 * high) / 3600:.0f} to {tokens / (2 * low) / 3600:.0f} hours")

# %% [markdown]
# ## What this lesson left out
# Sharded models (a recipe for them is in [beyond one GPU](beyond_one_gpu.md)), sampling instead of
# greedy answers, judging free text by more than its words, serving the model.
#
# ## Sources
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314), sections 2 to 4: NF4, double
#   quantization, paged optimizers
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685), section 4
# - Dettmers et al. 2021, [8-bit optimizers](https://arxiv.org/abs/2110.02861)
# - Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13
# - PyTorch,
#   [sdp_utils.cpp](https://github.com/pytorch/pytorch/blob/main/aten/src/ATen/native/transformers/cuda/sdp_utils.cpp):
#   which attention kernel runs, and why
# - transformers,
#   [trainer.py](https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py);
#   POSIX, [rename](https://pubs.opengroup.org/onlinepubs/9699919799/functions/rename.html)
#
# New terms are in the [glossary](glossary.md).
