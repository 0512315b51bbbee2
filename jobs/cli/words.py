"""Command lines as people type them: options before the verb, and words and options of other programs."""

from __future__ import annotations

from collections.abc import Sequence
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


def verb_first(words: Sequence[str], command: Any) -> list[str]:
    """The words with the options that stand before a verb moved behind it; `command` is click's."""
    verbs = command.list_commands(None) if hasattr(command, "list_commands") else ()
    own = {"-h", "--help"}.union(*(parameter.opts for parameter in command.params))
    place = next((number for number, word in enumerate(words) if word in verbs), None)
    if place is None or (place > 0 and (not words[0].startswith("-") or words[0] in own)):
        return list(words)
    inner = command.get_command(None, words[place])
    return [words[place], *verb_first([*words[:place], *words[place + 1 :]], inner)]


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
    known = first in commands.list_commands(None)
    return f"clipcluster {COMMANDS[first]}" if first in COMMANDS and not known else ""
