"""The memory that each shipped backbone takes, in the header of its config.

    python -m benchmarks.overlays            all of them: about ten minutes
    python -m benchmarks.overlays vit_s16    those named

plans a training step of 32 images on fake tensors, as `python -m snell_lightning memory` does, for SNELL as the configs
have it, in mixed bf16 (trainer/bf16.yaml), with whole blocks recomputed, and for full fine-tuning, and writes the peaks
into the headers and into results/overlays.json. Nothing is downloaded, and nothing of the backbones is computed.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from snell_lightning.adapters import SnellConfig
from snell_lightning.memory import Job, Planner

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "overlays.json"
BATCH = 32
JOBS = ("swin", "convnext", "dinov2")


def configs() -> dict[str, Path]:
    """The configs that name a backbone from the hub, by their names."""
    found = {name: ROOT / "configs" / f"{name}.yaml" for name in JOBS}
    return found | {path.stem: path for path in sorted((ROOT / "configs" / "backbone").glob("*.yaml"))}


def job_of(path: Path) -> Job:
    """What a config trains; an overlay's is put behind vit.yaml."""
    given = yaml.safe_load(path.read_text())
    model = yaml.safe_load((ROOT / "configs" / "vit.yaml").read_text())["model"] | given["model"]
    return Job(
        model["backbone"], 10, SnellConfig(**model["adapter"]), image_size=given.get("data", {}).get("image_size")
    )


def plan(path: Path) -> dict[str, float]:
    """Peaks in GiB."""
    job = job_of(path)
    assert job.adapter is not None
    variants = {
        "snell": job,
        "bf16": replace(job, precision="bf16-mixed"),
        "blocks": replace(job, adapter=replace(job.adapter, recompute="blocks")),
        "full": replace(job, method="full"),
    }
    return {name: round(Planner(each).plan(BATCH).peak / 2**30, 2) for name, each in variants.items()}


def line(peaks: dict[str, float]) -> str:
    """What stands in a header."""
    return (
        f"Memory of a step of {BATCH} images, planned: {peaks['snell']:.2f} GiB; {peaks['bf16']:.2f} in mixed bf16, "
        f"{peaks['blocks']:.2f} with recompute: blocks;\n# full fine-tuning takes {peaks['full']:.2f} GiB. "
        "From: python -m benchmarks.overlays"
    )


def run(names: list[str]) -> dict[str, Any]:
    """Plan the configs of these names, or all, and write what was found."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name, path in configs().items():
        if names and name not in names:
            continue
        results[name] = {"backbone": job_of(path).backbone, "peak_gib": plan(path)}
        text = re.sub(
            r"Memory(: -| of a step (.|\n)*?benchmarks\.overlays)", line(results[name]["peak_gib"]), path.read_text()
        )
        path.write_text(text)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=2) + "\n")
        print(name, results[name], flush=True)
    return results


if __name__ == "__main__":
    run(sys.argv[1:])
