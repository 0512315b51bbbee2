"""Command lines as people type them: options before the verb, and words and options of other programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

# Words of other programs -> the command here.
COMMANDS = {
    **dict.fromkeys(("resume", "restart", "continue", "start", "run", "launch", "sbatch"), "submit RECIPE"),
    **dict.fromkeys(("list", "ls", "ps", "squeue", "info", "show"), "status"),
    **dict.fromkeys(("stop", "kill", "scancel"), "cancel RUN"),
    **dict.fromkeys(("eval", "test", "validate"), "evaluate RUN"),
    **dict.fromkeys(("log", "tail", "follow"), "logs -f RUN"),
    "watch": "status --watch",
    "plot": "metrics RUN --plot",
    **{word: f"--{word}" for word in ("version", "help")},
    **{verb: f"shards {verb}" for verb in ("convert", "index", "verify", "stats", "reshard")},
}
# Options of other programs -> a key of the recipe, or an option here; {} is what was given.
OPTIONS = {
    **dict.fromkeys(("--gpus", "--gpus-per-node", "--gres"), "cluster.gpus_per_node={}"),
    **dict.fromkeys(("--nodes", "-N"), "cluster.nodes={}"),
    **dict.fromkeys(("--ntasks-per-node", "--nproc-per-node"), "cluster.tasks_per_node={}"),
    **dict.fromkeys(("--partition", "-p"), "cluster.partition={}"),
    **dict.fromkeys(("--account", "-A"), "cluster.account={}"),
    **dict.fromkeys(("--time", "-t"), "cluster.time='{} min'"),
    **dict.fromkeys(("--mem", "--qos", "--constraint"), "cluster.{name}={}"),
    **dict.fromkeys(("--lr", "--learning-rate"), "optim.lr={}"),
    **dict.fromkeys(("--wd", "--weight-decay"), "optim.weight_decay={}"),
    "--warmup": "optim.warmup='{} steps'",
    **dict.fromkeys(("--batch-size", "-b"), "data.batch_size={}"),
    "--workers": "data.workers={}",
    "--epochs": "train.duration='{} epochs'",
    "--steps": "train.duration='{} steps'",
    "--precision": "train.precision={}",
    "--seed": "seed={}",
    "--name": "name={}",
    "--local": "--executor local",
    "--slurm": "--executor slurm",
    **dict.fromkeys(("--output", "--out", "-o"), "--runs {}"),
    **dict.fromkeys(("--resume", "--force"), "no option: submitting a run again resumes it"),
}
STATUS_OPTIONS = dict.fromkeys(("--follow", "-f"), "--watch")


def verb_first(words: Sequence[str], commands: Any) -> list[str]:
    """The words with the options that stand before a verb moved behind it; `commands` is click's group."""
    leading: list[str] = []
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in _names(commands.params):
        option = rest.pop(0)
        leading.append(option)
        takes_value = option in _names(_parameters(commands), with_value=True)
        foreign = option in OPTIONS and rest and _verb(commands, rest[0]) is None
        if "=" not in option and rest and (takes_value or foreign):
            leading.append(rest.pop(0))
    inner = _verb(commands, rest[0]) if rest else None
    if inner is None:
        return list(words)
    after = [*leading, *rest[1:]]
    return [rest[0], *(verb_first(after, inner) if hasattr(inner, "list_commands") else after)]


def _verb(commands: Any, name: str) -> Any:
    """The command or group of this name, or None."""
    known = hasattr(commands, "list_commands") and name in commands.list_commands(None)
    return commands.get_command(None, name) if known else None


def _parameters(command: Any) -> Iterator[Any]:
    yield from command.params
    for name in command.list_commands(None) if hasattr(command, "list_commands") else ():
        yield from _parameters(_verb(command, name))


def _names(parameters: Any, *, with_value: bool = False) -> set[str]:
    chosen = (one for one in parameters if not (with_value and getattr(one, "is_flag", True)))
    names = {name for one in chosen for name in one.opts if name.startswith("-")}
    return names if with_value else names | {"-h", "--help"}


def given(words: Sequence[str], names: Sequence[str]) -> str:
    """The value that stands behind an option, or behind `=` in the same word; empty where there is none."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in names:
            return following
        name, equals, value = word.partition("=")
        if equals and name in names:
            return value
    return ""


def pointer(words: Sequence[str], commands: Any, option: str | None) -> str:
    """What to type instead of a word or an option that is not known here; empty where nobody can say."""
    if option is None:
        return _command_pointer(words, commands)
    given = " ".join(words).partition(option)[2]  # "=2 …" or " 2 …"
    value = given[1:].split(" ")[0]
    value = "VALUE" if not value or value.startswith("-") else value
    if words[:1] == ["status"] and option in STATUS_OPTIONS:
        return STATUS_OPTIONS[option]
    if words[:1] not in (["submit"], ["check"], ["evaluate"]):
        return ""
    if "." in option:
        return f"{option.lstrip('-')}={value}"
    return OPTIONS.get(option, "").format(value, name=option.lstrip("-"))


def _command_pointer(words: Sequence[str], commands: Any) -> str:
    first = next((word for word in words if not word.startswith("-")), "")
    unknown = _verb(commands, first) is None
    return f"clipcluster {COMMANDS[first]}" if unknown and first in COMMANDS else ""
