"""The command line's own parts: where configs are found, what beats what, and how errors read."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from snell_lightning import SnellConfig, UserError
from snell_lightning import arguments as command_line
from snell_lightning.checkpoints import write_checkpoint
from snell_lightning.cli import SHIPPED_CONFIGS, arrange_arguments, find_config, main, make_cli
from snell_lightning.help import COMMANDS, KEYS, TITLE
from snell_lightning.lightning_cli import SnellCLI
from snell_lightning.messages import ConfigError, explain, one_line

VIT = str(SHIPPED_CONFIGS / "vit.yaml")
BF16 = str(SHIPPED_CONFIGS / "trainer" / "bf16.yaml")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["snell_lightning"])
    yield tmp_path
    assert {path.suffix for path in tmp_path.rglob("*")} <= {".yaml", ".ckpt"}, "parsing has written something"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that gives the settings a command line results in; nothing is created or run."""

    def parse(*arguments: str) -> Any:
        monkeypatch.setattr(SnellCLI, "instantiate_classes", lambda self: None)
        monkeypatch.setattr(SnellCLI, "_run_subcommand", lambda self, subcommand: None)
        cli = make_cli(arguments)
        return cli.config[cli.config.subcommand]

    return parse


@pytest.fixture
def checkpoint(here: Path) -> Path:
    """A checkpoint that was made with a few settings; of the rest of it nothing is read for parsing."""
    settings = {
        "adapter": {"rank": 4, "sparsity": 0.5},
        "label_smoothing": 0.2,
        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        "num_classes": 5,
        "adapter_file": "gone.safetensors",
        "_instantiator": "lightning.pytorch.cli.instantiate_module",
    }
    made = {"state_dict": {}, "snell": {}, "pytorch-lightning_version": "2.6.6", "hyper_parameters": settings}
    write_checkpoint(made, here / "some.ckpt")
    return here / "some.ckpt"


def test_a_config_is_a_file_here_or_else_a_shipped_one(here: Path) -> None:
    assert find_config("vit.yaml") == VIT
    assert find_config("trainer/bf16.yaml") == BF16
    (here / "vit.yaml").write_text("seed_everything: 1\n")
    assert find_config("vit.yaml") == "vit.yaml"
    assert find_config(str(here / "vit.yaml")) == str(here / "vit.yaml")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vti.yaml", "did you mean vit.yaml?"),
        ("trainer/bf61.yaml", "did you mean trainer/bf16.yaml?"),
        ("zzz", "shipped are .*vit.yaml"),
        ("trainer", "there is no config file 'trainer'"),
    ],
)
def test_a_config_that_is_nowhere_is_answered_with_the_nearest(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        find_config(name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("fit", "--config", "vit.yaml", "--config", "trainer/bf16.yaml", "--model.warmup", "0.2", "--data.seed=3"),
        ("fit", "--model.warmup", "0.2", "--config", "vit.yaml", "--data.seed=3", "--config=trainer/bf16.yaml"),
        ("fit", "--model.warmup", "0.2", "--data.seed=3", "-c", "vit.yaml", "-c=trainer/bf16.yaml"),
    ],
)
def test_configs_come_first_in_their_order_wherever_they_stand(arguments: tuple[str, ...]) -> None:
    expected = ["fit", "--config", VIT, "--config", BF16, "--model.warmup", "0.2", "--data.seed=3"]
    assert arrange_arguments(arguments) == expected


@pytest.mark.parametrize("given", [("--ckpt_path", "some.ckpt"), ("--ckpt_path=some.ckpt",)])
def test_a_checkpoints_settings_stand_between_configs_and_values(given: tuple[str, ...], checkpoint: Path) -> None:
    arranged = arrange_arguments(["fit", *given, "--model.warmup", "0.2", "--config", "vit.yaml"])
    assert arranged[:4] == ["fit", "--config", VIT, "--config"]
    settings = json.loads(arranged[4])["model"]
    assert settings["adapter"] == {"rank": 4, "sparsity": 0.5}
    # The number of classes is the data's, and what training started from is in the checkpoint itself.
    assert settings.keys() == {"adapter", "label_smoothing", "optimizer"}
    assert arranged[5:] == [*given, "--model.warmup", "0.2"]


@pytest.mark.parametrize("special", ["best", "last", "null"])
def test_lightnings_own_words_for_a_checkpoint_are_left_to_it(special: str) -> None:
    assert arrange_arguments(["fit", "--ckpt_path", special]) == ["fit", "--ckpt_path", special]


def test_without_a_command_and_without_arguments_nothing_is_changed() -> None:
    assert arrange_arguments([]) == []
    assert arrange_arguments(["--help"]) == ["--help"]


@pytest.mark.parametrize("name", ["--config", "-c", "--ckpt_path"])
def test_an_option_without_its_value_is_named(name: str) -> None:
    with pytest.raises(UserError, match=f"{name} needs a value"):
        arrange_arguments(["fit", name])


def test_a_checkpoints_settings_beat_the_configs_and_values_beat_the_checkpoints(checkpoint: Path, parsed: Any) -> None:
    settings = {"adapter": {"rank": 8, "sparsity": 0.9, "scale": 0.3}, "label_smoothing": 0.1, "adapter_file": None}
    Path("job.yaml").write_text(yaml.safe_dump({"model": settings}))
    config = parsed(
        *("fit", "--model.adapter.rank", "16", "--ckpt_path", str(checkpoint), "--config", "job.yaml"),
        *("--model.optimizer.lr", "0.5"),
    )
    # The checkpoint says rank 4, sparsity 0.5, lr 0.01 and smoothing 0.2.
    assert config.model.adapter.rank == 16
    assert config.model.optimizer.init_args.lr == 0.5
    assert config.model.adapter.sparsity == 0.5
    assert config.model.label_smoothing == 0.2
    # What the checkpoint does not say is the config's.
    assert config.model.adapter.scale == 0.3
    assert config.model.adapter_file is None


def test_values_beat_configs_and_later_configs_beat_earlier_ones(here: Path, parsed: Any) -> None:
    (here / "mine.yaml").write_text("model:\n  warmup: 0.3\n  adapter:\n    sparsity: 0.4\n    rank: 6\n")
    config = parsed("fit", "--model.adapter.rank", "2", "--config", "vit.yaml", "--config", "mine.yaml")
    assert (config.model.adapter.rank, config.model.adapter.sparsity, config.model.warmup) == (2, 0.4, 0.3)


def test_callbacks_have_names_and_the_data_follow_the_backbone(parsed: Any) -> None:
    config = parsed(
        *("fit", "--config", "vit.yaml", "--checkpoint.save_top_k", "3", "--monitor.every_n_steps", "7"),
        *("--model.backbone", "test_vit"),
    )
    assert (config.checkpoint.save_top_k, config.monitor.every_n_steps) == (3, 7)
    assert config.data.backbone == "test_vit"


@pytest.mark.parametrize(
    ("message", "expected"),
    # Messages as jsonargparse 4.53 writes them.
    [
        (
            "Key 'model.bakbone' is not expected",
            "there is no config key 'model.bakbone'; did you mean 'model.backbone'?",
        ),
        (
            "unrecognized arguments: --trainer.max_epoch 3",
            "there is no config key 'trainer.max_epoch'; did you mean 'trainer.max_epochs'?",
        ),
        ("Key 'zzz.qqqqqq' is not expected", "there is no config key 'zzz.qqqqqq'"),
        (
            "Parser key \"data.batch_size\":\n  Expected a <class 'int'>. Got value: 1.5",
            "data.batch_size: expected int, not 1.5",
        ),
        (
            'Parser key "model.adapter":\n  Does not validate against any of the Union subtypes\n'
            "  Subtypes: [<class 'snell_lightning.adapters.config.SnellConfig'>, <class 'NoneType'>]\n"
            "  Errors:\n    - Parser key \"rank\":\n        Expected a <class 'int'>. Got value: many\n"
            "    - Expected a <class 'NoneType'>\n"
            "  Given value type: <class 'dict'>\n  Given value: {'rank': 'many'}",
            "model.adapter.rank: expected int, not many",
        ),
        (
            "Parser key \"data.augmentation\":\n  Expected a typing.Literal['crop', 'none']. Got value: heavy",
            "data.augmentation: expected one of 'crop', 'none', not heavy",
        ),
    ],
)
def test_what_jsonargparse_says_in_many_lines_becomes_one(message: str, expected: str) -> None:
    line = explain(message)
    assert "\n" not in line
    assert expected in line


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (FileNotFoundError(2, "No such file or directory", "a.jpg"), "No such file or directory: a.jpg"),
        (PermissionError(13, "Permission denied", "/runs"), "Permission denied: /runs"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError("two\nlines"), "two lines"),
        (UserError("rank must be\n a number"), "rank must be a number"),
        (MisconfigurationException("no such\ndevice"), "no such device"),
        (ConfigError("Key 'rnk' is not expected"), "there is no config key 'rnk'; did you mean 'model.adapter.rank'?"),
        (ValueError("a fault of ours"), None),
        (RuntimeError("a fault of ours"), None),
        (KeyError("a fault of ours"), None),
    ],
)
def test_a_users_mistake_is_one_line_and_a_fault_of_ours_is_none(error: Exception, expected: str | None) -> None:
    assert one_line(error) == expected


def test_too_little_memory_is_answered_with_what_to_change() -> None:
    line = one_line(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\n..."))
    assert line is not None
    assert "data.batch_size" in line
    assert "trainer.accumulate_grad_batches" in line
    assert "\n" not in line


def test_what_lightning_refuses_is_a_users_mistake() -> None:
    with pytest.raises(ValueError, match="abacus") as caught:
        Trainer(accelerator="abacus")
    line = one_line(caught.value)
    assert line is not None
    assert "abacus" in line


def test_the_line_says_which_process_it_is_of(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "no-such.yaml"])
    assert stop.value.code == 1
    assert capsys.readouterr().err.startswith("error [process 3]: there is no config file 'no-such.yaml'")


def test_for_debugging_the_error_itself_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SNELL_DEBUG", "1")
    with pytest.raises(UserError, match=r"no-such\.yaml"):
        main(["fit", "--config", "no-such.yaml"])


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("snell_lightning.cli.make_cli", fail)
    with pytest.raises(ZeroDivisionError):
        main(["fit"])


class TestHelp:
    """B6: a title and the dozen keys that matter first; all keys behind one more option."""

    @pytest.mark.parametrize("command", COMMANDS)
    def test_it_is_short_and_ends_with_the_way_to_all_keys(self, command: str, capsys: Any) -> None:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        lines = capsys.readouterr().out.splitlines()
        assert stop.value.code == 0
        assert lines[0] == TITLE
        assert len(lines) <= (34 if command == "predict" else 30)  # of which there are two
        assert max(map(len, lines)) <= 110
        if command != "merge":  # of which these are all
            assert lines[-1] == f"all keys: python -m snell_lightning {command} --help-all"

    @pytest.mark.parametrize("command", ["fit", "predict", "memory"])
    def test_every_key_in_it_is_one_and_all_keys_are_under_our_title(
        self, command: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit):
            main([command, "--help-all"])
        everything = capsys.readouterr().out
        assert COMMANDS[command] in everything
        assert "python -m snell_lightning" in everything
        keys = {name.split()[0] for name in KEYS[command]}
        assert len(keys) >= 8
        # Those of the adapter and of the optimizer are not spelled out there.
        nested = {key for key in keys if key.startswith(("--model.adapter.", "--model.optimizer."))}
        # What `--resume` means is settled before anything is parsed.
        assert {key for key in keys - nested if f"{key} " not in everything} <= {"--resume"}
        known = {*vars(SnellConfig()), "lr"}
        assert {key.rpartition(".")[2] for key in nested} <= known

    def test_without_a_command_the_commands_are_listed(self, capsys: Any) -> None:
        with pytest.raises(SystemExit):
            main(["--help"])
        printed = capsys.readouterr().out
        assert [name for name in COMMANDS if f"  {name} " in printed] == list(COMMANDS)


def test_a6_an_adapter_that_a_config_names_brings_its_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"model": {"adapter": {"rank": 4}}, "data": {"image_size": 48}}
    monkeypatch.setitem(command_line._SETTINGS_FROM, "--model.adapter_file", lambda path: {**settings, "path": path})
    (here / "job.yaml").write_text("model:\n  adapter_file: some.safetensors\n")
    for verb in ("fit", "test"):
        arranged = arrange_arguments([verb, "--config", "job.yaml"])
        assert arranged[:3] == [verb, "--config", "job.yaml"]
        assert json.loads(arranged[4]) == {**settings, "path": "some.safetensors"}
