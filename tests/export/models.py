"""Small models of every kind with random weights, as a run's would be opened; and folders of transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    BertConfig,
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    RobertaConfig,
    SiglipConfig,
    SiglipModel,
    ViTConfig,
)

from clipcluster.build.model import build_model
from clipcluster.build.opened import Opened
from clipcluster.data.images.decode import decode
from clipcluster.data.images.transforms import evaluation_transform
from clipcluster.data.loading.batch import normalise
from clipcluster.data.tokenizer import load_tokenizer
from clipcluster.recipe.sections.recipe import Recipe
from clipcluster.recipe.tasks import TASKS
from clipcluster.runs.checkpoints import file_entry, name_of
from clipcluster.runs.files import file_sha256, write_json
from clipcluster.runs.folder import Run
from tests.tiny_sizes import LAYERS, SIZE

CONTEXT, EMBED = 16, 8
VISION = {**LAYERS, "image_size": SIZE, "patch_size": 8}
WORDS = {**LAYERS, "vocab_size": 259, "max_position_embeddings": 64, "pad_token_id": 258}
WORDS |= {"bos_token_id": 256, "eos_token_id": 257}
CLIP_VIT = {
    "timm": "vit_base_patch16_clip_quickgelu_224",
    "args": {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2},
}
CLIP_TEXT = {"clip": {"width": 16, "layers": 2, "heads": 2, "quick_gelu": True}}
GPT2 = {"arch": "gpt2", "config": {"n_layer": 1, "n_embd": 32, "n_head": 2}}
CAPTIONS = [f"a photo of {number} cats, and {'one ' * (number % 9)}dog" for number in range(64)]


def sections(model: dict[str, Any], tokenizer: str = "bytes", **more: Any) -> dict[str, Any]:
    """A recipe's, of images of 32 pixels and 16 tokens."""
    image = {"size": SIZE, **more.pop("image", {})}
    text = {"tokenizer": tokenizer, "context_length": more.pop("context", CONTEXT)}
    data = {"train": [{"shards": "/data/train"}], "batch_size": 8, "image": image}
    if more.get("task") != "classify":
        data["text"] = text
        model = {"embed_dim": EMBED, **model}
    return {
        "name": "tiny",
        "data": data,
        "model": model,
        "optim": {"lr": 1e-3},
        "train": {"duration": "9 steps"},
        **more,
    }


def recipe_of(model: dict[str, Any], tokenizer: str = "bytes", **more: Any) -> Recipe:
    return Recipe.model_validate(sections(model, tokenizer, **more))


def opened_of(recipe: Recipe, seed: int | None = 0) -> Opened:
    """The recipe's model, every parameter drawn: none is left at zero or one. seed None: as it starts."""
    tokenizer = load_tokenizer(recipe.data.text) if TASKS[recipe.task].captions else None
    model = build_model(recipe, tokenizer, None)
    if seed is not None:
        drawn(model, seed)
    return Opened(model.eval(), recipe, tokenizer, Path("/models/tiny"), None, False, "tiny")


def drawn(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if not name.startswith("logit_"):
                value.add_(0.2 * torch.randn(value.shape, generator=generator))


def saved_run(path: Path, recipe: dict[str, Any], *, step: int = 9) -> tuple[Run, dict[str, Opened]]:
    """A run with a checkpoint of random weights and another average; the run, and both models."""
    run = Run.create(path, recipe, {"paths": {}})
    both = {
        "raw": opened_of(Recipe.model_validate(recipe), 1),
        "ema": opened_of(Recipe.model_validate(recipe), 2),
    }
    folder = run.checkpoints / name_of(step)
    folder.mkdir()
    for part, name in (("raw", "model"), ("ema", "ema")):
        save_file(both[part].model.state_dict(), folder / f"{name}.safetensors")
    plan = {"total_steps": 90, "lr": 0.001}
    state = {"format": 2, "step": step, "samples": 8 * step, "epoch": 0.5, "plan": plan}
    state |= {"batches_drawn": step, "evaluated_step": 0, "skipped": [], "parts": ["model", "ema"]}
    state["index"] = [{"name": "train", "fingerprint": "0", "samples": 1437}]
    write_json(folder / "state.json", state)
    files = {file.name: file_entry(file.stat().st_size, file_sha256(file)) for file in folder.iterdir()}
    about = {"versions": {"torch": torch.__version__}, "commit": "0123abc", "world_size": 2}
    write_json(folder / "manifest.json", {"format": 2, "step": step, "files": files, **about})
    return run, both


def dual_folder(kind: str, folder: Path) -> Path:
    """A whole dual encoder of transformers, with every parameter drawn."""
    torch.manual_seed(0)
    if kind == "clip":
        model: Any = CLIPModel(CLIPConfig(text_config=WORDS, vision_config=VISION, projection_dim=EMBED))
    elif kind == "chinese_clip":
        config = ChineseCLIPConfig(text_config=WORDS, vision_config=VISION, projection_dim=EMBED)
        model = ChineseCLIPModel(config)
    else:
        text = WORDS | {"max_position_embeddings": CONTEXT, "projection_size": 16}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    drawn(model, 3)
    model.save_pretrained(folder)
    return folder


def towers_folders(kind: str, folder: Path) -> dict[str, Any]:
    """The sections of an image and a text tower of transformers, each with its own pooler."""
    image = CLIPVisionConfig(**VISION) if kind == "clip" else ViTConfig(**VISION)
    roberta = RobertaConfig(
        **{**WORDS, "max_position_embeddings": 300}
    )  # its positions begin after the padding's id
    text = roberta if kind == "clip" else BertConfig(**WORDS)
    image.save_pretrained(folder / "image")
    text.save_pretrained(folder / "text")
    return {
        "image": {"hf": str(folder / "image"), "pool": "pooler"},
        "text": {"hf": str(folder / "text"), "pool": "pooler"},
    }


@torch.no_grad()
def own_features(opened: Opened, photographs: list[Path]) -> tuple[Tensor, Tensor]:
    """Of JPEG files and captions, as evaluation computes them here."""
    rule, image = evaluation_transform(opened.recipe.data.image), opened.recipe.data.image
    pixels = torch.stack([rule(decode(file.read_bytes())) for file in photographs])
    tokens, mask = opened.tokenizer(CAPTIONS)
    model = opened.model
    return model.encode_image(normalise(pixels, image.mean, image.std)), model.encode_text(tokens, mask)


def read(file: Path) -> Any:
    return json.loads(file.read_text())
