"""What a check has found: tables for people, JSON for programs."""

import json
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from snell_lightning.adapters.whole import whole
from snell_lightning.data.check.checking import Checked
from snell_lightning.data.check.kinds import KINDS, Finding

_CLASSES_SHOWN = 20
_ITEMS_SHOWN = 3
_COLOURS = {"error": "red", "warning": "yellow", "note": "dim"}


def print_report(checked: Checked, console: Console | None = None) -> None:
    """Print how many images there are, of which sizes, and what was found."""
    console = console or Console()
    console.print(_counts(checked))
    formats = ", ".join(f"{count:,} {name}" for name, count in checked.formats.items() if name != "none")
    sides = ", ".join(
        f"{name} {low:,} to {high:,} (median {mid:,})" for name, (low, mid, high) in checked.sizes.items()
    )
    for line in (formats, sides):
        if line:
            console.print(line, highlight=False)
    for (level, kind), group in groupby(checked.findings, key=lambda each: (KINDS[each.kind].level, each.kind)):
        found = list(group)
        about = KINDS[kind]
        colour = _COLOURS[level]
        console.print(
            f"[{colour}]{level}[/]: {len(found):,} x {about.text}; {about.advice}", highlight=False, soft_wrap=True
        )
        for finding in found[:_ITEMS_SHOWN]:
            console.print(f"    {escape(_line(finding))}", highlight=False, soft_wrap=True)
        if len(found) > _ITEMS_SHOWN:
            console.print(f"    ... and {len(found) - _ITEMS_SHOWN:,} more", highlight=False)
    levels = [KINDS[finding.kind].level for finding in checked.findings]
    total = ", ".join(f"{levels.count(level):,} {level}s" for level in ("error", "warning", "note"))
    speed = checked.looked_at / max(checked.seconds, 1e-9)
    console.print(
        f"{total} in {checked.looked_at:,} images; {checked.seconds:.1f} s, {speed:,.0f} images a second",
        highlight=False,
    )


def write_report(checked: Checked, path: Path) -> None:
    """Write all of it as JSON: the fields of `Checked`, each finding with its level and what to do about it."""
    content = asdict(checked)
    content["findings"] = [
        {"level": KINDS[each.kind].level, "kind": each.kind, "items": list(each.items), "detail": each.detail}
        for each in checked.findings
    ]
    content["kinds"] = {
        name: {"level": kind.level, "text": kind.text, "advice": kind.advice} for name, kind in KINDS.items()
    }
    with whole(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8", errors="surrogateescape")


def _line(finding: Finding) -> str:
    shown = " = ".join(finding.items[:_ITEMS_SHOWN])
    more = f" = ... ({len(finding.items)} in all)" if len(finding.items) > _ITEMS_SHOWN else ""
    return ": ".join(part for part in (shown + more, finding.detail) if part)


def _counts(checked: Checked) -> Table:
    """Images by class and split; of many classes those with the fewest and the most."""
    table = Table(title="images", title_justify="left")
    table.add_column("class")
    splits = {split: counts for split, counts in checked.counts.items() if any(counts.values())}
    for split in splits:
        table.add_column(split, justify="right")
    names = list(checked.counts["train"])
    totals = {name: sum(counts[name] for counts in splits.values()) for name in names}
    rows: list[str | None] = list(names)
    if len(names) > _CLASSES_SHOWN:
        ordered = sorted(names, key=lambda name: (totals[name], name))
        rows = [*ordered[: _CLASSES_SHOWN // 2], None, *ordered[-_CLASSES_SHOWN // 2 :]]
    for name in rows:
        if name is None:
            table.add_row(f"... {len(names) - _CLASSES_SHOWN:,} more", *("" for _ in splits), style="dim")
        else:
            table.add_row(escape(name), *(f"{counts[name]:,}" for counts in splits.values()))
    table.add_section()
    table.add_row(f"all {len(names):,}", *(f"{sum(counts.values()):,}" for counts in splits.values()))
    return table
