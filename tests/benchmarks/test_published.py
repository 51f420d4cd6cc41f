"""A published benchmark in one command: what is done is not done again, and the table has the published layout."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import published
from snell_lightning.adapters import UserError
from tests.test_recipes import vtab_tree

OPTIONS = (
    "--model.backbone",
    "vit_micro_patch4_32.mnist5k",
    "--trainer.max_epochs",
    "2",
    "--trainer.accelerator",
    "cpu",
)


def command(root: Path, output: Path, *more: str) -> list[str]:
    return ["vtab", "--root", str(root), "--output", str(output), "--only", "kitti", *more, "--", *OPTIONS]


@pytest.mark.parametrize("protocol", published.SAID)
def test_a_task_is_run_scored_and_not_run_again(
    protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    vtab_tree(tmp_path / "sets" / "kitti")
    output = tmp_path / "scores"
    arguments = command(tmp_path / "sets", output, "--protocol", protocol)
    subprocess.run([sys.executable, "-m", "benchmarks.published", *arguments], check=True, cwd=published.recipes.ROOT)
    result = json.loads((output / "kitti.json").read_text())
    assert 0 <= result["score"] <= 1
    assert result["protocol"] == protocol
    assert bool(list((output / "kitti").glob("test_*"))) == (protocol == "validation")
    table = (output / "table.md").read_text()
    assert published.SAID[protocol] in table
    assert "of 1 of 19 tasks" in table
    assert f"| kitti | {100 * result['score']:.1f} |" in table

    def run(*_: str) -> None:
        raise AssertionError("nothing is left to run")

    monkeypatch.setattr(published, "_snell", run)
    published.main(arguments)
    assert "| kitti |" in capsys.readouterr().out
    other = next(each for each in published.SAID if each != protocol)
    with pytest.raises(SystemExit, match=f"is of protocol {protocol}, not {other}; name another output"):
        published.main(command(tmp_path / "sets", output, "--protocol", other))


def test_a_run_that_was_stopped_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[tuple[str, ...]] = []

    def stopped(*arguments: str) -> None:
        ran.append(arguments)
        raise SystemExit(143)

    monkeypatch.setattr(published, "_snell", stopped)
    vtab_tree(tmp_path / "sets" / "kitti")
    with pytest.raises(SystemExit, match="143"):
        published.main(command(tmp_path / "sets", tmp_path / "scores"))
    ((verb, *arguments),) = ran
    assert verb == "fit"
    assert arguments[arguments.index("--resume") + 1] == "auto"
    assert not (tmp_path / "scores" / "kitti.json").exists()


def test_the_table_has_the_published_columns_and_means_of_what_is_whole() -> None:
    tasks = published.tasks_of("vtab", "snell32")
    assert len(tasks) == 19
    scores = {task: number / 100 for number, task in enumerate(tasks, 1)}
    lines = published.table("vtab", "snell32", "validation", scores).splitlines()
    assert lines[3] == "| method | Natural | Specialized | Structured | VTAB groups | VTAB 19 |"
    assert lines[5] == "| SNELL-32, published | 82.7 | 86.1 | 61.8 | 76.9 | 74.6 |"
    # Means of 1 to 7, 8 to 11, 12 to 19, of these, and of 1 to 19.
    assert lines[6] == "| SNELL-32, here | 4.0 | 9.5 | 15.5 | 9.7 | 10.0 |"
    del scores["kitti"]
    lines = published.table("vtab", "snell32", "validation", scores).splitlines()
    assert lines[6] == "| SNELL-32, here | 4.0 | 9.5 |  |  |  |"
    sets = published.tasks_of("fgvc", "snell8")
    lines = published.table("fgvc", "snell8", "published", dict.fromkeys(sets, 0.5)).splitlines()
    assert lines[3] == "| method | CUB | NABirds | Flowers | Dogs | Cars | FGVC mean |"
    assert lines[6] == "| SNELL-8, here | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |"


def test_folders_are_found_by_the_names_that_people_have(tmp_path: Path) -> None:
    for name in ("CUB_200_2011", "nabirds", "Oxford-Flowers-102", "stanforddog"):
        (tmp_path / name).mkdir()
    found = {
        name: published.folder_of(tmp_path, name).name for name in ("cub", "nabirds", "oxfordflower", "stanforddog")
    }
    assert list(found.values()) == ["CUB_200_2011", "nabirds", "Oxford-Flowers-102", "stanforddog"]
    with pytest.raises(UserError, match="has no folder stanfordcar or StanfordCars; --only names those to run"):
        published.folder_of(tmp_path, "stanfordcar")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--only": "mars"}, "vtab has no mars; its tasks are cifar, caltech101"),
        ({"--root": "/nothing"}, "there is no folder /nothing"),
        ({"--group": "snell8"}, "snell8 was not published on vtab"),
    ],
)
def test_a_mistake_is_one_line(
    change: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"--root": str(tmp_path), "--output": str(tmp_path), **change}
    with pytest.raises(SystemExit):
        published.main(["vtab", *(part for pair in options.items() for part in pair)])
    assert message in capsys.readouterr().err
