"""The one LightningDataModule: a source's splits, the backbone's transforms, and who sees which image.

Training shuffles by seed and epoch alone: in step k, one process with a batch of 2 B and two processes with
batches of B see the same images. Evaluation covers each image exactly once over all processes.
"""

import logging
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, get_args

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import Sampler

from snell_lightning.adapters.errors import UserError
from snell_lightning.backbones import EMBEDDED_BACKBONE
from snell_lightning.backbones.sizes import ImageSize, as_size, pixels
from snell_lightning.data.dataset import ImageDataset, ImageLoader, OnUnreadable, image_loader, processors
from snell_lightning.data.leaks import shared_images
from snell_lightning.data.samplers import ShardSampler, TrainSampler
from snell_lightning.data.sources import source_of
from snell_lightning.data.splits import PUBLISHED, Sample, SplitName, Splits, classes_lacking, listed
from snell_lightning.data.transforms import (
    Augmentation,
    Normalization,
    NormalizationSetting,
    Transform,
    build_transforms,
    require_choice,
)

OnBadImage = Literal["error", "skip"]
EvalSplit = Literal["test", "val", "train", "all"]
ClassWeights = Literal["none", "balanced"]
EvalProtocol = Literal["validation", "published"]

# As many read more photographs than a GPU trains a ViT-B/16 on.
_MOST_WORKERS = 8

_log = logging.getLogger(__name__)


class ImageDataModule(lightning.LightningDataModule):
    """Images and labels for fitting, validation, testing and prediction.

    Batches are `(images, labels)` of shapes `(batch, 3, height, width)`, float32, and `(batch,)`,
    int64. With `on_bad_image: skip` a batch may be shorter than asked for, or empty.

    Args:
        source: Where images come from: `digits` (1,797 handwritten digits that need no download) or `folder`
            (image files in one folder per class), `table` (images and labels listed in a CSV, TSV or Parquet file)
            or `webdataset` (tar files), `vtab`, `fgvc` or `few_shot` (a set of these benchmarks, by its lists),
            or `torchvision:NAME` (one of torchvision's sets, such as `torchvision:Flowers102`), or `datasets:ORG/NAME`
            (a set of the Hugging Face hub), or `datasets` with a folder that their library reads as the root.
        root: The folder with the images, the table, or the set's folder or list. For `folder` it holds
            train/CLASS/IMAGE with val and test beside train, or CLASS/IMAGE.
        columns: Of a table: the names of its columns `path`, `label` and `split`, where they are called otherwise; of a
            Hugging Face set those of `image` and `label`.
        download: Fetch a set of torchvision's into the root.
        classes: Class names in the order of the model's outputs; by default the classes that are found, sorted. With
            an adapter file or a checkpoint they are those that it was trained on.
        backbone: timm name of the backbone, whose own configuration gives image size, normalisation and
            centre crop.
        batch_size: Training images per batch and process, at least 1.
        eval_batch_size: Images per batch and process in validation, testing and prediction, at least 1; the
            training batch size if not given.
        num_workers: Worker processes per loader; 0 loads images in the main process. By default up to 8 of the
            processors that fall to a process that trains on an accelerator, and 0 where the CPU is what trains or
            where images are in memory already.
        image_size: Of the images given to the backbone, in pixels: one number for squares, else height and width; the
            backbone's own if not given.
        normalization: `auto` (the backbone's own mean and standard deviation), `imagenet`, `inception` (0.5
            and 0.5), `none` (pixels stay in [0, 1]), or `mean` and `std` of three numbers each.
        augmentation: `crop` (random crops of 0.08 to 1 of the area and horizontal flips; centre crop in evaluation),
            `light` (random crops of 0.8 to 1, no flips; whole image in evaluation) or `none`
            (the whole image resized, in training too: the VTAB protocol).
        crop_pct: In evaluation with `crop`, the share of a resized image's side that the crop takes, above 0 and at
            most 1; the backbone's own if not given.
        val_fraction: Share of the images split off for validation where the source has no validation split of
            its own, above 0 and below 1.
        test_fraction: Share of the images split off for testing where the source has no splits of its own, at
            least 0 and below 1.
        eval_split: The images that `test` and `predict` take: those of `test`, `val` or `train`, or `all`.
        fixed_splits: Splits of single images by their path below the root, where they are not to follow from the path.
            An adapter file or a checkpoint keeps those that its run settled.
        class_weights: How much an image counts in the training loss: `none`: all the same; `balanced`: by the inverse
            of its class's share of the training images, so that all classes count the same.
        protocol: `validation`: the best epoch is chosen on images that are neither trained on nor tested; `published`,
            as in the papers on VTAB-1k and FGVC: the validation images are trained on too, the test images are
            evaluated after every epoch, and the best of these scores is the result. What is logged is called
            `test_by_epoch` then.
        seed: Seed of the splits and of the order of training images.
        on_bad_image: What to do about an image that cannot be read: `error` stops with its path, `skip`
            leaves it out of its batch and reports the count after each pass; a prediction says why there is none.

    Raises:
        UserError: An argument is out of range or unknown, or the source's images are not as expected.
    """

    def __init__(
        self,
        source: str = "digits",
        root: str | None = None,
        classes: list[str] | None = None,
        columns: dict[str, str] | None = None,
        download: bool = False,
        backbone: str = EMBEDDED_BACKBONE,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        image_size: ImageSize | None = None,
        normalization: NormalizationSetting = "auto",
        augmentation: Augmentation = "crop",
        crop_pct: float | None = None,
        val_fraction: float = 0.15,
        test_fraction: float = 0.25,
        eval_split: EvalSplit = "test",
        fixed_splits: dict[str, SplitName] | None = None,
        class_weights: ClassWeights = "none",
        protocol: EvalProtocol = "validation",
        seed: int = 0,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        super().__init__()
        find = source_of(source, columns, download)
        require_choice("on_bad_image", on_bad_image, get_args(OnBadImage))
        require_choice("eval_split", eval_split, get_args(EvalSplit))
        require_choice("protocol", protocol, get_args(EvalProtocol))
        require_choice("class_weights", class_weights, get_args(ClassWeights))
        _require_fractions(val_fraction, test_fraction)
        self.source, self.class_weights = source, class_weights
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.eval_batch_size = _at_least(
            "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1
        )
        self.num_workers = None if num_workers is None else _at_least("num_workers", num_workers, 0)
        self._loaders: list[ImageLoader] = []
        self.seed = _at_least("seed", seed, 0)
        self.on_bad_image, self.eval_split, self.augmentation = on_bad_image, eval_split, augmentation
        self.val_fraction, self.test_fraction = val_fraction, test_fraction
        # Imported here for timm's sake: the command line needs this class to print a help text or to refuse a config.
        from snell_lightning.backbones import data_config

        config = data_config(backbone)
        if crop_pct is not None:
            if not 0 < crop_pct <= 1:
                raise UserError(f"data.crop_pct is {crop_pct}; expected a share above 0 and at most 1")
            config = {**config, "crop_pct": crop_pct}
        self.image_size = as_size(config["input_size"][1:] if image_size is None else image_size)
        self.normalization = Normalization.resolve(normalization, config)
        self.train_transform, self.eval_transform = build_transforms(
            config, augmentation, normalization, self.image_size
        )
        cropped = augmentation == "crop"
        self._crop = {
            "crop_pct": config["crop_pct"] if cropped else None,
            "interpolation": config["interpolation"] if cropped else "bicubic",
        }
        self.root = path = Path(root) if root is not None else None
        if classes is not None and len(set(classes)) < len(classes):
            raise UserError(f"data.classes names a class twice: {', '.join(classes)}")
        splits = find(path, val_fraction, test_fraction, seed, fixed_splits, classes)
        self.protocol = protocol
        if protocol == "published":
            splits = splits.as_published()
        self._require_files(splits)
        self.splits = splits if classes is None else splits.with_classes(classes)
        self._told = False

    def _require_files(self, splits: Splits) -> None:
        splits.require_files()

    @property
    def val_name(self) -> str:
        """What the values of each epoch's evaluation are called where they are logged."""
        return "test_by_epoch" if self.protocol == "published" else "val"

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.splits.classes

    def loss_weights(self) -> torch.Tensor | None:
        """How much an image of each class counts in the training loss, `(num_classes,)`, 1 in the mean over the images.

        None where all count the same.
        """
        if self.class_weights == "none":
            return None
        labels = torch.tensor([label for _, label in self.splits.train])
        counts = torch.bincount(labels, minlength=self.num_classes)
        return len(labels) / (self.num_classes * counts)

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that is subtracted from pixels in [0, 1]."""
        return self.normalization.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that pixels in [0, 1] are divided by."""
        return self.normalization.std

    def settings(self) -> dict[str, Any]:
        """What has to be known of these data in order to use a model that was trained on them, in plain values.

        Returns:
            `classes`, `image_size`, `normalization` (mean and std), `protocol`, `augmentation` and what it makes of an
            image in evaluation (`crop_pct`, None for the whole image, and `interpolation`), and `split`: how images
            were split, where they were, so that the same ones are tested another time.
        """
        split = {
            "seed": self.seed,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
            "fixed_splits": dict(self.splits.fixed),
        }
        return {
            "classes": list(self.class_names),
            "image_size": self.image_size if isinstance(self.image_size, int) else list(self.image_size),
            "normalization": {"mean": list(self.mean), "std": list(self.std)},
            "augmentation": self.augmentation,
            "protocol": self.protocol,
            **self._crop,
            "split": split if self.splits.by_fractions else None,
        }

    def setup(self, stage: str) -> None:
        """Say once, on the first process, what is there that a user may not expect, and what is trained on.

        Raises:
            UserError: A class of the model has no image to train on.
        """
        if not self._told:
            self._told = True
            for note in self.splits.notes:
                rank_zero_info(f"data: {note}")
        if stage == "fit":
            if absent := classes_lacking(self.splits.train, self.class_names):
                raise UserError(
                    f"there is no image to train on of {listed(absent)}; the model's classes are "
                    f"{listed(self.class_names)}: add a folder for each, or leave data.classes out"
                )
            rank_zero_info(self.describe())
            self._warn_of_shared_images()

    @rank_zero_only
    def _warn_of_shared_images(self) -> None:
        train, others = (
            [source for source, _ in part if isinstance(source, str)]
            for part in (self.splits.train, [*self.splits.val, *self.splits.test])
        )
        if pairs := shared_images(train, list(dict.fromkeys(others))):
            pair = " and ".join(pairs[0])
            _log.warning(
                f"data: {len(pairs):,} image(s) of val or test are in train too, by content, such as {pair}; scores on "
                "them say little"
            )

    def describe(self) -> str:
        """Source, sizes, classes and normalisation in one line."""
        parts = {name: len(getattr(self.splits, name)) for name in get_args(SplitName)}
        if published := self.protocol == "published":
            del parts["val"]
        counts = " / ".join(f"{count} {name}" for name, count in parts.items())
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"data: {self.source}, {counts} images, {self.num_classes} classes, {pixels(self.image_size)} pixels, "
            f"normalisation {self.normalization.name} (mean {mean}, std {std})"
            + (f"; scores are {PUBLISHED}" if published else "")
        )

    def train_dataloader(self) -> ImageLoader:
        """This process's share of the training images, shuffled by seed and epoch."""
        dataset = self._dataset(self.splits.train, self.train_transform, "train", self.on_bad_image, self.seed)
        shards: list[int] = []
        if self.splits.in_shards:
            shards = [len(list(each)) for _, each in groupby(self.splits.train, key=lambda sample: sample[0][0])]
        sampler = TrainSampler(dataset, *self._replicas_and_rank(), self.seed, shards)
        return self._loader(dataset, sampler, self.batch_size)

    def val_dataloader(self) -> ImageLoader:
        """This process's share of the validation images.

        Raises:
            UserError: There are none.
        """
        return self._eval_loader(self.splits.val, "val", self.on_bad_image)

    def test_dataloader(self) -> ImageLoader:
        """This process's share of the images of `eval_split`.

        Raises:
            UserError: There are none.
        """
        return self._eval_loader(self.eval_samples, self.eval_split, self.on_bad_image)

    def predict_dataloader(self) -> ImageLoader:
        """This process's share of the images of `eval_split`; none is left out, so that each keeps its index.

        Raises:
            UserError: There are none.
        """
        on_unreadable: OnUnreadable = "mark" if self.on_bad_image == "skip" else "error"
        return self._eval_loader(self.eval_samples, self.eval_split, on_unreadable)

    @property
    def eval_samples(self) -> Sequence[Sample]:
        """The samples of `eval_split`."""
        splits = self.splits
        if self.eval_split == "all":
            return [*splits.train, *splits.val, *splits.test]
        return {"train": splits.train, "val": splits.val, "test": splits.test}[self.eval_split]

    def _dataset(
        self,
        samples: Sequence[Sample],
        transform: Transform,
        split: str,
        on_unreadable: OnUnreadable,
        seed: int | None = None,
    ) -> ImageDataset:
        return ImageDataset(samples, self.splits.open_image, transform, split, on_unreadable, seed)

    def _eval_loader(self, samples: Sequence[Sample], split: EvalSplit, on_unreadable: OnUnreadable) -> ImageLoader:
        if not samples:
            there = " and ".join(
                f"{len(part)} {name}" for name in ("train", "val", "test") if (part := getattr(self.splits, name))
            )
            fraction = ", set data.test_fraction above 0" if split == "test" and self.test_fraction == 0 else ""
            raise UserError(
                f"data.source {self.source} has no {split} images here, but {there}; set data.eval_split to one of "
                f"these{fraction}, or add a {split} folder with class folders in it"
            )
        dataset = self._dataset(samples, self.eval_transform, split, on_unreadable)
        sampler = ShardSampler(dataset, *self._replicas_and_rank())
        return self._loader(dataset, sampler, self.eval_batch_size)

    def _loader(self, dataset: ImageDataset, sampler: Sampler, batch_size: int) -> ImageLoader:
        trainer = None if self.trainer is None or self.trainer.strategy.root_device.type == "cpu" else self.trainer
        workers = self.num_workers
        if workers is None:
            in_memory = isinstance(dataset.samples[0][0], np.ndarray)
            workers = 0 if trainer is None or in_memory else _share_of_processors(trainer)
        pin = trainer is not None
        loader = image_loader(dataset, sampler, batch_size, self.image_size, workers, pin)
        self._loaders.append(loader)
        return loader

    def teardown(self, stage: str) -> None:
        """End the worker processes, which wait between epochs."""
        while self._loaders:
            self._loaders.pop().close()

    def _replicas_and_rank(self) -> tuple[int, int]:
        """Over how many data-parallel processes images are shared out, and which of them this is."""
        if self.trainer is None:
            return 1, 0
        # With tensor parallelism several processes share their images, which the strategy knows.
        sharding = getattr(self.trainer, "distributed_sampler_kwargs", None)
        if sharding is None:
            return self.trainer.world_size, self.trainer.global_rank
        return sharding["num_replicas"], sharding["rank"]


def _share_of_processors(trainer: lightning.Trainer) -> int:
    """Workers for one of the processes that train on this machine, beside itself."""
    processes = max(1, trainer.world_size // trainer.num_nodes)
    return max(1, min(_MOST_WORKERS, processors() // processes - 1))


def _at_least(argument: str, value: int, smallest: int) -> int:
    if value < smallest:
        raise UserError(f"data.{argument} is {value}; expected a whole number of at least {smallest}")
    return value


def _require_fractions(val_fraction: float, test_fraction: float) -> None:
    if not 0 < val_fraction < 1:
        raise UserError(f"data.val_fraction is {val_fraction}; expected a share above 0 and below 1")
    if not 0 <= test_fraction < 1:
        raise UserError(f"data.test_fraction is {test_fraction}; expected a share of at least 0 and below 1")
    if val_fraction + test_fraction >= 1:
        raise UserError(
            f"data.val_fraction {val_fraction} and data.test_fraction {test_fraction} leave nothing to train "
            "on; expected a sum below 1"
        )


class DataToCheck(ImageDataModule):
    """Data whose files may be missing: `check-data` finds out which."""

    def _require_files(self, splits: Splits) -> None:
        pass
