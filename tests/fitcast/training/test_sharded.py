"""FSDP2 on two processes: what one trains, what is killed, what `accelerate launch` starts."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from course_utils.topics.ranks import _environment
from fitcast.training import sharded
from tools.notebooks import ROOT

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SCRIPT = str(ROOT / "tools" / "train_many_gpus.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
AROUND = os.environ | _environment(False) | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def started(folder, *options, processes=2, launcher=None):
    command = launcher or (*TORCHRUN, "--nproc-per-node", str(processes))
    arguments = ("--model", "bundled", "--out", str(folder), *options)
    return subprocess.Popen(
        [*command, SCRIPT, *arguments], env=AROUND, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def losses(said: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"step (\d+): loss ([\d.]+)", said)}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_one_that_accelerate_takes(config):
    from accelerate.commands.config.config_args import load_config_from_file

    made = load_config_from_file(str(config))
    assert made.num_processes == 2 and made.mixed_precision == "fp16"
    said = config.read_text("utf-8")
    assert f"--config_file configs/{config.name}" in said
    assert ("fsdp" in config.stem) == ("--strategy fsdp2" in said)
    assert yaml.safe_load(said).get("fsdp_config", {}).get("fsdp_version", 2) == 2


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_was_launched_on_two_gpus(config):
    """Four steps of the script; sharded or whole, the same random model loses the same."""
    measured = json.loads((ROOT / "tests" / "data" / "h200_ranks.json").read_text("utf-8"))
    rows = {row["name"]: row for row in measured["rows"] if row["strategy"] == "launch"}
    (there,) = rows[config.stem]["ranks"]
    found = losses("\n".join(there["said"]))
    assert there["rc"] == 0 and set(found) == {1, 2, 3, 4}
    if rows[config.stem]["recipe"]["model"] == rows["ddp_2xt4"]["recipe"]["model"]:
        whole = losses("\n".join(rows["ddp_2xt4"]["ranks"][0]["said"]))
        assert found == pytest.approx(whole, abs=3e-3)


def test_a_parameters_name_in_the_checkpoint():
    wrapped = "base_model.model.model.layers.3.self_attn.q_proj.base_layer.weight"
    assert sharded.checkpoint_name(wrapped) == "model.layers.3.self_attn.q_proj.weight"
    assert sharded.checkpoint_name("base_model.model.lm_head.weight") == "lm_head.weight"


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_launches_it(config, tmp_path):
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config))
    kind = ("--strategy", "fsdp2") if "fsdp" in config.stem else ()
    kind += ("--offload",) if "offload" in config.stem else ()
    launcher = (*launcher, "--cpu") if not kind else launcher
    AROUND["ACCELERATE_USE_CPU"] = "true"
    run = started(tmp_path, "--steps", "1", *kind, launcher=launcher)
    said, _ = run.communicate(timeout=300)
    assert run.returncode == 0, said[-2000:]
    assert 1 in losses(said)


@pytest.mark.slow
def test_parts_train_what_one_process_trains(tmp_path):
    found = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        run = started(folder, "--strategy", "fsdp2", "--steps", "4", processes=processes)
        said, _ = run.communicate(timeout=300)
        assert run.returncode == 0, said[-2000:]
        found.append(losses(said))
    assert found[0] == pytest.approx(found[1], abs=1e-3)


@pytest.mark.slow
def test_a_rank_that_is_killed_costs_no_step_beyond_the_last_save(tmp_path):
    """Five random moments, saves included (every step saves); with two ranks and with one."""
    whole = started(tmp_path / "whole", "--strategy", "fsdp2", "--steps", "6")
    wanted = losses(whole.communicate(timeout=300)[0])
    moments = random.Random(19)
    for number in range(5):
        folder = tmp_path / str(number)
        options = ("--strategy", "fsdp2", "--steps", "6", "--save-steps", "1")
        kill_a_rank(started(folder, *options), moments)
        saved = max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0)
        again = started(folder, *options, processes=2 - number % 2)
        said, _ = again.communicate(timeout=300)
        assert again.returncode == 0, said[-2000:]
        got = losses(said)
        assert min(got, default=7) == saved + 1
        assert got == pytest.approx({s: wanted[s] for s in got}, abs=2e-3)
        shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_overflow_on_one_rank_skips_the_step_on_both(strategy):
    """Else one rank would train on where the other one has stayed."""
    worker = str(Path(__file__).parent / "scaler_worker.py")
    command = [*TORCHRUN, "--nproc-per-node", "2", worker, strategy]
    done = subprocess.run(command, env=AROUND, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = json.loads(done.stdout.splitlines()[-1])
    assert ranks == [[[True, 256.0], [False, 128.0], [True, 128.0]]] * 2


def kill_a_rank(run, moments: random.Random) -> None:
    """SIGKILL for one of the run's processes, a random while after a random step."""
    after = f"step {moments.randint(1, 4)}:"
    for line in run.stdout:
        if line.startswith(after):
            children = subprocess.run(
                ["pgrep", "-P", str(run.pid)], capture_output=True, text=True, check=True
            ).stdout.split()
            subprocess.run(["sleep", f"{moments.random() * 0.6:.2f}"], check=True)
            os.kill(int(moments.choice(children)), signal.SIGKILL)
            break
    run.communicate(timeout=120)
    assert run.returncode != 0
