"""Every command that README, docs and config headers show is one that the command line takes."""

import re
import shlex
import shutil
from pathlib import Path

import pytest

from snell_lightning import arguments, cli
from snell_lightning.inference import merging, predicting
from snell_lightning.lightning_cli import SnellCLI

ROOT = Path(__file__).parent.parent
# Those of the published runs, paper/BENCHMARK/GROUP/, are run by test_recipes.py.
CONFIGS = sorted(
    path for path in (ROOT / "configs").rglob("*.yaml") if len(path.relative_to(ROOT / "configs").parts) < 4
)
SHOWN = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *CONFIGS,
    *sorted(path for path in (ROOT / "docker").rglob("*") if path.suffix in (".md", ".yaml", ".sbatch")),
]


def commands(path: Path) -> list[str]:
    """What follows the program's name, an image's or a batch script's on the lines of a file, or stands in JOB."""
    text = re.sub(r"\\\n[# ]*", "", path.read_text(encoding="utf-8"))
    program = r"(?:-m snell_lightning|snell_lightning:\w+|\.sbatch|JOB=\")"
    return re.findall(program + r" ?((?:fit|validate|test|predict|merge|memory|check-data) [^`\n\"]*)", text)


ALL = [(path.relative_to(ROOT).as_posix(), command) for path in SHOWN for command in commands(path)]


class ParsedError(Exception):
    """Raised in place of making model and data."""


@pytest.mark.parametrize(("where", "command"), ALL)
def test_command_shown_is_taken(where: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The folder as it is after a first run.
    run = tmp_path / "runs" / "version_0"
    run.mkdir(parents=True)
    shutil.copyfile(ROOT / "configs" / "vit.yaml", run / "config.yaml")
    (run / "adapter.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    for name in arguments._SETTINGS_FROM:
        monkeypatch.setitem(arguments._SETTINGS_FROM, name, lambda path: {"model": {}, "data": {}})

    def stop(_: object) -> None:
        raise ParsedError

    monkeypatch.setattr(SnellCLI, "before_instantiate_classes", stop)
    monkeypatch.setattr(predicting, "predict_images", stop)
    monkeypatch.setattr(merging, "merge_adapter", stop)
    with pytest.raises(SystemExit if "--help" in command else ParsedError):
        cli.make_cli(shlex.split(command))


def test_readme_and_every_config_show_a_command() -> None:
    shown = {where for where, _ in ALL}
    assert {"README.md", "docker/README.md", "docker/compose.yaml", "docker/slurm/fit.sbatch"} <= shown
    assert {path.relative_to(ROOT).as_posix() for path in CONFIGS} <= shown


def test_ci_finds_both_commands_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = dict(re.findall(r"<!-- ci: (\w+) -->\n```bash\n(.*?)\n```", text, flags=re.DOTALL))
    assert blocks["job"] == "pip install -e . && python -m snell_lightning fit --config vit.yaml"
    assert blocks["test"] == "pip install -e '.[test]' && pytest -n 2 --dist loadfile"
