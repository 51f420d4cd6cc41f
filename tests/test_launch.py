"""What started the processes: counts are taken over where they are open, and must agree where they are not."""

from datetime import timedelta
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

from snell_lightning import UserError
from snell_lightning.launch import Launch, adopt, launched, require_agreement, untried, work_together

TORCHRUN = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"}
FOUR = Launch("torchrun", 2, 2)
SLURM = {"SLURM_NTASKS": "4", "SLURM_NNODES": "2", "SLURM_JOB_NAME": "fit"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, Launch("torchrun", 2, 2)),
        ({**TORCHRUN, "WORLD_SIZE": "2"}, Launch("torchrun", 1, 2)),
        (SLURM, Launch("SLURM", 2, 2)),
        ({"SLURM_NTASKS": "2", "SLURM_JOB_NAME": "fit"}, Launch("SLURM", 1, 2)),
        # A shell in an allocation: no task was started.
        ({**SLURM, "SLURM_JOB_NAME": "interactive"}, None),
        # torchrun that may start processes again, in a store that is new each time.
        ({**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "False"}, FOUR),
        # torchrun in an allocation.
        ({**SLURM, **TORCHRUN}, Launch("torchrun", 2, 2)),
    ],
)
def test_what_the_environment_says(environment: dict[str, str], expected: Launch | None) -> None:
    assert launched(environment) == expected


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({**SLURM, "SLURM_NTASKS": "3"}, "ask for as many on each"),
        ({**TORCHRUN, "WORLD_SIZE": "3"}, "start as many on each machine"),
        (
            {**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"},
            "put TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 into its environment",
        ),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "install it, or start with torchrun"),
    ],
)
def test_processes_that_cannot_work_together_are_refused(environment: dict[str, str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        launched(environment)


@pytest.mark.parametrize(
    ("settings", "adopted"),
    [
        ({}, {"num_nodes": 2, "devices": 2, "strategy": "ddp"}),
        ({"devices": "auto", "strategy": "auto"}, {"num_nodes": 2, "devices": 2, "strategy": "ddp"}),
        ({"devices": 2, "num_nodes": 2, "strategy": "ddp"}, {}),
        ({"devices": [0, 1], "strategy": "fsdp"}, {"num_nodes": 2}),
        ({"devices": "0,1", "num_nodes": 1}, {"num_nodes": 2, "strategy": "ddp"}),
    ],
)
def test_open_counts_are_taken_over(settings: dict[str, Any], adopted: dict[str, Any]) -> None:
    before = dict(settings)
    line = adopt(settings, Launch("torchrun", 2, 2))
    assert settings == {**before, **adopted}
    if adopted:
        assert line is not None
        assert line.startswith("torchrun started 4 processes, 2 on each of 2 machines: trainer.num_nodes 2")
    else:
        assert line is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"devices": 1}, "and trainer.devices is 1; leave it out, or start 1 process on each machine"),
        ({"devices": "3"}, "and trainer.devices is 3; leave it out, or start 3 processes on each machine"),
        ({"num_nodes": 4}, "and trainer.num_nodes is 4; leave it out, or start on 4 machines"),
    ],
)
def test_other_counts_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        adopt(settings, Launch("SLURM", 2, 2))


def test_d13_two_machines_in_a_config_and_one_in_fact_are_refused() -> None:
    with pytest.raises(UserError, match="torchrun started 2 processes on one machine, and"):
        adopt({"num_nodes": 2}, Launch("torchrun", 1, 2))


def test_machines_that_cannot_find_each_other_are_refused() -> None:
    settings: dict[str, Any] = {"num_nodes": 2}
    with pytest.raises(UserError, match="nothing says where the other machines are"):
        adopt(settings, None, {"MASTER_ADDR": "a"})
    assert adopt(settings, None, {"MASTER_ADDR": "a", "NODE_RANK": "1"}) is None
    assert adopt({"num_nodes": 1}, None, {}) is None


def test_d4_processes_that_see_one_device_each_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    with pytest.raises(UserError, match="this one sees 1 device"):
        adopt({}, Launch("SLURM", 1, 2))
    # On the CPU that does not matter.
    adopt({"accelerator": "cpu"}, Launch("SLURM", 1, 2))


@pytest.mark.parametrize("strategy", [None, "auto", "ddp", "ddp_spawn", {"class_path": "a.DDPStrategy"}])
def test_strategies_that_are_tested_pass(strategy: Any) -> None:
    assert untried(strategy) is None


def test_strategies_that_nobody_has_tried_are_told_of() -> None:
    assert "fsdp has not been tried" in (untried("fsdp") or "")
    assert "DeepSpeedStrategy has not been tried" in (untried({"class_path": "a.DeepSpeedStrategy"}) or "")
    with pytest.raises(UserError, match="use ddp"):
        untried({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"})


def test_what_is_said_of_the_strategy_itself_holds() -> None:
    strategy = DDPStrategy(timeout=timedelta(seconds=5), gradient_as_bucket_view=False)
    work_together(strategy, 60)
    assert strategy._timeout == timedelta(seconds=5)
    assert strategy._ddp_kwargs["gradient_as_bucket_view"] is False
    strategy = DDPStrategy()
    work_together(strategy, 60)
    assert strategy._timeout == timedelta(seconds=60)
    assert strategy._ddp_kwargs["gradient_as_bucket_view"] is True


def test_one_process_is_as_without_a_launcher() -> None:
    settings: dict[str, Any] = {}
    assert adopt(settings, Launch("torchrun", 1, 1)) is None
    assert "strategy" not in settings


def test_a_trainer_that_knows_of_fewer_processes_is_refused() -> None:
    require_agreement(2, {"WORLD_SIZE": "2"})
    require_agreement(2, {})
    with pytest.raises(UserError, match="there are 2 processes"):
        require_agreement(1, {"WORLD_SIZE": "2"})
