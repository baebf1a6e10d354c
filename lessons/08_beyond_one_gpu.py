# %% [markdown]
# # 08 · What does a second GPU buy?
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/08_beyond_one_gpu.ipynb)
# [![Open in Kaggle](https://kaggle.com/static/images/open-in-kaggle.svg)](https://kaggle.com/kernels/welcome?src=https://github.com/course-authors/fit-the-fine-tune/blob/v0.1.0/lessons/08_beyond_one_gpu.ipynb)
#
# **30 min**, 40 if you read every line · optional, runs anywhere; two GPUs fill in section 5.
#
# Kaggle lends you two T4s. Does lesson 07's run go twice as fast on them, or may the model be twice
# as large? Neither quite, and not both; part of the price goes over the bus between the cards. Two
# processes on your CPU train, and you count each byte between them.
#
# | objectives: you will be able to | level | assessed by |
# |---|---|---|
# | *count* what replicated and sharded training send | B2 | exercise 08.1 |
# | *choose* between them by memory per rank and by traffic | B1 | sections 2, 3 |
# | *avoid* the mistakes that raise no error | B2 | section 4, exercise 08.2 |
#
# (B1: you can use it. B2: you can take it apart and build with it.)
#
# **Needs:** the four holders (lesson 01), effective batch and token weighting (03), adapters beside
# a frozen base (07). **New concepts (3):** collective · DDP · FSDP2. Each is in the
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
import torch
from course_utils import figures
from course_utils.exercises import lesson_08 as exercises
from course_utils.exercises.predictions import show_prediction
from course_utils.topics import bus
from fitcast import GIB, T4, TrainRecipe, forecast
os.chdir(tempfile.mkdtemp())  # what this lesson writes, but for section 5, goes here

# %% [markdown]
# ## Five questions, before and after
# Five letters, `x` for "not yet".

# %% tags=["self-check"]
exercises.QUESTIONS

# %% tags=["self-check"]
before = ...  # for example "abcda"

# %% [markdown]
# ## 1 · Two processes, one update
# *Ranks* are processes that train together, one a GPU. They talk in **collectives**, calls that
# every rank has to make. For a tensor of S bytes and n ranks [NVIDIA, nccl-tests: ring algorithms]:
#
# | collective | a rank brings | a rank takes home | it sends |
# |---|---|---|---|
# | reduce-scatter | a whole tensor | its part of their sum | S (n - 1) / n |
# | all-gather | its part | the whole tensor | S (n - 1) / n |
# | all-reduce | a whole tensor | their sum, whole | both in turn: 2 S (n - 1) / n |
#
# **DDP**, distributed data parallel, puts the whole model on each rank, gives each its own rows,
# and averages gradients. By hand that is a loop, in a file for `torchrun`.

# %% tags=["run"]
with open("three_ways.py", "w") as file:
    file.write('''
import torch.distributed as dist
from course_utils.topics import bus

def by_hand(model, batches):
    for batch in batches:
        model(batch).backward()          # on this rank's own rows
    for p in bus.trained(model):
        dist.all_reduce(p.grad)          # now the sum over ranks
        p.grad /= dist.get_world_size()
''')

# %% [markdown]
# PyTorch's wrapper does that while backward still runs, many gradients at a time; `no_sync` keeps
# it quiet until a step's last micro batch.
#
# **FSDP2**, fully sharded data parallel, gives each rank a *part* of every parameter, gradient and
# optimizer state. A layer's parts are gathered before it computes; then the whole is dropped:

# %% tags=["run"]
with open("three_ways.py", "a") as file:
    file.write('''
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

def ddp(model, batches):
    bus.backward(DistributedDataParallel(model), batches)    # no_sync but for the last

def fsdp2(model, batches):
    for layer in model.layers:
        fully_shard(layer)
    bus.backward(fully_shard(model), batches)
''')

# %% [markdown]
# The model has four layers, each with a frozen matrix of 256 KiB and a trained adapter of 32 KiB. A
# step has two micro batches. `bus.Bus()` notes a rank's collectives.

# %% tags=["run"]
with open("three_ways.py", "a") as file:
    file.write('''
dist.init_process_group("gloo")          # for CPUs; between GPUs: "nccl"
told = {}
for way in (by_hand, ddp, fsdp2):
    model, batches = bus.small_model(), bus.my_batches(2)
    with bus.Bus() as seen:
        way(model, batches)
    told[way.__name__] = [seen.sent_bytes, f"{seen}; gradient {bus.norm(model):.4f}"]
bus.tell(**told)
dist.destroy_process_group()
''')
told = bus.run("three_ways.py")          # torchrun --nproc-per-node 2 three_ways.py

# %% [markdown]
# ### Predict
# DDP: how many KiB does a rank send in a step?

# %% tags=["predict"]
predicted_ddp = ...

# %% tags=["run"]
show_prediction(predicted_ddp, show="{:g} KiB".format, counted=told[0]["ddp"][0] / 1024,
                also=[f"{way} on rank {rank}: {told[rank][way][1]}"
                      for way in ("by_hand", "ddp") for rank in (0, 1)])

# %% [markdown]
# ### Explain
# The adapters' gradients, once. The frozen matrices have none, the first micro batch sends
# nothing. By hand: the same, in eight calls; DDP fills one *bucket*. Both
# ranks now hold one gradient.

# %% [markdown]
# ## 2 · A part of each layer
# ### Predict
# FSDP2: how many KiB does a rank send in the same step?

# %% tags=["predict"]
predicted_fsdp2 = ...

# %% tags=["run"]
show_prediction(predicted_fsdp2, show="{:g} KiB".format, counted=told[0]["fsdp2"][0] / 1024,
                also=[f"rank {rank}: {told[rank]['fsdp2'][1]}" for rank in (0, 1)])

# %% [markdown]
# ### Explain
# Four layers, gathered for forward, dropped, gathered again for backward, in both micro batches:
# sixteen gathers of a whole layer, frozen matrix included. Then a reduce-scatter of each layer's
# gradients, in the last micro batch. So accumulation, which costs DDP nothing, makes FSDP2 gather
# all its weights twice a micro batch: prefer large ones.
#
# ## Exercise 08.1 · Bytes over the bus
# *Medium, 5 minutes.* What does a rank send in a step? `frozen` and `trained` are bytes of the
# whole model's matrices and adapters. The check lets PyTorch's wrappers train, with 2 and 4 ranks.
#
# <details><summary>Hint 1</summary>The share (n - 1) / n stands before everything. For DDP only
# what is trained counts.</details>
# <details><summary>Hint 2</summary>FSDP2: a micro batch gathers all layers twice, adapters
# included; gradients are reduce-scattered once a step.</details>
# <details><summary>Hint 3</summary><code>2 * share * trained</code>, and <code>share *
# (micro_batches * 2 * (...) + ...)</code></details>

# %% tags=["exercise"]
def sent_bytes(strategy, frozen, trained, micro_batches, ranks):
    if strategy == "ddp":
        return ...
    return ...

# %% tags=["check"]
exercises.check_sent(sent_bytes)

# %% [markdown]
# ## 3 · What does each save?
# Llama-3.1-8B, lesson 06's levers, 2 rows of 2048 tokens a card. `forecast` adds DDP's
# buckets, and runs FSDP2's own code as one of two ranks that only pretend to talk.
#
# ### Predict
# One T4 alone needs 7.36 GiB, 5.32 of them weights, 1.52 activations. How many
# does each of two need under FSDP2?

# %% tags=["predict"]
predicted_gib = ...

# %% tags=["run"]
from fitcast.forecasting.search import tokens_per_second
recipe = TrainRecipe(model="llama-3.1-8b", amp_dtype="float16", lora_dropout=0.0, loss="lean",
                     attention="explicit_kv", norm="native", adapters="lean", optimizer="adamw",
                     micro_batch_size=2, sequence_length=2048)
with bus.Bus() as seen:  # only FSDP2's code talks
    steps = {"one card": forecast(recipe, T4)} | {
        f"{strategy} on 2": forecast(recipe, T4, strategy=strategy, world_size=2)
        for strategy in ("ddp", "fsdp2")}
tokens = recipe.micro_batch_size * recipe.sequence_length
seconds = [tokens / tokens_per_second(recipe, steps["one card"], part) for part in T4.sustained]
show_prediction(predicted_gib, show="{:.2f} GiB".format, also=[
    f"sent by a rank of fsdp2, one micro batch: {seen.sent_bytes / GIB:.2f} GiB; at 16 GB/s "
    f"{seen.sent_bytes / 16e9:.1f} s, beside {min(seconds):.0f} to {max(seconds):.0f} s of work",
    figures.compare(steps, T4, f"{recipe.model}, {tokens} tokens, what each rank holds")],
    **{name: step.peak_allocated_bytes / GIB for name, step in steps.items()})

# %% [markdown]
# ### Explain
# DDP saves nothing: a rank holds the whole model, and the buckets. FSDP2 halves what lies still
# (adapters, optimizer state, weights; not the head, which a loss in chunks reads whole). On top
# come the layer at work and the next, whole. Activations follow a card's rows. So **FSDP2 pays when
# weights are what is large**. Its price: 4.31 GiB a micro batch, where DDP sends the adapters'
# 52.00 MiB a step.
#
# Measured on two cards held to a T4's memory (speeds: both together, no mask):

# %% tags=["recorded"]
from course_utils.topics import recorded
recorded.show("cards", bus.card)

# %% [markdown]
# Over NVLink DDP is 1.76 times as fast as one card, FSDP2 1.39. A T4's PCIe, 16 GB/s at best
# [NVIDIA, T4], takes 0.3 s for what FSDP2 sends: little beside the work above; at 512 tokens a
# micro batch a sixth to a quarter. T4s were not timed. *Offload*: parts wait on the host.
#
# DDP, FSDP2, or neither? (i) 32B at 1 x 1024. (ii) Lesson 07's run. (iii) 8B, out of memory at 4 x
# 2048 with the usual loss. Yours: `model=` below *Predict*.
# <details><summary>Answer</summary>(i) FSDP2, a part on the host: its weights fit no card. (ii)
# DDP. (iii) Neither: first the levers.</details>

# %% [markdown]
# ## 4 · Three things that must be right, and a trap
# **One GPU each, before anything is loaded**: `torchrun` tells each process its number as
# `LOCAL_RANK`; `torch.cuda.set_device` of it is the first line that touches a GPU, or every rank
# loads its model onto GPU 0. A slip here raises; the others, under DDP, do not.
#
# **The loss inside the wrapper's forward.** DDP and FSDP2 do their work around *their* forward. A
# chunked loss likes to call the model inside, for its hidden states:

# %% tags=["run"]
with open("beside.py", "w") as file:
    file.write('''
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from course_utils.topics import bus

dist.init_process_group("gloo")
model, (batch,) = DistributedDataParallel(bus.small_model()), bus.my_batches(1)
with bus.Bus() as seen:
    model.module(batch).backward()       # it should say: model(batch)
bus.tell(sent=seen.sent_bytes, norm=bus.norm(model))
dist.destroy_process_group()
''')
beside = bus.run("beside.py")

# %% [markdown]
# ### Predict
# How many KiB does a rank send now?

# %% tags=["predict"]
predicted_beside = ...

# %% tags=["run"]
show_prediction(predicted_beside, show="{:g} KiB".format, counted=beside[0]["sent"] / 1024,
                also=[f"gradient on rank {rank}: {beside[rank]['norm']:.4f}" for rank in (0, 1)])

# %% [markdown]
# ### Explain
# Nothing, and no word. Two gradients, two models; rank 0's is saved, which saw half of
# your data. In your own loop under DDP print after the step's last backward, on each rank,
# `torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf"))`: it must be one number.
#
# **Tokens, not means.** DDP takes the mean of the ranks' gradients. Where each divided by its own
# labelled tokens, an answer counts more on the rank with the short ones (lesson 03).
#
# Trainer and SFTTrainer do both right.
#
# ## Exercise 08.2 · A loss for each rank
# *Medium, 4 minutes.* A rank has the *sum* of its tokens' losses. `all_reduce(tensor)` adds up over
# ranks in place and returns nothing, as `dist.all_reduce` does. Return what this rank calls
# `backward()` on, so that DDP's mean is that over *all* tokens.
#
# <details><summary>Hint 1</summary>The first line is a call: afterwards <code>tokens</code> is
# everybody's.</details>
# <details><summary>Hint 2</summary>With one rank it would be the sum by the tokens.</details>
# <details><summary>Hint 3</summary>DDP divides by the number of ranks; multiply by it
# first.</details>

# %% tags=["exercise"]
def loss_of_rank(loss_sum, my_tokens, all_reduce, ranks):
    tokens = torch.tensor(float(my_tokens))
    ...         # all ranks' tokens
    return ...

# %% tags=["check"]
exercises.check_loss(loss_of_rank)

# %% [markdown]
# **The trap: `DataParallel`.** Where plain `python`, or a Kaggle notebook, sees two GPUs, `Trainer`
# counts both in *one* process. Your batch doubles, and threads share it, a copy of the model each.
# A model in 4 bits is not copied: one card computes the doubled batch, and what was forecast to fit
# may not. (TRL's trainers refuse.)
#
# Hide one: `CUDA_VISIBLE_DEVICES=0` before torch is imported (in a notebook: restart it).

# %% [markdown]
# ## 5 · On two T4s
# Lesson 07's run as a script (yours: `--model`, `--data my.jsonl`); `accelerate launch` is a
# `torchrun` that reads `configs/`. This cell runs where two GPUs are (on Kaggle: *Settings >
# Accelerator > GPU T4 x2*), some minutes beyond the 30:

# %% tags=["run"]
bus.on_two_gpus(
    "accelerate launch --config_file configs/ddp_2xt4.yaml tools/train_many_gpus.py"
    " --model Qwen/Qwen2.5-1.5B-Instruct --steps 4 --out ddp",
    "accelerate launch --config_file configs/fsdp2_qlora_2xt4.yaml tools/train_many_gpus.py"
    " --model Qwen/Qwen2.5-1.5B-Instruct --steps 4 --out fsdp2 --strategy fsdp2",
)

# %% [markdown]
# Recorded on one GPU, then two under DDP (Llama-3.2-1B's shape, random weights, short rows):

# %% tags=["recorded"]
recorded.show("gpus", bus.launched)

# %% [markdown]
# Accumulation is divided by the processes: one batch, one loss; faster, not twice.
#
# ## In your script
# Saved as `mine.py`: `python mine.py` takes one card, `torchrun --nproc-per-node 2 mine.py` two. In
# a notebook: `!pip install -q trl` (on Colab also `!pip uninstall -qy torchao`), `%%writefile
# mine.py` above this code, `!` before either command. A base in 4 bits takes lesson 07's `dtype`,
# `quantization_config=` and, above `print`, its two float32 lines. For FSDP2 take section 5's
# second command, on Kaggle in `/kaggle/working/course`.
#
# ```python
# import os
# if "LOCAL_RANK" not in os.environ:  # no torchrun: TRL refuses two cards in one process
#     os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # before torch is imported
# import torch
# from datasets import Dataset
# from peft import LoraConfig
# from transformers import AutoModelForCausalLM
# from trl import SFTConfig, SFTTrainer
#
# rank, ranks = (int(os.environ.get(name, n)) for name, n in (("LOCAL_RANK", 0), ("WORLD_SIZE", 1)))
# if on_gpu := torch.cuda.is_available():
#     torch.cuda.set_device(rank)  # before anything is loaded
# model = AutoModelForCausalLM.from_pretrained(
#     "Qwen/Qwen2.5-0.5B", dtype=torch.float32, device_map={"": rank} if on_gpu else None)
# rows = Dataset.from_list([{"text": "A row of your own text. " * 20}] * 32)
# arguments = SFTConfig("out_08", max_steps=1, per_device_train_batch_size=2,
#                       gradient_accumulation_steps=16 // ranks, ddp_find_unused_parameters=False,
#                       learning_rate=2e-4, max_length=128, bf16=False, fp16=on_gpu)
# trainer = SFTTrainer(model, arguments, train_dataset=rows,
#                      peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]))
# print(f"rank {rank} of {ranks}: loss {trainer.train().training_loss:.2f}")
# trainer.save_model("adapter_08")
# ```
#
# ## And now?
# The same five questions.

# %% tags=["self-check"]
after = ...

# %% tags=["self-check"]
exercises.QUESTIONS.score(before, after)

# %% [markdown]
# ## Go further (optional)
# Everything from here on is beyond the 30 minutes: take what you like.
#
# ### More ranks, other models
# Move the controls. **Task:** four ranks instead of two. What does not shrink?
# <details><summary>Answer</summary>Activations follow each card's own rows; the head stays whole;
# and of the layers two are gathered, however many ranks there are (temporaries).</details>

# %% tags=["run"]
figures.ranks_explorer(recipe, steps)

# %% [markdown]
# ### DataParallel's doubled batch
# Without two GPUs, we say to `Trainer`'s arguments what they would count:

# %% tags=["run"]
from transformers import TrainingArguments
arguments = TrainingArguments("out", per_device_train_batch_size=8, report_to="none")
for n in (1, 2):
    arguments._n_gpu = n  # as Trainer counts the GPUs that it sees
    print(f"{n} visible: {arguments.train_batch_size} rows a micro batch")

# %% [markdown]
# ### FSDP2's options, and checkpoints
# (`configs/fsdp2_offload_2xt4.yaml` with `--strategy fsdp2 --offload` lets parts wait on the host.
# 32 billion weights need it, or the embedding there. The 8B's checkpoints there take 16 GiB for
# both ranks at 32 768 tokens; at 98 304 (MLP in tiles, lesson 06) 48, which Kaggle lacks.)
#
# For FSDP2, which cuts floating numbers, 4-bit weights are stored as float16, two bytes in each,
# and the optimizer is plain AdamW: bitsandbytes' takes no parts. Checkpoints are whole or not there
# (lesson 07): kill a rank, start again, with two processes or with one.
#
# ### Cut in two: a device map
# `device_map="auto"` is no training of two cards: the first layers lie on one, the last on the
# other, and while one works the other waits. Memory is shared out, time is not. The card with the
# last layers holds the logits, too, so "equal parts" of the weights are unequal parts of the peak.
# For training, FSDP2 does the same for memory, and both cards work.
#
# ### For those who struggle
# Two ranks, one number to train. Rank 0 has the gradient 2, rank 1 the gradient 6. All-reduce: both
# have 8. By the number of ranks: both have 4. Both subtract the same from the same weight, so the
# weights stay equal. Now with parts, and two numbers: gradients (2, 4) and (6, 0). Reduce-scatter:
# rank 0 takes home 8, rank 1 takes home 4, each updates its own number. All-gather: both know both
# again. All-reduce is these two, one behind the other.

# %% tags=["run"]
summed = torch.tensor([[2.0, 4], [6, 0]]).sum(0)
print("all-reduce:", summed.tolist(), " reduce-scatter:", *summed.split(1))

# %% [markdown]
# ### Open questions
# - With `fully_shard(layer, reshard_after_forward=False)` a layer stays whole from forward to
#   backward. What does a rank send then, and hold? Write it into `three_ways.py`, and count.
# - The chunked loss needs the head whole. What would a rank send if the head were cut, and gathered
#   for each chunk?
#
# ### Try with AI
# > I fine-tune Llama-3.1-8B with QLoRA on Kaggle's two T4s. It runs out of memory at 4 x 2048. My
# > friend says: use both GPUs, then each needs half. Is that so?
#
# A right answer asks *how* both are used: DDP halves nothing, FSDP2 halves what lies still, and at
# this peak stand the logits (lesson 06). Half of the rows on each card helps more, and the levers
# most:

# %% tags=["run"]
asked = {"2 x 2048, the usual loss": replace(recipe, loss="full"),
         "4 x 2048, with the levers": replace(recipe, micro_batch_size=4)}
for name, one in asked.items():
    print(f"{name}, on each card: {forecast(one, T4)}")

# %% [markdown]
# ## What this lesson left out
# Several hosts, tensor and pipeline parallelism, sequence parallelism, ZeRO's stages one by one
# (FSDP2 is the third), DeepSpeed.
#
# ## Sources
# - PyTorch, [DistributedDataParallel](https://docs.pytorch.org/docs/stable/notes/ddp.html) and
#   [fully_shard](https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html)
# - NVIDIA, nccl-tests,
#   [PERFORMANCE.md](https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md): what a
#   rank sends in each collective
# - Rajbhandari et al. 2020, [ZeRO](https://arxiv.org/abs/1910.02054): why shard what lies still
# - NVIDIA, [T4](https://www.nvidia.com/en-us/data-center/tesla-t4/): its interconnect bandwidth
# - bitsandbytes, [FSDP-QLoRA](https://huggingface.co/docs/bitsandbytes/fsdp_qlora); PEFT,
#   [FSDP](https://huggingface.co/docs/peft/accelerate/fsdp)
# - transformers,
#   [training_args.py](https://github.com/huggingface/transformers/blob/main/src/transformers/training_args.py):
#   `train_batch_size`
#
# New terms are in the [glossary](glossary.md).
