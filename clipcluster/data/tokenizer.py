"""Tokenizers: bytes, which need no file; CLIP's; any tokenizer of Hugging Face."""

import gzip
import html
import os
import string
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from clipcluster.errors import UserError
from clipcluster.text import did_you_mean


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


# OpenAI's vocabulary: 256 bytes, the same at the end of a word, 48,894 merges, start and end token.
CLIP_MERGES = 49152 - 256 - 2
# CLIP's pattern of words; a caption may contain the two special tokens.
_CLIP_WORDS = r"<start_of_text>|<end_of_text>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
_GZIP = b"\x1f\x8b"
_CLIP_REMEMBERED = 100_000  # words whose tokens are kept


class ClipTokenizer:
    """CLIP's byte-level BPE over cleaned, lower-cased text (Radford et al. 2021, section 2.4).

    merges: the vocabulary file's pairs, best first (`read_clip_merges`). Ids are OpenCLIP's: 49406 begins,
    49407 ends; the padding's id, 0, is also that of "!", so the mask alone tells what is real. clean: a name
    of `CLEANING`.
    """

    vocab_size = CLIP_MERGES + 514
    bos_id = vocab_size - 2
    eos_id = vocab_size - 1
    pad_id = 0
    modules = ("ftfy", "regex", "tokenizers")  # loaded once for all of the loader's workers

    def __init__(self, merges: Sequence[tuple[str, str]], context_length: int, clean: str = "lower") -> None:
        import regex
        from tokenizers.models import BPE

        self.context_length = context_length
        self.clean = clean
        self._words = regex.compile(_CLIP_WORDS, regex.IGNORECASE)
        self._letters = letters_of_bytes()
        order = [*range(33, 127), *range(161, 173), *range(174, 256)]
        order += sorted(set(range(256)) - set(order))
        alphabet = [self._letters[byte] for byte in order]
        entries = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges)]
        vocabulary = {entry: number for number, entry in enumerate(entries)}
        self._bpe = BPE(vocabulary, list(merges), end_of_word_suffix="</w>")
        self._known = {"<start_of_text>": [self.bos_id], "<end_of_text>": [self.eos_id]}

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        limit = self.context_length - 2
        rows = [[self.bos_id, *self._encode(text)[:limit], self.eos_id] for text in texts]
        return _padded(rows, self.context_length, self.pad_id)

    def save_vocabulary(self, folder: Path) -> None:
        """Write `vocab.json` (without the two special tokens) and `merges.txt` into a folder."""
        self._bpe.save(str(folder))

    def _encode(self, text: str) -> list[int]:
        text = CLEANING[self.clean](text)
        return [token for word in self._words.findall(text) for token in self._tokens_of(word)]

    def _tokens_of(self, word: str) -> list[int]:
        tokens = self._known.get(word)
        if tokens is None:
            letters = "".join(self._letters[byte] for byte in word.encode("utf-8", "replace"))
            tokens = [token.id for token in self._bpe.tokenize(letters)]
            if len(self._known) < _CLIP_REMEMBERED:
                self._known[word] = tokens
        return tokens


def _repaired(text: str) -> str:
    """Broken Unicode repaired, HTML entities resolved, white space single."""
    if not (text.isascii() and text.isprintable() and "&" not in text):  # else there is nothing to repair
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split())


def cleaned(text: str) -> str:
    """Broken Unicode repaired, HTML entities resolved, white space single, lower case; OpenCLIP's default."""
    return _repaired(text).lower()


def _canonical(text: str) -> str:
    """`cleaned`, without punctuation; an underscore separates words (of big_vision, for SigLIP)."""
    bare = _repaired(text).replace("_", " ").translate(_NO_PUNCTUATION)
    return " ".join(bare.lower().split())


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
CLEANING: Mapping[str, Callable[[str], str]] = {
    "none": str,
    "whitespace": _repaired,
    "lower": cleaned,
    "canonicalize": _canonical,
}
"""What a caption goes through before it is taken apart, by OpenCLIP's names."""


def letters_of_bytes() -> list[str]:
    """A printable letter for every byte: itself where it is one, else the next from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def read_clip_merges(file: Path) -> list[tuple[str, str]]:
    """The merges of `bpe_simple_vocab_16e6.txt.gz`: after a header line, the first `CLIP_MERGES` lines.

    Or of the `merges.txt` of a folder of CLIP's on the hub, the same without compression. Raises UserError
    where the file is another.
    """
    try:
        content = file.read_bytes()
        content = gzip.decompress(content) if content.startswith(_GZIP) else content
        lines = content.decode("utf-8").split("\n")[1 : CLIP_MERGES + 1]
    except (OSError, EOFError, ValueError) as error:
        raise UserError(_no_vocabulary(file, str(error))) from None
    pairs = [tuple(line.split()) for line in lines]
    if len(pairs) < CLIP_MERGES or any(len(pair) != 2 for pair in pairs):
        raise UserError(_no_vocabulary(file, f"it holds no {CLIP_MERGES:,} pairs"))
    return [(first, second) for first, second in pairs]


def _no_vocabulary(file: Path, why: str) -> str:
    return (
        f"{file} is not CLIP's vocabulary ({why}); give OpenAI's bpe_simple_vocab_16e6.txt.gz, a folder with "
        "tokenizer files, a name on the Hugging Face hub, or bytes"
    )


class HuggingFaceTokenizer:
    """A tokenizer of transformers, with its own special tokens.

    One that closes its texts with no end token (GPT-2) gets it `appended`; one without a pad token pads with
    the end token, and the mask tells which tokens are real. clean: a name of `CLEANING`.
    """

    def __init__(self, tokenizer: Any, context_length: int, clean: str = "none") -> None:
        self.tokenizer = tokenizer
        self.context_length = context_length
        self.clean = clean
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
        # two texts, since an empty one may consist of the start token, which for OPT is also the end token
        last = [tokenizer(text)["input_ids"][-1:] for text in ("", "a")]
        closes = all(ids in ([end], [tokenizer.sep_token_id]) for ids in last)
        self.appended = [] if closes or end is None else [self.eos_id]
        tokenizer.model_max_length = int(1e9)  # longer texts are cut below, without a warning

    def __call__(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        limit = self.context_length - len(self.appended)
        texts = [CLEANING[self.clean](text) for text in texts]
        rows = self.tokenizer(texts, truncation=True, max_length=limit)["input_ids"]
        return _padded(
            [(row + self.appended) or [self.pad_id] for row in rows], self.context_length, self.pad_id
        )


def load_tokenizer(text: Any, assets: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a recipe's `data.text` section.

    `text.tokenizer` is `bytes`, CLIP's vocabulary file, a folder, or a name on a hub: then
    `asset_folder(assets, name)` is read if it is there, else Hugging Face's own cache. `text.clean` is a name
    of `CLEANING`, or None for the tokenizer's own. UserError if there is no such tokenizer.
    """
    name = str(text.tokenizer)
    if name == "bytes":
        return ByteTokenizer(text.context_length)
    if Path(name).is_file():
        return ClipTokenizer(read_clip_merges(Path(name)), text.context_length, text.clean or "lower")
    from transformers import AutoTokenizer

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # the loader's workers are the parallel part
    stored = asset_folder(assets, name) if assets is not None else None
    source = str(stored) if stored is not None and stored.is_dir() else name
    try:
        local = Path(source).is_dir()
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local, trust_remote_code=False)
    except Exception as error:  # transformers raises OSError, ValueError, ImportError and the hub's own
        near, why = did_you_mean(name, ["bytes"]), " ".join(str(error).split())[:200]
        raise UserError(
            f"tokenizer {name!r} cannot be loaded{near} ({why}); give bytes, a "
            "folder with tokenizer files, CLIP's vocabulary file, or a name on the Hugging Face hub that was "
            "fetched before"
        ) from None
    return HuggingFaceTokenizer(tokenizer, text.context_length, text.clean or "none")


def asset_folder(assets: str | Path, name: str) -> Path:
    """The folder of a hub name's files in a run's assets: `assets/ORG--NAME`."""
    return Path(assets) / name.replace("/", "--")


def _padded(rows: Sequence[Sequence[int]], length: int, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = np.full((len(rows), length), pad_id, np.int64)
    mask = np.zeros((len(rows), length), bool)
    for at, row in enumerate(rows):
        tokens[at, : len(row)] = row
        mask[at, : len(row)] = True
    return torch.from_numpy(tokens), torch.from_numpy(mask)
