"""Injecting adapters into models, merging them, and what is trained in between."""

import re

import pytest
import torch
from torch import Tensor, nn

from snell_lightning.adapters import (
    AdapterModule,
    SnellConfig,
    SnellDelta,
    SnellLinear,
    UserError,
    adapter_parameters,
    adapter_state_dict,
    deltas,
    heads,
    inject,
    load_adapter_state_dict,
    merge,
)

from .models import FAMILIES, enlarge, large_config, make_images, make_model
from .reference import relative_error

every_family = pytest.mark.parametrize("family", FAMILIES)


def raises_one_line(pattern: str) -> "pytest.RaisesExc[UserError]":
    """A `UserError` whose text is a single line that contains the pattern."""
    return pytest.raises(
        UserError,
        match=pattern,
        check=lambda error: len(str(error).splitlines()) == 1 and str(error).strip() != "",
    )


def plain_perceptron() -> nn.Module:
    """A model that is none of timm's: two blocks and a head without any description."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
    return nn.ModuleDict({"blocks": blocks, "last": nn.Linear(8, 3)})


class TestMerge:
    @every_family
    def test_merged_model_is_the_plain_model_with_the_updates_added(self, family: str) -> None:
        model, images = make_model(family), make_images(family)
        plain_keys = list(model.state_dict())
        with torch.no_grad():
            untouched = model(images)
        names = inject(model, large_config())
        enlarge(model)
        assert [key for key in model.state_dict() if ".deltas." not in key] == plain_keys
        before = {name: model.get_submodule(name).weight.clone() for name in names}
        updates = {
            name: torch.cat([delta.weight().detach() for delta in model.get_submodule(name).deltas]) for name in names
        }
        with torch.no_grad():
            tuned = model(images)

        assert merge(model) is model

        with torch.no_grad():
            merged = model(images)
        assert relative_error(tuned, untouched) > 1e-2
        assert relative_error(merged, tuned) < 1e-5
        assert list(model.state_dict()) == plain_keys
        assert not any(isinstance(module, (SnellLinear, SnellDelta)) for module in model.modules())
        for name in names:
            weight = model.get_submodule(name).weight
            assert torch.equal(weight, before[name] + updates[name].view_as(weight))

    @every_family
    def test_merging_twice_changes_nothing(self, family: str) -> None:
        model = make_model(family)
        inject(model, large_config())
        once = {name: tensor.clone() for name, tensor in merge(enlarge(model)).state_dict().items()}

        twice = merge(model).state_dict()

        assert once.keys() == twice.keys()
        assert all(torch.equal(once[name], twice[name]) for name in once)

    @every_family
    def test_the_merged_state_dict_loads_into_a_plain_model(self, family: str) -> None:
        model, images = make_model(family), make_images(family)
        inject(model, large_config())
        merge(enlarge(model))
        plain = make_model(family, seed=7)

        plain.load_state_dict(model.state_dict(), strict=True)

        with torch.no_grad():
            assert torch.equal(plain(images), model(images))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_model_of_low_precision_merges_into_an_fp32_model_that_runs(self, dtype: torch.dtype) -> None:
        model, images = make_model("vit").to(dtype), make_images("vit")
        inject(model, large_config())
        with torch.no_grad():
            tuned = enlarge(model)(images.to(dtype))

            merged = merge(model)(images)

        assert tuned.dtype == dtype
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        # bf16 has 8 bits, and errors of 0.4 % at each of some 30 roundings in a row add up.
        assert relative_error(tuned.float(), merged) < 0.05

    @pytest.mark.parametrize("family", ["beit", "eva02", "swinv2"])
    def test_attention_that_reads_the_fused_weight_calls_the_layer_while_it_is_tuned(self, family: str) -> None:
        # timm's attention with separate q and v biases uses `qkv.weight` itself unless this attribute is set.
        model = make_model(family)
        parents = [module for module in model.modules() if hasattr(module, "qkv_bias_separate")]
        assert parents
        assert not any(parent.qkv_bias_separate for parent in parents)

        inject(model, SnellConfig(rank=4))
        assert all(parent.qkv_bias_separate for parent in parents)

        merge(model)
        assert not any(parent.qkv_bias_separate for parent in parents)

    def test_a_merged_model_can_be_adapted_again(self) -> None:
        model, images = make_model("vit"), make_images("vit")
        names = inject(model, large_config())
        with torch.no_grad():
            merged = merge(enlarge(model))(images)
            again = inject(model, large_config(sparsifier="magnitude", scale=1e-4))

            assert again == names
            assert relative_error(model(images), merged) < 1e-5

    def test_a_layer_given_as_the_model_itself_comes_back_plain(self) -> None:
        layer = SnellLinear(nn.Linear(8, 6), large_config())
        x = torch.randn(3, 8)
        expected = layer(x)

        plain = merge(layer)

        assert type(plain) is nn.Linear
        torch.testing.assert_close(plain(x), expected)

    def test_a_layer_used_in_two_places_is_adapted_once_and_merged_once(self) -> None:
        shared = nn.Linear(8, 8)
        model = nn.Sequential(nn.ModuleDict({"0": shared}), nn.ModuleDict({"0": shared}))
        before = shared.weight.clone()

        inject(model, large_config(targets=["0"]))

        assert model[0]["0"] is model[1]["0"]
        assert len(deltas(model)) == 1
        update = deltas(enlarge(model)).popitem()[1].weight().detach()
        merge(model)
        assert model[0]["0"] is model[1]["0"]
        assert torch.equal(model[0]["0"].weight, before + update)


class TestWhatIsAdapted:
    @every_family
    def test_the_linear_layers_of_the_blocks_are_adapted_and_nothing_else(self, family: str) -> None:
        expected = FAMILIES[family]
        model = make_model(family)

        names = inject(model, SnellConfig(rank=4))

        assert [name for name in names if name.startswith(expected.block)] == [
            expected.block + layer for layer in expected.layers
        ]
        assert len(names) == len(set(names)) == expected.count
        assert [name for name, module in model.named_modules() if isinstance(module, SnellLinear)] == names
        assert list(heads(model)) == expected.heads
        for name in [*expected.left_alone, *expected.heads]:
            assert type(model.get_submodule(name)) in (nn.Linear, nn.Conv2d)

    @every_family
    def test_fused_projections_have_an_update_each(self, family: str) -> None:
        model = make_model(family)

        for name in inject(model, SnellConfig(rank=4)):
            layer = model.get_submodule(name)
            # EVA-02's MLP holds the gate and its values in one layer.
            slices = 3 if name.endswith(".qkv") else 2 if family == "eva02" and name.endswith(".fc1") else 1
            assert len(layer.deltas) == slices
            assert all(delta.out_features == layer.out_features // slices for delta in layer.deltas)
            assert all(delta.in_features == layer.in_features for delta in layer.deltas)

    @every_family
    def test_adapter_head_and_class_token_are_trained_and_the_rest_is_frozen(self, family: str) -> None:
        model = make_model(family)
        plain_names = {name for name, _ in model.named_parameters()}
        expected = {name for name in plain_names if name.rpartition(".")[0] in FAMILIES[family].heads}
        # ViT families have a class token of their own; the others pool.
        expected |= {"cls_token"} if family in {"vit", "deit-distilled", "beit"} or "eva" in family else set()

        inject(model, SnellConfig(rank=4))

        factors = {name for name, _ in adapter_parameters(model)}
        assert factors == {f"{name}.{side}_factors" for name in deltas(model) for side in ("in", "out")}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == expected | factors
        assert adapter_state_dict(model).keys() == trained

    @every_family
    def test_every_trained_parameter_gets_a_gradient_and_no_other(self, family: str) -> None:
        model, images = make_model(family), make_images(family)
        inject(model, large_config())

        enlarge(model)(images).square().sum().backward()

        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, name
                assert parameter.grad.isfinite().all(), name
                assert parameter.grad.any(), name
            else:
                assert parameter.grad is None, name

    def test_an_update_says_which_parameters_are_the_adapters(self) -> None:
        delta = SnellDelta(8, 6, SnellConfig(rank=4))

        assert isinstance(delta, AdapterModule)
        assert set(delta.adapter_params()) == {"in_factors", "out_factors"}
        assert not isinstance(nn.Linear(8, 6), AdapterModule)

    def test_a_model_without_timms_description_has_no_head(self) -> None:
        model = plain_perceptron()

        names = inject(model, SnellConfig(rank=4, train_also=["^last"]))

        assert heads(model) == {}
        assert names == ["blocks.0.0", "blocks.1.0"]
        assert {name for name in adapter_state_dict(model) if "factors" not in name} == {
            "last.weight",
            "last.bias",
        }

    def test_updates_live_where_the_layer_does(self) -> None:
        model = plain_perceptron().to("meta")

        inject(model, SnellConfig(rank=4))

        assert all(parameter.device.type == "meta" for parameter in model.parameters())


class TestPatterns:
    def test_targets_select_layers(self) -> None:
        assert inject(make_model("vit"), SnellConfig(rank=4, targets=[r"blocks\.[01]\.attn\.proj", "5.mlp"])) == [
            "blocks.0.attn.proj",
            "blocks.1.attn.proj",
            "blocks.5.mlp.fc1",
            "blocks.5.mlp.fc2",
        ]

    def test_targets_reach_layers_outside_blocks(self) -> None:
        names = inject(make_model("swin"), SnellConfig(rank=4, targets=["downsample"]))

        assert names == ["layers.1.downsample.reduction"]

    def test_targets_never_adapt_the_head(self) -> None:
        model = make_model("vit")

        assert inject(model, SnellConfig(rank=4, targets=["head|fc1"])) == [f"blocks.{i}.mlp.fc1" for i in range(6)]
        assert type(model.head) is nn.Linear

    def test_exclude_leaves_layers_alone(self) -> None:
        names = inject(make_model("vit"), SnellConfig(rank=4, exclude=["attn", r"blocks\.[0-4]\."]))

        assert names == ["blocks.5.mlp.fc1", "blocks.5.mlp.fc2"]

    def test_exclude_beats_targets(self) -> None:
        names = inject(make_model("vit"), SnellConfig(rank=4, targets=["blocks.0"], exclude=["mlp", "qkv"]))

        assert names == ["blocks.0.attn.proj"]

    def test_patterns_set_rank_sparsity_and_dropout_by_layer(self) -> None:
        model = make_model("vit")
        config = SnellConfig(
            rank=4,
            sparsity=0.5,
            rank_pattern={"qkv": 8, r"\.attn\.": 6},
            sparsity_pattern={r"blocks\.0\.": 0.9},
            dropout_pattern={"fc1$": 0.1},
        )

        inject(model, config)

        # Of several matching patterns the first counts: qkv is a part of attn.
        ranks = {"attn.qkv": 8, "attn.proj": 6, "mlp.fc1": 4, "mlp.fc2": 4}
        for block in (0, 1):
            for local, rank in ranks.items():
                layer = model.get_submodule(f"blocks.{block}.{local}")
                for delta in layer.deltas:
                    assert delta.in_factors.shape[0] * delta.in_factors.shape[2] == rank
                    assert delta.sparsity == (0.9 if block == 0 else 0.5)
                assert layer.config.dropout == (0.1 if local == "mlp.fc1" else 0.0)

    def test_train_also_replaces_the_default(self) -> None:
        model = make_model("vit")

        inject(model, SnellConfig(rank=4, train_also=["pos_embed", r"blocks\.0\.norm1"]))

        others = {name for name in adapter_state_dict(model) if "factors" not in name}
        assert others == {
            "pos_embed",
            "blocks.0.norm1.weight",
            "blocks.0.norm1.bias",
            "head.weight",
            "head.bias",
        }

    def test_an_empty_train_also_trains_adapter_and_head_alone(self) -> None:
        model = make_model("vit")

        inject(model, SnellConfig(rank=4, train_also=[]))

        assert {name for name in adapter_state_dict(model) if "factors" not in name} == {
            "head.weight",
            "head.bias",
        }


class TestMistakes:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"rank": 5}, r"rank must be a positive multiple of pieces \(2\), not 5; (4|6) would do"),
            ({"rank": 0}, "rank must be a positive multiple .* not 0; 2 would do"),
            ({"rank_pattern": {"fc1": 7}}, r"rank_pattern\['fc1'\] must be a positive multiple"),
            ({"pieces": 0}, "pieces must be at least 1, not 0"),
            ({"scale": 0.0}, "scale must be a positive number or auto, not 0"),
            ({"scale": float("nan")}, "scale must be a positive number or auto, not nan"),
            ({"sparsity": 1.0}, "sparsity must be at least 0 and below 1, not 1.0"),
            ({"sparsity": -0.1}, "sparsity must be at least 0 and below 1, not -0.1"),
            ({"sparsity": float("nan")}, "sparsity must be at least 0 and below 1, not nan"),
            (
                {"sparsity_pattern": {"fc1": 2}},
                r"sparsity_pattern\['fc1'\] must be at least 0 and below 1, not 2",
            ),
            ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
            ({"dropout_pattern": {"x": -1}}, r"dropout_pattern\['x'\] must be"),
            ({"drop_path": 1.0}, "drop_path must be at least 0 and below 1"),
            ({"kernel": "distanse"}, "kernel must be one of .*, not 'distanse'; did you mean distance"),
            ({"kernel": "zzz"}, "kernel must be one of distance, linear.*, not 'zzz'$"),
            ({"sparsifier": "magnitud"}, "sparsifier must be one of .*; did you mean magnitude"),
            ({"targets": ["fc1", "("]}, r"'\(' is not a regular expression"),
            ({"exclude": ["*"]}, r"'\*' is not a regular expression"),
            ({"rank_pattern": {"[": 4}}, r"'\[' is not a regular expression"),
            ({"train_also": ["("]}, r"'\(' is not a regular expression"),
        ],
    )
    def test_a_wrong_setting_is_named(self, settings: dict, message: str) -> None:
        with raises_one_line(message):
            SnellConfig(**settings)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"targets": ["fc3"]}, "targets pattern 'fc3' matches nothing; there is for example blocks.0"),
            ({"targets": ["fc1", "fc3"]}, "targets pattern 'fc3' matches nothing"),
            ({"exclude": ["."]}, "no layer to adapt was found.*targets"),
            (
                {"rank_pattern": {"fc3": 4}},
                "rank_pattern pattern 'fc3' matches nothing; there is for example",
            ),
            ({"sparsity_pattern": {"fc3": 0.5}}, "sparsity_pattern pattern 'fc3' matches nothing"),
            ({"dropout_pattern": {"fc3": 0.5}}, "dropout_pattern pattern 'fc3' matches nothing"),
            ({"targets": ["fc1"], "rank_pattern": {"fc2": 4}}, "rank_pattern pattern 'fc2' matches nothing"),
            ({"train_also": ["fc3"]}, "train_also pattern 'fc3' matches nothing; there is for example"),
            (
                {"targets": ["patch_embed"]},
                "names patch_embed.proj, which cannot be adapted: it is a 16x16 conv",
            ),
        ],
    )
    def test_a_pattern_that_does_not_fit_is_named_and_nothing_is_changed(self, settings: dict, message: str) -> None:
        model = make_model("vit")

        with raises_one_line(message):
            inject(model, SnellConfig(**{"rank": 4, **settings}))

        assert not any(isinstance(module, SnellLinear) for module in model.modules())
        assert all(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize(
        ("family", "target", "reason"),
        [
            ("convnext", "conv_dw", "grouped convolution"),
            ("efficientnet", "conv_stem", "3x3 convolution"),
        ],
    )
    def test_a_convolution_that_cannot_be_adapted_is_named(self, family: str, target: str, reason: str) -> None:
        with raises_one_line(f"targets pattern '{target}' names .*{target}, which cannot be adapted: .*{reason}"):
            inject(make_model(family), SnellConfig(rank=4, targets=[target]))

    def test_attention_that_is_not_opened_is_named_as_unsuitable_and_left_out_by_default(self) -> None:
        def make() -> nn.Module:
            attention = nn.MultiheadAttention(8, 2, kdim=4)
            return nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"attn": attention, "fc": nn.Linear(8, 8)})])})

        with raises_one_line(re.escape("layers.0.attn.out_proj, which cannot be adapted: nn.MultiheadAttention")):
            inject(make(), SnellConfig(rank=4, targets=["out_proj"]))

        assert inject(make(), SnellConfig(rank=4)) == ["layers.0.fc"]

    def test_a_model_without_blocks_needs_targets(self) -> None:
        with raises_one_line("no layer to adapt was found"):
            inject(nn.Sequential(nn.Linear(8, 8)), SnellConfig(rank=4))

        assert inject(nn.Sequential(nn.Linear(8, 8)), SnellConfig(rank=4, targets=["0"])) == ["0"]

    def test_injecting_twice_is_refused(self) -> None:
        model = make_model("vit")
        inject(model, SnellConfig(rank=4))

        with raises_one_line("has adapters already; call merge"):
            inject(model, SnellConfig(rank=4))


class TestStateDict:
    @staticmethod
    def pair() -> tuple[nn.Module, nn.Module]:
        """Two models of the same frozen weights and different trained ones."""
        models = make_model("deit-distilled"), make_model("deit-distilled")
        for model in models:
            inject(model, large_config())
            enlarge(model)
            for head in heads(model).values():
                nn.init.normal_(head.weight)
        return models

    def test_what_is_trained_carries_the_model_over(self) -> None:
        source, target = self.pair()
        images = make_images("deit-distilled")
        with torch.no_grad():
            assert relative_error(target(images), source(images)) > 1e-2

            load_adapter_state_dict(target, adapter_state_dict(source))

            assert torch.equal(target(images), source(images))

    def test_tensors_are_detached_and_share_memory(self) -> None:
        model, _ = self.pair()

        for name, tensor in adapter_state_dict(model).items():
            assert not tensor.requires_grad
            assert tensor.data_ptr() == model.get_parameter(name).data_ptr()

    def test_loading_copies_values_and_keeps_the_parameters(self) -> None:
        source, target = self.pair()
        before = dict(target.named_parameters())

        load_adapter_state_dict(target, adapter_state_dict(source))

        after = dict(target.named_parameters())
        assert all(after[name] is before[name] for name in before)
        factors = source.blocks[0].mlp.fc1.deltas[0].in_factors
        nn.init.zeros_(factors)
        assert target.blocks[0].mlp.fc1.deltas[0].in_factors.any()

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda state: state.pop("head.bias"), "the adapter lacks head.bias;"),
            (
                lambda state: state.update(nonsense=torch.zeros(1)),
                "the model has no place for nonsense of the adapter;",
            ),
            (
                lambda state: state.update({"head.weight": torch.zeros(7, 48)}),
                r"head.weight is \(7, 48\) in the adapter and \(5, 48\) in the model",
            ),
        ],
        ids=["missing", "unexpected", "shape"],
    )
    def test_a_tensor_that_does_not_fit_is_named_and_nothing_is_copied(self, change: object, message: str) -> None:
        source, target = self.pair()
        state = dict(adapter_state_dict(source))
        change(state)
        before: dict[str, Tensor] = {name: tensor.clone() for name, tensor in target.state_dict().items()}

        with raises_one_line(message):
            load_adapter_state_dict(target, state)

        assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
