"""Print what a job's training step takes, beside other ways to tune the same backbone."""

import multiprocessing
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table

from snell_lightning.backbones.sizes import pixels
from snell_lightning.memory.job import Job, levers
from snell_lightning.memory.planner import Planner
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
    columns, changed = _columns(job), {} if budget is None else levers(job)
    # What takes longest comes first, so that no process is left with it in the end.
    asked = [_Asked(each, (), budget) for each in changed.values()]
    asked += [_Asked(each, (batch_size, *_BATCHES), budget, exact=not place) for place, each in enumerate(columns)]
    with _answers(asked) as answers, console.status("planning"):
        helped = {setting: next(answers) for setting in changed}
        found = list(answers)
    size = f", {pixels(job.image_size)} px" if job.image_size else ""
    title = f"{job.backbone}{size}, {job.precision}, batch {batch_size}: MiB"
    console.print(_by_phase(title, columns, [each.plans[batch_size] for each in found]))
    sizes: tuple[int, ...] = _BATCHES
    if budget is not None and found[0].plans[sizes[0]].peak > budget:
        with _answers([_Asked(each, _FEWER, None) for each in columns]) as answers, console.status("planning"):
            for column, fewer in zip(found, answers, strict=True):
                column.plans.update(fewer.plans)
        sizes = _FEWER + sizes
    console.print(_by_batch(columns, found, sizes, budget))
    if budget is not None:
        for line in _within(columns, found, helped, budget):
            console.print(line, highlight=False, soft_wrap=True)
    console.print(_NOTE, style="dim", highlight=False)


@dataclass(frozen=True)
class _Asked:
    """What is to be known of a job."""

    job: Job
    batch_sizes: tuple[int, ...]
    budget: int | None
    exact: bool = True


@dataclass(frozen=True)
class _Found:
    """Plans by batch size, and the largest batch within the budget."""

    plans: dict[int, Plan]
    largest: int


def _answer(asked: _Asked) -> _Found:
    planner = Planner(asked.job)
    plans = dict(zip(asked.batch_sizes, planner.plans(asked.batch_sizes), strict=True))
    if asked.budget is None:
        return _Found(plans, 0)
    return _Found(plans, (planner.largest_batch if asked.exact else planner.likely_largest_batch)(asked.budget))


# Of the processes that plan: they inherit it, since what makes an optimizer need not travel between processes.
_to_answer: list[_Asked] = []


def _answer_number(number: int) -> _Found | None:
    # OpenMP's threads do not outlive a fork.
    torch.set_num_threads(1)
    try:
        return _answer(_to_answer[number])
    except RuntimeError as error:
        if "fork-based multiprocessing" in str(error):
            # The process that was forked had used autograd before.
            return None
        raise


@contextmanager
def _answers(asked: list[_Asked]) -> Iterator[Iterator[_Found]]:
    """Answers in turn, from one process for each processor where processes can be forked."""
    workers = min(len(asked), os.cpu_count() or 1)
    if workers == 1 or "fork" not in multiprocessing.get_all_start_methods() or sys.platform == "darwin":
        yield map(_answer, asked)
        return
    _to_answer[:] = asked
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        found = pool.imap(_answer_number, range(len(asked)))
        yield (_answer(each) if answer is None else answer for each, answer in zip(asked, found, strict=True))


def _columns(job: Job) -> list[Job]:
    """The job, and what it is compared with."""
    others = [replace(job, method="full", backbone_dtype="float32")]
    if job.adapter is not None and job.method == "snell":
        plain = replace(job, backbone_dtype="float32")
        others += [replace(plain, method="lora"), replace(plain, method="linear")]
    return [job, *others]


def _by_phase(title: str, columns: Sequence[Job], plans: Sequence[Plan]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for place, job in enumerate(columns):
        table.add_column(f"this config\n{job.label}" if place == 0 else job.label, justify="right")
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


def _by_batch(columns: Sequence[Job], found: Sequence[_Found], sizes: Sequence[int], budget: int | None) -> Table:
    table = Table(title="Peak by batch size: MiB", title_justify="left")
    table.add_column("batch", justify="right")
    for job in columns:
        table.add_column(job.label, justify="right")
    for batch_size in sizes:
        row = [each.plans[batch_size].peak for each in found]
        if budget is not None and min(row) > budget:
            break
        fits = [budget is None or peak <= budget for peak in row]
        table.add_row(str(batch_size), *(_mib(p) if fit else f"({_mib(p)})" for p, fit in zip(row, fits, strict=True)))
    if budget is not None:
        table.caption, table.caption_justify = f"(in brackets: more than {_size(budget)})", "left"
    return table


def _within(columns: Sequence[Job], found: Sequence[_Found], helped: Mapping[str, _Found], budget: int) -> list[str]:
    """What fits the budget, and which setting would help most, one sentence a line."""
    own = found[0].largest
    names = ["this config", *(job.label for job in columns[1:])]
    listed = ", ".join(f"{name} {each.largest:,}" for name, each in zip(names, found, strict=True))
    lines = [f"Largest batch within {_size(budget)}: {listed}."]
    if not helped:
        return [*lines, "No further setting saves memory."]
    best = max(helped, key=lambda setting: helped[setting].largest)
    if helped[best].largest > own:
        lines.append(f"What helps most is [bold]{best}[/bold]: batch {helped[best].largest:,} instead of {own:,}.")
    else:
        lines.append("No single further setting allows a larger batch.")
    return lines


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}" if size < 10 * _MIB else f"{size / _MIB:,.0f}"


def _size(size: int) -> str:
    return f"{size / _GIB:,.2f} GiB" if size >= _GIB else f"{size / _MIB:,.0f} MiB"
