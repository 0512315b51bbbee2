"""A dual encoder as a folder of OpenCLIP's: `open_clip.create_model_and_transforms("local-dir:FOLDER")`."""

from __future__ import annotations

import shutil
from copy import copy
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from clipcluster.build.open_clip_folder import CONFIG, VOCABULARY
from clipcluster.build.opened import Opened
from clipcluster.data.tokenizer import ClipTokenizer
from clipcluster.errors import UserError
from clipcluster.export.compare import compare
from clipcluster.export.open_clip_config import config_of
from clipcluster.export.preprocessing import write_tokenizer
from clipcluster.model.hugging_face import refusing
from clipcluster.model.layouts import as_open_clip
from clipcluster.model.weight_files import OPEN_CLIP_FILES
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.files import write_json


def export_open_clip(opened: Opened, folder: Path, final: Path | None = None) -> None:
    """Write configuration, weights and tokenizer into a folder that exists.

    CLIP's own tokenizer is built into OpenCLIP; its vocabulary is copied, so that the folder can be read here
    without OpenCLIP. Any other becomes one of Hugging Face's. Of a text tower of transformers the
    configuration is written too: OpenCLIP looks for it on its own, at `hf_model_name`, which is then `final`,
    where the folder will lie (default: where it is), unless the recipe has a hub's name. The comparison reads
    the configuration that was written, and no hub.

    Raises UserError, by key, for what OpenCLIP has not.
    """
    recipe, model, tokenizer = opened.recipe, opened.model, opened.tokenizer
    if not TASKS[recipe.task].captions:
        raise UserError(
            f"task: {recipe.task} trains no dual encoder, which OpenCLIP's models are; choose --format "
            "safetensors or onnx."
        )
    assert tokenizer is not None
    document = config_of(recipe, model, tokenizer)
    text = document["model_cfg"]["text_cfg"]
    if isinstance(tokenizer, ClipTokenizer):
        shutil.copyfile(recipe.data.text.tokenizer, folder / VOCABULARY)
    else:
        plain: Any = copy(tokenizer)
        plain.clean = "none"  # OpenCLIP cleans captions itself, by `tokenizer_kwargs`
        write_tokenizer(replace(opened, tokenizer=plain), folder)
    if "hf_model_name" in text:
        model.text.transformer.config.save_pretrained(str(folder))
        text["hf_model_name"] = str(folder.resolve())
    state = as_open_clip(model, document["model_cfg"])
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / OPEN_CLIP_FILES[0], metadata={"format": "pt"})
    write_json(folder / CONFIG, document)
    if find_spec("open_clip") is not None:
        _check_features(opened, folder)
    if "hf_model_name" in text:
        named = getattr(recipe.model.text, "hf", "")
        on_a_hub = named and not Path(named).exists()
        text["hf_model_name"] = named if on_a_hub else str((final or folder).resolve())
        write_json(folder / CONFIG, document)


def _check_features(opened: Opened, folder: Path) -> None:
    """UserError where OpenCLIP, without which the export works too, computes other features from it."""
    import open_clip

    with refusing("OpenCLIP cannot read the export"):
        theirs = open_clip.create_model(f"local-dir:{folder}", require_pretrained=True).eval()
    compare(
        opened,
        "OpenCLIP's model",
        lambda pixels: theirs.encode_image(pixels, normalize=True),
        lambda tokens, _: theirs.encode_text(tokens, normalize=True),
    )
