"""What the reaper ends, and when."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import threading

import psutil

from deploy.reaper import Reaper

SLEEPER = [sys.executable, "-c", "import signal; signal.pause()"]


def test_it_ends_what_it_was_told_and_removes_the_folder(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "ray"
    folder.mkdir()
    with subprocess.Popen(SLEEPER) as named, subprocess.Popen(SLEEPER) as other:
        reaper = Reaper(str(folder))
        reaper.watch([psutil.Process(named.pid), psutil.Process(other.pid)])
        reaper.watch([psutil.Process(named.pid)])
        assert named.poll() is None
        reaping = threading.Thread(target=reaper.reap)
        reaping.start()
        assert named.wait() == -9
        reaping.join()
        assert other.poll() is None
        assert not folder.exists()
        other.kill()


def test_it_acts_when_its_starter_is_killed(tmp_path: pathlib.Path) -> None:
    code = (
        "import psutil, signal, sys; from deploy.reaper import Reaper\n"
        "reaper = Reaper(sys.argv[1]); reaper.watch([psutil.Process(int(sys.argv[2]))])\n"
        "print('watching', flush=True); signal.pause()"
    )
    folder = tmp_path / "ray"
    folder.mkdir()
    with subprocess.Popen(SLEEPER) as named:
        command = [sys.executable, "-c", code, str(folder), str(named.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as starter:
            assert starter.stdout is not None
            starter.stdout.readline()
            reaper = psutil.Process(starter.pid).children()
            starter.kill()
        assert named.wait(10) == -9
        psutil.wait_procs(reaper, timeout=10)
        assert not folder.exists()


def test_a_pid_that_now_belongs_to_another_process_is_left_alone(tmp_path: pathlib.Path) -> None:
    class Earlier(psutil.Process):
        def create_time(self) -> float:
            return super().create_time() - 60

    with subprocess.Popen(SLEEPER) as other:
        reaper = Reaper(str(tmp_path / "ray"))
        reaper.watch([Earlier(other.pid)])
        reaper.reap()
        assert other.poll() is None
        other.kill()
