"""SECURITY.md, held: no foreign code, no tokens, no telemetry, in sources and in outputs.

What may not be imported or called at all is ruff's (`banned-api` in pyproject.toml). Here is what
depends on an argument, on a file that is no Python, or on an output.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
import yaml

from tools import stamp
from tools.notebooks import LESSONS
from tools.surroundings import ROOT

SHIPPED = ("fitcast/", "course_utils/", "lessons/", "tools/")
TOKENS = {
    "a Hugging Face token": r"\bhf_[A-Za-z0-9]{30,}\b",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})\b",
    "an API key": r"\bsk-(?:\w+-)?[A-Za-z0-9]{20,}\b",
    "a cloud key": r"\b(?:AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{35})\b",
    "a chat token": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "a private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "a bearer token": r"\b[Bb]earer [A-Za-z0-9._-]{20,}",
    "a password in an address": r"://[^/\s:@\"'<>{}]+:[^/\s@\"'<>{}]+@",
}
MAY_EXEC = {"fitcast/cuda/bitsandbytes.py"}
LEFT = re.compile(
    r"\.git|\.venv.*|__pycache__|\.\w+_cache|\.ipynb_checkpoints|\.hypothesis|.*\.egg-info"
)
LEFT_AT_ROOT = {"build", "dist", "class"}


def tracked(*endings: str) -> list[str]:
    """Paths of the repository's files, new ones too, with one of the endings.

    Where there is no git, as in the students' archive: all files but what tools leave behind.
    """
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.check_output(
            command, cwd=ROOT, text=True, stderr=subprocess.DEVNULL
        ).splitlines()
    except (OSError, subprocess.CalledProcessError):
        listed = sorted(found.relative_to(ROOT).as_posix() for found in walked())
    return [path for path in listed if path.endswith(endings) and (ROOT / path).exists()]


def walked() -> Iterator[Path]:
    """The files below the root, without environments, builds and caches."""
    for place, folders, files in os.walk(ROOT):
        left = LEFT_AT_ROOT if Path(place) == ROOT else set()
        folders[:] = [name for name in folders if not LEFT.fullmatch(name) and name not in left]
        yield from (Path(place, name) for name in files)


def tokens(name: str, text: str) -> list[str]:
    found = ((what, re.search(pattern, text)) for what, pattern in TOKENS.items())
    return [f"{name} holds {what}: {hit[0][:12]}..." for what, hit in found if hit]


def calls(source: str) -> Iterator[tuple[str, dict[str, object]]]:
    """Each call's function and keyword arguments, constants by value; `**` is under None."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            given = {k.arg: getattr(k.value, "value", k.value) for k in node.keywords}
            yield ast.unparse(node.func), given


def foreign_code(name: str, source: str) -> list[str]:
    """What could run code that came with a model."""
    found = []
    for function, given in calls(source):
        if given.get("trust_remote_code", False) is not False:
            found.append(f"{name} sets trust_remote_code")
        if re.fullmatch(r"Auto\w*Model\w*\.from_pretrained", function) and (
            given.get("use_safetensors") is not True
        ):
            found.append(f"{name} loads a model without use_safetensors=True")
        if function == "torch.load" and given.get("weights_only", True) is not True:
            found.append(f"{name} unpickles: torch.load must keep weights_only")
    return found


def tokens_asked_for(name: str, source: str) -> list[str]:
    """Tokens that are read or passed on."""
    found = []
    for function, given in calls(source):
        passed = {key for key, value in given.items() if value is not None and value is not False}
        if {"token", "use_auth_token", "hf_token"} & passed:
            found.append(f"{name} passes a token to {function}")
    read = re.search(
        r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|GITHUB_TOKEN", ast.unparse(ast.parse(source))
    )
    return found + ([f"{name} reads a token"] if read else [])


def telemetry(name: str, source: str) -> list[str]:
    """A trainer that reports to a service, or may."""
    found = []
    for function, given in calls(source):
        if given.get("report_to", "none") != "none":
            found.append(f"{name} reports to {given['report_to']} in {function}")
        elsewhere = None in given and "report_to=" in source  # **settings
        if function == "TrainingArguments" and "report_to" not in given and not elsewhere:
            found.append(f"{name} leaves report_to to the trainer")
    return found


SOURCES = [path for path in tracked(".py") if path.startswith(SHIPPED)]


def test_without_git_the_same_files_are_found(monkeypatch, tmp_path):
    listed = tracked(".py", ".md", ".ipynb")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert tracked(".py", ".md", ".ipynb") == sorted(listed)


def test_no_token_is_in_any_file():
    paths = tracked(".py", ".md", ".json", ".toml", ".txt", ".yml", ".cff", "Makefile", "run")
    assert len(paths) > 100
    for path in paths:
        assert tokens(path, (ROOT / path).read_text("utf-8")) == []


@pytest.mark.parametrize("path", sorted(LESSONS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_no_token_is_in_a_notebook(path):
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            for picture in ("image/png", "image/jpeg"):
                output.get("data", {}).pop(picture, None)
    assert tokens(path.name, nbformat.writes(notebook)) == []


RULES = (foreign_code, tokens_asked_for, telemetry)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule):
    assert len(SOURCES) > 50
    found = [rule(path, (ROOT / path).read_text("utf-8")) for path in SOURCES]
    assert sum(found, []) == []


@pytest.mark.parametrize(
    "planted",
    ["hf_" + "a" * 34, "ghp_" + "B1" * 18, "sk-proj-" + "x" * 24, "AKIA" + "Q" * 16,
     "-----BEGIN RSA PRIVATE " + "KEY-----", "Authorization: Bearer " + "e" * 40,
     "https://me:secret" + "@example.org/x"],
)  # fmt: skip
def test_planted_token_in_an_output_is_caught(planted):
    shown = nbformat.v4.new_output("stream", name="stdout", text=f"logged in as {planted}\n")
    cell = nbformat.v4.new_code_cell("1", outputs=[shown])
    assert tokens("01.ipynb", nbformat.writes(nbformat.v4.new_notebook(cells=[cell]))) != []
    assert tokens("x", "hf_hub and sk-learn, a bearer of news, https://example.org:80/@me") == []


@pytest.mark.parametrize(
    ("rule", "source", "complaint"),
    [
        (foreign_code, "f(trust_remote_code=True)", "trust_remote_code"),
        (foreign_code, "f(trust_remote_code=flag)", "trust_remote_code"),
        (foreign_code, "AutoModelForCausalLM.from_pretrained(x)", "without use_safetensors"),
        (foreign_code, "AutoModel.from_pretrained(x, use_safetensors=False)", "without use_saf"),
        (foreign_code, "torch.load(x, weights_only=False)", "unpickles"),
        (tokens_asked_for, "load_dataset(x, token='abc')", "passes a token"),
        (tokens_asked_for, "os.environ['HF_TOKEN']", "reads a token"),
        (telemetry, "TrainingArguments(report_to='wandb')", "reports to wandb"),
        (telemetry, "TrainingArguments('x')", "leaves report_to"),
        (telemetry, "TrainingArguments(**settings)", "leaves report_to"),
    ],
)
def test_planted_fault_is_caught(rule, source, complaint):
    assert complaint in " ".join(rule("x.py", source))


LINTED = """
import pickle
import socket
from urllib import request
from google.colab import userdata
import huggingface_hub
import subprocess
import os

huggingface_hub.login()
exec("x")
os.system(f"rm {os}")
subprocess.run(f"rm {os}", shell=True)
socket.create_connection(("a", 1))
"""


def test_ruff_bans_the_rest():
    """The list in pyproject.toml works: each line of a planted module is found."""
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--output-format", "concise",
         "--stdin-filename", "fitcast/planted.py", "--select", "S,TID251", "-"],
        input=LINTED, cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = {int(line.split(":")[1]) for line in done.stdout.splitlines() if "planted" in line}
    assert {2, 4, 5, 10, 11, 12, 13, 14} <= lines, done.stdout + done.stderr


def test_only_the_set_up_cell_runs_a_shell_and_it_is_one_for_all():
    for path in LESSONS.glob("*.py"):
        source = path.read_text("utf-8")
        assert source.count("os.system") == 1 == source.count(stamp.facts().setup), path.name


def test_hub_telemetry_is_off_unless_the_learner_chose():
    code = (
        "import course_utils\nfrom huggingface_hub import constants\n"
        "print(constants.HF_HUB_DISABLE_TELEMETRY)"
    )
    environment = {k: v for k, v in os.environ.items() if "TELEMETRY" not in k}
    for choice, off in (({}, "True"), ({"HF_HUB_DISABLE_TELEMETRY": "0"}, "False")):
        shown = subprocess.check_output(
            [sys.executable, "-c", code], env=environment | choice, text=True, cwd=ROOT
        )
        assert shown.strip() == off


# Only GitHub's own cache can keep pip's downloads, only its own actions hand files to the job that
# publishes, and PyPI's own publishes; at this commit, which a moved tag cannot change.
ACTIONS = (
    r"\./\.github/actions/[\w-]+"
    r"|(actions/(cache|upload-artifact|download-artifact|deploy-pages)"
    r"|pypa/gh-action-pypi-publish)@[0-9a-f]{40}"
)


def actions(text: str) -> list[str]:
    """Actions of a workflow, or of our own action, that are nobody's business here."""
    used = re.findall(r"^\s*-?\s*uses: (\S+)", text, re.M)
    return [name for name in used if not re.fullmatch(ACTIONS, name)]


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=str)
def test_workflows_fetch_the_commit_and_only_read(path):
    text = path.read_text("utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert actions(text) == [] and "secrets." not in text and "pull_request_target" not in text
    for name, job in workflow["jobs"].items():
        if name != "publish":
            assert '"$GITHUB_SHA"' in job["steps"][0]["run"]
            assert "permissions" not in job


# What may publish, when, and with which rights: no token is kept, and nothing is built there.
PUBLISH = {
    "package": ({"id-token": "write"}, "refs/tags/v"),
    "site": ({"pages": "write", "id-token": "write"}, "refs/heads/main"),
}


def test_only_a_tag_or_main_is_published_and_only_what_was_built():
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        job = yaml.safe_load(path.read_text("utf-8"))["jobs"].get("publish")
        assert (job is not None) == (path.stem in PUBLISH)
        if job:
            rights, when = PUBLISH[path.stem]
            assert job["permissions"] == rights and when in job["if"] and job["needs"] == "build"
            assert all("uses" in step and "run" not in step for step in job["steps"])


def test_our_action_uses_the_cache_and_nothing_else():
    ours = (ROOT / ".github/actions/set-up/action.yml").read_text("utf-8")
    assert actions(ours) == [] and "actions/cache@" in ours
    assert actions("    - uses: actions/cache@v4\n    - uses: else/thing@" + "a" * 40) != []


def test_ci_installs_exact_files():
    for name in ("ci", "engine", "browser", "colab", "site", "package"):
        workflow = yaml.safe_load((ROOT / f".github/workflows/{name}.yml").read_text("utf-8"))
        assert workflow["env"] == {"HASHES": 1}, name


def test_the_page_says_it():
    page = (ROOT / "SECURITY.md").read_text("utf-8")
    for word in ("trust_remote_code", "use_safetensors", "HF_TOKEN", "HF_HUB_DISABLE_TELEMETRY"):
        assert word in page
    assert "SECURITY.md" in (ROOT / "README.md").read_text("utf-8")
