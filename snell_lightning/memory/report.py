"""Print what a job's training step takes, beside other ways to tune the same backbone."""

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console
from rich.table import Table

from snell_lightning.memory.job import Job
from snell_lightning.memory.planner import Planner, best_lever
from snell_lightning.memory.trace import Plan

_MIB, _GIB = 2**20, 2**30
_BATCHES = (4, 8, 16, 32, 64, 128, 256)
# A step of fewer images is a plan of its own: made where that is what fits.
_FEWER = (1, 2)
_NOTE = (
    "Planned without running: tensors of one training step on one device. Not counted: what an allocator rounds up and "
    "caches, a GPU's context, workspaces of libraries."
)


def report(job: Job, batch_size: int, budget: int | None = None, console: Console | None = None) -> None:
    """Print tables of a job's memory: by phase at one batch size, by batch size, and what fits a budget.

    Beside the job stand full fine-tuning, LoRA of the same rank and a linear probe, at the same precision and without
    the job's other settings that save memory.

    Args:
        job: What is run.
        batch_size: Images in a batch.
        budget: Bytes to fit into, or None.
        console: Where to print; by default standard output.

    Raises:
        UserError: The backbone or the adapter cannot be made as the job says.
    """
    console = console or Console()
    planners = [Planner(each) for each in _columns(job)]
    size = planners[0].job.image_size
    pixels = f", {size} px" if size else ""
    with console.status("planning"):
        plans = [planner.plans([batch_size])[0] for planner in planners]
    console.print(_by_phase(f"{job.backbone}{pixels}, {job.precision}, batch {batch_size}: MiB", planners, plans))
    with console.status("planning"):
        by_batch = _by_batch(planners, budget)
    console.print(by_batch)
    if budget is not None:
        with console.status("planning"):
            lines = _within(planners, budget)
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)
    console.print(_NOTE, style="dim", highlight=False)


def _columns(job: Job) -> list[Job]:
    """The job, and what it is compared with."""
    others = [replace(job, method="full", backbone_dtype="float32")]
    if job.adapter is not None and job.method == "snell":
        plain = replace(job, backbone_dtype="float32")
        others += [replace(plain, method="lora"), replace(plain, method="linear")]
    return [job, *others]


def _by_phase(title: str, planners: Sequence[Planner], plans: Sequence[Plan]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for place, planner in enumerate(planners):
        table.add_column(f"this config\n{planner.job.label}" if place == 0 else planner.job.label, justify="right")
    names = {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "optimizer state",
        "images": "images",
        "activations": "kept for backward",
        "temporaries": "temporaries",
    }
    for kind, name in names.items():
        table.add_row(name, *(_mib(plan.at_peak[kind]) for plan in plans))
    table.add_section()
    table.add_row("peak", *(_mib(plan.peak) for plan in plans), style="bold", end_section=True)
    table.add_row("peak in forward", *(_mib(plan.forward) for plan in plans))
    table.add_row("peak in backward", *(_mib(plan.backward) for plan in plans))
    table.add_row("peak in the step", *(_mib(plan.step) for plan in plans), end_section=True)
    table.add_row("kept, all of it", *(_mib(plan.activations) for plan in plans))
    table.add_row("gradients, all", *(_mib(plan.gradients) for plan in plans))
    return table


def _by_batch(planners: Sequence[Planner], budget: int | None) -> Table:
    table = Table(title="Peak by batch size: MiB", title_justify="left")
    table.add_column("batch", justify="right")
    for planner in planners:
        table.add_column(planner.job.label, justify="right")
    sizes: tuple[int, ...] = _BATCHES
    if budget is not None and planners[0].plans(sizes[:1])[0].peak > budget:
        sizes = _FEWER + sizes
    peaks = [[plan.peak for plan in planner.plans(sizes)] for planner in planners]
    for batch_size, row in zip(sizes, zip(*peaks, strict=True), strict=True):
        if budget is not None and min(row) > budget:
            break
        fits = [budget is None or peak <= budget for peak in row]
        table.add_row(str(batch_size), *(_mib(p) if fit else f"({_mib(p)})" for p, fit in zip(row, fits, strict=True)))
    if budget is not None:
        table.caption, table.caption_justify = f"(in brackets: more than {_size(budget)})", "left"
    return table


def _within(planners: Sequence[Planner], budget: int) -> list[str]:
    """What fits the budget, and which setting would help most, one sentence a line."""
    own = planners[0].largest_batch(budget)
    others = {planner.job.label: planner.likely_largest_batch(budget) for planner in planners[1:]}
    listed = ", ".join(f"{name} {batch:,}" for name, batch in {"this config": own, **others}.items())
    lines = [f"Largest batch within {_size(budget)}: {listed}."]
    lever = best_lever(planners[0].job, budget)
    if lever is None:
        lines.append("No further setting saves memory.")
    elif lever[1] > own:
        lines.append(f"What helps most is [bold]{lever[0]}[/bold]: batch {lever[1]:,} instead of {own:,}.")
    else:
        lines.append("No single further setting allows a larger batch.")
    return lines


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}" if size < 10 * _MIB else f"{size / _MIB:,.0f}"


def _size(size: int) -> str:
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.0f} MiB"
