"""The compiled loop of the CPU against torch's operations, which the other tests hold to the method."""

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from snell_lightning.adapters import SnellConfig, SnellDelta
from snell_lightning.adapters.update import loop
from snell_lightning.adapters.update.rule import UpdateRule
from tests.adapters.reference import relative_error

pytestmark = pytest.mark.skipif(
    shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler here, so torch's operations are used"
)
PUBLISHED = {"sparsifier": "magnitude", "scale": 0.1, "start": "random"}
SHAPES = [(5, 7), (33, 31), (64, 200), (700, 260), (512, 768)]


def by_torch(patch: pytest.MonkeyPatch, method: Callable[..., Any], *arguments: object, **options: object) -> Any:
    """What a method of `UpdateRule` gives without the compiled code."""
    with patch.context() as context:
        context.setattr(loop, "applies", lambda *_: False)
        return method(*arguments, **options)


def factors_and_rule(shape: tuple[int, int], **settings: object) -> tuple[Tensor, Tensor, UpdateRule]:
    torch.manual_seed(0)
    delta = SnellDelta(shape[1], shape[0], SnellConfig(**{**PUBLISHED, "rank": 8, "sparsity": 0.8, **settings}))
    return delta.out_factors.detach(), delta.in_factors.detach(), delta.rule


def test_the_code_is_built_here() -> None:
    assert loop.applies("distance", torch.empty(1), torch.empty(1))
    assert not loop.applies("linear", torch.empty(1), torch.empty(1))
    assert not loop.applies("distance", torch.empty(1, dtype=torch.float64), torch.empty(1))
    assert not loop.applies("distance", torch.empty(1), torch.empty(1), torch.empty(1, dtype=torch.float16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsifier", ["magnitude", "soft", "hard", "none"])
def test_written_matrix_equals_torchs(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], sparsifier: str) -> None:
    p, q, rule = factors_and_rule(shape, sparsifier=sparsifier)
    ours, theirs = torch.empty(shape), torch.empty(shape)

    tau = rule.write(p, q, ours, factor=1.5)
    expected_tau = by_torch(monkeypatch, rule.write, p, q, theirs, factor=1.5)

    assert relative_error(ours, theirs) < 2e-5
    if sparsifier == "none":
        assert tau is None
        assert expected_tau is None
    else:
        assert tau is not None
        assert tau.item() == pytest.approx(expected_tau.item(), rel=1e-4)
        dropped = int(0.8 * (ours.numel() - 1)) + 1
        assert (ours == 0).sum().item() == dropped


@pytest.mark.parametrize(
    "settings", [{"pieces": 1}, {"pieces": 4}, {"rank": 6, "pieces": 3}, {"rank": 2}, {"rank": 32}]
)
@pytest.mark.parametrize("base_type", [torch.float32, torch.bfloat16])
def test_gradients_and_rewritten_matrix_are_those_of_double_precision(
    settings: dict[str, int], base_type: torch.dtype
) -> None:
    p, q, rule = factors_and_rule((150, 260), **settings)
    base, grad = torch.randn(150, 260).to(base_type), torch.randn(150, 260).to(base_type)
    tau = rule.write(p, q, torch.empty(150, 260))
    assert tau is not None
    # Off the entry that the threshold is, which differs in the last place.
    tau = tau * 1.0001
    ours, exact = grad.clone(), grad.double()

    of_ours = rule.backward(p, q, tau, ours, base, 1.25)
    of_exact = rule.backward(p.double(), q.double(), tau.double(), exact, base.double(), 1.25)

    for one, other in zip(of_ours, of_exact, strict=True):
        assert relative_error(one.double(), other) < 1e-6
    assert relative_error(ours.double(), exact) < (1e-6 if base_type == torch.float32 else 3e-3)


@pytest.mark.parametrize("sparsifier", ["magnitude", "soft", "hard"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(33, 31), (150, 260)])
def test_sampled_gradients_equal_those_of_the_whole_product(
    shape: tuple[int, int], dtype: torch.dtype, sparsifier: str
) -> None:
    p, q, rule = factors_and_rule(shape, sparsifier=sparsifier)
    tau = rule.write(p, q, torch.empty(shape))
    assert tau is not None
    # More rows than are transposed at once, of which some do not count.
    x, wide = torch.randn(1300, shape[1]).to(dtype), torch.randn(1300, shape[0] + 9).to(dtype)
    grad_y, ranges, base = wide[:, 4:-5], [slice(0, 200), slice(260, 1300)], torch.randn(shape)
    whole = sum((grad_y[rows].float().T @ x[rows].float() for rows in ranges), torch.zeros(shape))
    expected = rule.backward(p, q, tau, whole, base, 1.25)
    out = torch.empty(shape)

    of_factors = rule.sampled_backward(p, q, tau, grad_y, x, ranges, out, base, 1.25)

    for one, other in zip(of_factors, expected, strict=True):
        assert relative_error(one, other) < 2e-6
    assert torch.equal(out, whole)
    unwritten = rule.sampled_backward(p, q, tau, grad_y, x, ranges, None, base, 1.25)
    assert all(map(torch.equal, unwritten, of_factors))


def test_coinciding_factors_have_distance_and_gradient_zero() -> None:
    p, q, rule = factors_and_rule((40, 40), sparsifier="hard", sparsity=0.5)
    q[:, 3] = p[:, 5]
    matrix = torch.empty(40, 40)
    tau = rule.write(p, q, matrix)

    grads = rule.backward(p, q, tau, torch.ones(40, 40), rewrite=False)

    assert matrix[5, 3] == 0
    assert all(grad.isfinite().all() for grad in grads)


def test_a_nan_stays_one() -> None:
    p, q, rule = factors_and_rule((40, 40))
    p[0, 7, 0] = torch.nan
    matrix = torch.empty(40, 40)

    rule.write(p, q, matrix)

    assert matrix[7].isnan().all()


def test_factors_beyond_fp32_give_gradients_that_are_no_number() -> None:
    p, q, rule = factors_and_rule((64, 40), sparsity=0.9)
    p *= 1e30
    tau = rule.write(p, q, torch.empty(64, 40))
    assert tau is not None
    out = torch.empty(64, 40)

    of_p, of_q = rule.sampled_backward(p, q, tau, torch.ones(5, 64), torch.ones(5, 40), [slice(0, 5)], out, None, 1.0)

    for result in (of_p, of_q, out):
        assert not result.isfinite().any()


def test_the_threshold_is_found_where_the_sample_misleads(monkeypatch: pytest.MonkeyPatch) -> None:
    p, q, rule = factors_and_rule((512, 768))
    matrix, expected = torch.empty(512, 768), torch.empty(512, 768)
    tau = rule.write(p, q, expected)
    for bracket in ((-1.0, 0.0), (1e6, 2e6), (0.0, 1e6)):  # above it, below it, and more than there is room for
        monkeypatch.setattr(loop, "bracket", lambda *_, values=bracket: values)

        assert torch.equal(rule.write(p, q, matrix), tau)
        assert torch.equal(matrix, expected)


def test_without_a_compiler_torchs_operations_do_the_same(tmp_path: Path) -> None:
    code = (
        "import torch; from snell_lightning.adapters import *; torch.manual_seed(0);"
        "print(SnellDelta(64, 48, SnellConfig(rank=8)).weight().double().square().sum().item())"
    )
    outputs = []
    for settings in ({"CC": "cc"}, {"CC": str(tmp_path / "missing")}, {"SNELL_COMPILE": "0"}):
        environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **settings}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        outputs.append(float(done.stdout))

    assert outputs[1] == outputs[2]
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-5)
    assert len(list((tmp_path / "cache" / "snell_lightning").glob("*.so"))) == 1


def test_code_is_not_loaded_from_a_folder_that_others_can_write_to(tmp_path: Path) -> None:
    folder = tmp_path / "snell_lightning"
    folder.mkdir(mode=0o700)
    folder.chmod(0o777)
    code = "from snell_lightning.adapters.update import loop; assert loop._library() is not None"

    subprocess.run([sys.executable, "-c", code], env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, check=True)

    assert list(folder.iterdir()) == []


def test_code_that_was_built_before_is_used_where_there_is_no_compiler(tmp_path: Path) -> None:
    built = tmp_path / "built.so"
    # Of one generation of processors back, as in the images.
    loop.build(built, "x86-64-v3" if platform.machine() == "x86_64" else "native")
    program = (
        "import torch; from snell_lightning.adapters import *; from snell_lightning.adapters.update import loop;"
        "torch.manual_seed(0); print(SnellDelta(64, 48, SnellConfig(rank=8)).weight().double().square().sum().item());"
        "assert loop._library()._name == {!r}"
    )
    environment = {**os.environ, "SNELL_COMPILE": str(built), "CC": "no-compiler", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program.format(str(built))], env=environment, capture_output=True, text=True, check=True
    )
    torch.manual_seed(0)
    here = SnellDelta(64, 48, SnellConfig(rank=8)).weight().double().square().sum().item()
    assert float(done.stdout) == pytest.approx(here, rel=1e-5)
    assert [path.name for path in tmp_path.iterdir()] == ["built.so"]
