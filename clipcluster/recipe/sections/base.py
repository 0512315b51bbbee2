"""The parts of which sections of a recipe are made: `Section`, `key`, which documents a key, and `Kinds`.

Every key carries one of three marks:

- ``result``: decides the trained weights; part of the run's name;
- ``speed``: decides how fast the run is, never its weights;
- ``record``: decides what is kept, measured, or where the run takes place.

`key` also records which strings are paths (they belong to the recipe as they are written, see
`clipcluster.recipe.load`) and which are left to the shell. Sections are frozen and refuse unknown keys. No
torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUndefined, core_schema

Mark = Literal["result", "speed", "record"]


class Section(BaseModel):
    """Base of all sections: frozen, and unknown keys are refused."""

    # A section's validator is built when it is first used: most are only parts of a recipe's.
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, protected_namespaces=(), defer_build=True
    )


class KeyProblem(ValueError):
    """A validator's error about one key of its section, so that the message names the key and its line.

    key: the key's path from the section, dotted. problem: what is wrong with it, and what to do.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem


def key(
    mark: Mark,
    description: str,
    default: Any = PydanticUndefined,
    *,
    path: Literal["path", "name"] | None = None,
    shell: bool = False,
    **limits: Any,
) -> Any:
    """One key of a recipe.

    Args:
        mark: what the key decides.
        description: one sentence or two for the reference page.
        default: the value when the key is left out; none makes the key required.
        path: ``"path"`` when the string is always a path, ``"name"`` when it is a file or folder or else a
            name.
        shell: the text is left to the shell, ``${NAME}`` included.
        limits: pydantic's (``ge``, ``le``, ``min_length``, …).
    """
    noted = {"mark": mark, "path": path, "shell": shell}
    extra = {name: value for name, value in noted.items() if value}
    return section(description, default, json_schema_extra=extra, **limits)


def section(description: str, default: Any = PydanticUndefined, **more: Any) -> Any:
    """A section of a recipe. default: {}, one with its defaults, or None, no section; else it is required."""
    if isinstance(default, dict):
        return Field(default_factory=default.copy, description=description, **more)
    return Field(default, description=description, **more)


class Kinds:
    """Annotates a union of sections with the key by which each is recognised::

        TextTower = Annotated[HfTextTower | ArchTextTower, Kinds(hf=HfTextTower, arch=ArchTextTower)]

    A recipe's section is of the kind whose key it has; null counts as absent. Keys of another kind are
    allowed only at their defaults, as run folders of earlier versions have them. Errors name the kind after
    the field (``("model", "text", "hf", "weights")``), or have a type of their own: `kind_type`,
    `kind_missing`, `kind_ambiguous`.
    """

    def __init__(self, **sections: type[Section]) -> None:
        self.sections = sections

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {name: handler.generate_schema(section) for name, section in self.sections.items()}
        return core_schema.no_info_before_validator_function(
            self._recognised, core_schema.tagged_union_schema(choices, discriminator=self._kind)
        )

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        # anyOf, not oneOf: a recipe that extends another may write only keys that several kinds have.
        return {"anyOf": handler(schema)["oneOf"]}

    def given(self, value: Mapping[str, Any]) -> list[str]:
        """The keys in `value` by which a kind is recognised."""
        return [name for name in self.sections if value.get(name) is not None]

    def _kind(self, value: Any) -> str:
        if isinstance(value, Mapping):
            return self.given(value)[0]
        return next(name for name, section in self.sections.items() if isinstance(value, section))

    def _recognised(self, value: Any) -> Any:
        """A mapping with the keys of one kind only, or a section unchanged."""
        if isinstance(value, tuple(self.sections.values())):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("kind_type", "should be a section")
        given = self.given(value)
        if len(given) != 1:
            kind = "kind_ambiguous" if given else "kind_missing"
            raise PydanticCustomError(kind, "should have one of {names}", {"names": ", ".join(self.sections)})
        return {name: entry for name, entry in value.items() if not self._idle(name, entry, given[0])}

    def _idle(self, name: str, value: Any, kind: str) -> bool:
        """Whether this is a key of another kind, at that kind's default."""
        if name in self.sections[kind].model_fields:
            return False
        others = [other.model_fields[name] for other in self.sections.values() if name in other.model_fields]
        return any(value in (None, field.get_default(call_default_factory=True)) for field in others)


def parts_of(field: FieldInfo | None) -> list[Any]:
    """A field's annotation, then the types inside it, from the outside in; [] for an unknown key."""
    found: list[Any] = [field.annotation] if field else []
    for annotation in found:
        found.extend(getattr(annotation, "__args__", ()))
    return found


def sections_of(field: FieldInfo | None) -> list[type[Section]]:
    """The section of a field (optional and listed ones too), or every kind of a union; [] for a plain key."""
    parts = (part for part in parts_of(field) if isinstance(part, type) and issubclass(part, Section))
    return list(dict.fromkeys(parts))


def kinds_of(field: FieldInfo | None) -> dict[str, type[Section]]:
    """The kinds of a union of sections by the key that recognises each; {} for any other field."""
    marks = list(field.metadata) if field else []
    for part in parts_of(field):
        marks.extend(getattr(part, "__metadata__", ()))
    return next((mark.sections for mark in marks if isinstance(mark, Kinds)), {})


def is_list_of_sections(field: FieldInfo) -> bool:
    """Whether a field is a list of sections (data.train)."""
    return bool(sections_of(field)) and getattr(field.annotation, "__origin__", None) is tuple


def extra_of(field: FieldInfo) -> dict[str, Any]:
    """What `key` recorded of a field: its mark, and whether it is a path or left to the shell."""
    return field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}


def walk(model: type[Section], prefix: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], FieldInfo]]:
    """Every field of a section and of those below it, with its path; list positions are written ``*``.

    A key that several kinds of a union have comes once for each.
    """
    for name, field in model.model_fields.items():
        path = (*prefix, name)
        yield path, field
        for inner in sections_of(field):
            yield from walk(inner, (*path, "*") if is_list_of_sections(field) else path)
