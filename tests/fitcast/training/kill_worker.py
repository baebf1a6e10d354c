"""Train, be killed, resume: run by test_training.py in a process of its own.

The imports are paid for once: every run is a fork of this process, which itself never computes.
Prints one JSON object: the uninterrupted losses, and for each kill what the resumed run did.

    python tests/fitcast/training/kill_worker.py FOLDER          # all: 10 at random, a full disk
    python tests/fitcast/training/kill_worker.py FOLDER --few    # those in a save, 2 at random
"""

import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from fitcast.step import qlora
from fitcast.training import checkpoints
from fitcast.training import trainer as training
from tests.tiny import ROWS, TOKENIZER, tiny_recipe


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def after(call, count):
    """`call`, but the `count`-th call is the end."""
    calls = iter(range(1, 10**6))
    return lambda *a, **k: die() if next(calls) == count else call(*a, **k)


def half_a_file(call, count):
    """`torch.save`, but the `count`-th file stays half written."""
    calls = iter(range(1, 10**6))

    def save(thing, path):
        call(thing, path)
        if next(calls) == count:
            os.truncate(path, os.path.getsize(path) // 2)
            die()

    return save


def telling(call, pipe):
    """`call`, which tells through a pipe that it was called."""
    return lambda *a, **k: (os.write(pipe, b"."), call(*a, **k))[1]


def patch(owner, name, wrap, argument):
    setattr(owner, name, wrap(getattr(owner, name), argument))


# Saves happen after steps 4, 8 and 12; each writes four files with torch.save (optimizer,
# scheduler, random state, arguments: the arguments first).
MOMENTS = {
    "before the first save": lambda: patch(qlora, "compute_loss", after, 5),
    "in a forward pass": lambda: patch(qlora, "compute_loss", after, 11),
    "in an optimizer step": lambda: patch(torch.optim.AdamW, "step", after, 6),
    "before a save": lambda: patch(training.QLoRATrainer, "_save_checkpoint", after, 2),
    "in a save, half the optimizer written": lambda: patch(torch, "save", half_a_file, 6),
    "in a save, before the manifest": lambda: patch(checkpoints, "_seal", after, 2),
    "in a save, before the rename": lambda: patch(Path, "rename", after, 2),
    "after the rename": lambda: patch(checkpoints, "prune", after, 2),
    "while an old one is deleted": lambda: patch(checkpoints.shutil, "rmtree", after, 4),
}


def fork(work, output: Path) -> int:
    """Process id of a child that does `work` and prints into `output`."""
    if child := os.fork():
        return child
    with output.open("w") as out:
        os.dup2(out.fileno(), 1)
        work()
        sys.stdout.flush()
    os._exit(0)


def signal_of(child: int) -> int:
    """The signal that ended a child, 0 when it ended by itself."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, few: bool) -> None:
    torch.set_num_threads(1)
    recipe = tiny_recipe(folder / "model")

    def run(name: str, sabotage=lambda: None):
        sabotage()
        model = training.build_model(recipe)
        done = training.train(recipe, model, ROWS, TOKENIZER, folder / name)
        result = {
            "losses": done.losses,
            "learning_rates": [s["learning_rate"] for s in done.steps],
            "from": done.resumed_from and done.resumed_from.name,
        }
        (folder / f"{name}.json").write_text(json.dumps(result))

    def read(name: str) -> dict:
        return json.loads((folder / f"{name}.json").read_text()) | {
            "said": (folder / f"{name}.txt").read_text()
        }

    def result(name: str) -> dict:
        assert signal_of(fork(lambda: run(name), folder / f"{name}.txt")) == 0
        return read(name)

    def begin(name: str) -> int:
        """Process id of a run that has come to its first batch."""
        begun, tell = os.pipe()
        child = fork(
            lambda: run(name, lambda: patch(qlora, "compute_loss", telling, tell)),
            folder / f"{name}.txt",
        )
        os.close(tell)
        os.read(begun, 1)
        return child

    child, start = begin("uninterrupted"), time.perf_counter()
    assert signal_of(child) == 0
    seconds = time.perf_counter() - start
    report = {"uninterrupted": read("uninterrupted"), "killed": {}}
    for number, (moment, sabotage) in enumerate(MOMENTS.items()):
        if few and not moment.startswith("in a save"):
            continue
        child = fork(lambda n=number, s=sabotage: run(f"run{n}", s), folder / "log")
        report["killed"][moment] = {"signal": -signal_of(child)} | result(f"run{number}")
    rng = random.Random(int(time.time()))
    for number in range(2 if few else 10):
        share = rng.uniform(0, 0.9)
        child = begin(f"random{number}")
        time.sleep(share * seconds)
        os.kill(child, signal.SIGKILL)
        if (died_by := -signal_of(child)) == 0:  # it took less than that: so will the next
            seconds *= share
        moment = f"at random, {number}: {share:.3f} of a run after its first batch"
        report["killed"][moment] = {"signal": died_by} | result(f"random{number}")

    def full_disk():
        """The second save meets a disk that takes no more than 20 kB a file; then a kill."""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        save = training.QLoRATrainer._save_checkpoint

        def limited(trainer, *a):
            limit = 20_000 if trainer.state.global_step == 8 else resource.RLIM_INFINITY
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            save(trainer, *a)
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)

        training.QLoRATrainer._save_checkpoint = limited
        patch(torch.optim.AdamW, "step", after, 11)

    if not few:
        child = fork(lambda: run("full", full_disk), folder / "full.log")
        died_by = -signal_of(child)
        warned = (folder / "full.log").read_text()
        report["full disk"] = {"signal": died_by, "warned": warned} | result("full")
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), few="--few" in sys.argv)
