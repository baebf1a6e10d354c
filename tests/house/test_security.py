"""SECURITY.md, held: no foreign code, no tokens, no telemetry, in sources and in outputs.

Each rule is a function from text to complaints, held against every tracked file and against a
planted fault.
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
from tools.notebooks import LESSONS, ROOT

SHIPPED = ("course_utils", "lessons", "instructor", "tools")
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
SENDERS = {"requests", "httpx", "aiohttp", "urllib.request", "http.client", "smtplib", "sentry_sdk",
           "wandb", "ftplib", "mlflow", "comet_ml"}  # fmt: skip
PICKLERS = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
MAY_EXEC = {"fitcast/cuda/bitsandbytes.py"}
# The grader runs students' code, in processes that it talks to through sockets of this machine: its
# own tests hold it to that.
GRADER = "instructor/"
LEFT = re.compile(
    r"\.git|\.venv.*|build|dist|class|__pycache__|\.\w+_cache|\.ipynb_checkpoints"
    r"|\.hypothesis|.*\.egg-info"
)


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
        folders[:] = [name for name in folders if not LEFT.fullmatch(name)]
        yield from (Path(place, name) for name in files)


def tokens(name: str, text: str) -> list[str]:
    found = ((what, re.search(pattern, text)) for what, pattern in TOKENS.items())
    return [f"{name} holds {what}: {hit[0][:12]}..." for what, hit in found if hit]


def calls(source: str) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(source))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def imports(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def keywords(call: ast.Call) -> dict[str, object]:
    return {k.arg: getattr(k.value, "value", None) for k in call.keywords}


def foreign_code(name: str, source: str) -> list[str]:
    """What could run code that came with a model."""
    found = [f"{name} imports {module}" for module in sorted(PICKLERS & imports(source))]
    for function, call in calls(source):
        given = keywords(call)
        if "trust_remote_code" in given:
            found.append(f"{name} sets trust_remote_code")
        if re.fullmatch(r"Auto\w*Model\w*\.from_pretrained", function) and (
            given.get("use_safetensors") is not True
        ):
            found.append(f"{name} loads a model without use_safetensors=True")
        if function == "torch.load" and given.get("weights_only", True) is not True:
            found.append(f"{name} unpickles: torch.load must keep weights_only")
        if function in ("eval", "exec") and name not in MAY_EXEC:
            found.append(f"{name} calls {function}")
        if function in ("os.system", "os.popen") or given.get("shell") is True:
            found.append(f"{name} runs a shell command")
    return found


def secrets(name: str, source: str) -> list[str]:
    """Tokens that are asked for, read or passed on."""
    found = []
    for function, call in calls(source):
        given = {k.arg for k in call.keywords if getattr(k.value, "value", 0) not in (None, False)}
        if {"token", "use_auth_token", "hf_token"} & given:
            found.append(f"{name} passes a token to {function}")
        if function.split(".")[-1] in ("login", "notebook_login", "get_token", "getpass", "input"):
            found.append(f"{name} asks for a secret: {function}")
    named = r"HF_TOKEN|HUGGING_FACE_HUB_TOKEN|GITHUB_TOKEN|userdata"
    code = ast.unparse(ast.parse(source))
    return found + ([f"{name} reads a token"] if re.search(named, code) else [])


def telemetry(name: str, source: str) -> list[str]:
    found = [f"{name} imports {module}" for module in sorted(SENDERS & imports(source))]
    for function, call in calls(source):
        reports = keywords(call).get("report_to", "none")
        if reports != "none":
            found.append(f"{name} reports to {reports} in {function}")
        elsewhere = None in keywords(call) and "report_to=" in source  # **settings
        if function == "TrainingArguments" and "report_to" not in keywords(call) and not elsewhere:
            found.append(f"{name} leaves report_to to the trainer")
        if re.fullmatch(r"socket\.(socket|create_connection)", function):
            found += [] if name.startswith(GRADER) else [f"{name} opens a connection"]
    return found


def without_set_up_cell(source: str) -> str:
    return source.replace(stamp.facts().setup, "")


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


@pytest.mark.parametrize("rule", [foreign_code, secrets, telemetry], ids=lambda rule: rule.__name__)
def test_sources_keep_the_rule(rule):
    assert len(SOURCES) > 50
    found = []
    for path in SOURCES:
        if rule is foreign_code and path.startswith(GRADER):
            continue
        found += rule(path, without_set_up_cell((ROOT / path).read_text("utf-8")))
    assert found == []


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
        (foreign_code, "import pickle", "imports pickle"),
        (foreign_code, "exec(text)", "calls exec"),
        (foreign_code, "os.system('rm x')", "shell"),
        (foreign_code, "subprocess.run(x, shell=True)", "shell"),
        (secrets, "load_dataset(x, token='abc')", "passes a token"),
        (secrets, "huggingface_hub.login()", "asks for a secret"),
        (secrets, "os.environ['HF_TOKEN']", "reads a token"),
        (secrets, "from google.colab import userdata", "reads a token"),
        (telemetry, "import requests", "imports requests"),
        (telemetry, "from urllib import request", "imports urllib.request"),
        (telemetry, "TrainingArguments(report_to='wandb')", "reports to wandb"),
        (telemetry, "TrainingArguments('x')", "leaves report_to"),
        (telemetry, "TrainingArguments(**settings)", "leaves report_to"),
        (telemetry, "socket.create_connection(there)", "opens a connection"),
    ],
)
def test_planted_fault_is_caught(rule, source, complaint):
    assert complaint in " ".join(rule("x.py", source))


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


@pytest.mark.parametrize("path", sorted((ROOT / ".github/workflows").glob("*.yml")), ids=str)
def test_workflows_use_nobodys_actions_and_only_read(path):
    workflow = yaml.safe_load(path.read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert steps and all("uses" not in step for step in steps)
    assert "secrets." not in path.read_text("utf-8")


def unlocked(lock: str) -> list[str]:
    """What of `constraints.txt` the lock lacks, has at another version, or without a hash."""
    locked = dict(re.findall(r"^([\w.-]+)(==\S+).*\\\n +--hash=sha256:[0-9a-f]{64}\b", lock, re.M))
    pins = re.findall(r"^([\w.-]+)(==\S+)$", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    assert len(pins) > 40, "constraints.txt was not read"
    names = [(name, name.lower().replace("_", "-"), version) for name, version in pins]
    return [name for name, key, version in names if locked.get(key) != version]


def test_ci_installs_exact_files():
    lock = (ROOT / ".github/locked.txt").read_text("utf-8")
    assert unlocked(lock) == []
    assert unlocked(lock.replace("torch==2.13.0", "torch==2.12.0")) == ["torch"]
    assert unlocked(re.sub(r"(?m)^(peft==\S+ )\\\n( +--hash.*\n)+", r"\1\n", lock)) == ["peft"]
    named = [len(re.findall(r"^\S+==" + rest, lock, re.M)) for rest in ("", r".*\\\n +--hash=sha")]
    assert named[0] == named[1] > 150
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text("utf-8"))
    assert workflow["env"] == {"LOCK": ".github/locked.txt"}


def test_the_page_says_it():
    page = (ROOT / "SECURITY.md").read_text("utf-8")
    for word in ("trust_remote_code", "use_safetensors", "HF_TOKEN", "HF_HUB_DISABLE_TELEMETRY"):
        assert word in page
    assert "SECURITY.md" in (ROOT / "README.md").read_text("utf-8")
