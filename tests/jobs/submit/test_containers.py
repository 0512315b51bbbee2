"""The ranks in a container: the line that srun is given, as bash reads it."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clipcluster.errors import UserError
from clipcluster.recipe.load import load
from clipcluster.recipe.sections.cluster import Cluster
from clipcluster.runs.folder import Run
from jobs.submit import containers, parameters, script
from jobs.submit.prepared import Prepared
from jobs.submit.sweep import _groups

RECIPE = Path(__file__).resolve().parents[3] / "recipes" / "digits.yaml"

SRUN = """#!/bin/bash
printf '%s\\n' "$@"
echo "PYTHONPATH=$APPTAINERENV_PYTHONPATH NCCL_DEBUG=$APPTAINERENV_NCCL_DEBUG"
"""


@pytest.fixture
def words(tmp_path):
    """What srun is given by the batch script of a section, and what a container's variables are."""
    from submitit.slurm.slurm import _make_sbatch_string

    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    code = tmp_path / "run 0" / "code-1"
    code.mkdir(parents=True)
    (code.parent / "submitit").mkdir()

    def words(**container):
        cluster = Cluster(gpus_per_node=2, environment={"NCCL_DEBUG": "a 'b'"}, container=container or None)
        setup = script.setup(cluster, shlex.quote(str(code)), "-c 'print(0)'", logs=code.parent / "submitit")
        chosen = parameters.of_job(cluster, name="x", comment="x", setup=setup, lead=60)
        python = containers.before_python(cluster, script.environment(cluster))
        text = _make_sbatch_string(command=f"{python} -u -m ranks", folder=tmp_path / "submitit", **chosen)
        path = f"{tmp_path}:/usr/bin:/bin"
        given = {"PATH": path, "SLURM_JOB_ID": "17", "PYTHONPATH": "/mine"}
        done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, env=given)
        assert done.returncode == 0, done.stderr
        *lines, variables = done.stdout.splitlines()
        return lines[lines.index("--cpus-per-task=4") + 1 :], variables, str(code)

    return words


def test_without_a_container_the_ranks_have_the_python_of_the_submission(words):
    line, variables, _ = words()
    assert line[:4] == [sys.executable, "-I", "-S", "-c"]
    assert line[-3:] == ["-u", "-m", "ranks"]
    assert variables == "PYTHONPATH= NCCL_DEBUG="


def test_apptainer(words):
    line, variables, code = words(
        runtime="apptainer",
        image="/images/my torch.sif",
        python="/opt/python",
        mounts=("/data", "/a b:/in:ro"),
        arguments=("--rocm",),
    )
    run = code.rpartition("/")[0]
    assert line[:4] == ["apptainer", "exec", "--pwd", code]
    assert line[4:12] == [
        "--bind",
        run,
        "--bind",
        f"{run}/submitit",
        "--bind",
        "/data",
        "--bind",
        "/a b:/in:ro",
    ]
    assert line[12:18] == ["--nv", "--rocm", "/images/my torch.sif", "/opt/python", "-I", "-S"]
    assert line[-3:] == ["-u", "-m", "ranks"]
    assert variables == f"PYTHONPATH={code}:/mine NCCL_DEBUG=a 'b'"


def test_pyxis(words):
    line, variables, code = words(
        runtime="pyxis",
        image="nvcr.io#nvidia/pytorch:25.01-py3",
        mounts=("/data", "/scratch:/in:ro"),
        arguments=("--container-writable",),
    )
    run = code.rpartition("/")[0]
    assert line[:7] == [
        "--container-image=nvcr.io#nvidia/pytorch:25.01-py3",
        f"--container-workdir={code}",
        f"--container-mounts={run}:{run},{run}/submitit:{run}/submitit,/data:/data,/scratch:/in:ro",
        "--container-env=PYTHONPATH,HF_HUB_OFFLINE,NCCL_DEBUG",
        "--container-writable",
        "python3",
        "-I",
    ]
    assert variables == "PYTHONPATH= NCCL_DEBUG="


def test_what_cannot_be_mounted_is_refused(tmp_path):
    inside = Cluster(container={"runtime": "pyxis", "image": "x"})
    with pytest.raises(UserError, match="cannot mount a folder with ','"):
        containers.refuse_folder(inside, tmp_path / "a,b")
    containers.refuse_folder(inside, tmp_path)
    containers.refuse_folder(Cluster(), tmp_path / "a,b")
    for wrong in ("data", "/a,b", "/a:b", "/a:/b:"):
        with pytest.raises(ValueError, match="/FOLDER"):
            Cluster(container={"runtime": "pyxis", "image": "x", "mounts": [wrong]})
    with pytest.raises(ValueError, match="--cleanenv takes away SLURM's variables"):
        Cluster(container={"runtime": "apptainer", "image": "x", "arguments": ["--rocm", "--cleanenv"]})


def test_what_follows_a_run_can_write_its_result(tmp_path):
    inside = Cluster(container={"runtime": "pyxis", "image": "x", "mounts": ["/data"]})
    out = tmp_path / "made" / "results"
    changed = containers.writing_to(inside, out)
    assert changed.container is not None
    assert changed.container.mounts == ("/data", str(out))
    assert out.is_dir()
    assert containers.writing_to(changed, out) == changed
    assert containers.writing_to(Cluster(), tmp_path / "none") == Cluster()
    assert not (tmp_path / "none").exists()


def test_members_of_a_sweep_with_other_images_are_no_array(tmp_path):
    members = []
    for image in ("docker://a", "docker://b", "docker://a"):
        section = f"cluster.container={{runtime: apptainer, image: '{image}'}}"
        members.append(Prepared(Run(tmp_path), load(RECIPE, [section], {}).recipe, tmp_path, 30, False))
    assert [len(group) for group in _groups(members)] == [2, 1]
