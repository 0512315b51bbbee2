"""What the verbs of the command share: options, how an answer is printed, and what people may type."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from clipcluster.runs.files import finite

SETTINGS = {"help_option_names": ["-h", "--help"]}

Runs = Annotated[
    Path | None,
    typer.Option("--runs", metavar="DIR", help="Where runs are. Default: $CLIPCLUSTER_RUNS, else ./runs"),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]

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


def group(text: str, **more: Any) -> typer.Typer:
    """A group of verbs with this help; `more` as typer takes it."""
    return typer.Typer(
        **more,
        help=text,
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings=SETTINGS,
    )


def say(text: str) -> None:
    """One answer on stdout."""
    typer.echo(text)


def print_document(value: Any) -> None:
    """One JSON document on stdout; for NaN and infinities see `finite`."""
    value = [finite(one) for one in value] if isinstance(value, list) else finite(value)
    plain = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    typer.echo(plain)  # default=str: paths, times


def verb_first(words: Sequence[str], commands: Any) -> list[str]:
    """The words with the options that stand before a verb moved behind it; `commands` is click's group."""
    leading: list[str] = []
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in _names(commands.params):
        option = rest.pop(0)
        leading.append(option)
        if "=" not in option and rest and option in _names(_parameters(commands), with_value=True):
            leading.append(rest.pop(0))
    if not rest or rest[0] not in getattr(commands, "commands", {}):
        return list(words)
    inner = commands.commands[rest[0]]
    after = [*leading, *rest[1:]]
    return [rest[0], *(verb_first(after, inner) if hasattr(inner, "commands") else after)]


def _parameters(command: Any) -> Iterator[Any]:
    yield from command.params
    for inner in getattr(command, "commands", {}).values():
        yield from _parameters(inner)


def _names(parameters: Any, *, with_value: bool = False) -> set[str]:
    chosen = (one for one in parameters if not (with_value and getattr(one, "is_flag", True)))
    return {"-h", "--help"} - ({"-h", "--help"} if with_value else set()) | {
        name for one in chosen for name in one.opts if name.startswith("-")
    }


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
    known = commands
    for word in words:
        if word not in getattr(known, "commands", {}):
            break
        known = known.commands[word]
    else:
        return ""
    if known is commands and word in COMMANDS:
        return f"clipcluster {COMMANDS[word]}"
    return ""
