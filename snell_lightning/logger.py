"""The loggers that write to the run's folder: curves for TensorBoard, by default, and `metrics.csv`, always."""

import csv
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.csv_logs import _ExperimentWriter
from lightning.fabric.utilities.logger import _convert_params, _flatten_dict, _sanitize_params
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from snell_lightning.adapters.whole import whole
from snell_lightning.runs import claim

# What TensorBoard shows beside the settings of each run, to compare runs by.
_COMPARED = ("val/acc1", "val/loss", "test/acc1")


class RunLogger(TensorBoardLogger):
    """Write curves for TensorBoard to the run's folder.

    Lightning's class takes the arguments of TensorBoard's `SummaryWriter` as `**kwargs`. To find them out, the command
    line would import TensorBoard in order to print a help text or to refuse a config; so they are named here.

    Args:
        save_dir: Where runs go, unless `trainer.default_root_dir` says so; `runs` by default.
        name: Folder in it for runs of one name; empty for none.
        version: Name of the run's folder, or N of `version_N`; by default the next free N. One that is taken gets a
            number behind it.
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
        save_dir: str | None = None,
        name: str = "",
        version: int | str | None = None,
        log_graph: bool = False,
        default_hp_metric: bool = False,
        prefix: str = "",
        sub_dir: str | None = None,
        comment: str = "",
        purge_step: int | None = None,
        max_queue: int = 10,
        flush_secs: int = 120,
        filename_suffix: str = "",
    ) -> None:
        super().__init__(
            save_dir or "runs",
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

    def write_to(self, folder: Path) -> None:
        """Write to a run's folder."""
        self._root_dir, self._name, self._version = str(folder.parent), "", folder.name

    @rank_zero_only
    def go_on_from(self, step: int) -> None:
        """Have TensorBoard leave out what was logged from this step on: it is logged again."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer = self.experiment._get_file_writer()
        writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """What has led to a checkpoint is written down before it is needed: the run may be killed."""
        self.experiment.flush()

    def _get_next_version(self) -> int:
        """In a trainer that knows no runs: the next free number, taken by making the folder."""
        # Other processes of this run are told the folder's name by the first.
        if rank_zero_only.rank != 0:  # type: ignore[attr-defined]
            return super()._get_next_version()
        return int(claim(Path(self.root_dir), "version_*").name.removeprefix("version_"))

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, metrics: dict[str, Any] | None = None, step: int | None = None
    ) -> None:
        """Note the settings, and which scores to show beside them; the scores themselves come as they are logged."""
        if metrics is not None or self._default_hp_metric:
            super().log_hyperparams(params, metrics, step)
            return
        from torch.utils.tensorboard.summary import hparams

        settings = _sanitize_params(_flatten_dict(_convert_params(params)))
        writer = self.experiment._get_file_writer()
        for summary in hparams(settings, dict.fromkeys(_COMPARED, 0.0)):
            writer.add_summary(summary)


class RunMetrics(CSVLogger):
    """Write everything that is logged to `metrics.csv` in the run's folder.

    A run that is continued keeps the rows up to the step from which it goes on.
    """

    def __init__(self) -> None:
        super().__init__("", "", "")
        self._folder = ""

    @property
    def rows(self) -> int:
        """How many rows have been logged; in processes that write none, 0."""
        return self.experiment.rows if isinstance(self.experiment, _Rows) else 0

    @rank_zero_only
    def go_on_after(self, rows: int) -> None:
        """Drop what was logged after so many rows: it is logged again."""
        writer = self.experiment
        assert isinstance(writer, _Rows)
        writer.keep(rows)

    def write_to(self, folder: Path) -> None:
        """Write to a run's folder."""
        self._folder = str(folder)

    @property
    def log_dir(self) -> str:
        """The run's folder."""
        return self._folder

    root_dir = save_dir = log_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> _ExperimentWriter:
        """What writes the file."""
        if self._experiment is None:
            self._experiment = _Rows(self._folder)
        return self._experiment

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:
        """Nothing: the settings are in the run's `config.yaml`."""

    @rank_zero_only
    def save(self) -> None:
        """Write what has been logged since the last time."""
        self.experiment.save()

    @rank_zero_only
    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """What has led to a checkpoint is written down before it is needed: the run may be killed."""
        self.save()


class _Rows(_ExperimentWriter):
    """Lightning's writer, which would delete a file that it finds."""

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.rows = 0

    def _check_log_dir_exists(self) -> None:
        pass

    def log_metrics(self, metrics_dict: Mapping[str, float], step: int | None = None) -> None:
        super().log_metrics(dict(metrics_dict), step)
        self.rows += 1

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        with Path(self.metrics_file_path).open(newline="", encoding="utf-8") as file:
            self._rewrite(list(csv.DictReader(file)))

    def _rewrite(self, rows: list[dict[str, Any]]) -> None:
        with whole(self.metrics_file_path) as part, part.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self.metrics_keys)
            writer.writeheader()
            writer.writerows(rows)

    def keep(self, rows: int) -> None:
        """Keep so many rows, and nothing of a line that a run which was killed has left unfinished."""
        if not (path := Path(self.metrics_file_path)).is_file():
            return
        written = path.read_text(encoding="utf-8")
        reader = csv.DictReader(written[: written.rfind("\n") + 1].splitlines())
        self.metrics_keys = list(reader.fieldnames or ())
        kept = list(reader)[:rows]
        self.rows = len(kept)
        self._rewrite(kept)
