"""Captions to tokens, with and without files."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from clipcluster.data.tokenizer import ByteTokenizer, asset_folder, load_tokenizer
from clipcluster.errors import UserError
from clipcluster.model.hugging_face import config_of
from clipcluster.recipe.sections.data import Text


def _text(tokenizer: object, length: int = 6) -> Text:
    return Text(tokenizer=str(tokenizer), context_length=length)


def _fast(**special: str) -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[CLS]", "[SEP]", "<end>", "[UNK]", "a", "cat", "sat", "on", "mats"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if "cls_token" in special:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **special)


@pytest.fixture
def gpt_like(tmp_path: Path) -> Path:
    _fast(eos_token="<end>").save_pretrained(tmp_path / "gpt")
    return tmp_path / "gpt"


@pytest.fixture
def bert_like(tmp_path: Path) -> Path:
    _fast(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]").save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


def test_bytes() -> None:
    tokenizer = load_tokenizer(_text("bytes"))
    tokens, mask = tokenizer(["ab", "", "é", "abcdefgh"])
    assert tokens.tolist() == [
        [256, 97, 98, 257, 258, 258],
        [256, 257, 258, 258, 258, 258],
        [256, 195, 169, 257, 258, 258],
        [256, 97, 98, 99, 100, 257],
    ]
    assert torch.equal(mask, tokens != tokenizer.pad_id)
    assert (tokens.dtype, mask.dtype) == (torch.int64, torch.bool)
    assert (tokenizer.vocab_size, tokenizer.eos_id, tokenizer.context_length) == (259, 257, 6)


@given(st.lists(st.text(max_size=40), max_size=5), st.integers(2, 30))
def test_bytes_end_and_fit(texts: list[str], length: int) -> None:
    tokens, mask = ByteTokenizer(length)(texts)
    assert tokens.shape == mask.shape == (len(texts), length)
    for row, real in zip(tokens, mask, strict=True):
        assert row[real][0] == 256
        assert row[real][-1] == 257
        assert (row[~real] == 258).all()


def test_without_a_pad_token_the_end_pads_and_the_mask_tells(gpt_like: Path) -> None:
    tokenizer = load_tokenizer(_text(gpt_like))
    tokens, mask = tokenizer(["a cat", "", "a cat sat on mats a cat"])
    assert tokens.tolist() == [[5, 6, 3, 3, 3, 3], [3] * 6, [5, 6, 7, 8, 9, 3]]
    assert mask.sum(1).tolist() == [3, 1, 6]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (3, 3, 10)


def test_a_start_token_that_is_also_the_end_token_does_not_close_a_text(tmp_path: Path) -> None:
    """OPT's, and GPT-2's with a start token: of an empty text the end token is all there is."""
    fast = _fast(bos_token="<end>", eos_token="<end>")
    fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A", special_tokens=[("<end>", 3)]
    )
    fast.save_pretrained(tmp_path)
    tokens, mask = load_tokenizer(_text(tmp_path))(["a cat", "", "a cat sat on mats a cat"])
    assert tokens.tolist() == [[3, 5, 6, 3, 3, 3], [3] * 6, [3, 5, 6, 7, 8, 3]]
    assert mask.sum(1).tolist() == [4, 2, 6]


def test_own_special_tokens_are_kept_when_cut(bert_like: Path) -> None:
    tokenizer = load_tokenizer(_text(bert_like))
    tokens, mask = tokenizer(["a cat", "", "a cat sat on mats a cat"])
    assert tokens.tolist() == [[1, 5, 6, 2, 0, 0], [1, 2, 0, 0, 0, 0], [1, 5, 6, 7, 8, 2]]
    assert mask.sum(1).tolist() == [4, 2, 6]
    assert tokenizer.pad_id == 0


def test_a_hub_name_is_read_from_the_assets(tmp_path: Path, gpt_like: Path) -> None:
    place = asset_folder(tmp_path / "assets", "some/gpt")
    place.parent.mkdir()
    gpt_like.rename(place)
    tokens, _ = load_tokenizer(_text("some/gpt"), tmp_path / "assets")(["cat"])
    assert tokens[0, :2].tolist() == [6, 3]


def test_a_tokenizer_that_is_not_there(tmp_path: Path) -> None:
    for name in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="give bytes, a folder"):
            load_tokenizer(_text(name))


def test_code_that_a_folder_brings_is_never_run(
    tmp_path: Path, bert_like: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where somebody sits at the terminal, whom transformers would ask."""
    monkeypatch.setattr("builtins.input", lambda question="": "y")
    marker = tmp_path / "ran"
    (bert_like / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    settings = bert_like / "tokenizer_config.json"
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["code.Own", "code.Own"]}}
    settings.write_text(json.dumps(json.loads(settings.read_text()) | own))
    (bert_like / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "code.Own", "AutoTokenizer": "code.Own"}})
    )
    with pytest.raises(UserError, match="custom code"):
        load_tokenizer(_text(bert_like))
    with pytest.raises(UserError, match="custom code"):
        config_of("model.text", str(bert_like), None)
    assert not marker.exists()
