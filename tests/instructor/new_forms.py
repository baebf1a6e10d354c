"""Answers to lessons 06's and 07's assignments as students write them, right ones and wrong ones.

Written from the notebooks' texts alone, not from the solutions.
"""

RIGHT = {
    "loss_in_chunks": [
        """def loss_in_chunks(logits, labels, chunk_tokens):
    flat = []
    for r in range(len(labels)):
        for p in range(len(labels[r]) - 1):
            flat.append((logits[r][p], labels[r][p + 1]))
    losses = []
    biggest = 0
    for i in range(0, len(flat), chunk_tokens):
        part = flat[i : i + chunk_tokens]
        biggest = max(biggest, len(part) * len(flat[0][0]))
        losses += [math.log(sum(math.exp(v) for v in row)) - row[t] for row, t in part if t >= 0]
    return [sum(losses) / len(losses), biggest]""",
        """def loss_in_chunks(logits, labels, chunk_tokens):
    def nll(row, t):
        m = max(row)
        return m + math.log(sum(math.exp(x - m) for x in row)) - row[t]
    rows = sum((row[:-1] for row in logits), [])
    ts = sum((row[1:] for row in labels), [])
    total = n = 0
    while_left = list(zip(rows, ts))
    most = 0
    while while_left:
        chunk, while_left = while_left[:chunk_tokens], while_left[chunk_tokens:]
        most = max(most, sum(len(r) for r, _ in chunk))
        total += sum(nll(r, t) for r, t in chunk if t != -100)
        n += sum(t != -100 for _, t in chunk)
    return total / n, most""",
        """from itertools import islice
def batches(items, n):
    it = iter(items)
    while chunk := list(islice(it, n)):
        yield chunk
def loss_in_chunks(logits, labels, chunk_tokens):
    pairs = ((a, b) for row, lab in zip(logits, labels) for a, b in zip(row, lab[1:]))
    sums, counts, sizes = [], [], []
    for chunk in batches(pairs, chunk_tokens):
        wanted = [(a, b) for a, b in chunk if b != -100]
        sums.append(-sum(math.log(math.exp(a[b]) / sum(map(math.exp, a))) for a, b in wanted))
        counts.append(len(wanted))
        sizes.append(len(chunk) * len(chunk[0][0]))
    return [sum(sums) / sum(counts), max(sizes)]""",
        """import statistics
def loss_in_chunks(logits, labels, chunk_tokens):
    # how it is chunked does not change the mean
    values = [
        math.log(sum(math.exp(x) for x in logits[r][p])) - logits[r][p][labels[r][p + 1]]
        for r in range(len(logits)) for p in range(len(logits[r]) - 1) if labels[r][p + 1] != -100
    ]
    positions = len(logits) * (len(logits[0]) - 1)
    return [statistics.fmean(values), min(positions, chunk_tokens) * len(logits[0][0])]""",
        """class Loss:
    IGNORED = -100
    def __init__(self):
        self.total, self.count, self.most = 0.0, 0, 0
    def add(self, rows, targets):
        self.most = max(self.most, sum(map(len, rows)))
        for row, target in zip(rows, targets):
            if target == self.IGNORED:
                continue
            self.total -= row[target] - math.log(math.fsum(map(math.exp, row)))
            self.count += 1
loss_in_chunks = lambda logits, labels, chunk_tokens: run(logits, labels, chunk_tokens)
def run(logits, labels, chunk_tokens):
    rows = [x for row in logits for x in row[:-1]]
    targets = [x for row in labels for x in row[1:]]
    loss = Loss()
    for i in range(math.ceil(len(rows) / chunk_tokens)):
        here = slice(i * chunk_tokens, (i + 1) * chunk_tokens)
        loss.add(rows[here], targets[here])
    return [loss.total / loss.count, loss.most]""",
    ],
    "logits_bytes": [
        """def logits_bytes(rows, length, vocabulary, chunk_tokens):
    usual = rows * length * vocabulary * 4 * 3
    if rows * length < chunk_tokens:
        return [usual, usual]
    return [usual, chunk_tokens * vocabulary * 4 * 3]""",
        """COPIES, FLOAT32_BYTES = 3, 4
def logits_bytes(rows, length, vocabulary, chunk_tokens):
    per_position = COPIES * FLOAT32_BYTES * vocabulary
    return rows * length * per_position, min(chunk_tokens, rows * length) * per_position""",
        """def logits_bytes(rows, length, vocabulary, chunk_tokens):
    n = rows * length
    most = n if n < chunk_tokens else chunk_tokens
    return [12.0 * vocabulary * n, 12.0 * vocabulary * most]""",
        """def logits_bytes(*args):
    b, s, v, c = args
    chunks = [len(range(i, min(i + c, b * s))) for i in range(0, b * s, c)]
    return [12 * v * sum(chunks), 12 * v * max(chunks)]""",
        """logits_bytes = lambda rows, length, vocabulary, chunk_tokens: [
    12 * vocabulary * sorted([rows * length, k])[0] for k in (float("inf"), chunk_tokens)]""",
    ],
    "fewest_levers": [
        """def fewest_levers(moments, left, budget_mib):
    n = len(left)
    best = -1
    for mask in range(2 ** n):
        chosen = [p for p in range(n) if mask & (1 << p)]
        if any(left[p] is None for p in chosen):
            continue
        ok = True
        for moment in moments:
            total = 0
            for p in range(n):
                total += min(moment[p], left[p]) if p in chosen else moment[p]
            if total > budget_mib:
                ok = False
        if ok and (best == -1 or len(chosen) < best):
            best = len(chosen)
    return best""",
        """def fewest_levers(moments, left, budget_mib):
    def best(p, now):
        if all(sum(m) <= budget_mib for m in now):
            return 0
        if p == len(left):
            return 99
        without = best(p + 1, now)
        if left[p] is None:
            return without
        pulled = [m[:p] + [min(m[p], left[p])] + m[p + 1:] for m in now]
        return min(without, 1 + best(p + 1, pulled))
    found = best(0, [list(m) for m in moments])
    return found if found < 99 else -1""",
        """from itertools import product
def fewest_levers(moments, left, budget_mib):
    fits = []
    for pull in product([False, True], repeat=len(left)):
        if any(on and rest is None for on, rest in zip(pull, left)):
            continue
        peaks = [sum(min(x, rest) if on else x for x, on, rest in zip(m, pull, left))
                 for m in moments]
        if max(peaks) <= budget_mib:
            fits.append(sum(pull))
    return min(fits, default=-1)""",
        """from collections import deque
def fewest_levers(moments, left, budget_mib):
    start = tuple(map(tuple, moments))
    queue, seen = deque([(start, 0)]), {start}
    while queue:
        state, pulled = queue.popleft()
        if max(map(sum, state)) <= budget_mib:
            return pulled
        for p, rest in enumerate(left):
            if rest is None:
                continue
            after = tuple(tuple(min(x, rest) if i == p else x for i, x in enumerate(m))
                          for m in state)
            if after not in seen:
                seen.add(after)
                queue.append((after, pulled + 1))
    return -1""",
        """import itertools as it
def fewest_levers(moments, left, budget_mib):
    saves = {p: [max(0, m[p] - rest) for m in moments]
             for p, rest in enumerate(left) if rest is not None}
    over = [sum(m) - budget_mib for m in moments]
    for k in range(len(saves) + 1):
        for some in it.combinations(saves.values(), k):
            if all(sum(s[i] for s in some) >= o for i, o in enumerate(over)):
                return k
    return -1""",
    ],
    "labels_of": [
        """def labels_of(turns):
    labels = []
    for role, header, words, end in turns:
        labels.extend([-100] * len(header))
        if role == "assistant":
            labels.extend(words)
            labels.extend(end)
        else:
            labels.extend([-100] * (len(words) + len(end)))
    return labels""",
        """def labels_of(turns):
    return [
        token if turn[0] == "assistant" and part > 1 else -100
        for turn in turns for part in (1, 2, 3) for token in turn[part]
    ]""",
        """def labels_of(turns):
    ids = sum((h + w + e for _, h, w, e in turns), [])
    labels = [-100 for _ in ids]
    at = 0
    for role, h, w, e in turns:
        first, last = at + len(h), at + len(h + w + e)
        if role == "assistant":
            labels[first:last] = ids[first:last]
        at = last
    return labels""",
        """from itertools import chain
IGNORE = -100
def mask(ids): return [IGNORE] * len(ids)
def one(turn):
    match turn:
        case ["assistant", header, words, end]:
            return mask(header) + words + end
        case [_, *parts]:
            return [x for part in parts for x in mask(part)]
def labels_of(turns):
    return tuple(chain.from_iterable(map(one, turns)))""",
        """def labels_of(turns):
    if not turns:
        return []
    (role, header, words, end), *rest = turns
    here = [-100] * len(header)
    here += (words + end) if role == "assistant" else [-100] * len(words + end)
    return here + labels_of(rest)""",
    ],
    "adapter_parameters": [
        """def adapter_parameters(layers, hidden, kv, intermediate, rank, targets):
    total = 0
    for t in targets:
        if t in ("q", "o"):
            total += rank * hidden + hidden * rank
        elif t in ("k", "v"):
            total += rank * hidden + kv * rank
        elif t in ("gate", "up"):
            total += rank * hidden + intermediate * rank
        else:
            total += rank * intermediate + hidden * rank
    return layers * total""",
        """def adapter_parameters(layers, hidden, kv, intermediate, rank, targets):
    shapes = dict(q=(hidden, hidden), k=(hidden, kv), v=(hidden, kv), o=(hidden, hidden),
                  gate=(hidden, intermediate), up=(hidden, intermediate),
                  down=(intermediate, hidden))
    return sum(rank * sum(shapes[name]) for name in targets) * layers""",
        """def adapter_parameters(layers, hidden, kv, intermediate, rank, targets):
    def out(name):
        return {"q": hidden, "k": kv, "v": kv, "o": hidden}.get(name, intermediate)
    return sum(layers * rank * (hidden + out(t)) for t in targets)""",
        """def adapter_parameters(layers, hidden, kv, intermediate, rank, targets):
    n = 0
    for _ in range(layers):
        for t in targets:
            match t:
                case "q" | "o": a, b = hidden, hidden
                case "k" | "v": a, b = hidden, kv
                case "down": a, b = intermediate, hidden
                case _: a, b = hidden, intermediate
            n += rank * a + b * rank
    return n""",
        """def adapter_parameters(layers, hidden, kv, intermediate, rank, targets):
    other = sum(("q" in targets, "o" in targets)) * hidden
    other += (targets.count("k") + targets.count("v")) * kv
    other += sum(targets.count(t) for t in ("gate", "up", "down")) * intermediate
    return float(layers * rank * (len(targets) * hidden + other))""",
    ],
    "base_bytes": [
        """def base_bytes(matrices, other_parameters):
    total = other_parameters * 2
    for rows, cols in matrices:
        n = rows * cols
        blocks = math.ceil(n / 64)
        total += n // 2 + blocks + 4 * math.ceil(blocks / 256)
    return total""",
        """def base_bytes(matrices, other_parameters):
    def up(a, b):
        return (a + b - 1) // b
    return 2 * other_parameters + sum(
        o * i / 2 + up(o * i, 64) + 4 * up(up(o * i, 64), 256) for o, i in matrices)""",
        """def base_bytes(matrices, other_parameters):
    weights = scales = floats = 0
    for o, i in matrices:
        q, r = divmod(o * i, 64)
        s = q + (r > 0)
        weights += o * i
        scales += s
        q, r = divmod(s, 256)
        floats += q + bool(r)
    return weights // 2 + scales + floats * 4 + other_parameters * 2""",
        """def base_bytes(matrices, other_parameters):
    bits = 16 * other_parameters
    for shape in matrices:
        size = math.prod(shape)
        bits += 4 * size
        bits += 8 * len(range(0, size, 64))
        bits += 32 * len(range(0, len(range(0, size, 64)), 256))
    return bits // 8""",
        """from fractions import Fraction
def base_bytes(matrices, other_parameters):
    parts = [Fraction(2 * other_parameters)]
    for a, b in matrices:
        scales = -(-a * b // 64)
        parts += [Fraction(a * b, 2), Fraction(scales), Fraction(4 * -(-scales // 256))]
    return sum(parts)""",
    ],
}

# By exercise: the mistake's name in the assignment, which right form it is made of, and what for
# what.
WRONG = {
    "loss_in_chunks": [
        (
            "not shifted",
            0,
            {
                "range(len(labels[r]) - 1)": "range(len(labels[r]))",
                "labels[r][p + 1]": "labels[r][p]",
            },
        ),
        ("all positions", 0, {"/ len(losses)": "/ len(flat)"}),
        ("a sum", 0, {" / len(losses)": ""}),
        ("positions, not logits", 0, {"len(part) * len(flat[0][0])": "len(part)"}),
    ],
    "logits_bytes": [
        ("16 bits", 1, {"3, 4": "3, 2"}),
        ("one copy", 1, {"3, 4": "1, 4"}),
        ("a chunk is always full", 1, {"min(chunk_tokens, rows * length)": "chunk_tokens"}),
        ("without the last", 0, {"rows * length * vocabulary": "rows * (length - 1) * vocabulary"}),
    ],
    "fewest_levers": [
        ("adds moments up", 2, {"max(peaks)": "sum(peaks)"}),
        ("one moment is enough", 2, {"max(peaks)": "min(peaks)"}),
        ("only the highest moment", 2, {"for m in moments]": "for m in [max(moments, key=sum)]]"}),
        ("wholly gone", 2, {"sum(min(x, rest) if": "sum(0 if"}),
    ],
    "labels_of": [
        ("the header is learned", 1, {" and part > 1": ""}),
        ("never stops", 1, {"part > 1": "part == 2"}),
        ("learns the questions", 1, {'"assistant"': '"user"'}),
        (
            "nothing is masked",
            1,
            {'token if turn[0] == "assistant" and part > 1 else -100': "token"},
        ),
    ],
    "adapter_parameters": [
        ("one layer", 1, {" * layers": ""}),
        ("A only", 1, {"sum(shapes[name])": "hidden"}),
        ("no grouped queries", 1, {"(hidden, kv)": "(hidden, hidden)"}),
        ("the weights", 1, {"rank * sum(shapes[name])": "math.prod(shapes[name])"}),
    ],
    "base_bytes": [
        ("embeddings in 4 bits", 0, {"other_parameters * 2": "other_parameters // 2"}),
        ("no scales", 0, {" + blocks + 4 * math.ceil(blocks / 256)": ""}),
        ("scales without theirs", 0, {" + 4 * math.ceil(blocks / 256)": ""}),
        ("a byte a weight", 0, {"n // 2": "n"}),
    ],
}
