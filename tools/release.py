"""Author's tool: a version, its changelog and its tag in one go; and the distribution, tried.

    python -m tools.release 0.2.0 --dry-run    # says what it would do
    python -m tools.release 0.2.0              # writes, stamps, commits and tags; pushes nothing
    python -m tools.release --package          # dist/: built, checked, installed elsewhere, asked

What "Unreleased" says in CHANGELOG.md becomes the version's section. Badges, set-up cells and
citations then name the tag that this makes.
"""

import argparse
import datetime
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from pathlib import Path

from packaging.version import InvalidVersion, Version

from fitcast.units import Said, refusal
from tools.surroundings import ROOT

UNRELEASED = re.compile(r"^## Unreleased\n(.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)
VERSION = re.compile(r'(?<=^version = ")[^"]+(?=")', re.MULTILINE)
QUESTION = ("forecast", "--model", "llama-3.2-1b", "--sequence-length", "512")


def git(*arguments: str, root: Path = ROOT) -> str:
    return subprocess.check_output(["git", *arguments], cwd=root, text=True).strip()


def section(changelog: str) -> str:
    """What is new since the last version, as "Unreleased" says it; empty if it says nothing."""
    found = UNRELEASED.search(changelog)
    return found[1].strip() if found else ""


def check(version: str, root: Path = ROOT) -> None:
    """Refuse what would make a release that nobody can use.

    Args:
        version: The new one, such as 0.2.0.
        root: The repository.

    Raises:
        ValueError: The version is none or an old one, its tag is there, files are not committed,
            or the changelog has nothing new.
    """
    now = VERSION.search((root / "pyproject.toml").read_text("utf-8"))[0]
    try:
        newer = Version(version) > Version(now) and re.fullmatch(r"\d+\.\d+\.\d+", version)
    except InvalidVersion:
        newer = False
    if not newer:
        raise refusal("VERSION", f"be above {now}", version, "three numbers, for example 0.2.0")
    if git("tag", "--list", f"v{version}", root=root):
        raise refusal("VERSION", "have no tag yet", version, "a tag that was pushed stays")
    if changed := git("status", "--porcelain", root=root):
        raise refusal("git", "have nothing to commit", Said(changed.splitlines()[0]), "commit it")
    if not section((root / "CHANGELOG.md").read_text("utf-8")):
        raise refusal(
            "CHANGELOG.md", "say what is new", Said("nothing"), 'write it under "## Unreleased"'
        )


def write(version: str, root: Path = ROOT, date: str = "") -> None:
    """The new version in pyproject.toml, and its section in the changelog."""
    project, changelog = root / "pyproject.toml", root / "CHANGELOG.md"
    project.write_text(VERSION.sub(version, project.read_text("utf-8"), count=1), "utf-8")
    heading = f"## {version} ({date or datetime.date.today().isoformat()})"
    text = changelog.read_text("utf-8")
    changelog.write_text(text.replace("## Unreleased", heading, 1), "utf-8")


def release(version: str) -> None:
    """Write, stamp, commit and tag; what was pushed by hand before stays as it is."""
    write(version)
    subprocess.run([sys.executable, "-m", "tools.stamp"], cwd=ROOT, check=True)
    git("commit", "--all", "--quiet", "--message", f"Version {version}")
    git("tag", "--annotate", f"v{version}", "--message", f"Version {version}")
    print(f"v{version} is committed and tagged. Then: git push origin main v{version}")


def package() -> None:
    """Wheel and sdist in dist/, their metadata checked, the wheel installed elsewhere and asked."""
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", "dist", ".")
    files = sorted(map(str, (ROOT / "dist").iterdir()))
    run(sys.executable, "-m", "twine", "check", "--strict", *files)
    with tempfile.TemporaryDirectory() as folder:
        print(smoke(next(name for name in files if name.endswith(".whl")), Path(folder)))


def run(*command: str) -> None:
    subprocess.run(command, cwd=ROOT, check=True)


def smoke(wheel: str, folder: Path) -> str:
    """The first line that the wheel's `fitcast` says, in an environment without the repository.

    Heavy packages come from this environment, by a path that brings no editable install along.
    """
    venv.create(folder / "clean", with_pip=True, symlinks=True)
    (place,) = folder.glob("clean/lib/python*/site-packages")
    (place / "heavy.pth").write_text(sysconfig.get_path("purelib"))
    binaries = folder / "clean" / "bin"
    install = [binaries / "python", "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*install, wheel], check=True, cwd=folder)
    said = subprocess.check_output([binaries / "fitcast", *QUESTION], text=True, cwd=folder)
    return said.splitlines()[0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", nargs="?", default="")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done")
    parser.add_argument("--package", action="store_true", help="build and try the distribution")
    options = parser.parse_args(arguments)
    if options.package:
        package()
        return 0
    try:
        check(options.version)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if options.dry_run:
        new = section((ROOT / "CHANGELOG.md").read_text("utf-8"))
        print(f"Would commit and tag v{options.version}:\n\n{new}")
    else:
        release(options.version)
    return 0


if __name__ == "__main__":
    sys.exit(main())
