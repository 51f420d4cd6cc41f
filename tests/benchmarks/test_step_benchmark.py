"""One step measured on a tiny model: what the result holds, and how variants are named."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import evaluation, step
from benchmarks.methods import READS, Backbone, Settings, adapted, build, make_model, parse_variants
from snell_lightning.adapters import UserError

CPU = torch.device("cpu")
TINY = Backbone("test_vit", classes=5, image_size=32)
ARGUMENTS = ["--backbone", "test_vit", "--image-size", "32", "--batch", "2", "--classes", "5", "--rank", "4",
             "--blocks", "2", "--device", "cpu"]  # fmt: skip


def one(text: str, **settings: Any) -> nn.Module:
    """The model of one variant."""
    (variant,) = parse_variants(text, Settings(rank=4, **settings))
    return make_model(variant, TINY, CPU)


def trained(model: nn.Module) -> set[str]:
    """Names of what is trained."""
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TestRun:
    def test_writes_times_and_bytes_of_every_variant(self, tmp_path: Path) -> None:
        output = tmp_path / "step.json"
        methods = "full,linear,snell,snell:sparsity=0.5,straightforward:dropout=0"

        step.run([*ARGUMENTS, "--methods", methods, "--steps", "2", "--no-rss", "--output", str(output)])

        result = json.loads(output.read_text())
        assert {"python", "torch", "timm", "peft"} <= result["environment"]["versions"].keys()
        assert {"device", "cpu", "threads", "commit", "dirty"} <= result["environment"].keys()
        assert result["arguments"]["rank"] == 4
        assert list(result["methods"]) == methods.split(",")
        for found in result["methods"].values():
            assert {name: len(times) for name, times in found["seconds"].items()} == dict.fromkeys(
                ["forward", "backward", "optimizer", "step"], 2
            )
            assert {"weights", "gradients", "optimizer", "kept", "saved"} <= found["bytes"].keys()
            assert found["bytes"]["peak"] == max(
                found["bytes"][f"peak_{phase}"] for phase in ("forward", "backward", "optimizer")
            )
            assert set(found["ratios"]) == {"full"}
        assert result["methods"]["full"]["ratios"]["full"] == {"step": 1.0, "kept": 1.0, "peak": 1.0}
        assert result["methods"]["snell"]["settings"]["sparsity"] == 0.9
        assert result["methods"]["snell:sparsity=0.5"]["settings"]["sparsity"] == 0.5

    def test_one_model_at_a_time_and_no_times(self, tmp_path: Path) -> None:
        output = tmp_path / "step.json"

        result = step.run(
            [*ARGUMENTS, "--methods", "full,snell", "--no-time", "--no-rss", "--one-at-a-time", "--output", str(output)]
        )

        assert not result["in_turns"]
        assert all("seconds" not in found and "bytes" in found for found in result["methods"].values())

    def test_the_resident_peak_is_that_of_a_process_of_its_own(self, tmp_path: Path) -> None:
        result = step.run([*ARGUMENTS, "--methods", "linear", "--no-time", "--output", str(tmp_path / "step.json")])

        found = result["methods"]["linear"]["bytes"]
        # A process with torch is larger than 50 MiB.
        assert found["rss"] >= found["rss_before"] > 50 * 2**20

    def test_full_tuning_has_gradients_and_two_moments_of_every_weight(self) -> None:
        (variant,) = parse_variants("full", Settings())
        subject = build(variant, TINY, batch=2, device=CPU)
        subject.step()

        counted = step.counted_step(subject)

        parameters = list(subject.model.parameters())
        weights = 4 * sum(parameter.numel() for parameter in parameters)
        assert counted["weights"] == counted["gradients"] == weights
        # AdamW: two moments and one step count of 4 bytes each.
        assert counted["optimizer"] == 2 * weights + 4 * len(parameters)
        assert counted["peak_optimizer"] >= 4 * weights
        # The logits and the loss apart, both ways of counting see the same tensors.
        assert counted["saved"] == pytest.approx(counted["kept"], abs=2000)

    @pytest.mark.parametrize("bad", ["snel", "snell:rnak=8", "full:rank=8", "lora:rank=many", "snell,snell", "full:"])
    def test_a_method_that_is_not_understood_is_one_line(self, bad: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit):
            step.run([*ARGUMENTS, "--methods", bad])

        assert "error:" in capsys.readouterr().err.splitlines()[-1]


class TestVariants:
    def test_settings_after_a_colon_beat_the_general_ones(self) -> None:
        first, second = parse_variants(
            "snell,snell:drop-path=0.1:rank=16:sparsifier=hard", Settings(rank=8, dropout=0.2)
        )

        assert first.read_settings()["rank"] == 8
        assert {name: second.read_settings()[name] for name in ("rank", "dropout", "drop_path", "sparsifier")} == {
            "rank": 16, "dropout": 0.2, "drop_path": 0.1, "sparsifier": "hard",
        }  # fmt: skip

    def test_levers_of_snell_leave_the_other_methods_alone(self) -> None:
        general = Settings(recompute="blocks", backbone_dtype="bfloat16", dropout=0.3)
        found = {variant.method: variant.settings for variant in parse_variants(",".join(READS), general)}

        assert (found["snell"].recompute, found["snell"].backbone_dtype) == ("blocks", "bfloat16")
        assert (found["full"].recompute, found["lora"].recompute) == ("none", "none")
        assert all("backbone_dtype" not in READS[method] for method in ("full", "linear", "lora", "straightforward"))
        assert found["straightforward"].dropout == 0.1


class TestMethods:
    def test_every_method_starts_from_the_same_backbone(self) -> None:
        full = dict(one("full").named_parameters())

        for method in ("linear", "snell", "straightforward"):
            own = dict(one(method).named_parameters())
            assert full.keys() <= own.keys()
            assert all(torch.equal(full[name], own[name]) for name in full)

    def test_straightforward_trains_as_many_parameters_as_snell_and_the_same_extras(self) -> None:
        snell, plain = one("snell"), one("straightforward")

        counts = [sum(p.numel() for p in model.parameters() if p.requires_grad) for model in (snell, plain)]
        assert counts[0] == counts[1]
        assert {"head.weight", "head.bias", "cls_token"} <= trained(snell) & trained(plain)

    def test_the_linear_probe_trains_the_head_alone(self) -> None:
        assert trained(one("linear")) == {"head.weight", "head.bias"}

    def test_lora_tunes_the_layers_that_snell_tunes_and_the_same_extras(self) -> None:
        pytest.importorskip("peft", reason="peft is in the extra bench")
        found = adapted(TINY)
        model = one("lora")

        names = {re.sub(r"^base_model\.model\.", "", name) for name in trained(model)}
        assert {re.sub(r"\.lora_[AB]\..*", "", name) for name in names if "lora_" in name} == found.slices.keys()
        assert {name for name in names if "lora_" not in name} == set(found.extras)
        assert set(found.extras) == {"cls_token", "head.weight", "head.bias"}

    def test_a_backbone_is_cut_to_its_first_blocks(self) -> None:
        model = Backbone("test_vit", image_size=32, blocks=2).create(CPU)

        assert len(model.blocks) == 2
        with pytest.raises(UserError, match="blocks"):
            Backbone("test_convnext", blocks=2).create(CPU)


def test_evaluation_compares_both_models_in_both_precisions(tmp_path: Path) -> None:
    output = tmp_path / "evaluation.json"

    evaluation.run(
        ["--backbone", "test_vit", "--image-size", "32", "--batch", "2", "--rounds", "2", "--blocks", "1",
         "--rank", "4", "--device", "cpu", "--output", str(output)]
    )  # fmt: skip

    result = json.loads(output.read_text())
    assert list(result["precisions"]) == ["fp32", "bf16-mixed"]
    for found in result["precisions"].values():
        assert {name: len(times) for name, times in found["seconds"].items()} == {"plain": 2, "snell": 2}
        assert found["throughput_ratio"] == pytest.approx(
            found["median_seconds"]["plain"] / found["median_seconds"]["snell"], rel=1e-3
        )
