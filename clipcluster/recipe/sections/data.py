"""The section `data`: the samples, their order, and how they become the towers' input. No torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from clipcluster.recipe import captions
from clipcluster.recipe.sections.base import KeyProblem, Section, key, section
from clipcluster.recipe.sections.image import Image
from clipcluster.recipe.sections.values import Float, Int, Paths
from clipcluster.recipe.units import Memory


def _captions_in(value: object) -> object:
    if isinstance(value, dict) and all(isinstance(choice, str) for choice in value):
        captions.checked_probabilities(value)
    elif isinstance(value, str):
        captions.checked(value)
    else:
        raise ValueError(f"should be {captions.CHOICES}, or a mapping of these to probabilities")
    return value


Probabilities = Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
CaptionsIn = Annotated[str | Probabilities, BeforeValidator(_captions_in)]
Repeat = Annotated[Float, Field(ge=0)]


class Source(Section):
    """One source of training samples."""

    shards: Paths = key(
        "result",
        "Folder with indexed shards, a tar, or a glob or braces ({00..09}) of either, or a list of these: "
        "on a disk, at http(s)://, s3://, gs:// or hf://, or the output of a command (pipe:COMMAND).",
        path="path",
    )
    weight: Float | None = key(
        "result",
        "Mixing weight, in proportion to which this source is drawn. Either all sources have one or none; "
        "without weights all shards together are one source.",
        None,
        gt=0,
    )
    repeat: Float = key(
        "result",
        "How often each of this source's samples is drawn in an epoch; 0.5: in every second epoch.",
        1.0,
        ge=0,
    )
    repeat_classes: dict[str, Repeat] = key(
        "result",
        "`repeat` for single classes, by number or by name in classnames.txt: {3: 4, cat: 2, dog: 0.5}; 0 "
        "omits a class.",
        {},
    )
    index: str | None = key(
        "record",
        "Folder of the index, if not beside the shards (clipcluster shards index --index).",
        None,
        path="path",
    )
    captions_in: CaptionsIn | None = key(
        "result",
        "Where the captions are: 'default' (the JSON's captions, else KEY.txt as one caption), 'lines' (the "
        "same, KEY.txt has one per line), 'txt' (KEY.txt alone), 'json:FIELD' of KEY.json, or "
        "'MEMBER.json:FIELD' of KEY.MEMBER.json. Or several of them, each with its probability: "
        "{default: 0.5, 'syn.json:syn_text': 0.5}. Default: 'lines' where dataset_type.txt says retrieval, "
        "else 'default'.",
        None,
    )


class Text(Section):
    """How a caption becomes the input of its tower."""

    tokenizer: str = key(
        "result",
        "'bytes' (one token per byte, needs no file), a folder with a Hugging Face tokenizer, its name on "
        "the hub, or CLIP's vocabulary file (bpe_simple_vocab_16e6.txt.gz).",
        "bytes",
        path="name",
        min_length=1,
    )
    context_length: Int = key(
        "result", "Number of tokens; longer captions are truncated, shorter ones padded.", 77, ge=2
    )
    clean: Literal["none", "whitespace", "lower", "canonicalize"] | None = key(
        "result",
        "What is done to captions first: none; whitespace (broken Unicode and HTML entities repaired, white "
        "space single); lower (and lower case); canonicalize (and without punctuation: SigLIP). Default: "
        "lower for CLIP's vocabulary, else none. Not with bytes.",
        None,
    )
    captions: Literal["all", "random", "first"] = key(
        "result",
        "all: every pair of image and caption is a sample (an epoch counts pairs); random: one caption of "
        "the image at each draw; first: always the first.",
        "random",
    )

    @model_validator(mode="after")
    def _cleaned_words(self) -> Text:
        if self.tokenizer == "bytes" and self.clean not in (None, "none"):
            raise KeyProblem("clean", "has no effect on bytes; remove it, or name another tokenizer")
        return self


class Mixup(Section):
    """Training images and their classes mixed in pairs: mixup or cutmix."""

    alpha: Float = key("result", "Parameter of mixup's beta distribution; 0: no mixup.", 0.8, ge=0)
    cutmix: Float = key("result", "Parameter of cutmix's beta distribution; 0: no cutmix.", 1.0, ge=0)
    probability: Float = key("result", "Probability of mixing, at each draw.", 1.0, gt=0, le=1)
    switch: Float = key(
        "result", "Probability of cutmix instead of mixup, where there are both.", 0.5, ge=0, le=1
    )
    mode: Literal["batch", "pair", "elem"] = key(
        "result",
        "What a draw is made for: batch (the global batch), pair (each pair of samples) or elem (each "
        "sample).",
        "batch",
    )

    @model_validator(mode="after")
    def _one_at_least(self) -> Mixup:
        if self.alpha == self.cutmix == 0:
            raise ValueError("alpha and cutmix are both 0; set one of them above 0, or remove mixup")
        return self


class Order(Section):
    """The order of samples: a pure function of the seed and the step."""

    lanes: Int = key(
        "result",
        "Upper bound of the lanes of a pass; the largest divisor of the batch size up to it "
        "is used. Choose at least ranks x workers, so that each worker reads few shards at a time.",
        64,
        ge=1,
    )
    window: Int = key("result", "Shuffle window: samples of a lane that are shuffled together.", 1024, ge=1)
    full_shuffle_below: Int = key(
        "result",
        "Sources of at most this many samples are shuffled as a whole, without lanes.",
        1_000_000,
        ge=0,
    )


class Cache(Section):
    """The cache of remote shards on a node, shared by its ranks."""

    folder: str | None = key(
        "speed",
        "An absolute path, preferably on a local disk; $NAME and ~ are expanded on the node. Default: "
        "$CLIPCLUSTER_CACHE, else ~/.cache/clipcluster.",
        None,
        shell=True,
        min_length=1,
    )
    size: Memory = key(
        "speed",
        "Upper bound; the least recently used shards are removed first. A full disk lowers it.",
        "100 GB",
    )

    @field_validator("folder")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        if value is not None and not value.startswith(("/", "$", "~")):
            raise ValueError("should be an absolute path, or begin with $NAME or ~")
        return value


class BadSamples(Section):
    """Samples that cannot be decoded are replaced and recorded; too many stop the run."""

    limit: Float = key(
        "record",
        "Fraction of the sources' samples (counted as at least 1,000) that may be bad before the run stops.",
        0.01,
        ge=0,
        le=1,
    )


class Data(Section):
    """The training data."""

    train: tuple[Source, ...] = section("The sources of training samples.")
    batch_size: Int = key("result", "Global batch: samples of one optimizer step, over all ranks.", ge=1)
    epoch_samples: Int | None = key(
        "result", "Samples of an epoch. Default: the sum of the sources, repeats included.", None, ge=1
    )
    workers: Int = key("speed", "Loader processes of each rank; 0: the rank itself loads.", 4, ge=0)
    image: Image = section("How an image becomes the input of its tower.", {})
    text: Text = section("How a caption becomes the input of its tower.", {})
    mixup: Mixup | None = section("Mixup and cutmix (task: classify).", None)
    order: Order = section("The order of samples.", {})
    cache: Cache = section("The cache of remote shards on a node.", {})
    bad_samples: BadSamples = section("Samples that cannot be decoded.", {})

    @field_validator("train")
    @classmethod
    def _sources(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        if not value:
            raise ValueError("should name at least one source: [{shards: FOLDER}]")
        weighted = [source.weight is not None for source in value]
        if any(weighted) and not all(weighted):
            raise ValueError(
                f"source {weighted.index(False)} has no weight; give a weight to every source or to none"
            )
        return value

    @model_validator(mode="after")
    def _one_way_to_choose(self) -> Data:
        shared = [number for number, source in enumerate(self.train) if isinstance(source.captions_in, dict)]
        if shared and self.text.captions == "all":
            raise ValueError(
                f"source {shared[0]} draws its captions by probabilities (captions_in), while text.captions: "
                "all shows every caption once in a pass; set text.captions: random, or one choice in "
                "captions_in"
            )
        return self
