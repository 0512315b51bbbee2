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
# Options that are no key of the recipe, or whose values have units -> what to type; {} is what was given.
OPTIONS = {
    **dict.fromkeys(("--gpus", "--gres"), "cluster.gpus_per_node={}"),
    **dict.fromkeys(("--ntasks-per-node", "--nproc-per-node"), "cluster.tasks_per_node={}"),
    "--learning-rate": "optim.lr={}",
    "--time": "cluster.time='{} min'",
    "--warmup": "optim.warmup='{} steps'",
    "--epochs": "train.duration='{} epochs'",
    "--steps": "train.duration='{} steps'",
    "--local": "--executor local",
    "--slurm": "--executor slurm",
    **dict.fromkeys(("--output", "--out", "-o"), "--runs {}"),
    **dict.fromkeys(("--resume", "--force"), "no option: submitting a run again resumes it"),
}


def verb_first(words: Sequence[str], command: Any) -> list[str]:
    """The words with the options that stand before a verb moved behind it; `command` is click's."""
    verbs = command.list_commands(None) if hasattr(command, "list_commands") else ()
    own = {"-h", "--help"}.union(*(parameter.opts for parameter in command.params))
    places = (at for at, word in enumerate(words) if word in verbs)
    place = next((at for at in places if at == 0 or not _takes_value(command, words[at - 1])), None)
    if place is None or (place > 0 and (not words[0].startswith("-") or words[0] in own)):
        return list(words)
    inner = command.get_command(None, words[place])
    return [words[place], *verb_first([*words[:place], *words[place + 1 :]], inner)]


def _takes_value(command: Any, word: str) -> bool:
    """Whether a word is an option, of a command or of one below it, whose value is the next word."""
    if not word.startswith("-"):
        return False
    below = command.list_commands(None) if hasattr(command, "list_commands") else ()
    return any(word in one.opts and not getattr(one, "is_flag", True) for one in command.params) or any(
        _takes_value(command.get_command(None, name), word) for name in below
    )


def pointer(words: Sequence[str], commands: Any, option: str | None) -> str:
    """What to type instead of a word or an option that is not known here; empty where nobody can say."""
    if option is None:
        first = next((word for word in words if not word.startswith("-")), "")
        known = first in commands.list_commands(None)
        return f"clipcluster {COMMANDS[first]}" if first in COMMANDS and not known else ""
    given = " ".join(words).partition(option)[2]  # "=2 …" or " 2 …"
    value = given[1:].split(" ")[0]
    value = "VALUE" if not value or value.startswith("-") else value
    if option in ("--gpus", "--gres"):
        value = value.rpartition(":")[2]  # of gpu:a100:2
    if words[:1] == ["status"] and option in ("--follow", "-f"):
        return "--watch"
    if words[:1] in (["evaluate"], ["export"], ["search"]) and option in ("--step", "--checkpoint"):
        return f"RUN/checkpoints/step-{value:0>8}" if value.isdecimal() else "RUN/checkpoints/step-…"
    if words[:1] not in (["submit"], ["check"], ["evaluate"]):
        return ""
    if option in OPTIONS:
        return OPTIONS[option].format(value)
    from clipcluster.recipe.sections.base import walk
    from clipcluster.recipe.sections.recipe import Recipe

    name = option.lstrip("-").replace("-", "_")
    # of several keys with one last word the shallowest: cluster.mem before evaluate.cluster.mem
    paths = sorted((path for path, _ in reversed(list(walk(Recipe)))), key=len, reverse=True)
    keys = {path[-1]: ".".join(path).replace("*", "0") for path in paths}
    key = name if "." in name else keys.get(name)
    return f"{key}={value}" if key else ""
