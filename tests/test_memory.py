"""Counted memory, and plans against it."""

import dataclasses
import gc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from snell_lightning.adapters import SnellConfig, UserError, heads, inject, merge
from snell_lightning.adapters.update.rule import UpdateRule
from snell_lightning.backbones import create_backbone
from snell_lightning.memory import (
    Job,
    Phase,
    Plan,
    Planner,
    StorageTracker,
    levers,
    measure,
    parse_bytes,
    planner,
    report,
)

FLOAT = 4
KIB = 1024


def kib() -> Tensor:
    """A new tensor of 1 KiB."""
    return torch.zeros(256)


class TestStorageTracker:
    def test_counts_each_storage_once_until_it_is_freed(self) -> None:
        with StorageTracker() as tracker:
            a, b = kib(), kib()
            assert tracker.live == 2 * KIB
            del a
            assert tracker.live == KIB
            assert tracker.peak == 2 * KIB
            tracker.reset_peak()
            assert tracker.peak == KIB
            del b
        assert tracker.live == 0

    def test_views_and_operations_in_place_count_nothing(self) -> None:
        with StorageTracker() as tracker:
            a = kib()
            views = [a.view(16, 16).T, a[:3], a.detach(), a.expand(4, 256), *a.split(64)]
            a.add_(1).mul_(2)
            torch.add(a, a, out=a)
            assert tracker.live == tracker.peak == KIB
            del a
            assert tracker.live == KIB
            del views
        assert tracker.live == 0

    def test_counts_what_an_operation_returns_in_a_list(self) -> None:
        with StorageTracker() as tracker:
            kept = torch._foreach_add([kib(), kib()], 1.0)
            assert len(kept) == 2
            assert tracker.live == 2 * KIB
            assert tracker.peak == 4 * KIB

    @pytest.mark.parametrize("of_storage", [False, True])
    def test_follows_a_storage_that_is_resized(self, of_storage: bool) -> None:
        a = kib()
        with StorageTracker(a) as tracker:
            if of_storage:
                a.untyped_storage().resize_(4 * KIB)
            else:
                a.resize_(KIB)
            assert tracker.live == 4 * KIB
            a.untyped_storage().resize_(0)
            assert tracker.live == 0
        assert tracker.peak == 4 * KIB

    def test_what_is_known_counts_from_the_start(self) -> None:
        layer = nn.Linear(8, 4)  # 32 + 4 numbers
        layer.weight.grad = torch.zeros(4, 8)
        layer.register_buffer("mask", torch.zeros(8, dtype=torch.bool))
        tracker = StorageTracker(layer, layer.weight, torch.zeros(2, 8).T)
        # The last tensor is gone again.
        assert tracker.live == (36 + 32) * FLOAT + 8

    def test_what_autograd_alone_keeps_lives(self) -> None:
        x = torch.zeros(256, requires_grad=True)
        with StorageTracker(x) as tracker:
            loss = x.exp().exp().sum()
            # Backward of exp keeps its result; no name holds either of the two.
            assert tracker.live == 3 * KIB + FLOAT
            loss.backward()
            # The gradient, in place of what was kept.
            assert tracker.live == 2 * KIB + FLOAT

    def test_sees_what_a_custom_function_makes_in_backward(self) -> None:
        class Wasteful(torch.autograd.Function):
            @staticmethod
            def forward(ctx: Any, x: Tensor) -> Tensor:
                ctx.kept = x.new_zeros(3 * 256)
                return x.clone()

            @staticmethod
            def backward(ctx: Any, grad: Tensor) -> Tensor:
                grad.new_zeros(16 * 256)
                return grad.clone()

        x = torch.zeros(256, requires_grad=True)
        with StorageTracker(x) as tracker:
            loss = Wasteful.apply(x).sum()
            assert tracker.live == (1 + 3) * KIB + FLOAT
            with tracker.phase("backward"):
                loss.backward()
        # At its most: x, kept and the temporary; the expanded gradient of the sum is one number, and the loss another.
        assert tracker.phases["backward"].peak == (1 + 3 + 16) * KIB + 2 * FLOAT

    def test_phases_hold_the_most_over_repetitions_and_may_nest(self) -> None:
        with StorageTracker() as tracker:
            with tracker.phase("outer"):
                a = kib()
                with tracker.phase("inner"):
                    kib()
                with tracker.phase("inner"):
                    b = torch.zeros(2 * 256)
                del a
            del b
        assert tracker.phases == {"inner": Phase(3 * KIB, 3 * KIB), "outer": Phase(3 * KIB, 2 * KIB)}

    def test_fake_tensors_count_as_real_ones_do(self) -> None:
        def count(fake: bool) -> tuple[int, int, dict[str, Phase]]:
            with FakeTensorMode() if fake else nullcontext():
                layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(288, 5))
                x = torch.randn(2, 3, 8, 8)
                with StorageTracker(layers, x) as tracker:
                    with tracker.phase("forward"):
                        loss = F.cross_entropy(layers(x), torch.tensor([0, 1]))
                    with tracker.phase("backward"):
                        loss.backward()
                    return tracker.live, tracker.peak, tracker.phases

        assert count(fake=True) == count(fake=False)

    def test_leaves_torch_as_it_was(self) -> None:
        original = torch.UntypedStorage.resize_
        with StorageTracker():
            pass
        assert torch.UntypedStorage.resize_ is original


IMAGE = {"test_vit": 32, "test_convnext": 64, "test_byobnet": 64}
VIT = {"img_size": 32, "depth": 3}


def job(backbone: str = "test_vit", **settings: Any) -> Job:
    """A small job."""
    adapter = settings.pop("adapter", SnellConfig(rank=4, recompute="none"))
    arguments = dict(VIT) if backbone == "test_vit" else {}
    return Job(backbone, 10, adapter, image_size=IMAGE[backbone], backbone_args=arguments, **settings)


def assert_close(plan: Plan, measured: Plan) -> None:
    """The plan is within 5 % of what was counted, as a whole and by phase."""
    for name in ("peak", "forward", "backward", "step", "activations", "weights", "gradients", "optimizer"):
        assert getattr(plan, name) == pytest.approx(getattr(measured, name), rel=0.05, abs=FLOAT), name


class TestPlanAgainstCount:
    @pytest.mark.parametrize("backbone", list(IMAGE))
    @pytest.mark.parametrize(
        ("method", "recompute"),
        [("snell", "none"), ("snell", "inputs"), ("snell", "blocks"), ("lora", "none"), ("full", "none")],
    )
    def test_methods_and_levers(self, backbone: str, method: Any, recompute: str) -> None:
        subject = job(backbone, method=method, adapter=SnellConfig(rank=4, recompute=recompute))
        assert_close(Planner(subject).plan(4), measure(subject, 4))

    @pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true"])
    @pytest.mark.parametrize("method", ["snell", "full"])
    def test_precisions(self, precision: str, method: Any) -> None:
        subject = job(method=method, precision=precision)
        assert_close(Planner(subject).plan(4), measure(subject, 4))

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_frozen_weights_in_bf16(self, precision: str) -> None:
        subject = job(backbone_dtype="bfloat16", precision=precision)
        plan = Planner(subject).plan(4)
        assert_close(plan, measure(subject, 4))
        assert plan.weights < Planner(job(precision=precision)).plan(4).weights

    def test_noise(self) -> None:
        subject = job(adapter=SnellConfig(rank=4, dropout=0.1, drop_path=0.1))
        assert_close(Planner(subject).plan(4), measure(subject, 4))

    def test_linear_probe(self) -> None:
        subject = job(adapter=None)
        assert_close(Planner(subject).plan(4), measure(subject, 4))

    @pytest.mark.parametrize("kernel", ["distance", "linear"])
    def test_kernels(self, kernel: str) -> None:
        subject = job(adapter=SnellConfig(rank=4, kernel=kernel, sparsifier="none"))
        assert_close(Planner(subject).plan(4), measure(subject, 4))

    def test_another_optimizer(self) -> None:
        subject = job(method="full", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9))
        plan = Planner(subject).plan(4)
        assert_close(plan, measure(subject, 4))
        assert plan.optimizer == plan.gradients

    def test_a_trained_parameter_without_gradient(self) -> None:
        # Average pooling never reads the class token.
        subject = dataclasses.replace(job(method="full"), backbone_args={"img_size": 32, "global_pool": "avg"})
        subject = dataclasses.replace(subject, adapter=None, method="full")
        assert_close(Planner(subject).plan(4), measure(subject, 4))

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_lora_makes_what_peft_makes(self, dropout: float) -> None:
        peft = pytest.importorskip("peft")
        config = SnellConfig(rank=4, dropout=dropout)
        subject = job(method="lora", adapter=config)
        model = create_backbone("test_vit", 10, pretrained=False, **VIT)
        names = inject(model, config)
        merge(model)
        own = [parameter for head in heads(model).values() for parameter in head.parameters()]
        wrapped = peft.get_peft_model(
            model, peft.LoraConfig(r=4, lora_dropout=dropout, target_modules=names, bias="none")
        ).train()
        for parameter in own:
            parameter.requires_grad_(True)
        model.cls_token.requires_grad_(True)
        assert count_peak(wrapped, 4) == pytest.approx(Planner(subject).plan(4).peak, rel=0.01)


def count_peak(model: nn.Module, batch_size: int) -> int:
    """Peak bytes of a model's second step."""
    images, labels = torch.zeros(batch_size, 3, 32, 32), torch.zeros(batch_size, dtype=torch.long)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])

    def step() -> None:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    step()
    gc.collect()
    state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    with StorageTracker(model, images, labels, *state) as tracker:
        step()
    return tracker.peak


class TestPlan:
    def test_its_figures_are_those_of_the_model(self) -> None:
        plan = Planner(job(method="full", adapter=None)).plan(3)
        model = create_backbone("test_vit", 10, pretrained=False, **VIT)
        parameters = list(model.parameters())
        count = sum(p.numel() for p in parameters)
        assert plan.weights == plan.gradients == count * FLOAT
        # AdamW: two averages, and the number of steps of each tensor.
        assert plan.optimizer == (2 * count + len(parameters)) * FLOAT
        assert plan.images == 3 * (3 * 32 * 32 * FLOAT + 8)

    def test_what_lives_at_the_peak_adds_up(self) -> None:
        plan = Planner(job()).plan(4)
        assert sum(plan.at_peak.values()) == plan.peak == max(plan.forward, plan.backward, plan.step)

    @pytest.mark.parametrize("backbone", list(IMAGE))
    @pytest.mark.parametrize("recompute", ["inputs", "blocks"])
    def test_other_batch_sizes_follow_from_two(self, backbone: str, recompute: str) -> None:
        subject = job(backbone, adapter=SnellConfig(rank=4, recompute=recompute, dropout=0.1))
        sizes = (1, 2, 7, 64)
        assert Planner(subject).plans(sizes) == [Planner(subject).plan(size) for size in sizes]

    @pytest.mark.parametrize("mebibytes", [8, 40, 400])
    def test_the_largest_batch_fits_and_the_next_does_not(self, mebibytes: int) -> None:
        planner = Planner(job())
        largest = planner.largest_batch(mebibytes << 20)
        assert planner.plan(largest).peak <= mebibytes << 20 < planner.plan(largest + 1).peak

    def test_the_largest_batch_is_found_step_by_step_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        expected = Planner(job()).largest_batch(8 << 20)
        monkeypatch.setattr(Planner, "_affine", None)
        assert Planner(job()).largest_batch(8 << 20) == expected

    def test_no_batch_fits_where_the_weights_do_not(self) -> None:
        assert Planner(job()).largest_batch(1 << 19) == 0

    def test_a_billion_parameters_are_never_allocated(self) -> None:
        planner = Planner(Job("vit_giant_patch14_224", 10, SnellConfig(rank=4)))
        parameters = list(planner._subject.model.parameters())
        assert sum(p.numel() for p in parameters) > 1e9
        assert all(isinstance(p, FakeTensor) for p in parameters)

    def test_planning_leaves_no_trace(self) -> None:
        write, state, collecting = UpdateRule.write, torch.get_rng_state(), gc.isenabled()
        Planner(job(adapter=SnellConfig(rank=4, dropout=0.1))).plan(2)
        assert UpdateRule.write is write
        assert torch.equal(torch.get_rng_state(), state)
        assert gc.isenabled() == collecting

    @pytest.mark.parametrize(
        "settings", [{"precision": "8-true"}, {"backbone_dtype": "float16"}, {"precision": "transformer-engine"}]
    )
    def test_unknown_types_are_refused(self, settings: dict[str, str]) -> None:
        with pytest.raises(UserError, match=r"one of|planned for"):
            job(**settings)

    def test_short_names_of_precisions_are_lightnings(self) -> None:
        assert [job(precision=name).precision for name in ("32", "bf16", "16")] == ["32-true", "bf16-mixed", "16-mixed"]


def shallow() -> Job:
    """A job of two blocks: to search over settings takes many plans."""
    return dataclasses.replace(job(), backbone_args=VIT | {"depth": 2})


class TestLevers:
    def test_each_changes_one_setting(self) -> None:
        assert list(levers(job())) == [
            "model.adapter.recompute: inputs",
            "model.adapter.recompute: blocks",
            "model.backbone_dtype: bfloat16",
            "trainer.precision: bf16-mixed",
        ]

    def test_none_is_named_that_is_in_use(self) -> None:
        used = job(adapter=SnellConfig(rank=4, recompute="blocks"), backbone_dtype="bfloat16", precision="bf16-mixed")
        assert levers(used) == {}


class TestReport:
    @pytest.fixture
    def printed(self) -> Iterator[Callable[..., str]]:
        def run(subject: Job, batch_size: int, budget: int | None = None) -> str:
            console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
            report(subject, batch_size, budget, console)
            console.file.close()
            return console.export_text()

        return run

    def test_shows_the_methods_side_by_side_in_80_columns(self, printed: Callable[..., str]) -> None:
        text = printed(job(), 8)
        assert all(name in text for name in ("SNELL-4", "full fine-tuning", "LoRA-4", "linear probe"))
        assert all(
            name in text for name in ("weights", "gradients", "optimizer state", "temporaries", "Planned without")
        )
        assert max(map(len, text.splitlines())) <= 80
        peak = Planner(job()).plan(256).peak
        assert f"{peak / 2**20:,.0f}" in text

    def test_a_budget_names_the_largest_batch_and_the_best_lever(self, printed: Callable[..., str]) -> None:
        text = printed(shallow(), 8, 8 << 20)
        largest = Planner(shallow()).largest_batch(8 << 20)
        assert f"Largest batch within 8 MiB: this config {largest}, full fine-tuning" in " ".join(text.split())
        blocks = Planner(levers(shallow())["model.adapter.recompute: blocks"]).largest_batch(8 << 20)
        helps = f"What helps most is model.adapter.recompute: blocks: batch {blocks} instead of {largest}."
        assert helps in " ".join(text.split())
        assert "(in brackets: more than 8 MiB)" in text

    def test_a_linear_probe_stands_beside_full_fine_tuning(self, printed: Callable[..., str]) -> None:
        text = printed(job(adapter=None), 8)
        assert "LoRA" not in text
        assert "linear probe" in text


class TestParseBytes:
    @pytest.mark.parametrize(
        ("text", "size"),
        [
            ("8GiB", 8 * 2**30),
            ("8 gib", 8 * 2**30),
            ("1.5KiB", 1536),
            ("500MB", 500_000_000),
            ("2 GB", 2_000_000_000),
            ("3kb", 3000),
            ("7MiB", 7 * 2**20),
            ("123", 123),
            ("123B", 123),
            (123, 123),
        ],
    )
    def test_sizes(self, text: str | int, size: int) -> None:
        assert parse_bytes(text) == size

    @pytest.mark.parametrize("text", ["", "GiB", "8 Gigs", "-3GiB", "0", "0.1B", "8GiB more", "1e9"])
    def test_anything_else_is_one_line(self, text: str) -> None:
        with pytest.raises(UserError) as caught:
            parse_bytes(text)
        assert "\n" not in str(caught.value)


class TestCut:
    """Blocks that are left out are planned as if they had been run."""

    @staticmethod
    def plans(job: Job, cut: bool) -> tuple[list[Plan], bool]:
        subject = planner._Subject(job, FakeTensorMode(allow_non_fake_inputs=True))
        if not cut:
            subject._cut = None
        return [subject.trace(size).plan(size) for size in (1, 3)], subject._cut is not None

    @pytest.mark.parametrize("method", ["snell", "full", "lora", "linear"])
    @pytest.mark.parametrize(
        ("backbone", "arguments"),
        [
            ("test_vit", {"img_size": 32, "depth": 7}),
            ("test_convnext", {"depths": (1, 1, 6, 1)}),
            # The first one has no path to drop.
            ("test_vit", {"img_size": 32, "depth": 8, "drop_path_rate": 0.1}),
        ],
    )
    def test_the_plan_is_that_of_the_whole_model(self, backbone: str, arguments: dict, method: Any) -> None:
        job = Job(backbone, 10, SnellConfig(rank=4, dropout=0.1), method, backbone_args=arguments)
        plans, used = self.plans(job, cut=True)
        # Where nothing is kept for backward a block may free what it was given at another place.
        assert used or method == "linear"
        assert plans == self.plans(job, cut=False)[0]

    @pytest.mark.parametrize("recompute", ["none", "blocks"])
    def test_also_where_backward_runs_blocks_again(self, recompute: Any) -> None:
        adapter = SnellConfig(rank=4, drop_path=0.1, recompute=recompute)
        job = Job("test_vit", 10, adapter, precision="bf16-mixed", backbone_args={"img_size": 32, "depth": 7})
        plans, used = self.plans(job, cut=True)
        assert used
        assert plans == self.plans(job, cut=False)[0]

    def test_blocks_that_differ_are_run(self) -> None:
        adapter = SnellConfig(rank=4, rank_pattern={r"blocks\.3\.": 8})
        job = Job("test_vit", 10, adapter, backbone_args={"img_size": 32, "depth": 7})
        assert self.plans(job, cut=True)[1] is False
