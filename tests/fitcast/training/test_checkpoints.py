"""Checkpoints: whole or not there, whatever fails while they are written."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest

from fitcast.training import checkpoints
from fitcast.training.checkpoints import MANIFEST, STAGING, SaveError, find_last, verify


def save(folder: Path, step: int, size: int = 1000, facts: dict | None = None) -> Path:
    target = folder / f"checkpoint-{step}"
    with checkpoints.written_whole(target, facts or {}) as staged:
        (staged / "adapter.bin").write_bytes(bytes([step]) * size)
        (staged / "deeper").mkdir()
        (staged / "deeper/state.json").write_text("{}")
    return target


def test_a_written_checkpoint_is_whole_and_keeps_its_facts(tmp_path):
    target = save(tmp_path, 3, facts={"recipe": {"seed": 7}})
    assert verify(target)["recipe"] == {"seed": 7}
    assert (target / "adapter.bin").read_bytes() == b"\3" * 1000
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]


def test_nothing_is_visible_before_everything_is_on_the_disk(tmp_path, monkeypatch):
    seen = []
    flush = checkpoints._flush
    monkeypatch.setattr(
        checkpoints,
        "_flush",
        lambda path: (seen.append((path.name, (tmp_path / "checkpoint-1").exists())), flush(path)),
    )
    save(tmp_path, 1)
    names = [name for name, _ in seen]
    assert names.index("adapter.bin") < names.index(MANIFEST) < names.index("checkpoint-1")
    assert [visible for _, visible in seen] == [False] * (len(seen) - 1) + [True]


def test_one_rename_makes_a_checkpoint(tmp_path, monkeypatch):
    renamed, rename = [], Path.rename
    monkeypatch.setattr(
        Path,
        "rename",
        lambda self, target: (renamed.append((self.name, target.name)), rename(self, target)),
    )
    save(tmp_path, 1)
    assert renamed == [("checkpoint-1", "checkpoint-1")]


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    ],
    ids=["OSError", "RuntimeError"],
)
def test_a_failed_save_leaves_the_others_and_says_what_happened(tmp_path, failure):
    before = save(tmp_path, 1)
    with (
        pytest.raises(SaveError) as caught,
        checkpoints.written_whole(tmp_path / "checkpoint-2", {}) as staged,
    ):
        (staged / "adapter.bin").write_bytes(b"half")
        raise failure
    message = str(caught.value)
    assert "checkpoint-2 was not written" in message and str(failure)[:20] in message
    assert "last whole checkpoint is checkpoint-1" in message and "free on that disk" in message
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"] and verify(before)


def test_a_save_that_fails_over_an_old_one_of_that_name_leaves_it(tmp_path):
    save(tmp_path, 1, size=10)
    with pytest.raises(SaveError), checkpoints.written_whole(tmp_path / "checkpoint-1", {}):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "checkpoint-1/adapter.bin").stat().st_size == 10


def test_the_old_one_comes_back_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    before, rename = save(tmp_path, 1, size=10), Path.rename

    def fails(self, target):
        if (self / MANIFEST).exists() and self.parent.name == STAGING and self.name == before.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(SaveError, match="Input/output error"):
        save(tmp_path, 1, size=20)
    assert verify(before) and (before / "adapter.bin").stat().st_size == 10
    assert not (tmp_path / STAGING).exists()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    path.write_bytes(b"\0" + path.read_bytes()[1:])


DAMAGE = [
    (lambda c: shutil.rmtree(c), FileNotFoundError, "missing or half written"),
    (lambda c: (c / MANIFEST).unlink(), FileNotFoundError, f"{MANIFEST}.*half written"),
    (lambda c: cut(c / MANIFEST), ValueError, f"{MANIFEST} must be JSON"),
    (lambda c: (c / MANIFEST).write_text("[]"), ValueError, f"{MANIFEST} must be JSON"),
    (lambda c: (c / "adapter.bin").unlink(), FileNotFoundError, "must hold adapter.bin"),
    (lambda c: cut(c / "adapter.bin"), ValueError, "adapter.bin must have 1000 bytes.*got 999"),
    (lambda c: flip(c / "adapter.bin"), ValueError, "adapter.bin must have .* the checksum"),
]


@pytest.mark.parametrize(("damage", "error", "words"), DAMAGE)
def test_a_damaged_checkpoint_is_named_and_skipped(tmp_path, capsys, damage, error, words):
    save(tmp_path, 4)
    damage(save(tmp_path, 8))
    with pytest.raises(error, match=rf"(?s){words}.*resume from an older checkpoint, or delete"):
        verify(tmp_path / "checkpoint-8")
    assert find_last(tmp_path).name == "checkpoint-4"
    gone = not (tmp_path / "checkpoint-8").exists()
    assert gone or "checkpoint-8 is not whole: ignored" in capsys.readouterr().out


def test_steps_are_compared_as_numbers_and_strangers_are_left_alone(tmp_path):
    for step in (9, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    assert find_last(tmp_path).name == "checkpoint-10"
    assert find_last(tmp_path / "nowhere") is None


def test_what_a_kill_left_is_reported_and_cleared_by_the_next_save(tmp_path, capsys):
    save(tmp_path, 1)
    left = tmp_path / STAGING / "checkpoint-2"
    left.mkdir(parents=True)
    (left / "adapter.bin").write_bytes(b"half")
    assert find_last(tmp_path).name == "checkpoint-1"
    assert "checkpoint-2 was being written when the last run ended" in capsys.readouterr().out
    save(tmp_path, 2)
    assert find_last(tmp_path).name == "checkpoint-2" and not (tmp_path / STAGING).exists()


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL: what is on the disk stays as it is."""


class KilledAt:
    """The process dies around its `number`-th call that changes a folder: before it, or after."""

    CALLS = ("rename", "mkdir", "unlink", "rmdir", "fsync")

    def __init__(self, monkeypatch, number: int):
        self.moment, self.dies_after = divmod(number, 2)
        self.done = 0
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self.counted(getattr(os, name)))

    def counted(self, call):
        def counting(*args, **options):
            this, self.done = self.done, self.done + 1
            if this == self.moment and not self.dies_after:
                raise Killed
            try:
                return call(*args, **options)
            finally:
                if this == self.moment:
                    raise Killed

        return counting


def replace_and_die(folder: Path, number: int) -> bool:
    """Save checkpoint-8 over the one that is there, until moment `number`; False: there is none."""
    with pytest.MonkeyPatch.context() as patch:
        KilledAt(patch, number)
        try:
            save(folder, 8, size=2000)
        except Killed:
            return True
    return False


def content(checkpoint: Path) -> int:
    """The size of what was saved, of a checkpoint that is whole."""
    verify(checkpoint)
    return (checkpoint / "adapter.bin").stat().st_size


def test_a_kill_at_any_moment_of_a_replacement_leaves_a_whole_copy(tmp_path):
    """The one before or the one after; the next save does not take it away, either."""
    found = []
    for number in range(1000):
        folder = tmp_path / str(number)
        save(folder, 8)
        died = replace_and_die(folder, number)
        last = find_last(folder, say=lambda _: None)
        found.append(content(last))
        assert last == folder / "checkpoint-8", f"moment {number}"
        save(folder, 9)
        assert content(folder / "checkpoint-8") == found[-1], f"moment {number}"
        assert not (folder / STAGING).exists()
        if not died:
            break
    assert len(found) > 20 and found == sorted(found) and found[0] == 1000 and found[-1] == 2000


def test_a_save_alone_brings_back_what_a_killed_one_put_aside(tmp_path):
    """Nobody looks for a checkpoint in between: the next save is what comes next."""
    for number in range(1000):
        folder = tmp_path / str(number)
        save(folder, 8)
        died = replace_and_die(folder, number)
        checkpoints.prune(save(folder, 9))
        assert content(folder / "checkpoint-8") in (1000, 2000), f"moment {number}"
        if not died:
            break
    assert number > 20


def test_a_damaged_new_one_gives_way_to_the_old_one(tmp_path):
    save(tmp_path, 8)
    for number in range(1000):  # until the old one has stepped aside
        assert replace_and_die(tmp_path, number)
        if not (tmp_path / "checkpoint-8").exists():
            break
        find_last(tmp_path)
    cut(tmp_path / STAGING / "checkpoint-8/adapter.bin")
    assert content(find_last(tmp_path)) == 1000


def test_a_disk_that_refuses_both_renames_keeps_both_copies(tmp_path, monkeypatch):
    save(tmp_path, 8)

    def refuses(source, target):
        if Path(target).name == "checkpoint-8":
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    rename = os.rename
    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuses)
        with pytest.raises(SaveError, match="checkpoint-8 was not written"):
            save(tmp_path, 8, size=2000)
    assert content(find_last(tmp_path)) == 2000


def test_two_are_kept(tmp_path):
    for step in (1, 2, 30):
        checkpoints.prune(save(tmp_path, step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-30"]


def test_damaged_ones_ahead_do_not_push_whole_ones_out(tmp_path):
    for step in (10, 30, 40, 50):
        save(tmp_path, step)
    for step in (40, 50):
        cut(tmp_path / f"checkpoint-{step}" / "adapter.bin")
    checkpoints.prune(save(tmp_path, 35))
    assert find_last(tmp_path).name == "checkpoint-35"
    assert (tmp_path / "checkpoint-30").exists() and not (tmp_path / "checkpoint-10").exists()


def test_what_fails_after_the_rename_does_not_deny_the_checkpoint(tmp_path, monkeypatch):
    flush = checkpoints._flush

    def fails(path):
        if path == tmp_path:
            raise OSError(errno.EIO, "Input/output error")
        flush(path)

    monkeypatch.setattr(checkpoints, "_flush", fails)
    assert verify(save(tmp_path, 1)) and find_last(tmp_path).name == "checkpoint-1"


@pytest.mark.parametrize("listed", ['{"adapter.bin": null}', '{"adapter.bin": {"bytes": 1}}', "3"])
def test_a_manifest_of_another_form_is_damaged(tmp_path, listed):
    save(tmp_path, 1)
    (save(tmp_path, 2) / MANIFEST).write_text(f'{{"files": {listed}}}')
    with pytest.raises(ValueError, match="manifest.json must be JSON with a list of files"):
        verify(tmp_path / "checkpoint-2")
    assert find_last(tmp_path).name == "checkpoint-1"


def test_mirror_copies_whole_and_keeps_two(tmp_path):
    drive = tmp_path / "drive/runs"
    drive.parent.mkdir()
    for step in (1, 2, 3):
        assert checkpoints.mirror(save(tmp_path / "here", step, facts={"recipe": {}}), drive)
    assert sorted(path.name for path in drive.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert json.loads((drive / "checkpoint-3" / MANIFEST).read_text()) == json.loads(
        (tmp_path / "here/checkpoint-3" / MANIFEST).read_text()
    )
    shutil.rmtree(tmp_path / "here")  # the virtual machine is gone
    assert find_last(tmp_path / "here", drive) == drive / "checkpoint-3"


def test_a_vanished_drive_only_warns(tmp_path, capsys, monkeypatch):
    source = save(tmp_path / "here", 1)
    assert checkpoints.mirror(source, tmp_path / "unmounted/runs") is False
    assert not (tmp_path / "unmounted").exists()
    (tmp_path / "drive").mkdir()

    def vanishes(*_, **__):
        raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    monkeypatch.setattr(shutil, "copytree", vanishes)
    assert checkpoints.mirror(source, tmp_path / "drive/runs") is False
    said = capsys.readouterr().out
    assert said.count("Warning: checkpoint-1 was not copied") == 2
    assert "not connected" in said and "training goes on" in said
    assert verify(source) and not list((tmp_path / "drive/runs").glob("checkpoint-*"))


def test_a_damaged_checkpoint_is_not_mirrored_and_only_warns(tmp_path, capsys):
    source = save(tmp_path / "here", 1)
    cut(source / "adapter.bin")
    (tmp_path / "drive").mkdir()
    assert checkpoints.mirror(source, tmp_path / "drive/runs") is False
    assert "Warning: checkpoint-1 was not copied" in capsys.readouterr().out


def test_a_drive_that_cannot_be_read_is_passed_over(tmp_path, capsys, monkeypatch):
    save(tmp_path, 1)
    glob = Path.glob

    def broken(self, pattern):
        if self.name == "drive":
            raise OSError(errno.EIO, "Input/output error")
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", broken)
    assert find_last(tmp_path, tmp_path / "drive").name == "checkpoint-1"
    assert "drive cannot be read" in capsys.readouterr().out
