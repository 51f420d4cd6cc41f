"""Creating backbones: the embedded one, those of timm, and what is said when that cannot be done."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_model

from snell_lightning.adapters import UserError, inject
from snell_lightning.adapters.config import SnellConfig
from snell_lightning.backbones import EMBEDDED_BACKBONE, create_backbone, data_config
from snell_lightning.backbones.embedded import EMBEDDED_WEIGHTS

RECORD = Path(__file__).parents[2] / "benchmarks" / "results" / "pretrain_embedded.json"


class TestEmbedded:
    def test_it_has_its_pretrained_weights_and_a_fresh_head(self) -> None:
        weights = load_file(EMBEDDED_WEIGHTS)

        model = create_backbone(EMBEDDED_BACKBONE, num_classes=7)

        state = model.state_dict()
        assert state["head.weight"].shape == (7, 144)
        for name, tensor in state.items():
            if not name.startswith("head."):
                assert torch.equal(tensor, weights[name].to(tensor.dtype)), name

    def test_it_keeps_its_own_head_for_its_own_classes(self) -> None:
        weights = load_file(EMBEDDED_WEIGHTS)

        model = create_backbone(EMBEDDED_BACKBONE, num_classes=10)

        assert torch.equal(model.head.weight, weights["head.weight"].float())

    def test_random_weights_are_given_where_asked_for(self) -> None:
        weights = load_file(EMBEDDED_WEIGHTS)

        model = create_backbone(EMBEDDED_BACKBONE, num_classes=10, pretrained=False)

        assert not torch.equal(model.patch_embed.proj.weight, weights["patch_embed.proj.weight"].float())

    def test_its_file_is_small_and_the_recorded_one(self) -> None:
        content = EMBEDDED_WEIGHTS.read_bytes()
        record = json.loads(RECORD.read_text())

        # 3 MB: what the package may grow by for a first run without any download.
        assert len(content) <= 3_000_000
        assert record["backbone"] == EMBEDDED_BACKBONE
        assert record["bytes"] == len(content)
        assert record["sha256"] == hashlib.sha256(content).hexdigest()

    def test_it_can_be_adapted(self) -> None:
        model = create_backbone(EMBEDDED_BACKBONE, num_classes=3)

        names = inject(model, SnellConfig(rank=4))

        assert len(names) == 16  # 4 blocks of qkv, proj, fc1 and fc2
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3)

    def test_timm_knows_it(self) -> None:
        assert EMBEDDED_BACKBONE in timm.list_pretrained("vit_micro*")

    def test_arguments_reach_the_model(self) -> None:
        model = create_backbone(EMBEDDED_BACKBONE, num_classes=3, drop_path_rate=0.2)

        # timm spreads stochastic depth linearly over the blocks, up to the given rate.
        assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)


class TestMistakes:
    @pytest.mark.parametrize(
        ("name", "message"),
        [
            (
                "vit_bas_patch16_224",
                "there is no backbone 'vit_bas_patch16_224' in timm; did you mean .*vit_base_patch16_224",
            ),
            ("swin_tinny_patch4_window7_224", "did you mean .*swin_tiny_patch4_window7_224"),
            ("vit_micro_patch4_23", "did you mean .*vit_micro_patch4_32"),
            ("qqqqqqqqqqqq", "there is no backbone 'qqqqqqqqqqqq' in timm"),
            (
                "test_vit.no_such_tag",
                r"'test_vit.no_such_tag' has no such pretrained tag; timm has test_vit\.",
            ),
        ],
    )
    @pytest.mark.parametrize("pretrained", [True, False])
    def test_an_unknown_name_is_answered_with_the_nearest(self, name: str, message: str, pretrained: bool) -> None:
        with pytest.raises(UserError, match=message) as caught:
            create_backbone(name, num_classes=3, pretrained=pretrained)
        assert len(str(caught.value).splitlines()) == 1

        with pytest.raises(UserError, match=message):
            data_config(name)

    def test_a_model_without_pretrained_weights_is_never_given_at_random(self) -> None:
        without = next(name for name in timm.list_models("vit_*") if not timm.is_model_pretrained(name))

        with pytest.raises(UserError, match=f"'{without}' has no pretrained weights in timm.*pretrained: false"):
            create_backbone(without, num_classes=3)

    def test_a_model_without_pretrained_weights_is_created_where_random_ones_are_asked_for(self) -> None:
        model = create_backbone("test_vit", num_classes=3, pretrained=False, img_size=32)

        assert model(torch.randn(1, 3, 32, 32)).shape == (1, 3)

    def test_an_argument_that_the_model_does_not_take_is_named(self) -> None:
        with pytest.raises(UserError, match=r"does not take these arguments.*nonsense"):
            create_backbone(EMBEDDED_BACKBONE, num_classes=3, nonsense=1)

    def test_a_hub_that_cannot_be_reached_names_the_offline_choices(self, tmp_path: Path) -> None:
        names = ["vit_tiny_patch16_224.augreg_in21k_ft_in1k", "hf-hub:timm/vit_tiny_patch16_224.augreg_in21k"]
        code = (
            "from snell_lightning.adapters import UserError\n"
            "from snell_lightning.backbones import create_backbone\n"
            f"for name in {names}:\n"
            "    try:\n"
            "        create_backbone(name, 3)\n"
            "    except UserError as error:\n"
            "        print(error)\n"
        )
        # Variables of the hub's client, read when it is imported: nothing but an (empty) cache may be used.
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(tmp_path),
            "TORCH_HOME": str(tmp_path),
        }

        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)

        for name, line in zip(names, done.stdout.splitlines(), strict=True):
            assert name in line
            for choice in ("offline choices", EMBEDDED_BACKBONE, "local-dir:PATH", "HF_HOME"):
                assert choice in line


class TestLocalFolder:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        """A checkpoint folder as timm writes it."""
        model = timm.create_model("test_vit", num_classes=5, img_size=32)
        save_model(model, str(tmp_path / "model.safetensors"))
        config = {
            "architecture": "test_vit",
            "num_classes": 5,
            "model_args": {"img_size": 32},
            "pretrained_cfg": {
                "input_size": [3, 32, 32],
                "mean": [0.1, 0.2, 0.3],
                "std": [0.4, 0.5, 0.6],
                "interpolation": "bilinear",
                "crop_pct": 0.9,
                "num_classes": 5,
                "first_conv": "patch_embed.proj",
                "classifier": "head",
            },
        }
        (tmp_path / "config.json").write_text(json.dumps(config))
        return tmp_path

    def test_its_weights_are_loaded_under_a_fresh_head(self, folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")

        model = create_backbone(f"local-dir:{folder}", num_classes=3)

        assert torch.equal(model.blocks[0].attn.qkv.weight, weights["blocks.0.attn.qkv.weight"])
        assert model.head.weight.shape[0] == 3

    def test_its_image_settings_are_read(self, folder: Path) -> None:
        assert data_config(f"local-dir:{folder}") == {
            "input_size": (3, 32, 32),
            "mean": (0.1, 0.2, 0.3),
            "std": (0.4, 0.5, 0.6),
            "interpolation": "bilinear",
            "crop_pct": 0.9,
        }

    def test_a_folder_without_a_checkpoint_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=f"'local-dir:{tmp_path}' cannot be read.*offline choices"):
            create_backbone(f"local-dir:{tmp_path}", num_classes=3)


class TestDataConfig:
    def test_the_embedded_backbone_takes_small_images(self) -> None:
        assert data_config(EMBEDDED_BACKBONE) == {
            "input_size": (3, 32, 32),
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
        }

    def test_it_is_timms_own_description_of_the_tag(self) -> None:
        # From timm's model cards: the augreg models are normalised with 0.5, the DeiT ones with ImageNet's
        # figures.
        assert data_config("vit_base_patch16_224.augreg_in21k")["mean"] == (0.5, 0.5, 0.5)
        assert data_config("deit_base_patch16_224.fb_in1k")["mean"] == (0.485, 0.456, 0.406)
        assert data_config("vit_base_patch16_384")["input_size"] == (3, 384, 384)
