"""The commands that need an adapter file and no config: `predict --adapter FILE --images PATH...`, and `merge`."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from snell_lightning.adapters.errors import UserError
from snell_lightning.help import COMMANDS, PROGRAM


class _Parser(argparse.ArgumentParser):
    """One whose errors are one line."""

    def __init__(self, command: str) -> None:
        super().__init__(prog=f"{PROGRAM} {command}", description=COMMANDS[command], add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def is_own(arguments: Sequence[str]) -> bool:
    """Whether a command line is one of those here, and not lightning's `predict` with a config."""
    if arguments[:1] == ["merge"]:
        return True
    options = {argument.partition("=")[0] for argument in arguments}
    return arguments[:1] == ["predict"] and bool(options & {"--adapter", "--images", "--output"})


def run(arguments: Sequence[str]) -> None:
    """Carry out such a command line.

    Raises:
        UserError: It says something that does not hold.
    """
    if arguments[0] == "merge":
        chosen = _merge_parser().parse_args(arguments[1:])
        from snell_lightning.inference.merging import Merge, merge_adapter

        merge_adapter(Merge(**vars(chosen)))
        return
    chosen = _predict_parser().parse_args(arguments[1:])
    from snell_lightning.inference.predicting import Job, predict_images

    predict_images(Job(**vars(chosen)))


def _merge_parser() -> argparse.ArgumentParser:
    parser = _Parser("merge")
    parser.add_argument("--adapter", required=True, metavar="FILE")
    parser.add_argument("--output", required=True, metavar="DIR")
    parser.add_argument("--format", default="timm", choices=("timm", "onnx", "torch_export"))
    parser.add_argument("--precision", default="float32", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--images", nargs="+", metavar="PATH")
    parser.add_argument("--weights", metavar="PATH")
    return parser


def _predict_parser() -> argparse.ArgumentParser:
    parser = _Parser("predict")
    parser.add_argument("--adapter", action="append", required=True, dest="adapters", metavar="FILE")
    parser.add_argument("--images", nargs="+", required=True, metavar="PATH")
    parser.add_argument("--output", required=True, metavar="FILE")
    parser.add_argument("--top_k", type=int, default=5)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--num_workers", type=int)
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--precision", default="32-true", choices=("32-true", "bf16-mixed", "16-mixed"))
    parser.add_argument("--on_bad_image", default="skip", choices=("skip", "error"))
    parser.add_argument("--weights", metavar="PATH")
    return parser
