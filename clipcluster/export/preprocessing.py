"""A model's image processor and tokenizer as transformers' files."""

from __future__ import annotations

import json
import math
from copy import deepcopy
from pathlib import Path
from typing import Any

from clipcluster.build.opened import Opened
from clipcluster.data.images.transforms import evaluation_transform
from clipcluster.data.tokenizer import (
    ByteTokenizer,
    ClipTokenizer,
    HuggingFaceTokenizer,
    letters_of_bytes,
)
from clipcluster.errors import UserError
from clipcluster.export.compare import CAPTIONS
from clipcluster.runs.files import write_json

PROCESSOR = "preprocessor_config.json"
_RESAMPLE = {"bilinear": 2, "bicubic": 3}  # Pillow's numbers
_INPUTS = ["input_ids", "attention_mask"]
_START, _END, _PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"  # as transformers' CLIP has the first two


def write_image_processor(opened: Opened, folder: Path, processor: str = "CLIPProcessor") -> None:
    """`preprocessor_config.json`: size, crop, mean, std and interpolation of evaluation's images.

    processor: the class of the whole model's processor. Read with `backend="pil"`, the image processor
    resizes with Pillow, as evaluation does here.
    """
    image = opened.recipe.data.image
    rule = evaluation_transform(image)
    side = math.floor(rule.size / rule.crop_pct)
    values = {
        "processor_class": processor,
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side} if rule.squash else {"shortest_edge": side},
        "resample": _RESAMPLE[rule.interpolation.value],
        "do_center_crop": True,
        "crop_size": {"height": rule.size, "width": rule.size},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image.mean),
        "image_std": list(image.std),
    }
    write_json(folder / PROCESSOR, values)


def write_tokenizer(opened: Opened, folder: Path, *, masked: bool = True) -> None:
    """The tokenizer's files; with `padding="max_length", truncation=True` it gives the model's own tokens.

    masked: whether it gives an attention mask; a SigLIP attends to padding. Raises UserError where
    transformers reads other tokens from the files.
    """
    from transformers import AutoTokenizer

    own = opened.tokenizer
    if isinstance(own, ClipTokenizer):
        _write_clip(own, folder)
        theirs = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    elif isinstance(own, ByteTokenizer):
        theirs = _bytes(own)
    else:
        assert isinstance(own, HuggingFaceTokenizer)
        theirs = _closing(own)
    theirs.model_max_length, theirs.padding_side = own.context_length, "right"
    if not masked:
        theirs.model_input_names = ["input_ids"]
    theirs.save_pretrained(str(folder))
    _check_tokens(own, AutoTokenizer.from_pretrained(str(folder), local_files_only=True))


def _write_clip(own: ClipTokenizer, folder: Path) -> None:
    """CLIP's vocabulary with its two special tokens, and its merges, for transformers' CLIPTokenizer."""
    own.save_vocabulary(folder)
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    vocabulary |= {_START: own.bos_id, _END: own.eos_id}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    special = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    write_json(folder / "special_tokens_map.json", special)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", **special, "model_max_length": own.context_length},
    )


def _bytes(own: ByteTokenizer) -> Any:
    """Every byte a token by itself; the special ones follow them, with the same ids."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE({letter: byte for byte, letter in enumerate(letters_of_bytes())}, []))
    backend.add_special_tokens([_START, _END, _PAD])  # 256, 257, 258
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    ends = [(_START, own.bos_id), (_END, own.eos_id)]
    backend.post_processor = processors.TemplateProcessing(single=[_START, "$A", _END], special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=_START, eos_token=_END, pad_token=_PAD, model_input_names=_INPUTS
    )


def _closing(own: HuggingFaceTokenizer) -> Any:
    """The tokenizer, closing its texts and padding them as the model was trained with."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    theirs = deepcopy(own.tokenizer)
    end = theirs.convert_ids_to_tokens(own.eos_id)
    if theirs.pad_token is None:
        theirs.pad_token = end
    if not own.appended:
        return theirs
    backend = deepcopy(theirs.backend_tokenizer)
    backend.post_processor = processors.TemplateProcessing(
        single=["$A", end], special_tokens=[(end, own.eos_id)]
    )
    special = {"eos_token": end, "pad_token": theirs.pad_token}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special, model_input_names=_INPUTS)


def _check_tokens(own: Any, theirs: Any) -> None:
    """Padding may have another id where it is not attended to."""
    tokens, mask = own(CAPTIONS)
    how = {"padding": "max_length", "truncation": True, "max_length": own.context_length}
    found = theirs(list(CAPTIONS), **how, return_attention_mask=True, return_tensors="pt")
    real = found["attention_mask"].bool()
    if not (real.equal(mask) and found["input_ids"][real].equal(tokens[mask])):
        raise UserError(
            f"data.text.tokenizer: transformers reads other tokens from the files of this "
            f"{type(theirs).__name__} than the model was trained with, so that it cannot be exported."
        )
