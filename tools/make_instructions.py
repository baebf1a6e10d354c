"""Write the bundled instruction set: customer messages, each answered by a ticket.

Three ticket fields are copied from the message (customer, order, product), three are inferred
(issue, priority, next step). The rules behind the inferred ones are the tables below: the issue
follows from what went wrong, the next step from the issue, the priority from what the customer
says about time. No two messages share their wording once names, numbers and products are masked.

Not modelled: spelling mistakes, several problems in one message, other languages.

Usage: python tools/make_instructions.py [--out FILE] [--seed N] [--count N]
"""

import argparse
import json
import random
import re
from pathlib import Path

DATA = Path(__file__).resolve().parent.parent / "course_utils" / "data"
SEED, COUNT = 2026, 900

NAMES = """Ada Ahmed Aisha Alba Amir Anna Arturo Beatrix Bilal Bruno Carla Chen Clara Daniel
Dora Edith Elif Emma Esther Farah Felix Fiona Gita Greta Hana Hugo Ines Ivan Jakob Jana Joel
Julia Kofi Lena Leo Lucia Marek Maya Mei Milan Nadia Nora Omar Oscar Paula Petra Priya Rosa
Ruben Samir Sara Sofia Tariq Teresa Tomas Uma Vera Viktor Yara Zoe""".replace("\n", " ").split(" ")

PRODUCTS = """kettle; toaster; blender; desk lamp; floor lamp; office chair; garden chair;
bookshelf; headset; keyboard; backpack; suitcase; raincoat; tent; sleeping bag; bicycle pump;
coffee grinder; frying pan; rice cooker; vacuum cleaner; hair dryer; alarm clock; wall clock;
picture frame; mirror; teapot; water filter; camera bag; tripod; speaker; microphone; drill;
toolbox; ladder; carpet; blanket; pillow; fan; heater; scale""".replace("\n", " ").split("; ")

# Issue -> (what the company does next, ways a customer tells it).
ISSUES = {
    "damaged": (
        "send a replacement",
        [
            "The {product} arrived with a crack down the side.",
            "When I opened the box, the {product} was in pieces.",
            "My {product} came badly dented.",
            "The {product} was scratched all over when I unpacked it.",
            "The parcel had been crushed and the {product} inside is bent.",
            "One corner of the {product} was broken off on arrival.",
            "The courier must have dropped it: the {product} is cracked.",
            "I unpacked the {product} and found it torn and dented.",
        ],
    ),
    "late": (
        "trace the parcel",
        [
            "The {product} was due last week and is still not here.",
            "I am still waiting for my {product}.",
            "The tracking page for the {product} has not moved for days.",
            "My {product} has not been delivered yet.",
            "You promised the {product} for Monday and nothing came.",
            "Where is my {product}? It should have been here by now.",
            "There is no sign of the {product} and delivery is overdue.",
            "The {product} seems to be lost somewhere on the way.",
        ],
    ),
    "wrong item": (
        "swap the item",
        [
            "I ordered the {product} and got something else.",
            "The box did not hold the {product} that I chose.",
            "You sent a different model instead of the {product}.",
            "The {product} is blue, and I asked for the green one.",
            "I opened the parcel for the {product} and it was somebody else's order.",
            "This is not the {product} from the picture.",
            "The {product} came in the wrong size.",
            "Somebody packed the wrong thing in place of my {product}.",
        ],
    ),
    "missing part": (
        "send the part",
        [
            "The screws for the {product} were not in the box.",
            "The {product} came without its cable.",
            "There is no manual and no cover with the {product}.",
            "I unpacked the {product} and a piece is missing.",
            "The {product} is fine, but the bag of small parts was left out.",
            "Half of the accessories for the {product} are missing.",
            "I cannot find the handle that belongs to the {product}.",
            "The {product} was packed without its adapter.",
        ],
    ),
    "billing": (
        "refund the charge",
        [
            "I was charged twice for the {product}.",
            "My card shows two payments for one {product}.",
            "The invoice for the {product} is higher than the price on your site.",
            "You took the money for the {product} a second time.",
            "The discount for the {product} was not applied to my bill.",
            "I paid for the {product}, and the amount on my statement is wrong.",
            "There is an extra fee on the bill for the {product}.",
            "The bank says that you billed the {product} two times.",
        ],
    ),
    "return": (
        "send a return label",
        [
            "I changed my mind about the {product} and want to send it back.",
            "I would like to return the {product}.",
            "The {product} does not suit us, so it should go back to you.",
            "How do I give back the {product}? It is unused.",
            "I no longer need the {product} and would like to return it.",
            "We were given another {product}, so this one can go back.",
            "Please take back the {product}, I have not opened it.",
            "I want to send the {product} back within the return period.",
        ],
    ),
    "faulty": (
        "book a repair",
        [
            "The {product} stopped working after two days.",
            "My {product} worked once and then never again.",
            "After a month of use the {product} gave up.",
            "The {product} makes a loud noise and then fails.",
            "Since yesterday the {product} does nothing at all.",
            "The {product} worked well until this week, now it has a defect.",
            "A part inside the {product} has worn out far too early.",
            "The {product} keeps failing whenever I use it.",
        ],
    ),
}

# Priority -> what the customer says about time; a normal message says nothing about it.
PRIORITIES = {
    "high": [
        "This is urgent.",
        "I need it sorted out today.",
        "Please hurry.",
        "I leave on a trip tomorrow.",
        "It cannot wait.",
        "I need this by Friday.",
        "We have guests tonight, so please be quick.",
        "Please act at once.",
        "I need an answer right away.",
        "Time is short on our side.",
    ],
    "normal": [""],
    "low": [
        "There is no hurry.",
        "Take your time.",
        "It is not urgent.",
        "Whenever you have a moment.",
        "This can wait.",
        "Any time this month is fine.",
        "No rush at all.",
        "I am in no hurry with this.",
        "Next month is early enough.",
        "Please deal with the urgent cases first.",
    ],
}

GREETINGS = ["Hello,", "Hi,", "Good morning,", "Dear team,", "Hello there,", "Good evening,", ""]
WHO = [
    "My name is {customer}.",
    "This is {customer}.",
    "{customer} here.",
    "I am {customer}.",
    "{customer} speaking.",
]
SIGN_OFFS = [
    "Thanks, {customer}",
    "Best wishes, {customer}",
    "Regards, {customer}",
    "{customer}",
    "Thank you, {customer}",
    "Kind regards, {customer}",
]
ORDERS = [
    "My order number is {order}.",
    "It is order {order}.",
    "Order {order}.",
    "This is about order {order}.",
    "The order number is {order}.",
    "See order {order}.",
    "I am writing about order {order}.",
    "You will find it under order {order}.",
]
EXTRAS = [
    "",
    "",
    "I have been a customer for {years} years.",
    "I paid {price} dollars.",
    "I live at {years} Mill Road.",
    "I have photos.",
    "The rest of the order was fine.",
    "I already wrote to you on the {years}th.",
    "What can you do?",
    "Please help.",
    "I bought it for my sister.",
    "Your site was easy to use.",
    "The parcel weighed {years} kilos.",
]


def message(rng: random.Random, facts: dict) -> str:
    """One customer message that states `facts`: customer, order, product, issue, priority."""
    numbers = {"years": rng.randint(4, 19), "price": rng.randint(21, 98)}
    story = [rng.choice(ISSUES[facts["issue"]][1]), rng.choice(PRIORITIES[facts["priority"]])]
    for sentence in (rng.choice(ORDERS), rng.choice(EXTRAS)):
        story.insert(rng.randint(0, len(story)), sentence)
    if rng.random() < 0.5:
        story.insert(0, rng.choice(WHO))
    else:
        story.append(rng.choice(SIGN_OFFS))
    parts = [rng.choice(GREETINGS), *story]
    return " ".join(part for part in parts if part).format(**facts, **numbers)


def draw_facts(rng: random.Random) -> dict:
    """Random facts of one request; the order number has four digits."""
    return {
        "customer": rng.choice(NAMES),
        "order": rng.randint(1000, 9999),
        "product": rng.choice(PRODUCTS),
        "issue": rng.choice(list(ISSUES)),
        "priority": rng.choice(list(PRIORITIES)),
    }


def ticket(facts: dict) -> str:
    """The answer to a message: six lines, one field each."""
    return (
        f"Customer: {facts['customer']}\nOrder: {facts['order']}\n"
        f"Product: {facts['product']}\nIssue: {facts['issue']}\n"
        f"Priority: {facts['priority']}\nNext step: {ISSUES[facts['issue']][0]}"
    )


def wording(text: str, facts: dict) -> str:
    """The message with customer, product, numbers, case and punctuation masked."""
    for field in ("product", "customer"):
        text = text.replace(facts[field], field.upper())
    return re.sub(r"[\W_\d]+", " ", text).strip().lower()


def examples(seed: int = SEED, count: int = COUNT) -> list[dict]:
    """`count` examples with distinct wording and distinct order numbers."""
    rng, rows, seen = random.Random(seed), [], set()
    orders = rng.sample(range(1000, 10000), count)
    while len(rows) < count:
        facts = draw_facts(rng) | {"order": orders[len(rows)]}
        prompt = message(rng, facts)
        if wording(prompt, facts) not in seen:
            seen.add(wording(prompt, facts))
            rows.append({"prompt": prompt, "answer": ticket(facts)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=DATA / "instructions.jsonl")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--count", type=int, default=COUNT)
    args = parser.parse_args()
    lines = [json.dumps(row, ensure_ascii=False) for row in examples(args.seed, args.count)]
    args.out.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    print(f"{len(lines)} examples, {args.out.stat().st_size} bytes: {args.out}")


if __name__ == "__main__":
    main()
