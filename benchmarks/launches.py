"""Launches of a training step on an accelerator, and the bytes that they read and write. No accelerator is needed.

    pip install -e '.[bench]'
    python -m benchmarks.launches
    python -m benchmarks.launches --backbone swin_tiny_patch4_window7_224 --methods plain,full,lora,snell

A step of each method runs on tensors without data, on the path that it takes on an accelerator, and every operation is
counted that would be a launch there: none of those that only look at memory in another way, or ask for it. Its bytes
are those of the tensors that it reads and those that it writes. `plain` is the frozen backbone, with head and class
token trained; what a method adds is counted beside it. `snell, torch` is the same update made by torch's operations, as
where Triton is missing. The optimizer's step is fused, one launch whatever is trained, and is not counted.

For one layer it counts what the update moves: the bytes of all that is no product of matrices, with a single token.

Writes `benchmarks/results/launches.json`.
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.common import RESULTS, environment, mebibytes, print_table, write_result
from benchmarks.methods import Backbone, Settings, autocast, build, parse_variants
from snell_lightning.adapters import SnellConfig, SnellLinear, freeze_all_but_head
from snell_lightning.adapters.layers import linear
from snell_lightning.adapters.update import competition, loop, noise, triton

RESULT = RESULTS / "launches.json"
METHODS = "plain,full,lora,snell,snell:rounding=random,snell:dropout=0.1:drop_path=0.1"
CPU = torch.device("cpu")
# They ask for memory, or look at it in another way.
_NOTHING = frozenset(
    {
        "empty",
        "empty_like",
        "new_empty",
        "empty_strided",
        "new_empty_strided",
        "resize_",
        "set_",
        "_unsafe_view",
        "device",
    }
)
_PRODUCTS = frozenset({"mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_"})


class Launches(TorchDispatchMode):
    """Counts launches and bytes by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func._opname if func.namespace == "snell" else func._schema.name.split("::")[-1]
        if func.is_view or name in _NOTHING or name == "detach":
            return result
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        written = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        out = {id(value) for value in tree_leaves(kwargs.get("out"))}
        self.launches[name] += 1
        self.bytes[name] += sum(each.nbytes for each in [*read, *written] if id(each) not in out)
        self.bytes[name] += sum(each.nbytes for each in written if id(each) in out)
        if func.namespace == "snell":
            self._own(name, args, result)
        return result

    def _own(self, name: str, args: Any, result: Any) -> None:
        """What the programs of `adapters/update/triton` do inside an operation."""
        from snell_lightning.adapters.update.triton import table, thresholds

        p, q = args[:2]
        if name == "thresholds":
            self.launches[name] += thresholds.LAUNCHES - 1
            factors = sum(each.nbytes for each in (*p, *q))
            self.bytes[name] += (thresholds.PASSES - 1) * factors
            # The bins: set to zero, added to and read once more.
            self.bytes[name] += 4 * thresholds.PASSES * thresholds.BINS * len(p) * 4
        if name == "backward_all":
            self.launches[name] += 1
            for of_p, of_q in zip(p, q, strict=True):  # Written for each strip of tiles, then read.
                strips, blocks = -(-of_q.shape[1] // table.PLACES), -(-of_p.shape[1] // table.ROWS)
                self.bytes[name] += 2 * 4 * (strips * of_p.numel() + blocks * of_q.numel())
            if args[-1]:  # The update is written over the gradient.
                self.bytes[name] += args[6].nbytes

    @property
    def total(self) -> dict[str, int]:
        """Launches and bytes."""
        return {"launches": self.launches.total(), "bytes": self.bytes.total()}


@contextmanager
def accelerators_path(programs: bool) -> Iterator[FakeTensorMode]:
    """Tensors without data that are taken for an accelerator's, with or without the programs in Triton."""
    triton.usable.cache_clear()
    devices = frozenset({"cpu"} if programs else ())
    with (
        patch.object(triton, "DEVICES", devices),
        patch.object(loop, "applies", lambda *_: False),
        # The host draws seeds with its own generator.
        patch.object(noise, "draw_seed", lambda: 2**40),
        patch.object(linear, "draw_seed", lambda: 2**40),
        patch.object(competition, "_TILE_ON_CPU", competition._TILE_ON_ACCELERATOR),
        FakeTensorMode(allow_non_fake_inputs=True) as mode,
    ):
        if programs:
            triton.usable(CPU)  # Tried once, before anything is counted.
        yield mode
    triton.usable.cache_clear()


def without_data(model: nn.Module, mode: FakeTensorMode) -> None:
    """Put tensors without data in the place of a model's own."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: mode.from_tensor(each) for name, each in tensors.items() if each is not None})


def step(method: str, backbone: Backbone, batch: int, settings: Settings) -> Launches:
    """Launches of forward and backward."""
    programs = method != "snell, torch"
    label = {"snell, torch": "snell", "plain": "linear"}.get(method, method)
    (variant,) = parse_variants(label, settings)
    subject = build(variant, backbone, batch, CPU)
    if method == "plain":
        freeze_all_but_head(subject.model)
        for name, parameter in subject.model.named_parameters():
            if name == "cls_token":
                parameter.requires_grad_(True)
    with accelerators_path(programs) as mode:
        without_data(subject.model, mode)
        subject.images, subject.labels = mode.from_tensor(subject.images), mode.from_tensor(subject.labels)
        subject.forward().backward()
        with Launches() as counted:
            # As after an optimizer's step.
            for parameter in subject.model.parameters():
                if parameter.requires_grad:
                    torch._C._autograd._unsafe_set_version_counter((parameter,), (parameter._version + 1,))
                    parameter.grad = None
            subject.forward().backward()
    return counted


def one_layer(programs: bool, settings: Settings, shape: tuple[int, int], slices: int = 1) -> Launches:
    """Launches of one tuned layer with a single token."""
    config = SnellConfig(rank=settings.rank, sparsity=settings.sparsity, recompute="none")
    layer = SnellLinear(nn.Linear(shape[1], shape[0]), config, slices=slices)
    with accelerators_path(programs) as mode:
        without_data(layer, mode)
        x = torch.randn(1, shape[1], requires_grad=True)
        with Launches() as counted:
            with autocast(CPU, settings.precision):
                y = layer(x)
            y.sum().backward()
    for name in _PRODUCTS:
        counted.bytes.pop(name, None)
    return counted


def main(argv: Sequence[str] | None = None) -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.launches", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    settings = Settings(precision=arguments.precision, rank=arguments.rank, sparsity=arguments.sparsity)
    backbone = Backbone(arguments.backbone, classes=100)
    methods = [method.strip() for method in arguments.methods.split(",")]
    if "snell" in methods:
        methods.insert(methods.index("snell"), "snell, torch")
    found = {method: step(method, backbone, arguments.batch, settings) for method in methods}
    plain = found["plain"].total if "plain" in found else {"launches": 0, "bytes": 0}
    rows = [
        {"method": method, **counted.total, "added": counted.total["launches"] - plain["launches"]}
        | {"operations": dict(counted.launches.most_common())}
        for method, counted in found.items()
    ]
    print_table(
        f"{arguments.backbone}, batch {arguments.batch}, {arguments.precision}: a step's forward and backward",
        ("method", "launches", "more than plain", "read and written, MiB"),
        [(row["method"], row["launches"], row["added"], mebibytes(row["bytes"])) for row in rows],
    )
    layers = []
    for shape, slices in (((3072, 768), 1), ((2304, 768), 3)):
        for programs in (False, True):
            counted = one_layer(programs, settings, shape, slices)
            engine = "programs" if programs else "torch"
            layers.append({"shape": shape, "slices": slices, "engine": engine, **counted.total})
    print_table(
        f"What the update of one layer adds, rank {arguments.rank}, sparsity {arguments.sparsity:g}",
        ("layer", "slices", "made by", "launches", "read and written, MB"),
        [
            (
                " x ".join(map(str, row["shape"])),
                row["slices"],
                row["engine"],
                row["launches"],
                f"{row['bytes'] / 1e6:.0f}",
            )
            for row in layers
        ],
    )
    environment_ = environment(CPU)
    chosen = {name: str(value) for name, value in vars(arguments).items() if name != "out"}
    write_result(arguments.out, {"environment": environment_, "settings": chosen, "steps": rows, "layers": layers})


if __name__ == "__main__":
    main()
