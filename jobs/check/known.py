"""What the cluster says of itself: all questions at once, within a bound of time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tools.slurm import Association, Node, Partition, Qos, Slurm, SlurmRefused, SlurmUnavailable

ASK_SECONDS = 5.0


@dataclass(frozen=True)
class Known:
    """What SLURM answered; None for what it did not, with the reason in `silent`.

    Attributes:
        qos: each quality of service by its name.
        reservations: the names of those that this user may see.
        pyxis: whether srun takes --container-image.
        silent: name of the attribute -> why there is no answer.
    """

    partitions: list[Partition] | None = None
    nodes: list[Node] | None = None
    config: dict[str, str] | None = None
    associations: list[Association] | None = None
    qos: dict[str, Qos] | None = None
    reservations: list[str] | None = None
    pyxis: bool | None = None
    silent: Mapping[str, str] = field(default_factory=dict)


def ask(slurm: Slurm) -> Known:
    """Ask everything at once; it takes as long as the slowest answer, at most `slurm.timeout`."""
    questions: dict[str, Callable[[], Any]] = {
        "partitions": slurm.partitions,
        "nodes": slurm.nodes,
        "config": slurm.config,
        "associations": slurm.associations,
        "qos": slurm.qos,
        "reservations": slurm.reservations,
        "pyxis": lambda: "--container-image" in slurm.usage("srun"),
    }
    with ThreadPoolExecutor(len(questions)) as pool:
        asked = {name: pool.submit(question) for name, question in questions.items()}
    answers: dict[str, Any] = {}
    silent: dict[str, str] = {}
    for name, answer in asked.items():
        try:
            answers[name] = answer.result()
        except (SlurmUnavailable, SlurmRefused) as error:
            silent[name] = " ".join(str(error).split())
    for name in ("partitions", "nodes"):
        if answers.get(name) == []:
            del answers[name]
            silent[name] = f"SLURM lists no {name}"
    here = (answers.get("config") or {}).get("ClusterName", "").lower()
    if here and "associations" in answers:
        mine = [each for each in answers.pop("associations") if each.cluster.lower() == here]
        if mine:
            answers["associations"] = mine
        else:
            silent["associations"] = f"SLURM lists no account of yours on {here}"
    return Known(**answers, silent=silent)
