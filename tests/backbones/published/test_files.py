"""Sizes, folders, and files that are refused: nothing in them is run, and the model stays as it was."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from snell_lightning.adapters import UserError
from snell_lightning.backbones.published import load_weights
from tests.backbones.published.models import SWIN, VIT, features, images, lively, made


class TestSizes:
    def test_position_embeddings_are_resampled_as_timm_does_it(self, tmp_path: Path) -> None:
        source = lively(made("vit_base_patch16_224", **VIT))
        torch.save(source.state_dict(), tmp_path / "w.pth")
        larger = {**VIT, "img_size": 48}
        model, second = made("vit_base_patch16_224", **larger), made("vit_base_patch16_224", **VIT)

        loaded = load_weights(model, tmp_path / "w.pth", "vit_base_patch16_224")

        second.load_state_dict(source.state_dict())
        second.set_input_size((48, 48))
        assert loaded.changed == ("pos_embed",)
        assert torch.allclose(features(model, images(48)), features(second, images(48)), atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_weights_in_half_precision(self, dtype: torch.dtype, tmp_path: Path) -> None:
        source = lively(made("vit_base_patch16_224", **VIT)).to(dtype).float()
        save_file({name: tensor.to(dtype) for name, tensor in source.state_dict().items()}, tmp_path / "w")
        model = made("vit_base_patch16_224", **{**VIT, "img_size": 48})

        load_weights(model, tmp_path / "w", "vit_base_patch16_224")

        source.set_input_size((48, 48))
        assert torch.allclose(features(model, images(48)), features(source, images(48)), atol=1e-5)

    def test_window_tables_are_resampled_as_timm_does_it(self, tmp_path: Path) -> None:
        source = lively(made("swin_tiny_patch4_window7_224", **SWIN))
        torch.save(source.state_dict(), tmp_path / "w.pth")
        model = made("swin_tiny_patch4_window7_224", **{**SWIN, "window_size": 4})
        source.set_input_size(window_size=4)

        loaded = load_weights(model, tmp_path / "w.pth", "swin_tiny_patch4_window7_224")

        assert {name.rpartition(".")[2] for name in loaded.changed} == {"relative_position_bias_table"}
        assert torch.allclose(features(model, images(64)), features(source, images(64)), atol=1e-5)


class TestFolders:
    def test_parts_of_a_model(self, tmp_path: Path) -> None:
        source, model = lively(made("vit_base_patch16_224", **VIT)), made("vit_base_patch16_224", **VIT)
        state = source.state_dict()
        places = {name: f"model-{number % 2 + 1:05}-of-00002.safetensors" for number, name in enumerate(state)}
        for part in set(places.values()):
            save_file({name: tensor for name, tensor in state.items() if places[name] == part}, tmp_path / part)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))

        load_weights(model, tmp_path, "vit_base_patch16_224")

        assert torch.equal(features(model, images()), features(source, images()))
        next(tmp_path.glob("model-00002*")).unlink()
        with pytest.raises(UserError, match=r"names model-00002-of-00002.safetensors, which is not beside it"):
            load_weights(model, tmp_path, "vit_base_patch16_224")

    def test_what_is_not_clear_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="has no file of weights; name the file"):
            load_weights(made("resnet18"), tmp_path, "resnet18")
        for name in ("a.pth", "b.pth"):
            torch.save({}, tmp_path / name)
        with pytest.raises(UserError, match=r"several files of weights \(a.pth, b.pth\); name the file"):
            load_weights(made("resnet18"), tmp_path, "resnet18")
        with pytest.raises(UserError, match="there is no file"):
            load_weights(made("resnet18"), tmp_path / "c.pth", "resnet18")


class Harm:
    """What an attacker puts into a file."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class TestRefusals:
    @pytest.fixture
    def state(self) -> dict[str, Tensor]:
        return dict(made("vit_base_patch16_224", **VIT).state_dict())

    def refused(self, content: Any, path: Path, message: str, **arguments: Any) -> None:
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        model = made("vit_base_patch16_224", **{**VIT, **arguments})
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(UserError, match=message) as caught:
            load_weights(model, path, "vit_base_patch16_224")
        assert len(str(caught.value).splitlines()) == 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_a_tensor_that_is_missing_is_named(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        del state["blocks.1.mlp.fc2.bias"]
        self.refused(state, tmp_path / "w", r"leaves 1 of the 32 tensors .* unset: blocks.1.mlp.fc2.bias")

    def test_another_width_is_named(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        self.refused(state, tmp_path / "w", r"is \(.*\) in the file and \(.*\) in the model", embed_dim=24)

    def test_values_that_are_no_numbers_are_named(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        state["blocks.1.mlp.fc2.bias"][3] = torch.nan
        self.refused(state, tmp_path / "w", r"no numbers, in blocks.1.mlp.fc2.bias; it is damaged")

    def test_a_deeper_file_is_not_cut(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        self.refused(state, tmp_path / "w", r"larger model than .*has no blocks.1.attn", depth=1)

    def test_a_shallower_one_is_not_enough(self, state: dict[str, Tensor], tmp_path: Path) -> None:
        self.refused(state, tmp_path / "w", r"unset: blocks.2.attn", depth=3)

    def test_another_kind_of_model(self, tmp_path: Path) -> None:
        self.refused(timm.create_model("resnet18").state_dict(), tmp_path / "w", r"has no tensors of .*bn1.bias")

    def test_nothing(self, tmp_path: Path) -> None:
        self.refused({"epoch": 3}, tmp_path / "w", r"has no tensors of 'vit_base_patch16_224'$")

    def test_code_in_a_file_is_not_run(self, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)
        source = lively(made("vit_base_patch16_224", **VIT))
        torch.save({"model": source.state_dict(), "extra": Harm(shutil.copyfile, "w", "harmed")}, "w")
        model = made("vit_base_patch16_224", **VIT)

        load_weights(model, "w", "vit_base_patch16_224")

        assert not Path("harmed").exists()
        assert torch.equal(features(model, images()), features(source, images()))

    @pytest.mark.parametrize("harm", [Harm(os.mkdir, "harmed"), Harm(Path.touch, Path("harmed"))])
    def test_code_that_nothing_can_stand_for_is_refused(self, harm: Harm, tmp_path: Path, monkeypatch: Any) -> None:
        monkeypatch.chdir(tmp_path)

        self.refused({"extra": harm}, Path("w"), "cannot be read without running code that it names")

        assert not Path("harmed").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "Git LFS pointer"),
            (b"<html>not found</html>", "is no file of weights; expected a safetensors file"),
            (b"", "is no file of weights"),
            (b"\x80\x02}q\x00.", "damaged, or no PyTorch file"),
            (b"PK\x03\x04 cut off", "is damaged"),
            ((3000).to_bytes(8, "little") + b"{" + bytes(4000), "is damaged"),
        ],
    )
    def test_files_of_other_kinds(self, content: bytes, message: str, tmp_path: Path) -> None:
        self.refused(content, tmp_path / "w", message)

    def test_a_program(self, tmp_path: Path) -> None:
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), tmp_path / "w.pt")
        self.refused(None, tmp_path / "w.pt", "TorchScript program, which would have to be run")

    def test_objects_among_arrays(self, tmp_path: Path) -> None:
        np.savez(tmp_path / "w.npz", a=np.array([Harm(os.mkdir, "harmed")], dtype=object))
        self.refused(None, tmp_path / "w.npz", "something else than arrays")
