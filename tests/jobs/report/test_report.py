"""Reports as a reader meets them, in Chromium: phone and desk, dark and light, with and without scripts."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from clipcluster.errors import UserError
from clipcluster.runs import files
from jobs.report.facts import facts_of
from jobs.report.figures import figures_of
from jobs.report.report import write
from jobs.state import Queue
from jobs.status import report
from jobs.submit.submit import Wanted, submit
from tests.browser import PAPER, PHONE, overflowing
from tests.jobs.report.example_runs import (
    BATCH,
    HOSTILE,
    claimed,
    details,
    evaluated,
    long,
    made,
    preempted,
    sweep,
    told,
    trained,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The report of the preempted run, with a hostile class and shard, and a hostile caption that has half a
    surrogate pair, Hebrew, a control character and 10,000 more letters."""
    folder = tmp_path_factory.mktemp("one")
    run = preempted(folder, caption=f"{HOSTILE} \ud800\x1b\u202e\u05d0\u05d1 {10_000 * 'x'}")
    write([run], folder / "one.html", Queue())
    return folder / "one.html"


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """The report of the sweep."""
    folder = tmp_path_factory.mktemp("six")
    write(sweep(folder), folder / "six.html", Queue())
    return folder / "six.html"


def test_a_preempted_run(one, opened):
    with opened(one, PHONE) as page:
        assert page.title() == "preempted-0a1b2c3d"
        assert page.locator("header .state").inner_text() == "FINISHED"
        assert page.locator("h2").all_inner_texts() == [
            "Curves",
            "Evaluation",
            "Gallery",
            "Where the time went",
            "What was skipped",
            "Recipe",
            "Environment and provenance",
        ]
        assert overflowing(page) == []
        assert "xxx…" in page.locator("#gallery .query p").first.inner_text()
        assert "preempted 1 ×, crashed 1 ×" in page.locator("header").inner_text()
        titles = page.locator("figcaption").all_inner_texts()
        assert titles[:6] == [
            "loss",
            "learning rate",
            "logit scale",
            "gradient norm",
            "throughput, samples/s",
            "wait for data, seconds a line",
        ]
        assert "colours/zero_shot_top1, %" in titles
        marks = page.locator("#curves .plots").first.locator("figure").first.locator("path")
        strokes = [mark.evaluate("path => path.style.stroke") for mark in marks.all()]
        assert strokes.count("var(--bad)") == 1, "one attempt began after a preemption"
        assert strokes.count("var(--mark)") == 1, "one after a crash"
        tiles = page.locator(".tiles").inner_text()
        assert "74.44 %" in tiles, "0.8 (1 - exp(-400/150))"
        ends = page.locator("#time tbody tr td:nth-child(4)").all_inner_texts()
        assert ends == ["preempted", "crashed", "finished"]
        widths = page.locator("#time .bar span").evaluate_all(
            "parts => parts.map(part => parseFloat(part.style.width))"
        )
        assert sum(widths) == pytest.approx(100, abs=0.01)
        skipped = page.locator("#skipped").inner_text()
        assert "3 bad samples" in skipped
        assert re.search(r"JPEG: truncated\s+2", skipped)
        assert "roll back" in skipped
        assert "commit 0123abcd, with uncommitted changes" in page.locator("#provenance").inner_text()
        assert "cuda:0 (NVIDIA H200)" in page.locator("#provenance").inner_text()


def test_texts_pictures_values_and_the_page_without_scripts(one, opened):
    with opened(one) as page:
        page.locator("details").evaluate_all("parts => parts.forEach(part => { part.open = true })")
        assert page.evaluate("window.pwned") is None
        assert page.locator("script").count() == 1
        assert page.locator("img:not([src^='data:image/jpeg'])").count() == 0
        caption = page.locator("#gallery .query p").first
        assert caption.inner_text().startswith(HOSTILE.replace("  ", " "))
        assert HOSTILE in page.locator("#gallery .errors").inner_text()
        assert HOSTILE in page.locator("#skipped").inner_text()
        policy = page.locator("meta[http-equiv]").get_attribute("content")
        assert policy.startswith("default-src 'none'")
        images = page.locator("#gallery img")
        assert images.count() == 7
        assert all(images.evaluate_all("all => all.map(image => image.complete && image.naturalWidth > 0)"))
        rights = page.locator("#gallery .row").first.locator(".picture")
        assert [("right" in one.get_attribute("class"), "✓" in one.inner_text()) for one in rights.all()] == [
            (False, False),
            (False, False),
            (True, True),
        ]
        plot = page.locator(".plot").first
        box = plot.bounding_box()
        page.mouse.move(box["x"] + 0.95 * box["width"], box["y"] + box["height"] / 2)
        reading = plot.locator(".reading").inner_text().split("\n")
        step = int(reading[0].removeprefix("step ").replace(",", ""))
        assert 300 < step <= 400
        assert float(reading[1]) == pytest.approx(0.6, abs=0.3)
    with opened(one, javascript=False) as page:
        assert page.locator(".plot svg").count() >= 9
        assert page.locator(".plot svg path").first.bounding_box()["width"] > 100
        page.locator("summary", has_text="recipe.yaml").click()
        assert "embed_dim: 64" in page.locator("#recipe pre").first.inner_text()


def test_six_runs(six, opened):
    with opened(six, PHONE) as page:
        assert page.title() == "6 runs"
        assert overflowing(page) == []
        table = page.locator("#runs table")
        heads = [head.strip() for head in table.locator("th").all_inner_texts()]
        assert heads[:4] == ["run", "state", "optim.lr", "model.image.timm"]
        assert "colours/zero_shot_top1" in heads
        column = heads.index("colours/zero_shot_top1")
        head = table.locator("th").nth(column)
        values = table.locator(f"tbody td:nth-child({column + 1})")
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == "ascending"
        head.locator("button").click()
        shown = [float(text.removesuffix(" %")) for text in values.all_inner_texts()]
        assert shown == sorted(shown, reverse=True)
        assert len(set(shown)) == 6
        assert page.locator("#runs-legend li").count() == 6
        assert page.locator(".plot").first.locator("[data-run]").count() == 6
        keys = page.locator("#differences tbody td:first-child").all_inner_texts()
        assert keys == ["optim.lr", "model.image.timm"]
        table.locator("a", has_text="sweep-00000002").click()
        assert page.locator("details.run", has=page.locator("#run-3")).evaluate("part => part.open")


def test_runs_that_have_nothing_yet_and_files_that_cannot_be_written(tmp_path):
    run = made(tmp_path / "runs" / "new-00000000", {})
    started = made(tmp_path / "runs" / "started-00000000", {})
    told(claimed(started, 0), "rank-0", ("start", 1, {"rank": 0}))
    assert write([run], tmp_path / "new.html", Queue()) == (tmp_path / "new.html").stat().st_size
    assert "NEW" in (tmp_path / "new.html").read_text()
    write([run, started], tmp_path / "new.html", Queue())
    assert "<svg" not in (tmp_path / "new.html").read_text()
    with pytest.raises(UserError, match=r"ends in \.html"):
        write([run], tmp_path / "recipe.yaml", Queue())
    with pytest.raises(UserError, match="is not a folder"):
        write([run], tmp_path / "absent" / "x.html", Queue())
    with pytest.raises(UserError, match=r"/proc/x\.html: cannot be written \(No such file .* name another"):
        write([run], Path("/proc/x.html"), Queue())


def test_batches_of_different_sizes_are_drawn_over_samples(tmp_path):
    runs = sweep(tmp_path)[:2]
    path = runs[1].attempts()[0].path / "metrics.jsonl"
    lines = [{**line, "samples": 2 * line["samples"]} for line in files.read_lines(path)]
    path.unlink()
    files.append_lines(path, lines)
    write(runs, tmp_path / "two.html", Queue())
    text = (tmp_path / "two.html").read_text()
    assert "Over samples" in text
    assert 'data-axis="samples"' in text


@pytest.mark.long
def test_a_real_training(recipe, tmp_path, opened, looked_at):
    def clipcluster(*words):
        command = [sys.executable, "-m", "jobs.cli", *map(str, words)]
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, text=True)
        assert done.returncode == 0

    changes = ["train.duration=3 epochs", "evaluate.every=1 epochs", "checkpoint.every=1 epochs"]
    wanted = Wanted(recipe, changes, runs=tmp_path / "runs", executor="none", quick=True, say=str)
    run = submit(wanted).run
    clipcluster("train", run.path)
    clipcluster("report", run.path, "--out", tmp_path / "real.html")
    looked_at(tmp_path / "real.html")
    with opened(tmp_path / "real.html", PHONE) as page:
        assert page.locator("header .state").inner_text() == "FINISHED"
        assert overflowing(page) == []
        titles = page.locator("figcaption").all_inner_texts()
        assert {"loss", "test/zero_shot_top1, %", "test/t2i_r1, %"} <= set(titles)
        images = page.locator("#gallery img")
        assert images.count() > 20
        assert all(images.evaluate_all("all => all.map(image => image.naturalWidth > 0)"))
        assert page.locator("#gallery .none").count() == 0, "every image was found in the shards"
        shown = page.locator("#time .keys").inner_text()
        assert all(word in shown for word in ("starting", "training", "evaluating"))
        assert "cpu (1 thread)" in page.locator("#provenance").inner_text()


@pytest.mark.long
def test_screens_on_a_phone_and_a_desk_dark_and_light(one, six, opened, looked_at):
    for file in (one, six):
        looked_at(file)
        with opened(file, PAPER, "dark") as page:
            page.emulate_media(media="print", color_scheme="dark")
            assert page.evaluate("document.documentElement.scrollWidth") == PAPER
            assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


@pytest.mark.long
def test_a_million_steps(tmp_path):
    out = tmp_path / "long.html"
    assert write([long(tmp_path, 1_000_000)], out, Queue()) == out.stat().st_size < 3_000_000


def test_the_step_is_the_one_that_the_run_has_reached(tmp_path):
    run = made(tmp_path / "runs" / "back-00000000", {})
    trained(claimed(run, 0), range(10, 101, 10), 10)
    told(claimed(run, 200), "rank-0", ("resume", 210, {"step": 40}))
    trained(run.attempts()[1], range(41, 52), 220)
    facts = facts_of(run, Queue())
    assert facts.step == report(run, Queue())["step"] == 51, "as clipcluster status has it"
    assert facts.last("samples") == 51 * BATCH
    assert facts.logged["step"][-1] == 100, "what the first attempt logged is drawn all the same"
    files.append_lines(run.attempts()[1].path / "metrics.jsonl", [{"step": 52, "loss": math.nan}])
    facts = facts_of(run, Queue())
    assert (facts.step, facts.last("samples")) == (52, 51 * BATCH)
    often = [replace(facts.attempts[1], first_step=step, ending="preempted") for step in range(5000)]
    drawn = figures_of([replace(facts, attempts=often)]).training[0].plot.svg
    assert 100 < drawn.count("var(--bad)") <= 151, "a page does not grow with the attempts"


@pytest.mark.long
def test_files_that_are_not_as_we_left_them(tmp_path, opened):
    """Hostile texts and numbers everywhere, and images at a place that moved."""
    strange = f"{HOSTILE} \x00\x1b[31m\u202e\u05d0\u05d1\u05d2 \ud800 " + 10_000 * "x"
    settings = {
        "evaluate": {"retrieval": [f"/absent/{'x' * 200}/colours"], "zero_shot": [f"/{strange[:50]}/set"]},
        "cluster": {"environment": {"WANDB_API_KEY": "0123456789abcdef"}},
        "on_event": "curl https://hooks.example/services/0123456789abcdef",
    }
    runs = [
        made(tmp_path / "runs" / name, {"model": {"image": {"timm": f"{number}{strange[:-7]}"}}}, settings)
        for number, name in enumerate((f"<b>&\"'{'a' * 150}-00000000", "other-00000000"))
    ]
    for run in runs:
        attempt = claimed(run, 0)
        trained(attempt, [1, 2, 300], 10)
        metrics = attempt.path / "metrics.jsonl"
        metrics.write_bytes(
            b'\xff\x00not JSON\n{"step": "five"}\n[]\n{"step": 3, "loss": null, "lr": "x"}\n'
            + metrics.read_bytes().replace(b'"loss":', b'"loss":NaN,"Loss":')
            + b'{"step": 900, "loss": 0.'
        )
        attempt.bad_sample(0, strange, strange, strange)
        evaluated(run, 1, [100])
        details(run, 100, caption=strange)
        document = files.read_json(run.evals / "details-00000100.json")
        (shown,) = document["sets"].values()
        for query in shown["retrieval"]["t2i"]:
            query["top"][0]["score"], query["top"][1]["score"] = None, -1e30
        shown["zero_shot"]["classes"][0]["name"] = strange
        shown["retrieval"]["i2t"] *= 24
        for query in shown["retrieval"]["i2t"]:
            query["top"] = [{**found, "caption": strange} for found in query["top"]]
        document["sets"] = {"colours": shown, strange[:100]: shown}
        files.write_json(run.evals / "details-00000100.json", document)
    write(runs[:1], tmp_path / "page.html", Queue())
    assert "0123456789abcdef" not in (tmp_path / "page.html").read_text()
    assert (tmp_path / "page.html").stat().st_size < 600_000
    with opened(tmp_path / "page.html", PHONE) as page:
        page.locator("details").evaluate_all("parts => parts.forEach(part => { part.open = true })")
        assert overflowing(page) == []
        assert page.evaluate("window.pwned") is None
        gallery = page.locator("#gallery")
        assert gallery.locator(".row").first.inner_text().count("not finite") == 2
        assert "there is no folder /absent" in gallery.inner_text()
    write(runs, tmp_path / "two.html", Queue())
    assert (tmp_path / "two.html").stat().st_size < 1_200_000
    with opened(tmp_path / "two.html", PHONE) as page:
        assert overflowing(page) == []
        assert page.locator("#differences .value").first.bounding_box()["width"] < 500
    (runs[0].evals / "details-00000200.json").write_bytes(b'{"step": 2')
    write(runs[:1], tmp_path / "page.html", Queue())
    assert "details-00000200.json cannot be read" in (tmp_path / "page.html").read_text()
    runs[0].settings_file.unlink()
    with pytest.raises(UserError, match=r"settings\.yaml is missing"):
        write(runs[:1], tmp_path / "page.html", Queue())
