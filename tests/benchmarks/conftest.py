"""The benchmarks lie beside the package, not in it: the checkout's root holds them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
