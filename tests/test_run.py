"""A run folder into a trained model, on real digits and with all real parts, in one process."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file

from clipcluster.build.model import hash_of, hashes_at_resume
from clipcluster.build.training import try_task
from clipcluster.data.storage import download
from clipcluster.errors import UserError
from clipcluster.recipe.load import from_run, load, recipe_keys, settings_keys
from clipcluster.run import evaluate, evaluate_owed, evaluated_by_job, train, use_processors
from clipcluster.runs.evaluations import Owed, owe, owed_by
from clipcluster.runs.files import file_sha256, read_json, write_json
from clipcluster.runs.folder import Run
from clipcluster.runs.merge import events, merged_metrics
from clipcluster.runs.timing import seconds_of_a_save
from clipcluster.runtime.launch import Launch, Manager
from clipcluster.runtime.outcome import DataError, Outcome, RecipeFailure
from clipcluster.runtime.stop import Stop, Wish
from tests.consumed import merged_samples
from tests.stop_after import StopAfter
from tools.convert.convert import convert

RECIPE = """
name: tiny
data:
  train: [{{shards: {digits}/train}}]
  batch_size: 32
  workers: 0
  image: {{size: 32}}
  text: {{tokenizer: bytes, context_length: 24, captions: random}}
model:
  image:
    timm: convnext_atto
    args: {{depths: [1, 1, 1, 1], dims: [8, 16, 24, 32], patch_size: 2, drop_path_rate: 0.2}}
  text: {{arch: gpt2, config: {{n_layer: 1, n_head: 2, n_embd: 32}}}}
  embed_dim: 16
optim: {{lr: 1e-3, clip_norm: 1.0, warmup: 2 steps}}
train: {{duration: 8 steps, log_every: 1 steps, record_samples: true, ema: {{decay: 0.9}}}}
checkpoint: {{every: 3 steps}}
evaluate: {{retrieval: [{digits}/test], zero_shot: [{digits}/test], batch_size: 120}}
cluster: {{gpus_per_node: 0, cpus_per_task: 1}}
"""
ALONE = Launch(0, 1, 0, 1, 0, 1, "test", "single")
VOLATILE = {"attempt", "time", "samples_per_second", "data_wait_seconds"}


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The handwritten digits as shards."""
    return convert("digits", tmp_path_factory.mktemp("data") / "digits").out


class Tiny:
    """Runs of one small recipe."""

    def __init__(self, digits: Path, folder: Path) -> None:
        self.folder, self.file = folder, folder / "tiny.yaml"
        self.file.write_text(RECIPE.format(digits=digits))

    def make(self, name: str, *overrides: str) -> Run:
        loaded = load(self.file, overrides, {})
        return Run.create(self.folder / "runs" / name, recipe_keys(loaded), settings_keys(loaded))

    def change(self, run: Run, *overrides: str) -> None:
        run.update_settings(settings_keys(load(self.file, overrides, {})))

    def go(self, run: Run, stop: Stop | None = None) -> Outcome:
        attempt = run.claim("test", host="here", still_running=lambda job: False)
        return train(run, attempt, ALONE, stop or Stop())


@pytest.fixture
def tiny(digits: Path, tmp_path: Path) -> Tiny:
    return Tiny(digits, tmp_path)


def logged(run: Run) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in VOLATILE} for line in merged_metrics(run)]


def test_loading_it_loads_no_torch() -> None:
    code = "import sys, clipcluster.run; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_run_folder_becomes_a_trained_model(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    secrets = ("on_event=echo TOKEN-0123", "cluster.environment.HF_TOKEN=TOKEN-0123")
    run = tiny.make("whole", *secrets)
    assert tiny.go(run) is Outcome.FINISHED
    lines = merged_metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 9))
    assert all(line["loss"] > 0 and 0 < line["lr"] <= 1e-3 for line in lines)
    phases = [event["phase"] for event in events(run) if event["event"] == "phase"]
    assert phases == ["rendezvous", "data", "model", "checkpoint", "first batch"]
    results = read_json(run.evals / "step-00000008.json")["metrics"]
    assert results["test/zero_shot_images"] == 360
    assert {
        "test/zero_shot_top1",
        "test/t2i_r1",
        "test/paired_i2t_r1",
        "test/distinct_captions",
    } <= results.keys()
    details = read_json(run.evals / "details-00000008.json")
    assert (details["step"], details["attempt"], list(details["sets"])) == (8, 1, ["test"])
    assert {kind: list(own) for kind, own in details["sets"]["test"].items()} == {
        "zero_shot": ["classes", "confused", "confident_errors"],
        "retrieval": ["t2i", "i2t"],
    }
    newest = run.checkpoints / "step-00000008"
    state = read_json(newest / "state.json")
    assert state["plan"]["total_steps"] == 8
    assert state["index"][0]["name"] == "train"
    assert len(state["index"][0]["shards"]) > 1
    assert {"image_projection.weight", "logit_scale"} <= load_file(newest / "model.safetensors").keys()
    assert read_json(newest / "manifest.json")["versions"]["torch"] == torch.__version__
    assert not [path for path in newest.iterdir() if b"TOKEN-0123" in path.read_bytes()]
    assert run.newest().outcome()["outcome"] == "finished"  # type: ignore[union-attr, index]
    document = evaluate(run.path)
    assert (document["step"], document["ema"], document["run"]) == (8, True, "whole")
    assert document["metrics"] == pytest.approx(results, rel=1e-6)
    assert not list(run.checkpoints.glob("*/pinned-*"))
    older = evaluate(run.checkpoints / "step-00000003", overrides=["evaluate.zero_shot=[]"])
    assert older["step"] == 3
    shutil.copytree(run.checkpoints / "step-00000003", tiny.folder / "a copy")
    copied = evaluate(tiny.folder / "a copy", overrides=["evaluate.zero_shot=[]"])
    assert (copied["step"], copied["metrics"]) == (3, older["metrics"])
    assert "test/t2i_r1" in older["metrics"]
    assert "test/zero_shot_top1" not in older["metrics"]
    raw = evaluate("who", weights="raw", runs=run.path.parent)  # the beginning of its name
    assert (raw["step"], raw["ema"]) == (8, False)
    assert raw["metrics"]["test/pairs"] == results["test/pairs"]
    assert raw["metrics"] != pytest.approx(results, rel=1e-6)
    with pytest.raises(
        UserError, match=r"step-00000005 is not a complete checkpoint; whole has step-00000008"
    ):
        evaluate(run.checkpoints / "step-00000005")
    with pytest.raises(UserError, match="do not fit the recipe"):
        evaluate(run.path, overrides=["model.embed_dim=8"])
    manifest = tiny.folder / "a copy" / "manifest.json"
    write_json(manifest, {key: value for key, value in read_json(manifest).items() if key != "recipe"})
    with pytest.raises(UserError, match=r"is not in a run folder .* has no recipe"):
        evaluate(tiny.folder / "a copy")


def differing(*runs: Run) -> list[str]:
    """The tensors of the last checkpoint that differ between two runs."""
    found = []
    for name in ("model", "ema", "optimizer"):
        one, other = (load_file(run.checkpoints / "step-00000008" / f"{name}.safetensors") for run in runs)
        assert one.keys() == other.keys()
        found += [f"{name}: {key}" for key in one if not torch.equal(one[key], other[key])]
    return found


@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_and_resumed_equals_uninterrupted(tiny: Tiny, workers: int) -> None:
    whole, stopped = tiny.make("whole"), tiny.make("stopped")
    assert tiny.go(whole) is Outcome.FINISHED
    assert tiny.go(stopped, StopAfter(4)) is Outcome.STOPPED
    tiny.change(stopped, f"data.workers={workers}")
    assert tiny.go(stopped, StopAfter(6)) is Outcome.STOPPED
    assert tiny.go(stopped) is Outcome.FINISHED
    assert len(stopped.attempts()) == 3
    assert logged(stopped) == logged(whole)
    keys = [(line["step"], line["slot"], line["shard"], line["key"]) for line in merged_samples(stopped)]
    assert keys == [
        (line["step"], line["slot"], line["shard"], line["key"]) for line in merged_samples(whole)
    ]
    assert len(keys) == 8 * 32
    assert differing(whole, stopped) == []


def test_a_recipe_of_the_optimizer_s_keys_stops_and_resumes(
    tiny: Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    """Muon, its parts and layers at rates of their own, a stage, and a schedule with a cooldown."""
    caplog.set_level(logging.INFO, "clipcluster")
    keys = (
        "optim={name: muon, args: {fallback_list: ['text.*']}, lr: {base: 8e-3, per: 256}, min_lr: 1e-4, "
        "schedule: wsd, cooldown: 50%, warmup: 2 steps, weight_decay_end: 0.4, clip_value: 0.1, "
        "image: {lr: 5e-4, layer_decay: 0.5, layer_ids: groups}}",
        "freeze=[{at: 3 steps, tower: text, trainable: none}, {at: 5 steps, tower: text, trainable: last 1}]",
        "evaluate={}",
    )
    whole, stopped = tiny.make("whole", *keys), tiny.make("stopped", *keys)
    assert tiny.go(whole) is Outcome.FINISHED
    assert [line["lr"] for line in logged(whole)] == pytest.approx(
        [5e-4, 1e-3, 1e-3, 1e-3, 1e-3, 7.75e-4, 5.5e-4, 3.25e-4]
    )
    assert "muon: 24 parameters: learning rate x 6.10352e-05, no weight decay" in caplog.text  # 0.5 * 0.5**13
    for questions in (3, 4):
        assert tiny.go(stopped, StopAfter(questions)) is Outcome.STOPPED
    assert tiny.go(stopped) is Outcome.FINISHED
    assert logged(stopped) == logged(whole)
    assert differing(whole, stopped) == []


RANK = """
import os
import sys
from clipcluster.run import train
from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch, Manager
from clipcluster.runtime.stop import Stop

class StopAfter(Stop):
    questions = int(sys.argv[2])

    def wishes(self):
        self.questions -= 1
        if self.questions == 0:
            self.request("the test's wish")
        return super().wishes()

run = Run(sys.argv[1])
# as ranks leave: gloo's threads may abort an orderly exit
os._exit(train(run, run.newest(), Launch.from_environment(), StopAfter()))
"""


def test_another_number_of_ranks_sees_the_same_samples_and_losses(tiny: Tiny) -> None:
    plain = ["model.image.args.drop_path_rate=0"]
    plain += [f"model.text.config.{kind}_pdrop=0" for kind in ("resid", "embd", "attn")]
    whole, changed = tiny.make("whole", *plain), tiny.make("changed", *plain)
    assert tiny.go(whole) is Outcome.FINISHED
    changed.claim("two", host="here", still_running=lambda job: False)
    environment = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(changed.path), "8" if rank else "99"],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait(120) for rank in ranks] == [85, 85]
    stopped_at = changed.newest().outcome()["step"]  # type: ignore[union-attr, index]
    assert 0 < stopped_at < 8
    assert tiny.go(changed) is Outcome.FINISHED
    keys = [
        [(line["step"], line["slot"], line["shard"], line["key"]) for line in merged_samples(run)]
        for run in (whole, changed)
    ]
    assert keys[0] == keys[1]
    for one, other in zip(merged_metrics(whole), merged_metrics(changed), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_the_task_of_a_recipe_is_tried_on_two_samples(tiny: Tiny, tmp_path: Path) -> None:
    assert try_task(load(tiny.file, [], {}).recipe, tmp_path) == []
    larger = ["model.image={timm: inception_v3}"]  # which no image of 32 pixels passes through
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        try_task(load(tiny.file, larger, {}).recipe, tmp_path)


def test_a_stop_while_starting_builds_nothing(tiny: Tiny) -> None:
    run = tiny.make("early")
    stop = Stop()
    stop.request("before the first step")
    assert tiny.go(run, stop) is Outcome.STOPPED
    assert list(run.checkpoints.iterdir()) == []
    assert run.newest().outcome()["reason"] == "rank 0 got before the first step during start-up"


@pytest.mark.parametrize(("deterministic", "kernels"), [("null", "deterministic"), ("false", "fast")])
def test_device_kernels_and_more_threads_than_cores_are_said(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, deterministic: str, kernels: str
) -> None:
    threads, usable = torch.get_num_threads(), len(os.sched_getaffinity(0))
    run = tiny.make("threads", "cluster.cpus_per_task=1000", f"train.deterministic={deterministic}")
    logging.getLogger("clipcluster").addHandler(caplog.handler)
    caplog.set_level(logging.INFO, "clipcluster")
    try:
        device = use_processors(from_run(run.recipe(), run.settings()), ALONE)
        assert torch.are_deterministic_algorithms_enabled() is (kernels == "deterministic")
        assert torch.get_num_threads() == usable
    finally:
        logging.getLogger("clipcluster").removeHandler(caplog.handler)
        torch.set_num_threads(threads)
        torch.set_deterministic_debug_mode("default")
    said = list(dict.fromkeys(record.getMessage() for record in caplog.records))
    assert f"cluster.cpus_per_task is 1000, and this rank has {usable} of the node's cores" in said[0]
    if device.type == "cpu":
        assert said[1].startswith("device: cpu (")
        assert said[1].endswith(f"), {kernels} kernels")


SLOW_HASH = """
import os, sys, time
from clipcluster import run
from clipcluster.data.shards import opened
from clipcluster.data.shards.dataset import Dataset
from clipcluster.runs.folder import Run
from clipcluster.runtime.launch import Launch, Manager
from clipcluster.runtime.stop import Stop

def slowly(action, seconds):
    def slow(subject):
        time.sleep(seconds)
        return action(subject)
    return slow

run.SILENCE_S = 8
opened.file_sha256 = slowly(opened.file_sha256, 2)
Dataset.modified_shards = slowly(Dataset.modified_shards, 9)
folder = Run(sys.argv[1])
os._exit(run.train(folder, folder.newest(), Launch.from_environment(), Stop()))
"""


@pytest.mark.long
def test_ranks_share_the_shards_that_must_be_hashed_and_none_is_taken_for_lost(
    digits: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "digits"
    subprocess.run(["cp", "-r", str(digits), str(copy)], check=True)  # other times, the same content
    assert len(list((copy / "train").glob("*.tar"))) > 4
    tiny = Tiny(copy, tmp_path)
    run = tiny.make("copied", "train.duration=3 steps", "evaluate.zero_shot=[]", "evaluate.retrieval=[]")
    run.claim("two", host="here", still_running=lambda job: False)
    environment = {**os.environ, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", SLOW_HASH, str(run.path)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [rank.wait(120) for rank in ranks] == [0, 0]


def test_a_stop_while_shards_are_compared_builds_nothing(digits: Path, tmp_path: Path) -> None:
    copy = tmp_path / "digits"
    subprocess.run(["cp", "-r", str(digits), str(copy)], check=True)
    tiny = Tiny(copy, tmp_path)
    run = tiny.make("copied")
    assert tiny.go(run, StopAfter(2)) is Outcome.STOPPED
    assert list(run.checkpoints.iterdir()) == []
    assert run.newest().outcome()["reason"] == "rank 0 got the test's wish during start-up"
    assert tiny.go(run) is Outcome.FINISHED


def test_shards_made_anew_are_refused_at_a_resume(tiny: Tiny, digits: Path, tmp_path: Path) -> None:
    from clipcluster.data.shards.indexing import index_folder

    copy = tmp_path / "digits"
    subprocess.run(["cp", "-a", str(digits), str(copy)], check=True)
    moved = Tiny(copy, tmp_path)
    run = moved.make("moved")
    assert moved.go(run, StopAfter(4)) is Outcome.STOPPED
    shard = sorted((copy / "train").glob("*.tar"))[2]
    content = bytearray(shard.read_bytes())
    content[600] ^= 1  # inside the first sample
    shard.write_bytes(content)
    with pytest.raises(DataError, match=shard.name):
        moved.go(run)  # the index still tells of the shard as it was
    index_folder(copy / "train")
    with pytest.raises(DataError, match=f"shard {shard.name} of train has changed"):
        moved.go(run)


def as_format_1(checkpoint: Path) -> None:
    """Rewrite a checkpoint as it was when the scale of the logits had no dimension."""
    from safetensors.torch import save_file

    for part in ("model", "ema", "optimizer"):
        file = checkpoint / f"{part}.safetensors"
        tensors = load_file(file)
        scales = {key: value.squeeze() for key, value in tensors.items() if key.startswith("logit_scale")}
        assert scales
        save_file(tensors | scales, file)
    write_json(checkpoint / "state.json", read_json(checkpoint / "state.json") | {"format": 1})
    manifest = read_json(checkpoint / "manifest.json")
    for name, entry in manifest["files"].items():
        content = (checkpoint / name).read_bytes()
        entry.update(bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    write_json(checkpoint / "manifest.json", manifest | {"format": 1})


def test_a_checkpoint_of_format_1_is_resumed_and_measured(tiny: Tiny) -> None:
    whole, older = tiny.make("whole"), tiny.make("older")
    assert tiny.go(whole) is Outcome.FINISHED
    assert tiny.go(older, StopAfter(6)) is Outcome.STOPPED
    step = older.newest().outcome()["step"]  # type: ignore[union-attr, index]
    assert 0 < step < 8
    expected = evaluate(older.path)
    as_format_1(older.checkpoints / f"step-{step:08d}")
    assert evaluate(older.path) == expected
    assert tiny.go(older) is Outcome.FINISHED
    assert logged(older) == logged(whole)
    assert differing(whole, older) == []


def test_other_starting_weights_are_refused_at_a_resume(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = tiny.make("first", "evaluate.zero_shot=[]", "evaluate.retrieval=[]", "train.duration=3 steps")
    assert tiny.go(first) is Outcome.FINISHED
    weights = tmp_path / "weights.safetensors"
    state = load_file(first.checkpoints / "step-00000003" / "model.safetensors")
    from safetensors.torch import save_file

    tower = {
        k.removeprefix("image.").removeprefix("trunk."): v for k, v in state.items() if k.startswith("image.")
    }
    save_file(tower, weights)
    run = tiny.make("second", f"model.image.weights={weights}", f"model.text.weights={first.path}")
    assert tiny.go(run, StopAfter(5)) is Outcome.STOPPED
    image, text = read_json(run.newest().path / "weights.json")["towers"]  # type: ignore[union-attr]
    assert (image["tower"], image["file"], image["fraction"]) == ("image", str(weights), 1.0)
    assert image["sha256"] == hash_of(weights)
    assert (text["tower"], text["prefix"], text["missing"]) == ("text", "text.transformer.", [])
    assert text["file"].startswith(f"{first.path}/checkpoints/step-00000003/")
    weights.unlink()  # the checkpoint has all that it brought
    assert tiny.go(run, StopAfter(5)) is Outcome.STOPPED
    assert "the starting weights of image cannot be compared any more" in caplog.text
    attempt = run.newest()
    assert attempt is not None
    assert not (attempt.path / "weights.json").exists()
    (resumed,) = [event["checkpoint"] for event in events(run) if event["event"] == "resume"]
    newest = sorted(run.checkpoints.glob("step-*"))[-1]
    assert newest.name > resumed
    assert read_json(newest / "state.json")["starting_weights"]["image"] == image["sha256"]
    save_file({key: value + 1 for key, value in tower.items()}, weights)
    with pytest.raises(RecipeFailure, match="starting weights of image"):
        tiny.go(run)


def test_an_index_of_weights_is_known_by_the_hash_that_earlier_versions_took(
    tiny: Tiny, tmp_path: Path
) -> None:
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": {"a": "one.safetensors"}})
    (tmp_path / "one.safetensors").write_bytes(b"one")
    run = tiny.make("sharded", f"model.image.weights={index}")
    folder = run.checkpoints / "step-00000001"
    folder.mkdir(parents=True)
    state = {"format": 2, "step": 1, "samples": 1, "batches_drawn": 1, "evaluated_step": -1, "skipped": []}
    recipe = from_run(run.recipe(), run.settings())
    for recorded, expected in (("another", hash_of(index)), (file_sha256(index), file_sha256(index))):
        write_json(folder / "state.json", {**state, "parts": [], "starting_weights": {"image": recorded}})
        assert hashes_at_resume(recipe, run) == {"image": expected}


def test_the_duration_of_a_save_is_known_to_later_attempts(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", {}, {})
    assert seconds_of_a_save(run) == 0.0
    for seconds in ([9.0, 1.0, 2.0], [3.0]):
        attempt = run.claim("test", host="here", still_running=lambda job: False)
        for step, taken in enumerate(seconds):
            attempt.event("checkpoint", writer="rank-0", step=step, seconds=taken)
            attempt.event("checkpoint_failed", writer="rank-0", step=step, reason="full")
    assert seconds_of_a_save(run) == 3.0


def test_the_hash_of_weights_is_of_their_content(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"one")
    (tmp_path / "config.json").write_bytes(b"{}")
    before = hash_of(tmp_path)
    (tmp_path / "config.json").write_bytes(b"{ }")
    assert hash_of(tmp_path) == before
    (tmp_path / "a.bin").write_bytes(b"two")
    assert hash_of(tmp_path) != before


def test_ten_steps_over_http_are_those_of_the_disk(
    tiny: Tiny, digits: Path, tmp_path: Path, web_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "RETRIES", (0.01, 0.02, 0.03))
    server = web_server(digits, drop_every=5)
    here = tiny.make("here", "train.duration=10 steps")
    assert tiny.go(here) is Outcome.FINISHED
    there = tiny.make(
        "there",
        "train.duration=10 steps",
        f"data.train.0.shards={server.address}/train",
        f"evaluate.retrieval=[{server.address}/test]",
        f"evaluate.zero_shot=[{server.address}/test]",
        f"data.cache={{folder: {tmp_path}/cache, size: 100 MB}}",
    )
    server.status, server.status_of = 503, ".tar"
    with pytest.raises(OSError, match=r"answers 503 .*train/0000\d\.tar"):
        tiny.go(there)
    server.status = None
    assert tiny.go(there) is Outcome.FINISHED
    assert logged(there) == logged(here)
    seen = [[line | {"attempt": 0} for line in merged_samples(run)] for run in (there, here)]
    assert seen[0] == seen[1]
    assert read_json(there.evals / "step-00000010.json")["metrics"] == pytest.approx(
        read_json(here.evals / "step-00000010.json")["metrics"]
    )
    assert list((tmp_path / "cache").glob("*.tar"))


def test_switches_of_speed_and_precision(
    tiny: Tiny, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolutional tower in bf16, its average on the CPU: said in the log, and other orders of memory
    give the same losses to the format's rounding."""
    caplog.set_level(logging.INFO, "clipcluster")
    both = (
        "model.image={timm: test_resnet}",
        "train.duration=2 steps",
        "train.precision=bf16",
        "train.ema={decay: 0.9, warmup: true, device: cpu}",
        "optim.warmup=0 steps",
        "evaluate={}",
    )
    plain, fast = tiny.make("plain", *both), tiny.make("fast", *both, "train.channels_last=true")
    assert tiny.go(plain) is tiny.go(fast) is Outcome.FINISHED
    assert "precision: bf16, 15 batch norms kept in fp32" in caplog.text
    for one, other in zip(logged(plain), logged(fast), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)


@pytest.mark.long
def test_compiled_towers_train_stop_and_resume(tiny: Tiny) -> None:
    """Dropout and drop path included: the same random numbers, the same results, the same names."""
    fast = ("train.compile=true", "train.channels_last=true")
    plain, compiled, stopped = tiny.make("plain"), tiny.make("fast", *fast), tiny.make("stopped", *fast)
    assert tiny.go(plain) is tiny.go(compiled) is Outcome.FINISHED
    assert tiny.go(stopped, StopAfter(6)) is Outcome.STOPPED
    assert tiny.go(stopped) is Outcome.FINISHED
    assert logged(stopped) == logged(compiled)
    weights, ours, resumed = (
        load_file(run.checkpoints / "step-00000008" / "ema.safetensors") for run in (plain, compiled, stopped)
    )
    assert weights.keys() == ours.keys()
    for name, value in weights.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-4, atol=1e-5)
        assert torch.equal(ours[name], resumed[name])
    results = [read_json(run.evals / "step-00000008.json")["metrics"] for run in (plain, compiled)]
    assert results[0] == pytest.approx(results[1], rel=0.05)


BESIDE_JOBS = replace(ALONE, manager="local")


class GivesUp(Stop):
    """Gives an evaluation up when it is asked for the wishes once more than `after` times."""

    def __init__(self, owed: Owed, after: int) -> None:
        super().__init__()
        self.owed, self.left = owed, after

    def wishes(self) -> Wish:
        self.left -= 1
        if self.left == 0:
            self.owed.give_up()
        return super().wishes()


def test_jobs_of_their_own_measure_what_the_training_would_have(tiny: Tiny) -> None:
    """A step by the training itself, the same by a job: interrupted, repeated, and equal to the last bit."""
    often = ("evaluate.every=2 steps", "train.duration=3 steps", "checkpoint.keep.last=2")
    inside = tiny.make("inside", *often)
    assert tiny.go(inside) is Outcome.FINISHED
    run = tiny.make("beside", *often, "evaluate.where=job")
    attempt = run.claim("test", host="here", still_running=lambda job: False)
    assert train(run, attempt, BESIDE_JOBS, Stop()) is Outcome.FINISHED
    assert [path for path in run.evals.iterdir() if path.is_file()] == []
    for owed in owed_by(run):
        job = Run.create(owed.job.path, run.recipe(), run.settings())
        for questions, ending in ((6, Outcome.STOPPED), (10**6, Outcome.FINISHED)):
            assert owed in owed_by(run)
            claimed = job.claim("9", host="here", still_running=lambda job: False)
            assert evaluate_owed(job, claimed, BESIDE_JOBS, StopAfter(questions)) is ending
    assert "during the evaluation" in job.attempt(1).outcome()["reason"]  # type: ignore[index]
    assert owed_by(run) == []
    assert logged(run) == logged(inside)
    for name in ("step-00000002", "step-00000003"):
        own, other = (read_json(one.evals / f"{name}.json") for one in (run, inside))
        assert own.pop("job") == "9"
        assert {key: own[key] for key in other} == other
        details = name.replace("step-", "details-")
        own, other = (read_json(one.evals / f"{details}.json") for one in (run, inside))
        assert own == other
    assert list((run.tensorboard / "evaluations").iterdir())
    again = owe(run.newest(), 3)  # type: ignore[arg-type]
    job = Run.create(again.job.path, run.recipe(), run.settings())
    for stop in (GivesUp(again, after=6), Stop()):  # in the middle, and before
        claimed = job.claim("10", host="here", still_running=lambda job: False)
        assert evaluate_owed(job, claimed, BESIDE_JOBS, stop) is Outcome.FINISHED
        assert read_json(run.evals / "step-00000003.json")["job"] == "9", "no longer owed: not recorded"
        shutil.rmtree(again.checkpoint, ignore_errors=True)


def test_started_by_hand_the_training_evaluates_itself(tiny: Tiny, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "clipcluster")
    recipe = load(tiny.file, ["evaluate.where=job"], {}).recipe
    managers = get_args(Manager)
    by_job = {name: evaluated_by_job(recipe, replace(ALONE, manager=name)) for name in managers}
    assert by_job == {"slurm": True, "local": True, "torchrun": False, "single": False}
    assert caplog.text.count("the training evaluates itself") == 2
    assert not evaluated_by_job(load(tiny.file, [], {}).recipe, BESIDE_JOBS)
