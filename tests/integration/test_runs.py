"""A run's folder, what goes on from it, and what is refused before there is one."""

import csv
import io
import os
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.loggers import Logger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from snell_lightning.adapters import read_adapter
from snell_lightning.cli import make_cli

from .conftest import QUICK, Command

FIT = ("fit", *QUICK)
RUN = Path("runs/version_0")
LAST = RUN / "checkpoints" / "last.ckpt"


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def callback(name: str, **arguments: Any) -> tuple[str, str]:
    """The option that adds a callback of lightning's."""
    return "--trainer.callbacks", yaml.safe_dump(
        [{"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}], default_flow_style=True
    )


class Recorder(Logger):
    """A logger with no folder of its own, as those of services are."""

    hyperparameters: list[dict[str, Any]] = []  # noqa: RUF012 - what all of them were given

    name = version = "recorder"

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        pass

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hyperparameters.append(params)


class TestD3WhatTheBestWas:
    """A resumed run has the adapter of the best epoch so far, wherever its files are now."""

    @pytest.fixture
    def best(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command) -> dict[str, Any]:
        """The best of a run in `runs/version_0`, below the current folder."""
        (tmp_path / "first").mkdir()
        monkeypatch.chdir(tmp_path / "first")
        assert command(*FIT, "--trainer.max_epochs", "1").status == 0
        return read_adapter(RUN / "adapter.safetensors")[1]

    def resume(self, command: Command, *options: str) -> None:
        # At this rate the epoch is worse than the one before.
        done = command(*FIT, "--model.optimizer.lr", "3", *options)
        assert (done.status, done.errors) == (0, [])

    def test_from_another_working_folder(
        self, best: dict[str, Any], command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        self.resume(command, "--ckpt_path", f"first/{LAST}")
        assert read_adapter(RUN / "adapter.safetensors")[1] == best
        assert [path.name for path in (RUN / "checkpoints").glob("epoch=*.ckpt")] == ["epoch=0.ckpt"]

    def test_of_a_run_that_was_moved(self, best: dict[str, Any], command: Command) -> None:
        RUN.rename("moved")
        self.resume(command, "--ckpt_path", "moved/checkpoints/last.ckpt")
        assert read_adapter(RUN / "adapter.safetensors")[1] == best

    def test_with_checkpoints_in_a_folder_that_was_named(self, best: dict[str, Any], command: Command) -> None:
        own = ("--checkpoint.dirpath", "kept")
        assert command(*FIT, *own, "--trainer.max_epochs", "1").status == 0
        kept = files(Path("kept"))
        self.resume(command, *own, "--ckpt_path", "kept/last.ckpt")
        assert read_adapter("runs/version_2/adapter.safetensors")[1] == best
        assert {path: path.read_bytes() for path in kept} == kept

    def test_a_best_checkpoint_that_is_gone_is_said(self, best: dict[str, Any], command: Command) -> None:
        (RUN / "checkpoints/epoch=0.ckpt").unlink()
        with pytest.warns(UserWarning, match="epoch=0.ckpt, is not there any more: the best is chosen anew"):
            self.resume(command, "--ckpt_path", str(LAST))
        assert read_adapter("runs/version_1/adapter.safetensors")[1]["epoch"] == 1


class TestResume:
    """`--resume` goes on in the run's own folder."""

    @pytest.fixture
    def stopped(self, work: Path) -> Path:
        """The finished run as one that was killed."""
        (RUN / ".unfinished").write_text("{}")
        return RUN

    def test_auto_goes_on_with_the_unfinished_run_in_its_folder(self, stopped: Path, command: Command) -> None:
        rows = (stopped / "metrics.csv").read_text().splitlines()
        done = command(*FIT, "--trainer.max_epochs", "3", "--resume", "auto")
        assert (done.status, done.errors) == (0, [])
        assert "resume: the run in runs/version_0 goes on from runs/version_0/checkpoints/last.ckpt" in done.err
        assert [path.name for path in Path("runs").iterdir()] == ["version_0"]
        assert torch.load(LAST, weights_only=True)["global_step"] == 6
        assert {path.name for path in stopped.glob("config*.yaml")} == {"config.yaml", "config_1.yaml"}
        assert not (stopped / ".unfinished").exists()
        with (stopped / "metrics.csv").open(newline="") as file:
            logged = [row for row in csv.DictReader(file) if row["train/loss"]]
        # Those of before are there, and none is there twice.
        assert [int(row["step"]) for row in logged] == list(range(6))
        assert len(rows) < len((stopped / "metrics.csv").read_text().splitlines())

    def test_what_is_logged_again_is_there_once(self, stopped: Path, command: Command) -> None:
        # The second epoch is done again, and a line was not finished.
        LAST.unlink()
        for path in (stopped / "checkpoints").glob("epoch=1.ckpt"):
            path.unlink()
        with (stopped / "metrics.csv").open("a") as file:
            file.write("0,1")
        assert command(*FIT, "--trainer.max_epochs", "3", "--resume", "auto").errors == []
        with (stopped / "metrics.csv").open(newline="") as file:
            logged = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
        assert logged == list(range(6))
        curves = EventAccumulator(str(stopped)).Reload()
        assert [event.step for event in curves.Scalars("train/loss")] == list(range(6))

    def test_auto_starts_afresh_where_all_runs_finished(self, work: Path, command: Command) -> None:
        done = command(*FIT, "--resume=auto")
        assert "resume: no run in runs is unfinished and has a whole checkpoint; a fresh start" in done.err
        assert Path("runs/version_1/adapter.safetensors").is_file()

    def test_auto_takes_the_newest_checkpoint_that_is_whole(self, stopped: Path, command: Command) -> None:
        LAST.write_bytes(LAST.read_bytes()[:1000])
        # The best epoch may be the last one, whose file is newer than previous.ckpt.
        for best in LAST.parent.glob("epoch=*.ckpt"):
            best.unlink()
        done = command(*FIT, "--trainer.max_epochs", "3", "--resume", "auto")
        assert (done.status, done.errors) == (0, [])
        assert "last.ckpt is damaged, or is no checkpoint of this package" in done.err
        assert "an older one is looked for" in done.err
        assert "goes on from runs/version_0/checkpoints/previous.ckpt" in done.err

    def test_a_run_is_named_by_its_folder(self, stopped: Path, command: Command) -> None:
        assert command(*FIT, "--trainer.max_epochs", "3", "--resume", str(stopped)).status == 0
        done = command(*FIT, "--resume", str(stopped))
        assert "there is no unfinished run in" in done.errors[0]

    @pytest.mark.parametrize(
        ("arguments", "expected"),
        [
            (("fit", "--resume", "auto", "--ckpt_path", "x.ckpt"), "leave one of them out"),
            (("test", "--config", "vit.yaml", "--resume", "auto"), "--resume goes with fit, not with test"),
            (("fit", "--resume"), "--resume needs a value"),
        ],
    )
    def test_what_makes_no_sense_is_one_line(self, arguments: tuple[str, ...], expected: str, command: Command) -> None:
        assert expected in command(*arguments).errors[0]


class TestD4Launchers:
    """A launcher's processes train together, or not at all."""

    def test_a_count_that_is_not_the_launchers_is_refused(
        self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        done = command(*FIT, "--trainer.devices", "1")
        assert "torchrun started 2 processes on one machine, and trainer.devices is 1" in done.errors[0]
        assert not Path("runs").exists()

    def test_processes_that_no_known_launcher_started_are_refused(
        self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert "there are 2 processes (WORLD_SIZE)" in command(*FIT).errors[0]
        assert not Path("runs").exists()


def test_d5_what_lies_about_is_not_resumed_under_slurm(
    work: Path, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"NTASKS": "1", "NNODES": "1", "PROCID": "0", "LOCALID": "0", "JOB_NAME": "fit"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    for folder in (Path(), Path("runs"), RUN):
        (folder / "hpc_ckpt_1.ckpt").write_bytes(LAST.read_bytes())
    for options in ((), ("--trainer.default_root_dir", "runs"), ("--trainer.logger.version", "version_0")):
        done = command(*FIT, *options)
        assert (done.status, done.errors) == (0, [])
        assert "Restor" not in done.err


class TestD7WhatACheckpointHolds:
    """What a config says and a checkpoint holds otherwise is named."""

    def test_each_key_is_named_in_one_line(self, work: Path, command: Command) -> None:
        Path("other.yaml").write_text(
            "model:\n  warmup: 0.3\n  adapter: {rank: 4, sparsity: 0.9}\n"
            "  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 7e-3}}\n"
            "data:\n  augmentation: none\n"
        )
        options = ("--config", "other.yaml", "--ckpt_path", str(LAST), "--trainer.max_epochs", "3")
        place = FIT.index("--model.adapter.rank")
        done = command(*FIT[:place], *FIT[place + 2 :], *options)
        assert (done.status, done.errors) == (0, [])
        (line,) = (line for line in done.err.splitlines() if "was made with" in line)
        assert line == (
            f"{LAST} was made with model.adapter.rank 2 (not 4), model.optimizer.lr 0.003 (not 0.007), model.warmup "
            "0.1 (not 0.3), data.augmentation light (not none); its values hold, unless given on the command line"
        )

    def test_a_config_that_says_the_same_is_no_line(self, work: Path, command: Command) -> None:
        done = command("validate", "--config", str(RUN / "config.yaml"), "--ckpt_path", str(LAST))
        assert (done.status, done.errors) == (0, [])
        assert "was made with" not in done.err


class TestD9TheFolderIsOurs:
    """Whatever the logger is, each run has a folder with all that it leaves, and none touches another's."""

    LOGGERS = {  # noqa: RUF012
        "none": ("--trainer.logger", "false"),
        "lightning's own choice": ("--trainer.logger", "true"),
        "a service": ("--trainer.logger", f"{__name__}.Recorder"),
        "csv": ("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"),
        "a fixed version": ("--trainer.logger.version", "mine"),
    }

    @pytest.mark.parametrize("logger", LOGGERS)
    def test_a_second_run_leaves_the_first_as_it_is(
        self, logger: str, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        short = (*FIT, "--trainer.max_epochs", "1", *self.LOGGERS[logger])
        assert command(*short).status == 0
        first = files(Path("runs"))
        names = {path.name for path in first}
        assert {"config.yaml", "adapter.safetensors", "metrics.csv", "last.ckpt", "epoch=0.ckpt"} <= names
        done = command(*short)
        assert (done.status, done.errors) == (0, [])
        assert {path: path.read_bytes() for path in first} == first
        assert len(list(Path("runs").glob("*/adapter.safetensors"))) == 2

    def test_evaluations_have_names_of_their_own(self, work: Path, command: Command) -> None:
        for verb in ("validate", "test", "test"):
            assert command(verb, "--config", str(RUN / "config.yaml")).status == 0
        assert {path.name for path in Path("runs").iterdir()} == {"version_0", "validate_0", "test_0", "test_1"}
        with Path("runs/test_0/metrics.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        assert 0 < float(row["test/acc1"]) <= 1

    def test_d10_runs_go_below_the_root_folder(
        self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert command(*FIT, "--trainer.default_root_dir", "here").status == 0
        assert {path.name for path in tmp_path.iterdir()} == {"here"}
        assert (tmp_path / "here/version_0/adapter.safetensors").is_file()

    def test_callbacks_that_look_for_checkpoints_make_no_folder(
        self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert command(*FIT, *callback("OnExceptionCheckpoint", dirpath="unused")).status == 0
        assert [path.name for path in Path("runs").iterdir()] == ["version_0"]


def test_d11_the_module_is_copied_and_pickled_without_the_command_line(work: Path) -> None:
    module = make_cli(QUICK, run=False).model
    assert len(pickle.dumps(module)) < 2 * sum(parameter.nbytes for parameter in module.parameters())
    state = deepcopy(module).state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert "parser" not in repr(module.optimizer_factory)


class TestD13BeforeThereIsAFolder:
    """What cannot work is one line, and leaves nothing."""

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            (
                callback("EarlyStopping", monitor="val/acc"),
                "EarlyStopping monitors val/acc, which is not logged; did you",
            ),
            (("--checkpoint.monitor", "loss"), "AdapterCheckpoint monitors loss, which is not logged"),
            (callback("LearningRateFinder"), "LearningRateFinder sets one constant learning rate"),
            (callback("BackboneFinetuning"), "callbacks that freeze and unfreeze layers"),
            (("--model.optimizer", "torch.optim.Muon"), "Muon only supports 2D parameters"),
            (("--model.optimizer", "torch.optim.LBFGS"), "LBFGS doesn't support per-parameter options"),
            (("--model.optimizer.lr", "0"), "model.optimizer.lr must be above 0, not 0"),
            (("--model.optimizer.lr", "-1"), "Invalid learning rate: -1"),
            (("--trainer.accumulate_grad_batches", "0"), "trainer.accumulate_grad_batches is 0"),
            (("--trainer.limit_train_batches", "0"), "trainer.limit_train_batches is 0: nothing would be trained"),
            (("--trainer.max_epochs", "-1"), "the schedule needs an end"),
            (("--trainer.barebones", "true"), "trainer.barebones trains without checkpoints"),
        ],
    )
    def test_one_line(
        self,
        options: tuple[str, ...],
        expected: str,
        tmp_path: Path,
        command: Command,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.chdir(tmp_path)
        done = command(*FIT, *options)
        assert done.status == 1
        assert expected in done.errors[0]
        assert list(tmp_path.iterdir()) == []

    def test_without_checkpoints_the_adapter_is_left(
        self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        assert command(*FIT, "--trainer.enable_checkpointing", "false").status == 0
        assert "val/acc1" in read_adapter(RUN / "adapter.safetensors")[1]
        assert not list(Path("runs").rglob("*.ckpt"))


class TestD14Configs:
    """A config may come through a pipe, and have keys that are there for its anchors."""

    TEXT = "x-rate: &rate 3e-3\nmodel:\n  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: *rate}}\n"

    def learning_rate(self) -> float:
        return yaml.safe_load((RUN / "config.yaml").read_text())["model"]["optimizer"]["init_args"]["lr"]

    def test_standard_input(self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.stdin", io.StringIO(self.TEXT))
        assert command(*FIT, "--config", "-").status == 0
        assert self.learning_rate() == 3e-3

    def test_a_pipe_that_can_be_read_once(
        self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        read, write = os.pipe()
        os.write(write, self.TEXT.encode())
        os.close(write)
        done = command(*FIT, f"--config=/dev/fd/{read}")
        os.close(read)
        assert (done.status, done.errors) == (0, [])
        assert self.learning_rate() == 3e-3

    def test_anchors_at_the_top(self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        Path("job.yaml").write_text(self.TEXT)
        assert command(*FIT, "--config", "job.yaml").status == 0
        assert self.learning_rate() == 3e-3

    def test_a_broken_one_is_named(self, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", io.StringIO("model: ["))
        assert "config - is not valid YAML in line 1" in command(*FIT, "--config", "-").errors[0]


class TestD15Hyperparameters:
    """Loggers get the resolved config, once."""

    def test_tensorboard_has_them_beside_the_scores(self, work: Path) -> None:
        events = EventAccumulator(str(RUN))
        events.Reload()
        plugin = events.summary_metadata["_hparams_/session_start_info"].plugin_data
        assert plugin.plugin_name == "hparams"
        assert b"model/adapter/rank" in plugin.content
        assert b"val/acc1" in events.summary_metadata["_hparams_/experiment"].plugin_data.content
        # No score was made up for it.
        assert "hp_metric" not in events.Tags()["scalars"]
        assert len(events.Scalars("val/acc1")) == 2

    def test_another_logger_gets_them_once(
        self, tmp_path: Path, command: Command, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Recorder.hyperparameters.clear()
        assert command(*FIT, "--trainer.logger", f"{__name__}.Recorder").status == 0
        (given,) = Recorder.hyperparameters
        assert given["model"]["adapter"]["rank"] == 2
        assert given["data"]["batch_size"] == 8
