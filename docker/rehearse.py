#!/usr/bin/env python3
"""Play the Dockerfile without a container engine: its RUN lines in fresh Debian roots, its COPY lines as copies.

    sudo python3 docker/rehearse.py FOLDER [TORCH=cuda] [-- ARGUMENTS]

builds into FOLDER, which takes 18 GB, and runs the image with these arguments, as its user.

Needs root, debootstrap and chroot. What an engine adds (layers, caches, limits, networks) is not rehearsed.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

DOCKER = Path(__file__).resolve().parent
PROJECT = DOCKER.parent
INSTRUCTIONS = ("RUN", "ENV", "COPY", "USER", "WORKDIR", "ENTRYPOINT", "CMD")
# What a machine behind a mirror or a proxy needs to be told; no part of the image.
PASSED = ("PIP_CERT", "PIP_INDEX_URL", "http_proxy", "https_proxy", "no_proxy")
_ALONE = "REHEARSING"


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile and what follows each of them, on one line."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word]


class Stage:
    """A root that a stage's instructions are played in."""

    def __init__(self, root: Path, parent: "Stage | None") -> None:
        self.root = root
        self.variables = dict(parent.variables) if parent else {"PATH": "/usr/local/bin:/usr/bin:/usr/sbin:/bin:/sbin"}
        self.user, self.folder, self.entry, self.command = "0", "/", [], []

    def run(self, command: list[str], user: str = "0", folder: str = "/") -> None:
        """Run a command in the root."""
        shutil.copyfile("/etc/resolv.conf", self.root / "etc/resolv.conf")
        passed = {name: os.environ[name] for name in PASSED if name in os.environ}
        if "PIP_CERT" in passed:
            shutil.copyfile(passed["PIP_CERT"], self.root / "tmp/mirror.crt")
            passed["PIP_CERT"] = "/tmp/mirror.crt"
        settings = [f"{name}={value}" for name, value in {**passed, **self.variables}.items()]
        mount = 'mount --types proc proc "$1/proc"; mount --rbind /dev "$1/dev"; shift; exec "$@"'
        inside = [
            "chroot",
            f"--userspec={user}:{user}",
            self.root,
            "env",
            "-i",
            f"--chdir={folder}",
            *settings,
            *command,
        ]
        subprocess.run(["unshare", "--mount", "sh", "-ec", mount, "sh", self.root, *inside], check=True)


def copy(source: Path, target: Path) -> None:
    """Copy a file, or what is in a folder, with links and rights."""
    target.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run(["cp", "-a", f"{source}/." if source.is_dir() else source, target], check=True)


def build(folder: Path, arguments: dict[str, str]) -> Stage:
    """Play all stages that the last one is made of."""
    stages: dict[str, list[tuple[str, str]]] = {}
    defaults: dict[str, str] = {}
    for word, rest in instructions((DOCKER / "Dockerfile").read_text(encoding="utf-8")):
        if word == "ARG" and not stages:
            name, _, value = rest.partition("=")
            defaults[name] = arguments.get(name, value)
        elif word == "FROM":
            name = rest.split()[-1]
            stages[name] = [(word, re.sub(r"\$\{(\w+)\}", lambda found: defaults[found[1]], rest))]
        else:
            stages[name].append((word, rest))
    made: dict[str, Stage] = {}

    def make(name: str) -> Stage:
        if name not in made:
            made[name] = play(folder / name, stages[name], make)
        return made[name]

    return make(list(stages)[-1])


def play(root: Path, lines: list[tuple[str, str]], make: Callable[[str], "Stage"]) -> Stage:
    """Play one stage."""
    base = lines[0][1].split()[0]
    parent = None if ":" in base else make(base)
    stage = Stage(root, parent)
    print(f"== {root.name}, from {base}", flush=True)
    if parent is None:
        root.mkdir(parents=True)
        release = base.partition(":")[2].removesuffix("-slim")
        subprocess.run(["debootstrap", "--variant=minbase", release, root], check=True, stdout=subprocess.DEVNULL)
    else:
        copy(parent.root, root)
    for word, rest in lines[1:]:
        if word not in INSTRUCTIONS:
            raise SystemExit(f"error: {word} is not rehearsed; known are {', '.join(INSTRUCTIONS)}")
        print(f"{word} {rest}", flush=True)
        if word == "RUN":
            stage.run(["/bin/sh", "-c", rest], folder=stage.folder)
        elif word == "ENV":
            for setting in shlex.split(rest):
                name, _, value = setting.partition("=")
                stage.variables[name] = value.replace("$PATH", stage.variables["PATH"])
        elif word == "COPY":
            words = rest.split()
            sources = PROJECT
            if words[0].startswith("--from="):
                sources = make(words.pop(0).partition("=")[2]).root
            for source in words[:-1]:
                target = root / words[-1].lstrip("/")
                copy(sources / source.lstrip("/"), target / source if words[-1].endswith("/") else target)
        elif word == "USER":
            stage.user = rest
        elif word == "WORKDIR":
            stage.folder = rest
        elif word == "ENTRYPOINT":
            stage.entry = json.loads(rest)
        elif word == "CMD":
            stage.command = json.loads(rest)
    return stage


def main() -> None:
    """Build, and run."""
    if _ALONE not in os.environ:
        # What is mounted below the folder is seen by nobody else, and gone when this ends.
        os.execvpe("unshare", ["unshare", "--mount", sys.executable, *sys.argv], {**os.environ, _ALONE: "1"})
    given, _, command = " ".join(map(shlex.quote, sys.argv[1:])).partition(" -- ")
    folder, *arguments = shlex.split(given)
    stage = build(Path(folder).resolve(), dict(argument.split("=", 1) for argument in arguments))
    size = subprocess.run(["du", "-sh", stage.root], capture_output=True, text=True).stdout.split()[0]
    print(f"== the image: {size}", flush=True)
    stage.run([*stage.entry, *(shlex.split(command) or stage.command)], stage.user, stage.folder)


if __name__ == "__main__":
    main()
