# %% [markdown]
# # 06 · Everything together: QLoRA on a T4
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/06_qlora_on_a_t4.ipynb)
#
# **45 min** · runs anywhere; a GPU fills in the lines that say "measured".
#
# Can a fine-tune be trusted? Not "the loss went down", but: it fits, it learned what it should,
# it survives a dead session, and the file you carry home is the model that you measured. In this
# lesson you take one run from check-list to exported model, and try to break it on the way.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *calculate* what adapters add and *explain* each row of the memory budget | B1 | exercise 06.1 |
# | *prepare* labels that teach the answer and nothing else | B1 | exercise 06.2 |
# | *adjust* a recipe to a memory budget without changing what is learned | B2 | exercise 06.3 |
# | *judge* a fine-tune: baseline, control, interval, reloaded export | B2 | sections 4, 8 and 9 |
#
# **Needs:** the four holders of memory (lesson 01), accumulation (03), mixed precision (04).
# **New concepts (5):** NF4 · baseline and control · gates · atomic checkpoint · merging. Each is
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
from course_utils import verified
print(verified.welcome())

# %% tags=["setup"]
import tempfile
from dataclasses import replace
from transformers import AutoTokenizer
from course_utils import corpus, evaluation, export, figures, gates, hardware, measurement
from course_utils import exercises_06 as exercises, qlora, training, widgets
from course_utils.block import boundary_bytes
from course_utils.checkpoints import find_last, verify
from course_utils.checks import show_prediction
from course_utils.forecast import forecast
from course_utils.preflight import preflight
from course_utils.recipe import TrainRecipe
from course_utils.units import MIB, show_bytes
os.chdir(tempfile.mkdtemp())  # checkpoints of this lesson go here
gpu = hardware.detect()
print(hardware.describe(gpu))

# %% [markdown]
# ## 1 · The recipe, and what could stop it
# Every choice of the run in one object. The model is the small Llama that the course carries; the
# functions are those that a T4 uses for a model a thousand times larger.

# %% tags=["setup"]
recipe = TrainRecipe(
    model="bundled", base="nf4", double_quant=True,           # 4-bit weights, frozen
    lora_rank=16, lora_alpha=32, lora_targets="all-linear", lora_dropout=0.0,
    micro_batch_size=8, gradient_accumulation_steps=4,        # 32 sequences a step
    sequence_length=128, checkpointed_layers=1,               # of 4: the others remember
    attention="explicit_kv", loss="chunked", norm="native", optimizer="paged_adamw_8bit",
    learning_rate=1e-2, max_grad_norm=0.3, warmup_fraction=0.1, max_steps=70, save_steps=3,
).for_gpu(gpu)
print(recipe.effective_batch_size, "sequences and", f"{recipe.tokens_per_step:,}", "tokens a step")

# %% [markdown]
# What will it need? The forecast runs this very step on tensors without numbers, as a T4 would
# allocate them:

# %% tags=["run"]
planned = forecast(recipe.for_gpu(hardware.T4), hardware.T4)
print(planned)

# %% [markdown]
# Most runs that die, die of something that was known before they started. So look first: this
# takes seconds, and no download has begun.

# %% tags=["run"]
preflight(recipe, gpu, peak_bytes=planned.peak_allocated_bytes).require()

# %% [markdown]
# And this is how it refuses: a recipe that asks a T4 for bfloat16, and for too much of everything.

# %% tags=["raises-exception"]
greedy = replace(recipe, micro_batch_size=4096, loss="full").for_gpu(hardware.T4)
peak = forecast(greedy, hardware.T4).peak_allocated_bytes
preflight(replace(greedy, amp_dtype="bfloat16"), hardware.T4, peak_bytes=peak).require()

# %% [markdown]
# Three words of that are worth remembering on Colab: `torch.cuda.is_bf16_supported()` says
# **True** on a T4, because PyTorch emulates it. The run would be accepted, and crawl.

# %% [markdown]
# ## 2 · Load in 4 bits, add adapters
# **NF4** stores each weight as one of 16 values, placed where normally distributed weights are
# dense; a scale for every 64 weights says how large they are. The base is frozen: 4-bit numbers
# cannot be trained. What trains are **adapters**, pairs of thin float32 matrices beside each
# linear layer.
#
# ### Predict
# Adapters of rank 16 beside every linear layer. Which share of all parameters is trained, in
# percent? (People say "about 0.1 %".)

# %% tags=["predict"]
predicted_percent = ...

# %% tags=["run"]
model = training.build_model(recipe)
trainable, total = qlora.count_parameters(model)
show_prediction(predicted_percent, show="{:.2f} %".format, counted=100 * trainable / total)
print(f"{trainable:,} of {total:,} parameters")

# %% [markdown]
# ### Explain
# The share is a property of the *shape*, not of LoRA: an adapter costs rank x (in + out)
# parameters where the layer has in x out. A layer 192 wide has few weights for its edges, so the
# share is large; at 4096 the same rank gives a fraction of a percent. Quote a count, not a share.

# %% [markdown]
# ## Exercise 06.1 · Count the adapters
# *Easy, 6 minutes.* How many parameters do adapters of rank `r` add on q, k, v and o? `q` and `o`
# are hidden x hidden; `k` and `v` go from hidden to kv. The check counts three real models.
#
# <details><summary>Hint 1</summary>An adapter on a layer in → out is A, of shape (r, in), and B,
# of shape (out, r).</details>
# <details><summary>Hint 2</summary>q and o: <code>r * (hidden + hidden)</code> each. k and
# v?</details>
# <details><summary>Hint 3</summary><code>layers * r * (4 * hidden + 2 * (hidden + kv))</code>
# </details>

# %% tags=["exercise"]
def lora_parameters(layers, hidden, kv, r):
    return ...

# %% tags=["check"]
exercises.check_trainable(lora_parameters)

# %% [markdown]
# ## 3 · The budget, line by line
# Now one training step of this recipe, measured on a model that is thrown away afterwards.
#
# ### Predict
# The optimizer is 8-bit Adam: two states of one byte for each trained parameter, "2.03 bytes with
# the scales". How many bytes of optimizer state will the ledger find?

# %% tags=["predict"]
predicted_state = ...

# %% tags=["run"]
step = measurement.measure_step(recipe, training.build_model(recipe), steps=1)
most = {holder: max(line) for holder, line in step.report.timeline.items()}
show_prediction(predicted_state, forecast_by_the_rule=int(2.03 * trainable),
                counted=most["optimizer state"])

# %% [markdown]
# Almost three times the rule. Most of these matrices have fewer than 4096 elements, and
# bitsandbytes keeps the state of those in float32: 2 x 4 bytes each. At a hidden size of 4096 the
# rule holds. A formula is a forecast; only the count is a fact. Here is every holder, beside the
# formula that is in circulation:

# %% tags=["run"]
frozen = [p for p in model.parameters() if not p.requires_grad]
in_4_bit = sum(p.quant_state.shape.numel() for p in frozen if hasattr(p, "quant_state"))
plain_bytes = sum(p.nbytes for p in frozen if not hasattr(p, "quant_state"))
layers = 4 * boundary_bytes(recipe)  # micro batch x sequence x hidden, for each of 4 layers
formulas = {"weights": ("0.516 x 4-bit + the others", 0.516 * in_4_bit + plain_bytes),
            "adapters": ("4 x trainable", 4 * trainable),
            "gradients": ("4 x trainable", 4 * trainable),
            "optimizer state": ("2.03 x trainable", 2.03 * trainable),
            "activations": ("layers x boundary", layers)}
print(f"{'holder':16}{'in circulation':40}{'counted':>12}{'on a T4':>12}")
for holder, (formula, n_bytes) in formulas.items():
    row = int(n_bytes), most[holder], max(planned.timeline[holder])
    print(f"{holder:16}{formula:28}" + "".join(f"{show_bytes(n):>12}" for n in row))
print("and the batch of token ids:", show_bytes(most["inputs"]))

# %% tags=["run"]
figures.memory_over_time(step.report, "one optimizer step: four micro batches, then Adam")

# %% [markdown]
# ### Explain
# Weights, adapters and gradients are what the formulas say. The batch is kilobytes, not the
# gigabyte that some budgets give it. Activations are the row where people are wrong: three of the
# four layers keep everything that lesson 01 counted; only the checkpointed one is down to its
# boundary (lesson 02). On a T4 (the last column is the forecast) autocast's 16 bits make them
# smaller, but not half: norms and adapters keep float32 copies. Four equal hills, one for each
# micro batch: activations follow the *micro* batch, only gradients survive from hill to hill.
#
# On top of the last hill sit the logits, as temporaries: `loss="chunked"` builds only 512 rows of
# them at a time. With this vocabulary, 1280 words, that is a detail. Llama's has 128 256, and
# lesson 01 counted three float32 copies of all rows.

# %% [markdown]
# ## Exercise 06.2 · Labels
# *Easy, 5 minutes.* A customer's message goes in, a ticket comes out. We want the loss on the
# ticket only: a label of -100 is skipped. Complete the function, for a row of token ids whose
# first `n` belong to the prompt.
#
# <details><summary>Hint 1</summary>Labels are as many as tokens.</details>
# <details><summary>Hint 2</summary>The model shifts by itself: label i belongs to token
# i.</details>
# <details><summary>Hint 3</summary><code>[-100] * n + ids[n:]</code></details>

# %% tags=["exercise"]
def labels_of(ids, n):
    return ...

# %% tags=["run"]
tokenizer = AutoTokenizer.from_pretrained(corpus.bundled_model_dir())
train_set, heldout = (corpus.load_instructions(split=split) for split in corpus.SPLITS)
rows, heldout_rows = (corpus.encode(part, tokenizer, recipe.sequence_length)
                      for part in (train_set, heldout))
prompt_lengths = [row["labels"].count(corpus.IGNORED) for row in rows]
print(len(rows), "examples to train,", len(heldout_rows), "held out")

# %% tags=["check"]
exercises.check_labels(labels_of, rows, prompt_lengths)

# %% [markdown]
# What is read, and what is learned:

# %% tags=["run"]
n = prompt_lengths[0]
print("read:   ", tokenizer.decode(rows[0]["input_ids"][:n]))
print("learned:", tokenizer.decode(rows[0]["input_ids"][n:]))

# %% [markdown]
# The end token is learned too, else generation never stops. No prompt is in both sets: the split
# is by a hash of the prompt, so it stays the same when the data grow.

# %% [markdown]
# ## 4 · Baseline: what can it do already?
# A result without a **baseline** is an anecdote. Before any training: the loss on held-out
# answers, and what the model writes.

# %% tags=["run"]
before = evaluation.answer_losses(model, heldout_rows, recipe)
answers = evaluation.generate(model, tokenizer, heldout["prompt"])
print(f"held-out loss {sum(before) / len(before):.1f} nats a token")
baseline = evaluation.score(answers, heldout["answer"])
print(baseline)
print(f"\n{heldout['prompt'][0]}\n  -> {answers[0]}")

# %% [markdown]
# It chats. It has learned English of a kind, and no ticket was in what it read. The loss is worse
# than guessing among 1280 tokens would be (ln 1280 = 7.2): it is *sure* that no ticket comes.

# %% [markdown]
# ## 5 · Gates
# ### Predict
# The adapters are there, untrained. By how much does the loss of the adapted model differ from
# that of the base?

# %% tags=["predict"]
predicted_difference = ...

# %% tags=["run"]
with model.disable_adapter():
    base_only = evaluation.answer_losses(model, heldout_rows, recipe)
difference = evaluation.largest_shift(before, base_only)
show_prediction(predicted_difference, show="{:.6f} nats".format, measured=difference)

# %% [markdown]
# Exactly zero: B starts as zeros, so B A adds nothing [LoRA, section 4.1]. If it is not,
# something else changed: an upcast, a dropout that stayed on, adapters from an old run. That is
# one of four questions that cost seconds now and a night later:

# %% tags=["run"]
gates.check_gates(model, rows, recipe, tokenizer.pad_token_id).require()

# %% [markdown]
# ### Explain
# *Gradients*: a frozen base with checkpointing needs `enable_input_require_grads()`, else nothing
# is trained, silently. *Overfit*: whoever cannot learn one batch by heart will not learn a data
# set. *Attention*: on a T4, grouped-query attention without a mask falls back to a kernel that
# writes all scores, sequence x sequence; repeating keys and values first avoids it.

# %% [markdown]
# ## 6 · Train
# `transformers.Trainer` with four changes: the course's loss and optimizer, refusal of what would
# fail silently, speed and memory in every step's log, checkpoints that are whole or not there. An
# effective batch of 32 in micro batches of 8.

# %% tags=["run"]
run = training.train(recipe, model, rows, tokenizer, "run")
figures.losses({"training": run.losses}, "QLoRA on the bundled data")

# %% tags=["run", "nbval-ignore-output"]
# loose: speed is this machine's
fast = max(step["tokens_per_second"] for step in run.steps)
peak = run.steps[-1]["peak_allocated_bytes"]
print(f"{fast:,.0f} tokens a second, peak allocated: {show_bytes(peak)}")

# %% [markdown]
# ## 7 · Survive
# Colab ends sessions when it likes. So let us do it first: another process trains the same recipe
# and is killed with SIGKILL, which no program can catch, as soon as it has done step 5.
# Checkpoints were due every 3 steps. We resume and go on to step 7.
#
# ### Predict
# How many of these 7 losses will differ, in any digit, from those of the run above?

# %% tags=["predict"]
predicted_different = ...

# %% tags=["run"]
status = training.train_and_kill(recipe, "killed", at_step=5)
rest = training.train(recipe, training.build_model(recipe), rows, tokenizer, "killed", stop_at=7)
different = sum(one != other for one, other in zip(rest.losses, run.losses[:7], strict=True))
show_prediction(predicted_different, show="{} of 7".format, measured=different)
print("exit status", status)
assert different == 0

# %% [markdown]
# ### Explain
# Not "close": equal, bit for bit. A checkpoint that restores only the weights gives a curve that
# looks right and is another run. It takes the adapters, the optimizer's state, the schedule, the
# gradient scaler, the random state and the position in the data.
#
# And a kill *while* a checkpoint is being written? Everything goes to a hidden folder first, is
# flushed to the disk and listed with checksums; then one rename, which the file system does
# entirely or not at all. Let us spoil one, as a non-atomic save would:

# %% tags=["raises-exception"]
last = find_last("run")
optimizer_file = last / "optimizer.pt"
whole = optimizer_file.read_bytes()
optimizer_file.write_bytes(whole[:1000])
verify(last)

# %% [markdown]
# Loaded by name it is refused; a search for the last whole checkpoint says so and passes it over.
# Put it right again:

# %% tags=["run"]
optimizer_file.write_bytes(whole)
print(last.name, "holds", ", ".join(sorted(verify(last)["files"])[1:4]), "and more")

# %% [markdown]
# A full disk costs one save and a warning; the run goes on. With
# `drive="/content/drive/MyDrive/runs"` each checkpoint is also copied to Google Drive under the
# same rule, and a new session resumes from it.

# %% [markdown]
# ## 8 · What did it learn?
# ### Predict
# Which share of the held-out messages gets a ticket that is right in *all six* fields? In
# percent.

# %% tags=["predict"]
predicted_right = ...

# %% tags=["run", "nbval-ignore-output"]
# loose: shares and losses differ by a little between CPU types
after = evaluation.answer_losses(model, heldout_rows, recipe)
new_answers = evaluation.generate(model, tokenizer, heldout["prompt"])
learned = evaluation.score(new_answers, heldout["answer"])
show_prediction(predicted_right, show="{:.0f} %".format, measured=100 * learned.correct)
print(learned)
print(f"held-out loss {sum(before) / len(before):.2f} -> {sum(after) / len(after):.2f}, change "
      f"and 95 % interval {evaluation.paired_bootstrap(before, after)}")
print(f"\n{heldout['prompt'][0]}\n{new_answers[0]}")

# %% [markdown]
# ### Explain
# The interval comes from a **paired bootstrap**: draw the held-out examples again and again, with
# replacement, and look at the mean change of each draw. Paired, because a message that is hard
# before is hard after. An interval far from zero says that the change is not luck of the draw. It
# does not say *what* was learned.
#
# For that, a **control**: the same recipe on the same messages, where every message got the
# ticket of another one. What the control learns as well, the labels did not teach.

# %% tags=["run", "nbval-ignore-output"]
# loose: shares and losses differ by a little between CPU types
shuffled = corpus.encode(corpus.shuffled_answers(train_set, seed=0), tokenizer, 128)
control_model = training.build_model(recipe)
control_recipe = replace(recipe, max_steps=40)
control = training.train(control_recipe, control_model, shuffled, tokenizer, "control")
control_loss = evaluation.answer_losses(control_model, heldout_rows, recipe)
control_answers = evaluation.generate(control_model, tokenizer, heldout["prompt"])
controlled = evaluation.score(control_answers, heldout["answer"])
print(controlled)
print(f"held-out loss {sum(control_loss) / len(control_loss):.2f}")

# %% tags=["run"]
figures.losses({"true labels": run.losses, "shuffled labels": control.losses}, "and its control")

# %% [markdown]
# The control had 40 steps, enough to learn to *write tickets*: the layout is the same in every
# answer, true or not. It cannot learn to fill them in, and its loss stops falling where guessing
# begins. Whoever measures only the layout, or only that the loss fell, believes the control. So
# judge by what nothing but the labels can teach:

# %% tags=["run"]
print("loss falls by 30 % or more:", sum(after) <= 0.7 * sum(before))
print("layout below 10 % before, above 85 % after:",
      baseline.structure < 0.10 and learned.structure > 0.85)
print("right tickets above 85 %, the control's below 10 %:",
      learned.correct > 0.85 and controlled.correct < 0.10)
with model.disable_adapter():
    again = evaluation.answer_losses(model, heldout_rows, recipe)
print("adapters off, losses equal the baseline's:", again == before)

# %% [markdown]
# The last line is the promise of LoRA: the base is untouched, and the switch is exact.

# %% [markdown]
# ## 9 · Take it home
# The adapter alone is a small file, and useless without the base. *Merging* adds B A to the
# weights and gives a plain model. But which weights? The adapter was trained beside NF4. So there
# are two candidates: the **original** 16-bit weights, and the weights **dequantized** from NF4.
#
# ### Predict
# Merged into the original weights, which are *better*: by how many nats does the worst held-out
# example's loss move from what you measured?

# %% tags=["predict"]
predicted_shift = ...

# %% tags=["run"]
size = export.save_adapter(model, "adapter")
reloaded = {"adapter": export.load_adapter(recipe, "adapter")}
sizes = {"adapter": size}
for base in ("dequantized", "original"):
    sizes[base] = export.save_merged(export.merge(recipe, "adapter", base), base)
    reloaded[base] = export.load_merged(recipe, base)
shifts = {kind: evaluation.largest_shift(
    after, evaluation.answer_losses(one, heldout_rows, recipe)) for kind, one in reloaded.items()}

# %% tags=["run", "nbval-ignore-output"]
# loose: the shifts differ by a little between CPU types
show_prediction(predicted_shift, show="{:.3f} nats".format, measured=shifts["original"])
for kind in ("adapter", "dequantized", "original"):
    print(f"{kind:12}{show_bytes(sizes[kind]):>12}   largest shift {shifts[kind]:.6f} nats")

# %% [markdown]
# ### Explain
# Reloaded, the adapter is exact. Dequantized, the difference is float16's rounding in the file.
# The original weights are closer to what was pre-trained and *farther* from what was fine-tuned:
# the adapter had learned to make up for NF4's errors too. Whichever you ship, evaluate **that
# file**. [QLoRA, section 3]

# %% tags=["run"]
print("adapter exact:", shifts["adapter"] == 0)
print("dequantized closer than original:", shifts["dequantized"] < shifts["original"])
shipped = reloaded["dequantized"]
print(evaluation.generate(shipped, tokenizer, heldout["prompt"][:1]) == new_answers[:1])

# %% [markdown]
# ## 10 · Turn the levers
# Small models forgive. Here is the run that everybody loses: Llama-3.1-8B in 4 bits on a T4, four
# sequences of 2048 tokens, forecast for the usual recipe and with the levers that this lesson has
# used all along. Which one moves the peak, and which one is decoration? Try the rank.

# %% tags=["run"]
widgets.levers_explorer()

# %% [markdown]
# ## Exercise 06.3 · The same lesson in less memory
# *Medium, 8 minutes.* The step of section 3 peaks above 50 MiB. Write a recipe that learns **the
# same** (same model, adapters, sequence length, 32 sequences a step) and stays at or below 10 MiB.
# The check runs a step of it. One lever is not enough.
#
# <details><summary>Hint 1</summary>Which of the two factors of 32 does memory follow?</details>
# <details><summary>Hint 2</summary>Smaller hills, and more of them. Then look at what three of the
# four layers keep.</details>
# <details><summary>Hint 3</summary><code>replace(recipe, micro_batch_size=2,
# gradient_accumulation_steps=..., checkpointed_layers=...)</code></details>

# %% tags=["exercise"]
smaller_recipe = ...

# %% tags=["check"]
exercises.check_budget(smaller_recipe, recipe, budget_bytes=10 * MIB)

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
# Train once more with `replace(recipe, lora_targets=("q_proj", "v_proj"))`, the choice of the
# first LoRA paper, and compare right tickets with the interval of `evaluation.paired_bootstrap`.
# Is the difference larger than the interval? Then try `base="float32"`: what did 4 bits cost?
#
# ## Try with AI
# Give an assistant each of these, and check it against the course's own planner.
#
# > 1. I fine-tune Llama-3.1-8B with QLoRA on a T4: 4-bit base, gradient checkpointing, batch 4,
# >    sequence length 2048, gradient accumulation 8. CUDA out of memory. Name the largest holders
# >    at the peak in GiB, and the order in which you would change settings.
# > 2. On a T4 I train with micro batch 2 and accumulation 16, on an A10 (24 GB) with 8 and 4. What
# >    differs: gradient, memory, speed, quality?
# > 3. I have 50 000 conversations of 500 tokens, two T4s and 24 hours. Three epochs. Which speed
# >    do I need, and how many optimizer steps of 32 sequences is that?
#
# A right answer to 1 names the logits (among the temporaries) before the weights, and does not
# start with the rank:

# %% tags=["run"]
usual = TrainRecipe(model="llama-3.1-8b", amp_dtype="float16", micro_batch_size=4,
                    gradient_accumulation_steps=8, sequence_length=2048)
levers = dict(attention="explicit_kv", loss="chunked", norm="native", lora_dropout=0.0)
for change in ({}, {"lora_rank": 4}, {"micro_batch_size": 2}, {"loss": "chunked"}, levers):
    one = forecast(replace(usual, **change), hardware.T4)
    print(f"{show_bytes(one.peak_bytes):>10}  {', '.join(change) or 'as it is'}")
print({holder: show_bytes(n) for holder, n in forecast(usual, hardware.T4).composition.items()})

# %% [markdown]
# A right answer to 2 says that both steps see 32 sequences and give the same gradient, so the
# same quality; that activations and logits are four times as large on the A10; and it asks for the
# model and the length before it says "fits". For Llama-3.2-1B at 2048 tokens:

# %% tags=["run"]
t4 = replace(usual, model="llama-3.2-1b", micro_batch_size=2, gradient_accumulation_steps=16)
a10 = replace(t4, micro_batch_size=8, gradient_accumulation_steps=4)
print(t4.effective_batch_size, "sequences:", forecast(t4, hardware.T4))
print(a10.effective_batch_size, "sequences:", forecast(a10, hardware.A10))
print("with the levers:", forecast(replace(a10, **levers), hardware.A10))

# %% [markdown]
# A right answer to 3 multiplies before it recommends:

# %% tags=["run"]
tokens = 3 * 50_000 * 500
print(f"{tokens / (24 * 3600):,.0f} tokens a second in all, {3 * 50_000 / 32:,.0f} steps")

# %% [markdown]
# ## What this lesson left out
# Models from the hub, float16 autocast and the loss scaler at work (lessons 04 and 05), several
# GPUs, sampling instead of greedy answers, judging free text, serving the model.
#
# ## Sources
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314), sections 2 and 3: NF4, double
# quantization, paged optimizers
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685), section 4
# - Dettmers et al. 2021, [8-bit optimizers](https://arxiv.org/abs/2110.02861)
# - Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13
# - transformers,
#   [trainer.py](https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py);
#   POSIX, [rename](https://pubs.opengroup.org/onlinepubs/9699919799/functions/rename.html)
#
# New terms are in the [glossary](glossary.md).
