"""Every shipped config is valid as it stands, and says how it is run."""

import json
import re
import shlex
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import timm
import yaml

from benchmarks import overlays
from snell_lightning.cli import SHIPPED_CONFIGS, arrange_arguments, make_cli
from snell_lightning.lightning_cli import SnellCLI
from snell_lightning.messages import ConfigError

# Those of the published runs, paper/BENCHMARK/GROUP/, are compared with their table in test_recipes.py.
CONFIGS = sorted(
    name
    for path in SHIPPED_CONFIGS.rglob("*.yaml")
    if (name := path.relative_to(SHIPPED_CONFIGS).as_posix()).count("/") < 2
)
# Overlays say what to change and are put behind a complete job.
OVERLAYS = ("trainer/", "data/", "backbone/", "paper/")
JOB = "vit.yaml"


@pytest.fixture
def parse(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that parses a command line, checks every value and gives the config; nothing is created or run."""

    def run(*arguments: str) -> Any:
        monkeypatch.setattr("sys.argv", ["snell_lightning"])
        monkeypatch.setattr(SnellCLI, "instantiate_classes", lambda self: None)
        monkeypatch.setattr(SnellCLI, "_run_subcommand", lambda self, subcommand: None)
        cli = make_cli(arguments)
        return cli.config[cli.config.subcommand]

    return run


def header(name: str) -> str:
    """The comment block that a config opens with, without comment signs."""
    lines = (SHIPPED_CONFIGS / name).read_text(encoding="utf-8").splitlines()
    block = []
    for line in lines:
        if not line.startswith("#"):
            break
        block.append(line.lstrip("#").removeprefix(" "))
    return "\n".join(block)


def commands(name: str) -> list[list[str]]:
    """The command lines in a config's header, each as the arguments behind the program's name."""
    text = re.sub(r"\\\n\s*", " ", header(name))
    found = re.findall(r"^\s+.*-m snell_lightning (.*)$", text, flags=re.MULTILINE)
    return [shlex.split(command) for command in found]


def test_configs_are_found() -> None:
    assert JOB in CONFIGS
    assert {f"{Path(name).parent}/" for name in CONFIGS} >= set(OVERLAYS)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_valid(name: str, parse: Any) -> None:
    below = ["--config", JOB] if name.startswith(OVERLAYS) else []
    config = parse("fit", *below, "--config", name)
    given = yaml.safe_load((SHIPPED_CONFIGS / name).read_text(encoding="utf-8"))
    # What the file says is what comes out.
    for group in given.keys() & {"trainer", "data", "checkpoint", "monitor"}:
        for key, value in given[group].items():
            if not isinstance(value, (dict, list)):
                assert str(config[group][key]) == str(value), f"{group}.{key}"


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_opens_with_the_command_that_runs_it(name: str) -> None:
    assert header(name), "no comment block at the top"
    found = commands(name)
    assert found, "no command in the header"
    for command in found:
        assert command[0].isidentifier() or command[0] == "check-data"
        configs = [value for key, value in pairwise(command) if key == "--config"]
        assert name in configs
        # All configs that it names are there.
        assert len(arrange_arguments(command)) >= len(command)


@pytest.mark.parametrize("name", list(overlays.configs()))
def test_every_backbone_says_what_memory_it_takes(name: str) -> None:
    path, recorded = overlays.configs()[name], json.loads(overlays.RESULTS.read_text())[name]

    assert overlays.line(recorded["peak_gib"]) in path.read_text()
    assert recorded["backbone"] == overlays.job_of(path).backbone
    # A name that timm has, with weights.
    assert timm.is_model_pretrained(recorded["backbone"])


@pytest.mark.parametrize("name", ["vit_s16", "dinov2_s14"])
def test_what_is_said_of_the_memory_is_what_is_planned(name: str) -> None:
    found = overlays.plan(overlays.configs()[name])

    assert found == pytest.approx(json.loads(overlays.RESULTS.read_text())[name]["peak_gib"], abs=0.011)


def test_a_config_with_an_unknown_key_would_not_pass(parse: Any, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text("trainer:\n  max_epoch: 3\n")
    with pytest.raises(ConfigError, match="max_epoch"):
        parse("fit", "--config", JOB, "--config", str(tmp_path / "wrong.yaml"))
