"""Every recipe of the project: checked, trained, stopped, resumed and evaluated, shrunk by overrides."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file
from transformers import (
    ChineseCLIPConfig,
    ChineseCLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    GPT2Config,
    GPT2Model,
    RobertaConfig,
    RobertaModel,
)

from clipcluster.check import plain
from clipcluster.recipe.load import load, recipe_keys, settings_keys
from clipcluster.recipe.tasks import METRICS
from clipcluster.run import evaluate, train
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import merged_metrics
from clipcluster.runtime.launch import Launch
from clipcluster.runtime.outcome import Outcome
from clipcluster.runtime.stop import Stop
from tests import reinforced_shards
from tests.stop_after import StopAfter
from tools.convert.convert import convert

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
ALONE = Launch(0, 1, 0, 1, 0, 1, "test", "single")
STEPS = 4
SMALL = [
    "data.batch_size=16",
    "data.workers=0",
    f"train.duration={STEPS} steps",
    "train.log_every=1 steps",
    "optim.warmup=1 steps",
    "checkpoint.keep.every=null",
    "cluster.nodes=1",
    "cluster.gpus_per_node=0",
    "cluster.tasks_per_node=1",
    "cluster.cpus_per_task=1",
]
CONVNEXT = ["model.image.args.depths=[1,1,1,1]", "model.image.args.dims=[8,16,24,32]"]
VIT = ["model.image.args.depth=1", "model.image.args.embed_dim=32", "model.image.args.num_heads=2"]
CLIP_TEXT = ["model.text.clip.width=32", "model.text.clip.layers=1", "model.text.clip.heads=2"]
# What shrinks each recipe, after the overrides of the one that it extends.
OVERRIDES: dict[str, list[str]] = {
    "digits": ["evaluate.every=2 steps"],
    "digits-classify": ["evaluate.every=2 steps"],
    "coco-convnextv2-gpt2": [
        *CONVNEXT,
        "data.image.size=32",
        "data.text.tokenizer=bytes",
        "model.text.hf=${WEIGHTS}/gpt2",
    ],
    "coco-convnextv2-gpt2-staged": [
        "freeze.2.at=1 steps",
        "freeze.2.trainable=last 1",
        "freeze.3.at=3 steps",
        "freeze.3.trainable=last 2",
    ],
    "coco-dual-encoder": ["data.image.size=32", "data.text.tokenizer=bytes"],
    "coco-dual-encoder-performance": ["train.compile=false"],
    "cc3m-rn50": [
        *("data.image.size=32", "model.embed_dim=32", "model.image.timm=test_resnet"),
        "train.precision=fp32",  # half-precision convolutions are slow on a CPU
        *CLIP_TEXT,
    ],
    "chinese-clip-muge": ["data.image.size=32", "data.text.tokenizer=bytes"],
    "chinese-clip-small": ["evaluate.every=2 steps"],
    "imagenet1k-convnext-tiny": [
        *CONVNEXT,
        *("data.image.size=32", "model.classes=10", "evaluate.every=2 steps"),
    ],
    "imagenet1k-convnext-small": [],
    "imagenet1k-convnext-base": [],
    "imagenet1k-convnext-large": [],
    "imagenet22k-convnext-base": ["evaluate.every=null"],
    "imagenet1k-convnext-base-384": ["data.image.size=40"],
    "datacomp12m-vit-b16": [*VIT, *CLIP_TEXT, "data.image.size=32", "model.embed_dim=32"],
    "datacompdr12m-vit-b16": ["distill.stored.widths=[6,6]"],
    "siglip-vit-b16": [*VIT, *CLIP_TEXT, "data.image.size=32", "model.embed_dim=32"],
}


def family(name: str) -> Iterable[str]:
    """A recipe's own overrides after those of the recipe it extends."""
    extends = next(
        line.split()[1].removesuffix(".yaml")
        for line in (RECIPES / f"{name}.yaml").read_text().splitlines()
        if line.startswith("extends:")
    )
    above = [] if extends == "base" else family(extends)
    return [*above, *OVERRIDES.get(name, [])]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """DATA, WEIGHTS and ASSETS as the recipes expect them: small, made up, under the right names."""
    root = tmp_path_factory.mktemp("places")
    digits = convert("digits", root / "digits").out
    for name in ("coco", "muge", "imagenet", "imagenet22k"):
        (root / name).mkdir()
        for split, source in (("train", "train"), ("val", "test"), ("valid", "test")):
            (root / name / split).symlink_to(digits / source)
    for name in ("cc3m", "datacomp12m", "pairs"):
        (root / name).symlink_to(digits / "train")
    reinforced_shards.write(root / "datacompdr12m", 64, per_shard=32)
    weights, assets = root / "weights", root / "assets"
    assets.mkdir()
    open_clip = importlib.util.find_spec("open_clip")
    assert open_clip is not None
    name = "bpe_simple_vocab_16e6.txt.gz"
    (assets / name).symlink_to(Path(str(open_clip.origin)).parent / name)
    for name, classes in (("convnextv2_tiny", 0), ("convnext_base", 10)):
        tower = timm.create_model(name, num_classes=classes, depths=[1, 1, 1, 1], dims=[8, 16, 24, 32])
        (weights / name).mkdir(parents=True)
        save_file(tower.state_dict(), weights / name / "model.safetensors")
    _save_models(weights)
    return {"DATA": str(root), "DIGITS": str(digits), "WEIGHTS": str(weights), "ASSETS": str(assets)}


def _save_models(weights: Path) -> None:
    """Folders as Hugging Face has them, of small models with random weights."""
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 32}
    gpt2 = GPT2Config(vocab_size=300, n_layer=2, n_head=2, n_embd=32, n_positions=128)
    roberta = RobertaConfig(vocab_size=300, max_position_embeddings=300, **layers)
    images = {"image_size": 32, "patch_size": 16, **layers}
    chinese = ChineseCLIPConfig(text_config={"vocab_size": 300, **layers}, vision_config=images)
    for name, model in {
        "gpt2": GPT2Model(gpt2),
        "roberta-base": RobertaModel(roberta, add_pooling_layer=False),
        "clip-vit-base-patch32": CLIPVisionModel(CLIPVisionConfig(**images)),
        "chinese-clip-vit-base-patch16": ChineseCLIPModel(chinese),
    }.items():
        model.save_pretrained(weights / name)


@pytest.mark.parametrize("name", OVERRIDES)
def test_a_recipe_is_checked_trained_stopped_resumed_and_evaluated(
    name: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, value in places.items():
        monkeypatch.setenv(variable, value)
    overrides = [*SMALL, *family(name)]
    file = RECIPES / f"{name}.yaml"
    assert plain.check(file, overrides).errors == []
    loaded = load(file, overrides)
    run = Run.create(tmp_path / "run", recipe_keys(loaded), settings_keys(loaded))

    def go(stop: Stop) -> Outcome:
        attempt = run.claim("test", host="here", still_running=lambda job: False)
        return train(run, attempt, ALONE, stop)

    assert go(StopAfter(4)) is Outcome.STOPPED
    assert go(Stop()) is Outcome.FINISHED
    assert len(run.attempts()) == 2
    lines = {line["step"]: line for line in merged_metrics(run)}
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert all(line["loss"] > 0 for line in lines.values())
    if any(getattr(loaded.recipe.evaluate, kind) for kind in METRICS):
        assert evaluate(run.path)["metrics"]


def test_no_recipe_is_left_out() -> None:
    assert {path.stem for path in RECIPES.glob("*.yaml")} - {"base"} == set(OVERRIDES)
