"""The one LightningDataModule: a source's splits, the backbone's transforms, and who sees which image.

Training shuffles by seed and epoch alone: in step k, one process with a batch of 2 B and two processes with
batches of B see the same images. Evaluation covers each image exactly once over all processes.
"""

from pathlib import Path
from typing import Literal, get_args

import lightning
from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DistributedSampler, Sampler

from snell_lightning.adapters.errors import UserError
from snell_lightning.backbones import EMBEDDED_BACKBONE
from snell_lightning.data.dataset import ImageDataset, ImageLoader, image_loader
from snell_lightning.data.digits import digits
from snell_lightning.data.folder import folder
from snell_lightning.data.samplers import ShardSampler
from snell_lightning.data.splits import Source
from snell_lightning.data.transforms import (
    Augmentation,
    Normalization,
    NormalizationName,
    build_transforms,
    require_choice,
)

SOURCES: dict[str, Source] = {"digits": digits, "folder": folder}
"""Every source by the name that `data.source` takes."""

OnBadImage = Literal["error", "skip"]


class ImageDataModule(lightning.LightningDataModule):
    """Images and labels for fitting, validation, testing and prediction.

    Batches are `(images, labels)` of shapes `(batch, 3, image_size, image_size)`, float32, and `(batch,)`,
    int64. With `on_bad_image: skip` a batch may be shorter than asked for, or empty.

    Args:
        source: Where images come from: `digits` (1,797 handwritten digits that need no download) or `folder`
            (image files in one folder per class).
        root: The folder with the images, for sources that read files. For `folder` it holds train/CLASS/IMAGE
            with val and test beside train, or CLASS/IMAGE.
        backbone: timm name of the backbone, whose own configuration gives image size, normalisation and
            centre crop.
        batch_size: Training images per batch and process, at least 1.
        eval_batch_size: Images per batch and process in validation, testing and prediction, at least 1; the
            training batch size if not given.
        num_workers: Worker processes per loader; 0 loads images in the main process.
        image_size: Height and width of the images given to the backbone, in pixels; the backbone's own if not
            given.
        normalization: `auto` (the backbone's own mean and standard deviation), `imagenet`, `inception` (0.5
            and 0.5) or `none` (pixels stay in [0, 1]).
        augmentation: `crop` (random crops of 0.08 to 1 of the area and horizontal flips; centre crop in
            evaluation), `light` (random crops of 0.8 to 1, no flips; whole image in evaluation) or `none`
            (the whole image resized to a square, in training too: the VTAB protocol).
        val_fraction: Share of the images split off for validation where the source has no validation split of
            its own, above 0 and below 1.
        test_fraction: Share of the images split off for testing where the source has no splits of its own, at
            least 0 and below 1.
        seed: Seed of the splits and of the order of training images.
        on_bad_image: What to do about an image that cannot be read: `error` stops with its path, `skip`
            leaves it out of its batch and reports the count after each pass.

    Raises:
        UserError: An argument is out of range or unknown, or the source's images are not as expected.
    """

    def __init__(
        self,
        source: str = "digits",
        root: str | None = None,
        backbone: str = EMBEDDED_BACKBONE,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        image_size: int | None = None,
        normalization: NormalizationName = "auto",
        augmentation: Augmentation = "crop",
        val_fraction: float = 0.15,
        test_fraction: float = 0.25,
        seed: int = 0,
        on_bad_image: OnBadImage = "error",
    ) -> None:
        super().__init__()
        require_choice("source", source, tuple(SOURCES))
        require_choice("on_bad_image", on_bad_image, get_args(OnBadImage))
        _require_fractions(val_fraction, test_fraction)
        self.source = source
        self.batch_size = _at_least("batch_size", batch_size, 1)
        self.eval_batch_size = _at_least(
            "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size, 1
        )
        self.num_workers = _at_least("num_workers", num_workers, 0)
        self.seed = _at_least("seed", seed, 0)
        self.skip_unreadable = on_bad_image == "skip"
        # Imported here for timm's sake: the command line needs this class to print a help text or to refuse a config.
        from snell_lightning.backbones import data_config

        config = data_config(backbone)
        self.image_size = _image_size(backbone, config["input_size"], image_size)
        self.normalization = Normalization.resolve(normalization, config)
        self.train_transform, self.eval_transform = build_transforms(
            config, augmentation, normalization, self.image_size
        )
        self.splits = SOURCES[source](Path(root) if root is not None else None, val_fraction, test_fraction, seed)

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""
        return self.splits.classes

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of each channel that is subtracted from pixels in [0, 1]."""
        return self.normalization.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of each channel that pixels in [0, 1] are divided by."""
        return self.normalization.std

    def setup(self, stage: str) -> None:
        """Print what is trained on, once, on the first process."""
        if stage == "fit":
            rank_zero_info(self.describe())

    def describe(self) -> str:
        """Source, sizes, classes and normalisation in one line."""
        splits = self.splits
        mean, std = (" ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        return (
            f"data: {self.source}, {len(splits.train)} train / {len(splits.val)} val / "
            f"{len(splits.test)} test images, {self.num_classes} classes, "
            f"{self.image_size} x {self.image_size} pixels, "
            f"normalisation {self.normalization.name} (mean {mean}, std {std})"
        )

    def train_dataloader(self) -> ImageLoader:
        """This process's share of the training images, shuffled by seed and epoch."""
        dataset = ImageDataset(
            self.splits.train, self.splits.open_image, self.train_transform, "train", self.skip_unreadable
        )
        replicas, rank = self._replicas_and_rank()
        # Also for a single process, so that the order does not depend on how many there are.
        sampler: Sampler = DistributedSampler(dataset, replicas, rank, shuffle=True, seed=self.seed)
        return image_loader(dataset, sampler, self.batch_size, self.image_size, self.num_workers)

    def val_dataloader(self) -> ImageLoader:
        """This process's share of the validation images.

        Raises:
            UserError: There are none.
        """
        return self._eval_loader("val")

    def test_dataloader(self) -> ImageLoader:
        """This process's share of the test images.

        Raises:
            UserError: There are none.
        """
        return self._eval_loader("test")

    def predict_dataloader(self) -> ImageLoader:
        """This process's share of the test images; none is skipped, so that each prediction finds its image.

        Raises:
            UserError: There are none.
        """
        loader = self._eval_loader("test")
        loader.dataset.skip_unreadable = False
        return loader

    def _eval_loader(self, split: Literal["val", "test"]) -> ImageLoader:
        samples = self.splits.val if split == "val" else self.splits.test
        if not samples:
            raise UserError(
                f"data.source {self.source} has no {split} images here; add a {split} folder with the class "
                f"folders in it, or set data.{split}_fraction above 0 where the source is split by fractions"
            )
        dataset = ImageDataset(samples, self.splits.open_image, self.eval_transform, split, self.skip_unreadable)
        sampler = ShardSampler(dataset, *self._replicas_and_rank())
        return image_loader(dataset, sampler, self.eval_batch_size, self.image_size, self.num_workers)

    def _replicas_and_rank(self) -> tuple[int, int]:
        """Over how many data-parallel processes images are shared out, and which of them this is."""
        if self.trainer is None:
            return 1, 0
        # With tensor parallelism several processes share their images, which the strategy knows.
        sharding = getattr(self.trainer, "distributed_sampler_kwargs", None)
        if sharding is None:
            return self.trainer.world_size, self.trainer.global_rank
        return sharding["num_replicas"], sharding["rank"]


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


def _image_size(backbone: str, input_size: tuple[int, int, int], image_size: int | None) -> int:
    """The size asked for, or else the backbone's own."""
    if image_size is not None:
        return _at_least("image_size", image_size, 1)
    _, height, width = input_size
    if height != width:
        raise UserError(
            f"backbone {backbone!r} expects images of {height} x {width} pixels, and only squares are "
            "supported; set data.image_size if it takes other sizes"
        )
    return height
