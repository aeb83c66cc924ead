"""Whole files or none, and one owner of a folder at a time, however the owner ends."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from recsys_importance.folders import check_room, locked, replace

OWNER = """
import pathlib, sys, time
from recsys_importance.folders import locked

with locked(sys.argv[1]):
    pathlib.Path(sys.argv[2]).write_text("here")
    time.sleep(120)
"""


def owner_of(folder, sign, repository):
    """A process that has the folder."""
    path = os.pathsep.join([str(repository), os.environ.get("PYTHONPATH", "")])
    run = subprocess.Popen([sys.executable, "-c", OWNER, str(folder), str(sign)], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while not sign.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sign.exists()
    return run


def test_a_second_process_is_told_the_first_and_a_killed_one_leaves_no_lock(tmp_path, repository):
    folder = tmp_path / "deep" / "folder"
    run = owner_of(folder, tmp_path / "sign", repository)
    try:
        words = rf"folder is in use by process {run.pid} on {socket.gethostname()}; wait until that has ended, or choose another folder"
        for _ in range(2):  # a refused one changes nothing
            with pytest.raises(ValueError, match=words), locked(folder, wait=0):
                pytest.fail("two owners")
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait(20)
    assert [path.name for path in folder.iterdir()] == [".lock"]  # a leftover without an owner
    with locked(folder):
        assert (folder / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    assert list(folder.iterdir()) == []


def test_a_lock_waits_for_an_owner_that_is_about_to_finish(tmp_path):
    has, order = threading.Event(), []

    def first():
        with locked(tmp_path):
            has.set()
            time.sleep(0.2)
            order.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert has.wait(20)
    with locked(tmp_path, wait=20):
        order.append("second")
    thread.join()
    assert order == ["first", "second"]


def test_many_threads_have_a_folder_one_at_a_time(tmp_path):
    inside, most, done = [], [], []

    def work():
        for _ in range(5):
            with locked(tmp_path, wait=60):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(done) == 4 and set(most) == {1} and len(most) == 20
    assert list(tmp_path.iterdir()) == []


def test_an_error_inside_frees_the_folder(tmp_path):
    with pytest.raises(InterruptedError), locked(tmp_path):
        raise InterruptedError
    with locked(tmp_path, wait=0):
        pass


def test_folders_that_cannot_be_made_or_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match="cannot be written to .*; choose another folder"), locked(folder):
            pytest.fail("it was")
    assert (tmp_path / "file").read_text() == "not a folder"


def test_room_on_the_disk(tmp_path, monkeypatch):
    check_room(tmp_path, 1)
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(ValueError, match="lies on a disk with .* MB free, and up to .* MB are to be written there; make room or choose"):
        check_room(tmp_path, 2 * free)


def test_a_file_is_whole_or_absent(tmp_path):
    def half(path):
        path.write_text("half")
        raise InterruptedError

    path = tmp_path / "report.txt"
    with pytest.raises(InterruptedError):
        replace(path, half)
    assert list(tmp_path.iterdir()) == []
    replace(path, lambda temporary: temporary.write_text("one"))
    with pytest.raises(InterruptedError):
        replace(path, half)
    assert path.read_text() == "one" and len(list(tmp_path.iterdir())) == 1
