"""Hostile and broken submissions, each with the words that have to explain it.

An attack replaces the first exercise of an otherwise right notebook, unless it is the file itself
that is broken. Texts in braces are filled in: CANARY is a file that nobody may write, SECRET one
that nobody may read, PORT a server that nobody may reach.
"""

import io
import random
import zipfile
from dataclasses import dataclass

from instructor.grade.submissions import MOST_BYTES
from tests.instructor.attacks_published import PUBLISHED
from tests.instructor.classroom import SOLUTIONS, honest

BATCH = "def effective_batch(a, b, c):\n"
RIGHT = BATCH + "    return a * b * c"

# name: (code of the first exercise, what the reason says, its points)
CODE = {
    "endless loop": (BATCH + "    while True: pass", "did not come back in time", 0),
    "endless loop at the top level": (
        "while True:\n    effective_batch = 1\n",
        "did not come back in time",
        0,
    ),
    "endless loop that the exercise does not need": ("while True: pass\n" + RIGHT, "right", 3),
    "endless sleep": (
        "import time\n" + BATCH + "    while True: time.sleep(1)",
        "does not come",
        0,
    ),
    "asks for input": (BATCH + "    return input()", "nobody is there to answer", 0),
    "address in an answer": (BATCH + "    return repr(object())", r"object at 0x\.\.\.", 0),
    "os._exit": ("import os\n" + BATCH + "    os._exit(0)", "ended without an answer", 0),
    "os._exit with a code": ("import os\n" + BATCH + "    os._exit(3)", "ended the process", 0),
    "sys.exit": ("import sys\n" + BATCH + "    sys.exit()", "SystemExit", 0),
    "fork bomb": ("import os\n" + BATCH + "    while True: os.fork()", "raised", 0),
    "thread bomb": (
        "import threading, time\n"
        + BATCH
        + "    while True: threading.Thread(target=time.sleep, args=(60,)).start()",
        "raised",
        0,
    ),
    "memory bomb": (BATCH + "    return bytearray(1 << 40)", "more memory", 0),
    "memory bomb in steps": (
        BATCH + "    kept = []\n    while True: kept.append(bytearray(1 << 24))",
        "more memory",
        0,
    ),
    "deep recursion": (BATCH + "    return effective_batch(a, b, c)", "RecursionError", 0),
    "crash of the interpreter": (
        "import sys\nsys.setrecursionlimit(10 ** 9)\n"
        + BATCH
        + "    def deeper(x): return [deeper([x])]\n    return deeper(0)",
        "raised RecursionError|ended|crashed Python|did not come back in time",
        0,
    ),
    "10 GB print": (
        BATCH + "    for _ in range(10_000): print('x' * 1_000_000)",
        "printed or wrote more than 1 MiB",
        0,
    ),
    "giant answer": (BATCH + "    return 'x' * 10_000_000", "far too long", 0),
    "10 GB file": (
        BATCH + "    with open('big', 'wb') as file:\n"
        "        while True: file.write(bytes(1 << 20))",
        "raised",
        0,
    ),
    "network call": (
        "import socket\n" + BATCH + "    s = socket.socket()\n"
        "    s.connect((b'127.0.0.1', PORT))\n    s.sendall(b'hello')\n    return a * b * c",
        "raised PermissionError.*the grader allows no network",
        0,
    ),
    "network call by name": (
        "import urllib.request\n"
        + BATCH
        + "    return urllib.request.urlopen('http://127.0.0.1:PORT').read()",
        "raised URLError|name 'urllib' is not defined",
        0,
    ),
    "starts a program": (
        "import os\n" + BATCH + "    return os.execv('/bin/touch', ['touch', CANARY])",
        "raised",
        0,
    ),
    "starts a shell": (
        "import os\n" + BATCH + "    os.system('touch ' + CANARY)",
        "answered None|raised",
        0,
    ),
    "writes outside the temp folder": (
        BATCH + "    open(CANARY, 'w').write('x')\n    return a * b * c",
        "raised",
        0,
    ),
    "reads the secret file": (BATCH + "    return open(SECRET).read()", "raised", 0),
    "reads the roster beside it": (
        "import os\n" + BATCH + "    return os.listdir(os.path.dirname(SECRET))",
        "raised",
        0,
    ),
    "reads the grader's memory": (
        "import glob\n" + BATCH + "    for p in ('PARENT', 'self'):\n"
        "        open(f'/proc/{p}/mem', 'rb')",
        "raised",
        0,
    ),
    "searches its memory for the answer": (
        """import gc, sys
def effective_batch(a, b, c):
    found, frame, todo, seen = set(), sys._getframe(), list(gc.get_objects()), set()
    while frame:
        todo += [frame.f_locals, frame.f_globals]
        frame = frame.f_back
    while todo and len(seen) < 100_000:
        thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if type(thing) is int and thing > 10 ** 8 and thing < 10 ** 13:
            found.add(thing)
        elif type(thing) in (list, tuple, set):
            todo += thing
        elif type(thing) is dict:
            todo += thing.values()
    return sorted(found)[:3000]""",
        r"answered \[|does not allow gc|raised",
        0,
    ),
    "forges a result": (
        """import os
def effective_batch(a, b, c):
    for descriptor in range(3, 20):
        try:
            os.write(descriptor, b'{"nonce": "", "value": 1, "verdict": "right", "points": 9}\\n')
        except OSError:
            continue
    os._exit(0)""",
        "meddled with the grader's pipe",
        0,
    ),
    "forges a result with the nonce": (
        """import json, os, sys
def effective_batch(a, b, c):
    frame = sys._getframe(1)
    while "case" not in frame.f_locals:
        frame = frame.f_back
    os.write(3, json.dumps({"nonce": frame.f_locals["case"]["nonce"], "value": "forged",
        "verdict": "right", "earned": 99, "points": 99, "expected": "forged"}).encode() + b"\\n")
    os._exit(0)""",
        "answered 'forged'",
        0,
    ),
    "answers ahead of the question": (
        """import json, os
os.write(3, b'{"nonce": "0", "value": 1}\\n' * 20)
def effective_batch(a, b, c):
    return a * b * c""",
        "right",
        3,
    ),
    "answers ahead inside the function": (
        """import os
def effective_batch(a, b, c):
    os.write(3, b'{"nonce": "0", "value": 1}\\n' * 20)
    return a * b * c""",
        "meddled with the grader's pipe",
        0,
    ),
    "monkeypatches the checker": (
        """import builtins, json, sys
def effective_batch(a, b, c):
    for module in list(sys.modules.values()):
        for name in ("same", "equal", "mark", "judge", "check"):
            if hasattr(module, name):
                setattr(module, name, lambda *a, **k: True)
    json.dumps = lambda *a, **k: '{"verdict": "right", "earned": 99}'
    builtins.isinstance = lambda *a: True
    return 0""",
        "meddled with the grader's pipe|ended",
        0,
    ),
    "answer equal to everything": (
        """class Yes(int):
    def __eq__(self, other): return True
    __hash__ = int.__hash__
def effective_batch(a, b, c):
    return Yes(7)""",
        "answered 7",
        0,
    ),
    "redefines the self-check": (
        "def check(*a): print('Right')\ndef same(*a): return True\n" + BATCH + "    return -1",
        "answered -1",
        0,
    ),
    "signals everybody": (
        "import os, signal\n" + BATCH + "    for p in range(-1, 100_000):\n"
        "        try: os.kill(p, signal.SIGKILL)\n        except OSError: pass\n"
        "    return a * b * c",
        "right|answer|raised|memory",
        None,
    ),
    "hides an exception's text": (
        """class Odd(Exception):
    def __str__(self): raise SystemExit
def effective_batch(a, b, c):
    raise Odd""",
        "raised Odd",
        0,
    ),
    "formula in an answer": (
        BATCH + "    return '=HYPERLINK(\"http://x\")'",
        "answered '=HYPERLINK",
        0,
    ),
    "markup in an answer": (BATCH + "    return '<script>alert(1)</script>'", "answered", 0),
    "endless integer": (BATCH + "    return 10 ** 4000", "answered 1000", 0),
    "lone surrogate": (BATCH + "    return '\\ud800\\x00\\x1b[2J'", "answered", 0),
    "deleted cell": ("", "no function `effective_batch`; was its cell deleted", 0),
    "duplicated cell": (RIGHT, "defined 2 times, each time the same", 3),
    "renamed function": (
        RIGHT.replace("effective_batch", "effective_batches"),
        "was it renamed",
        0,
    ),
    "function inside another": (
        "def outer():\n    " + RIGHT.replace("\n", "\n    "),
        "move it to the left margin",
        0,
    ),
    "syntax error": (BATCH + "    return a * * b", "does not parse: invalid syntax", 0),
    "null byte": (BATCH + "    return '\0'", "does not parse", 0),
    "deep nest": ("effective_batch = " + "(" * 5000 + ")" * 5000, "no function", 0),
    "another type": ("effective_batch = 3", "not a function", 0),
    "other arguments": ("def effective_batch(a):\n    return a", "TypeError", 0),
    "package that is not there": (
        "import numpy as np\n" + BATCH + "    return int(np.prod([a, b, c]))",
        "standard library only",
        0,
    ),
}


# Kinds that published escapes from sandboxes and faults of graders have made known: nbgrader,
# otter-grader, Gradescope's autograders, JupyterHub; and those that this grader once had.
NONCE = """    import json, os, sys
    frame = sys._getframe(1)
    while "case" not in frame.f_locals:
        frame = frame.f_back
    nonce = frame.f_locals["case"]["nonce"]
"""
CODE |= {
    "has the kernel kill the grader": (
        BATCH + "    import fcntl\n    flags = fcntl.fcntl(3, fcntl.F_GETFL)\n"
        "    fcntl.fcntl(3, fcntl.F_SETFL, flags | 0o20000)\n    fcntl.fcntl(3, 10, 9)\n"
        "    fcntl.fcntl(3, fcntl.F_SETOWN, PARENT)\n    return a * b * c",
        "raised PermissionError",
        0,
    ),
    "answer nested deep": (
        BATCH + "    x = 0\n    for _ in range(400): x = [x]\n    return x",
        "nested far too deep",
        0,
    ),
    "answer nested deep, by the pipe": (
        BATCH + NONCE + "    deep = b'[' * 9000 + b']' * 9000\n"
        '    os.write(3, b\'{"nonce": "%s", "value": %s}\\n\' % (nonce.encode(), deep))\n'
        "    os._exit(0)",
        "nested far too deep|meddled",
        0,
    ),
    "folders in folders": (
        "import os\n" + BATCH + "    for _ in range(20_000):\n"
        "        os.mkdir('d')\n        os.chdir('d')\n    return a * b * c",
        "raised",
        0,
    ),
    "fills the disk": (
        BATCH + "    for n in range(10_000): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))",
        "raised",
        0,
    ),
    "writes the autograder's results": (
        "import json, os\n" + BATCH + "    os.makedirs('/autograder/results', exist_ok=True)\n"
        "    json.dump({'score': 100}, open('/autograder/results/results.json', 'w'))",
        "raised",
        0,
    ),
    "reads the tests": (
        "import glob\n" + BATCH + "    return sorted(glob.glob('/**/*secret*', recursive=True)"
        " + glob.glob('/**/tests/*.py', recursive=True))[:9]",
        r"answered \[|raised|did not come back",
        0,
    ),
    "patches what writes the answer": (
        "import json, os\n" + BATCH + "    real = os.write\n"
        "    os.write = lambda fd, data: real(fd, bytes(data).replace(b'wrong', b'right'))\n"
        "    return 'wrong'",
        "answered 'right'",
        0,
    ),
    "closes the pipe": (
        "import os\n" + BATCH + "    os.close(3)\n    return a * b * c",
        "ended",
        0,
    ),
    "puts a file over the pipe": (
        "import os\n" + BATCH + "    os.dup2(1, 3)\n    return a * b * c",
        "ended|does not come|meddled",
        0,
    ),
    "reads ahead": (
        "import os\n" + BATCH + "    return os.read(3, 1 << 16).decode()",
        "does not come",
        0,
    ),
    "answers with an old nonce": (
        "import json, os, sys\nKEPT = []\n" + BATCH + NONCE + "    KEPT.append(nonce)\n"
        "    os.write(3, json.dumps({'nonce': KEPT[0], 'value': a * b * c}).encode() + b'\\n')\n"
        "    return a * b * c",
        "meddled",
        None,
    ),
    "answers twice": (
        BATCH + NONCE + "    line = json.dumps({'nonce': nonce, 'value': 1}).encode() + b'\\n'\n"
        "    os.write(3, line * 2)\n    return a * b * c",
        "meddled|answered 1",
        0,
    ),
    "changes the case": (
        "import sys\n" + BATCH + "    frame = sys._getframe(1)\n"
        "    case = frame.f_locals['case']\n    case['arguments'] = [1, 1, 1]\n"
        "    case['nonce'] = 'x'\n    return 1",
        "answered 1",
        0,
    ),
    "traces the grader's frames": (
        "import sys\n" + BATCH + "    def trace(frame, event, arg):\n"
        "        frame.f_globals['plain'] = lambda value: 7\n        return trace\n"
        "    sys.settrace(trace)\n    sys._getframe(1).f_trace = trace\n    return 0",
        "answered|meddled|raised",
        0,
    ),
    "replaces the child's functions": (
        "import sys\n" + BATCH + "    for name, module in list(sys.modules.items()):\n"
        "        if name.startswith('instructor'):\n"
        "            for key in list(vars(module)):\n"
        "                if callable(getattr(module, key)):\n"
        "                    setattr(module, key, lambda *a, **k: True)\n    return 0",
        "answered|meddled|raised|ended",
        0,
    ),
    "answer that is a verdict": (
        BATCH + "    return {'value': a * b * c, 'verdict': 'right', 'earned': 99, 'points': 99}",
        "answered {'value'",
        0,
    ),
    "not a number": (BATCH + "    return float('nan')", "answered nan", 0),
    "infinite": (BATCH + "    return float('inf')", "answered inf", 0),
    "list without an end": (
        "class Long(list):\n    def __iter__(self):\n        while True: yield 1\n"
        + BATCH
        + "    return Long([1])",
        "more memory|did not come back|MemoryError|far too long",
        0,
    ),
    "array that never comes": (
        "class Slow:\n    def tolist(self):\n        while True: pass\n"
        + BATCH
        + "    return Slow()",
        "did not come back",
        0,
    ),
    "number that exits": (
        "import os\nclass Gone:\n    def __float__(self): os._exit(0)\n"
        + BATCH
        + "    return Gone()",
        "ended without an answer",
        0,
    ),
    "class that lies": (
        "class Liar:\n    __class__ = int\n    def __eq__(self, other): return True\n"
        "    __hash__ = None\n" + BATCH + "    return Liar()",
        "raised TypeError",
        0,
    ),
    "metaclass that lies": (
        "class Meta(type):\n    def __instancecheck__(cls, x): return True\n"
        "class Yes(metaclass=Meta): pass\n"
        + BATCH
        + "    import builtins\n    builtins.int = builtins.float = Yes\n    return 'x'",
        "answered 'x'|raised",
        0,
    ),
    "exception without an end": (
        "class Odd(Exception):\n    def __str__(self):\n        while True: pass\n"
        + BATCH
        + "    raise Odd",
        "did not come back",
        0,
    ),
    "exception that is no Exception": (
        "class Odd(BaseException): pass\n" + BATCH + "    raise Odd('x')",
        "raised Odd",
        0,
    ),
    "interrupts": (BATCH + "    raise KeyboardInterrupt", "raised KeyboardInterrupt", 0),
    "deaf to signals": (
        "import signal\n" + BATCH + "    for number in range(1, 64):\n"
        "        try: signal.signal(number, signal.SIG_IGN)\n"
        "        except (OSError, ValueError): pass\n    while True: pass",
        "did not come back|raised",
        0,
    ),
    "raises its limits": (
        "import resource\n" + BATCH + "    unlimited = resource.RLIM_INFINITY\n"
        "    resource.setrlimit(resource.RLIMIT_CPU, (unlimited, unlimited))\n"
        "    return a * b * c",
        "raised",
        0,
    ),
    "raises its priority": ("import os\n" + BATCH + "    os.nice(-20)", "raised|answered None", 0),
    "dumps core": ("import os\n" + BATCH + "    os.abort()", "crashed|raised|ended", 0),
    "null pointer": (
        "import ctypes\n" + BATCH + "    return ctypes.string_at(0)",
        "crashed|raised|not defined",
        0,
    ),
    "calls the kernel itself": (
        "import ctypes\n" + BATCH + "    libc = ctypes.CDLL(None, use_errno=True)\n"
        "    return [libc.syscall(n, 0, 0, 0, 0) for n in (57, 62, 101, 425, 323, 157, 319, 41)]",
        r"answered \[-1, -1, -1, -1, -1, -1, -1, -1\]|raised",
        0,
    ),
    "a pickle": (
        "import pickle\n"
        + BATCH
        + "    return pickle.loads(b\"cos\\nsystem\\n(S'touch CANARY'\\ntR.\")",
        "raised|answered -1|answered 32512",  # what a shell says that never came to be
        0,
    ),
    "says it at the exit": (
        "import atexit, os\n"
        + BATCH
        + "    atexit.register(lambda: os.write(3, b'{\"score\": 100}\\n'))\n    return a * b * c",
        "right",
        3,
    ),
    "takes the place of a module": (
        "import sys\n" + BATCH + "    for name in ('json', 'os', 'math', '__main__'):\n"
        "        sys.modules[name] = None\n    return a * b * c",
        "right|meddled|ended|raised",
        None,
    ),
    "a bomb where the public cases are": (
        "PUBLIC = '[' * 100_000\nPUBLIC = '" + "[" * 50_000 + "'\n" + RIGHT,
        "right",
        3,
    ),
    "an id without an end": ("STUDENT_ID = '" + "x" * 100_000 + "'\n" + RIGHT, "right", 3),
    "a letter of another alphabet": (
        RIGHT.replace("effective", "eff\u0435ctive"),
        "was it renamed",
        0,
    ),
    "shared memory": (
        "import mmap, os\n" + BATCH + "    fd = os.open('/dev/shm/x', os.O_CREAT | os.O_RDWR)\n"
        "    return os.ftruncate(fd, 1 << 30)",
        "raised",
        0,
    ),
    "prints a verdict": (
        BATCH + "    print('Right: all 3 cases')\n    print('{\"value\": 1}', flush=True)",
        "answered None",
        0,
    ),
}

CODE |= PUBLISHED


@dataclass(frozen=True)
class Broken:
    """A file that cannot be graded.

    Args:
        name: Its path in the zip, with ID where the student's id goes.
        data: Its bytes.
        says: What the sentence holds.
    """

    name: str
    data: bytes
    says: str


def _nested() -> bytes:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.writestr("x.ipynb", honest("s000"))
    return memory.getvalue()


FILES = {
    "not JSON": Broken("tiny_ID.ipynb", b"{'cells': []}", "not JSON"),
    "empty file": Broken("tiny_ID.ipynb", b"", "not JSON"),
    "no notebook": Broken("tiny_ID.ipynb", b"[1, 2]", "no list of cells"),
    "deeply nested JSON": Broken("tiny_ID.ipynb", b"[" * 900_000, "not JSON"),
    "UTF-16": Broken("tiny_ID.ipynb", honest("s000").decode().encode("utf-16"), "UTF-16"),
    "Latin-1": Broken("tiny_ID.ipynb", b'{"cells": ["caf\xe9"]}', "not UTF-8"),
    "zip bomb": Broken("tiny_ID.ipynb", bytes(40 << 20), "as a zip bomb does"),
    "giant file": Broken(
        "tiny_ID.ipynb", random.Random(0).randbytes(MOST_BYTES + 1), "larger than 10 MiB"
    ),
    "path traversal": Broken("../../tiny_ID.ipynb", honest("s000"), "leads out of the archive"),
    "absolute path": Broken("/tmp/tiny_ID.ipynb", honest("s000"), "leads out of the archive"),
    "path of Windows": Broken("..\\..\\tiny_ID.ipynb", honest("s000"), "leads out of the archive"),
    "nested zip": Broken("tiny_ID.zip", _nested(), "archive inside the archive"),
    "another file": Broken("tiny_ID.pdf", b"%PDF", "no notebook"),
}


def cells(name: str, **fill: object) -> list[str]:
    """The notebook's cells of an attack in CODE."""
    code = CODE[name][0]
    for word, value in fill.items():
        code = code.replace(word, str(value))
    first = [code, code] if name == "duplicated cell" else [code]
    return [*first, *SOLUTIONS[1:]]
