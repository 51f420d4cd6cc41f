"""A run's folder: made so that no other run has it, and found again by the config that was saved in it."""

from pathlib import Path

from snell_lightning.adapters.errors import UserError

ADAPTER = "adapter.safetensors"
CONFIG = "config.yaml"
# The first line of a config that a run saved.
_SAVED = "# lightning.pytorch=="


def claim(root: Path, first: int) -> int:
    """Make the folder `version_N` below `root` with the lowest N from `first` on that nobody else has or makes.

    Raises:
        OSError: It cannot be made.
    """
    root.mkdir(parents=True, exist_ok=True)
    number = first
    while True:
        try:
            (root / f"version_{number}").mkdir()
            return number
        except FileExistsError:
            number += 1


def own_adapter(config: str) -> str | None:
    """The adapter beside the config that a run saved in its folder; None where the config is no run's.

    Raises:
        UserError: It is a run's, and the run left no adapter.
    """
    path = Path(config)
    adapter = path.with_name(ADAPTER)
    with path.open(encoding="utf-8") as file:
        saved = path.name == CONFIG and (adapter.is_file() or file.readline().startswith(_SAVED))
    if not saved:
        return None
    if not adapter.is_file():
        last = path.parent / "checkpoints" / "last.ckpt"
        hint = f"--ckpt_path {last}" if last.is_file() else "--model.adapter_file FILE or --ckpt_path FILE"
        raise UserError(f"the run in {path.parent} has no {ADAPTER}; name what is to be used with {hint}")
    return str(adapter)
