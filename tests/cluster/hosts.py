"""Hosts on one machine: namespaces with an address, processes, shared memory and a name of their own.

What makes a cluster of several hosts hard is absent on one: an address that only works there, a process that answers
in the place of another, a shared memory that everybody sees. Here each host has its own. Needs root.
"""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import psutil

from tests.tools import absent, tool

_PROGRAMS = ("unshare", "nsenter", "ip")
_FIRST_PROCESS = """
set -e
hostname "$1"
mount -t tmpfs -o size="$2" tmpfs /dev/shm
mount -t tmpfs tmpfs "$3"
ip link set lo up
echo up
# Reaps orphans, as the first process of a host does, and ends with the host: when the other end is closed.
read -r _ || true
"""


class Host:
    """One host. Made by `Network`.

    Attributes:
        address: its IP address, by which the other hosts and this process reach it.
        pid: of its first process; all others end with it.
        folder: on a file system of its own, and short: a socket's path has no more than 107 characters.
    """

    def __init__(self, name: str, address: str, folder: str, shared_memory: str) -> None:
        self.name = name
        self.address = address
        self.folder = folder
        unshare = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
        self._process = subprocess.Popen(
            [*unshare, "bash", "-c", _FIRST_PROCESS, "bash", name, shared_memory, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "up\n":
            absent("this kernel does not let root make namespaces")
        (first,) = psutil.Process(self._process.pid).children()
        self.pid = first.pid

    def command(self, *command: str) -> list[str]:
        """What runs `command` on this host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--mount", "--uts", "--pid", *command]

    def environment(self, **added: str) -> Mapping[str, str]:
        """Of processes on this host."""
        return {**os.environ, "TMPDIR": self.folder, "RAY_TMPDIR": self.folder, **added}

    def run(self, *command: str, **environment: str) -> str:
        """Runs to the end and returns what was written; fails where the command does."""
        done = subprocess.run(
            self.command(*command),
            env=self.environment(**environment),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout

    def stop(self) -> None:
        """Ends every process of the host at once, as a loss of power does. Idempotent."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()
        self._process.kill()
        self._process.wait()


class Network:
    """Hosts that reach each other, and that this process reaches; they end with the context.

    Args:
        names: of the hosts, in the order of their addresses.
        shared_memory: size of each host's /dev/shm, as mount has it.
    """

    def __init__(self, *names: str, shared_memory: str = "64m") -> None:
        self._names = names
        self._shared_memory = shared_memory
        self._folder = tempfile.TemporaryDirectory(prefix="hosts-", dir="/tmp", ignore_cleanup_errors=True)
        # 198.18.0.0/15 is for tests of networks: this machine is in none of them.
        self._prefix = f"198.18.{os.getpid() % 256}"
        self._link = f"hosts{os.getpid()}"
        self._hosts: list[Host] = []

    def __enter__(self) -> Self:
        for program in _PROGRAMS:
            tool(program)
        if os.geteuid() != 0:
            absent("namespaces need root")
        try:
            for name in self._names:
                self.add(name)
        except BaseException:
            self.close()
            raise
        return self

    def __getitem__(self, name: str) -> Host:
        return next(host for host in reversed(self._hosts) if host.name == name)

    def add(self, name: str) -> Host:
        """Connects a new host; one that is stopped may be replaced by another of its name."""
        number = len(self._hosts) + 1
        folder = os.path.join(self._folder.name, str(number))
        os.mkdir(folder)
        host = Host(name, f"{self._prefix}.{number}", folder, self._shared_memory)
        self._hosts.append(host)
        if number == 1:
            # The switch is in the first host, and so are the ends of all cables: they go with it.
            host.run("ip", "link", "add", "switch", "up", "type", "bridge")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "switch")
            _connect(self._link, "1", host)
            _run("ip", "address", "add", f"{self._prefix}.254/24", "dev", self._link)
            _run("ip", "link", "set", self._link, "up")
        else:
            _connect("eth0", str(host.pid), self._hosts[0])
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")
        return host

    def close(self) -> None:
        """Ends all hosts. Idempotent."""
        subprocess.run(["ip", "link", "delete", self._link], stderr=subprocess.DEVNULL)
        for host in self._hosts:
            host.stop()
        self._folder.cleanup()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def signal_command(process: subprocess.Popen[str], number: signal.Signals) -> None:
    """Sends a signal to what `Host.command` runs: nsenter, its parent, passes none on."""
    (command,) = psutil.Process(process.pid).children()
    command.send_signal(number)


def _connect(device: str, namespace: str, switch: Host) -> None:
    """Lays a cable from the network namespace of the process `namespace` to a port of the switch."""
    port = f"port{namespace}"
    peer = ["peer", "name", port, "netns", str(switch.pid)]
    _run("ip", "link", "add", device, "netns", namespace, "type", "veth", *peer)
    switch.run("ip", "link", "set", port, "master", "switch", "up")


def _run(*command: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
