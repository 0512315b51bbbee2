"""The whole recipe: its sections, and how they fit together. No torch."""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import WithJsonSchema, model_validator

from clipcluster.recipe.captions import OWN, field_of, probabilities_of
from clipcluster.recipe.sections.base import KeyProblem, Section, key, section
from clipcluster.recipe.sections.checkpoint import Checkpoint
from clipcluster.recipe.sections.checks import Checks
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.recipe.sections.data import Data
from clipcluster.recipe.sections.distill import Distill, ModelTeacher
from clipcluster.recipe.sections.evaluate import Evaluate
from clipcluster.recipe.sections.freeze import Freeze
from clipcluster.recipe.sections.loss import Loss
from clipcluster.recipe.sections.model import Model
from clipcluster.recipe.sections.optim import Optim
from clipcluster.recipe.sections.train import Train
from clipcluster.recipe.sections.values import Int
from clipcluster.recipe.tasks import KEYS, METRICS, TASKS

TaskName = Annotated[  # type: ignore[valid-type]
    Literal[tuple(TASKS)],
    WithJsonSchema({"type": "string", "enum": sorted(TASKS)}),
]


class Recipe(Section):
    """One training run."""

    name: str = key(
        "record",
        "Name of the run; its folder is the name and eight digits of a hash.",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$",
        max_length=100,
    )
    task: TaskName = key("result", "What the model is trained for.", "contrastive")  # type: ignore[valid-type]
    seed: Int = key("result", "Seed of all random numbers.", 0, ge=0, lt=2**63)
    data: Data = section("The training data.")
    model: Model = section("The towers and what joins them.")
    loss: Loss = section("What is minimised over the global batch.", {})
    distill: Distill | None = section("What is learned from teachers (task: distill).", None)
    freeze: tuple[Freeze, ...] = section(
        "Which layers of the towers train, and from when on. Default: all.", ()
    )
    optim: Optim = section("The optimizer and its schedule.")
    train: Train = section("Length, precision and log of the run.")
    checkpoint: Checkpoint = section("When to save, and what to keep.", {})
    evaluate: Evaluate = section("What is measured, and when.", {})
    cluster: Cluster = section("Where the run takes place.", {})
    on_event: str | None = key(
        "record",
        "Shell command that is told when an attempt finishes, fails, stalls or is requeued: a script, or one "
        'line such as curl -d "$CLIPCLUSTER_MESSAGE" ADDRESS.',
        None,
        shell=True,
    )
    checks: Checks = section("Findings of the check that are intended.", {})

    @model_validator(mode="after")
    def _fits_the_task(self) -> Recipe:
        spec = TASKS[self.task]
        if spec.captions and self.model.text is None and self.model.dual is None:
            raise ValueError(f"the key model.text is missing: task {self.task} needs a text tower")
        for number, entry in enumerate(self.freeze):
            if entry.tower == "text" and not spec.captions:
                raise KeyProblem(f"freeze.{number}.tower", f"task {self.task} has no text tower; remove it")
        for needed, keys in KEYS.items():
            others = " or ".join(name for name, other in TASKS.items() if getattr(other, needed))
            for path in () if getattr(spec, needed) else keys:
                section_name, name = path.split(".")
                if not _at_default(getattr(self, section_name), name):
                    raise KeyProblem(
                        path, f"task {self.task} does not use it; remove it, or set task to {others}"
                    )
        for kind in METRICS.keys() - set(spec.evaluations):
            if getattr(self.evaluate, kind):
                fitting = " or ".join(f"evaluate.{own}" for own in spec.evaluations)
                raise KeyProblem(f"evaluate.{kind}", f"task {self.task} cannot be measured so; use {fitting}")
        return self

    @model_validator(mode="after")
    def _bias_for_siglip(self) -> Recipe:
        biased = self.model.logit_bias is not None
        if self.loss.name == "siglip" and not biased:
            raise KeyProblem("loss.name", "siglip needs a bias: set model.logit_bias to {init: -10}")
        if biased and self.loss.name != "siglip":
            raise KeyProblem(
                "model.logit_bias",
                f"the loss {self.loss.name} is the same with any bias; remove it, or set loss.name to siglip",
            )
        return self

    @model_validator(mode="after")
    def _teachers_for_distillation(self) -> Recipe:
        if self.task == "distill" and self.distill is None:
            raise ValueError(
                "task distill needs the section distill, such as distill: {teachers: [{run: FOLDER}]}"
            )
        if self.task != "distill" and self.distill is not None:
            raise KeyProblem(
                "distill", f"task {self.task} does not use it; remove it, or set task to distill"
            )
        if self.distill is not None and self.distill.stored is not None:
            drawn = ("crop_scale", "crop_ratio", "flip", "augment", "color_jitter", "random_erasing")
            for name in drawn:
                if not _at_default(self.data.image, name):
                    default = json.dumps(type(self.data.image).model_fields[name].default)
                    raise KeyProblem(
                        f"data.image.{name}",
                        "has no effect with distill.stored, whose augmentations are applied; remove it, or "
                        f"set it to its default, {default}",
                    )
            for number, source in enumerate(self.data.train):
                for choice in probabilities_of(source.captions_in):
                    if not _seen_by_stored_teachers(choice):
                        raise KeyProblem(
                            f"data.train.{number}.captions_in",
                            f"{choice}: the stored teachers saw the images' own captions and the synthetic "
                            "ones alone; should be default, lines, txt, json:captions, json:caption or "
                            "syn.json:syn_text",
                        )
        return self

    def teachers(self) -> dict[int, Recipe]:
        """A recipe for each teacher that is given by its model, by its number in distill.teachers."""
        given = self.distill.teachers if self.distill else ()
        return {n: self._for_teacher(own) for n, own in enumerate(given) if isinstance(own, ModelTeacher)}

    def _for_teacher(self, teacher: ModelTeacher) -> Recipe:
        image, text = (
            part.model_copy(update=own.model_dump(exclude_none=True))
            for part, own in ((self.data.image, teacher.image), (self.data.text, teacher.text))
        )
        data = self.data.model_copy(update={"image": image, "text": text})
        update = {"task": "contrastive", "distill": None, "model": teacher.model, "data": data}
        return self.model_copy(update=update)


def _seen_by_stored_teachers(choice: str | None) -> bool:
    """Whether embeddings of these captions may be stored with a sample."""
    field = field_of(choice) if choice else None
    return field is None or field in OWN or field[0] == "syn.json"


def _at_default(part: Section, name: str) -> bool:
    """Whether a key of a section has its default value, or is a section of defaults."""
    value, field = getattr(part, name), type(part).model_fields[name]
    default = field.get_default(call_default_factory=True)
    return bool(value == (type(value)() if default == {} and isinstance(value, Section) else default))
