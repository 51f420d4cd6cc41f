"""What docker/ holds: its lock file, its commands and its batch scripts, with stand-ins for a cluster."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli", reason="reads pyproject.toml, for which Python 3.10 has no module")

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
# As clusters have it: srun starts the tasks, tells each its place, and passes on how the first one that fails fails.
SRUN = """#!/usr/bin/env bash
while [[ $1 == --* ]]; do shift; done
status=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
    SLURM_PROCID=$task SLURM_NODEID=$task SLURM_LOCALID=0 "$@" & tasks+=($!)
done
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit $status
"""
SCONTROL = "#!/bin/sh\necho localhost\n"
APPTAINER = '#!/bin/sh\necho "apptainer $1 $2 $3"\nshift 3\nexec "$@"\n'
SHORT = (
    "fit", "--config", "vit.yaml", "--trainer.accelerator", "cpu", "--trainer.max_epochs", "1",
    "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches", "1", "--model.adapter.rank", "2",
    "--trainer.enable_progress_bar", "false",
)  # fmt: skip


def locked() -> dict[str, list[str]]:
    """Version and hashes by package, as the lock file has them."""
    found: dict[str, list[str]] = {}
    for entry in re.sub(r"\\\n", " ", (DOCKER / "requirements.lock").read_text()).splitlines():
        if entry and not entry.lstrip().startswith("#"):
            requirement, *hashes = re.split(r"\s+--hash=sha256:", entry.strip())
            name, _, version = requirement.partition("==")
            found[name] = [version.strip(), *(each.strip() for each in hashes)]
    return found


def test_the_lock_file_has_what_the_package_asks_for_and_hashes_of_all_of_it() -> None:
    packages = locked()
    for name, (version, *hashes) in packages.items():
        assert re.fullmatch(r"[\d.]+", version), name
        assert hashes, name
        assert all(re.fullmatch(r"[0-9a-f]{64}", each) for each in hashes), name
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in (*project["dependencies"], *project["optional-dependencies"]["heif"]):
        requirement = Requirement(text)
        assert requirement.specifier.contains(packages[requirement.name][0]), text


def test_what_builds_the_package_is_taken_out_of_the_image() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    removed = re.search(r"pip uninstall --yes (.*)", text)
    assert removed
    text_of_lock = (DOCKER / "requirements.lock").read_text()
    builds = set(re.findall(r"^([\w-]+)==[^#]*# via hatchling$", text_of_lock, flags=re.MULTILINE))
    assert set(removed[1].split()) == {"pip", "hatchling", *builds}
    # Of the CPU image the lock's CUDA packages stay out, and nothing that torch needs there.
    pattern = re.search(r"cuda = /(.*?)/", text)
    assert pattern
    dropped = {name for name in locked() if re.match(pattern[1], name)}
    assert {"nvidia-cublas", "cuda-toolkit", "triton"} <= dropped
    assert not dropped & {"torch", "torchvision", "numpy", "sympy", "timm"}


def test_the_dockerfile_is_one_that_can_be_rehearsed() -> None:
    described = importlib.util.spec_from_file_location("rehearse", DOCKER / "rehearse.py")
    assert described is not None
    assert described.loader is not None
    rehearse = importlib.util.module_from_spec(described)
    described.loader.exec_module(rehearse)
    found = rehearse.instructions((DOCKER / "Dockerfile").read_text())
    assert {word for word, _ in found} <= {*rehearse.INSTRUCTIONS, "ARG", "FROM"}
    runs = [rest for word, rest in found if word == "RUN"]
    assert len(runs) == 7
    for command in runs:
        assert subprocess.run(["sh", "-n", "-c", command]).returncode == 0, command


def services() -> dict[str, Any]:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text())["services"]


@pytest.mark.parametrize("name", ["train", "node-0", "node-1"])
def test_jobs_of_the_compose_file_are_ones_that_the_program_takes(name: str) -> None:
    from snell_lightning.arguments import arrange_arguments

    words = shlex.split(re.sub(r"\$\{JOB:-(.*?)\}", r"\1", services()[name]["command"]))
    job = words[words.index("fit") :]
    assert job[-2:] == ["--resume", "auto"]
    assert len(arrange_arguments(job[:-2])) >= len(job) - 2
    if name.startswith("node"):
        from torch.distributed.run import parse_args

        launch = parse_args(words)
        assert (launch.nnodes, launch.training_script) == ("2", "snell_lightning")


@pytest.mark.parametrize("script", sorted(path.name for path in DOCKER.glob("slurm/*.sbatch")))
def test_batch_script_trains_in_two_tasks(script: str, tmp_path: Path) -> None:
    stand_ins = tmp_path / "bin"
    stand_ins.mkdir()
    for name, text in {"srun": SRUN, "scontrol": SCONTROL, "apptainer": APPTAINER}.items():
        (stand_ins / name).write_text(text)
        (stand_ins / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "31", "SLURM_JOB_NAME": "snell", "SLURM_NTASKS": "2", "SLURM_NNODES": "2",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_NODELIST": "localhost", "SLURM_JOB_NODELIST": "localhost",
    }  # fmt: skip
    path = os.pathsep.join([str(stand_ins), str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(
        ["bash", str(DOCKER / "slurm" / script), *SHORT],
        env={**os.environ, **slurm, "PATH": path, "IMAGE": "snell.sif", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("apptainer exec --nv snell.sif") == 2
    launcher = "SLURM" if script == "fit.sbatch" else "torchrun"
    assert f"{launcher} started 2 processes, 1 on each of 2 machines: trainer.num_nodes 2" in done.stderr
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["version_0"]
    assert (tmp_path / "runs/version_0/adapter.safetensors").is_file()
