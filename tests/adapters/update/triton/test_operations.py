"""The GPU's programs in Triton's interpreter, on the CPU, against torch's operations and the golden cases.

The interpreter runs each program's statements on arrays, so that what is checked here is the arithmetic and the
addresses. That they compile for a GPU, and how, is checked in `test_ahead_of_time.py`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from snell_lightning.adapters.update import loop
from snell_lightning.adapters.update.competition import TIED, survivors_rank
from snell_lightning.adapters.update.rule import UpdateRule
from tests.adapters.reference import relative_error

operations = pytest.importorskip("snell_lightning.adapters.update.triton.operations", reason="triton is not installed")
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")
OPS = torch.ops.snell


@pytest.fixture(autouse=True)
def _by_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other side of each comparison is torch's operations, not the CPU's compiled loop."""
    monkeypatch.setattr(loop, "applies", lambda *_: False)


def factors(heights: list[int], width: int, rank: int, pieces: int) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(len(heights) + width)

    def draw(features: int) -> Tensor:
        return torch.randn(pieces, features, rank // pieces, generator=generator)

    return [draw(height) for height in heights], [draw(width) for _ in heights]


def compared(
    p: list[Tensor], q: list[Tensor], rule: UpdateRule, base: Tensor | None, grad: Tensor, factor: float = 1.0
) -> None:
    """Threshold, written matrix and gradients equal those of `UpdateRule`, called for one update after the other.

    Each update of the distance kernel has half of the scale of the one before it.
    """
    width = q[0].shape[1]
    halved = rule.kernel == "distance"
    rules = [replace(rule, scale=rule.scale / 2**number if halved else rule.scale) for number in range(len(p))]
    scales = [rule.scale for rule in rules]
    settings = p, q, rule.kernel, "none" if rule.dense else rule.sparsifier, scales
    taus = None
    if not rule.dense:
        ranks = [survivors_rank(each.shape[1] * width, rule.sparsity) for each in p]
        taus = OPS.thresholds(p, q, rule.kernel, scales, ranks)
    written = torch.empty_like(grad)
    OPS.write_all(*settings, taus, written, base, None, factor)
    rewritten = grad.clone()
    grads = OPS.backward_all(*settings, taus, rewritten, base, None, factor, True)

    matrix, start, expected_grads = torch.empty(grad.shape), 0, []
    for number, (rule, of_p, of_q) in enumerate(zip(rules, p, q, strict=True)):
        rows = slice(start, start + of_p.shape[1])
        start = rows.stop
        of_base = None if base is None else base[rows]
        tau = rule.write(of_p.float(), of_q.float(), matrix[rows], of_base, factor)
        expected_grads += rule.backward(of_p.float(), of_q.float(), tau, grad[rows].clone(), of_base, factor)
        if tau is not None:
            assert taus is not None
            torch.testing.assert_close(taus[number], tau, rtol=1e-5, atol=1e-7)
    # The interpreter cuts off where a GPU rounds to bf16.
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2**-7}[grad.dtype]
    assert relative_error(written.float(), matrix) < rounding
    assert torch.equal(rewritten, written)
    sizes = [each.numel() for each in expected_grads]
    for ours, theirs in zip(grads.split(sizes), expected_grads, strict=True):
        assert relative_error(ours.float(), theirs.flatten()) < {torch.float32: 1e-5, torch.bfloat16: 2**-7}[p[0].dtype]


@pytest.mark.parametrize("sparsifier", ["magnitude", "soft", "hard", "none"])
@pytest.mark.parametrize("kernel", ["distance", "linear"])
def test_programs_equal_torchs_operations(kernel: str, sparsifier: str) -> None:
    p, q = factors([70, 33, 64], 37, 6, 2)
    grad, base = torch.randn(167, 37), torch.randn(167, 37)

    compared(p, q, UpdateRule(kernel, 0.7 if kernel == "distance" else 1.0, sparsifier, 0.8), base, grad, 1.5)


@pytest.mark.parametrize(("rank", "pieces"), [(2, 1), (2, 2), (9, 3), (32, 4), (64, 2), (128, 2)])
def test_any_rank_and_number_of_pieces_will_do(rank: int, pieces: int) -> None:
    p, q = factors([35], 66, rank, pieces)

    compared(p, q, UpdateRule("distance", 0.1, "magnitude", 0.9), None, torch.randn(35, 66))


@pytest.mark.parametrize(("height", "width"), [(2, 1), (1, 70), (64, 64), (65, 1), (130, 129)])
def test_any_shape_will_do(height: int, width: int) -> None:
    p, q = factors([height], width, 4, 2)

    compared(p, q, UpdateRule("distance", 1.0, "hard", 0.5), torch.randn(height, width), torch.randn(height, width))


@pytest.mark.parametrize("of_weight", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("of_factors", [torch.float32, torch.bfloat16])
def test_lower_precisions_are_read_and_rounded_to_once(of_weight: torch.dtype, of_factors: torch.dtype) -> None:
    p, q = factors([40, 40], 50, 8, 2)
    p, q = [each.to(of_factors) for each in p], [each.to(of_factors) for each in q]
    base, grad = torch.randn(80, 50).to(of_weight), torch.randn(80, 50).bfloat16()

    compared(p, q, UpdateRule("distance", 0.5, "hard", 0.9), base, grad)


@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.999])
def test_a_threshold_is_the_very_entry_of_its_rank(sparsity: float) -> None:
    p, q = factors([90, 30], 70, 8, 2)
    ranks = [survivors_rank(90 * 70, sparsity), survivors_rank(30 * 70, sparsity)]

    taus = OPS.thresholds(p, q, "distance", [0.3, 2.0], ranks)

    for number, (scale, rank) in enumerate(zip([0.3, 2.0], ranks, strict=True)):
        matrix = torch.empty(p[number].shape[1], 70)
        OPS.write_all([p[number]], [q[number]], "distance", "none", [scale], None, matrix, None, None, 1.0)
        assert taus[number] == matrix.abs().flatten().kthvalue(rank).values


def test_an_update_that_starts_at_zero_keeps_every_entry() -> None:
    p, q = factors([20], 30, 8, 2)
    for each in (*p, *q):
        each[1] = each[0]

    taus = OPS.thresholds(p, q, "distance", [1.0], [survivors_rank(600, 0.9)])

    assert taus.item() == TIED
    compared(p, q, UpdateRule("distance", 1.0, "hard", 0.9), torch.randn(20, 30), torch.randn(20, 30))


def test_entries_that_are_equal_are_kept_or_lost_together() -> None:
    p, q = factors([24], 40, 4, 2)
    p[0][:, 12:] = p[0][:, :12]
    q[0][:, 20:] = q[0][:, :20]

    compared(p, q, UpdateRule("distance", 1.0, "hard", 0.7), None, torch.randn(24, 40))


def test_factors_at_no_distance_have_no_gradient_from_there() -> None:
    p, q = factors([16], 16, 4, 2)
    p[0].copy_(q[0])

    compared(p, q, UpdateRule("distance", 1.0, "magnitude", 0.5), None, torch.randn(16, 16))


def test_a_factor_that_is_not_a_number_stays_visible() -> None:
    p, q = factors([20], 30, 4, 2)
    p[0][0, 3, 1] = torch.nan
    settings = p, q, "distance", "hard", [1.0] * len(p)

    taus = OPS.thresholds(p, q, "distance", [1.0], [survivors_rank(600, 0.5)])
    written = torch.empty(20, 30)
    OPS.write_all(*settings, taus, written, None, None, 1.0)
    grads = OPS.backward_all(*settings, taus, torch.ones(20, 30), None, None, 1.0, True)

    assert written[3].isnan().all()
    assert written[[row for row in range(20) if row != 3]].isfinite().all()
    assert grads.isnan().any()


def test_rows_that_do_not_lie_together_are_found() -> None:
    p, q = factors([8, 8], 12, 4, 2)
    order = torch.arange(16).view(8, 2).T.flatten()
    settings = p, q, "distance", "none", [1.0] * len(p), None
    in_turn, in_order = torch.empty(16, 12), torch.empty(16, 12)
    base, grad = torch.randn(16, 12), torch.randn(16, 12)

    OPS.write_all(*settings, in_turn, base[order], None, 1.0)
    OPS.write_all(*settings, in_order, base, order, 1.0)
    of_turn = OPS.backward_all(*settings, grad[order], None, None, 1.0, True)
    of_order = OPS.backward_all(*settings, grad.clone(), None, order, 1.0, True)

    assert torch.equal(in_order[order], in_turn)
    assert torch.equal(of_order, of_turn)


@pytest.mark.parametrize(("case", "sparsity"), [("magnitude_s0.5", 0.5), ("magnitude_s0.95", 0.95), ("dense", 0.0)])
def test_golden_values_and_gradients(case: str, sparsity: float) -> None:
    arrays = np.load(Path(__file__).parents[3] / "golden" / "layers.npz")

    def golden(name: str) -> Tensor:
        return torch.from_numpy(arrays[f"{case}.{name}"])

    p, q = [golden("out_factors")], [golden("in_factors")]
    settings = p, q, "distance", "magnitude" if sparsity else "none", [0.1] * len(p)
    taus = OPS.thresholds(p, q, "distance", [0.1], [survivors_rank(32 * 56, sparsity)]) if sparsity else None
    delta = torch.empty(56, 32)
    OPS.write_all(*settings, taus, delta, None, None, 1.0)
    grad = golden("grad_y").flatten(0, -2).T @ golden("x").flatten(0, -2)
    grads = OPS.backward_all(*settings, taus, grad, None, None, 1.0, False)

    # The arrays are fp32 (spacing 1e-7 of a value), and sums over 32 to 56 entries lose about one digit.
    assert relative_error(delta, golden("delta")) < 1e-5
    of_p, of_q = grads.split([p[0].numel(), q[0].numel()])
    assert relative_error(of_p, golden("grad_out_factors").flatten()) < 1e-5
    assert relative_error(of_q, golden("grad_in_factors").flatten()) < 1e-5


def test_rewriting_can_be_left_out() -> None:
    p, q = factors([20], 30, 4, 2)
    grad = torch.randn(20, 30)
    settings = p, q, "distance", "none", [1.0] * len(p), None
    kept = grad.clone()

    grads = OPS.backward_all(*settings, kept, None, None, 1.0, False)

    assert torch.equal(kept, grad)
    assert torch.equal(grads, OPS.backward_all(*settings, grad, None, None, 1.0, True))


@pytest.mark.parametrize("by_tensor", [False, True])
def test_rounding_at_random_is_right_on_average(by_tensor: bool) -> None:
    p, q = factors([24], 40, 4, 2)
    settings = p, q, "distance", "none", [1e-3] * len(p), None
    exact, base = torch.empty(24, 40), torch.randn(24, 40)
    OPS.write_all(*settings, exact, base, None, 1.0)

    def rounded(seed: int) -> Tensor:
        out = torch.empty(24, 40, dtype=torch.bfloat16)
        seeds = (torch.tensor(seed), None) if by_tensor else (None, seed)
        OPS.write_all(*settings, out, base, None, 1.0, *seeds)
        return out.float()

    drawn = torch.stack([rounded(2**40 + number) for number in range(64)])
    spacing = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 7)

    assert ((drawn - exact).abs() < spacing).all()
    assert (drawn.std(0) > 0).float().mean() > 0.9
    # 64 draws with a standard deviation of at most half a spacing each.
    assert (((drawn.mean(0) - exact) / spacing).abs() < 5 * 0.5 / 8).all()
    assert ((drawn - exact) / spacing).mean().abs() < 0.01
    assert torch.equal(rounded(2**40), drawn[0])
