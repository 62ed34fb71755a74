"""Texts of items: templates over a record's fields."""

from string import Formatter

from pydantic import BaseModel, ConfigDict, field_validator

from dsmip.data.records import Entity, Mention


class Template(BaseModel):
    """How a mention and an entity become one line of text (DSMIP eq. 2).

    Each is a format string that may name its record's fields only: word and sentence, name and attributes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    mention: str = "{word} : {sentence}"
    entity: str = "{name} : {attributes}"

    @field_validator("mention")
    @classmethod
    def _check_mention(cls, value: str) -> str:
        return _checked(value, {"word", "sentence"})

    @field_validator("entity")
    @classmethod
    def _check_entity(cls, value: str) -> str:
        return _checked(value, {"name", "attributes"})


def _checked(template: str, allowed: set[str]) -> str:
    names = "{" + "}, {".join(sorted(allowed)) + "}"
    try:
        fields = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"template {template!r}: {error}; write braces as {{{{ and }}}}") from None
    used = [(name, spec, conversion) for _, name, spec, conversion in fields if name is not None]
    if not used:
        raise ValueError(f"template {template!r} uses no field; it may use {names}")
    for name, spec, conversion in used:
        if name not in allowed or spec or conversion:
            raise ValueError(f"template {template!r}: {{{name}}} is not one of {names}")
    return template


def mention_text(mention: Mention, template: Template) -> str:
    """The line that stands for a mention."""
    return template.mention.format(word=mention.word, sentence=mention.sentence)


def entity_text(entity: Entity, template: Template) -> str:
    """The line that stands for an entity."""
    return template.entity.format(name=entity.name, attributes=entity.attributes)
