"""Lightning's Trainer with a run's folder, clean stops, and one verb more."""

import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from snell_lightning.adapters import UserError
from snell_lightning.checkpoints import read_checkpoint, write_checkpoint
from snell_lightning.data import ImageDataModule
from snell_lightning.launch import work_together
from snell_lightning.logger import RunLogger, RunMetrics
from snell_lightning.runs import LAST, PREVIOUS, Run


class SnellTrainer(Trainer):
    """Lightning's Trainer with a run's folder, clean stops, and one verb more."""

    run: Run | None = None
    _run_folder: Path | None = None

    def __init__(self, *args: Any, timeout: int = 1800, **kwargs: Any) -> None:
        """As Lightning's, and how several processes work together.

        Args:
            *args: Of Lightning's Trainer.
            timeout: Seconds after which a process that waits for others in vain ends. What one process does while
                others wait, such as loading a backbone that they have loaded already, must take less.
            **kwargs: Of Lightning's Trainer.
        """
        super().__init__(*args, **kwargs)
        if type(self.strategy.checkpoint_io) is TorchCheckpointIO:
            self.strategy.checkpoint_io = _WholeCheckpoints()
        if isinstance(self.strategy, DDPStrategy):
            work_together(self.strategy, timeout)

    def prepare(self, run: Run) -> None:
        """Give files a run's folder, which is made when training or evaluation starts, and stop cleanly at signals."""
        self.run = run
        self._signal_connector = _StopSignals(self)
        self.fit_loop.epoch_loop._broadcast_sigterm_tensor = self._agree_to_stop  # type: ignore[method-assign]
        if not self.fast_dev_run:  # type: ignore[attr-defined]
            self.loggers = [*self.loggers, RunMetrics()]
            # Until there is a folder nobody is to make one by asking for its name.
            self._write_to(run.root / run.name)

    @property
    def stopped_by(self) -> int | None:
        """The signal that the run was stopped by."""
        return getattr(self._signal_connector, "stopped_by", None)

    @property
    def to_be_queued_again(self) -> bool:
        """Whether it was SLURM's notice that stopped the run: its job is to be queued again."""
        return getattr(self._signal_connector, "notice", None) == self.stopped_by is not None

    @property
    def received_sigterm(self) -> bool:
        """Whether to stop here; a validation amid training is finished first, as its score is of the step before."""
        return super().received_sigterm and not (self.state.fn == TrainerFn.FITTING and self.validating)

    @property
    def log_dir(self) -> str | None:
        """The run's folder, whatever the loggers are. As with Lightning's, all processes have to ask."""
        if self.run is None or self.fast_dev_run:  # type: ignore[attr-defined]
            return super().log_dir
        if self._run_folder is None:
            problem, folder, continued = None, None, self.run.folder
            if self.is_global_zero:
                try:
                    folder = self.run.start(can_be_continued=self.state.fn == TrainerFn.FITTING)
                except Exception as error:
                    problem = error
            # Also a failure: the others would wait for ever.
            problem, folder, first = self.strategy.broadcast((problem, folder, continued))
            if problem is not None:
                raise problem
            if continued != first:
                raise UserError(
                    f"process {self.global_rank} is to go on with {continued or 'no run'}, and the first with "
                    f"{first or 'none'}; runs must be in a folder that all machines share"
                )
            assert folder is not None
            self._run_folder = folder
            self._write_to(folder)
        return str(self._run_folder)

    @property
    def default_root_dir(self) -> str:
        """What is kept beside loggers and checkpoints goes to the run's folder too.

        Until there is one this is a folder that does not exist: under SLURM, Lightning looks into it for a checkpoint
        to go on from, and would find another job's.
        """
        if self.run is None:
            return super().default_root_dir
        return str(self._run_folder or self.run.root / ".none")

    def _write_to(self, folder: Path) -> None:
        for logger in self.loggers:
            if isinstance(logger, (RunLogger, RunMetrics)):
                logger.write_to(folder)

    def memory(self, model: Any, datamodule: ImageDataModule, budget: str | None = None) -> None:
        """Plan the memory of a training step, without running one and without loading the backbone.

        Prints what one process takes, by phase and by batch size, beside full fine-tuning, LoRA and a linear probe.

        Args:
            model: The job, as `SnellCLI` describes it for this verb.
            datamodule: Its data.
            budget: Memory to fit into, such as 8GiB: prints the largest batch, and the setting that would help most.
        """
        from snell_lightning.memory import parse_bytes, report

        report(model, datamodule.batch_size, None if budget is None else parse_bytes(budget))

    def check_data(
        self, model: Any, datamodule: ImageDataModule, output: str | None = None, workers: int | None = None
    ) -> None:
        """Look at every image before it is trained on.

        Prints how many there are of each class and split, and which are missing, unreadable, there twice or odd. Ends
        with status 1 if training would stop at one of them, or a score would be wrong.

        Args:
            model: The job, as `SnellCLI` describes it for this verb.
            datamodule: Its data.
            output: A JSON file to write all of it to.
            workers: Processes that read images; by default one for each processor.
        """
        from snell_lightning.data.check import check, print_report, write_report

        checked = check(datamodule.splits, datamodule.image_size, datamodule.root, workers)
        print_report(checked)
        if output is not None:
            write_report(checked, Path(output))
        if checked.errors:
            raise SystemExit(1)

    def _agree_to_stop(self) -> None:
        """Between two steps of several processes: one that was told to stop stops all, at the same step.

        Takes the place of Lightning's, which tells the others from within the signal's handler, that is at any moment.
        """
        signals = self._signal_connector
        assert isinstance(signals, _StopSignals)
        told = torch.tensor(signals.stopped_by or 0, device=self.strategy.root_device)
        torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX)
        if signum := int(told):
            signals.stopped_by = signum
            raise SIGTERMException


class _WholeCheckpoints(TorchCheckpointIO):
    """Lightning's files, each with a seal, and each there as a whole or not at all."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            previous = Path(path).with_name(PREVIOUS) if Path(path).name == LAST else None
            write_checkpoint(checkpoint, path, previous)

    def load_checkpoint(
        self, path: Any, map_location: Any = lambda storage, _: storage, weights_only: bool | None = None
    ) -> dict[str, Any]:
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only)
        return read_checkpoint(path, map_location)


class _StopSignals(_SignalConnector):
    """On Ctrl-C or SIGTERM the step that runs is finished, and then training stops; a second one stops at once.

    So it does on SLURM's notice that a job's time is up. Lightning saves a checkpoint then and there, which needs all
    processes: with several of them the one would wait for the gradients of those that wait for it to save.
    """

    def __init__(self, trainer: SnellTrainer) -> None:
        super().__init__(trainer)
        self.stopped_by: int | None = None
        self.notice: int | None = None

    def register_signal_handlers(self) -> None:
        """Take over the two signals for as long as the trainer runs."""
        super().register_signal_handlers()
        for signum in (signal.SIGINT, signal.SIGTERM):
            self._register_signal(signum, self._stop)

    def _slurm_sigusr_handler_fn(self, signum: int, frame: FrameType | None) -> None:
        self.notice = signum
        self._stop(signum, frame)

    def _stop(self, signum: int, _: FrameType | None) -> None:
        if self.stopped_by is not None:
            raise KeyboardInterrupt
        self.stopped_by = signum
        # Of several processes none leaves alone: they agree between two steps.
        self.received_sigterm = self.trainer.world_size == 1
