"""CLIP's text transformer beside OpenCLIP's, and CLIP's tokens beside its tokenizer's."""

import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_model import Tokens, text_section

from clipcluster.data.tokenizer import cleaned, load_tokenizer
from clipcluster.errors import UserError
from clipcluster.model.towers import build_text_tower
from clipcluster.recipe.sections.data import Text

transformer = pytest.importorskip("open_clip.transformer")
tokenizer = pytest.importorskip("open_clip.tokenizer")

SIZES = {"width": 32, "layers": 3, "heads": 4}
VOCABULARY = Path(tokenizer.default_bpe())


def tower(**sizes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_text_tower(text_section(None, clip=SIZES | sizes), tokenizer=Tokens())[0]


def captions() -> tuple[torch.Tensor, torch.Tensor]:
    """Every length, the end token (the highest id, where OpenCLIP pools) last, padding of id 0."""
    torch.manual_seed(1)
    lengths = torch.arange(1, Tokens.context_length + 1)
    mask = torch.arange(Tokens.context_length) < lengths[:, None]
    tokens = torch.randint(0, Tokens.vocab_size - 1, mask.shape).where(mask, 0)
    tokens[torch.arange(len(lengths)), lengths - 1] = Tokens.vocab_size - 1
    return tokens, mask


@pytest.mark.parametrize("quick", [False, True])
def test_features_and_gradients_are_openclips(quick: bool) -> None:
    activation = transformer.QuickGELU if quick else torch.nn.GELU
    other = transformer.TextTransformer(
        Tokens.context_length, Tokens.vocab_size, output_dim=None, act_layer=activation, **SIZES
    )
    own = tower(quick_gelu=quick)
    own.load_state_dict(other.state_dict())
    tokens, mask = captions()
    torch.testing.assert_close(own(tokens, mask), other(tokens), atol=1e-5, rtol=0)
    features, expected = own.double()(tokens, mask), other.double()(tokens)
    torch.testing.assert_close(features, expected, atol=1e-10, rtol=0)
    features.pow(3).sum().backward()
    expected.pow(3).sum().backward()
    gradients = {name: parameter.grad for name, parameter in other.named_parameters()}
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-9, rtol=1e-9)


def test_fresh_weights_are_drawn_as_published() -> None:
    """The same standard deviations as OpenCLIP's, tensor by tensor; norms and zero biases equal."""
    wide = {"width": 256, "layers": 2, "heads": 4}
    other = transformer.TextTransformer(Tokens.context_length, Tokens.vocab_size, output_dim=None, **wide)
    own = tower(**wide).state_dict()
    assert list(own) == list(other.state_dict())
    for name, expected in other.state_dict().items():
        assert own[name].std().item() == pytest.approx(expected.std().item(), rel=0.1), name
        assert own[name].mean().item() == pytest.approx(expected.mean().item(), abs=0.01), name


def test_what_follows_the_end_changes_nothing() -> None:
    own = tower()
    tokens, mask = captions()
    noise = torch.randint_like(tokens, Tokens.vocab_size).where(~mask, tokens)
    assert torch.equal(own(tokens, mask), own(noise, mask))
    for length in (1, 5):
        torch.testing.assert_close(
            own(tokens[length - 1 : length, :length], mask[length - 1 : length, :length])[0],
            own(tokens, mask)[length - 1],
        )
    assert own(tokens[:1], torch.zeros_like(mask[:1])).isfinite().all()


def clip_tokenizer(length: int = 77):
    return load_tokenizer(Text(tokenizer=str(VOCABULARY), context_length=length))


OWN = clip_tokenizer()
OTHER = tokenizer.SimpleTokenizer()
WORDS = st.sampled_from(["&amp;lt;", "it's", "WE'LL", "'ſ", "é", "naïve", "schÃ¶n", "<b>", "12", "\x85", "”"])
TEXTS = st.text(max_size=30) | st.text(st.characters(max_codepoint=127), max_size=30)


@given(st.lists(TEXTS | st.lists(WORDS | TEXTS, max_size=6).map(" ".join), max_size=4))
def test_tokens_are_openclips(texts: list[str]) -> None:
    tokens, mask = OWN(texts)
    assert torch.equal(tokens, OTHER(texts) if texts else tokens)
    ends = (tokens == OWN.eos_id).int().argmax(1)
    assert torch.equal(mask, torch.arange(77) <= ends[:, None])
    assert [cleaned(text) for text in texts] == [tokenizer.get_clean_fn("lower")(text) for text in texts]


def test_clips_tokenizer_cuts_before_the_end_and_travels_to_workers() -> None:
    texts = ["a photo of a cat!", "", "one two three four five six", "<end_of_text> twice"]
    for own in (clip_tokenizer(6), pickle.loads(pickle.dumps(clip_tokenizer(6)))):
        tokens, mask = own(texts)
        assert torch.equal(tokens, OTHER(texts, 6))
        assert (tokens[:, 0] == 49406).all()
        assert mask.sum(1).tolist() == [6, 2, 6, 4]
        assert [row[real][-1].item() for row, real in zip(tokens, mask, strict=True)] == [49407] * 4
    tokens, mask = clip_tokenizer()(["a!"])
    assert tokens[0, :5].tolist() == [49406, 320, 256, 49407, 0]
    assert clip_tokenizer().vocab_size == OTHER.vocab_size


def test_another_file_is_no_vocabulary(tmp_path: Path) -> None:
    import gzip

    for content in (b"words", gzip.compress(b"version\na b\n")):
        (tmp_path / "vocabulary.txt.gz").write_bytes(content)
        with pytest.raises(UserError, match=r"is not CLIP's vocabulary.*bpe_simple_vocab_16e6"):
            load_tokenizer(Text(tokenizer=str(tmp_path / "vocabulary.txt.gz"), context_length=8))
