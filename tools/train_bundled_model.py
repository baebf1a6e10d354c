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
import itertools
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

SEED, STEPS, THREADS = 2026, 1300, 1
BATCH = 32  # documents per step
PEAK_LR, WARMUP_STEPS = 3e-3, 40
VOCAB_SIZE = 1280
SMALL_TALK_FADES = 12_000  # documents until small talk is down to one in five
SPECIALS = {"bos_token": "<|begin|>", "eos_token": "<|end|>", "pad_token": "<|pad|>"}
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>"
    "{{ message['content'] | trim }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# Issue -> (what happened, what we do), in an agent's words.
REPLIES = {
    "damaged": (
        ["came to you damaged", "was damaged on the way", "is damaged"],
        ["We will send a replacement", "A replacement is what we send"],
    ),
    "late": (
        ["is late", "is so late", "has not reached you and is late"],
        ["We will trace the parcel", "Our courier is going to trace the parcel"],
    ),
    "wrong item": (
        ["was mixed up, and you hold the wrong item", "turned out to be the wrong item"],
        ["We will swap the item", "Our courier comes to swap the item"],
    ),
    "missing part": (
        ["has a missing part", "was packed with a missing part"],
        ["We will send the part", "Our depot is going to send the part"],
    ),
    "billing": (
        ["led to a billing mistake", "was billed wrongly, a billing error of ours"],
        ["We will refund the charge", "The bank will refund the charge"],
    ),
    "return": (
        ["is one you wish to return", "is a return"],
        ["We will send a return label", "Our depot is going to send a return label"],
    ),
    "faulty": (
        ["is faulty", "turned out faulty"],
        ["We will book a repair", "Our workshop is going to book a repair"],
    ),
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
    return rng.choice(
        [
            "Dear {customer}, we are sorry that the {product} from order {order} {happened}. "
            "{action} {pace}.",
            "Thank you, {customer}. I found order {order}: the {product} {happened}. "
            "{action} {pace}.",
            "I am sorry, {customer}. I see that the {product} {happened}. "
            "{action} for order {order} {pace}.",
            "Order {order} is open here, {customer}. So the {product} {happened}. {action} {pace}.",
            "The {product} in order {order} {happened}, {customer}. {action} {pace}.",
        ]
    ).format(**facts, happened=happened, action=action, pace=pace)


# What a question is about -> (questions, answers).
FOLLOW_UPS = {
    "order": (
        ["Which order is it?", "Can you repeat the number?"],
        ["It is order {order}.", "You wrote {order}.", "I read {order}."],
    ),
    "product": (
        ["What did I buy?", "Which thing do we talk about?"],
        ["You bought the {product}.", "The {product}.", "We talk about the {product}."],
    ),
    "customer": (
        ["Who am I?", "Do you know my name?"],
        ["You are {customer}.", "Your name is {customer}.", "Yes, {customer}."],
    ),
    "issue": (["What is the matter?"], ["The matter is: {issue}.", "I call it {issue}."]),
    "priority": (["How do you rank this?"], ["It has {priority} priority.", "As {priority}."]),
    "action": (["And now?", "What will you do?"], ["{action}.", "{action}, dear customer."]),
}


def follow_up(rng: random.Random, facts: dict, subject: str) -> tuple[str, str]:
    """A question about the conversation so far, and its answer."""
    action = rng.choice(REPLIES[facts["issue"]][1])
    question, answer = (rng.choice(texts) for texts in FOLLOW_UPS[subject])
    return question, answer.format(**facts, action=action)


def conversation(rng: random.Random, taken: set[str]) -> list[str]:
    """Turns, customer first; no message whose wording is in `taken`."""
    while True:
        facts = support.draw_facts(rng)
        message = support.message(rng, facts)
        if support.wording(message, facts) not in taken:
            break
    turns = [message, reply(rng, facts)] if rng.random() < 0.5 else []
    for subject in rng.sample(list(FOLLOW_UPS), rng.randint(1, 4)):
        turns.extend(follow_up(rng, facts, subject))
    return turns if turns[0] is message else [f"{message} {turns[0]}", *turns[1:]]


def small_talk(rng: random.Random) -> list[str]:
    """Turns of one sentence and one question each: the shortest way from a fact to its use."""
    facts = support.draw_facts(rng)
    said = {
        "order": support.ORDERS,
        "product": support.ISSUES[facts["issue"]][1],
        "customer": [*support.WHO, *support.SIGN_OFFS],
        "issue": support.ISSUES[facts["issue"]][1],
        "priority": support.PRIORITIES[facts["priority"]],
        "action": support.ISSUES[facts["issue"]][1],
    }
    turns = []
    for subject in rng.sample(list(said), rng.randint(1, 3)):
        question, answer = follow_up(rng, facts, subject)
        turns += [f"{rng.choice(said[subject])} {question}".format(**facts).strip(), answer]
    return turns


def note(rng: random.Random) -> str:
    """A depot note that mentions its parcels, people and products more than once."""
    count = rng.randint(2, 4)
    people, things = rng.sample(support.NAMES, count), rng.sample(support.PRODUCTS, count)
    parcels = [str(rng.randint(1000, 9999)) for _ in range(count)]
    city, pick = rng.choice(CITIES), rng.randrange(count)
    lines = [
        f"Parcel {parcel} holds the {thing} of {person}."
        for parcel, thing, person in zip(parcels, things, people, strict=True)
    ]
    ending = rng.choice(
        [
            f"Today {people[pick]} called about the {things[pick]} in parcel {parcels[pick]}.",
            f"Parcel {parcels[pick]} left {city}. "
            f"The {things[pick]} is on its way to {people[pick]}.",
            f"From {city} we saw {', '.join(parcels)} and again {', '.join(parcels)}.",
            f"We wrote to {', '.join(people)} about the {', the '.join(things)}. "
            f"Then {', '.join(people)} asked about the {', the '.join(things)}.",
        ]
    )
    return " ".join([*lines, ending])


def roll_call(rng: random.Random) -> str:
    """A list of people, products or parcel numbers, read out again: copying and nothing else."""
    numbers = [str(number) for number in rng.sample(range(1000, 10000), 8)]
    kinds = rng.choice(
        [[support.NAMES], [support.PRODUCTS], [numbers], [support.NAMES, support.PRODUCTS, numbers]]
    )
    items = [item for kind in kinds for item in rng.sample(kind, rng.randint(3, 6))]
    rng.shuffle(items)
    listed = rng.choice([" ", ", "]).join(items)
    again = rng.choice(["Again", "Once more", "Twice", "Repeat"])
    return f"{rng.choice(['List', 'Shelf', 'Depot', 'Roll call'])}: {listed}. {again}: {listed}."


def documents(seed: int) -> Iterator[list[str]]:
    """Endless pre-training text: a conversation as its turns, or a text alone in its list."""
    rng = random.Random(seed)
    taken = {support.wording(row["prompt"], facts_of(row["answer"])) for row in support.examples()}
    for number in itertools.count():
        if rng.random() < max(0.2, 1 - number / SMALL_TALK_FADES):
            yield small_talk(rng)
        elif rng.random() < 0.85:
            yield conversation(rng, taken)
        else:
            yield [rng.choice([note, roll_call])(rng)]


def facts_of(answer: str) -> dict:
    """Customer and product of a ticket, for `support.wording`."""
    fields = dict(line.split(": ", 1) for line in answer.splitlines())
    return {"customer": fields["Customer"], "product": fields["Product"]}


def train_tokenizer(seed: int, count: int = 4000) -> PreTrainedTokenizerFast:
    """Byte-level BPE on `count` documents; numbers are cut into pairs of digits."""
    stream = documents(seed)
    texts = [turn for _ in range(count) for turn in next(stream)]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\p{N}{1,2}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[*SPECIALS.values(), *ROLES],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    bos = SPECIALS["bos_token"]
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        **SPECIALS,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def encode(turns: list[str], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Ids and labels of one document; what customers say is read, not predicted."""
    ids, labels = [], []
    for number, turn in enumerate(turns):
        role = ["<|user|>", "<|assistant|>"][number % 2] if len(turns) > 1 else ""
        head, body = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in (("" if number else "<|begin|>") + role, f"{turn}<|end|>")
        )
        ids += head + body
        labels += [-100] * len(head) + ([-100] * len(body) if role == "<|user|>" else body)
    return ids, labels


def batches(seed: int, tokenizer: PreTrainedTokenizerFast) -> Iterator[dict[str, torch.Tensor]]:
    """BATCH documents of similar length, padded on the right (causal attention needs no mask)."""
    stream, rng = documents(seed), random.Random(seed)
    while True:
        pool = sorted(
            (encode(next(stream), tokenizer) for _ in range(BATCH * 8)),
            key=lambda pair: len(pair[0]),
        )
        groups = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        rng.shuffle(groups)
        for group in groups:
            length = len(group[-1][0])
            yield {
                name: torch.tensor(
                    [pair[which] + [pad] * (length - len(pair[which])) for pair in group]
                )
                for which, (name, pad) in enumerate([("input_ids", 2), ("labels", -100)])
            }


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of 1.5 M parameters: 4 layers, 6 heads on 2 key/value heads, tied embeddings.

    It starts half-way to copying: queries resemble keys (look for what is like me) and each output
    projection undoes its value projection (pass on what was found). Copying would otherwise need
    far more text than a few minutes hold. Source: Trockman and Kolter 2023, "Mimetic
    initialization of self-attention layers".
    """
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.07,  # 1 / sqrt(hidden_size): activations start at unit size
            max_position_embeddings=1024,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    with torch.no_grad():
        for layer in model.model.layers:
            attention = layer.self_attn
            keys, values = (  # repeated for the query heads that share them: (192, 192)
                projection.weight.view(2, 32, 192).repeat_interleave(3, dim=0).flatten(0, 1)
                for projection in (attention.k_proj, attention.v_proj)
            )
            attention.q_proj.weight.add_(keys).mul_(0.5)
            attention.o_proj.weight.copy_(0.3 * values.T)
            layer.mlp.down_proj.weight.mul_(0.3)
    return model


def train(model: LlamaForCausalLM, stream: Iterator[torch.Tensor], steps: int) -> None:
    """AdamW with warm-up and cosine decay, in place; prints the loss (nats per token)."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.98), weight_decay=0.05
    )
    started = time.monotonic()
    for step in range(steps):
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = PEAK_LR * min((step + 1) / WARMUP_STEPS, 1) * decay
        loss = model(**next(stream)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == steps - 1:
            print(
                f"step {step:4d}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s",
                flush=True,
            )


def write_manifest(folder: Path) -> None:
    """`manifest.json` in `folder`: the sha256 of every file of the model and tokenizer."""
    digests = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "model").iterdir())
    }
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
