"""Right notebooks as real students write them: each should get full marks in `effective_batch`.

`SOL` are right answers by function name; `V` says how a notebook differs: changed answers, cells
before, after, at the end, at the top. A Jupyter kernel that runs each from top to bottom says
"Right" for all 14 (but for numpy, which the assignment's notebook should name as not graded).
"""

# Kept as it came: its lines are what students wrote.
# ruff: noqa
# fmt: off
SOL = {
"effective_batch_size": '''def effective_batch_size(micro_batch_size, gradient_accumulation_steps, world_size):
    return math.prod([micro_batch_size, gradient_accumulation_steps, world_size])
''',
"micro_batch_for": '''def micro_batch_for(effective_batch_size, gradient_accumulation_steps, world_size):
    d = gradient_accumulation_steps * world_size
    if effective_batch_size % d:
        return 0
    return effective_batch_size // d
''',
"split_for": '''def split_for(effective_batch_size, world_size, budget_mib, fixed_mib, sequence_mib):
    share = effective_batch_size // world_size
    m = min((budget_mib - fixed_mib) // sequence_mib, share)
    while share % m:
        m -= 1
    return (m, share // m)
''',
"accumulation_on": '''def accumulation_on(effective_batch_size, micro_batch_size, nodes, gpus_per_node):
    w = nodes * gpus_per_node
    return [w, effective_batch_size / micro_batch_size / w]
''',
"steps_for": '''def steps_for(token_budget, micro_batch_size, gradient_accumulation_steps, world_size, sequence_length):
    t = micro_batch_size * gradient_accumulation_steps * world_size * sequence_length
    return [t, math.ceil(token_budget / t)]
''',
"real_and_padded": '''def real_and_padded(lengths, micro_batch_size):
    padded = 0
    i = 0
    while i < len(lengths):
        chunk = lengths[i:i + micro_batch_size]
        padded += max(chunk) * len(chunk)
        i += micro_batch_size
    return [sum(lengths), padded]
''',
"last_update": '''def last_update(examples, effective_batch_size, epochs):
    per = math.ceil(examples / effective_batch_size)
    rest = examples - (per - 1) * effective_batch_size
    return [per * epochs, rest]
''',
"learning_rate": '''def learning_rate(step, steps, warmup_percent, peak):
    w = math.ceil(steps * warmup_percent / 100)
    if step < w:
        return peak * (step / w)
    return peak * ((steps - step) / (steps - w))
''',
"last_line": '''def last_line(examples, micro_batch_size, gradient_accumulation_steps, epochs, logging_steps):
    b = micro_batch_size * gradient_accumulation_steps
    seen, done, lines, at = 0, 0, 0, 0
    for _ in range(epochs):
        left = examples
        while left > 0:
            take = min(b, left)
            left -= take
            seen += take
            done += 1
            if done % logging_steps == 0:
                lines += 1
                at = seen
    return [lines, at]
''',
"mean_over_tokens": '''def mean_over_tokens(means, tokens):
    return sum((m or 0) * t for m, t in zip(means, tokens)) / sum(tokens)
''',
"combined_gradient": '''def combined_gradient(ranks):
    flat = sum(ranks, [])
    total = sum(t for t, g in flat)
    return [sum(t * x for (t, _), x in zip(flat, col)) / total for col in zip(*(g for _, g in flat))]
''',
"largest_micro_batch": '''def largest_micro_batch(per_rank, fits):
    divs = [d for d in range(1, per_rank + 1) if not per_rank % d]
    lo, hi = 0, len(divs)
    while lo < hi:
        mid = (lo + hi) // 2
        if fits(divs[mid]):
            lo = mid + 1
        else:
            hi = mid
    return divs[lo - 1] if lo else 0
''',
"update_seconds": '''def update_seconds(micro_batch_size, gradient_accumulation_steps, sequence_length, parameters, tflops_per_s, gb_per_s):
    c = 6 * parameters * micro_batch_size * sequence_length / tflops_per_s / 1e12
    r = 6 * parameters / gb_per_s / 1e9
    return max(c, r) * gradient_accumulation_steps
''',
"compare_cards": '''def compare_cards(t4, a10, fixed_mib, sequence_mib, weighting):
    def need(c):
        return fixed_mib + c[0] * sequence_mib
    b1, b2 = t4[0] * t4[1], a10[0] * a10[1]
    return dict(fits=(need(t4) <= t4[3], need(a10) <= a10[3]),
                same_update=weighting == "tokens" and b1 == b2,
                times_faster=a10[2] / t4[2],
                update_ratio=(b1 / t4[2]) / (b2 / a10[2]))
''',
}

def edit(changes=(), before=(), after=(), end=(), top=()):
    return dict(changes=dict(changes), before=list(before), after=list(after), end=list(end), top=list(top))

S = SOL
V = {
 'plain': edit(),
 'scratch_sum_at_end': edit(end=['sum = 0\nfor n in [1, 2, 3]:\n    sum += n\nprint(sum)']),
 'helper_same_name_twice': edit({'last_update':'def up(a, b):\n    return -(-a // b)\n\n'+S['last_update'].replace('math.ceil(examples / effective_batch_size)','up(examples, effective_batch_size)'),
   'learning_rate':'def up(x):\n    return math.ceil(x)\n\n'+S['learning_rate'].replace('math.ceil(steps * warmup_percent / 100)','up(steps * warmup_percent / 100)')}),
 'table_filled_by_loop': edit({'largest_micro_batch':'DIVS = {}\nfor n in range(1, 400):\n    DIVS[n] = [d for d in range(1, n + 1) if n % d == 0]\n\n'+S['largest_micro_batch'].replace('[d for d in range(1, per_rank + 1) if not per_rank % d]','DIVS[per_rank]')}),
 'function_attribute': edit({'update_seconds':'def flops(p, t):\n    flops.calls += 1\n    return 6 * p * t\nflops.calls = 0\n\n'+S['update_seconds'].replace('6 * parameters * micro_batch_size * sequence_length','flops(parameters, micro_batch_size * sequence_length)')}),
 'setattr_globals': edit({'update_seconds':'globals()["TERA"] = 1e12\n\n'+S['update_seconds'].replace('1e12','TERA')}),
 'automagic_pip': edit({'split_for':'pip install tqdm\n'+S['split_for']}),
 'bang_continued': edit({'split_for':'!pip install -q \\\n    tqdm\n'+S['split_for']}),
 'percent_assign': edit({'split_for':'out = !ls\nt = %timeit -o 1+1\n'+S['split_for']}),
 'time_cell': edit({'split_for':'%%time\n'+S['split_for']}),
 'time_blank_first': edit({'split_for':'\n%%time\n'+S['split_for']}),
 'capture_out': edit({'split_for':'%%capture out\n'+S['split_for']}),
 'double_q': edit({'split_for':S['split_for']+'\n?split_for\nsplit_for??\n'}),
 'await_scratch': edit(end=['import asyncio\nawait asyncio.sleep(0)']),
 'return_scratch': edit(end=['return 5']),
 'fstring_newline_scratch': edit(end=['names = ["a"]\nprint(f"""{\'\'\'\n\'\'\'.join(names)}""")']),
 'fstring_tab_scratch': edit(end=['print(f"{\'\t\'.join([])}")']),
 'long_sum_scratch': edit(end=['x = ' + ' + '.join(['1']*400)]),
 'long_string_concat': edit(end=['x = ' + ' + '.join(['"line %d\\n"' % i for i in range(260)])]),
 'long_elif': edit(end=['n=3\nif n == 0: pass\n' + ''.join(f'elif n == {i}: pass\n' for i in range(1,300))]),
 'big_data_cell': edit(end=['DATA = ' + repr(list(range(200000)))]),
 'dataclass_helper': edit({'compare_cards':'from dataclasses import dataclass\n@dataclass\nclass Card:\n    micro: int\n    acc: int\n    speed: float\n    mib: int\n    @property\n    def batch(self):\n        return self.micro * self.acc\n\ndef compare_cards(t4, a10, fixed_mib, sequence_mib, weighting):\n    a, b = Card(*t4), Card(*a10)\n    return {"fits": [fixed_mib + c.micro * sequence_mib <= c.mib for c in (a, b)], "same_update": a.batch == b.batch and weighting == "tokens", "times_faster": b.speed / a.speed, "update_ratio": b.speed / a.speed * a.batch / b.batch}\n'}),
 'namedtuple_answer': edit({'split_for':'from collections import namedtuple\nSplit = namedtuple("Split", "m a")\n'+S['split_for'].replace('return (m, share // m)','return Split(m, share // m)')}),
 'lru_cache': edit({'steps_for':'import functools\n@functools.lru_cache(maxsize=None)\n'+S['steps_for']}),
 'typed': edit({'steps_for':S['steps_for'].replace('sequence_length):','sequence_length: "int") -> list[int]:')}),
 'typed_torch': edit({'steps_for':S['steps_for'].replace('sequence_length):','sequence_length: "torch.Tensor"):')}),
 'try_numpy': edit({'steps_for':'try:\n    import numpy as np\nexcept ImportError:\n    np = None\n'+S['steps_for']}),
 'import_line_with_numpy': edit({'steps_for':'import numpy, math\n'+S['steps_for']}),
 'fraction_to_float': edit({'mean_over_tokens':'from fractions import Fraction\ndef mean_over_tokens(means, tokens):\n    return float(sum(Fraction(m or 0) * t for m, t in zip(means, tokens)) / sum(tokens))\n'}),
 'fraction_answer': edit({'mean_over_tokens':'from fractions import Fraction\ndef mean_over_tokens(means, tokens):\n    return sum(Fraction(m or 0) * t for m, t in zip(means, tokens)) / sum(tokens)\n'}),
 'changes_its_arguments': edit({'mean_over_tokens':'def mean_over_tokens(means, tokens):\n    for i in range(len(means)):\n        if means[i] is None:\n            means[i] = 0\n    return sum(m*t for m, t in zip(means, tokens)) / sum(tokens)\n'}),
 'generator_answer': edit({'combined_gradient':S['combined_gradient'].replace('return [','return list(').replace('*(g for _, g in flat))]','*(g for _, g in flat)))')}),
 'prints_a_lot': edit({'last_line':S['last_line'].replace('            done += 1','            done += 1\n            print("step", done, "seen", seen)')}),
 'nested_quotes_312': edit({'compare_cards':S['compare_cards'].replace('    b1, b2',"    label = f\"{dict(a=1)[\"a\"]}\"\n    b1, b2")}),
 'generic_312': edit({'compare_cards':S['compare_cards'].replace('def compare_cards(','def compare_cards[T](')}),
 'exercise_in_one_cell': edit(dict({k:'pass' for k in S}, compare_cards='\n'.join(S.values()))),
 'id_as_int': edit(),
 'slow_but_right': edit({'steps_for':'def steps_for(token_budget, a, b, c, d):\n    t = a * b * c * d\n    n = 0\n    while n * t < token_budget:\n        n += 1\n    return [t, n]\n'}),
 'slow_count_tokens': edit({'steps_for':'def steps_for(token_budget, a, b, c, d):\n    t = a * b * c * d\n    steps, seen = 0, 0\n    for token in range(token_budget):\n        if token % t == 0:\n            steps += 1\n    return [t, steps]\n'}),
 'recursion': edit({'last_line':'import sys\nsys.setrecursionlimit(10000)\ndef depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\n'+S['last_line'].replace('    b = ','    assert depth(2000) == 2000\n    b = ')}),
 'tail_stub_left': edit({'effective_batch_size':'# mine\n'+S['effective_batch_size']+'\n# def effective_batch_size(...): return ...\n'}),
 'walrus_etc': edit({'steps_for':'def steps_for(token_budget, a, b, c, d):\n    return [t := a * b * c * d, -(-token_budget // t)]\n'}),
 'match': edit({'micro_batch_for':'def micro_batch_for(e, g, w):\n    match divmod(e, g * w):\n        case (q, 0):\n            return q\n        case _:\n            return 0\n'}),
 'import_in_other_cell_later': edit({'steps_for':S['steps_for'].replace('math.ceil(','m.ceil(')},top=['import math as m']),
 'deleted_stub_import': edit(),
 'del_statement': edit({'update_seconds':'TMP = 1e12\nTERA = TMP\ndel TMP\n\n'+S['update_seconds'].replace('1e12','TERA')}),
 'wrapped_later': edit({'update_seconds':S['update_seconds']+'\n_inner = update_seconds\ndef update_seconds(*a):\n    return _inner(*a)\n'}),
 'setdefault_memo': edit({'largest_micro_batch':'MEMO = {}\n'+S['largest_micro_batch']}),
}
