"""What the GPU's programs need of a multiprocessor: registers, spills and shared memory. No GPU is needed.

    python -m benchmarks.programs                          all of them, for compute capability 8.0 and 9.0
    python -m benchmarks.programs --capabilities 9.0

Every program of `adapters/update/triton` is compiled ahead of time, for each kernel and sparsifier and several numbers
of pieces, and `ptxas` says what it needs. A rank is no part of a program, which adds one column of the factors after
the other. A register that is spilled lives in slow memory, so that spills are an error here.
"""

import argparse
import contextlib
import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import RESULTS, environment, print_table, write_result

RESULT = RESULTS / "programs.json"
CAPABILITIES = "8.0,9.0"
_LOG = re.compile(r"Used (\d+) registers")
_SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")


def variants() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each program's name and what it is compiled for: numbers and types, None for tensors that are not given."""
    for done in (0, 3):
        yield "_count", {"DONE": done, "PIECES": 2, "DISTANCE": True}
    yield "_count", {"DONE": 0, "PIECES": 1, "DISTANCE": False}
    yield "_choose", {}
    for pieces, distance, sparsifier, base in (
        (2, True, 0, "fp32"),
        (2, True, 1, "fp32"),
        (2, True, 2, "fp32"),
        (2, True, 2, "bf16"),
        (2, True, 2, None),
        (2, True, 3, "fp32"),
        (4, True, 2, "fp32"),
        (1, False, 2, "fp32"),
    ):
        settings = {"PIECES": pieces, "DISTANCE": distance, "SPARSIFIER": sparsifier, "base": base}
        yield "_write", {**settings, "RANDOM": False}
        yield "_backward", {**settings, "REWRITE": True}
    yield "_write", {"PIECES": 2, "DISTANCE": True, "SPARSIFIER": 2, "base": "fp32", "RANDOM": True}
    yield "_dropped", {}
    yield "_reduce", {}


def compiled(name: str, settings: dict[str, Any], capability: tuple[int, int]) -> dict[str, int]:
    """Compile one program; its registers and spills for a thread, shared memory for a block, in bytes."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from snell_lightning.adapters.update.triton import backward, dropped, table, thresholds, write

    module = next(module for module in (thresholds, write, backward, dropped) if hasattr(module, name))
    program = getattr(module, name)
    kinds = {
        "updates": "*i64", "programs": "*i32", "sums": "*i64", "reductions": "*i32", "scales": "*fp32",
        "ranks": "*i32", "counts": "*i32", "taus": "*fp32", "partial": "*fp32", "factor": "fp32",
        "base": "*fp32", "base_stride": "i32", "width": "i32", "grad": "*bf16",
        "out": "*fp32" if name == "_reduce" else "*bf16",
        "number": "i64", "seed": "*i64", "mask": "*i1", "rows": "i32", "columns": "i32", "each": "i32",
        "dropout": "fp32", "drop_path": "fp32",
    }  # fmt: skip
    constants = {
        "TYPE": tl.float32, "ROWS": table.ROWS, "PLACES": table.PLACES, "BINS": thresholds.BINS,
        "PASSES": thresholds.PASSES, "TIED": thresholds.TIED, "order": None,
        "BLOCK": dropped.BLOCK if name == "_dropped" else table.REDUCED,
    }  # fmt: skip
    base = settings.get("base", "fp32")
    kinds["base"] = f"*{base}"
    constants |= {key: value for key, value in settings.items() if key != "base"} | ({} if base else {"base": None})
    if name in ("_write", "_dropped"):
        constants["seed"] = None
    if settings.get("SPARSIFIER") == 3:
        constants["taus"] = None
    names = program.arg_names
    signature = {each: "constexpr" if each in constants else kinds[each] for each in names}
    given = {(at,): constants[each] for at, each in enumerate(names) if each in constants}
    # As at run time for tensors, which begin at multiples of 16 bytes, and for the usual widths.
    aligned = {
        (at,): [["tt.divisibility", 16]]
        for at, each in enumerate(names)
        if signature[each].startswith("*") or (each in ("width", "base_stride") and signature[each] == "i32")
    }
    target = GPUTarget("cuda", 10 * capability[0] + capability[1], 32)
    options = {"num_warps": table.WARPS if name in ("_count", "_write", "_backward") else 4}
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        done = triton.compile(ASTSource(program, signature, given, aligned), target=target, options=options)
    registers, spills = _LOG.search(log.getvalue()), _SPILLS.search(log.getvalue())
    if registers is None or spills is None:
        raise RuntimeError(f"ptxas said nothing of {name} that can be read: {log.getvalue()!r}")
    return {
        "registers": int(registers[1]),
        "spilled": int(spills[1]) + int(spills[2]),
        "shared": done.metadata.shared,
        "warps": options["num_warps"],
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Compile, print, write; fail where something is spilled."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.programs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capabilities", default=CAPABILITIES)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)
    rows = []
    with tempfile.TemporaryDirectory() as cache:
        # Triton reads these when it is loaded. What it has compiled before it would not compile again.
        os.environ |= {"TRITON_INTERPRET": "0", "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_CACHE_DIR": cache}
        for text in arguments.capabilities.split(","):
            major, minor = text.split(".")
            for name, settings in variants():
                needs = compiled(name, settings, (int(major), int(minor)))
                rows.append({"program": name.strip("_"), "capability": text, "settings": settings, **needs})
    print_table(
        "What a program needs",
        ("program", "for", "settings", "warps", "registers", "spilled, bytes", "shared, bytes"),
        [
            (
                row["program"],
                row["capability"],
                ", ".join(f"{key.lower()} {value}" for key, value in row["settings"].items()),
                *(row[what] for what in ("warps", "registers", "spilled", "shared")),
            )
            for row in rows
        ],
    )
    write_result(arguments.out, {"environment": environment(torch.device("cpu")), "programs": rows})
    if any(row["spilled"] for row in rows):
        sys.exit("some programs spill registers")


if __name__ == "__main__":
    main()
