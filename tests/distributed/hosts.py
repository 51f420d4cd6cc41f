"""Several hosts on one machine: network namespaces, each with an address, a name and one link to a common switch.

    host-0  10.77.0.1  eth0 ── port0 ┐
    host-1  10.77.0.2  eth0 ── port1 ┴── switch        ports and switch lie in a namespace of their own, the hub

Nothing outside these namespaces is added or changed. Files are shared by all hosts, as in a cluster with a common file
system. Delay and loss are made by a relay between port and switch, since not every kernel has netem.
"""

import array
import contextlib
import fcntl
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from pathlib import Path
from types import TracebackType

LIMIT = 400
"""Seconds after which a command on a host is killed."""
_OUTGOING = 4
_ETHTOOL, _OFFLOADS = 0x8946, (0x17, 0x1F, 0x24, 0x2C)  # SIOCETHTOOL; set tx checksums, tso, gso, gro


def reason_without() -> str | None:
    """Why there can be no hosts on this machine; None where there can."""
    missing = [tool for tool in ("ip", "unshare", "timeout", "mount", "hostname") if shutil.which(tool) is None]
    if missing:
        return f"hosts need {', '.join(missing)}: install iproute2 and util-linux"
    if os.geteuid() != 0:
        return "hosts are network namespaces, which root alone can make"
    name = f"snell-{os.getpid()}-try"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if done.returncode == 0 else f"this machine makes no network namespaces: {done.stderr.strip()}"


class Hosts:
    """Hosts that exist within a `with` block.

    Args:
        count: How many, from 1 to 9.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        prefix = f"snell-{os.getpid()}-{random.randrange(10**6)}"
        self._hub = f"{prefix}-hub"
        self._spaces = [f"{prefix}-{host}" for host in range(count)]
        self._relays: list[subprocess.Popen] = []
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> "Hosts":
        self._names = Path(tempfile.mkstemp(prefix="hosts-")[1])
        lines = [f"{self.address(host)} {self.name(host)}" for host in range(self.count)]
        self._names.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]), encoding="utf-8")
        try:
            _ip("netns", "add", self._hub)
            _ip("-n", self._hub, "link", "add", "switch", "type", "bridge")
            _ip("-n", self._hub, "link", "set", "switch", "up")
            for host, space in enumerate(self._spaces):
                _ip("netns", "add", space)
                _ip(
                    "-n",
                    self._hub,
                    "link",
                    "add",
                    f"port{host}",
                    "type",
                    "veth",
                    "peer",
                    "name",
                    "eth0",
                    "netns",
                    space,
                )
                _ip("-n", self._hub, "link", "set", f"port{host}", "master", "switch", "up")
                _ip("-n", space, "address", "add", f"{self.address(host)}/24", "dev", "eth0")
                for link in ("lo", "eth0"):
                    _ip("-n", space, "link", "set", link, "up")
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in (*self._started, *self._relays):
            # One that has just begun is not in its namespace yet.
            process.kill()
        for space in (*self._spaces, self._hub):
            _kill_all(space)
            # A namespace goes when its last process has: links go with it.
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        for process in (*self._started, *self._relays):
            process.wait(timeout=10)
        self._names.unlink(missing_ok=True)

    def name(self, host: int) -> str:
        """A host's name, which all hosts know."""
        return f"host-{host}"

    def address(self, host: int) -> str:
        """A host's address."""
        return f"10.77.0.{host + 1}"

    def start(
        self,
        host: int,
        command: Sequence[str],
        printed: Path,
        *,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.Popen:
        """Start a command on a host; it is killed after `LIMIT` seconds.

        Args:
            host: Its number.
            command: Program and arguments.
            printed: The file that what it prints is added to.
            environment: Variables beside those of this process.
            folder: Where it runs.
        """
        # Name and table of hosts are changed for this command alone.
        prepare = 'hostname "$1"; mount --bind "$2" /etc/hosts; shift 2; exec "$@"'
        inside = ["sh", "-ec", prepare, "sh", self.name(host), str(self._names)]
        space = ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts", "--mount"]
        with printed.open("a", encoding="utf-8") as file:
            process = subprocess.Popen(
                [*space, *inside, "timeout", "--signal=KILL", str(LIMIT), *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                env={**os.environ, **(environment or {})},
            )
        self._started.append(process)
        return process

    def processes(self, host: int) -> list[int]:
        """Numbers of the processes that run on a host."""
        return _processes(self._spaces[host])

    def kill(self, host: int) -> None:
        """End a host at once, as a power cut does: nobody hears of it."""
        self.cut(host)
        _kill_all(self._spaces[host])

    def cut(self, host: int) -> None:
        """Take a host off the network."""
        _ip("-n", self._hub, "link", "set", f"port{host}", "down")

    def restore(self, host: int) -> None:
        """Put a host back on the network."""
        _ip("-n", self._hub, "link", "set", f"port{host}", "up")

    def slow(self, host: int, delay: float, loss: float = 0.0) -> None:
        """Make a host's link slow.

        Args:
            host: Its number.
            delay: Seconds that each packet takes longer, in both directions.
            loss: Share of the packets that are lost.
        """
        # Packets of the relay must be whole: nothing below it divides or signs them.
        for space, link in ((self._spaces[host], "eth0"), (self._hub, f"port{host}")):
            self._in(space, "whole", link).wait(timeout=10)
        outer = (f"far{host}", f"near{host}")
        _ip("-n", self._hub, "link", "add", outer[0], "type", "veth", "peer", "name", outer[1])
        for link in outer:
            _ip("-n", self._hub, "link", "set", link, "up")
            self._in(self._hub, "whole", link).wait(timeout=10)
        _ip("-n", self._hub, "link", "set", f"port{host}", "nomaster")
        _ip("-n", self._hub, "link", "set", outer[0], "master", "switch")
        self._relays.append(self._in(self._hub, "relay", f"port{host}", outer[1], str(delay), str(loss)))

    def sent(self, host: int) -> int:
        """Bytes that a host has sent through its link, with all headers."""
        done = _ip("netns", "exec", self._spaces[host], "cat", "/sys/class/net/eth0/statistics/tx_bytes")
        return int(done)

    def _in(self, space: str, *arguments: str) -> subprocess.Popen:
        return subprocess.Popen(["ip", "netns", "exec", space, sys.executable, __file__, *arguments])


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=10)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def _processes(space: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, timeout=10)
    return [int(number) for number in done.stdout.split()]


def _kill_all(space: str) -> None:
    """Kill what runs in a namespace, and what it starts meanwhile."""
    deadline = time.monotonic() + 10
    while (numbers := _processes(space)) and time.monotonic() < deadline:
        for number in numbers:
            try:
                os.kill(number, 9)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def relay(first: str, second: str, delay: float, loss: float) -> None:
    """Carry packets between two links, in both directions, later and not all of them."""
    sockets = []
    for link in (first, second):
        sockets.append(socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3)))
        sockets[-1].bind((link, 0))
    waiting: list[tuple[float, int, int, bytes]] = []
    number = 0
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for ready in select.select(sockets, [], [], pause)[0]:
            try:
                packet, origin = ready.recvfrom(65536)
            except OSError:  # The link was cut.
                continue
            if origin[2] != _OUTGOING and random.random() >= loss:
                number += 1
                heappush(waiting, (time.monotonic() + delay, number, 1 - sockets.index(ready), packet))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, target, packet = heappop(waiting)
            with contextlib.suppress(OSError):
                sockets[target].send(packet)


def whole(link: str) -> None:
    """Have a link send packets as they are on the wire: signed, and none larger than it takes."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for command in _OFFLOADS:
            value = array.array("B", struct.pack("II", command, 0))
            address, _ = value.buffer_info()
            fcntl.ioctl(any_socket, _ETHTOOL, struct.pack("16sP", link.encode(), address))


if __name__ == "__main__":
    if sys.argv[1] == "relay":
        relay(*sys.argv[2:4], float(sys.argv[4]), float(sys.argv[5]))
    else:
        whole(sys.argv[2])
