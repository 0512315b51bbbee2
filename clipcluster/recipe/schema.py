"""The recipe as validated sections: every key, what it means, and what it decides.

Every key carries one of three marks:

- ``result``: decides the trained weights; part of the run's name;
- ``speed``: decides how fast they come, never which;
- ``record``: decides what is kept, measured, or where the run lives.

`key` also notes which strings are paths (they belong to the recipe as written, see `clipcluster.recipe.load`)
and which are left to the shell. Sections are frozen and refuse unknown keys. No torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    WithJsonSchema,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from clipcluster.recipe import captions
from clipcluster.recipe.units import Duration, Memory, Nodes, Period, Time

Mark = Literal["result", "speed", "record"]
MEANS = {
    "openai": (0.48145466, 0.4578275, 0.40821073),
    "imagenet": (0.485, 0.456, 0.406),
}
DEVIATIONS = {
    "openai": (0.26862954, 0.26130258, 0.27577711),
    "imagenet": (0.229, 0.224, 0.225),
}


def _whole(value: object) -> object:
    """A whole number also where it was written as a decimal or in quotes (``1e6``, ``"1_000"``)."""
    if isinstance(value, bool):
        raise ValueError("should be a whole number")
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("should be a whole number") from None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _real(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("should be a number")
    return value


def _list_of(count: int, value: object) -> object:
    """Exactly so many entries, else one message about the list instead of one about each place."""
    if not isinstance(value, (list, tuple)) or len(value) != count:
        raise ValueError(f"should be a list of {count} numbers")
    return value


Int = Annotated[int, BeforeValidator(_whole)]
Float = Annotated[float, BeforeValidator(_real), Field(allow_inf_nan=False)]
Pair = Annotated[tuple[Float, Float], BeforeValidator(partial(_list_of, 2))]


def _replace(names: dict[str, tuple[float, float, float]], value: object) -> object:
    if not isinstance(value, str):
        return _list_of(3, value)
    if value not in names:
        raise ValueError(f"should be one of {', '.join(names)}, or three numbers (red, green, blue)")
    return names[value]


_COLOURS = WithJsonSchema(
    {
        "anyOf": [
            {"enum": list(MEANS)},
            {"type": "array", "items": {"type": "number"}, "minItems": 3, "maxItems": 3},
        ]
    }
)
Mean = Annotated[tuple[Float, Float, Float], BeforeValidator(partial(_replace, MEANS)), _COLOURS]
Deviation = Annotated[tuple[Float, Float, Float], BeforeValidator(partial(_replace, DEVIATIONS)), _COLOURS]


def _one_or_more(value: object) -> object:
    if isinstance(value, str) and value:
        return value
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(entry, str) and entry for entry in value)
    ):
        return tuple(value)
    raise ValueError("should be a path, or a list of paths")


Paths = Annotated[
    str | tuple[str, ...],
    BeforeValidator(_one_or_more),
    WithJsonSchema(
        {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}
    ),
]


def _captions_in(value: object) -> object:
    if isinstance(value, dict) and all(isinstance(choice, str) for choice in value):
        for choice, share in value.items():
            if isinstance(share, bool) or not isinstance(share, (int, float)):
                raise ValueError(f"{choice!r} has the probability {share!r}; should be a positive number")
        captions.checked_shares(value)
        return {choice: float(share) for choice, share in value.items()}
    if isinstance(value, str):
        return captions.checked(value)
    raise ValueError(f"should be {captions.CHOICES}, or a mapping of these to probabilities")


CaptionsIn = Annotated[
    str | dict[str, float],
    BeforeValidator(_captions_in),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "object",
                    "additionalProperties": {"type": "number", "exclusiveMinimum": 0},
                    "minProperties": 1,
                },
            ]
        }
    ),
]


def _by_class(value: object) -> object:
    """Class numbers may be written as numbers."""
    if not isinstance(value, dict):
        return value
    return {str(name) if isinstance(name, int) else name: repeat for name, repeat in value.items()}


Repeat = Annotated[Float, Field(ge=0)]
RepeatByClass = Annotated[dict[str, Repeat], BeforeValidator(_by_class)]


def key(
    mark: Mark,
    description: str,
    default: Any = ...,
    *,
    path: str | None = None,
    shell: bool = False,
    **limits: Any,
) -> Any:
    """One key of a recipe.

    Args:
        mark: what the key decides.
        description: one sentence or two for the reference page.
        default: the value when the key is left out; none makes the key required.
        path: ``"path"`` when the string is always a path, ``"name"`` when it is a folder or else a name.
        shell: the text is left to the shell, ``${NAME}`` included.
        limits: pydantic's (``ge``, ``le``, ``min_length``, …).
    """
    extra: dict[str, Any] = {"mark": mark}
    if path:
        extra["path"] = path
    if shell:
        extra["shell"] = True
    if isinstance(default, (list, dict)):
        limits["default_factory"] = default.copy
    elif default is not ...:
        limits["default"] = default
    return Field(description=description, json_schema_extra=extra, **limits)


def section(description: str, default: Any = ...) -> Any:
    """A section of a recipe: a class gives its defaults, None leaves it out, nothing makes it required."""
    if isinstance(default, type):
        return Field(description=description, default_factory=default)
    return (
        Field(description=description) if default is ... else Field(default=default, description=description)
    )


class Section(BaseModel):
    """What all sections share: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, protected_namespaces=())


class Source(Section):
    """One source of training samples."""

    shards: Paths = key(
        "result",
        "Folder with indexed shards; or a tar, a glob or braces ({00..09}) of either, or a list of these; "
        "here, or at http(s)://, s3://, gs://, hf://, or what commands print (pipe:COMMAND).",
        path="path",
    )
    weight: Float | None = key(
        "result",
        "This source's share of the draws. All sources have one or none has; with none they are one source, "
        "their shards together.",
        None,
        gt=0,
    )
    repeat: Float = key(
        "result",
        "How often an epoch shows each of this source's samples; 0.5: each in every second epoch.",
        1.0,
        ge=0,
    )
    repeat_classes: RepeatByClass = key(
        "result",
        "The same for single classes, in place of `repeat`: {3: 4, cat: 2, dog: 0.5}, by number or by name "
        "in classnames.txt; 0 leaves a class out.",
        {},
    )
    index: str | None = key(
        "record",
        "Folder of the index, where it does not lie beside the shards (clipcluster shards index --index).",
        None,
        path="path",
    )
    captions_in: CaptionsIn | None = key(
        "result",
        "Where the captions are: 'default' (the JSON's captions, else KEY.txt as one caption), 'lines' (the "
        "same, KEY.txt holds one a line), 'txt' (KEY.txt alone), 'json:FIELD' of KEY.json, or "
        "'MEMBER.json:FIELD' of KEY.MEMBER.json. Or several of them, each with its probability: "
        "{default: 0.5, 'syn.json:syn_text': 0.5}. Default: 'lines' where dataset_type.txt says retrieval, "
        "else 'default'.",
        None,
    )


class Image(Section):
    """How an image becomes the tower's input."""

    size: Int = key("result", "Side of the square input, in pixels.", 224, ge=1)
    crop_scale: Pair = key(
        "result", "Area of the random training crop, as shares of the image: smallest, largest.", (0.9, 1.0)
    )
    crop_ratio: Pair = key(
        "result", "Width over height of the random training crop: smallest, largest.", (0.75, 4 / 3)
    )
    flip: bool = key("result", "Mirror every second training image left to right, by chance.", False)
    interpolation: Literal["bicubic", "bilinear"] = key(
        "result", "How images are resized (always with antialiasing).", "bicubic"
    )
    mean: Mean = key(
        "result",
        "Mean of each colour that is subtracted: openai, imagenet or three numbers.",
        MEANS["openai"],
    )
    std: Deviation = key(
        "result",
        "Deviation of each colour that is divided by: openai, imagenet or three numbers.",
        DEVIATIONS["openai"],
    )

    @field_validator("crop_scale", "crop_ratio")
    @classmethod
    def _ordered(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not 0 < value[0] <= value[1]:
            raise ValueError("should be two numbers above zero, the smaller first")
        return value

    @field_validator("crop_scale")
    @classmethod
    def _a_share(cls, value: tuple[float, float]) -> tuple[float, float]:
        if value[1] > 1:
            raise ValueError("should be shares of the image: at most 1.0")
        return value

    @field_validator("std")
    @classmethod
    def _divides(cls, value: tuple[float, float, float]) -> tuple[float, float, float]:
        if min(value) <= 0:
            raise ValueError("should be above zero")
        return value


class Text(Section):
    """How a caption becomes the tower's input."""

    tokenizer: str = key(
        "result",
        "'bytes' (one token a byte, no file needed), a folder with a Hugging Face tokenizer, or its name on "
        "the hub.",
        "bytes",
        path="name",
        min_length=1,
    )
    context_length: Int = key("result", "Tokens of a caption; longer ones are cut.", 77, ge=2)
    captions: Literal["all", "random", "first"] = key(
        "result",
        "all: every caption makes a sample of its own (an epoch counts pairs); random: one of an image's "
        "captions at each draw; first: always the first.",
        "random",
    )


class Order(Section):
    """In which order samples come: a pure function of the seed and the step."""

    lanes: Int = key(
        "result",
        "Upper bound of the lanes a pass is cut into (the largest divisor of the batch size up to it is "
        "used). At least ranks x workers keeps reading cheap.",
        64,
        ge=1,
    )
    window: Int = key("result", "Samples of a lane that are shuffled together.", 1024, ge=1)
    full_shuffle_below: Int = key(
        "result", "Sources of at most so many samples are shuffled whole.", 1_000_000, ge=0
    )


class Cache(Section):
    """Where remote shards are kept on a node, shared by its ranks; local ones need none."""

    folder: str | None = key(
        "speed",
        "An absolute path, best on a disk of the node itself; $NAME and ~ are read on the node. Default: "
        "$CLIPCLUSTER_CACHE, else ~/.cache/clipcluster.",
        None,
        shell=True,
        min_length=1,
    )
    size: Memory = key(
        "speed",
        "Upper bound of what is kept; what was used longest ago goes first. Less is kept "
        "where the disk is full.",
        Memory.parse("100 GB"),
    )

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("/", "$", "~")):
            raise ValueError("should be an absolute path (or begin with $NAME or ~)")
        return value


class BadSamples(Section):
    """Samples that cannot be decoded are replaced and written down; too many stop the run."""

    limit: Float = key(
        "record",
        "Share of the sources' samples (counted as at least 1,000) that may be bad before the run stops.",
        0.01,
        ge=0,
        le=1,
    )


class Data(Section):
    """What is trained on."""

    train: tuple[Source, ...] = section("The sources of training samples.")
    batch_size: Int = key(
        "result", "Global batch: samples of one optimizer step, whatever the cluster's size.", ge=1
    )
    epoch_samples: Int | None = key(
        "result", "Samples of an epoch. Default: the sum of the sources, repeats counted.", None, ge=1
    )
    workers: Int = key("speed", "Loader processes of each rank; 0 loads in the rank itself.", 4, ge=0)
    image: Image = section("How an image becomes the tower's input.", Image)
    text: Text = section("How a caption becomes the tower's input.", Text)
    order: Order = section("In which order samples come.", Order)
    cache: Cache = section("Where remote shards are kept.", Cache)
    bad_samples: BadSamples = section("What happens to samples that cannot be decoded.", BadSamples)

    @field_validator("train")
    @classmethod
    def _sources(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        if not value:
            raise ValueError("should name at least one source: [{shards: FOLDER}]")
        weighted = [source.weight is not None for source in value]
        if any(weighted) and not all(weighted):
            raise ValueError(f"source {weighted.index(False)} has no weight: give every source one, or none")
        return value

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Data:
        shared = [number for number, source in enumerate(self.train) if isinstance(source.captions_in, dict)]
        if shared and self.text.captions == "all":
            raise ValueError(
                f"source {shared[0]} draws its captions by probabilities (captions_in), while text.captions: "
                "all shows every caption once a pass: say text.captions: random, or name one choice in "
                "captions_in"
            )
        return self


class ImageTower(Section):
    """The image tower."""

    timm: str = key("result", "Name of the tower in timm, such as convnextv2_tiny or vit_base_patch16_224.")
    weights: str | None = key(
        "result",
        "File with the tower's starting weights. Default: from scratch.",
        None,
        path="path",
        min_length=1,
    )
    args: dict[str, Any] = key("result", "Arguments for timm's create_model, such as drop_path_rate.", {})


class TextTower(Section):
    """The text tower: exactly one of `hf` and `arch`."""

    hf: str | None = key(
        "result",
        "Folder with a transformers model's configuration, or its name on the hub.",
        None,
        path="name",
        min_length=1,
    )
    arch: str | None = key(
        "result",
        "Model type known to transformers (gpt2, roberta, …), built from scratch with `config`.",
        None,
    )
    config: dict[str, Any] = key("result", "With `arch`: values of its configuration, such as n_layer.", {})
    weights: str | None = key(
        "result",
        "File with the tower's starting weights, or 'pretrained' for those that belong to `hf`. "
        "Default: from scratch.",
        None,
        path="path",
        min_length=1,
    )
    pool: Literal["last", "first", "mean"] | None = key(
        "result",
        "Which token stands for the caption: the last real one, the first, or the mean of the real ones. "
        "Default: by architecture (last for causal ones, first for the others).",
        None,
    )

    @model_validator(mode="after")
    def _one_origin(self) -> TextTower:
        if (self.hf is None) == (self.arch is None):
            raise ValueError(
                "should have exactly one of hf (a folder or a hub name) and arch (a model type, from scratch)"
            )
        if self.config and self.arch is None:
            raise ValueError("config goes with arch; a tower named by hf brings its own configuration")
        if self.weights == "pretrained" and self.hf is None:
            raise ValueError("weights: pretrained goes with hf; with arch give a file, or leave it out")
        return self


class LogitScale(Section):
    """The learned scale of the similarities."""

    init: Float = key("result", "Its value at the start (1/0.07 as in CLIP).", 1 / 0.07, gt=0)
    max: Float = key("result", "Its upper bound.", 100.0, gt=0)

    @model_validator(mode="after")
    def _below_the_bound(self) -> LogitScale:
        if self.init > self.max:
            raise ValueError(f"init {self.init:g} is above max {self.max:g}")
        return self


class Model(Section):
    """The towers and what joins them."""

    image: ImageTower = section("The image tower.")
    text: TextTower = section("The text tower.")
    embed_dim: Int = key("result", "Length of the vectors in which images and captions meet.", 512, ge=1)
    logit_scale: LogitScale = section("The learned scale of the similarities.", LogitScale)


class Optim(Section):
    """The optimizer and its schedule."""

    name: Literal["adamw"] = key("result", "The optimizer.", "adamw")
    lr: Float = key("result", "Learning rate after the warm-up.", ge=0)
    weight_decay: Float = key(
        "result", "Decoupled weight decay; norms, biases and the logit scale have none.", 0.2, ge=0
    )
    betas: Pair = key("result", "Decay of the two moments.", (0.9, 0.98))
    eps: Float = key("result", "Added to the root of the second moment.", 1e-6, gt=0)
    clip_norm: Float | None = key(
        "result", "Largest norm of the whole gradient. Default: not clipped.", None, gt=0
    )
    schedule: Literal["cosine", "constant"] = key(
        "result", "cosine: to zero by the end of the run; constant: as it is.", "cosine"
    )
    warmup: Duration = key(
        "result", "The learning rate rises linearly over this, from nearly zero.", Duration.parse("0 steps")
    )

    @field_validator("betas")
    @classmethod
    def _decays(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError("should be two numbers from 0 to below 1")
        return value


class Ema(Section):
    """A moving average of the weights, evaluated and saved beside them."""

    decay: Float = key("result", "Share of the average that stays at each step.", 0.9999, gt=0, lt=1)


class NonFinite(Section):
    """Steps whose loss or gradient is not a number are skipped and counted."""

    limit: Int = key(
        "result",
        "More skipped steps in a row than this: once back to the last good checkpoint, leaving the range "
        "out; then the run stops.",
        10,
        ge=0,
    )


class Train(Section):
    """The run itself."""

    duration: Duration = key("result", "Length of the run.")
    micro_batch: Int | None = key(
        "speed",
        "Upper bound of the samples a rank takes at once. Default: its whole share of the batch.",
        None,
        ge=1,
    )
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "result", "Arithmetic of the towers: fp16 scales the loss, bf16 does not need to.", "fp32"
    )
    ema: Ema | None = section("A moving average of the weights, evaluated and saved beside them.", None)
    record_samples: bool = key(
        "record", "Write down every consumed sample: step, slot, shard and key.", False
    )
    log_every: Duration = key("record", "How often a line of metrics is written.", Duration.parse("10 steps"))
    non_finite: NonFinite = section("Losses and gradients that are not numbers.", NonFinite)


class Best(Section):
    """Checkpoints kept because they measured best."""

    metric: str = key("record", "The metric, such as val/t2i_r1.", min_length=1)
    count: Int = key("record", "How many to keep.", 1, ge=1)


class Keep(Section):
    """Which checkpoints stay; the others go once a newer one is in place."""

    last: Int = key("record", "The newest so many; at least 2, since the newest may be found broken.", 3)
    every: Duration | None = key("record", "Also one every so often, for good.", None)
    best: Best | None = section("Also the best by a metric.", None)

    @field_validator("last")
    @classmethod
    def _two_at_least(cls, value: int) -> int:
        if value < 2:
            raise ValueError("keep at least 2: the newest may be found broken, or still be being written")
        return value


class Checkpoint(Section):
    """When to save, and what to keep."""

    every: Period = key("record", "How often to save: a duration or a time.", Time.parse("15 min"))
    keep: Keep = section("Which checkpoints stay.", Keep)


class Evaluate(Section):
    """What is measured, and when."""

    every: Duration | None = key(
        "record", "How often; the end of the run always. Default: only the end.", None
    )
    retrieval: tuple[str, ...] = key(
        "record",
        "Shard folders for image-text retrieval; each is named by its last component.",
        (),
        path="path",
    )
    zero_shot: tuple[str, ...] = key(
        "record",
        "Shard folders for zero-shot classification (class names and templates beside the shards).",
        (),
        path="path",
    )
    batch_size: Int = key("record", "Samples that all ranks together take at once.", 256, ge=1)


class Cluster(Section):
    """Where it runs. A site profile may set all of these; the recipe and the command line come first."""

    nodes: Nodes = key("record", "Nodes: a count (2) or a range (2-4).", Nodes(1, 1))
    gpus_per_node: Int = key("record", "GPUs of each node; 0 trains on the CPU.", 1, ge=0)
    tasks_per_node: Int | None = key(
        "record", "Ranks of each node. Default: one a GPU, or 1 without GPUs.", None, ge=1
    )
    cpus_per_task: Int = key("record", "CPU cores of each rank.", 4, ge=1)
    mem: Memory | None = key("record", "Memory of each node. Default: the partition's own.", None)
    time: Time = key(
        "record", "Time limit of one attempt; a run that needs longer goes on by itself.", Time.parse("4 h")
    )
    grace: Time | None = key(
        "record",
        "Time between the signal and the kill at a preemption. Default: what SLURM tells, else 30 s.",
        None,
    )
    partition: str | None = key("record", "SLURM partition.", None)
    account: str | None = key("record", "SLURM account.", None)
    qos: str | None = key("record", "SLURM quality of service.", None)
    constraint: str | None = key("record", "SLURM node features, such as a100|h100.", None)
    interface: str | None = key(
        "record", "Network interface over which ranks of several nodes find each other.", None
    )
    setup: tuple[str, ...] = key(
        "record", "Lines of shell that the job runs first (modules, an environment).", (), shell=True
    )
    environment: dict[str, str] = key("record", "Environment variables of the job.", {})

    @field_validator("environment", mode="before")
    @classmethod
    def _as_text(cls, value: object) -> object:
        if isinstance(value, dict):
            return {
                name: str(entry) if isinstance(entry, (int, float)) and not isinstance(entry, bool) else entry
                for name, entry in value.items()
            }
        return value

    @property
    def ranks_per_node(self) -> int:
        """Ranks of each node: `tasks_per_node`, else one a GPU, else 1."""
        return self.tasks_per_node or max(1, self.gpus_per_node)


class Recipe(Section):
    """One training run."""

    name: str = key(
        "record",
        "Name of the run; its folder is the name and eight digits of a hash.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
    )
    task: Literal["contrastive"] = key("result", "What is learnt.", "contrastive")
    seed: Int = key("result", "Seed of everything that is random.", 0, ge=0, lt=2**63)
    data: Data = section("What is trained on.")
    model: Model = section("The towers and what joins them.")
    optim: Optim = section("The optimizer and its schedule.")
    train: Train = section("The run itself.")
    checkpoint: Checkpoint = section("When to save, and what to keep.", Checkpoint)
    evaluate: Evaluate = section("What is measured, and when.", Evaluate)
    cluster: Cluster = section("Where it runs.", Cluster)


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section behind a field, also of an optional one and of a list of sections; None for a plain key."""
    candidates = [field.annotation]
    while candidates:
        annotation = candidates.pop()
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return annotation
        candidates.extend(getattr(annotation, "__args__", ()))
    return None


def is_list_of_sections(field: FieldInfo) -> bool:
    """Whether a field holds several sections (data.train)."""
    return section_of(field) is not None and getattr(field.annotation, "__origin__", None) is tuple


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What `key` noted beside a field: its mark, and whether it is a path or left to the shell."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def walk(
    model: type[Section] = Recipe, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field of a section and of those below it, with its path; list positions are written ``*``."""
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        yield path, field
        inner = section_of(field)
        if inner is not None:
            yield from walk(inner, (*path, "*") if is_list_of_sections(field) else path)
