"""The names of classes and the templates of prompts that a recipe names: files, or lists that packages have.

Nothing here loads torch but `class_names` of ImageNet, through timm, and the lists of OpenCLIP.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clipcluster.data.shards import captions
from clipcluster.errors import UserError

PLACEHOLDER = "{c}"
OPENAI = "openai"
IMAGENET = {"imagenet-1k": 1000, "imagenet-12k": 11821, "imagenet-22k": 21841}
"""Sets whose names timm has, and how many classes each has."""
TEMPLATES = {OPENAI: "OPENAI_IMAGENET_TEMPLATES", "openai-7": "SIMPLE_IMAGENET_TEMPLATES"}
"""OpenAI's templates for ImageNet, all 80 and the 7 of its notebook, by their names in OpenCLIP."""


def class_names(given: str) -> list[str]:
    """The names of classes 0, 1, … by `classnames` of a recipe: the lines of a file, or a list by name.

    `imagenet-…`: timm's, the first of WordNet's words for a class. `openai`: those that CLIP was published
    with, for ImageNet-1K. Raises UserError for another name, an unreadable file, a missing package.
    """
    if given in IMAGENET:
        from timm.data import ImageNetInfo

        return [words.partition(",")[0].strip() for words in ImageNetInfo(given).label_descriptions()]
    if given == OPENAI:
        return list(_open_clip("IMAGENET_CLASSNAMES"))
    return captions.class_names(_file("class names", given, (OPENAI, *IMAGENET)), given)


def templates(given: str) -> list[str]:
    """The templates by `templates` of a recipe: the lines of a file, or a list of OpenAI's by name.

    Raises UserError for another name, an unreadable file, a missing package, a template without `{c}`.
    """
    if given in TEMPLATES:
        return [template(PLACEHOLDER) for template in _open_clip(TEMPLATES[given])]
    lines = captions.templates(_file("templates", given, TEMPLATES), given)
    check_templates(lines, given)
    return lines


def check_templates(lines: Sequence[str], where: object) -> None:
    """UserError where a template has no place for the class name."""
    without = [template for template in lines if PLACEHOLDER not in template]
    if without:
        raise UserError(f"{where}: a template has no {PLACEHOLDER} for the class name: {without[0]!r}")


def count_of(given: str) -> int:
    """How many classes `classnames` has, without torch. Raises UserError as `class_names`."""
    if given == OPENAI:
        _require_open_clip()
        return IMAGENET["imagenet-1k"]
    return IMAGENET.get(given) or len(class_names(given))


def check_count(given: str, count: int, own: Sequence[str] | None) -> None:
    """UserError unless `classnames` has as many classes as a set's own classnames.txt (None: no file)."""
    if own is not None and len(own) != count:
        raise UserError(
            f"classnames: {given} names {count:,} classes, and the {captions.CLASS_NAMES} of the shards "
            f"{len(own):,}; give one name for each of these, in their order"
        )


def check_named(given: str) -> None:
    """Check `templates` without torch. Raises UserError as `templates`."""
    if given in TEMPLATES:
        _require_open_clip()
    else:
        templates(given)


def _file(what: str, given: str, names: Sequence[str] | dict[str, str]) -> bytes:
    try:
        return Path(given).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise UserError(
            f"{given}: no such file of {what}; give a file with one per line, or {', '.join(names)}"
        ) from error
    except OSError as error:
        raise UserError(f"{given}: the {what} cannot be read: {error.strerror}") from error


def _require_open_clip() -> None:
    if importlib.util.find_spec("open_clip") is None:
        raise UserError(
            "OpenAI's class names and templates are those in OpenCLIP, which is not installed: pip install "
            "open_clip_torch, or give a file with one per line"
        )


def _open_clip(name: str) -> Any:
    _require_open_clip()
    import open_clip

    return getattr(open_clip, name)
