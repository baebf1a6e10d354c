"""The reference answers, as a learner would write them into the lessons' own cells."""

import inspect

from tests.lessons.test_lesson_02 import Forget
from tests.lessons.test_lesson_05 import CAREFUL

# lesson: {what the exercise's cell defines: its source}
ANSWERS = {
    "01": {
        "largest_batch": "two_sequences = four.peak_bytes - two.peak_bytes\n"
                         "fixed = two.peak_bytes - two_sequences\n"
                         "largest_batch = 2 * (120 * MIB - fixed) // two_sequences",
        "logits_at_peak": "logits_at_peak = sum(block.n_bytes for block in full.largest\n"
                          "                     if block.shape[-1:] == (1280,))",
    },
    "02": {
        "class Forget": inspect.getsource(Forget),
        "smallest_k": "smallest_k = next(k for k in range(33) if forecast(replace(\n"
                      "    eight, checkpointed_layers=k), gpus.T4).peak_allocated_bytes\n"
                      "    <= budget_bytes)",
    },
    "03": {
        "plan": "plan = {'micro_batch_size': 1, 'gradient_accumulation_steps': 32,\n"
                "        'checkpointed_layers': 20}",
        "def what_it_counts": """def what_it_counts(examples, micro_batch_size, accumulation, ranks,
                   epochs, warmup, logging_steps):
    micro_batches = math.ceil(examples / (micro_batch_size * ranks))
    steps = epochs * math.ceil(micro_batches / accumulation)
    return steps, math.ceil(warmup * steps), steps // logging_steps""",
        "def add_gradients": """def add_gradients(model, micro_batches):
    total = sum(map(batching.labelled_tokens, micro_batches))
    for micro_batch in micro_batches:
        loss = model(**micro_batch).loss * batching.labelled_tokens(micro_batch) / total
        loss.backward()""",
        "def largest_that_trains": """def largest_that_trains(train, upper):
    good, bad = 0, upper + 1
    while bad - good > 1:
        middle, fits = (good + bad) // 2, True
        try:
            train(middle)
        except torch.OutOfMemoryError:
            fits = False
        good, bad = (middle, bad) if fits else (good, middle)
    return good""",
    },
    "04": {
        "def copied_bytes": "def copied_bytes(model):\n"
                            "    return sum(2 * m.weight.numel() for m in model.modules()\n"
                            "               if isinstance(m, torch.nn.Linear))",
        "corrected": 'corrected = published | {"bnb_4bit_compute_dtype": "float16"}',
    },
    "05": {
        "best_scale": "trained_gradients = states['trained']\n"
                      "largest = max(g.abs().max().item() for g in trained_gradients)\n"
                      "best_scale = 2.0 ** math.floor(math.log2(65504 / largest))",
        "def careful_step": CAREFUL.strip(),
    },
    "06": {
        "def my_loss": """def my_loss(hidden, head, labels, chunk_tokens):
    def summed(chunk, wanted):
        return F.cross_entropy(head(chunk), wanted, reduction="sum")

    rows, targets, total = hidden[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), 0
    for pair in zip(rows.split(chunk_tokens), targets.split(chunk_tokens), strict=True):
        total = total + checkpoint(summed, *pair, use_reentrant=False)
    return total / (targets != -100).sum()""",
    },
    "07": {
        "def labels_of": """def labels_of(messages):
    ids = ids_of(messages)
    labels = [-100] * len(ids)
    for n, message in enumerate(messages):
        if message["role"] == "assistant":
            start = len(ids_of(messages[:n], True))
            end = len(ids_of(messages[:n + 1]))
            labels[start:end] = ids[start:end]
    return labels""",
    },
    "08": {
        "def loss_of_rank": """def loss_of_rank(loss_sum, my_tokens, all_reduce, ranks):
    tokens = torch.tensor(float(my_tokens))
    all_reduce(tokens)
    return loss_sum * ranks / tokens""",
    },
}  # fmt: skip
