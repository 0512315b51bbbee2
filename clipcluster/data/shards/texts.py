"""The small texts beside shards: names of classes, templates of prompts, and which captions there are."""

from clipcluster.errors import UserError

CLASS_NAMES = "classnames.txt"
TEMPLATES = "zeroshot_classification_templates.txt"
DATASET_TYPE = "dataset_type.txt"
BESIDE_SHARDS = (DATASET_TYPE, CLASS_NAMES, TEMPLATES)


def class_names(data: bytes, where: object) -> list[str]:
    """The names of classes 0, 1, …: one a line, so that a line's place is its class's number.

    Empty lines at the end are none. UserError, naming the line: an empty one before a name, which no prompt
    can be made of and without which all later classes would get another's name; bytes that are not UTF-8.
    """
    names = _lines(data, where)
    while names and not names[-1].strip():
        names.pop()
    for number, name in enumerate(names):
        if not name.strip():
            raise UserError(
                f"{where}: line {number + 1} is empty, and would be the name of class {number}; write the "
                "name there (line N + 1 names class N), or remove the line if it names no class"
            )
    return names


def templates(data: bytes, where: object) -> list[str]:
    """The templates of prompts, one a line, without empty lines. UserError: bytes that are not UTF-8."""
    return [line for line in _lines(data, where) if line.strip()]


def _lines(data: bytes, where: object) -> list[str]:
    """Lines as editors count them, by line feeds alone: Unicode has other breaks."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    return [line.removesuffix("\r") for line in text.split("\n")]
