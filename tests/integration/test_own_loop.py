"""The README's loop of one's own, as it stands there, and its result in a fresh process."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[2] / "README.md"

# Small backbones whose random weights stand for pretrained ones, two batches of images, and the logits at the end.
BEFORE = """
import timm
import torch

create_model = timm.create_model

def small(name, pretrained, **arguments):
    assert pretrained and name == "vit_base_patch16_224"
    torch.manual_seed(0)
    return create_model("{name}", **arguments)

timm.create_model = small
generator = torch.Generator().manual_seed(1)
loader = [(torch.randn(8, 3, {pixels}, {pixels}, generator=generator), torch.arange(8)) for _ in range(2)]
"""
AFTER = """
with torch.no_grad():
    torch.save(model.eval()(loader[0][0]), "{file}")
"""


def blocks() -> list[str]:
    """The README's Python blocks."""
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.parametrize(("name", "pixels"), [("test_vit", 160), ("test_efficientnet", 64)])
def test_gives_the_same_logits_where_it_is_used(name: str, pixels: int, tmp_path: Path) -> None:
    train, use = blocks()
    tune, plain = use.index("load_adapter("), use.index("merge(model).eval()")
    assert tune < plain
    steps = {"untuned": use[:tune], "loaded": use[tune:plain], "merged": use[plain:]}
    scripts = [
        train.replace("range(10)", "range(2)") + AFTER.format(file="trained"),
        "".join(code + AFTER.format(file=file) for file, code in steps.items()),
    ]
    for script in scripts:
        script = BEFORE.format(name=name, pixels=pixels) + script
        done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert not done.stderr
    logits = {file: torch.load(tmp_path / file, weights_only=True) for file in ("trained", *steps)}
    assert torch.equal(logits["loaded"], logits["trained"])
    torch.testing.assert_close(logits["merged"], logits["trained"], rtol=1e-4, atol=1e-5)
    assert (logits["untuned"] - logits["trained"]).abs().max() > 0.02
