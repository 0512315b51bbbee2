"""The section `evaluate`: what is measured, and when. No torch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from clipcluster.recipe.sections.base import Section, key, section
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.sections.values import Int
from clipcluster.recipe.units import Interval, Memory, Nodes, Time


class Resources(Section):
    """What the job of an evaluation asks for on its one node; the rest is as in the section cluster."""

    gpus_per_node: Int | None = key(
        "record", "GPUs, a rank each; 0: one rank on the CPU. Default: 1, or 0 as in training.", None, ge=0
    )
    cpus_per_task: Int | None = key("record", "CPU cores of each rank. Default: as in training.", None, ge=1)
    mem: Memory | None = key("record", "Memory of the node. Default: as in training.", None)
    time: Time | None = key("record", "Time limit, for a whole evaluation. Default: as in training.", None)
    partition: str | None = key("record", "SLURM partition. Default: as in training.", None)
    qos: str | None = key("record", "SLURM quality of service. Default: as in training.", None)
    constraint: str | None = key("record", "SLURM node features. Default: as in training.", None)


class ZeroShot(Section):
    """One set for zero-shot classification; a folder alone is short for {shards: FOLDER}."""

    shards: str = key("record", "Shard folder with a class for each image.", path="path", min_length=1)
    classnames: str | None = key(
        "record",
        "Names of the classes: a file, one per line (line N + 1 names class N), imagenet-1k, imagenet-12k "
        "or imagenet-22k (timm's, the first of WordNet's words), or openai (ImageNet-1K's as CLIP was "
        "published with; needs open_clip_torch). Default: classnames.txt beside the shards or in the folder "
        "above.",
        None,
        path="name",
        min_length=1,
    )
    templates: str | None = key(
        "record",
        "Templates of the prompts: a file, one per line, {c} where the class name goes, openai (the 80 for "
        "ImageNet) or openai-7 (both need open_clip_torch). Default: zeroshot_classification_templates.txt "
        "beside the shards or in the folder above.",
        None,
        path="name",
        min_length=1,
    )
    name: str | None = key(
        "record",
        "Name of the set in its metrics, for one that is measured more than once. Default: the last "
        "component of shards.",
        None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
    )


class Probe(Section):
    """Classifiers fitted to frozen features of one set and measured on another."""

    train: str = key(
        "record", "Shard folder with a class for each image, to fit to.", path="path", min_length=1
    )
    test: str = key(
        "record",
        "Shard folder to measure on; metrics are named by its last component.",
        path="path",
        min_length=1,
    )


class OrFolder:
    """Annotates a section that may be written as its folder of shards alone."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_before_validator_function(
            lambda value: {"shards": value} if isinstance(value, str) else value, handler(source)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [{"type": "string"}, handler(schema)]}


Entry = str | ZeroShot | Probe


class Evaluate(Section):
    """What is measured, and when."""

    every: Interval | None = key(
        "record", "How often, besides the end of the run. Default: only at the end.", None
    )
    where: Literal["train", "job"] = key(
        "record",
        "train: in the training, which waits meanwhile. job: as a job of its own, from the checkpoint of the "
        "step, which is kept until then; training continues.",
        "train",
    )
    cluster: Resources = section("With where: job, what such a job asks for.", {})
    retrieval: tuple[str, ...] = key(
        "record",
        "Shard folders for image-text retrieval; metrics are named by the last component of each.",
        (),
        path="path",
    )
    zero_shot: tuple[Annotated[ZeroShot, OrFolder()], ...] = key(
        "record",
        "Sets for zero-shot classification, each a shard folder or a section; metrics are named by the last "
        "component of the folder.",
        (),
        path="path",
    )
    classification: tuple[str, ...] = key(
        "record",
        "Shard folders for classification (task: classify); with train.ema the averaged weights are measured "
        "and, as raw_…, the raw ones.",
        (),
        path="path",
    )
    probe: tuple[Probe, ...] = section(
        "Sets for nearest neighbours and a linear probe on frozen features.", ()
    )
    batch_size: Int = key("record", "Samples of one forward pass, over all ranks.", 256, ge=1)

    def entries(self, kind: str) -> tuple[Entry, ...]:
        """The entries of one of the keys that name sets, each once."""
        found: tuple[Entry, ...] = getattr(self, kind)
        return tuple(dict.fromkeys(found))

    def cluster_of_job(self, training: Cluster) -> Cluster:
        """The `cluster` section of an evaluation's own job: one node of the training's, with what differs."""
        own = {name: value for name, value in self.cluster if value is not None}
        small: dict[str, Any] = {
            "nodes": Nodes(1, 1),
            "gpus_per_node": min(1, training.gpus_per_node),
            "tasks_per_node": None,
        }
        if "partition" in own:
            small["grace"] = None  # it was found for the training's partition
        return training.model_copy(update={**small, **own})


def folders_of(entry: Entry) -> tuple[str, ...]:
    """The folders of shards that an entry names, the one that is measured first."""
    if isinstance(entry, str):
        return (entry,)
    return (entry.shards,) if isinstance(entry, ZeroShot) else (entry.test, entry.train)
