"""A class of all attackers and a few honest students, graded; what went wrong, in sentences.

    python -m tests.instructor.attack_class FOLDER LEVEL [PYTHON]

In a program of its own, so that another user can run it. Needs no pytest.
"""

import os
import re
import signal
import socket
import sys
from pathlib import Path

from instructor.grade.grade import grade
from tests.instructor.attacks import CODE, cells
from tests.instructor.classroom import HIDDEN_TEXT, TINY, honest, write_class

HONEST = ("h001", "h002", "h003")
REST = sum(exercise.points for exercise in TINY.exercises[1:])
SLOW = [name for name in CODE if "endless" in name and "integer" not in name]


def complaints(folder, level=None, python=None, leave_out=SLOW):
    """What an attack reached or changed; nothing if the sandbox holds.

    Args:
        folder: To work in.
        level: Of the sandbox; the strongest if None.
        python: That runs the attacks.
        leave_out: Attacks that only cost time.
    """
    canary, secret = folder / "canary", folder / "secret text"
    secret.write_text(HIDDEN_TEXT)
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        fill = {"CANARY": repr(str(canary)), "SECRET": repr(str(secret))}
        fill |= {"PORT": server.getsockname()[1], "PARENT": os.getpid()}
        ids = {name: f"a{i:03}" for i, name in enumerate(n for n in CODE if n not in leave_out)}
        files = {f"tiny_{own}.ipynb": honest(own, cells(n, **fill)) for n, own in ids.items()}
        files |= {f"tiny_{own}.ipynb": honest(own) for own in HONEST}
        people = {own: name.replace('"', "") for name, own in ids.items()}
        arguments = write_class(folder / "class", people | dict.fromkeys(HONEST, "A"), files)
        found = grade(TINY, *arguments, level=level, python=python, weak=True)
        try:
            server.accept()[0].close()
            wrong = ["the network was reached"]
        except TimeoutError:
            wrong = []
    if canary.exists():
        wrong.append("a file was written")
    by_id = {result.student_id: result for result in found.results}
    wrong += [
        f"{own} was harmed" for own in HONEST if (by_id[own].score, by_id[own].flags) != (10, [])
    ]
    for name, own in ids.items():
        first, *others = by_id[own].marks
        _, says, points = CODE[name]
        if sum(mark.earned for mark in others) != REST:
            wrong.append(f"{name} cost another exercise: {[mark.reason for mark in others]}")
        if points is not None and first.earned != points or not re.search(says, first.reason):
            wrong.append(f"{name}: {first.earned} points, {first.reason}")
    written = [path.read_bytes() for path in (folder / "class/out").rglob("*") if path.is_file()]
    if any(HIDDEN_TEXT.encode() in text for text in written):
        wrong.append("a secret file was read")
    return wrong


if __name__ == "__main__":
    signal.alarm(500)
    found = complaints(Path(sys.argv[1]), *sys.argv[2:])
    print(*(found or ["nothing"]), sep="\n")
