"""Memory: count what a training step holds, or plan it without running one.

tracker   counts the bytes of every live storage
trace     writes a step's counts down, and knows them for other batch sizes
job       what is run, and its model
planner   runs a job's step on fake tensors
report    prints plans side by side
"""

from snell_lightning.memory.job import Job, levers
from snell_lightning.memory.planner import Planner, measure, parse_bytes
from snell_lightning.memory.report import report
from snell_lightning.memory.trace import Plan
from snell_lightning.memory.tracker import Phase, StorageTracker

__all__ = [
    "Job",
    "Phase",
    "Plan",
    "Planner",
    "StorageTracker",
    "levers",
    "measure",
    "parse_bytes",
    "report",
]
