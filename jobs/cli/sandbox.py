"""The verbs `clipcluster sandbox …`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from clipcluster.runs.names import find_run, runs_folder
from clipcluster.text import counted
from jobs.cli.options import AsJson, Runs, group, print_document, say

sandbox = group("A throwaway SLURM cluster of several nodes on this machine, for tests and demonstrations.")
SandboxFolder = Annotated[
    Path,
    typer.Option(
        "--dir",
        metavar="DIR",
        envvar="CLIPCLUSTER_SANDBOX",
        show_envvar=False,
        show_default=False,
        help="Its folder. Default: $CLIPCLUSTER_SANDBOX, else ./sandbox",
    ),
]
HERE = Path("sandbox")


@sandbox.command("start")
def sandbox_start(
    nodes: Annotated[int, typer.Option("--nodes", metavar="N", min=1, max=64, help="How many nodes.")] = 4,
    cpus: Annotated[
        int, typer.Option("--cpus", metavar="N", min=1, help="CPUs of each, as SLURM is told.")
    ] = 4,
    grace: Annotated[
        int, typer.Option("--grace", metavar="S", min=0, help="GraceTime of the low partition, seconds.")
    ] = 10,
    kill_wait: Annotated[int, typer.Option("--kill-wait", metavar="S", min=1, help="KillWait, seconds.")] = 5,
    user_signal: Annotated[
        bool,
        typer.Option("--user-signal", help="Set preempt_send_user_signal: no TERM, but the job's --signal."),
    ] = False,
    folder: SandboxFolder = HERE,
) -> None:
    """Start it, and print the line that makes a shell use it."""
    from tools.sandbox.sandbox import start

    started = start(
        folder,
        nodes=nodes,
        cpus=cpus,
        grace_seconds=grace,
        kill_wait_seconds=kill_wait,
        user_signal=user_signal,
    )
    say(f"# {counted(nodes, 'node')}, partitions low (preemptible) and high; use them in this shell with:")
    say(f"export SLURM_CONF={started.conf}")


@sandbox.command("stop")
def sandbox_stop(
    keep_logs: Annotated[bool, typer.Option("--keep-logs", help="Keep the daemons' logs.")] = False,
    folder: SandboxFolder = HERE,
) -> None:
    """Stop it and remove its folder."""
    from tools.sandbox.sandbox import stop

    ended = stop(folder, keep_logs=keep_logs)
    say(f"{folder}: {counted(ended, 'process')} ended")


@sandbox.command("status")
def sandbox_status(folder: SandboxFolder = HERE, as_json: AsJson = False) -> None:
    """Show its nodes and jobs."""
    from tools.sandbox.sandbox import status

    found = status(folder)
    if as_json:
        document = {"folder": str(found.sandbox.folder), **asdict(found)}
        del document["sandbox"]
        print_document(document)
        return
    say(f"{found.sandbox.folder}: " + ("running" if found.running else "not running"))
    for node in found.nodes:
        say(f"  {node.name}: {node.state}" + ("" if node.responding else ", not responding"))
    for job in found.jobs:
        say(f"  job {job.job_id} {job.name}: {job.state} in {job.partition} on {', '.join(job.nodes) or '-'}")


@sandbox.command("preempt")
def sandbox_preempt(
    run: Annotated[str, typer.Argument(metavar="RUN|JOB", help="A run, or a job's id.")],
    hold: Annotated[
        float, typer.Option("--hold", metavar="S", help="How long the other job keeps the nodes, seconds.")
    ] = 0,
    come_back: Annotated[
        bool, typer.Option("--come-back/--no-come-back", help="Let it start again at once.")
    ] = True,
    folder: SandboxFolder = HERE,
    runs: Runs = None,
) -> None:
    """Preempt a running job by one of higher priority, and let it start again."""
    from tools.sandbox import preempt

    job = run if preempt.JOB_ID.fullmatch(run) else find_run(run, runs_folder(runs)).path
    done = preempt.preempt(folder, job, come_back=come_back, hold_seconds=hold)
    say(
        f"job {done.job_id} left {', '.join(done.nodes)} after {done.evicted_after:.1f} s; "
        + ("requeued" if done.requeued else f"not requeued: {done.state}")
    )


NodeName = Annotated[str, typer.Argument(metavar="NODE", help="A node, such as n2.")]


@sandbox.command("kill-node")
def sandbox_kill_node(node: NodeName, folder: SandboxFolder = HERE) -> None:
    """Kill a node: slurmd, step daemons and tasks at once, as when a machine loses its power."""
    from tools.sandbox.sandbox import kill_node

    ended = kill_node(folder, node)
    say(f"{node}: {counted(ended, 'process')} killed; SLURM notices after about 25 s")


@sandbox.command("lose-node")
def sandbox_lose_node(node: NodeName, folder: SandboxFolder = HERE) -> None:
    """Kill a node's slurmd alone: to SLURM the node is gone, its ranks keep running."""
    from tools.sandbox.sandbox import lose_node

    lose_node(folder, node)
    say(f"{node}: slurmd killed, its ranks keep running; SLURM notices after about 25 s")


@sandbox.command("restore-node")
def sandbox_restore_node(node: NodeName, folder: SandboxFolder = HERE) -> None:
    """Start a node's slurmd again, and wait until SLURM can use it."""
    from tools.sandbox.sandbox import restore_node

    restore_node(folder, node)
    say(f"{node}: up")
