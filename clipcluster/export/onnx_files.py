"""Both towers, projections included, or a classifier, as ONNX graphs of any batch size."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipcluster.build.opened import Opened
from clipcluster.errors import UserError
from clipcluster.export.compare import captions_of, compare, images_of, is_dual_encoder
from clipcluster.export.preprocessing import PROCESSOR, write_image_processor, write_tokenizer
from clipcluster.export.towers import TOWERS
from clipcluster.model.hugging_face import refusing
from clipcluster.runs.files import write_json

OPSET = 18
"""The one that PyTorch's exporter writes without converting; onnxruntime reads it since 1.14."""
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


class _Images(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.encode_image(pixel_values)


class _Texts(_Images):
    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:  # type: ignore[override]
        return self.model.encode_text(input_ids, attention_mask.bool())


class _Classes(_Images):
    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.classify(pixel_values)


def write(opened: Opened, folder: Path) -> None:
    """Write `image.onnx` and `text.onnx`, or `classifier.onnx`, the preprocessing, and `towers.json`.

    The image graph takes `pixel_values` (B, 3, S, S) float32, the text graph `input_ids` and
    `attention_mask`, (B, L) int64 with L the context length; features are of length one. Raises UserError
    where onnx, onnxscript or onnxruntime is missing, for a model that cannot be traced, and where
    onnxruntime's features differ from the model's.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--format onnx needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not "
            "installed: pip install 'clipcluster[onnx]'"
        )
    about: dict[str, Any] = {"preprocessing": PROCESSOR}
    pixels = {"pixel_values": images_of(opened, 2)}
    if is_dual_encoder(opened):
        tokens, mask = captions_of(opened, 2)
        texts = {"input_ids": tokens, "attention_mask": mask.long()}
        about["image"] = _write(_Images(opened.model), pixels, "image_embeds", folder / "image.onnx")
        about["text"] = _write(_Texts(opened.model), texts, "text_embeds", folder / "text.onnx")
        about |= {
            name: value.item()
            for name, value in opened.model.state_dict().items()
            if name in ("logit_scale", "logit_bias")
        }
        about["similarity"] = "cosine times exp(logit_scale), and logit_bias added where there is one"
        about["tokenizer"] = {"padding": "max_length", "max_length": tokens.shape[1]}
        write_tokenizer(opened, folder)
        compare(opened, "onnxruntime", _graph(folder / "image.onnx"), _text_graph(folder / "text.onnx"))
    else:
        about["image"] = _write(_Classes(opened.model), pixels, "logits", folder / "classifier.onnx")
        compare(opened, "onnxruntime", _graph(folder / "classifier.onnx"))
    write_image_processor(opened, folder)
    write_json(folder / TOWERS, about)


def _write(module: nn.Module, inputs: Mapping[str, Tensor], output: str, file: Path) -> dict[str, Any]:
    """Write a module's graph, the batch of any size; returns what it takes and gives."""
    batch = torch.export.Dim("batch")
    with (
        torch.no_grad(),
        _quiet(),
        refusing(f"--format onnx: PyTorch cannot write {file.name} of this model"),
    ):
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            input_names=[*inputs],
            output_names=[output],
            dynamic_shapes={name: {0: batch} for name in inputs},
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None
        program.save(str(file))  # weights above 2 GB lie in a file beside it
    shapes = {name: ["batch", *value.shape[1:]] for name, value in inputs.items()}
    return {"file": file.name, "opset": OPSET, "inputs": shapes, "output": output}


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells of operators that no model here has."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that both inputs of the text have the same batch
            yield
    finally:
        logger.setLevel(level)


def _graph(file: Path) -> Any:
    run = _runner(file)
    return lambda pixels: run({"pixel_values": pixels.numpy()})


def _text_graph(file: Path) -> Any:
    run = _runner(file)
    return lambda tokens, mask: run({"input_ids": tokens.numpy(), "attention_mask": mask.long().numpy()})


def _runner(file: Path) -> Callable[[dict[str, Any]], Any]:
    """A written graph as onnxruntime runs it on the CPU: inputs by name -> its output."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])

    def run(inputs: dict[str, Any]) -> Any:
        with refusing(f"--format onnx: onnxruntime does not run {file.name}"):
            return session.run(None, inputs)[0]

    return run
