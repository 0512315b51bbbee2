"""The section `model`: the towers and what joins them. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import field_validator, model_validator

from clipcluster.recipe.sections.base import KeyProblem, Kinds, Section, key, section
from clipcluster.recipe.sections.values import Float, Int


def _weights(more: str = "", what: str = "tower") -> Any:
    text = (
        f"The {what}'s starting weights: a file, a model's folder, another run or its checkpoint{more}. "
        "Default: from scratch."
    )
    return key("result", text, None, path="path", min_length=1)


_PRETRAINED = ", or 'pretrained' for those that belong to `hf`"


def _hf() -> Any:
    text = "Folder with a transformers model's configuration, or its name on the hub."
    return key("result", text, path="name", min_length=1)


def _missing(what: str = "tower") -> Any:
    return key(
        "result",
        f"Patterns, such as head.norm.*, of the {what}'s tensors that the starting weights may lack: they "
        "start from random values. Every other tensor is needed.",
        (),
    )


def _a_file(value: str | None) -> str | None:
    if value == "pretrained":
        raise ValueError("pretrained weights belong to a model named by hf; name a file or a folder")
    return value


def _mask_ratio() -> Any:
    return key(
        "result",
        "Fraction of an image's patches that a vision transformer leaves out in training (FLIP), such as "
        "0.5.",
        0.0,
        ge=0,
        lt=1,
    )


# Arguments of timm's create_model -> what decides them here.
_OWN_ARGS = {
    "pretrained": "model.image.weights",
    "checkpoint_path": "model.image.weights",
    "img_size": "data.image.size",
    "patch_drop_rate": "model.image.mask_ratio",
    "num_classes": "the task",
    "features_only": "the task",
}


class TimmImageTower(Section):
    """An image tower of timm."""

    timm: str = key("result", "Name of the tower in timm, such as convnextv2_tiny or vit_base_patch16_224.")
    weights: str | None = _weights()
    missing: tuple[str, ...] = _missing()
    args: dict[str, Any] = key("result", "Arguments for timm's create_model, such as drop_path_rate.", {})
    mask_ratio: Float = _mask_ratio()
    _file = field_validator("weights")(_a_file)

    @model_validator(mode="after")
    def _own_args(self) -> TimmImageTower:
        for name, decides in _OWN_ARGS.items():
            if name in self.args:
                raise KeyProblem(f"args.{name}", f"is decided by {decides}; remove it")
        return self


class HfImageTower(Section):
    """An image tower by the configuration of a published vision model, or of a dual encoder that has one."""

    hf: str = _hf()
    weights: str | None = _weights(_PRETRAINED)
    missing: tuple[str, ...] = _missing()
    pool: Literal["pooler", "first", "mean"] = key(
        "result",
        "Pooling over the tokens: the network's own pooler (of ViT a layer and tanh, of CLIP the class token "
        "after its norm), the first, or their mean.",
        "pooler",
    )
    mask_ratio: Float = _mask_ratio()


ImageTower = Annotated[TimmImageTower | HfImageTower, Kinds(timm=TimmImageTower, hf=HfImageTower)]


def _pool() -> Any:
    return key(
        "result",
        "Pooling over the tokens that are not padding: the last, the first, their mean, or the network's own "
        "pooler (of BERT and RoBERTa a layer and tanh). Default: by architecture (last for causal models, "
        "first for the others).",
        None,
    )


class HfTextTower(Section):
    """A text tower by the configuration of a published model."""

    hf: str = _hf()
    weights: str | None = _weights(_PRETRAINED)
    missing: tuple[str, ...] = _missing()
    pool: Literal["last", "first", "mean", "pooler"] | None = _pool()


class ArchTextTower(Section):
    """A text tower from scratch, by its architecture and sizes."""

    arch: str = key("result", "Model type known to transformers (gpt2, roberta, …).", min_length=1)
    config: dict[str, Any] = key("result", "Values of its configuration, such as n_layer.", {})
    weights: str | None = _weights()
    missing: tuple[str, ...] = _missing()
    pool: Literal["last", "first", "mean", "pooler"] | None = _pool()
    _file = field_validator("weights")(_a_file)


class ClipText(Section):
    """CLIP's text transformer: its sizes, and what SigLIP's has otherwise; positions are the tokenizer's."""

    width: Int = key("result", "Width of the layers.", 512, ge=1)
    layers: Int = key("result", "Number of layers.", 12, ge=1)
    heads: Int = key("result", "Number of attention heads of a layer; it divides width.", 8, ge=1)
    mlp_ratio: Float = key("result", "Width of a layer's MLP, as a multiple of width.", 4.0, gt=0)
    quick_gelu: bool = key(
        "result", "x * sigmoid(1.702 x) instead of GELU, as OpenAI's weights were trained with.", False
    )
    tanh_gelu: bool = key("result", "GELU in its tanh approximation, as SigLIP 2 was trained with.", False)
    causal: bool = key(
        "result",
        "Whether a token attends only to itself and those before it. false: to all positions, padding "
        "included, as SigLIP was trained.",
        True,
    )
    pool: Literal["last", "first", "last_position"] = key(
        "result",
        "Pooling: the last token that is not padding, the first, or the last position, padding or not "
        "(SigLIP).",
        "last",
    )
    norm_eps: Float = key(
        "result", "What layer norms add to the variance; 1e-6 as SigLIP has it.", 1e-5, gt=0
    )
    vocab_size: Int | None = key(
        "result", "Rows of the token embedding. Default: the tokenizer's vocabulary.", None, ge=1
    )

    @model_validator(mode="after")
    def _whole_heads(self) -> ClipText:
        if self.width % self.heads:
            raise KeyProblem("heads", f"{self.heads} does not divide width {self.width}; change one of them")
        return self

    @model_validator(mode="after")
    def _one_gelu(self) -> ClipText:
        if self.quick_gelu and self.tanh_gelu:
            raise KeyProblem("tanh_gelu", "is another activation than quick_gelu; remove one of them")
        return self


class ClipTextTower(Section):
    """CLIP's own text transformer: by default causal, pooled at the token that ends the caption."""

    clip: ClipText = section("The tower's sizes; {} gives those of CLIP's ViT-B/32 and ViT-B/16.")
    weights: str | None = _weights()
    missing: tuple[str, ...] = _missing()
    _file = field_validator("weights")(_a_file)


TextTower = Annotated[
    HfTextTower | ArchTextTower | ClipTextTower,
    Kinds(hf=HfTextTower, arch=ArchTextTower, clip=ClipTextTower),
]


class Dual(Section):
    """A whole dual encoder by the configuration of a published model.

    Known are CLIP, Chinese-CLIP, SigLIP (and SigLIP 2 of a fixed resolution) and VisionTextDualEncoder.
    """

    hf: str = _hf()
    weights: str | None = _weights(_PRETRAINED, "model")


Projection = Literal["linear", "mlp", "none"]


class Projections(Section):
    """What takes each tower's vector into the embedding."""

    image: Projection = key(
        "result",
        "linear; mlp: a hidden layer of 2 x embed_dim and GELU (the form of OpenCLIP's image towers); none: "
        "the tower's width is embed_dim (SigLIP).",
        "linear",
    )
    text: Projection = key(
        "result",
        "linear; mlp: a hidden layer of half the sum of the tower's width and embed_dim, and GELU, without "
        "biases (the form of OpenCLIP's text towers); none: the tower's width is embed_dim.",
        "linear",
    )


class LogitScale(Section):
    """The learned scale of the similarities."""

    init: Float = key("result", "Initial value (1/0.07 as in CLIP).", 1 / 0.07, gt=0)
    max: Float | None = key(
        "result", "Upper bound (100 as in CLIP). null: none, as SigLIP was published.", 100.0, gt=0
    )

    @model_validator(mode="after")
    def _below_the_bound(self) -> LogitScale:
        if self.max is not None and self.init > self.max:
            raise KeyProblem("init", f"{self.init:g} is above max {self.max:g}; lower it, or raise max")
        return self


class LogitBias(Section):
    """The learned bias of the similarities, of the loss siglip."""

    init: Float = key("result", "Initial value.", -10.0)


class Model(Section):
    """The towers and what joins them."""

    image: ImageTower | None = section("The image tower; a whole dual encoder (dual) has its own.", None)
    text: TextTower | None = section("The text tower, of tasks with captions.", None)
    dual: Dual | None = section("A whole dual encoder, instead of image and text.", None)
    weights: str | None = _weights(" (both towers, projections and logit scale)", "whole model")
    missing: tuple[str, ...] = _missing("whole model")
    weights_from: Literal["ema", "raw"] | None = key(
        "result",
        "Which weights of a file, or of another run's checkpoint, are taken where it holds both: the moving "
        "average (ema) or the weights themselves (raw). Default: ema where there is one.",
        None,
    )
    embed_dim: Int = key("result", "Dimension of the embedding that images and captions share.", 512, ge=1)
    projection_bias: tuple[Literal["image", "text"], ...] = key(
        "result",
        "The towers whose projection into the embedding has a bias; CLIP's ResNets have one for images.",
        (),
    )
    projections: Projections = section("What takes each tower's vector into the embedding.", {})
    logit_scale: LogitScale = section("The learned scale of the similarities.", {})
    classes: Int | None = key(
        "result",
        "Number of classes (task: classify). Default: the lines of classnames.txt beside the shards.",
        None,
        ge=1,
    )
    head_init_scale: Float = key(
        "result",
        "Factor of the random weights of a classifier's head (task: classify); 0.001 for fine-tuning.",
        1.0,
        gt=0,
    )
    logit_bias: LogitBias | None = section(
        "The learned bias of the similarities, which loss.name siglip needs; {} starts it at -10.", None
    )

    @model_validator(mode="after")
    def _one_start(self) -> Model:
        parts = [name for name in ("image", "text", "dual") if getattr(self, name) is not None]
        if self.dual is not None and len(parts) > 1:
            raise KeyProblem("dual", f"has both towers; remove {' and '.join(parts[:-1])}, or dual")
        if not parts or parts == ["text"]:
            raise ValueError("the key image is missing; write image (and text), or dual")
        started = [name for name in parts if getattr(self, name).weights]
        if self.weights and started:
            raise KeyProblem(
                f"{started[0]}.weights",
                "has other weights than model.weights, which are those of the whole model; remove one",
            )
        return self

    @model_validator(mode="after")
    def _biased_projections(self) -> Model:
        kinds = {"image": self.projections.image, "text": self.projections.text}
        for name in self.projection_bias:
            if kinds[name] == "none":
                raise KeyProblem(
                    "projection_bias", f"{name} has no projection (projections.{name}); remove it"
                )
        if kinds["text"] == "mlp" and "text" in self.projection_bias:
            raise KeyProblem("projection_bias", "the mlp of text has no biases; remove text")
        if self.dual is not None and set(kinds.values()) != {"linear"}:
            raise KeyProblem("projections", "a whole dual encoder (dual) has its own; remove it")
        return self

    def weights_of(self, tower: Literal["image", "text"]) -> str | None:
        """The starting weights of a tower: its own or those of the whole model; None from scratch."""
        parts = (getattr(self, tower), self.dual, self)
        return next((part.weights for part in parts if part is not None and part.weights), None)
