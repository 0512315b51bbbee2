"""A section that is one of several kinds with keys of their own: ``{hf: …}`` or ``{arch: …}``. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from clipcluster.recipe.sections.base import Section


class Kinds:
    """Annotates a union of sections with the key by which each is recognised::

        TextTower = Annotated[HfTextTower | ArchTextTower, Kinds(hf=HfTextTower, arch=ArchTextTower)]

    A recipe's section is of the kind whose key it has; null counts as absent. Keys of another kind are
    allowed only at their defaults, as run folders of earlier versions have them. Errors name the kind after
    the field (``("model", "text", "hf", "weights")``), or have a type of their own: `kind_type`,
    `kind_missing`, `kind_ambiguous`.
    """

    def __init__(self, **sections: type[Section]) -> None:
        for name, section in sections.items():
            others = [other for other in sections.values() if other is not section]
            assert name in section.model_fields
            assert not any(name in other.model_fields for other in others), f"{name} names two kinds"
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

    def _given(self, value: Mapping[str, Any]) -> list[str]:
        return [name for name in self.sections if value.get(name) is not None]

    def _kind(self, value: Any) -> str:
        if isinstance(value, Mapping):
            return self._given(value)[0]
        return next(name for name, section in self.sections.items() if isinstance(value, section))

    def _recognised(self, value: Any) -> Any:
        """A mapping with the keys of one kind, or a section as it is."""
        if isinstance(value, tuple(self.sections.values())):
            return value
        if not isinstance(value, Mapping):
            raise PydanticCustomError("kind_type", "should be a section")
        given = self._given(value)
        if len(given) != 1:
            kind = "kind_ambiguous" if given else "kind_missing"
            raise PydanticCustomError(kind, "should have one of {names}", {"names": ", ".join(self.sections)})
        return {name: entry for name, entry in value.items() if not self._idle(name, entry, given[0])}

    def _idle(self, name: str, value: Any, kind: str) -> bool:
        """Whether this is a key of another kind, at its default."""
        if name in self.sections[kind].model_fields:
            return False
        others = [other.model_fields[name] for other in self.sections.values() if name in other.model_fields]
        return any(value in (None, field.get_default(call_default_factory=True)) for field in others)
