"""`clipcluster report`: one HTML file about one run or several, which needs nothing besides itself."""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from clipcluster.runs import files
from clipcluster.runs.folder import Run
from clipcluster.text import shortened
from jobs.accounting import KINDS
from jobs.report import words
from jobs.report.facts import differences, facts_of
from jobs.report.figures import figures_of
from jobs.report.gallery import IMAGE_BYTES, gallery_of
from jobs.report.plots import COLOURS
from jobs.report.timeline import SHORT
from jobs.state import Queue

HERE = Path(__file__).resolve().parent
ENDINGS = (".html", ".htm")


def write(runs: Sequence[Run], out: Path, queue: Queue) -> int:
    """Write the page about these runs to `out`, replacing it; returns its bytes.

    Raises UserError for a file that cannot be written, and for a run that cannot be read.
    """
    files.require_writable("--out", out, ENDINGS)
    # a caption may hold half of a surrogate pair, which UTF-8 cannot say
    content = page(runs, queue).encode(errors="replace")
    files.write_bytes(out, content)
    return len(content)


def page(runs: Sequence[Run], queue: Queue) -> str:
    """The page about these runs. Raises UserError for a file of theirs that cannot be read."""
    facts = [facts_of(run, queue) for run in runs]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    # Nothing is ever fetched, and no script runs but this one, whatever other people's texts hold.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        breakable=words.breakable,
        count=words.count,
        duration=words.duration,
        figure=words.figure,
        moment=words.moment,
        score=words.score,
        shortened=shortened,
    )
    return environment.get_template("page.html").render(
        runs=facts,
        galleries=[gallery_of(run, image_bytes=IMAGE_BYTES // len(runs)) for run in runs],
        figures=figures_of(facts),
        differences=differences(facts),
        headline=list(dict.fromkeys(n for one in facts for e in one.evaluations[-1:] for n in e.headline)),
        kinds=KINDS,
        short_kinds=SHORT,
        colours=COLOURS,
        policy=policy,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        made=time.time(),
    )
