"""The runtime's sentences: verified, too old, newer, a Colab CPU, a card larger than a T4."""

import re
from dataclasses import replace
from importlib import metadata

import pytest

from course_utils.topics import welcome
from fitcast import gpus
from fitcast.cli.doctor import doctor
from fitcast.training import versions as verified
from tools.notebooks import ROOT

# Colab's runtime version 2026.01, which "Change runtime type" still offers.
RUNTIME_2026_01 = {"torch": "2.9.0+cu126", "transformers": "4.57.3", "peft": "0.18.0"}


@pytest.fixture
def runtime(monkeypatch):
    """Pretend: these versions are installed, on Colab or not, with this GPU."""

    def pretend(versions=None, gpu=None, colab=True):
        present = verified.record()["colab"] | (versions or {})

        def version(name):
            if name not in present:
                raise metadata.PackageNotFoundError(name)
            return present[name]

        monkeypatch.setattr(metadata, "version", version)
        monkeypatch.setattr(gpus, "detect", lambda: gpu)
        monkeypatch.delenv(welcome.COLAB_VARIABLE, raising=False)
        if colab:
            monkeypatch.setenv(welcome.COLAB_VARIABLE, "release-colab_20260819")
        return welcome.remarks()

    return pretend


def test_nothing_is_remarked_on_a_t4_and_on_the_pins(runtime):
    assert runtime(gpu=gpus.T4) == []
    assert runtime(verified.record()["pins"], colab=False) == []


def test_each_other_runtime_gets_its_one_sentence(runtime):
    (cpu,) = runtime()
    assert "no GPU" in cpu and "Change runtime type > T4 GPU" in cpu
    (large,) = runtime(gpu=gpus.A100)
    assert large.startswith("A100-40 holds more than a T4") and gpus.EMULATE_VARIABLE in large
    (old,) = runtime(RUNTIME_2026_01)
    assert "transformers 4.57.3 (needed: 5.15)" in old and "torch 2.9.0+cu126" in old
    assert "Runtime version > Latest" in old and "pip install" not in old
    (old_at_home,) = runtime({"peft": "0.9.1"}, colab=False)
    assert "pip install -r requirements.txt" in old_at_home and "Colab" not in old_at_home


@pytest.mark.parametrize(("name", "version"), [("ipywidgets", "9.0.0"), ("torch", "3.0.0a0")])
def test_newer_than_verified_is_said_not_refused(runtime, name, version):
    (newer,) = runtime({name: version}, gpu=gpus.T4)
    assert f"{name} {version} (verified: {verified.record()['pins'][name]})" in newer
    (finding,) = [finding for finding in doctor() if finding.name == "verified"]
    assert f"{name} {version}" in finding.found and finding.fix is None


def test_patch_releases_are_no_drift(runtime):
    pinned = verified.record()["pins"]["ipywidgets"]
    assert runtime({"ipywidgets": f"{pinned.rpartition('.')[0]}.99"}, gpu=gpus.T4) == []


def test_an_emulated_t4_is_a_t4(runtime):
    assert runtime(gpu=replace(gpus.T4, name="T4")) == []


def test_welcome_is_the_banner_and_the_remarks(runtime):
    assert runtime(gpu=gpus.T4) == []
    assert welcome.welcome() == welcome.banner()
    assert runtime() != []
    assert welcome.welcome().splitlines() == [welcome.banner(), *welcome.remarks()]
    assert re.search(r"verified on \d{4}-\d\d-\d\d with torch [\d.]+ and", welcome.banner())


def pins(name: str) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / name).read_text(), re.MULTILINE))


def test_the_record_is_of_the_pins_of_today():
    seen = verified.record()
    assert seen["colab_image"] in (ROOT / "constraints-colab.txt").read_text()
    for side, file in (("pins", "requirements.lock"), ("colab", "constraints-colab.txt")):
        now = pins(file)
        assert seen[side] == {name: now[name] for name in seen[side]}, "run make test-colab"
        assert len(seen[side]) >= 8


@pytest.mark.parametrize(
    ("version", "old"),
    [
        ("5.14.9", True),
        ("5.14rc1", True),  # its digits alone would read 5.141
        ("5.15rc1", True),  # pip, too, takes it for older than 5.15
        ("5.15.0.dev0", True),
        ("5.15", False),
        ("5.15.0+cu128", False),
        ("5.15.post1", False),
        ("6", False),
    ],
)
def test_floors_are_read_as_pip_reads_them(runtime, version, old):
    said = runtime({"transformers": version}, gpu=gpus.T4)
    assert any(f"transformers {version} (needed: 5.15)" in line for line in said) == old


def test_a_release_candidate_is_as_new_as_its_release(runtime):
    pinned = verified.record()["pins"]["ipywidgets"]
    assert runtime({"ipywidgets": f"{pinned}rc1"}, gpu=gpus.T4) == []
