# %% [markdown]
# # 07 · Everything together: QLoRA on a T4, with your model and your data
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/07_qlora_on_a_t4.ipynb)
#
# **45 min** for those who have fine-tuned a transformer, 60 to 75 for others, and about an hour of
# a T4's own time, by forecast, with "auto" (a file of yours takes what it takes) · runs anywhere; a
# GPU fills in the lines that say "measured".
#
# You have a model, a file of examples and a free T4. You want a folder that other tools load, and a
# reason to believe that what is in it was learned. This is the whole run; you try to break it on
# the way. On a GPU we ran it with the small Llama and with a billion random weights, not yet with a
# pretrained model of that size: yours may be the first.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *prepare* your own data so that only answers are learned | B1 | exercise 07.1 |
# | *run* a QLoRA fine-tune that was forecast, checked and can be killed | B2 | sections 2 to 6 |
# | *judge* it: baseline, interval, control | B2 | section 7 |
# | *export* it, so that other tools load it | B1 | section 8 |
#
# (B1: you can use it. B2: you can take it apart and build with it.)
#
# **Needs:** the four holders of memory (lesson 01), checkpoint (02), accumulation (03), mixed
# precision (04), loss scaling (05), padded rows and levers (06). **New concepts (5):** chat
# template · NF4 · gate · baseline and control · atomic checkpoint. Each is in the
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
import tempfile
from dataclasses import replace
from pathlib import Path
import torch
from course_utils import figures
from course_utils.exercises import lesson_07 as exercises
from course_utils.exercises.predictions import show_prediction
from course_utils.topics import sources, survival, tickets
from fitcast import TrainRecipe, gpus
home = os.environ.setdefault("LESSON_HOME", os.getcwd())  # where your data are looked for
hosted = {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"} & set(os.environ)

# %% [markdown]
# ## Five questions, before and after
# Five letters, `x` for "not yet".

# %% tags=["self-check"]
exercises.QUESTIONS

# %% tags=["self-check"]
before = ...  # for example "abcda"

# %% [markdown]
# ## 1 · Your model, your data
# This cell decides everything.
#
# - `MODEL`: an instruct model's id on the hub (`"Qwen/Qwen2.5-1.5B-Instruct"`), or a folder.
# - `DATA`: a file (`"my.jsonl"`), a data set's id, or a list of dicts. A row is `{"prompt": ...,
#   "completion": ...}` or `{"messages": [...]}` with as many turns as you like.
# - `"auto"`: without a GPU the course's small Llama and 900 customers' messages, each answered by a
# ticket of six fields (there, data of your own only test your file and the way through: this model
# knows 1280 tokens); with one, Llama-3.2-1B-Instruct and dolly.
#
# On Colab drag your file into the *Files* pane. If the run shall outlive the session, mount a Drive
# now: `from google.colab import drive`, `drive.mount("/content/drive")`.
#
# Beside the model that is forecast, sections 6 and 7 hold a second one, and section 8 one in 16
# bits, at 2 bytes a weight: on a T4 3B should go, by arithmetic, and 8B does not. The script at the
# end holds one model alone: take 8B there.

# %% tags=["setup"]
MODEL, DATA = "auto", "auto"

# %% tags=["run"]
gpu = gpus.detect()
os.chdir(home)
source = sources.choose(gpu, MODEL, DATA)
# All that this lesson writes goes here; hosted, beside your data, where you see it and keep it.
os.chdir(tempfile.mkdtemp(prefix="lesson_07_", dir=home if hosted else None))
print(gpus.describe(gpu))
print(source)

# %% [markdown]
# A row that cannot be learned from is refused, with its place and what to change, in the last line
# of the error. Say that somebody forgot an answer:

# %% tags=["raises-exception"]
sources.choose(None, data=[{"messages": [{"role": "user", "content": "Where is order 7?"}]}])

# %% [markdown]
# The run as one object, with the levers of lesson 06, and what suits model and data in
# `source.settings`. (A learning rate of 0.007 suits the small Llama's 1.5 M weights only: any other
# model gets 2e-4.) One very long row raises the forecast, and the peak of its micro batch: a line
# below, `recipe = replace(recipe, sequence_length=256)`, cuts it, and section 3 says what was lost.

# %% tags=["run"]
recipe = TrainRecipe(
    model=source.model, base="nf4", double_quant=True,        # 4-bit weights, frozen
    lora_rank=16, lora_alpha=32, lora_dropout=0.0,
    padded=True,                                              # texts of different lengths
    attention="explicit_kv", loss="lean", norm="native", adapters="lean",
    optimizer="paged_adamw_8bit", warmup_fraction=0.05, save_steps=32, seed=1,
    **source.settings,
).for_gpu(gpu)
stock = dict(attention="stock", loss="full", norm="stock", adapters="stock")  # no levers
print(source.settings)
print(recipe.effective_batch_size, "sequences a step")

# %% [markdown]
# ## 2 · What will it need, and how long will it take?
# ### Predict
# Not your run yet, but what "auto" trains on a T4: Llama-3.2-1B in 4 bits, 8 rows of 1024 tokens at
# a time, every layer forgets, with lesson 06's levers. How high is the peak, in GiB?

# %% tags=["predict"]
predicted_gib = ...

# %% tags=["run"]
from fitcast import GIB, forecast
from fitcast.forecasting.search import tokens_per_second
usual = replace(recipe, model="llama-3.2-1b", **sources.settings_of("llama-3.2-1b"))
plans = {"this run": recipe, "llama-3.2-1b": usual}
plans |= {"no layer forgets": replace(usual, checkpointed_layers=0),
          "that, without levers": replace(usual, checkpointed_layers=0, **stock)}
needs = {name: forecast(one.for_gpu(gpus.T4), gpus.T4) for name, one in plans.items()}
table = []
for name, one in plans.items():
    minutes = [one.max_steps * one.tokens_per_step / 60 / tokens_per_second(one, needs[name], part)
               for part in gpus.T4.sustained]
    table.append(f"{name}: {needs[name].verdict}, {needs[name].peak_allocated_bytes / GIB:.2f} "
                 f"GiB, {one.max_steps} steps {min(minutes):.1f} to {max(minutes):.1f} minutes")
show_prediction(predicted_gib, show="{:.2f} GiB".format, also="\n".join(table),
                forecast=needs["llama-3.2-1b"].peak_allocated_bytes / GIB)

# %% [markdown]
# ### Explain
# The forecast runs this very step on tensors without numbers, as a T4 would allocate them. Two
# things keep it so low, and the table takes them away one by one: every layer forgets, and, with
# the levers, the logits never exist as a whole (lesson 06; they are nearly all that the last row
# takes beyond the one above it). Minutes are a range: between the highest and the lowest part of
# its peak rates that a T4 has been seen to sustain (public readings; this project has not timed
# one); rows are taken as padded, and starting kernels, most of a tiny model's time, is left out.
# The control of section 7 is a second run: take the minutes twice, and evaluation on top, about an
# hour for "auto". A CPU takes far longer: without a GPU, try long rows of your own with
# `replace(recipe, max_steps=5)`.
#
# If it fits without forgetting, and faster, why does every layer forget? Section 6 starts this run
# a second time beside the notebook, and section 7 loads a second model. Alone on the card, and
# with these levers, it goes. Trainer as it comes has none: there, without
# `gradient_checkpointing`, halve the rows until it fits.
#
# Most runs that die, die of something that was known before they started. So look first; no
# weights have been downloaded yet:

# %% tags=["run"]
from fitcast import preflight
planned = forecast(recipe.for_gpu(gpus.T4), gpus.T4)
preflight(recipe, gpu, planned=planned).require()

# %% [markdown]
# ## 3 · Learn the answer, not the question
# A **chat template** says how a model wants a conversation written: a mark in front of each role, a
# special token behind each message. It comes with the tokenizer; another template is another
# language. We want the loss on the assistant's words only: a label of -100 is skipped.
#
# ### Exercise 07.1 · Your data, your labels
# *Medium, 6 minutes.* `ids_of(messages)` gives the token ids of a conversation, by the template;
# `ids_of(messages, True)` also the header that opens an answer. Label every turn of the assistant,
# with the token that ends it. Labels are not shifted: the model does that.
#
# <details><summary>Hint 1</summary>How many tokens stand before the answer? All that was said
# before it, and the header: <code>messages[:n]</code>.</details>
# <details><summary>Hint 2</summary>And how many up to its end? All that was said, the answer
# included: <code>messages[:n + 1]</code>.</details>
# <details><summary>Hint 3</summary><code>start = len(ids_of(messages[:n], True))</code>; the end is
# a length, too.</details>

# %% tags=["run"]
tokenizer = source.tokenizer()
def ids_of(messages, header=False):
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=header)
    return tokenizer(text, add_special_tokens=False)["input_ids"]

# %% tags=["exercise"]
def labels_of(messages):
    ids = ids_of(messages)
    labels = [-100] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            start = ...
            end = ...
            labels[start:end] = ids[start:end]
    return labels

# %% tags=["check"]
exercises.check_labels(labels_of, ids_of)

# %% [markdown]
# `data.encode` does the same, asks whether the template really renders the history as the beginning
# of the whole, and says what it had to cut. One row of yours, as it is read and as it is learned:

# %% tags=["run"]
from fitcast.training import data
train_set, heldout = source.conversations()
rows, heldout_rows = (data.encode(part, tokenizer, recipe.sequence_length)
                      for part in (train_set, heldout))
labels = rows[0]["labels"]
print("read:   ", tokenizer.decode(rows[0]["input_ids"]))
print("learned:", tokenizer.decode([label for label in labels if label != data.IGNORED]))
print(len(rows), "to train on,", len(heldout_rows), "held out")

# %% [markdown]
# What is held out, one in ten (of few examples, more; 64 at most are kept), is decided by a hash of
# the question: no question is on both sides. Rows of different lengths are *padded*, which is
# skipped by the loss and paid for in time; `data.pack(rows, ...)` lays whole examples side by side
# instead (each sees those before it). Packing costs tokens where rows are alike, as the tickets are
# (two fit into a packed row, and its rest stays empty); where most are short and a few long, it
# saves them:

# %% tags=["run"]
read = [len(row["input_ids"]) for row in rows]
micro = recipe.micro_batch_size
longest = [max(read[n:n + micro]) for n in range(0, len(read), micro)]
packed = data.pack(rows, 2 * recipe.sequence_length, tokenizer.pad_token_id)
print(f"padded, {micro} at a time: {micro * sum(longest):,} tokens; packed: "
      f"{len(packed) * 2 * recipe.sequence_length:,}; of examples: {sum(read):,}")
figures.lengths(read, [sum(label != data.IGNORED for label in row["labels"])
                       for row in rows],
                recipe.sequence_length)

# %% [markdown]
# ## 4 · Load and adapt
# **NF4** stores each weight as one of 16 values, placed where normally distributed weights are
# dense; a scale for every 64 weights says how large they are, and double quantization keeps the
# scales in 8 bits. Products are computed in 16 bits, a T4's are float16, from capability 8.0 on
# bfloat16 (without a GPU in float32). 4-bit numbers cannot be trained: the base is frozen, and thin
# float32 matrices beside its linear layers are trained, LoRA's adapters.

# %% tags=["run"]
import warnings
from peft import LoraConfig, get_peft_model
from transformers import BitsAndBytesConfig, set_seed
from fitcast.step import compat, qlora
compute = getattr(torch, recipe.amp_dtype or "float32")  # the dtype of autocast: lesson 04
quantization = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=compute)
lora = LoraConfig(r=16, lora_alpha=32, target_modules=recipe.lora_targets,
                  task_type="CAUSAL_LM")
compat.look_past()  # Colab's torchao is older than PEFT wants it; nothing here uses it
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")  # PEFT's to change

# %% tags=["run"]
def fresh_model():
    base = qlora.load_base(recipe, quantization_config=quantization)  # from_pretrained, frozen
    base.enable_input_require_grads()  # else reentrant checkpoints cut the gradient off
    set_seed(recipe.seed)
    return qlora.apply_levers(get_peft_model(base, lora), recipe)

model = fresh_model()
model.print_trainable_parameters()
arguments = recipe.to_training_arguments("run")
print(f"TrainingArguments: {arguments.per_device_train_batch_size} x "
      f"{arguments.gradient_accumulation_steps}, {arguments.optim.value}, "
      f"{arguments.max_steps} steps, "
      f"learning_rate={arguments.learning_rate}, fp16={arguments.fp16}")

# %% [markdown]
# ## 5 · Baseline and gates
# A result without a **baseline** is an anecdote. So before any training: the loss on held-out
# answers, and what the model writes.

# %% tags=["run"]
from fitcast.training import evaluation
questions = [one[:-1] for one in heldout["messages"]]
expected = [one[-1]["content"] for one in heldout["messages"]]
losses_before = evaluation.answer_losses(model, heldout_rows, recipe)
answers = evaluation.generate(model, tokenizer, questions[:2], recipe)
print(f"held-out loss {sum(losses_before) / len(losses_before):.1f} nats a token")
print(f"{questions[0][-1]['content']}\n  -> {answers[0]}")

# %% [markdown]
# The small Llama starts worse than a blind guess among its 1280 tokens (ln 1280 = 7.2 nats): it is
# sure of another kind of answer. A pretrained model should start far below ln of its vocabulary.
#
# A **gate** is a question that costs a minute now, or a night later. Five of them:

# %% tags=["run"]
from fitcast.training import gates
gates.check_gates(model, rows, recipe, tokenizer.pad_token_id).require()

# %% [markdown]
# *Step 0*: LoRA's B starts as zeros, so fresh adapters change nothing. *Gradients*: every trained
# tensor has one (lesson 02 had a run with none). *Overfit*: whoever cannot learn one batch by heart
# will not learn a data set. *Attention*: which kernel runs. *Longest*: two whole steps with your
# longest rows. Sampling is random, so a run with one very long example dies when it comes, after
# minutes or hours; this one would die now. Afterwards the model is as it was.
#
# ## 6 · Train, be killed, go on
# `transformers.Trainer` with four changes: the lean loss, refusal of what would fail silently,
# speed and memory in every step's log, whole checkpoints. On a T4 the bar and the curve move for a
# quarter of an hour or more: read *In your script*, below, meanwhile.

# %% tags=["run"]
from fitcast.training import checkpoints, trainer
drive = checkpoints.on_drive("fit_the_fine_tune_07")  # None where no Google Drive is mounted
watcher = figures.Watcher(recipe, planned.peak_allocated_bytes, "QLoRA")
run = trainer.train(recipe, model, rows, tokenizer, "run", drive=drive, on_step=watcher)
figures.losses({"training": run.losses}, "QLoRA")

# %% [markdown]
# Colab ends sessions when it likes. So let us do it first: another process trains the same recipe
# and is killed with SIGKILL, which no program can catch, as soon as it has done step 4. Checkpoints
# were due every 3 steps. We resume, and go on to step 5.
#
# ### Predict
# How many of these 5 losses will differ, in any digit, from those of the run above?

# %% tags=["predict"]
predicted_different = ...

# %% tags=["run"]
frequent = replace(recipe, save_steps=3)
status = survival.train_and_kill(frequent, rows, tokenizer, "killed", at_step=4)
rest = trainer.train(frequent, fresh_model(), rows, tokenizer, "killed", stop_at=5)
different = sum(one != other for one, other in zip(rest.losses, run.losses[:5], strict=True))
show_prediction(predicted_different, show="{} of 5".format, measured=different)
print("exit status", status)
assert evaluation.largest_shift(rest.losses, run.losses[:5]) < 0.05

# %% [markdown]
# ### Explain
# Steps 1 to 3 come from the killed run's log, 4 and 5 are done again; on a CPU equal to the last
# bit. (A GPU adds up attention's gradients in no fixed order.) The same run needs adapters,
# optimizer state, schedule, gradient scaler, random state and the position in the data: with the
# weights alone the curve would look right and be another run.
#
# An **atomic checkpoint** is written into a hidden folder, flushed, listed with checksums, and then
# renamed, which a file system does entirely or not at all: a kill in the middle of a save leaves
# the one before it whole.
#
# And when it happens to you:
#
# - *A new session*, with a Drive mounted (section 1): each checkpoint of `run` has a copy, and the
#   training cell goes on from it. (Another run wants another name in `on_drive`.)
# - *A restarted runtime* makes a folder of its own: write the old one's name in place of section
#   1's `mkdtemp`, `os.chdir("lesson_07_...")`, and `run` goes on.
#
# ## 7 · Did it learn?
# The loss fell. Because of what? A **control** answers: the same recipe on the same questions,
# where every conversation ends with another one's answer. (Earlier turns stay: with many of them
# the gap shrinks.) What the control learns as well, it learned without the right answers: their
# look, not what they say.
#
# ### Predict
# By how many nats a token will the loss on held-out answers lie below the control's? And how many
# of the control's tickets will look right, how many be right? (Of free text the table says the
# words in common.)

# %% tags=["predict"]
predicted_gain = ...

# %% tags=["run"]
shuffled = data.encode(data.shuffled_answers(train_set, seed=0), tokenizer,
                       recipe.sequence_length)
control_model = fresh_model()
control = trainer.train(recipe, control_model, shuffled, tokenizer, "control")
figures.losses({"true answers": run.losses, "shuffled answers": control.losses},
               "the run and its control")

# %% tags=["run"]
losses_after, control_losses = (evaluation.answer_losses(one, heldout_rows, recipe)
                                for one in (model, control_model))
gain = evaluation.paired_bootstrap(losses_after, control_losses)
new_answers, control_answers = (evaluation.generate(one, tokenizer, questions[:32], recipe)
                                for one in (model, control_model))

# %% tags=["run", "nbval-ignore-output"]
# loose: shares and losses differ by a little between CPU types
learned, controlled = (tickets.score(given, expected[:32])
                       for given in (new_answers, control_answers))
table = [f"{name}: held-out loss {sum(values) / len(values):.2f}"
         for name, values in {"before": losses_before, "after": losses_after,
                              "control": control_losses}.items()]
table += [f"control less after, 95 % interval: {gain}", f"after: {learned}",
          f"control: {controlled}", f"{questions[0][-1]['content']}\n{new_answers[0]}"]
show_prediction(predicted_gain, show="{:.2f} nats".format, measured=gain.mean, also=table)

# %% [markdown]
# ### Explain
# With the tickets both training losses fall a long way: all answers share a look, and the control
# learns that: its tickets look right, and none is. (An instruct model on free text starts low, and
# falls little.) So how far it fell says nothing; look at two gaps. Below the control: your answers
# did more than teach their look. Below the baseline: the model did worse before, in look or in
# substance. (Shuffled answers can also make a model forget what it knew, the more so over many
# epochs, which widens the first gap. Were the base's answers of section 5 right, in another look?
# Then both gaps are there, and only a look was learned.)
#
# The interval: draw the held-out examples again and again, with replacement, and look at the mean
# difference of each draw; in pairs, because a hard question is hard for both. Far from zero, it is
# not the luck of which examples were held out; another seed of the training it does not cover:
# where the gap is small, train both again with `seed=2`. Near zero, your answers have taught their
# look and no more, so far: look at the data first, then at the number of steps. With fewer than
# thirty rows held out it is a hint, no more. And better than the control is not yet good: read ten,
# `print(*new_answers[:10], sep="\n\n")` (cut after 64 tokens here), and count those that you would
# send.
#
# Ship it? (i) Before 1.40, after 0.90, control 0.91, interval [-0.02, +0.04]. (ii) Before 0.60,
# after 0.61, control 1.90. (iii) Before 2.10, after 0.80, control 1.30, interval [+0.42, +0.58].
# <details><summary>Answer</summary>(i) No: only the look was learned. (ii) No: the base had it
# already; the control forgot it. (iii) Below both: read ten, then yes.</details>
#
# We ran all this on a GPU twice [recorded: NVIDIA H200 as a T4, 2026-11-30]. The small Llama ended
# at 0.06 on held-out answers, its control at 0.52; of its answers 88 % were right, of the control's
# none. Random weights in the shape of Llama-3.2-1B stayed level with their control, as one expects
# after so few steps.

# %% tags=["run"]
before_and_after = evaluation.paired_bootstrap(losses_before, losses_after)
print("below the baseline beyond chance:", before_and_after.high < 0)
print("below the control beyond chance: ", gain.low > 0)
print("more right than the control:     ", learned.correct > controlled.correct)
with model.disable_adapter():
    again = evaluation.answer_losses(model, heldout_rows, recipe)
print("adapters off is the baseline:    ", again == losses_before)

# %% [markdown]
# ## 8 · Take it home
# Two folders. The adapter is small, and names its base. Merged, (alpha / rank) B A is added to the
# weights, shard by shard: what has to fit into memory is one file of the result, so that 8B is
# merged on Colab's 12 GB of RAM. Tokenizer and chat template lie beside both. On Colab and Kaggle
# the cell says where they are. Colab forgets that folder with the session (a Drive, if mounted, has
# a copy); Kaggle keeps it with a saved version of the notebook. Elsewhere `os.getcwd()` says it.

# %% tags=["run"]
from fitcast import show_bytes
from fitcast.training import export, shards
control_model = None  # it stays here
sizes = {"adapter": export.save_adapter(model, "adapter", tokenizer),
         "merged": shards.merge_shards(recipe, "adapter", "merged", tokenizer=tokenizer)}
for folder, size in sizes.items():
    export.to_drive(folder, drive)
    print(f"{folder}: {show_bytes(size)},", ", ".join(sorted(os.listdir(folder))[:4]), "...")
    if hosted:
        print("in", Path(folder).resolve())

# %% [markdown]
# Whichever you ship, ask **that file**. The adapter was trained beside NF4 weights. Beside others
# it is not what you evaluated: `pipeline("text-generation", model="adapter")` alone loads the
# unquantized base. Say `quantization_config`, or ship the merged folder, which has the dequantized
# ones. Nothing of this course loads these folders:

# %% tags=["run"]
from transformers import GenerationConfig, pipeline
dtype = torch.float32 if gpu is None else torch.float16
greedy = GenerationConfig(max_new_tokens=64, do_sample=False)
ways = {"adapter, base in NF4": ("adapter", {"quantization_config": quantization}),
        "adapter, base unquantized": ("adapter", {}), "merged": ("merged", {})}
for way, (folder, more) in ways.items():
    chat = pipeline("text-generation", model=folder, dtype=dtype, model_kwargs=more)
    said = chat(questions[:8], generation_config=greedy, clean_up_tokenization_spaces=False)
    same = sum(one[0]["generated_text"][-1]["content"] == new_answers[n]
               for n, one in enumerate(said))
    print(f"{way:26}{same} of {len(said)} answers as above")
    del chat  # or it lies beside the next one

# %% [markdown]
# With the small Llama all three agree: it is sure of these eight. Yours may not be; eight greedy
# answers may not show it. Losses do move: merged hardly, beside the original weights much farther
# (Go further).
#
# For a program on a laptop, llama.cpp's script makes one GGUF file of the merged folder, and Ollama
# runs it (look at `ollama show mine --template`: of a template that it does not know, the bare
# prompt is left); on a server, vLLM serves the merged folder, or an adapter beside its base
# (`--enable-lora`). (All above ran on a CPU and on a GPU, with the models of section 7's end. These
# four lines are from the projects' manuals, and were not run by us; and llama.cpp knows the
# tokenizers of models on the hub, not that of the course's small one.)
#
#     git clone --depth 1 https://github.com/ggml-org/llama.cpp && pip install gguf
#     python llama.cpp/convert_hf_to_gguf.py merged --outfile mine.gguf --outtype f16
#     echo "FROM ./mine.gguf" > Modelfile && ollama create mine -f Modelfile && ollama run mine
#     vllm serve merged --dtype half

# %% [markdown]
# ## In your script
# The training, without this course:
#
# - **Start:** `pip install trl bitsandbytes` on Colab. Started again, it goes on from the last
#   checkpoint in `out` (torn by a kill: delete it; on Colab take a folder on the Drive). After this
#   try, with data of your own, take another folder than `out`.
#
# ```python
# import os
# os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # before torch: TRL refuses two cards in one process
# from pathlib import Path
# import torch
# from datasets import Dataset
# from peft import LoraConfig
# from transformers import AutoModelForCausalLM, BitsAndBytesConfig
# from trl import SFTConfig, SFTTrainer
#
# data = Dataset.from_list([{"prompt": [{"role": "user", "content": f"{n} + {n}?"}], "completion":
#                            [{"role": "assistant", "content": f"{2 * n}"}]} for n in range(64)])
# dtype = torch.float16 if torch.cuda.is_available() else torch.float32
# model = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-1.5B-Instruct", dtype=dtype,
#     quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4",
#         bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype))
# lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
# arguments = SFTConfig("out", per_device_train_batch_size=2, gradient_accumulation_steps=16,
#     learning_rate=2e-4, max_steps=2, save_steps=25, fp16=dtype == torch.float16, bf16=False)
# trainer = SFTTrainer(model, arguments, train_dataset=data, peft_config=lora)
# for weight in filter(lambda weight: weight.requires_grad, trainer.model.parameters()):
#     weight.data = weight.data.float()
# trainer.train(resume_from_checkpoint=any(Path("out").glob("checkpoint-*")))
# trainer.save_model("adapter")  # with tokenizer and chat template
# ```
#
# - **Length:** two steps are for a try; `num_train_epochs=3` takes the *place* of `max_steps=2`.
# - **Your file:** `datasets.load_dataset("json", data_files="my.jsonl", split="train")`, prompt and
#   completion as lists of messages, as here. TRL gives plain strings no chat template, and of
#   `messages` it learns the questions too, unless you say `assistant_only_loss=True` (which Llama
#   3.1's template refuses: split them as here). `max_length`, 1024 tokens, cuts the end of a long
#   row, which is the answer.
# - **Left out:** held-out rows, the control, this course's other levers, 8-bit Adam, the warm-up.
# - **TRL's defaults** would be a tenth of this learning rate, and adapters beside 4 bits in
#   bfloat16, which a T4's loss scaler refuses (lesson 05): the loop makes them float32 again. [TRL,
#   sft_config.py, sft_trainer.py]
# - **8B** peaks at 7.1 GiB by forecast (TRL from 1.16 on takes the loss in chunks):
#   `pip install git+https://github.com/course-authors/fit-the-fine-tune`, then `fitcast forecast
#   --model llama-3.1-8b --micro-batch-size 2 --sequence-length 1024 --padded --lora-dropout 0
#   --lora-targets all-linear --loss chunked --optimizer adamw`.
#
# To merge it into the weights that it was trained beside, where 16 bits a weight have room: a new
# process, `model` loaded as above (on Colab first `!pip uninstall -qy torchao`: beside unquantized
# weights PEFT refuses the old one), and
#
#     from peft import PeftModel
#     model = PeftModel.from_pretrained(model.dequantize(), "adapter").merge_and_unload()
#     model.save_pretrained("merged")  # the tokenizer lies in "adapter"
#
# 8B on a T4 has no room. There this course's
# `fitcast.training.shards.merge_shards(TrainRecipe(model=..., base="nf4", double_quant=True),
# "adapter", "merged")` does it file by file, with the id that you trained.
#
# ## And now?
# The same five questions.

# %% tags=["self-check"]
after = ...

# %% tags=["self-check"]
exercises.QUESTIONS.score(before, after)

# %% [markdown]
# ## Go further (optional)
# Everything from here on is beyond the 45 minutes: take what you like.
#
# ### The budget, line by line
# One training step of this recipe, on a model that is thrown away. Every holder beside the formula
# for it; the forecast is a T4's, in 16 bits, the count is this machine's.

# %% tags=["run"]
from course_utils.topics import budget, ladder, recorded
from fitcast.training import measurement
step = measurement.measure_step(recipe, fresh_model(), steps=1)
budget.show(budget.checklist(recipe, model, planned, step.report))

# %% [markdown]
# Activations: no layer forgets here, and the formula counts boundaries only. Optimizer: 8-bit Adam
# leaves a tensor of fewer than 4096 numbers in 32 bits. [bitsandbytes, `min_8bit_size`]
#
# And two budgets on paper, made of rules of thumb before anything was counted, for the usual recipe
# at 4 x 2048 tokens:

# %% tags=["run"]
for one in ladder.rungs("budgets"):
    print(f"{one.name}: on paper, a T4's forecast, a count on a GPU")
    budget.compare(one.name, one.forecast, one.measured)
print(f"[recorded: {recorded.stamp(recorded.rows('budgets'))}]")

# %% [markdown]
# The rows for adapters, gradients and optimizer are right, or too small to matter. The largest is
# *missing*: at the peak stand the logits, tokens x vocabulary, in float32 copies (lesson 01).
# (Calculators forget them too: EleutherAI's has no line for them.) A batch of token ids is
# kilobytes. Base weights are not parameters x 0.5: embeddings and head stay at 16 bits.
#
# Move the controls: what adapters need for themselves, with their gradients and the optimizer's
# averages. **Task:** 8B, adapters on attention. How much does rank 8 save, instead of 16?
# <details><summary>Answer</summary>65 MiB in all, of which 39 stand at the peak of 19.28 GiB (there
# are no gradients yet): the rank is the last thing to try. On every linear layer
# rank 64 takes more than a GiB: then it counts.</details>

# %% tags=["run"]
figures.adapters_explorer()

# %% [markdown]
# ## Exercise 07.2 · Count the adapters
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
exercises.check_trainable(lora_parameters)

# %% [markdown]
# ### A full disk, and a save that dies
# "Save often", people say. A process that runs out of memory in the middle of a save leaves half a
# file, under the right name. Here it happens to the usual save:

# %% tags=["raises-exception"]
state, no_memory, no_disk = {"step": 64, "weights": torch.ones(1000)}, *survival.ACCIDENTS
torch.save(state, "last.pt")            # a good checkpoint, and then a save that dies over it:
with survival.dies_in_a_save(no_memory):
    survival.attempt(torch.save, state, "last.pt")
torch.load("last.pt")

# %% [markdown]
# The same accident, a full disk, and SIGKILL in the middle of a save of ours:

# %% tags=["run"]
after_it = Path("run", f"checkpoint-{recipe.max_steps + 1}")
for accident in (no_memory, no_disk):
    with survival.dies_in_a_save(accident):
        survival.attempt(survival.save_whole, after_it, state)
print("killed:", survival.kill_in_a_save(after_it))
last = checkpoints.find_last("run", drive)
print(last.name, "is whole:", len(checkpoints.verify(last)["files"]), "files, each as listed")

# %% [markdown]
# ### Merged into which weights?
# **Merging** adds the adapter's product to the weights beside it. Which weights? The adapter was
# trained beside NF4. So there are two candidates: the *original* 16-bit weights, and those
# *dequantized* from NF4, which section 8 took.
#
# ### Predict
# Merged into the original weights, which are *better*: by how many nats does the worst of the
# held-out examples' losses move from what you measured?

# %% tags=["predict"]
predicted_shift = ...

# %% tags=["run"]
def shift(loaded):
    losses = evaluation.answer_losses(loaded, heldout_rows, recipe)
    return evaluation.largest_shift(losses, losses_after)

# %% tags=["run"]
model = None  # one after the other, so that a T4 has room for each
shifts = {"adapter": shift(export.load_adapter(recipe, "adapter")),
          "dequantized": shift(export.load_merged(recipe, "merged"))}
shards.merge_shards(recipe, "adapter", "original", base="original")
shifts["original"] = shift(export.load_merged(recipe, "original"))

# %% tags=["run", "nbval-ignore-output"]
# loose: the shifts differ by a little between CPU types
table = "\n".join(f"{kind:12}largest shift {moved:.6f} nats" for kind, moved in shifts.items())
show_prediction(predicted_shift, show="{:.3f} nats".format, measured=shifts["original"],
                also=table)

# %% [markdown]
# ### Explain
# Reloaded, the adapter is exact. Dequantized, the difference is float16's rounding in the file.
# The original weights are closer to what was pre-trained and *farther* from what was fine-tuned:
# the adapter had learned to make up for NF4's errors too. [QLoRA, section 4]

# %% tags=["run"]
print("adapter exact:", shifts["adapter"] == 0)
print("dequantized closer than original:", shifts["dequantized"] < shifts["original"])

# %% [markdown]
# ### For those who struggle
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
# Five numbers get a gradient and two optimizer states each; W gets neither.
#
# ### Open questions
# Train once more with `replace(recipe, lora_targets=("q_proj", "v_proj"))`, the choice of the first
# LoRA paper, and compare by the interval. Then try `base="float32"`: what did 4 bits cost? On two
# T4s (Kaggle gives them) [lesson 08](08_beyond_one_gpu.ipynb) runs this recipe under `torchrun`.
#
# ### Try with AI
# Ask an assistant:
#
# > I have 50 000 conversations of 500 tokens, two T4s and 24 hours. Three epochs with QLoRA. Which
# > model can I afford, and how many optimizer steps of 32 sequences is that?
#
# A right answer multiplies before it recommends: tokens, steps (rounded up for each epoch, lesson
# 03), hours, as a range; and it names which of its numbers nobody measured. Padded rows, and as if
# two cards were twice as fast as one:

# %% tags=["run"]
tokens = 3 * 50_000 * 500
print(f"{tokens:,} tokens, {3 * -(-50_000 // 32):,} optimizer steps")  # -(-a // b): up
for name in ("llama-3.2-1b", "llama-3.1-8b"):
    one = replace(usual, model=name, micro_batch_size=4, sequence_length=512, world_size=2)
    one = one.for_gpu(gpus.T4)
    on_t4 = forecast(one, gpus.T4)
    low, high = (tokens_per_second(one, on_t4, part) for part in gpus.T4.sustained)
    print(f"{name}: {on_t4.verdict}, {tokens / (2 * high) / 3600:.0f} to "
          f"{tokens / (2 * low) / 3600:.0f} hours")

# %% [markdown]
# ## What this lesson left out
# Sharded models ([lesson 08](08_beyond_one_gpu.ipynb) has them), sampling instead of
# greedy answers, judging free text by more than its words, a mask between packed examples.
#
# ## Sources
# - Dettmers et al. 2023, [QLoRA](https://arxiv.org/abs/2305.14314), sections 2 to 4: NF4, double
#   quantization, paged optimizers
# - Hu et al. 2021, [LoRA](https://arxiv.org/abs/2106.09685), section 4
# - EleutherAI,
#   [calc_transformer_mem.py](https://github.com/EleutherAI/cookbook/blob/main/calc/calc_transformer_mem.py):
#   a budget by formulas
# - Efron & Tibshirani 1993, *An Introduction to the Bootstrap*, chapter 13
# - TRL, [Dataset formats and types](https://huggingface.co/docs/trl/dataset_formats)
# - llama.cpp, [convert_hf_to_gguf.py](https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py);
#   vLLM, [vllm serve](https://docs.vllm.ai/en/latest/cli/serve/)
# - transformers,
#   [trainer.py](https://github.com/huggingface/transformers/blob/main/src/transformers/trainer.py);
#   POSIX, [rename](https://pubs.opengroup.org/onlinepubs/9699919799/functions/rename.html)
#
# New terms are in the [glossary](glossary.md).
