"""The distance kernel and the competition on the CPU as one compiled loop: what the update costs there is a third.

Elementwise operations of torch read and write a matrix once each; here a few rows of it stay in the processor's first
cache from distances to update, and the factors' gradients see the survivors only. The numbers are those of
`kernels.py` and `competition.py` but for the order of sums (1e-6 of their size).

The code (`loop.c`) is built by the system's C compiler when it is first needed, in about a second, and kept in the
user's cache folder; SNELL_COMPILE=FILE in the environment names code that `build` has made before, for machines without
a compiler. It runs on torch's own OpenMP threads. Where there is neither, where torch has threads of another kind, or
where the environment says SNELL_COMPILE=0, torch's operations do the same.
"""

import ctypes
import functools
import hashlib
import logging
import math
import os
import platform
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from snell_lightning.adapters.update.competition import SAMPLE, bracket, sample_step, survivors_rank, threshold
from snell_lightning.adapters.whole import user_cache

_SOURCE = Path(__file__).with_name("loop.c")
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-std=gnu11")
_BLOCK = 32  # columns that the code works on at once; rows of the transposed factors are padded to it
_SPARSIFIERS = {"magnitude": 0, "soft": 1, "hard": 2, "none": 2}
_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_LANES = 16  # entries that one instruction works on
_CHUNK = 512  # rows of the input that are transposed at once
SPARSE = 0.75  # from here on the survivors' gradients alone cost less than the product
_ROWS = 4  # rows that it works on at once
_WORTH_THREADS = 2**15  # entries of a matrix that more than one thread is started for
_ROOM = 12  # one entry in so many fits between the sample's two values; 2 to 3 percent are expected
# No absolute value is below it: every entry survives.
_DENSE = -1.0

_log = logging.getLogger(__name__)


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("p", "q", "qt", "scratch")),
        *((name, ctypes.c_int64) for name in ("pieces", "rows", "width", "columns", "stride", "room")),
        ("scale", ctypes.c_float),
        ("threads", ctypes.c_int),
    )


def applies(kernel: str, out_factors: Tensor, in_factors: Tensor, *others: Tensor | None) -> bool:
    """Whether this module does the work: the distance kernel on the CPU in fp32, other matrices in fp32 or bf16.

    Args:
        kernel: Its name.
        out_factors: P.
        in_factors: Q.
        others: The matrices that are read or written along the way.
    """
    return (
        kernel == "distance"
        and out_factors.device.type == "cpu"
        and out_factors.dtype == in_factors.dtype == torch.float32
        and all(other is None or other.dtype in _TYPES for other in others)
        and _library() is not None
    )


def write(
    out_factors: Tensor,
    in_factors: Tensor,
    scale: float,
    sparsifier: str,
    sparsity: float | None,
    buffer: Tensor,
    base: Tensor | None,
    factor: float,
) -> Tensor | None:
    """Write `base + factor * update` to `buffer`, as `UpdateRule.write` does.

    Args:
        out_factors: P `(pieces, out, columns)`.
        in_factors: Q `(pieces, in, columns)`.
        scale: Size of the kernel's coefficients.
        sparsifier: Which.
        sparsity: Fraction to drop; None drops nothing.
        buffer: `(out, in)`, contiguous, fp32.
        base: `(out, in)`, fp32 or bf16, or None.
        factor: What the update is multiplied with.

    Returns:
        The threshold; None where nothing is dropped.
    """
    operands = _operands(out_factors, in_factors)
    tau = _fill(operands, scale, buffer, sparsity)
    if tau is not None or base is not None or factor != 1:
        base = None if base is None else base.contiguous()
        torch.ops.snell.finish(*operands, buffer, _number(tau), _SPARSIFIERS[sparsifier], base, factor)
    return tau


def ties(tau: Tensor) -> bool:
    """Whether a threshold on the CPU keeps every entry."""
    return not isinstance(tau, FakeTensor) and tau.item() < 0


def backward(
    out_factors: Tensor,
    in_factors: Tensor,
    scale: float,
    sparsifier: str,
    tau: Tensor | None,
    grad: Tensor,
    base: Tensor | None,
    factor: float,
    rewrite: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors, as `UpdateRule.backward` gives them.

    Args:
        out_factors: P `(pieces, out, columns)`.
        in_factors: Q `(pieces, in, columns)`.
        scale: Size of the kernel's coefficients.
        sparsifier: Which.
        tau: The threshold, or None.
        grad: `(out, in)`, fp32 or bf16; overwritten with `base + factor * update` if `rewrite` is true, and then
            contiguous.
        base: As in `write`.
        factor: As in `write`.
        rewrite: Whether the update is wanted.
    """
    operands = _operands(out_factors, in_factors)
    of_p = torch.zeros_like(operands[0])
    of_q = operands[1].new_zeros(len(operands[-1]), *operands[1].shape)
    base = None if base is None else base.contiguous()
    torch.ops.snell.backward(
        *operands, scale, _number(tau), _SPARSIFIERS[sparsifier], grad.contiguous(), base, factor, rewrite, of_p, of_q
    )
    return of_p.mul_(factor), of_q.sum(0).mul_(factor)


def sampled_backward(
    out_factors: Tensor,
    in_factors: Tensor,
    scale: float,
    sparsifier: str,
    sparsity: float,
    tau: Tensor,
    grad_y: Tensor,
    x: Tensor,
    rows: Sequence[slice],
    out: Tensor | None,
    base: Tensor | None,
    factor: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of both factors from the output's; the product `grad_y^T x` is made where there are survivors only.

    Args:
        out_factors: P `(pieces, out, columns)`.
        in_factors: Q `(pieces, in, columns)`.
        scale: Size of the kernel's coefficients.
        sparsifier: Which.
        sparsity: Fraction to drop.
        tau: The threshold.
        grad_y: `(rows, out)`, fp32 or bf16.
        x: `(rows, in)` of the same type.
        rows: Ranges of rows to sum over.
        out: `(out, in)`, fp32 or bf16, where `base + factor * update` is written; None if that is not wanted.
        base: As in `write`.
        factor: As in `write`.
    """
    operands = _operands(out_factors, in_factors)
    p, q, _, scratch = operands
    (height, width), threads = (p.shape[1], q.shape[1]), len(scratch)
    of_p, of_q = torch.zeros_like(p), q.new_zeros(threads, *q.shape)
    tokens = torch.cat([torch.arange(each.start, each.stop) for each in rows]) if rows else torch.empty(0).long()
    # Beyond tau there are fewer than this, the lists' room is exact but for ties.
    kept = height * width - survivors_rank(height * width, sparsity)
    index = torch.empty(kept, dtype=torch.int32)
    values, of_k = q.new_empty(kept), q.new_empty(kept)
    places = torch.zeros(2 * height + 1, dtype=torch.int64)
    chunk = min(_CHUNK, -(-len(x) // _LANES) * _LANES)
    turned = q.new_empty(width * (chunk + _LANES) + threads * _LANES * chunk)
    grad_y, x = (matrix if matrix.stride(1) == 1 else matrix.contiguous() for matrix in (grad_y, x))
    base = None if base is None else base.contiguous()
    kind = _SPARSIFIERS[sparsifier]
    torch.ops.snell.sampled(
        *operands,
        scale,
        _number(tau),
        kind,
        grad_y,
        x,
        tokens,
        chunk,
        index,
        values,
        of_k,
        places,
        turned,
        out,
        base,
        factor,
        of_p,
        of_q,
    )
    return of_p.mul_(factor), of_q.sum(0).mul_(factor)


def _operands(out_factors: Tensor, in_factors: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """P, Q, Q transposed and padded, and scratch `(threads, floats)`."""
    p, q = out_factors.contiguous(), in_factors.contiguous()
    pieces, width, columns = q.shape
    padded = q.new_zeros(pieces, columns, -(-width // _BLOCK) * _BLOCK)
    padded[:, :, :width] = q.mT
    threads = torch.get_num_threads() if p.shape[1] * width >= _WORTH_THREADS else 1
    return p, q, padded, q.new_empty(threads, pieces * _ROWS * padded.shape[-1] + 5 * width)


def _fill(operands: tuple[Tensor, ...], scale: float, buffer: Tensor, sparsity: float | None) -> Tensor | None:
    """Write K to `buffer`; its threshold, or None if nothing is to be dropped.

    A sample of K tells between which two values the threshold lies. What lies there is collected on the way.
    """
    scratch = operands[-1]
    entries, threads = buffer.numel(), len(scratch)
    counts = torch.empty(threads, 2, dtype=torch.int64)
    sampled = sparsity is not None and entries > 8 * SAMPLE
    low = high = 0.0
    candidates = buffer.new_empty(threads, entries // (_ROOM * threads) + buffer.shape[1] if sampled else 0)
    rank = 0 if sparsity is None else survivors_rank(entries, sparsity)
    if sampled:
        step = sample_step(buffer)
        sample = buffer.new_empty(entries // step)
        torch.ops.snell.sample(*operands, scale, step, sample)
        low, high = bracket(sample, rank / entries)
    torch.ops.snell.fill(*operands, scale, buffer, low, high, candidates, counts)
    if sparsity is None:
        return None
    if isinstance(buffer, FakeTensor) and sampled:
        return buffer.new_empty(())
    if sampled:
        below, inside = counts[:, 0].sum().item(), counts[:, 1].tolist()
        if min(inside) >= 0 and below < rank <= below + sum(inside):
            found = torch.cat([kept[:count] for kept, count in zip(candidates, inside, strict=True)])
            tau = found.kthvalue(int(rank - below)).values
            return tau if tau > 0 else threshold(buffer, sparsity)
    return threshold(buffer, sparsity)


def _number(tau: Tensor | None) -> float:
    """A threshold as a number, one below every absolute value where there is none."""
    return _DENSE if tau is None or isinstance(tau, FakeTensor) else tau.item()


def build(path: str | Path, architecture: str = "native") -> None:
    """Compile the code.

    Args:
        path: Where to.
        architecture: Processors that it is for, as the compiler names them; `x86-64-v3` is all that have AVX2.

    Raises:
        RuntimeError: The compiler fails.
        OSError: There is none, or the file cannot be written.
    """
    compiler = os.environ.get("CC", "cc")
    with tempfile.TemporaryDirectory(dir=Path(path).parent) as folder:
        _run(compiler, *_FLAGS, f"-march={architecture}", "-c", str(_SOURCE), "-o", f"{folder}/code.o")
        # Linked without OpenMP: it takes that of the process, torch's. A second one would compete for the processor.
        _run(compiler, "-shared", f"{folder}/code.o", "-o", f"{folder}/code.so", "-lm")
        os.replace(f"{folder}/code.so", path)


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The compiled code, or None where it cannot be had."""
    setting = os.environ.get("SNELL_COMPILE", "")
    if setting == "0":
        return None
    try:
        return _cached() if setting in ("", "1") else _built_before(setting)
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _log.info("no compiled kernel, torch's operations are used: %s", error)
        return None


def _built_before(path: str) -> ctypes.CDLL:
    """Load code that was compiled for processors like this one, and elsewhere."""
    if platform.machine() == "x86_64" and torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        raise RuntimeError(f"{path} is for processors with AVX2, which this one has not")
    return ctypes.CDLL(path)


def _cached() -> ctypes.CDLL:
    """Load the compiled code from the user's cache, built first if it is not there."""
    version = _run(os.environ.get("CC", "cc"), "--version")
    identity = "\n".join([*_FLAGS, version, platform.machine(), _processor(), _SOURCE.read_text(encoding="utf-8")])
    name = f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.so"
    try:
        cache = user_cache()
        # Code is loaded from there: only a folder that nobody else can write to will do.
        status = cache.stat()
        private = status.st_uid == os.getuid() and not status.st_mode & 0o022
    except OSError:
        private = False
    if private:
        if not (cache / name).is_file():
            build(cache / name)
        return ctypes.CDLL(str(cache / name))
    with tempfile.TemporaryDirectory() as folder:
        build(f"{folder}/code.so")
        return ctypes.CDLL(f"{folder}/code.so")


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


def _processor() -> str:
    """What the processor can do, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _problem(p: Tensor, q: Tensor, padded: Tensor, scratch: Tensor, scale: float = 1.0) -> _Problem:
    pieces, rows, columns = p.shape
    pointers = (tensor.data_ptr() for tensor in (p, q, padded, scratch))
    return _Problem(
        *pointers, pieces, rows, q.shape[1], columns, padded.shape[-1], scratch.shape[1], scale, len(scratch)
    )


def _call(name: str, problem: _Problem, *arguments: Tensor | int | float | None) -> None:
    """Call a function of the code: tensors are passed as pointers, int as int64 and float as float."""
    passed = [
        ctypes.c_void_p(argument.data_ptr())
        if isinstance(argument, Tensor)
        else ctypes.c_float(argument)
        if isinstance(argument, float)
        else ctypes.c_int64(argument)
        if isinstance(argument, int)
        else None
        for argument in arguments
    ]
    getattr(_library(), name)(ctypes.byref(problem), *passed)


def _sample(p: Tensor, q: Tensor, padded: Tensor, scratch: Tensor, scale: float, step: int, out: Tensor) -> None:
    _call("snell_sample", _problem(p, q, padded, scratch, scale), step, len(out), out)


def _fill_op(
    p: Tensor,
    q: Tensor,
    padded: Tensor,
    scratch: Tensor,
    scale: float,
    out: Tensor,
    low: float,
    high: float,
    candidates: Tensor,
    counts: Tensor,
) -> None:
    problem = _problem(p, q, padded, scratch, scale)
    _call("snell_fill", problem, out, low, high, candidates, candidates.shape[1], counts)


def _finish(
    p: Tensor,
    q: Tensor,
    padded: Tensor,
    scratch: Tensor,
    matrix: Tensor,
    tau: float,
    sparsifier: int,
    base: Tensor | None,
    factor: float,
) -> None:
    problem = _problem(p, q, padded, scratch)
    _call("snell_finish", problem, matrix, tau, sparsifier, base, _type(base), factor)


def _backward(
    p: Tensor,
    q: Tensor,
    padded: Tensor,
    scratch: Tensor,
    scale: float,
    tau: float,
    sparsifier: int,
    grad: Tensor,
    base: Tensor | None,
    factor: float,
    rewrite: bool,
    of_p: Tensor,
    of_q: Tensor,
) -> None:
    problem = _problem(p, q, padded, scratch, scale)
    arguments = grad, _type(grad), base, _type(base), factor, int(rewrite), of_p, of_q
    _call("snell_backward", problem, tau, sparsifier, *arguments)


def _sampled(
    p: Tensor,
    q: Tensor,
    padded: Tensor,
    scratch: Tensor,
    scale: float,
    tau: float,
    sparsifier: int,
    grad_y: Tensor,
    x: Tensor,
    tokens: Tensor,
    chunk: int,
    index: Tensor,
    values: Tensor,
    of_k: Tensor,
    places: Tensor,
    turned: Tensor,
    out: Tensor | None,
    base: Tensor | None,
    factor: float,
    of_p: Tensor,
    of_q: Tensor,
) -> None:
    starts, counts, used = places.tensor_split([p.shape[1], 2 * p.shape[1]])
    turned_x, turned_y = turned.tensor_split([q.shape[1] * (chunk + _LANES)])
    _call(
        "snell_sampled",
        _problem(p, q, padded, scratch, scale),
        tau,
        sparsifier,
        grad_y,
        grad_y.stride(0),
        x,
        x.stride(0),
        _type(x),
        tokens,
        len(tokens),
        chunk,
        index,
        values,
        of_k,
        len(index),
        starts,
        counts,
        turned_x,
        turned_y,
        used,
        out,
        _type(out),
        base,
        _type(base),
        factor,
        of_p,
        of_q,
    )
    if used.item() > len(index):  # Beyond a threshold that is a number there is room for all: it was none.
        for result in (of_p, of_q, out):
            if result is not None:
                result.fill_(math.nan)


def _type(matrix: Tensor | None) -> int:
    return 0 if matrix is None else _TYPES[matrix.dtype]


# As operations of torch, so that tensors without data, modes that count storages and compilers see what is written.
_OPERANDS = "Tensor p, Tensor q, Tensor padded, Tensor(x!) scratch"
_OPERATIONS = {
    f"sample({_OPERANDS}, float scale, int step, Tensor(a!) out) -> ()": _sample,
    f"fill({_OPERANDS}, float scale, Tensor(a!) out, float low, float high, Tensor(b!) candidates, Tensor(c!) counts)"
    " -> ()": _fill_op,
    f"finish({_OPERANDS}, Tensor(a!) matrix, float tau, int sparsifier, Tensor? base, float factor) -> ()": _finish,
    f"backward({_OPERANDS}, float scale, float tau, int sparsifier, Tensor(a!) grad, Tensor? base, float factor,"
    " bool rewrite, Tensor(b!) of_p, Tensor(c!) of_q) -> ()": _backward,
    f"sampled({_OPERANDS}, float scale, float tau, int sparsifier, Tensor grad_y, Tensor x, Tensor tokens, int chunk,"
    " Tensor(a!) index, Tensor(b!) values, Tensor(c!) of_k, Tensor(d!) places, Tensor(e!) turned, Tensor(f!)? out,"
    " Tensor? base, float factor, Tensor(g!) of_p, Tensor(h!) of_q) -> ()": _sampled,
}
_operations = torch.library.Library("snell", "DEF")
for _schema, _function in _OPERATIONS.items():
    _operations.define(_schema)
    _name = _schema.partition("(")[0]
    _operations.impl(_name, _function, "CPU")
    _operations.impl(_name, lambda *_, **__: None, "Meta")
