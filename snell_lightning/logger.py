"""The logger a run has by default: lightning's for TensorBoard, with a folder of its own, and arguments by name."""

from pathlib import Path

from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from snell_lightning.runs import claim


class RunLogger(TensorBoardLogger):
    """Write curves for TensorBoard to `save_dir/name/version`.

    Lightning's class takes the arguments of TensorBoard's `SummaryWriter` as `**kwargs`. To find them out, the command
    line would import TensorBoard in order to print a help text or to refuse a config; so they are named here.

    Args:
        save_dir: Where runs go.
        name: Folder in it for runs of one name; empty for none.
        version: Folder of the run, as a name or as N of `version_N`; by default the next free N.
        log_graph: Add the graph of the model, which then needs an `example_input_array`.
        default_hp_metric: Log a placeholder metric `hp_metric` with the hyperparameters.
        prefix: Put before the names of all values.
        sub_dir: Folder in the run's folder for TensorBoard's files.
        comment: Suffix of the log folder, which TensorBoard ignores as that is settled already.
        purge_step: Step from which on TensorBoard hides what was logged before a crash.
        max_queue: Values that wait to be written before a write is forced, at least 1.
        flush_secs: Seconds between two writes.
        filename_suffix: Suffix of the names of TensorBoard's files.
    """

    def __init__(
        self,
        save_dir: str = "runs",
        name: str = "",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = True,
        prefix: str = "",
        sub_dir: str | None = None,
        comment: str = "",
        purge_step: int | None = None,
        max_queue: int = 10,
        flush_secs: int = 120,
        filename_suffix: str = "",
    ) -> None:
        super().__init__(
            save_dir,
            name,
            version,
            log_graph,
            default_hp_metric,
            prefix,
            sub_dir,
            comment=comment,
            purge_step=purge_step,
            max_queue=max_queue,
            flush_secs=flush_secs,
            filename_suffix=filename_suffix,
        )

    def _get_next_version(self) -> int:
        """The next free number, taken by making the folder: of runs that start at once, each gets its own."""
        number = super()._get_next_version()
        # Other processes of this run are told the folder's name by the first.
        first = rank_zero_only.rank == 0  # type: ignore[attr-defined]
        return claim(Path(self.root_dir), number) if first else number
