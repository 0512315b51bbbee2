"""Captions to tokens: a byte-level tokenizer that needs no file, and any tokenizer of Hugging Face."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from clipcluster.errors import UserError


class Tokenizer(Protocol):
    """What the loader and the text tower need of a tokenizer."""

    vocab_size: int
    pad_id: int
    eos_id: int
    context_length: int

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (B, L) int64, padded with `pad_id`, and a mask (B, L) bool: True where a token is real.

        A text that is too long is cut before its end token, which stays. No row of the mask is all False.
        """


class ByteTokenizer:
    """UTF-8 bytes as tokens: ids 0 to 255 are the bytes, 256 begins, 257 ends, 258 pads (vocabulary: 259)."""

    vocab_size = 259
    bos_id = 256
    eos_id = 257
    pad_id = 258

    def __init__(self, context_length: int) -> None:
        self.context_length = context_length

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        limit = self.context_length - 2
        return _padded(
            [[self.bos_id, *text.encode("utf-8", "replace")[:limit], self.eos_id] for text in texts],
            self.context_length,
            self.pad_id,
        )


class HuggingFaceTokenizer:
    """A tokenizer of transformers, with its own special tokens.

    One that closes its texts with no end token (GPT-2) gets it appended; one without a pad token pads with
    the end token, and the mask tells which tokens are real.
    """

    def __init__(self, tokenizer: Any, context_length: int) -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.modules = (type(tokenizer).__module__,)  # heavy: loaded once for all of the loader's workers
        self.vocab_size = len(tokenizer)
        end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        if pad is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has neither a pad nor an end token; choose another"
            )
        self.pad_id = int(pad)
        self.eos_id = int(pad if end is None else end)
        empty = tokenizer("")["input_ids"]
        closes = bool(empty) and empty[-1] in (end, tokenizer.sep_token_id)
        self._appended = [] if closes or end is None else [self.eos_id]
        tokenizer.model_max_length = int(1e9)  # longer texts are cut below, without a warning

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        limit = self.context_length - len(self._appended)
        rows = self.tokenizer(list(texts), truncation=True, max_length=limit)["input_ids"]
        return _padded(
            [(row + self._appended) or [self.pad_id] for row in rows], self.context_length, self.pad_id
        )


def load_tokenizer(text: Any, assets: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a recipe's `data.text` section.

    `text.tokenizer` is `bytes`, a folder, or a name on a hub: then `asset_folder(assets, name)` is read if
    it is there, else Hugging Face's own cache. UserError if there is no such tokenizer.
    """
    name = str(text.tokenizer)
    if name == "bytes":
        return ByteTokenizer(text.context_length)
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallel part
    stored = asset_folder(assets, name) if assets is not None else None
    source = str(stored) if stored is not None and stored.is_dir() else name
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=Path(source).is_dir())
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and the hub's own
        raise UserError(
            f"tokenizer {name!r} cannot be loaded ({' '.join(str(error).split())[:200]}); give bytes, a "
            "folder with tokenizer files, or a name on the Hugging Face hub that was fetched before"
        ) from None
    return HuggingFaceTokenizer(tokenizer, text.context_length)


def asset_folder(assets: str | Path, name: str) -> Path:
    """Where the files of a hub name lie in a run's assets: `assets/ORG--NAME`."""
    return Path(assets) / name.replace("/", "--")


def _padded(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), bool)
    for at, row in enumerate(rows):
        tokens[at, : len(row)] = row
        mask[at, : len(row)] = True
    return torch.from_numpy(tokens), torch.from_numpy(mask)
