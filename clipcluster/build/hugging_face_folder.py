"""The recipe that builds and feeds a dual encoder from a folder in Hugging Face's layout."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from clipcluster.errors import UserError
from clipcluster.model.hugging_face import config_of, refusing
from clipcluster.model.towers import text_positions
from clipcluster.runs.files import read_object

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
_INTERPOLATION = {2: "bilinear", 3: "bicubic"}  # by Pillow's numbers
_LONGEST = 128
"""Tokens of a caption at most, where a text tower takes more: nearly all would be padding."""
_CHINESE_CLIP = 52
"""Tokens that Chinese-CLIP was trained with; its configuration has the 512 positions of BERT."""
_NO_LIMIT = 1_000_000  # transformers writes a larger number for a tokenizer without a limit


def recipe_of(folder: Path) -> dict[str, Any]:
    """The sections `data`, `model` and `loss` of a recipe for the model of a folder.

    Image size, resizing and normalisation are those of its preprocessor_config.json (or
    processor_config.json), with the defaults of its class; the tokenizer is the folder's own, its
    context length what tower and tokenizer allow, at most 128 tokens. Raises UserError where a file is
    missing, and for preprocessing that is not supported here.
    """
    settings, _ = config_of("model.dual", str(folder), None)
    siglip = settings.model_type == "siglip"
    return {
        "data": {
            "image": _image(folder),
            "text": {"tokenizer": str(folder), "context_length": _context_length(settings, folder)},
        },
        "model": {
            "dual": {"hf": str(folder), "weights": "pretrained"},
            "logit_bias": {} if siglip else None,
        },
        "loss": {"name": "siglip" if siglip else "clip"},
    }


def _context_length(settings: Any, folder: Path) -> int:
    """The tokens of a caption: the text tower's positions, or fewer where the tokenizer's limit is lower."""
    kind, positions = settings.model_type, text_positions(getattr(settings, "text_config", None))
    if kind == "siglip" and positions:  # its captions are padded to all of them
        return positions
    limit = (read_object(folder / "tokenizer_config.json") or {}).get("model_max_length")
    if isinstance(limit, int) and 2 <= limit < (positions or _NO_LIMIT):
        return limit
    if kind == "chinese_clip":
        return _CHINESE_CLIP
    return min(positions or _LONGEST, _LONGEST)


def _image(folder: Path) -> dict[str, Any]:
    """The section `data.image` of what the folder's processor does."""
    from transformers import AutoImageProcessor

    if not any((folder / name).is_file() for name in PROCESSOR_FILES):
        raise UserError(
            f"{folder} has no {PROCESSOR_FILES[0]}, which says how images are resized and normalised; save "
            "the model's processor into the same folder."
        )
    with refusing(f"The image processor of {folder} cannot be read"):
        does = AutoImageProcessor.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)

    def refuse(what: str) -> UserError:
        return UserError(f"{folder}: its image processor {what}, which is not supported here.")

    if not getattr(does, "do_resize", False):
        raise refuse("does not resize images")
    if not getattr(does, "do_rescale", True) or not math.isclose(does.rescale_factor, 1 / 255):
        raise refuse("does not scale pixels to the range from 0 to 1")
    if int(does.resample) not in _INTERPOLATION:
        raise refuse(
            f"resizes by Pillow's interpolation {int(does.resample)} (bilinear and bicubic are known)"
        )
    resized = dict(does.size)
    crop = dict(does.crop_size) if getattr(does, "do_center_crop", False) else {}
    squash = "height" in resized
    sides = {resized.get(name, 0) for name in (("height", "width") if squash else ("shortest_edge",))}
    (side, *others), kept = sides, set(crop.values()) or sides
    (size, *more) = kept
    if others or more or not side or not (squash or crop) or "longest_edge" in resized:
        raise refuse(f"resizes to {resized}{f' and crops to {crop}' if crop else ''}, not to a square")
    if size > side:
        raise refuse(f"pads images from {side} to {size} pixels")
    normal = getattr(does, "do_normalize", False)
    return {
        "size": size,
        "interpolation": _INTERPOLATION[int(does.resample)],
        "evaluation": {"resize": "squash" if squash else "shortest", "crop_pct": crop_pct(size, side)},
        "mean": list(does.image_mean) if normal else [0.0, 0.0, 0.0],
        "std": list(does.image_std) if normal else [1.0, 1.0, 1.0],
    }


def crop_pct(size: int, side: int) -> float:
    """The largest fraction with floor(size / fraction) == side, for size <= side in pixels."""
    fraction = size / side
    while math.floor(size / fraction) < side:  # by the rounding of the two divisions
        fraction = math.nextafter(fraction, 0.0)
    return fraction
