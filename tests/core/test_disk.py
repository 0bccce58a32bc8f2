"""Files stay whole, and a folder that cannot be synced is no error."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from diagonal_sampler import disk


def busy(action, times: int):
    """The action, refused the first few times as Windows refuses it while a scanner has the file open."""
    left = [times]

    def act(*arguments, **options):
        if left[0]:
            left[0] -= 1
            raise PermissionError(errno.EACCES, "used by another process")
        return action(*arguments, **options)

    return act


def test_a_file_that_is_held_for_a_moment_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", busy(os.replace, 2))
    monkeypatch.setattr(Path, "unlink", busy(Path.unlink, 2))
    target = tmp_path / "a.txt"
    with disk.whole_file(target) as partial:
        partial.write_text("whole")
    assert target.read_text() == "whole" and os.listdir(tmp_path) == ["a.txt"]


def test_one_that_stays_held_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "BUSY_SECONDS", 0.0)
    monkeypatch.setattr(os, "replace", busy(os.replace, 100))
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(PermissionError), disk.whole_file(target) as partial:
        partial.write_text("whole")
    assert target.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]


def test_a_temporary_file_that_cannot_be_removed_does_not_hide_the_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "unlink", busy(Path.unlink, 100))
    monkeypatch.setattr(disk, "BUSY_SECONDS", 0.0)
    with pytest.raises(ValueError, match="the real one"), disk.whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise ValueError("the real one")
    assert os.listdir(tmp_path) == ["a.txt.partial"]
    with disk.whole_file(tmp_path / "a.txt") as partial:
        partial.write_text("whole")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_an_open_file_is_locked_once_until_it_is_closed(tmp_path):
    with (tmp_path / "lock").open("a+") as first, (tmp_path / "lock").open("a+") as second:
        assert disk.try_lock(first.fileno()) and not disk.try_lock(second.fileno())
        first.close()
        assert disk.try_lock(second.fileno())


@pytest.mark.skipif(os.name == "nt", reason="fcntl is of POSIX")
@pytest.mark.parametrize("error", [errno.EACCES, errno.EAGAIN, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_from_a_taken_one(tmp_path, monkeypatch, error):
    import fcntl

    def refuse(handle: int, how: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (tmp_path / "lock").open("a+") as file:
        if error in (errno.EACCES, errno.EAGAIN):
            assert not disk.try_lock(file.fileno())
        else:
            with pytest.raises(OSError, match="\\[Errno"):
                disk.try_lock(file.fileno())


@pytest.mark.skipif(os.name == "nt", reason="Windows syncs no folders")
@pytest.mark.parametrize("error, is_raised", [(errno.EINVAL, False), (errno.ENOSPC, True), (errno.EIO, True)])
def test_a_folder_whose_file_system_cannot_sync_it(tmp_path, monkeypatch, error, is_raised):
    def refuse(handle: int) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(os, "fsync", refuse)
    if is_raised:
        with pytest.raises(OSError, match="\\[Errno"):
            disk.sync_path(tmp_path)
    else:
        disk.sync_path(tmp_path)
    (tmp_path / "a.txt").write_text("whole")
    with pytest.raises(OSError, match="\\[Errno"):
        disk.sync_path(tmp_path / "a.txt")
