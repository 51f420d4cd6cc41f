"""`python -m snell_lightning memory`: a plan that neither runs a step nor loads the backbone."""

from collections.abc import Callable

import pytest

from snell_lightning import cli


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command on a small ViT and return what it printed."""
    monkeypatch.setenv("COLUMNS", "100")
    tiny = ["--model.backbone", "test_vit", "--data.image_size", "32", "--model.backbone_args", '{"img_size": 32}']

    def run(*options: str) -> str:
        cli.make_cli(["memory", "--config", "vit.yaml", *tiny, *options])
        return capsys.readouterr().out

    return run


def test_prints_phases_and_batch_sizes_of_four_methods(plan: Callable[..., str]) -> None:
    printed = plan("--data.batch_size", "16")

    assert "test_vit, 32 x 32 px, 32-true, batch 16" in printed
    for word in (
        "SNELL-8",
        "full fine-tuning",
        "LoRA-8",
        "linear probe",
        "optimizer state",
        "kept for backward",
        "peak",
    ):
        assert word in printed
    assert "│   256 │" in printed


def test_answers_what_fits_a_budget_and_what_would_help(plan: Callable[..., str]) -> None:
    # Two blocks: the search over settings makes many plans.
    printed = plan("--budget", "100MiB", "--model.backbone_args", '{"img_size": 32, "depth": 2}')

    assert "Largest batch within 100 MiB: this config" in printed
    assert "What helps most is" in printed


def test_plans_a_job_for_gpus_on_a_machine_without(plan: Callable[..., str]) -> None:
    printed = plan("--trainer.accelerator", "gpu", "--trainer.devices", "8", "--trainer.precision", "16-mixed")

    assert "16-mixed" in printed


def test_downloads_nothing_and_leaves_no_files(
    plan: Callable[..., str], tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    # A backbone whose weights are on the hub, which cannot be reached here.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    plan("--model.backbone", "vit_tiny_patch16_224.augreg_in21k", "--model.adapter.targets", r"['blocks\.0\.']")

    assert list(tmp_path.iterdir()) == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("budget", ["8X", "-1GiB", "0", "lots"])
def test_a_budget_that_is_no_size_is_one_line(
    budget: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["memory", "--config", "vit.yaml", f"--budget={budget}"])

    assert stopped.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert budget in lines[-1]


def test_b1_an_image_size_that_the_backbone_cannot_take_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["memory", "--config", "vit.yaml", "--model.backbone", "test_vit", "--data.image_size", "37"])

    assert stopped.value.code == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith("error: backbone 'test_vit' does not take images of 37 x 37 pixels")


def test_b1_another_image_size_is_planned(plan: Callable[..., str]) -> None:
    backbone = ("--model.backbone", "vit_micro_patch4_32.mnist5k", "--model.backbone_args", '{"depth": 1}')
    assert "48 px" in plan(*backbone, "--data.image_size", "48")
