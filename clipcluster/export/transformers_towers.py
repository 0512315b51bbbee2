"""Towers as networks of transformers: their configuration, and their weights under its names."""

from __future__ import annotations

from typing import Any, NamedTuple

from timm.layers.activations import GELU, GELUTanh, QuickGELU
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from clipcluster.build.opened import Opened
from clipcluster.errors import UserError
from clipcluster.model.clip_text import ClipTextTower
from clipcluster.model.hugging_face import quiet_transformers
from clipcluster.model.layouts import clip_in_transformers, clip_vit_of_timm, siglip_vit_in_transformers
from clipcluster.model.towers import HfImageTower

_ACTIVATIONS: dict[type, str] = {QuickGELU: "quick_gelu", GELU: "gelu", GELUTanh: "gelu_pytorch_tanh"}
_TEXT_ACTIVATIONS = {"gelu": "gelu", "_quick_gelu": "quick_gelu", "_tanh_gelu": "gelu_pytorch_tanh"}
_BLOCK = {"attn.qkv", "attn.proj", "norm1", "norm2", "mlp.fc1", "mlp.fc2"}
_AROUND = {
    "token": {"cls_token", "pos_embed", "patch_embed.proj", "norm_pre", "norm"},
    "map": {"pos_embed", "patch_embed.proj", "norm", "attn_pool.latent", "attn_pool.q", "attn_pool.kv"}
    | {"attn_pool.proj", "attn_pool.norm", "attn_pool.mlp.fc1", "attn_pool.mlp.fc2"},
}
"""What CLIP's ViT and SigLIP's have besides their blocks, by timm's name of their pooling."""
_LEGACY_END = 2
"""transformers takes this end token of CLIP's for that of old files, and the largest token instead."""


class TransformersTower(NamedTuple):
    """A tower as a network of transformers.

    config: of the network. state: its weights, by the names that the network without a head has.
    pool: how the tower's vector is taken from what the network gives. projected: whether that is in the
    common space already: the network ends in the projection.
    """

    config: Any
    state: dict[str, Tensor]
    pool: str
    projected: bool = False

    def network(self) -> Any:
        """The network without head, with these weights."""
        from transformers import AutoModel

        with quiet_transformers():
            network = AutoModel.from_config(self.config)
        own = network.state_dict()
        # transformers 4 has some networks inside a wrapper.
        place = next(
            p for p in ("", "vision_model.", "text_model.") if {p + n for n in self.state} <= own.keys()
        )
        network.load_state_dict({f"{place}{name}": value for name, value in self.state.items()})
        return network.eval()


def image_tower(opened: Opened) -> TransformersTower:
    """The image tower. Raises UserError, by key, for one that transformers does not know."""
    tower = opened.model.image
    if isinstance(tower, HfImageTower):
        return TransformersTower(tower.trunk.config, tower.trunk.state_dict(), tower.pool)
    why = _not_known(tower.trunk)
    if why:
        name = opened.recipe.model.image.timm  # type: ignore[union-attr]
        raise UserError(
            f"model.image.timm: {name} {why}, and --format hf takes timm's ViTs of CLIP "
            "(…_clip_224, …_clip_quickgelu_224) and of SigLIP (…_siglip_224), and towers named by "
            "model.image.hf. --format safetensors and onnx take every tower."
        )
    return _vit(opened, tower.trunk)


def _not_known(trunk: Any) -> str:
    """What tells a network of timm's from the ViTs of CLIP and SigLIP; "" where nothing does."""
    if not isinstance(trunk, VisionTransformer):
        return "is not a vision transformer"
    if trunk.global_pool not in _AROUND:
        return f"pools by {trunk.global_pool or 'nothing'}"
    single = {"cls_token", "pos_embed", "attn_pool.latent"}  # parameters; all else are layers
    names = {name if name in single else name.rpartition(".")[0] for name, _ in trunk.named_parameters()}
    blocks = {f"blocks.{number}.{name}" for number in range(len(trunk.blocks)) for name in _BLOCK}
    if names != _AROUND[trunk.global_pool] | blocks:
        return "has other layers"
    first: Any = trunk.blocks[0]
    return "" if _activation(first.mlp.act) else "has another activation"


def _activation(module: nn.Module) -> str | None:
    """transformers' name of an activation; None for one that these are not built with."""
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    return _ACTIVATIONS.get(type(module))


def _vit(opened: Opened, trunk: Any) -> TransformersTower:
    from transformers import CLIPVisionConfig, SiglipVisionConfig

    first = trunk.blocks[0]
    sizes = {
        "hidden_size": trunk.embed_dim,
        "intermediate_size": first.mlp.fc1.out_features,
        "num_hidden_layers": len(trunk.blocks),
        "num_attention_heads": first.attn.num_heads,
        "image_size": opened.recipe.data.image.size,
        "patch_size": trunk.patch_embed.patch_size[0],
        "hidden_act": _activation(first.mlp.act),
        "layer_norm_eps": trunk.norm.eps,
    }
    state = trunk.state_dict()
    if trunk.global_pool == "map":
        return TransformersTower(SiglipVisionConfig(**sizes), siglip_vit_in_transformers(state), "pooler")
    config = CLIPVisionConfig(**sizes, projection_dim=getattr(opened.model, "embed_dim", trunk.embed_dim))
    return TransformersTower(config, clip_in_transformers(clip_vit_of_timm(state)), "pooler")


def text_tower(opened: Opened) -> TransformersTower:
    """The text tower. Raises UserError, by key, for one that transformers does not know."""
    tower = opened.model.text
    if not isinstance(tower, ClipTextTower):
        return TransformersTower(tower.transformer.config, tower.transformer.state_dict(), tower.pool)
    first: Any = tower.transformer.resblocks[0]
    causal = first.attn.causal
    forms = {(True, "last"): _clip_text, (False, "last_position"): _siglip_text}
    if (causal, tower.pool) not in forms:
        raise UserError(
            f"model.text.clip: causal: {str(causal).lower()} with pool: {tower.pool} is not supported "
            "by transformers, whose CLIP is causal and pools at the last token, and whose SigLIP is not and "
            "pools at the last position. --format onnx takes every tower."
        )
    return forms[causal, tower.pool](opened)


def _text_sizes(opened: Opened) -> dict[str, Any]:
    tower, tokenizer = opened.model.text, opened.tokenizer
    assert tokenizer is not None
    first = tower.transformer.resblocks[0]
    return {
        "vocab_size": tower.token_embedding.num_embeddings,
        "hidden_size": tower.width,
        "intermediate_size": first.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": first.attn.heads,
        "max_position_embeddings": len(tower.positional_embedding),
        "hidden_act": _TEXT_ACTIVATIONS[first.mlp.activation.__name__],
        "layer_norm_eps": tower.ln_final.eps,
        "pad_token_id": tokenizer.pad_id,
        "bos_token_id": getattr(tokenizer, "bos_id", None),
        "eos_token_id": tokenizer.eos_id,
    }


def _clip_text(opened: Opened) -> TransformersTower:
    from transformers import CLIPTextConfig

    sizes = _text_sizes(opened)
    if sizes["eos_token_id"] == _LEGACY_END:
        raise UserError(
            "data.text.tokenizer: it ends captions with token 2, which transformers' CLIP takes for that of "
            "old files: it would look for the largest token instead. Choose --format onnx."
        )
    config = CLIPTextConfig(**sizes, projection_dim=opened.model.embed_dim)
    return TransformersTower(config, clip_in_transformers(opened.model.text.state_dict()), "pooler")


def _siglip_text(opened: Opened) -> TransformersTower:
    from transformers import SiglipTextConfig

    projection = opened.model.text_projection
    if not isinstance(projection, nn.Linear) or projection.bias is None:
        raise UserError(
            "model.projections.text: transformers' SigLIP has a linear projection with a bias after the text "
            "tower: set it to linear, and model.projection_bias to [text]. --format onnx takes every model."
        )
    config = SiglipTextConfig(**_text_sizes(opened), projection_size=opened.model.embed_dim)
    state = clip_in_transformers(opened.model.text.state_dict())
    state |= {f"head.{name}": value for name, value in projection.state_dict().items()}
    return TransformersTower(config, state, "pooler", projected=True)
