"""Check images before they are trained on: what is there, and what is wrong with it."""

from snell_lightning.data.check.checking import Checked, check
from snell_lightning.data.check.kinds import KINDS, Finding, Kind
from snell_lightning.data.check.report import print_report, write_report

__all__ = ["KINDS", "Checked", "Finding", "Kind", "check", "print_report", "write_report"]
