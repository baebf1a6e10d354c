"""Pre-train the bundled model: its text, its tokenizer, its weights, from one seed.

The text is support chatter in plain prose: conversations, follow-up questions, depot notes, lists
said twice. It teaches words, names and copying from context. It never shows the ticket layout of
`make_instructions.py`: that is what the course's fine-tune has to teach. Messages whose wording
occurs in the instruction set are left out.

Not modelled: world knowledge, spelling, other languages. Same seed, threads and torch build give
the same bytes; another CPU type may differ in the last bits.

Usage: python tools/train_bundled_model.py [--out DIR] [--seed N] [--steps N]
"""

import argparse
import hashlib
import json
import math
import random
import time
from collections.abc import Iterator
from pathlib import Path

import make_instructions as support
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED, STEPS, THREADS = 2026, 520, 2
BATCH, LENGTH = 32, 192  # sequences per step, tokens per sequence
PEAK_LR, WARMUP_STEPS = 4e-3, 40
VOCAB_SIZE = 1280
SPECIALS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}")

# Issue -> (what happened, what we do), in an agent's words.
REPLIES = {
    "damaged": (["came to you damaged", "was damaged on the way", "is damaged"],
                ["We will send a replacement", "A replacement is what we send"]),
    "late": (["is late", "is so late", "has not reached you and is late"],
             ["We will trace the parcel", "Our courier is going to trace the parcel"]),
    "wrong item": (["was mixed up, and you hold the wrong item", "turned out to be the wrong item"],
                   ["We will swap the item", "Our courier comes to swap the item"]),
    "missing part": (["has a missing part", "was packed with a missing part"],
                     ["We will send the part", "Our depot is going to send the part"]),
    "billing": (["led to a billing mistake", "was billed wrongly, a billing error of ours"],
                ["We will refund the charge", "The bank will refund the charge"]),
    "return": (["is one you wish to return", "is a return"],
               ["We will send a return label", "Our depot is going to send a return label"]),
    "faulty": (["is faulty", "turned out faulty"],
               ["We will book a repair", "Our workshop is going to book a repair"]),
}
PACE = {
    "high": ["today, with high priority", "at once, as this has high priority"],
    "normal": ["within two days, with normal priority", "this week, as this has normal priority"],
    "low": ["when there is room, with low priority", "later on, as this has low priority"],
}
CITIES = ["Leeds", "York", "Porto", "Lyon", "Graz", "Turin", "Ghent", "Malmo", "Cork", "Bern"]


def reply(rng: random.Random, facts: dict) -> str:
    """An agent's answer in prose that takes up every fact of the message."""
    happened, action = (rng.choice(words) for words in REPLIES[facts["issue"]])
    pace = rng.choice(PACE[facts["priority"]])
    return rng.choice([
        "Dear {customer}, we are sorry that the {product} from order {order} {happened}. "
        "{action} {pace}.",
        "Thank you, {customer}. I found order {order}: the {product} {happened}. {action} {pace}.",
        "I am sorry, {customer}. I see that the {product} {happened}. {action} for order {order} "
        "{pace}.",
        "Order {order} is open here, {customer}. So the {product} {happened}. {action} {pace}.",
        "The {product} in order {order} {happened}, {customer}. {action} {pace}.",
    ]).format(**facts, happened=happened, action=action, pace=pace)


def follow_up(rng: random.Random, facts: dict) -> tuple[str, str]:
    """A question about the conversation so far, and its answer."""
    action = rng.choice(REPLIES[facts["issue"]][1])
    questions = [
        ("Which order is it?", ["It is order {order}.", "You wrote {order}."]),
        ("Can you repeat the number?", ["It is {order}.", "I read {order}, {customer}."]),
        ("What did I buy?", ["You bought the {product}.", "It was the {product}."]),
        ("Which thing do we talk about?", ["The {product}.", "We talk about the {product}."]),
        ("Who am I?", ["You are {customer}.", "Your name is {customer}."]),
        ("What is the matter?", ["The matter is: {issue}.", "I call it {issue}."]),
        ("How do you rank this?", ["It has {priority} priority.", "As {priority}."]),
        ("And now?", ["{action}.", "{action}, {customer}."]),
    ]
    question, answers = rng.choice(questions)
    return question, rng.choice(answers).format(**facts, action=action)


def conversation(rng: random.Random, taken: set[str]) -> list[str]:
    """Turns, customer first; no message whose wording is in `taken`."""
    while True:
        facts = support.draw_facts(rng)
        message = support.message(rng, facts)
        if support.wording(message, facts) not in taken:
            break
    turns = [message, reply(rng, facts)] if rng.random() < 0.5 else []
    for _ in range(rng.randint(0 if turns else 1, 3)):
        turns.extend(follow_up(rng, facts))
    return turns if turns[0] is message else [f"{message} {turns[0]}", *turns[1:]]


def note(rng: random.Random) -> str:
    """A depot note that mentions its parcels, people and products more than once."""
    count = rng.randint(2, 4)
    people, things = rng.sample(support.NAMES, count), rng.sample(support.PRODUCTS, count)
    parcels = [str(rng.randint(1000, 9999)) for _ in range(count)]
    city, pick = rng.choice(CITIES), rng.randrange(count)
    lines = [f"Parcel {parcel} holds the {thing} of {person}." for parcel, thing, person
             in zip(parcels, things, people, strict=True)]
    ending = rng.choice([
        f"Today {people[pick]} called about the {things[pick]} in parcel {parcels[pick]}.",
        f"Parcel {parcels[pick]} left {city}. The {things[pick]} is on its way to {people[pick]}.",
        f"From {city} we saw {', '.join(parcels)} and again {', '.join(parcels)}.",
        f"We wrote to {', '.join(people)} about the {', the '.join(things)}. "
        f"Then {', '.join(people)} asked about the {', the '.join(things)}.",
    ])
    return " ".join([*lines, ending])


def documents(seed: int) -> Iterator[list[str]]:
    """Endless pre-training text: a conversation as its turns, or a note alone in its list."""
    rng = random.Random(seed)
    taken = {support.wording(row["prompt"], facts_of(row["answer"])) for row in support.examples()}
    while True:
        yield conversation(rng, taken) if rng.random() < 0.8 else [note(rng)]


def facts_of(answer: str) -> dict:
    """Customer and product of a ticket, for `support.wording`."""
    fields = dict(line.split(": ", 1) for line in answer.splitlines())
    return {"customer": fields["Customer"], "product": fields["Product"]}


def train_tokenizer(seed: int, count: int = 4000) -> PreTrainedTokenizerFast:
    """Byte-level BPE on `count` documents; numbers are cut into pairs of digits."""
    stream = documents(seed)
    texts = [turn for _ in range(count) for turn in next(stream)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r" ?\p{N}{1,2}"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[*SPECIALS.values(), *ROLES], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    bos = SPECIALS["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **SPECIALS, additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE, model_max_length=1024, clean_up_tokenization_spaces=False)


def batches(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[torch.Tensor]:
    """Token ids (BATCH, LENGTH) cut from the documents laid end to end."""
    buffer: list[int] = []
    for turns in documents(seed):
        roles = ["user", "assistant"] * len(turns)
        text = tokenizer.apply_chat_template(
            [{"role": role, "content": turn} for role, turn in zip(roles, turns, strict=False)],
            tokenize=False) if len(turns) > 1 else f"<|begin|>{turns[0]}<|end|>"
        buffer += tokenizer.encode(text, add_special_tokens=False)
        if len(buffer) >= BATCH * LENGTH:
            yield torch.tensor(buffer[:BATCH * LENGTH]).view(BATCH, LENGTH)
            buffer = buffer[BATCH * LENGTH:]


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.5 M parameters: 4 layers, 6 heads on 2 key/value heads, tied embeddings."""
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=VOCAB_SIZE, hidden_size=192, intermediate_size=384, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True,
        max_position_embeddings=1024, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id))


def train(model: LlamaForCausalLM, stream: Iterator[torch.Tensor], steps: int) -> None:
    """AdamW with warm-up and cosine decay, in place; prints the loss (nats per token)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98),
                                  weight_decay=0.05)
    started = time.monotonic()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK_LR * min((step + 1) / WARMUP_STEPS, 1) * decay
        batch = next(stream)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(f"step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s",
                  flush=True)


def write_manifest(folder: Path) -> None:
    """`manifest.json` in `folder`: the sha256 of every file of the model and tokenizer."""
    digests = {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
               for path in sorted((folder / "model").iterdir())}
    (folder / "manifest.json").write_text(json.dumps(digests, indent=1) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=support.DATA)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--steps", type=int, default=STEPS)
    args = parser.parse_args(arguments)
    torch.set_num_threads(THREADS)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(args.seed)
    model = build_model(tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, batches(args.seed + 1, tokenizer), args.steps)
    target = args.out / "model"
    model.half().save_pretrained(target)
    tokenizer.save_pretrained(target)
    write_manifest(args.out)


if __name__ == "__main__":
    main()
