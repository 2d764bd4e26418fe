"""Machines for tests: each has a network, a host name, processes and a local disk of its own, and sees the same files as all others.

They are namespaces of this kernel on one bridge. All of a machine's processes end when its first one is killed, and that one ends when
the test process does, so nothing can stay behind. Needs root.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

NETWORK = "10.77.0"
_TOOLS = ("unshare", "nsenter", "ip", "mount", "hostname")


def why_not() -> str | None:
    """The reason why this machine cannot make such hosts; None if it can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "hosts as namespaces need root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{missing[0]} is not installed"
    tried = subprocess.run(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True)
    return f"namespaces are not allowed here: {tried.stderr.strip()}" if tried.returncode else None


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


class Host:
    """One machine. ``local`` is a folder that is another one on every host."""

    def __init__(self, name: str, address: str, folder: Path, environment: dict[str, str]):
        self.name, self.address, self._environment = name, address, environment
        self._started: list[subprocess.Popen] = []
        self.local = folder / "local"
        own_disk = folder / "disks" / name
        own_disk.mkdir(parents=True)
        self.local.mkdir(exist_ok=True)
        namespaces = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        # SIGCHLD ignored by a host's first process: the kernel then reaps its orphans
        first_process = ["bash", "-c", 'trap "" CHLD; exec sleep infinity']
        self._namespaces = subprocess.Popen([*namespaces, *first_process], preexec_fn=_die_with_parent)
        self.pid = self._pid_of_first_process()
        files = {"/etc/hosts": folder / "hosts", "/etc/nsswitch.conf": folder / "nsswitch.conf", self.local: own_disk}
        binds = "; ".join(f"mount --bind {source} {target}" for target, source in files.items())
        self.run("bash", "-ec", f"hostname {name}; {binds}; ip link set lo up")

    def _pid_of_first_process(self) -> int:
        """Outside its namespace, once it has become ``sleep``: its namespaces are complete then."""
        children = Path(f"/proc/{self._namespaces.pid}/task/{self._namespaces.pid}/children")
        for _ in range(1000):
            for pid in children.read_text().split():
                if b"sleep" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]:
                    return int(pid)
            time.sleep(0.01)
        raise RuntimeError(f"host {self.name} did not start")

    def command(self, *command: str | Path) -> list[str]:
        """``command`` on this host, as a command of the test's host."""
        return ["nsenter", f"--target={self.pid}", "--net", "--uts", "--mount", "--pid", f"--wd={os.getcwd()}", *map(str, command)]

    def run(self, *command: str | Path, check: bool = True, environment: dict[str, str] | None = None, cwd: Path | None = None, timeout: float = 300) -> subprocess.CompletedProcess:
        """A finished command, its output as text."""
        there = ["env", "-C", str(cwd), *map(str, command)] if cwd else command
        done = subprocess.run(
            self.command(*there), capture_output=True, text=True, timeout=timeout, env=self._environment | (environment or {})
        )
        assert not check or done.returncode == 0, f"{self.name}: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
        return done

    def start(self, *command: str | Path, log: Path) -> subprocess.Popen:
        """A running command, its output in a file."""
        with log.open("a") as output:
            process = subprocess.Popen(
                self.command(*command), stdout=output, stderr=output, stdin=subprocess.DEVNULL, env=self._environment, preexec_fn=_die_with_parent
            )
        self._started.append(process)
        return process

    def cut_off(self, cut: bool = True) -> None:
        """Take the network cable out, or put it back."""
        self.run("ip", "link", "set", "eth0", "down" if cut else "up")

    def kill(self) -> None:
        """End all of this host's processes at once, as a power cut does."""
        self._namespaces.kill()
        self._namespaces.wait()

    def wait_until_gone(self) -> None:
        """After ``kill``: the kernel takes seconds to end the rest."""
        for process in self._started:
            process.kill()  # it outlives what it started only if somebody has stopped it
            process.wait()
        for _ in range(3000):
            if not Path(f"/proc/{self.pid}").exists():
                return
            time.sleep(0.01)
        raise RuntimeError(f"host {self.name} does not end")


class Hosts:
    """A first host, called ``login``, and others on one network. ``folder`` holds their files and their local disks."""

    def __init__(self, folder: Path, names: list[str], environment: dict[str, str]):
        self.addresses = {"login": f"{NETWORK}.1"} | {name: f"{NETWORK}.{number}" for number, name in enumerate(names, 10)}
        lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in self.addresses.items())]
        (folder / "hosts").write_text("\n".join(lines) + "\n")
        (folder / "nsswitch.conf").write_text("passwd: files\ngroup: files\nhosts: files\n")  # no DNS: a look-up would wait for a server out of reach
        self.all: dict[str, Host] = {}
        try:
            for name, address in self.addresses.items():
                self.all[name] = Host(name, address, folder, environment)
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        login = self.all["login"]
        login.run("ip", "link", "add", "bridge", "type", "bridge", "forward_delay", "0")
        login.run("ip", "address", "add", f"{login.address}/24", "dev", "bridge")
        login.run("ip", "link", "set", "bridge", "up")
        for name, host in self.all.items():
            if host is login:
                continue
            cable = f"to-{name}"
            # not inside its process namespace: the other end is named by a pid as the test sees it
            subprocess.run(
                ["nsenter", f"--target={login.pid}", "--net", "ip", "link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", str(host.pid)],
                check=True,
            )
            login.run("ip", "link", "set", cable, "master", "bridge", "up")
            host.run("ip", "address", "add", f"{host.address}/24", "dev", "eth0")
            host.run("ip", "link", "set", "eth0", "up")

    def close(self) -> None:
        """End every process of all hosts."""
        for host in self.all.values():
            host.kill()
        for host in self.all.values():
            host.wait_until_gone()
