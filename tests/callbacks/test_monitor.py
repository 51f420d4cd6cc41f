"""The monitor: every number it logs is compared with a count of its own."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn

from snell_lightning import SnellConfig
from snell_lightning.adapters import SnellDelta, deltas
from snell_lightning.callbacks import SnellMonitor
from snell_lightning.callbacks.monitor import _SavedBytes, count_zeros

from .conftest import MakeTrainer, loader, make_classifier

MIB = 2**20


class Recorder(CSVLogger):
    """Keeps what is logged besides the module's own values."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen: list[tuple[int, dict[str, float]]] = []

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
        if "memory/weights_mib" in metrics:
            assert step is not None
            self.seen.append((step, metrics))

    def log_hyperparams(self, params: dict[str, Any] | Namespace | None = None) -> None:  # type: ignore[override]
        """Nothing to keep."""


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def test_zeros_are_counted_in_the_updates_as_applied() -> None:
    torch.manual_seed(0)
    updates = [
        SnellDelta(10, 6, SnellConfig(rank=2, sparsity=sparsity, start="random")) for sparsity in (0.0, 0.5, 0.9)
    ]
    # Of 60 entries the threshold is the k-th smallest, k = floor(s * 59) + 1, and what is not above it is zero; at
    # sparsity 0 nothing competes.
    assert [int(count_zeros([update])) for update in updates] == [0, 30, 54]
    assert int(count_zeros(updates)) == 84


def test_b6_images_a_second_stand_in_the_bar_and_in_no_curve(recorder: Recorder, make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(callbacks=[SnellMonitor(every_n_steps=1)], logger=recorder)
    trainer.fit(make_classifier(), loader(2))
    assert trainer.progress_bar_metrics["images/s"] > 0
    assert all("images/s" not in metrics for _, metrics in recorder.seen)


def test_logged_sparsity_is_a_recount_of_all_adapted_entries(recorder: Recorder, make_trainer: MakeTrainer) -> None:
    module = make_classifier(
        adapter=SnellConfig(rank=2, sparsity=0.7, targets=["attn"], sparsity_pattern={r"blocks\.0\.attn\.proj": 0.2})
    )
    monitor = SnellMonitor(every_n_steps=1)
    make_trainer(callbacks=[monitor], logger=recorder).fit(module, loader(2))
    step, logged = recorder.seen[-1]
    # Lightning logs the values of its first step at 0, so those of the second stand at 1.
    assert step == 1

    zeros, entries = {}, {}
    with torch.no_grad():
        for name, layer in module.model.named_modules():
            if hasattr(layer, "deltas"):
                update = torch.cat([delta.weight() for delta in layer.deltas])
                zeros[name], entries[name] = int((update == 0).sum()), update.numel()
    assert len(zeros) > 3
    for name in zeros:
        assert logged[f"sparsity/{name}"] == pytest.approx(zeros[name] / entries[name], abs=1e-9), name
    assert logged["sparsity/blocks.0.attn.proj"] == pytest.approx(0.2, abs=0.01)
    ratio = sum(zeros.values()) / sum(entries.values())
    assert logged["sparsity/ratio"] == monitor.sparsity == pytest.approx(ratio, abs=1e-9)


def test_logged_bytes_are_those_counted_by_hand(recorder: Recorder, make_trainer: MakeTrainer) -> None:
    module = make_classifier(optimizer=torch.optim.AdamW)
    make_trainer(callbacks=[SnellMonitor(every_n_steps=1)], logger=recorder).fit(module, loader(1))
    _, logged = recorder.seen[-1]
    numbers = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point())
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    gradients = 4 * sum(parameter.numel() for parameter in trained)
    # Adam keeps two moments in fp32 and one step count, also in fp32, for each trained tensor.
    optimizer = 2 * gradients + 4 * len(trained)
    whole = sum(t.nbytes for t in module.buffers() if not t.is_floating_point())
    assert logged["memory/weights_mib"] * MIB == pytest.approx(4 * numbers + whole)
    assert logged["memory/gradients_mib"] * MIB == pytest.approx(gradients)
    assert logged["memory/optimizer_mib"] * MIB == pytest.approx(optimizer)
    assert logged["memory/peak_mib"] >= logged["memory/allocated_mib"] > logged["memory/weights_mib"]


def test_kept_activations_do_not_grow_with_the_updates_and_do_with_the_batch(
    recorder: Recorder, make_trainer: MakeTrainer
) -> None:
    for size in (2, 4):
        module = make_classifier()
        make_trainer(callbacks=[SnellMonitor(every_n_steps=1)], logger=recorder).fit(module, loader(1, size))
    small, large = (values["memory/activations_mib"] for _, values in recorder.seen)
    # Twice the images keep twice the activations; one threshold per update and the like do not grow.
    assert large == pytest.approx(2 * small, rel=0.02)


@pytest.mark.parametrize(
    ("every", "steps"),
    # Steps count from 0. The end is always logged. None is the trainer's own interval, here 3.
    [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (50, [4]), (None, [2, 4])],
)
def test_it_logs_at_the_interval_and_at_the_end(
    every: int | None, steps: list[int], recorder: Recorder, make_trainer: MakeTrainer
) -> None:
    monitor = SnellMonitor(every_n_steps=every, per_layer=False)
    make_trainer(callbacks=[monitor], logger=recorder, log_every_n_steps=3).fit(make_classifier(), loader(5))
    assert [step for step, _ in recorder.seen] == steps
    assert not any(name.startswith("sparsity/blocks") for _, values in recorder.seen for name in values)


def test_steps_are_those_of_the_optimizer_where_gradients_accumulate(
    recorder: Recorder, make_trainer: MakeTrainer
) -> None:
    run = make_trainer(callbacks=[SnellMonitor(every_n_steps=1)], logger=recorder, accumulate_grad_batches=2)
    run.fit(make_classifier(), loader(4))
    assert [step for step, _ in recorder.seen] == [0, 1]
    assert all(values["memory/activations_mib"] > 0 for _, values in recorder.seen)


class _FailsInForward(Callback):
    """Raises while the monitor counts what the forward pass keeps."""

    def on_train_batch_start(self, *_: Any) -> None:
        raise RuntimeError("stop here")


def test_no_hook_stays_behind_after_an_exception(make_trainer: MakeTrainer) -> None:
    monitor = SnellMonitor(every_n_steps=1)
    packed: list[Tensor] = []
    with pytest.MonkeyPatch.context() as patch:
        pack = _SavedBytes._pack
        patch.setattr(_SavedBytes, "_pack", lambda self, tensor: (packed.append(tensor), pack(self, tensor))[1])
        with pytest.raises(RuntimeError, match="stop here"):
            make_trainer(callbacks=[monitor, _FailsInForward()]).fit(make_classifier(), loader(1))
        assert monitor._saved is None
        packed.clear()
        weight = torch.ones(3, requires_grad=True)
        (weight * weight).sum().backward()
        assert packed == []


def counted(module: nn.Module, run: Any) -> int:
    """Bytes that autograd keeps of `run()` by the monitor's count."""
    saved = _SavedBytes(module)  # type: ignore[arg-type]
    saved.start()
    run()
    return saved.stop()


def test_nothing_is_counted_where_nothing_is_kept() -> None:
    layer = nn.Linear(4, 5)
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert counted(layer, lambda: layer(x)) == 0
    # A sum of weights keeps no tensor, and the weight that a product keeps is a parameter.
    assert counted(layer, lambda: layer.weight.sum() + layer.bias.sum()) == 0
    layer.weight.requires_grad_(False)
    y = torch.randn(3, 4, requires_grad=True)
    assert counted(layer, lambda: layer(y)) == 0


def test_each_storage_is_counted_once_and_as_a_whole() -> None:
    layer = nn.Linear(4, 5)
    x = torch.randn(3, 4)
    # The weight's gradient needs the input: 3 x 4 numbers of 4 bytes.
    assert counted(layer, lambda: layer(x)) == 48
    # The same input twice, and a view of it, are one storage.
    assert counted(layer, lambda: layer(x) + layer(x)[:2].sum() + layer(x[1:]).sum()) == 48
    # The input, and the result that a sigmoid keeps: 3 x 5 numbers.
    assert counted(layer, lambda: layer(x).sigmoid()) == 48 + 60


def test_an_update_keeps_its_input_and_one_threshold_but_no_matrix_of_its_size() -> None:
    # in x out = 64 x 64 would be 16,384 bytes in fp32.
    delta = SnellDelta(64, 64, SnellConfig(rank=2, sparsity=0.5))
    assert 0 < counted(delta, delta.weight) <= 64
    assert set(deltas(nn.ModuleDict({"a": delta}))) == {"a"}
