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
