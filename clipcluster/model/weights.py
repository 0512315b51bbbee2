"""Loading starting weights from a file into a tower, with a report of what was loaded.

The names in a file and in a tower often differ by a prefix, and a load that ignores unknown names would then
load nothing and raise nothing. Here prefixes are removed by explicit rules, every tensor of the tower is
accounted for, and a tensor that the file lacks is an error unless the recipe lists it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from clipcluster.errors import UserError
from clipcluster.model.hugging_face import names_in
from clipcluster.model.layouts import LAYOUTS, SIZES
from clipcluster.model.positions import fit_positions
from clipcluster.model.weight_files import WeightsFrom, read_weights, some

if TYPE_CHECKING:
    from clipcluster.recipe.sections.model import Model

# Prefixes that wrappers and training programs put before every name: any number of them, in any order.
_WRAPPERS = ("module", "_orig_mod", "model", "base_model")
# Prefixes of a tower in a larger model.
_TOWER_PREFIXES = {
    "image": (
        *("image", "image.trunk", "trunk", "visual", "visual.trunk", "backbone", "encoder"),
        *("vision_model", "image_encoder", "vit", "deit", "dinov2", "beit"),
        *("convnext", "convnextv2", "resnet"),
    ),
    "text": (
        *("text", "text.transformer", "transformer", "text_model", "backbone", "encoder", "text_encoder"),
        *("bert", "roberta", "distilbert", "electra"),
    ),
    "model": (),
}
_WORDS_OF_A_PREFIX = 6
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Classifiers, language-model heads and poolers: a tower does not have them.
_HEADS = re.compile(
    r"^(head|head_dist|fc|classifier|head\.fc|head\.l|last_linear|lm_head|cls|score|pooler|pre_classifier"
    r"|vocab_[a-z_]+|discriminator_predictions|generator_[a-z_]+|qa_outputs)\.(weight|bias|.*\.(weight|bias)|bias)$"
)
# Parts that are never ignored in a file: a tower without one of them computes something else.
_BODY = {
    "patch_embed",
    "pos_embed",
    "stem",
    "blocks",
    "stages",
    "norm_pre",
    "ln_pre",
    "pre_layrnorm",
    "reg_token",
}
_CLASSIFIERS = ("head", "head.fc", "fc", "classifier", "last_linear", "head.l")
# Buffers that a module computes itself: some versions save them, others do not.
_COMPUTED = re.compile(
    r"(^|\.)(num_batches_tracked|position_ids|token_type_ids|attn\.bias|attn\.masked_bias|relative_position_index"
    r"|relative_coords_table|attn_mask|inv_freq)$"
)
# Tensors of whole models on which no feature depends.
_IDLE = re.compile(rf"{'|'.join(SIZES)}|logit_bias|text\.transformer\.pooler\..*")
_EXACT_GELU = {"GELU", "GELUActivation", "gelu"}  # of torch and timm, of transformers, of CLIP's text tower
_NEW_NAMES = {"gamma": "weight", "beta": "bias"}
_OLD_LAYER_NORM = re.compile(r"(?<=LayerNorm\.)(gamma|beta)$")


@dataclass(frozen=True)
class Coverage:
    """What was loaded from one file into one tower (or into the whole model: tower `model`).

    `loaded` of `tensors` tensors hold `fraction` of the tower's elements. missing: tensors that keep their
    random values, because the recipe lists them. unexpected: the file's tensors (under `prefix`) that the
    tower does not have. layout: whose names the file has, "" for the tower's own. part: `ema` or `raw` where
    the file has both. positions: position embeddings that were resampled -> how. head: what was done with a
    classifier's head, "" for a model without one.
    """

    tower: str
    file: str
    prefix: str
    layout: str
    part: WeightsFrom | Literal[""]
    loaded: int
    tensors: int
    fraction: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    positions: Mapping[str, str] = field(default_factory=dict)
    head: str = ""

    def __str__(self) -> str:
        name = "the model" if self.tower == "model" else f"{self.tower} tower"
        counted = f"{self.loaded} of {self.tensors} tensors ({self.fraction:.1%})"
        text = f"{name}: {counted} from {self.file}"
        if self.part:
            text += {"ema": ", the averaged (EMA) weights", "raw": ", not the averaged weights"}[self.part]
        if self.prefix:
            text += f", prefix {self.prefix!r} removed"
        if self.layout:
            text += f", {self.layout} names"
        for how in dict.fromkeys(self.positions.values()):
            names = [name for name, done in self.positions.items() if done == how]
            text += f"; positions {how} ({some(names)})"
        if self.missing:
            text += f"; randomly initialised: {some(self.missing)}"
        if self.unexpected:
            text += f"; not used: {some(self.unexpected)}"
        if self.head:
            text += f"; {self.head}"
        return text


def load_weights(
    tower: nn.Module,
    source: Path,
    *,
    name: str,
    missing: Sequence[str] = (),
    weights_from: WeightsFrom | None = None,
) -> Coverage:
    """Copy the tensors of a file, or of a model's folder, into a tower: parameters and buffers, any dtype.

    name: the tower, `image` or `text`, or `model` for the whole model.
    missing: patterns (`head.norm.*`) of the tower's tensors that the file may lack, or hold in another shape:
    they keep their random values.
    weights_from: as in `read_weights`.

    Raises UserError where the file is missing or unreadable, lacks any other tensor of the tower in its shape
    and with finite values, or holds a larger tower than the one built. Nothing is copied then.
    """
    weights = read_weights(source, weights_from)
    state = {_OLD_LAYER_NORM.sub(lambda old: _NEW_NAMES[old[0]], key): v for key, v in weights.state.items()}
    state = {now: state[key] for key, now in names_in(tower, [*state]).items()}
    learned = dict(tower.named_parameters(remove_duplicate=False))
    own = {k: v for k, v in tower.state_dict().items() if k in learned or not _COMPUTED.search(k)}
    match = _best_match(state, tower, own, name)
    inside, positions = fit_positions(tower, match.state, text=None if name == "model" else name == "text")
    fitting = {key: value for key, value in inside.items() if key in own and value.shape == own[key].shape}
    coverage = Coverage(
        tower=name,
        file=str(weights.file),
        prefix=match.prefix,
        layout=match.layout,
        part=weights.part,
        loaded=len(fitting),
        tensors=len(own),
        fraction=_elements(fitting.values()) / max(1, _elements(own.values())),
        missing=tuple(key for key in own if key not in fitting),
        unexpected=tuple(key for key in inside if key not in own and not _COMPUTED.search(key)),
        positions=positions,
    )
    _check_missing(coverage, missing, state, inside, own)
    _check_larger(coverage, own)
    _check_activation(coverage, state, tower)
    _check_values(coverage, fitting, own)
    with torch.no_grad():
        for key, value in fitting.items():
            own[key].copy_(value)
    return coverage


def load_head(head: nn.Linear, coverage: Coverage) -> Coverage:
    """Load a classifier's head from the image tower's file, where both have the same number of classes.

    Returns the tower's coverage with its `head` set. Raises UserError as `load_weights` does.
    """
    file = Path(coverage.file)
    # A checkpoint has a file for averaged and one for raw weights, so the file's name decides.
    part = None if file.suffix == ".safetensors" else coverage.part or None
    state = read_weights(file, part).state
    names = (prefix + name for prefix in _prefixes(state, _TOWER_PREFIXES["image"]) for name in _CLASSIFIERS)
    for name in names:
        weight, bias = (state.get(f"{name}.{kind}") for kind in ("weight", "bias"))
        if weight is None or bias is None or weight.flatten(1).shape[1] != head.in_features:
            continue
        if len(weight) != head.out_features:
            dropped = f"head of {len(weight):,} classes dropped, there are {head.out_features:,} here"
            return replace(coverage, head=dropped)
        own, brought = dict(head.named_parameters()), {"weight": weight.flatten(1), "bias": bias}
        _check_values(coverage, brought, own)
        with torch.no_grad():
            for kind, value in brought.items():
                own[kind].copy_(value)
        rest = tuple(key for key in coverage.unexpected if key.rpartition(".")[0] not in _CLASSIFIERS)
        return replace(coverage, head=f"head of {len(weight):,} classes loaded", unexpected=rest)
    return replace(coverage, head="no head in the file")


def load_weights_of(config: Model, model: nn.Module) -> Coverage:
    """Load what a recipe's `model.weights` names into the whole model. Raises UserError as `load_weights`."""
    return load_weights(
        model,
        Path(config.weights or ""),
        name="model",
        missing=config.missing,
        weights_from=config.weights_from,
    )


class _Match(NamedTuple):
    """A state dict with a prefix removed and its names converted from a layout ("" for none)."""

    prefix: str
    layout: str
    state: dict[str, Tensor]


def _best_match(
    state: Mapping[str, Tensor], tower: nn.Module, own: Mapping[str, Tensor], name: str
) -> _Match:
    """The prefix and layout, of those that the rules allow, that give most of the tower's tensors.

    Of equals the shortest prefix, and the tower's own names before others. Raises UserError where two
    prefixes give the whole tower with different values.
    """
    found = []
    named = getattr(tower, "base_model_prefix", "")  # transformers puts it before a network with a head
    for prefix in _prefixes(state, [*_TOWER_PREFIXES[name], *filter(None, [named])]):
        inside = {key[len(prefix) :]: value for key, value in state.items() if key.startswith(prefix)}
        found.append(_Match(prefix, "", inside))
        found += [
            _Match(prefix, layout.name, layout.convert(inside, tower))
            for layout in LAYOUTS[name]
            if layout.recognises(inside)
        ]
    shaped = [match._replace(state=_reshaped(match.state, own)) for match in found]

    def matches(match: _Match) -> tuple[int, int]:
        there = [key for key in own if key in match.state]
        return sum(match.state[key].shape == own[key].shape for key in there), len(there)

    best = max(shaped, key=matches)
    for other in shaped if matches(best)[0] == len(own) else ():
        twice = other.prefix != best.prefix and matches(other)[0] == len(own)
        if twice and any(not torch.equal(other.state[key], best.state[key]) for key in own):
            raise UserError(
                f"The weights hold the {name} tower twice, under the prefixes {best.prefix!r} and "
                f"{other.prefix!r}, with different values: save a file with only one of them."
            )
    return best


def _reshaped(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with dimensions of size one added or removed where that gives the tower's shape."""

    def fitted(key: str, value: Tensor) -> Tensor:
        shape = own[key].shape if key in own else value.shape
        same = [size for size in shape if size != 1] == [size for size in value.shape if size != 1]
        return value.reshape(shape) if same and shape != value.shape else value

    return {key: fitted(key, value) for key, value in state.items()}


def _elements(tensors: Iterable[Tensor]) -> int:
    return sum(value.numel() for value in tensors)


def _prefixes(state: Iterable[str], of_tower: Sequence[str]) -> list[str]:
    """The prefixes of a file's names that the rules allow to remove, the shortest first."""
    wrapped = rf"(?:(?:{'|'.join(_WRAPPERS)})\.)*"
    rule = re.compile(rf"{wrapped}(?:(?:{'|'.join(map(re.escape, of_tower))})\.)?{wrapped}")
    prefixes = {""}
    for key in state:
        words = key.split(".")[:_WORDS_OF_A_PREFIX]
        prefixes |= {".".join(words[:count]) + "." for count in range(1, len(words))}
    return sorted((p for p in prefixes if rule.fullmatch(p)), key=lambda prefix: (len(prefix), prefix))


def _likeliest_prefix(state: Iterable[str], own: Mapping[str, Tensor]) -> tuple[str, int]:
    """The prefix, of any form, whose removal gives most of the tower's names; and how many."""
    found: Counter[str] = Counter()
    for key in state:
        words = key.split(".")
        found.update(
            ".".join(words[:count]) + "." for count in range(1, len(words)) if ".".join(words[count:]) in own
        )
    return found.most_common(1)[0] if found else ("", 0)


def _check_missing(
    coverage: Coverage,
    listed: Sequence[str],
    state: Mapping[str, Tensor],
    inside: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
) -> None:
    """Raises UserError where the file lacks a tensor of the tower that the recipe does not list."""
    name, file = coverage.tower, coverage.file
    key_of = "model" if name == "model" else f"model.{name}"
    idle = [pattern for pattern in listed if not any(fnmatchcase(key, pattern) for key in own)]
    if idle:
        raise UserError(
            f"{key_of}.missing: {some(idle)} is no tensor of what is built; its tensors are {some([*own])}."
        )
    unlisted = [key for key in coverage.missing if not any(fnmatchcase(key, each) for each in listed)]
    if not unlisted:
        return
    what = "model" if name == "model" else f"{name} tower"
    shapes = [
        f"{key}: {tuple(inside[key].shape)} in the file, {tuple(own[key].shape)} in the {what}"
        for key in unlisted
        if key in inside
    ]
    absent = [key for key in unlisted if key not in inside]
    prefix, count = _likeliest_prefix(state, own)
    likeliest = f"prefix {coverage.prefix!r} removed" if coverage.prefix else "no prefix removed"
    likeliest += f", those of {coverage.layout} replaced" if coverage.layout else ""
    if count > sum(key in inside for key in own):
        likeliest += (
            f"; {count} names would match without {prefix!r}, which is none of the known prefixes: save the "
            "file without it"
        )
    raise UserError(
        f"{file} has {coverage.loaded} of the {what}'s {coverage.tensors} tensors "
        f"({coverage.fraction:.1%} of its elements), and every one is needed.\n"
        f"  Names: {likeliest}\n"
        f"  Missing from the file: {some(absent)}\n"
        f"  Shapes that differ: {some(shapes)}\n"
        f"  The file holds: {some(tuple(state))}\n"
        f"Name the {what} the file was made for; or list in {key_of}.missing what may start from random "
        f"values; or leave {key_of}.weights out."
    )


def _check_larger(coverage: Coverage, own: Mapping[str, Tensor]) -> None:
    """Raises UserError where the file's tower has parts that the one built does not have."""
    parts = _BODY | {key.split(".")[0] for key in own}
    larger = [key for key in coverage.unexpected if key.split(".")[0] in parts and not _HEADS.match(key)]
    if coverage.tower == "model":
        larger = [key for key in coverage.unexpected if not _IDLE.fullmatch(key)]
    if larger:
        what = "model than the one" if coverage.tower == "model" else f"tower than the {coverage.tower} tower"
        raise UserError(
            f"{coverage.file} holds a larger {what} built: {len(larger)} of "
            f"its tensors do not fit ({some(tuple(larger))}). Describe the one the file was made for."
        )


def _check_activation(coverage: Coverage, state: Mapping[str, Tensor], tower: nn.Module) -> None:
    """Raises UserError where OpenAI's weights, recognised by `SIZES`, meet towers without quick GELU.

    Every tensor would match, and the features would be wrong.
    """
    kinds = {
        name: getattr(getattr(module, "activation", None), "__name__", type(module).__name__)
        for name, module in tower.named_modules()
    }
    exact = [name for name, kind in kinds.items() if kind in _EXACT_GELU]
    if exact and any(key.rpartition(".")[2] in SIZES for key in state):
        raise UserError(
            f"{coverage.file} holds OpenAI's weights, which were trained with quick GELU, and {some(exact)} "
            "have another: name a tower of timm with quickgelu in its name, and set quick_gelu: true in "
            "model.text.clip."
        )


def _check_values(coverage: Coverage, fitting: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Raises UserError where a tensor is quantised or sparse, or a value is not a number, or infinite."""
    coded = [key for key, value in fitting.items() if not _is_plain(value, own[key])]
    if coded:
        raise UserError(
            f"{coverage.file} holds {some(coded)} as {fitting[coded[0]].dtype}: quantised and sparse "
            "tensors are not read. Name a file in float32, float16 or bfloat16."
        )
    broken = [key for key, value in fitting.items() if not torch.isfinite(value).all()]
    if broken:
        raise UserError(
            f"{coverage.file} holds values that are not finite, in {some(broken)}: it is damaged, or of a "
            "run that diverged. Fetch it again, or name another."
        )


def _is_plain(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor is dense, not quantised, and of a dtype that can be copied into the model's own."""
    if value.layout != torch.strided or value.is_meta or value.is_quantized:
        return False
    return value.dtype in _FLOATS if own.is_floating_point() else value.dtype == own.dtype
