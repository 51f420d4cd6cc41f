"""The adapters are pure PyTorch: any training loop can use them."""

import subprocess
import sys

FOREIGN = ("lightning", "pytorch_lightning", "lightning_fabric", "timm", "torchvision", "jsonargparse")


def test_importing_the_adapters_imports_neither_lightning_nor_timm() -> None:
    code = (
        "import sys, snell_lightning.adapters\n"
        "from snell_lightning import SnellConfig, inject, merge\n"
        f"print([name for name in {FOREIGN} if name in sys.modules])"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
