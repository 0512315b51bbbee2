"""The model card of an export: what its run tells, and what only its owner can say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from clipcluster.build.opened import Opened
from clipcluster.evals.headline import COUNTS, GROUPED, PAIRED, Result, ordered
from clipcluster.export.facts import Facts, facts_of

_USE = {
    "hf": """
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("DIR")
processor = AutoProcessor.from_pretrained("DIR", backend="pil")
inputs = processor(text=["a photo of a cat"], images=["cat.jpg"], return_tensors="pt",
                   padding="max_length", truncation=True)
scores = model(**inputs).logits_per_image
""",
    "open_clip": """
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")
""",
    "safetensors": """
# towers.json says how each tower is loaded by timm or transformers, and how its vector is taken.
from safetensors.torch import load_file

joining = load_file("DIR/{joining}.safetensors")
""",
    "onnx": """
import onnxruntime

session = onnxruntime.InferenceSession("DIR/{image}.onnx")  # towers.json says what goes in and comes out
(features,) = session.run(None, {"pixel_values": pixels})  # pixels as preprocessor_config.json says
""",
}
_LIBRARIES = {"hf": "transformers", "open_clip": "open_clip", "onnx": "onnx"}
_WEIGHTS = {True: "moving average of the weights", False: "weights themselves"}
_TO_FILL_IN = "*To be filled in by the owner of the model.*"


def card(opened: Opened, kind: str) -> str:
    """`README.md`: front matter for a hub, how to load the model, data, training, figures, cost, recipe.

    The licence and the intended use are left to the user.
    """
    facts, dual = facts_of(opened.path), hasattr(opened.model, "encode_text")
    what = "dual encoder of images and captions" if dual else "classifier of images"
    text = f"A {what}, converted with clipcluster from {opened.name}."
    weights = _WEIGHTS[opened.averaged]
    if opened.step is not None:
        text = f"A {what}, trained with clipcluster. These are the {weights} of step {opened.step:,}."
    elif opened.averaged:
        text += f" These are the {weights}."
    names = {"joining": "projections" if dual else "head", "image": "image" if dual else "classifier"}
    use = _USE[kind].strip()
    for name, value in names.items():
        use = use.replace(f"{{{name}}}", value)
    parts = [
        f"---\n{_front_matter(opened, kind, facts, dual)}\n---\n",
        f"# {opened.name}\n\n{text}\n",
        f"## Use\n\n```python\n{use}\n```\n",
        f"## Licence\n\n{_TO_FILL_IN} Then set `license` in the lines at the top.\n",
        f"## Intended use\n\n{_TO_FILL_IN}\n",
    ]
    if facts:
        parts += [_data(facts), _training(opened, facts), _evaluation(opened, facts), _cost(facts)]
        parts.append(_recipe(facts))
    return "\n".join(parts)


def _front_matter(opened: Opened, kind: str, facts: Facts | None, dual: bool) -> str:
    task = "zero-shot-image-classification" if dual else "image-classification"
    results = []
    measured = facts.evaluation if facts and _of_these_weights(opened, facts) else None
    for group, figures in ordered(measured["metrics"] if measured else {}).items():
        for figure in figures if group is not COUNTS else ():
            if figure.value is not None and not figure.metric.startswith("raw_"):
                retrieval = group in (GROUPED, PAIRED)
                results.append(_result(figure, "image-text-retrieval" if retrieval else task))
    data = ModelCardData(
        library_name=_LIBRARIES.get(kind),
        pipeline_tag=task,
        tags=["clipcluster", "clip"] if dual else ["clipcluster"],
        model_name=opened.name,
        eval_results=results or None,
    )
    return data.to_yaml()


def _of_these_weights(opened: Opened, facts: Facts) -> bool:
    """Whether the evaluation is of the exported weights: what a hub shows as the model's figures."""
    found = facts.evaluation or {}
    return (found.get("step"), bool(found.get("ema"))) == (opened.step, opened.averaged)


def _result(figure: Result, task: str) -> EvalResult:
    name = figure.name.rpartition("/")
    return EvalResult(
        task_type=task,
        dataset_type=name[0] or "unnamed",
        dataset_name=name[0] or "unnamed",
        metric_type=name[2],
        metric_value=figure.value,
    )


def _table(rows: Mapping[str, Any]) -> str:
    lines = [f"| {name} | {value} |" for name, value in rows.items() if value not in (None, "")]
    return "\n".join(["| | |", "|---|---|", *lines]) + "\n"


def _data(facts: Facts) -> str:
    counts = [source.get("samples") for source in facts.sources]
    written = (facts.recipe.get("data") or {}).get("train") or []
    lines = []
    for number, source in enumerate(written):
        shards = source.get("shards")
        count = counts[number] if len(counts) == len(written) else None
        told = f": {count:,} samples" if isinstance(count, int) else ""
        lines.append(f"- `{', '.join(shards) if isinstance(shards, list) else shards}`{told}")
    return "## Training data\n\n" + "\n".join(lines) + "\n"


def _training(opened: Opened, facts: Facts) -> str:
    recipe, versions = opened.recipe, facts.manifest.get("versions") or {}
    plan = facts.state.get("plan") or {}
    samples, total = facts.state.get("samples"), plan.get("total_steps")
    rows = {
        "task": recipe.task,
        "steps": f"{opened.step:,}" + (f" of {total:,}" if total else ""),
        "samples seen": f"{samples:,}" if samples is not None else None,
        "epochs": round(facts.state.get("epoch", 0.0), 2),
        "global batch": f"{recipe.data.batch_size:,}",
        "optimizer": recipe.optim.name,
        "learning rate": plan.get("lr"),
        "precision": recipe.train.precision,
        "ranks": facts.manifest.get("world_size"),
        "image size": recipe.data.image.size,
        "context length": recipe.data.text.context_length if recipe.model.text or recipe.model.dual else None,
        "commit": facts.manifest.get("commit"),
        **{f"version of {name}": version for name, version in versions.items()},
    }
    return f"## Training\n\n{_table(rows)}"


def _evaluation(opened: Opened, facts: Facts) -> str:
    if facts.evaluation is None:
        return "## Evaluation\n\nThe run was not evaluated.\n"
    measured = _WEIGHTS[bool(facts.evaluation.get("ema"))]
    other = "" if _of_these_weights(opened, facts) else " **Other weights than those here.**"
    text = [f"## Evaluation\n\nAt step {facts.evaluation.get('step', 0):,}, of the {measured}.{other}\n"]
    for group, figures in ordered(facts.evaluation["metrics"]).items():
        text.append(f"**{group.title}**" + (f": {group.explanation}.\n" if group.explanation else "\n"))
        lines = [f"| {figure.set} | {figure.metric} | {figure.text} |" for figure in figures]
        text.append("\n".join(["| set | metric | value |", "|---|---|---|", *lines]) + "\n")
    return "\n".join(text)


def _cost(facts: Facts) -> str:
    rate = facts.samples_per_second
    rows = {
        "device-hours": f"{facts.device_hours:.3g}",
        "attempts": facts.attempts,
        "samples per second": f"{rate:,.0f} (median)" if rate is not None else None,
    }
    return f"## Cost\n\nOf the whole run as far as it has come.\n\n{_table(rows)}"


def _recipe(facts: Facts) -> str:
    text = yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True, width=100)
    return f"## Recipe\n\nWhat decided the weights.\n\n```yaml\n{text}```\n"
