"""Adapter files: what comes back, what is refused, and that nothing is ever run or half written."""

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from snell_lightning.adapters import (
    SnellConfig,
    UserError,
    adapter_state_dict,
    deltas,
    fingerprint,
    heads,
    inject,
    load_adapter,
    read_adapter,
    save_adapter,
)

from .models import enlarge, large_config, make_images, make_model
from .reference import relative_error

BACKBONE = "deit_tiny_distilled_patch16_224"
CONFIG = large_config(rank_pattern={"qkv": 6}, sparsity_pattern={"fc1": 0.9})


def make_tuned(seed: int = 0) -> nn.Module:
    """A tuned model whose adapter, heads and class token differ from a fresh one's."""
    model = make_model("deit-distilled", seed)
    inject(model, CONFIG)
    enlarge(model)
    for head in heads(model).values():
        nn.init.normal_(head.weight)
    nn.init.normal_(model.cls_token)
    return model


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    """An adapter file and the model it was made from."""
    model = make_tuned()
    path = tmp_path / "adapter.safetensors"
    save_adapter(path, model, CONFIG, BACKBONE, classes=["a", "b", "c", "d", "e"], best={"val/acc1": 0.5})
    return path, model


def logits(model: nn.Module) -> Tensor:
    """Logits of the two fixed images."""
    with torch.no_grad():
        return model(make_images("deit-distilled"))


def rewrite(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], Any]) -> None:
    """Change the tensors or the metadata of a file."""
    tensors = load_file(path)
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata=metadata)


class TestRoundTrip:
    def test_a_plain_backbone_becomes_the_tuned_model(self, saved: tuple[Path, nn.Module]) -> None:
        path, tuned = saved
        plain = make_model("deit-distilled")
        assert relative_error(logits(plain), logits(tuned)) > 1e-2

        load_adapter(path, plain, BACKBONE)

        assert torch.equal(logits(plain), logits(tuned))
        assert {name: delta.sparsity for name, delta in deltas(plain).items()} == {
            name: delta.sparsity for name, delta in deltas(tuned).items()
        }

    def test_an_injected_backbone_becomes_the_tuned_model(self, saved: tuple[Path, nn.Module]) -> None:
        path, tuned = saved
        injected = make_model("deit-distilled")
        inject(injected, CONFIG)

        load_adapter(path, injected)

        assert torch.equal(logits(injected), logits(tuned))

    def test_the_file_holds_the_trained_tensors_alone(self, saved: tuple[Path, nn.Module]) -> None:
        path, tuned = saved

        tensors, _ = read_adapter(path)

        expected = adapter_state_dict(tuned)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], expected[name]) for name in expected)
        assert not any(name.endswith("qkv.weight") for name in tensors)

    def test_metadata_is_json_and_comes_back(self, saved: tuple[Path, nn.Module]) -> None:
        path, tuned = saved
        with safe_open(path, framework="pt") as file:
            raw = file.metadata()

        metadata = {key: json.loads(value) for key, value in raw.items()}

        assert metadata == read_adapter(path)[1] == load_adapter(path, make_model("deit-distilled"))
        assert metadata.keys() == {"format", "config", "backbone", "fingerprint", "classes", "best"}
        assert SnellConfig(**metadata["config"]) == CONFIG
        assert metadata["backbone"] == BACKBONE
        assert metadata["fingerprint"] == fingerprint(tuned)
        assert metadata["classes"] == ["a", "b", "c", "d", "e"]
        assert metadata["best"] == {"val/acc1": 0.5}

    def test_a_given_fingerprint_is_written_as_it_is(self, tmp_path: Path) -> None:
        save_adapter(tmp_path / "adapter", make_tuned(), CONFIG, BACKBONE, frozen="0123")

        assert read_adapter(tmp_path / "adapter")[1]["fingerprint"] == "0123"

    def test_the_folder_is_made(self, tmp_path: Path) -> None:
        path = tmp_path / "a" / "b" / "adapter.safetensors"

        save_adapter(path, make_tuned(), CONFIG, BACKBONE)

        assert [file.name for file in path.parent.iterdir()] == ["adapter.safetensors"]


class TestFingerprint:
    def test_training_leaves_it_alone(self) -> None:
        model = make_tuned()
        before = fingerprint(model)

        enlarge(model)
        nn.init.normal_(model.head.weight)

        assert fingerprint(model) == before

    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.blocks[1].mlp.fc2.weight.data[3, 2].add_(1e-6),
            lambda model: model.pos_embed.data.mul_(1.5),
            lambda model: model.blocks[0].norm1.register_buffer("further", torch.zeros(1)),
            lambda model: model.patch_embed.proj.bfloat16(),
        ],
        ids=["entry", "tensor", "name", "type"],
    )
    def test_any_change_of_a_frozen_tensor_changes_it(self, change: Callable[[nn.Module], Any]) -> None:
        model = make_tuned()
        before = fingerprint(model)

        change(model)

        assert fingerprint(model) != before

    def test_buffers_without_dimensions_are_covered(self) -> None:
        # BatchNorm counts its batches in such a buffer.
        model = nn.Sequential(nn.BatchNorm1d(3)).requires_grad_(False)
        before = fingerprint(model)

        model[0].num_batches_tracked.add_(1)

        assert fingerprint(model) != before


class TestRefusals:
    def test_another_backbone_is_named(self, saved: tuple[Path, nn.Module]) -> None:
        with pytest.raises(UserError, match=f"belongs to the backbone '{BACKBONE}', not to 'vit_tiny'"):
            load_adapter(saved[0], make_model("deit-distilled"), "vit_tiny")

    def test_other_frozen_weights_are_refused_and_nothing_is_copied(self, saved: tuple[Path, nn.Module]) -> None:
        other = make_model("deit-distilled", seed=1)
        head = other.head.weight.clone()

        with pytest.raises(UserError, match=r"was made on other frozen weights of .*same pretrained weights"):
            load_adapter(saved[0], other, BACKBONE)

        assert torch.equal(other.head.weight, head)

    def test_another_number_of_classes_is_named(self, saved: tuple[Path, nn.Module]) -> None:
        model = make_model("deit-distilled")
        model.reset_classifier(7)

        with pytest.raises(UserError, match=r"\(5, 48\) in the adapter and \(7, 48\) in the model"):
            load_adapter(saved[0], model, BACKBONE)

    def test_a_missing_tensor_is_named(self, saved: tuple[Path, nn.Module]) -> None:
        rewrite(saved[0], lambda tensors, _: tensors.pop("head.bias"))

        with pytest.raises(UserError, match=r"the adapter lacks head\.bias"):
            load_adapter(saved[0], make_model("deit-distilled"), BACKBONE)

    def test_an_unexpected_tensor_is_named(self, saved: tuple[Path, nn.Module]) -> None:
        rewrite(saved[0], lambda tensors, _: tensors.update(nonsense=torch.zeros(1)))

        with pytest.raises(UserError, match="the model has no place for nonsense"):
            load_adapter(saved[0], make_model("deit-distilled"), BACKBONE)

    def test_a_file_that_does_not_exist_is_named(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"there is no adapter file .*absent\.safetensors"):
            read_adapter(tmp_path / "absent.safetensors")
        with pytest.raises(UserError, match="there is no adapter file"):
            read_adapter(tmp_path)

    @pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
    def test_a_truncated_file_is_refused(self, saved: tuple[Path, nn.Module], share: float) -> None:
        path, _ = saved
        whole = path.read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])

        with pytest.raises(UserError, match=r"adapter\.safetensors is not an adapter file") as caught:
            read_adapter(path)

        assert len(str(caught.value).splitlines()) == 1

    @pytest.mark.parametrize("content", [b"hello, this is text\n" * 50, b"{}", b"\xff" * 100, b"PK\x03\x04" * 30])
    def test_a_file_of_another_kind_is_refused(self, tmp_path: Path, content: bytes) -> None:
        path = tmp_path / "adapter.safetensors"
        path.write_bytes(content)

        with pytest.raises(UserError, match="is not an adapter file"):
            read_adapter(path)

    @pytest.mark.parametrize("write", [lambda value, file: file.write(pickle.dumps(value)), torch.save])
    @pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.pt"])
    def test_a_pickle_is_refused_and_its_payload_does_not_run(
        self, tmp_path: Path, name: str, write: Callable[[Any, Any], Any]
    ) -> None:
        marker = tmp_path / "payload-ran"

        class Payload:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.mkdir, (str(marker),)

        path = tmp_path / name
        with path.open("wb") as file:
            write({"head.weight": Payload()}, file)
        pickle.loads(pickle.dumps(Payload()))
        assert marker.exists()  # The payload would run where something unpickles it.
        marker.rmdir()

        with pytest.raises(UserError, match="is not an adapter file"):
            load_adapter(path, make_model("deit-distilled"))

        assert not marker.exists()

    @pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"format": '"other/1"'}])
    def test_another_safetensors_file_is_refused(self, tmp_path: Path, metadata: dict[str, str] | None) -> None:
        path = tmp_path / "weights.safetensors"
        save_file({"head.weight": torch.zeros(2)}, path, metadata=metadata)

        with pytest.raises(UserError, match="is not an adapter file"):
            read_adapter(path)

    def test_metadata_that_lacks_a_value_is_refused_by_its_name(self, saved: tuple[Path, nn.Module]) -> None:
        rewrite(saved[0], lambda _, metadata: metadata.pop("fingerprint"))

        with pytest.raises(UserError, match="its metadata lacks fingerprint"):
            load_adapter(saved[0], make_model("deit-distilled"))


class TestWriting:
    @pytest.mark.parametrize("failing", ["write", "fsync", "replace"])
    def test_a_failing_write_leaves_the_good_file_and_no_other(
        self, saved: tuple[Path, nn.Module], monkeypatch: pytest.MonkeyPatch, failing: str
    ) -> None:
        path, tuned = saved
        good = path.read_bytes()
        write = Path.write_bytes

        def half_written(self: Path, data: bytes) -> None:
            write(self, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "no space left on device")

        def refused(*_: Any) -> None:
            assert path.read_bytes() == good
            raise OSError(errno.ENOSPC, "no space left on device")

        if failing == "write":
            monkeypatch.setattr(Path, "write_bytes", half_written)
        else:
            monkeypatch.setattr(os, failing, refused)

        with pytest.raises(OSError, match="no space left"):
            save_adapter(path, enlarge(tuned), CONFIG, BACKBONE)

        monkeypatch.undo()
        assert path.read_bytes() == good
        assert list(path.parent.iterdir()) == [path]
        save_adapter(path, enlarge(tuned), CONFIG, BACKBONE)
        assert path.read_bytes() != good
        assert torch.equal(read_adapter(path)[0]["cls_token"], tuned.cls_token)

    def test_whoever_may_read_other_files_may_read_an_adapter(self, saved: tuple[Path, nn.Module]) -> None:
        ordinary = saved[0].with_name("ordinary")
        ordinary.touch()
        assert saved[0].stat().st_mode == ordinary.stat().st_mode


def test_an_update_has_the_scale_that_it_was_tuned_with_whatever_is_seen_of_the_model(tmp_path: Path) -> None:
    config, path = SnellConfig(rank=4), tmp_path / "adapter.safetensors"
    tuned = timm.create_model("test_vit", num_classes=3)
    inject(tuned, config)
    enlarge(tuned)
    values = [f"blocks.{block}.attn.qkv.deltas.2" for block in range(len(tuned.blocks))]
    assert [name for name, delta in deltas(tuned).items() if delta.of_values] == values
    # As if attention had been written in a way that cannot be followed.
    for name in values:
        deltas(tuned)[name].of_values = False
    save_adapter(path, tuned, config, "test_vit")
    assert "value_updates" not in read_adapter(path)[1]
    other = timm.create_model("test_vit", num_classes=3)
    other.load_state_dict({name: tensor for name, tensor in tuned.state_dict().items() if "deltas" not in name})

    load_adapter(path, other)

    images = torch.randn(2, 3, 160, 160)
    assert torch.equal(other.eval()(images), tuned.eval()(images))
    deltas(tuned)[values[0]].of_values = True
    save_adapter(path, tuned, config, "test_vit")
    assert read_adapter(path)[1]["value_updates"] == values[:1]
    load_adapter(path, other)
    assert torch.equal(other(images), tuned(images))
