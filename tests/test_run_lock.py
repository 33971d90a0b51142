import errno
import fcntl
import os
import signal
import socket

import pytest
from tiny_runs import in_child, wait_for

from mosa_fast.run_folder import RunFolder
from mosa_fast.run_lock import lock_folder


def hold_in_child(folder, then=None):
    """A process that holds the folder until it is killed; it has the lock when this returns."""
    ready, tell = os.pipe()

    def work():
        with lock_folder(folder):
            if then is not None:
                then()
            os.write(tell, b".")
            signal.pause()

    child = in_child(work)
    assert os.read(ready, 1) == b"."
    return child


def kill(child):
    os.kill(child, signal.SIGKILL)
    assert wait_for(child) == -signal.SIGKILL


def test_a_second_run_is_told_who_has_the_folder_and_gets_it_when_the_owner_is_killed(tmp_path):
    folder = RunFolder(tmp_path / "run")
    child = hold_in_child(folder)
    with pytest.raises(ValueError, match=f"in use by process {child} on {socket.gethostname()}, since 20") as caught:
        lock_folder(folder).__enter__()
    assert "\n" not in str(caught.value)
    assert "choose another folder with --out" in str(caught.value)
    kill(child)
    assert folder.lock.is_file()  # nobody tidied up
    with lock_folder(folder):
        assert str(os.getpid()) in folder.lock.read_text()
    assert not folder.lock.exists()


def test_a_loader_that_outlives_its_run_does_not_keep_the_folder(tmp_path):
    """Forked workers notice the death of their parent seconds later."""
    folder, workers = RunFolder(tmp_path), []
    ready, tell = os.pipe()

    def fork_a_worker():
        os.write(tell, f"{in_child(signal.pause)}\n".encode())

    child = hold_in_child(folder, fork_a_worker)
    workers.append(int(os.read(ready, 20)))
    kill(child)
    try:
        with lock_folder(folder):
            pass
    finally:
        os.kill(workers[0], signal.SIGKILL)


def test_one_process_cannot_hold_a_folder_twice_and_the_refusal_ends_nothing(tmp_path):
    folder = RunFolder(tmp_path)
    with lock_folder(folder):
        with pytest.raises(ValueError, match=f"in use by this process, {os.getpid()}"):
            lock_folder(RunFolder(tmp_path)).__enter__()

        def try_it():
            with lock_folder(folder):
                pass

        assert wait_for(in_child(try_it)) == 1


def test_a_folder_that_was_made_for_nothing_is_removed_again(tmp_path):
    folder = RunFolder(tmp_path / "new")
    with lock_folder(folder):
        pass
    assert not folder.path.exists()
    with lock_folder(folder):
        folder.write_classes(["a"])
    assert [path.name for path in folder.path.iterdir()] == ["classes.json"]


def test_a_lock_file_that_was_removed_meanwhile_is_not_taken_for_the_lock(tmp_path, monkeypatch):
    """The owner leaves, and with it goes its file, after this process has opened that and before it locks it."""
    folder, lockf, calls = RunFolder(tmp_path), fcntl.lockf, []

    def slow(file, flags):
        calls.append(file)
        if len(calls) == 1:
            folder.lock.unlink()
        return lockf(file, flags)

    monkeypatch.setattr(fcntl, "lockf", slow)
    with lock_folder(folder):
        assert folder.lock.is_file()
    assert len(calls) == 2


def test_where_the_file_system_has_no_locks_the_run_goes_on_and_says_so(tmp_path, monkeypatch, capsys):
    def none(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", none)
    with lock_folder(RunFolder(tmp_path)):
        pass
    assert "has no locks: see to it that no other run writes there" in capsys.readouterr().err
