"""The smallest real model: a timm ViT of 300,000 weights and a GPT-2 of one layer."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from pydantic import TypeAdapter

from clipcluster.model.clip import Clip, build_clip
from clipcluster.recipe.sections import model as sections
from clipcluster.recipe.sections.image import Image

SIZE = 32
WORDS = {
    "gpt2": {
        "n_layer": 1,
        "n_embd": 16,
        "n_head": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "bert": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
    "roberta": {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
}


@dataclass(frozen=True)
class Tokens:
    vocab_size: int = 40
    pad_id: int = 0
    eos_id: int = 1
    context_length: int = 12


@dataclass(frozen=True)
class Ranks:
    rank: int = 0
    size: int = 1


def image_section(
    timm: str = "test_vit", weights: str | None = None, **args: object
) -> sections.TimmImageTower:
    return sections.TimmImageTower(timm=timm, weights=weights, args=args)


def text_section(arch: str | None = "gpt2", **keys: object) -> sections.TextTower:
    keys = {"config": WORDS.get(arch or "", {})} | keys
    return TypeAdapter(sections.TextTower).validate_python({"arch": arch, **keys})


def model_section(**changes: object) -> sections.Model:
    section = {"image": image_section(), "text": text_section(), "embed_dim": 8}
    return sections.Model(**(section | changes))


def tiny_recipe(size: int = SIZE, **changes: object) -> SimpleNamespace:
    """What of a recipe the model is made of."""
    return SimpleNamespace(model=model_section(**changes), data=SimpleNamespace(image=Image(size=size)))


def tiny_clip(seed: int = 0, size: int = SIZE, **changes: object) -> Clip:
    torch.manual_seed(seed)
    return build_clip(tiny_recipe(size, **changes), Tokens())


def tiny_batch(count: int, seed: int = 0) -> SimpleNamespace:
    """uint8 images, tokens of 1 to 12 real ones, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, Tokens.vocab_size, (count, Tokens.context_length), generator=generator)
    lengths = torch.randint(1, Tokens.context_length + 1, (count, 1), generator=generator)
    mask = torch.arange(Tokens.context_length) < lengths
    images = torch.randint(0, 256, (count, 3, SIZE, SIZE), generator=generator, dtype=torch.uint8)
    return SimpleNamespace(images=images, tokens=tokens.where(mask, Tokens.pad_id), mask=mask)
