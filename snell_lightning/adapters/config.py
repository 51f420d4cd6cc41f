"""The settings of an adapter, checked where they are made."""

import difflib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from snell_lightning.adapters.errors import UserError
from snell_lightning.adapters.layers.recompute import RECOMPUTE
from snell_lightning.adapters.update.competition import SPARSIFIERS
from snell_lightning.adapters.update.kernels import KERNELS, automatic_scale

STARTS = ("auto", "zero", "random")
ROUNDING = ("apart", "random")
# Sparsifiers whose gradient does not vanish with the update.
_PLAIN = ("hard", "none")
# Of the released code.
_PUBLISHED_SCALE = 0.1


@dataclass
class SnellConfig:
    r"""How a backbone is adapted with SNELL (arXiv 2411.01800).

    Patterns are regular expressions, searched anywhere in a layer's name such as `blocks.0.attn.qkv`; where several
    patterns of one setting match, the first counts.

    Args:
        rank: Columns of the two factor tensors, over all pieces. A multiple of `pieces`.
        sparsity: Fraction of each update's entries that loses the competition, in [0, 1). At 0 nothing competes and the
            update is the dense kernel, as in the released code.
        kernel: `distance` (the paper's piecewise linear distance), `linear` (LoRA's inner product) or `mixture`
            (SNELLA's: the distance with a softmax over its rows, in learnable parts).
        sparsifier: `hard` (a plain mask), `magnitude` (released code), `soft` (the paper's Eq. 5) or `none` (dense).
        pieces: Number of distances the kernel sums with alternating sign.
        scale: Size of the distance kernel's coefficients, or `auto`: by width, rank, sparsity and number of layers, and
            less for attention's values, so that one learning rate serves all (`kernels.automatic_scale`); under
            `magnitude` and `soft` the published 0.1, as under the kernel `mixture`.
        start: `random` as published; `zero`, an update that is exactly zero at first, for the sparsifiers `hard` and
            `none` and, under the distance kernel, an even number of pieces; or `auto`: zero where that can be.
        dropout: Probability of dropping an entry of the update's input, in [0, 1).
        drop_path: Probability of dropping the whole update for a sample, in [0, 1).
        recompute: What is made again in backward instead of being kept: `none`; `inputs` of the adapted layers, from
            what the normalisation or activation before them keeps anyway; or `blocks`, whole blocks besides.
        rounding: How a bf16 product sees W + dW in training: `apart`, in two products, since their sum would lose the
            update where it is rounded; or `random`, in one product with the sum rounded at random, which is right on
            average (`update/rounding.py`).
        targets: Patterns of the layers to adapt; by default every linear layer and 1x1 convolution in the blocks.
        exclude: Patterns of layers to leave alone.
        rank_pattern: Rank by pattern, for layers that differ from `rank`.
        sparsity_pattern: Sparsity by pattern, for layers that differ from `sparsity`.
        dropout_pattern: Dropout by pattern, for layers that differ from `dropout`.
        train_also: Patterns of the backbone's parameters that are trained besides the adapter and the head; by default
            `cls_token` where the backbone has one.

    Raises:
        UserError: A value is out of its range, or a pattern is no regular expression.
    """

    rank: int = 32
    sparsity: float = 0.9
    kernel: str = "distance"
    sparsifier: str = "hard"
    pieces: int = 2
    scale: float | str = "auto"
    start: str = "auto"
    dropout: float = 0.0
    drop_path: float = 0.0
    recompute: str = "inputs"
    rounding: str = "apart"
    targets: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    sparsity_pattern: dict[str, float] = field(default_factory=dict)
    dropout_pattern: dict[str, float] = field(default_factory=dict)
    train_also: list[str] | None = None

    def __post_init__(self) -> None:
        _check_choice("kernel", self.kernel, KERNELS)
        _check_choice("sparsifier", self.sparsifier, SPARSIFIERS)
        _check_choice("recompute", self.recompute, RECOMPUTE)
        _check_choice("start", self.start, STARTS)
        _check_choice("rounding", self.rounding, ROUNDING)
        if self.pieces < 1:
            raise UserError(f"pieces must be at least 1, not {self.pieces}")
        if self.scale != "auto" and (isinstance(self.scale, str) or not 0 < self.scale < math.inf):
            raise UserError(f"scale must be a positive number or auto, not {self.scale!r}")
        if self.start == "zero" and (reason := self._why_not_zero()):
            raise UserError(reason)
        ranks = {f"rank_pattern[{pattern!r}]": rank for pattern, rank in self.rank_pattern.items()}
        for where, rank in {"rank": self.rank, **ranks}.items():
            _check_rank(where, rank, self.pieces)
        for where, value in [
            ("sparsity", self.sparsity),
            *_labelled("sparsity_pattern", self.sparsity_pattern),
            ("dropout", self.dropout),
            *_labelled("dropout_pattern", self.dropout_pattern),
            ("drop_path", self.drop_path),
        ]:
            check_fraction(where, value)
        for pattern in [
            *(self.targets or []),
            *self.exclude,
            *self.rank_pattern,
            *self.sparsity_pattern,
            *self.dropout_pattern,
            *(self.train_also or []),
        ]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(f"{pattern!r} is not a regular expression: {error}") from error

    @property
    def starts_at_zero(self) -> bool:
        """Whether an update is exactly zero at first."""
        return self.start == "zero" or (self.start == "auto" and self._why_not_zero() is None)

    def layer_scale(self, in_features: int, layers: int, of_values: bool = False) -> float:
        """The kernel's coefficients in a layer of this width, one of so many that are adapted.

        Args:
            in_features: Width of the layer's input.
            layers: Number of layers that are adapted.
            of_values: Whether attention averages what the projection gives.
        """
        if not isinstance(self.scale, str):
            return self.scale
        if self.sparsifier not in _PLAIN or self.kernel == "mixture":
            return _PUBLISHED_SCALE
        return automatic_scale(in_features, self.rank, self.sparsity, layers, of_values)

    def _why_not_zero(self) -> str | None:
        """Why an update cannot start at zero; None where it can."""
        if self.sparsifier not in _PLAIN:
            return (
                f"start zero has no gradient under the sparsifier {self.sparsifier}, which multiplies an update with "
                f"its own size; set sparsifier to {' or '.join(_PLAIN)}, or start to random"
            )
        if self.kernel == "mixture":
            return "start zero cannot be under the kernel mixture, whose softmax is above 0; set start to random"
        if self.kernel == "distance" and self.pieces % 2:
            return f"start zero needs an even number of pieces, whose distances cancel in pairs, not {self.pieces}"
        return None


def check_fraction(where: str, value: float) -> None:
    """Raise `UserError` unless `value` is in [0, 1)."""
    if not 0 <= value < 1:
        raise UserError(f"{where} must be at least 0 and below 1, not {value}")


def _check_rank(where: str, rank: int, pieces: int) -> None:
    if rank < 1 or rank % pieces:
        near = max(pieces, round(rank / pieces) * pieces)
        raise UserError(f"{where} must be a positive multiple of pieces ({pieces}), not {rank}; {near} would do")


def _check_choice(what: str, given: str, known: Iterable[str]) -> None:
    known = tuple(known)
    if given not in known:
        near = difflib.get_close_matches(str(given), known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{what} must be one of {', '.join(known)}, not {given!r}{hint}")


def _labelled(setting: str, by_pattern: dict[str, float]) -> list[tuple[str, float]]:
    return [(f"{setting}[{pattern!r}]", value) for pattern, value in by_pattern.items()]
