"""Checkpoints to resume from, and the adapter file of the best score."""

import errno
import math
import shutil
import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from snell_lightning.adapters import UserError, adapter_state_dict, save_adapter
from snell_lightning.adapters.whole import whole
from snell_lightning.callbacks.report import ClassReport
from snell_lightning.callbacks.resuming import go_on, of_all_processes
from snell_lightning.logger import RunLogger, RunMetrics
from snell_lightning.module import ImageClassifier
from snell_lightning.runs import ADAPTER, CHECKPOINTS, LAST, Run

AUTO = "auto"


class AdapterCheckpoint(ModelCheckpoint):
    """Save `last.ckpt` to resume from, and at each new best score `adapter.safetensors` and `epoch=N.ckpt`.

    The `last.ckpt` before is kept as `previous.ckpt`, in case a disk spoils the last one.

    What is scored is what is saved: the adapter's tensors are those that were validated, taken when validation began,
    whatever they are before and after it (callbacks that average weights exchange them for the time of validation). The
    files are written when validation ends, in the middle of an epoch too, and then are called `epoch=N-step=M.ckpt`.

    Checkpoints hold trained tensors, optimizer, schedule, loops, the place in the epoch, the state of every process's
    random generators and the gradients that wait for more (`trainer.accumulate_grad_batches`), and no frozen weight:
    a run goes on from any of them as if nothing had been. The adapter file stands in the run's folder and is all that
    is needed to use the result.

    Of those that score the same the last one is kept: small validation sets are soon saturated.

    Args:
        monitor: Logged value that decides what is best; `auto` is the one that `model.metric` names, null takes the
            last epoch as the best.
        mode: Whether the best is the `max` or the `min`.
        dirpath: Folder of the checkpoints; by default `checkpoints` in the run's folder.
        save_top_k: How many checkpoints of the best to keep.
        every_n_epochs: Save `last.ckpt` after every so many epochs.
        every_n_train_steps: Save `last.ckpt` after every so many optimizer steps besides.
    """

    def __init__(
        self,
        monitor: str | None = AUTO,
        mode: str = "max",
        dirpath: str | None = None,
        save_top_k: int = 1,
        every_n_epochs: int = 1,
        every_n_train_steps: int | None = None,
    ) -> None:
        if every_n_train_steps is not None and every_n_train_steps < 1:
            raise UserError(f"checkpoint.every_n_train_steps is {every_n_train_steps}; expected at least 1, or null")
        super().__init__(
            dirpath=dirpath,
            filename="{epoch}",
            monitor=monitor,
            mode=mode,
            save_top_k=save_top_k,
            save_last=True,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
        )
        self.adapter_path: Path | None = None
        # Without checkpoints, the adapter is what a run leaves.
        self.adapter_only = False
        # Of the best: its `score`, where something is monitored, and its `epoch`.
        self.best: dict[str, Any] | None = None
        self._own_folder = dirpath is None
        self._scored: dict[str, Tensor] | None = None
        self._by_validation = False
        self._last_step = 0
        self._every_n_steps = every_n_train_steps
        self._strategy: Strategy | None = None
        self._resumed_from = Path()
        self._continues = False
        self._resumed: list[dict[str, Any]] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where the files go, and what decides."""
        if self.monitor == AUTO:
            self.monitor = getattr(pl_module, "selected_by", "val/acc1")
        # Reading `log_dir` talks to the other processes, so all of them do it here.
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        if self._own_folder:
            self.dirpath = str(folder / CHECKPOINTS)
        with warnings.catch_warnings():
            # No file is replaced by one of another run.
            warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self.adapter_path = folder / ADAPTER
            run: Run | None = getattr(trainer, "run", None)
            if run is not None and trainer.is_global_zero:
                run.note(str(self.dirpath))
            self._continues = run is not None and run.continues
            if self._every_n_steps is not None:
                self._save_between_batches(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer's loop as it was."""
        super().teardown(trainer, pl_module, stage)
        vars(trainer.fit_loop.epoch_loop).pop("on_advance_end", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on where a resumed run was stopped, and write its adapter so far."""
        super().on_train_start(trainer, pl_module)
        if self._resumed is not None:
            go_on(trainer, pl_module, self._resumed)
            self._resumed = None
        assert self.adapter_path is not None
        if self.best_model_path and trainer.is_global_zero and not self.adapter_path.is_file():
            # Of the resumed run the adapter lies elsewhere, if it is there still; its best checkpoint has the tensors.
            files = trainer.strategy.checkpoint_io
            saved = files.load_checkpoint(self.best_model_path, weights_only=True)["state_dict"]
            self._export(trainer, pl_module, {key.removeprefix("model."): value for key, value in saved.items()})

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Take the tensors that are about to be scored."""
        if batch_idx == dataloader_idx == 0 and self._saves(trainer) and trainer.is_global_zero:
            self._scored = _trained_tensors(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save what was scored, if it is the best so far."""
        if not self._saves(trainer):
            return
        assert trainer._results is not None
        if self.monitor in trainer._results.metrics(on_step=False)["callback"]:
            self._by_validation = True
            self._select(trainer, pl_module)
        self._scored = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Number the steps of a resumed run's log as if it had not been stopped."""
        if pl_module.automatic_optimization:
            trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `last.ckpt`; where training itself gives the score, what it has led to may be the best so far."""
        if not self._saves(trainer):
            return
        if not self._by_validation and (self.monitor is None or self.monitor in trainer.callback_metrics):
            self._select(trainer, pl_module)
        if (trainer.current_epoch + 1) % max(1, self._every_n_epochs) == 0:
            self._save_last(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of training; a trial run (`fast_dev_run`) leaves no file."""
        if not self._saves(trainer) or trainer.global_step == 0:
            return
        if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            # The averages have come into the model just now, and nothing has scored them.
            self._validate(trainer)
        if self._last_step != trainer.global_step:
            self._save_last(trainer)
        # A run that ends before its first validation has no best epoch, and is not to end without an adapter.
        if self.best is None and trainer.is_global_zero:
            self._export(trainer, pl_module, _trained_tensors(pl_module), epoch=trainer.current_epoch)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the step that a signal lets the run stop after."""
        stopped = isinstance(exception, SIGTERMException) and self._saves(trainer)
        if stopped and trainer.global_step > self._last_step:
            self._save_last(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add what each process has of its own, and how much has been logged."""
        checkpoint["processes"] = of_all_processes(trainer, pl_module)
        checkpoint["logged_rows"] = sum(each.rows for each in trainer.loggers if isinstance(each, RunMetrics))

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep what each process has of its own until training starts."""
        self._resumed = checkpoint.get("processes")
        self._strategy, self._resumed_from = trainer.strategy, Path(trainer.ckpt_path or "").absolute()
        self._last_step = checkpoint["global_step"]
        for logger in trainer.loggers if self._continues else ():
            if isinstance(logger, RunLogger):
                # While gradients wait, a validation has been logged at the step that is not made yet.
                logger.go_on_from(self._last_step + any(each["gradients"] for each in self._resumed or ()))
            elif isinstance(logger, RunMetrics):
                logger.go_on_after(checkpoint.get("logged_rows", 0))

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Whether this score is among the best. Where one is kept, it is the later of equals, which trained longer."""
        if super().check_monitor_top_k(trainer, current):
            return True
        return self.save_top_k == 1 and current is not None and bool(current == self.best_model_score)

    def state_dict(self) -> dict[str, Any]:
        """Lightning's, and what the best is."""
        return {**super().state_dict(), "best": self.best, "by_validation": self._by_validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best so far, with its checkpoint; evaluation takes over nothing."""
        if self.adapter_path is None or self.dirpath is None:
            return
        here = Path(self.dirpath).absolute()
        self._by_validation = bool(state_dict.get("by_validation", False))
        if self._continues and self._resumed_from.parent == here:
            self.last_model_path = str(here / LAST)
        if not state_dict["best_model_path"]:
            return
        recorded = Path(state_dict["best_model_path"])
        # A run that was moved, or is resumed in another folder, has it beside the checkpoint it is resumed from.
        found = next((path for path in (recorded, self._resumed_from.with_name(recorded.name)) if path.is_file()), None)
        if found is None:
            rank_zero_warn(f"the best checkpoint so far, {recorded}, is not there any more: the best is chosen anew")
            return
        best = here / recorded.name if self._continues else self._copied(found, here)
        scores = {str(best): score} if (score := state_dict["best_model_score"]) is not None else {}
        if self._continues:
            names = {str(here / Path(path).name): value for path, value in state_dict["best_k_models"].items()}
            scores |= {path: value for path, value in names.items() if Path(path).is_file()}
        self.best, self.best_model_path, self.best_model_score = state_dict.get("best"), str(best), score
        if scores:
            self.best_k_models = scores
            worst = max if self.mode == "min" else min
            self.kth_best_model_path = worst(scores, key=scores.__getitem__)
            self.kth_value = scores[self.kth_best_model_path]

    def _saves(self, trainer: Trainer) -> bool:
        """Whether this is training, and neither a trial run nor lightning's first look at the validation data."""
        fits = trainer.state.fn == TrainerFn.FITTING
        return fits and not trainer.fast_dev_run and not trainer.sanity_checking  # type: ignore[attr-defined]

    def _select(self, trainer: Trainer, module: LightningModule) -> None:
        """Save adapter and checkpoint if the score is the best so far, or nothing is scored."""
        candidates = self._monitor_candidates(trainer)
        score = None if self.monitor is None else float(candidates[self.monitor])
        better = score is None or self._beats(trainer, score)
        self._require_folder(trainer)
        if better:
            self.best = {"score": score, "epoch": trainer.current_epoch}
        if not self.adapter_only:
            self.filename = "{epoch}" if _at_epochs_end(trainer) else "{epoch}-{step}"
            self._save_topk_checkpoint(trainer, candidates)
        if better and self._by_validation:
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, ClassReport):
                    callback.keep(trainer, module)
        if better and trainer.is_global_zero:
            self._export(trainer, module, self._scored or _trained_tensors(module))

    def _beats(self, trainer: Trainer, score: float) -> bool:
        """Whether a score is at least as good as the best so far; all processes decide the same."""
        if math.isnan(score):
            better = False
        elif self.best is None or self.best["score"] is None:
            better = True
        else:
            better = score >= self.best["score"] if self.mode == "max" else score <= self.best["score"]
        return trainer.strategy.reduce_boolean_decision(better)

    def _save_last(self, trainer: Trainer) -> None:
        self._require_folder(trainer)
        if not self.adapter_only:
            self._last_step = trainer.global_step
            self._save_last_checkpoint(trainer, self._monitor_candidates(trainer))

    def _require_folder(self, trainer: Trainer) -> None:
        """Raise where somebody has removed the run's folder, which saving would make again with half of its files."""
        run: Run | None = getattr(trainer, "run", None)
        if run is not None and run.folder is not None and not run.folder.is_dir():
            raise FileNotFoundError(errno.ENOENT, "the run's folder is not there any more", str(run.folder))

    def _save_between_batches(self, trainer: Trainer) -> None:
        """Have `last.ckpt` saved after so many steps, when all that follows a batch is done: logging and validation.

        There is no hook at that moment: `on_train_batch_end` comes before a step's values are logged, and what is
        logged after a checkpoint is lost if the run is killed there.
        """
        loop, every = trainer.fit_loop.epoch_loop, self._every_n_steps
        assert every is not None
        advance_end = type(loop).on_advance_end

        def on_advance_end(fetcher: Any) -> None:
            advance_end(loop, fetcher)
            step = trainer.global_step
            if self._saves(trainer) and not _at_epochs_end(trainer) and step != self._last_step and step % every == 0:
                self._save_last(trainer)

        vars(loop)["on_advance_end"] = on_advance_end

    def _validate(self, trainer: Trainer) -> None:
        """Score the model as it is, as lightning's loop does between two steps."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        if trainer.enable_validation and sum(loop.max_batches) > 0:
            trainer.validating = True
            loop.run()
            trainer.training = True

    def _copied(self, source: Path, folder: Path) -> Path:
        """A copy of another run's checkpoint in this run's folder, where no file is replaced."""
        assert self._strategy is not None
        target, number = folder / source.name, 0
        if self._strategy.is_global_zero:
            while target.exists():
                number += 1
                target = folder / f"{source.stem}-v{number}{source.suffix}"
            with whole(target) as part:
                shutil.copyfile(source, part)
        return self._strategy.broadcast(target)

    def _export(
        self, trainer: Trainer, module: LightningModule, tensors: dict[str, Tensor], epoch: int | None = None
    ) -> None:
        """Write the adapter file."""
        if not isinstance(module, ImageClassifier):
            return
        assert self.adapter_path is not None
        data: Any = getattr(trainer, "datamodule", None)
        best = self.best or {"score": None, "epoch": epoch}
        values: dict[str, Any] = {"epoch": best["epoch"]}
        if self.monitor is not None and best["score"] is not None:
            values[self.monitor] = best["score"]
        if hasattr(data, "settings"):
            values |= data.settings()
        save_adapter(
            self.adapter_path,
            module.model,
            module.adapter_config,
            module.backbone_name,
            frozen=module.frozen_fingerprint,
            tensors=tensors,
            num_classes=module.num_classes,
            backbone_args=module.backbone_args,
            pretrained=module.pretrained,
            weights=module.weights,
            **values,
        )


def _trained_tensors(module: LightningModule) -> dict[str, Tensor]:
    """A copy of what is trained, on the host; of a module of another kind nothing."""
    if not isinstance(module, ImageClassifier):
        return {}
    return {name: tensor.detach().cpu().clone() for name, tensor in adapter_state_dict(module.model).items()}


def _at_epochs_end(trainer: Trainer) -> bool:
    return trainer.fit_loop.epoch_loop._num_ready_batches_reached()
