"""The test bed itself: hosts reach each other, can be cut off, slowed and killed, and leave nothing behind."""

import subprocess
import sys
import time
from pathlib import Path

from tests.distributed.hosts import Hosts
from tests.distributed.jobs import wait_for

ECHO = """
import socket
connection, _ = socket.create_server(("", 5000)).accept()
while data := connection.recv(65536):
    connection.sendall(data)
"""
# Prints how long each answer takes.
ASK = """
import socket, time
deadline = time.monotonic() + 20
while True:
    try:
        connection = socket.create_connection(("host-1", 5000), timeout=20)
        break
    except OSError:
        assert time.monotonic() < deadline
        time.sleep(0.1)
print(socket.gethostname(), connection.getsockname()[0], flush=True)
while True:
    before, left = time.monotonic(), 5000
    connection.sendall(b"x" * left)
    while left:
        left -= len(connection.recv(left))
    print(time.monotonic() - before, flush=True)
    time.sleep(0.02)
"""


def test_hosts_reach_each_other_as_long_as_their_link_is_up(needs_hosts: None, tmp_path: Path) -> None:
    printed = tmp_path / "printed.txt"

    def answers() -> list[float]:
        return [float(line) for line in printed.read_text().splitlines()[1:]]

    with Hosts(2) as hosts:
        hosts.start(1, [sys.executable, "-c", ECHO], tmp_path / "echo.txt")
        hosts.start(0, [sys.executable, "-c", ASK], printed)
        wait_for(lambda: printed.exists() and len(printed.read_text().splitlines()) > 20, seconds=20)
        assert printed.read_text().splitlines()[0] == "host-0 10.77.0.1"
        assert min(answers()) < 0.02
        assert hosts.sent(0) > 20 * 5000

        hosts.cut(1)
        time.sleep(0.3)
        before = len(answers())
        time.sleep(0.5)
        assert len(answers()) == before
        hosts.restore(1)
        wait_for(lambda: len(answers()) > before + 1, seconds=20)

        hosts.slow(1, delay=0.05, loss=0.02)
        before = len(answers()) + 1
        wait_for(lambda: len(answers()) > before + 5, seconds=20)
        assert min(answers()[before:]) >= 0.1

        assert hosts.processes(1)
        hosts.kill(1)
        assert not hosts.processes(1)
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    assert hosts._hub not in left
    assert not any(space in left for space in hosts._spaces)


def test_hosts_go_also_when_a_test_fails(needs_hosts: None, tmp_path: Path) -> None:
    try:
        with Hosts(1) as hosts:
            started = hosts.start(0, ["sleep", "100"], tmp_path / "printed.txt")
            raise AssertionError
    except AssertionError:
        assert started.returncode is not None
    assert hosts._hub not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
