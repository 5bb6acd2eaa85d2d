"""Where the processes of a cluster live: hosts of their own in network namespaces, or loopback.

    hub (a bridge) ── veth ── learner 10.83.0.10
                   ├─ veth ── redis   10.83.0.11
                   └─ veth ── …

All of it lies in namespaces called `<name>-<host>`; the machine's own network is not touched. A
process keeps the network that it was started in; a cut link stays up on neither side, and what was
on its way is lost. Needs root and iproute2; `tc` makes links slow (netem where the kernel has it,
else tbf: less bandwidth, longer queues).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
from collections.abc import Sequence
from typing import Protocol

PREFIX = "10.83.0"
SLOWNESS = (  # the first that the kernel has
    "netem delay 150ms 50ms loss 3% rate 1mbit",
    "tbf rate 400kbit burst 8kb latency 800ms",
)


class Ground(Protocol):
    """What a cluster stands on."""

    cuttable: bool  # links can be cut and slowed

    def address(self, host: str) -> str: ...
    def port(self, wanted: int) -> int: ...
    def enter(self, host: str, command: Sequence[str]) -> list[str]: ...
    def cut(self, host: str) -> None: ...
    def slow(self, host: str) -> None: ...
    def heal(self, host: str) -> None: ...
    def is_cut(self, host: str) -> bool: ...
    def is_slow(self, host: str) -> bool: ...
    def close(self) -> None: ...


class Loopback:
    """Every host is this machine: links cannot be cut."""

    cuttable = False

    def address(self, host: str) -> str:
        return "127.0.0.1"

    def port(self, wanted: int) -> int:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            return int(probe.getsockname()[1])

    def enter(self, host: str, command: Sequence[str]) -> list[str]:
        return list(command)

    def cut(self, host: str) -> None:
        raise NotImplementedError("loopback has no links to cut")

    slow = heal = cut

    def is_cut(self, host: str) -> bool:
        return False

    is_slow = is_cut

    def close(self) -> None:
        pass


class Namespaces:
    """A namespace a host, one more for the bridge between them."""

    cuttable = True

    def __init__(self, name: str, hosts: Sequence[str]) -> None:
        """Raises OSError or CalledProcessError where it is not permitted; nothing is left then."""
        self.name, self.hosts = name, list(hosts)
        sweep(name)
        try:
            self._build()
        except BaseException:  # Ctrl-C too: hosts half built would outlive us
            self.close()
            raise

    def address(self, host: str) -> str:
        return f"{PREFIX}.{10 + self.hosts.index(host)}"

    def port(self, wanted: int) -> int:
        return wanted  # every host has all ports to itself

    def enter(self, host: str, command: Sequence[str]) -> list[str]:
        """nsenter becomes the command: signals by process id reach it."""
        return [_nsenter(), f"--net=/run/netns/{self._space(host)}", "--", *command]

    def cut(self, host: str) -> None:
        self._hub("link", "set", self._veth(host), "down")

    def slow(self, host: str) -> None:
        for discipline in SLOWNESS:
            if all(self._tc("replace", side, discipline) for side in self._sides(host)):
                return

    def heal(self, host: str) -> None:
        self._hub("link", "set", self._veth(host), "up")
        for side in self._sides(host):
            self._tc("del", side, "")

    def is_cut(self, host: str) -> bool:
        """As the host itself sees its link."""
        return "NO-CARRIER" in ip("-n", self._space(host), "link", "show", "eth0")

    def is_slow(self, host: str) -> bool:
        """Both sides queue, and something went through a queue."""
        said = [self._queue(side) for side in self._sides(host)]
        queued = all("netem" in words or "tbf" in words for words in said)
        return queued and any(" Sent 0 bytes" not in words for words in said)

    def close(self) -> None:
        sweep(self.name)

    def _build(self) -> None:
        ip("netns", "add", self._space("hub"))
        self._hub("link", "set", "lo", "up")
        self._hub("link", "add", "bridge", "type", "bridge")
        self._hub("link", "set", "bridge", "up")
        for host in self.hosts:
            space, veth = self._space(host), self._veth(host)
            ip("netns", "add", space)
            self._hub("link", "add", veth, "type", "veth", "peer", "name", "eth0", "netns", space)
            self._hub("link", "set", veth, "master", "bridge", "up")
            ip("-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", space, "link", "set", device, "up")

    def _hub(self, *arguments: str) -> None:
        ip("-n", self._space("hub"), *arguments)

    def _space(self, host: str) -> str:
        return f"{self.name}-{host}"

    def _veth(self, host: str) -> str:
        return f"veth{self.hosts.index(host)}"

    def _sides(self, host: str) -> list[tuple[str, str]]:
        return [(self._space("hub"), self._veth(host)), (self._space(host), "eth0")]

    def _queue(self, side: tuple[str, str]) -> str:
        words = ["tc", "-n", side[0], "-s", "qdisc", "show", "dev", side[1]]
        return subprocess.run(words, capture_output=True, check=False, text=True).stdout

    def _tc(self, verb: str, side: tuple[str, str], discipline: str) -> bool:
        space, device = side
        words = ["tc", "-n", space, "qdisc", verb, "dev", device, "root", *discipline.split()]
        return subprocess.run(words, capture_output=True, check=False).returncode == 0


def choose(name: str, hosts: Sequence[str], wanted: bool) -> tuple[Ground, str]:
    """Namespaces where they are wanted and permitted; else loopback, and why."""
    if not wanted:
        return Loopback(), "loopback was asked for"
    try:
        return Namespaces(name, hosts), ""
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        return Loopback(), f"no network namespaces: {said or error}"
    except OSError as error:
        return Loopback(), f"no network namespaces: {error}"


def sweep(name: str) -> None:
    """Remove the namespaces of this name, also those that a dead run left behind."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        for line in ip("netns", "list").splitlines():
            if (space := line.split()[0]).startswith(f"{name}-"):
                ip("netns", "delete", space)


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, check=True, timeout=20)
    return done.stdout.decode()


def _nsenter() -> str:
    found = shutil.which("nsenter")
    if found is None or os.geteuid() != 0:
        raise FileNotFoundError("nsenter, run by root, is what enters a namespace")
    return found
