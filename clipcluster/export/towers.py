"""Each tower by itself, as timm and transformers load it, and what joins them in a file of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from safetensors.torch import save_file
from torch import Tensor

from clipcluster.build.opened import Opened
from clipcluster.export.compare import compare, is_dual_encoder, unit
from clipcluster.export.preprocessing import PROCESSOR, write_image_processor, write_tokenizer
from clipcluster.export.transformers_towers import text_tower
from clipcluster.model.clip_text import ClipTextTower
from clipcluster.model.dual import SiglipText
from clipcluster.model.hugging_face import quiet_transformers
from clipcluster.model.pooling import at, last_of, mean_of_real
from clipcluster.model.towers import HfImageTower
from clipcluster.runs.files import write_json

TOWERS = "towers.json"
"""Says of every file what it is."""
_JOINING = ("image_projection.", "text_projection.", "head.", "logit_")


def write(opened: Opened, folder: Path) -> None:
    """Write `image.safetensors` for timm or the folder `image` for transformers, the folder `text`, the file
    `projections.safetensors` (of a classifier `head.safetensors`), the preprocessing, and `towers.json`.

    Raises UserError where a file, loaded by its program, gives other features.
    """
    dual = is_dual_encoder(opened)
    about: dict[str, Any] = {"image": _write_image(opened, folder)}
    if dual:
        about["text"] = _write_text(opened, folder)
        write_tokenizer(opened, folder, masked=about["text"]["attention_mask"])
    joining = {k: v for k, v in opened.model.state_dict().items() if k.startswith(_JOINING)}
    file = "projections.safetensors" if dual else "head.safetensors"
    save_file({key: value.contiguous() for key, value in joining.items()}, folder / file)
    about[Path(file).stem] = {"file": file, "tensors": {k: list(v.shape) for k, v in joining.items()}}
    if dual:
        about["features"] = "projection(vector), divided by its length; cosine times exp(logit_scale)"
        assert opened.tokenizer is not None
        about["tokenizer"] = {"padding": "max_length", "max_length": opened.tokenizer.context_length}
    write_image_processor(opened, folder)
    write_json(folder / TOWERS, {**about, "preprocessing": PROCESSOR})
    _check_features(opened, folder, about)


def _write_image(opened: Opened, folder: Path) -> dict[str, Any]:
    tower = opened.model.image
    if isinstance(tower, HfImageTower):
        network: Any = tower.trunk
        network.save_pretrained(str(folder / "image"))
        return _of_transformers("image", network, tower.pool)
    config: Any = opened.recipe.model.image
    save_file({k: v.contiguous() for k, v in tower.trunk.state_dict().items()}, folder / "image.safetensors")
    arguments = {"num_classes": 0, **config.args}
    try:
        timm.create_model(config.timm, img_size=opened.recipe.data.image.size, **arguments)
        arguments["img_size"] = opened.recipe.data.image.size
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return {
        "file": "image.safetensors",
        "library": f"timm {timm.__version__}",
        "load": "timm.create_model(model_name, checkpoint_path=file, **arguments)",
        "model_name": config.timm,
        "arguments": arguments,
        "vector": "what the network gives",
    }


def _write_text(opened: Opened, folder: Path) -> dict[str, Any]:
    tower = opened.model.text
    if not isinstance(tower, ClipTextTower):
        tower.transformer.save_pretrained(str(folder / "text"))
        masked = not isinstance(tower, SiglipText)
        return {**_of_transformers("text", tower.transformer, tower.pool), "attention_mask": masked}
    own = text_tower(opened)
    network = own.network()
    network.save_pretrained(str(folder / "text"))
    about = {**_of_transformers("text", network, own.pool), "attention_mask": not own.projected}
    return {**about, "vector": "pooler_output, which is projected"} if own.projected else about


def _of_transformers(name: str, network: Any, pool: str) -> dict[str, Any]:
    import transformers

    return {
        "file": f"{name}/model.safetensors",
        "library": f"transformers {transformers.__version__}",
        "load": f"AutoModel.from_pretrained('{name}')",
        "class": type(network).__name__,
        "pool": pool,
        "vector": _VECTORS[pool],
    }


_VECTORS = {
    "pooler": "pooler_output",
    "first": "last_hidden_state at the first token",
    "last": "last_hidden_state at the last token that is not padding",
    "mean": "mean of last_hidden_state, of a text over the tokens that are not padding",
}


def _check_features(opened: Opened, folder: Path, about: dict[str, Any]) -> None:
    """The towers, as their programs read them from the folder, give the model's features."""
    image, dual, model = about["image"], is_dual_encoder(opened), opened.model
    if "pool" in image:
        network = _read(folder / "image")
    else:
        file = str(folder / image["file"])
        network = timm.create_model(image["model_name"], checkpoint_path=file, **image["arguments"]).eval()

    def images(pixels: Tensor) -> Tensor:
        if "pool" not in image:
            vectors = network(pixels)
        else:
            vectors = _vector(network(pixel_values=pixels), image["pool"]).flatten(1)
        return unit(model.image_projection(vectors)) if dual else model.head(vectors)

    compare(opened, "the exported image tower", images)
    if not dual:
        return
    text = _read(folder / "text")

    def captions(tokens: Tensor, mask: Tensor) -> Tensor:
        seen = {"attention_mask": mask.long()} if about["text"]["attention_mask"] else {}
        vectors = _vector(text(input_ids=tokens, **seen), about["text"]["pool"], mask)
        return unit(vectors if "projected" in about["text"]["vector"] else model.text_projection(vectors))

    compare(opened, "the exported text tower", text=captions)


def _read(folder: Path) -> Any:
    from transformers import AutoModel

    with quiet_transformers():
        return AutoModel.from_pretrained(str(folder), local_files_only=True).eval()


def _vector(output: Any, pool: str, mask: Tensor | None = None) -> Tensor:
    """A tower's vector from what its network of transformers gives; mask: of a text's real tokens."""
    if pool == "pooler":
        return output.pooler_output
    states = output.last_hidden_state
    if pool == "first":
        return states[:, 0]
    if mask is None:
        return states.mean(dim=(2, 3) if states.ndim == 4 else 1)
    return mean_of_real(states, mask) if pool == "mean" else at(states, last_of(mask))
