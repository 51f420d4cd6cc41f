"""Create a timm backbone, and say clearly what is wrong when that cannot be done.

timm falls back to random weights with no more than a log line when a model has no pretrained weights; here that is an
error, as is a hub that cannot be reached.
"""

import difflib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants as hub
from huggingface_hub.utils import get_session
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, is_model, parse_model_name
from timm.models._hub import load_model_config_from_hf, load_model_config_from_path
from torch import nn

from snell_lightning.adapters.errors import UserError
from snell_lightning.backbones.embedded import EMBEDDED_BACKBONE  # and registers it with timm
from snell_lightning.backbones.published import load_weights
from snell_lightning.backbones.resample import fit
from snell_lightning.backbones.sizes import ImageSize, as_size, pixels, sides, sizes_near, takes

_OFFLINE_CHOICES = (
    f"offline choices: the embedded backbone {EMBEDDED_BACKBONE}, a timm checkpoint folder as local-dir:PATH, "
    "or a hub cache filled on a connected machine (HF_HOME)"
)


def create_backbone(
    name: str,
    num_classes: int,
    pretrained: bool = True,
    image_size: ImageSize | None = None,
    weights: str | Path | None = None,
    **arguments: Any,
) -> nn.Module:
    """Create a timm model with a fresh classifier.

    Args:
        name: A timm model name (`vit_base_patch16_224.augreg_in21k`), `hf-hub:ORG/NAME`, `local-dir:PATH`, or the
            embedded backbone's name.
        num_classes: Outputs of the classifier, at least 1.
        pretrained: Load the pretrained weights; `False` starts from random ones.
        image_size: The images it is to take, in pixels; its own if not given. Position embeddings and tables are
            resampled for it. `require_image_size` tells whether that was enough.
        weights: A file of published weights, or a folder with one, to load in the place of timm's own: in any form that
            `published.load_weights` takes. The name says the architecture.
        **arguments: Passed on to `timm.create_model`, for example `drop_path_rate`.

    Raises:
        UserError: The name is unknown, has no pretrained weights though they were asked for, the weights cannot be
            had or do not fit the model or the image size, or an argument does not fit the model.
    """
    image_size = None if image_size is None else as_size(image_size)
    if weights is not None:
        if not pretrained:
            raise UserError(f"pretrained is false, and weights names {weights}; leave one of them out")
        model: Any = create_backbone(name, num_classes, False, image_size, **arguments)
        # Beside timm's own `pretrained_cfg`, for whoever wants to say where the weights are from.
        model.loaded_weights = load_weights(model, weights, name)
        return model
    config = _pretrained_config(name)
    if pretrained and not _has_weights(config):
        raise UserError(
            f"backbone {name!r} has no pretrained weights in timm; name one that has, such as "
            f"{_with_weights(name)}, or ask for random weights with pretrained: false"
        )
    resized = _resized(config, image_size, arguments)
    try:
        with _hub_or_cache(pretrained and not config.get("file") and config.get("source") != "local-dir"):
            return _made(name, pretrained, num_classes, arguments, resized)
    except TypeError as error:
        raise UserError(f"backbone {name!r} does not take these arguments {sorted(arguments)}: {error}") from error
    except Exception as error:
        if pretrained and _is_download_failure(error):
            raise UserError(
                f"the pretrained weights of {name!r} are not in the cache and the hub cannot be reached; "
                f"{_OFFLINE_CHOICES}"
            ) from error
        if isinstance(error, UserError) or not (resized or arguments):
            raise
        if resized:
            raise UserError(_other_size(name, image_size, error, arguments)) from error
        raise UserError(f"backbone {name!r} cannot be made with {arguments}: {_first_line(error)}") from error


def _made(
    name: str, pretrained: bool, num_classes: int, arguments: dict[str, Any], resized: dict[str, Any]
) -> nn.Module:
    """The model as timm makes it, and where it cannot do so for the size of the images, in another way."""
    try:
        return timm.create_model(name, pretrained, num_classes=num_classes, **arguments, **resized)
    except TypeError as error:
        if not resized or "img_size" not in str(error):
            raise
        # A model of this kind takes any size as it is, or none but its own.
        return timm.create_model(name, pretrained, num_classes=num_classes, **arguments)
    except RuntimeError as error:
        if not (pretrained and resized and "size mismatch" in str(error)):
            raise
        # timm does not resample what this family has.
        own = timm.create_model(name, True, num_classes=num_classes, **arguments)
        model = timm.create_model(name, False, num_classes=num_classes, **arguments, **resized)
        model.load_state_dict(fit(own.state_dict(), model))
        return model


def require_image_size(name: str, model: nn.Module, image_size: ImageSize) -> None:
    """Raise unless a backbone takes images of that size; where it is its own, nothing is run to find out.

    Raises:
        UserError: It does not.
    """
    # What the model itself carries: a look-up by name may ask the hub once more.
    known: Any = model.pretrained_cfg
    if tuple(known["input_size"][1:]) != sides(image_size) and (error := takes(model, image_size)):
        raise UserError(_other_size(name, image_size, error, {})) from error


def _resized(config: dict[str, Any], image_size: ImageSize | None, arguments: dict[str, Any]) -> dict[str, Any]:
    """The argument that gives a model of fixed image size another one."""
    own = tuple(config.get("input_size") or ())[1:]
    if image_size is None or own == sides(image_size) or "img_size" in arguments:
        return {}
    # timm takes a square's side as one number, in some families as nothing else.
    return {"img_size": image_size} if config.get("fixed_input_size") else {}


def _other_size(name: str, image_size: ImageSize | None, error: BaseException, arguments: dict[str, Any]) -> str:
    assert image_size is not None
    config, own = _pretrained_config(name), data_config(name)["input_size"][1:]
    near = sizes_near(image_size, lambda size: _made(name, False, 1, arguments, _resized(config, size, arguments)))
    advice = f"take {' or '.join(map(pixels, near))}, or leave" if near else "leave"
    reason = f" ({_first_line(error)})" if str(error).strip() else ""
    return (
        f"backbone {name!r} does not take images of {pixels(image_size)} pixels{reason}; {advice} data.image_size out "
        f"for its own {pixels(own)}"
    )


def data_config(name: str) -> dict[str, Any]:
    """What the backbone expects of its images, without creating it.

    Returns:
        `input_size` (3, height, width), `mean` and `std` (three floats each), `interpolation`, `crop_pct`.

    Raises:
        UserError: The name is unknown.
    """
    resolved = resolve_data_config(pretrained_cfg=_pretrained_config(name))
    chosen = {key: resolved[key] for key in ("input_size", "mean", "std", "interpolation", "crop_pct")}
    # A description that was read from JSON has lists.
    return {key: tuple(value) if isinstance(value, list) else value for key, value in chosen.items()}


@contextmanager
def _hub_or_cache(needed: bool) -> Iterator[None]:
    """Look for the hub once, and use its cache alone where it does not answer, instead of minutes of retries."""
    if not needed or hub.HF_HUB_OFFLINE:
        yield
        return
    try:
        get_session().head(hub.ENDPOINT, timeout=10)
    except Exception:
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = False


def _pretrained_config(name: str) -> dict[str, Any]:
    """What timm says of a pretrained model, for a name in any of the forms that `create_backbone` takes."""
    try:
        scheme, identifier = parse_model_name(name)
    except (ValueError, AssertionError) as error:
        raise UserError(f"backbone {name!r} is not a model name: {error}") from error
    if scheme in ("hf-hub", "local-dir"):
        load = load_model_config_from_hf if scheme == "hf-hub" else load_model_config_from_path
        try:
            with _hub_or_cache(scheme == "hf-hub"):
                config, *_ = load(identifier)
        except Exception as error:
            raise UserError(f"backbone {name!r} cannot be read ({_first_line(error)}); {_OFFLINE_CHOICES}") from error
        return dict(config)
    if not is_model(identifier):
        raise UserError(f"there is no backbone {name!r} in timm; {_nearest(identifier)}")
    config = get_pretrained_cfg(identifier, allow_unregistered=False) if _known_tag(identifier) else None
    if config is None:
        tags = timm.list_pretrained(f"{identifier.split('.')[0]}.*")
        raise UserError(f"backbone {name!r} has no such pretrained tag; timm has {', '.join(tags) or 'none'}")
    return dict(config.to_dict())


def _known_tag(identifier: str) -> bool:
    architecture, _, tag = identifier.partition(".")
    return not tag or identifier in timm.list_models(f"{architecture}.*", include_tags=True)


def _has_weights(config: dict[str, Any]) -> bool:
    return any(config.get(key) for key in ("url", "file", "hf_hub_id", "state_dict")) or config.get("source") in (
        "hf-hub",
        "local-dir",
    )


def _with_weights(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_pretrained(), n=2, cutoff=0.5)
    return " or ".join(near) or EMBEDDED_BACKBONE


def _nearest(identifier: str) -> str:
    names = timm.list_models()
    near = difflib.get_close_matches(identifier.split(".")[0], names, n=3, cutoff=0.6)
    if near:
        return f"did you mean {', '.join(near)}?"
    return f"see timm.list_models() for the {len(names)} names"


def _is_download_failure(error: BaseException) -> bool:
    """Whether an error, or what caused it, came from the network or from the hub's client."""
    seen: BaseException | None = error
    while seen is not None:
        module = type(seen).__module__.split(".")[0]
        if isinstance(seen, OSError) or module in {
            "huggingface_hub",
            "requests",
            "httpx",
            "urllib3",
            "urllib",
        }:
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
