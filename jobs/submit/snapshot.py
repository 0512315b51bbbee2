"""The code a run will execute, copied into its folder: editing the checkout changes no queued job."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from clipcluster.errors import UserError
from clipcluster.runs import files

PACKAGES = ("clipcluster", "jobs", "tools")
FACTS = "snapshot.json"
_NAME = re.compile("code-[0-9]+")
CHECK = (
    "import sys, jobs.train, jobs.endings.__main__, clipcluster.rank.serve, submitit.core.submission\n"
    "assert 'torch' not in sys.modules, 'torch is imported before the signal handlers stand'\n"
    "print(jobs.train.__file__)"
)


def take(folder: Path, like: Path | None = None) -> Path:
    """Copy the packages into `code-N` unless an earlier folder holds the same; check that it can start.

    `like`: a snapshot that was taken for another run a moment ago, which is copied as it is.
    Raises UserError where the copy cannot start (and removes it).
    """
    sources = {name: like / name if like else _folder_of(name) for name in PACKAGES}
    digest = _digest(sources)
    there = sorted((path for path in folder.glob("code-*") if _NAME.fullmatch(path.name)), key=_number)
    for path in reversed(there):
        if _digest({name: path / name for name in PACKAGES}) == digest:
            return path
    number = _number(there[-1]) + 1 if there else 1
    target = folder / f"code-{number}"
    aside = folder / f".code-{number}.{secrets.token_hex(4)}.tmp"
    try:
        if like is not None:
            shutil.copytree(like, aside)
        else:
            _copy(sources, aside, digest)
            _check(aside)
        os.rename(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _number(code: Path) -> int:
    return int(code.name.removeprefix("code-"))


def _folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.origin:
        raise UserError(f"the package {package} is not installed as a folder; reinstall clipcluster")
    return Path(spec.origin).parent


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".pyc":
            yield path


def _digest(sources: dict[str, Path]) -> str:
    """SHA-256 over the names and contents of all files."""
    digest = hashlib.sha256()
    for name, folder in sources.items():
        for path in _sources(folder):
            content = path.read_bytes()
            digest.update(f"{name}/{path.relative_to(folder)}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def _copy(sources: dict[str, Path], target: Path, digest: str) -> None:
    for name, folder in sources.items():
        for path in _sources(folder):
            copy = target / name / path.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
    git, diff = _git(sources["clipcluster"].parent)
    if diff:
        (target / "git.diff").write_bytes(diff)
    files.write_json(
        target / FACTS,
        {"digest": digest, **git, "python": sys.executable, "time": round(time.time(), 3)},
    )


def _git(checkout: Path) -> tuple[dict[str, object], bytes]:
    """Commit and whether the packages differ from it, with the difference; nothing outside a git checkout."""

    def git(*words: str) -> bytes:
        return subprocess.run(
            ["git", "-C", str(checkout), *words],
            capture_output=True,
            check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        ).stdout

    try:
        git("ls-files", "--error-unmatch", "clipcluster/errors.py")  # ours, not some folder above
        commit = git("rev-parse", "HEAD").decode().strip()
        untracked = git("ls-files", "--others", "--exclude-standard", *PACKAGES).decode().split()
        diff = git("diff", "HEAD", "--", *PACKAGES)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}, b""
    return {"commit": commit, "dirty": bool(diff or untracked), "untracked": untracked}, diff


def _check(code: Path) -> None:
    """Start the copy's job modules once, so that a broken snapshot never queues."""
    done = subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=code,
        env=environment(code),
        capture_output=True,
        text=True,
    )
    # Resolved, because Python names the file in its working directory by the real path.
    if done.returncode != 0 or not Path(done.stdout.strip()).resolve().is_relative_to(code.resolve()):
        said = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise UserError(
            f"the snapshot of the code cannot start with {sys.executable}:\n{said}\n"
            "Fix the code or the environment, then submit again."
        )


def environment(code: Path) -> dict[str, str]:
    """This process's environment with the snapshot first on Python's path."""
    path = os.pathsep.join(part for part in (str(code), os.environ.get("PYTHONPATH")) if part)
    return {**os.environ, "PYTHONPATH": path}
