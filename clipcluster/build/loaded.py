"""A trained model for use from Python: images and texts into features, and classes by their names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from clipcluster.build.opened import Opened, find_model
from clipcluster.data.images.decode import BadImage, decode, from_pillow
from clipcluster.data.images.transforms import evaluation_transform
from clipcluster.data.loading.batch import normalise
from clipcluster.errors import UserError
from clipcluster.evals.prompts import PLACEHOLDER, check_templates
from clipcluster.evals.zero_shot import vectors_of
from clipcluster.recipe.tasks import TASKS
from clipcluster.runtime.devices import usable_cores
from clipcluster.train.precision import Precision, PrecisionName

if TYPE_CHECKING:
    from typing import Literal

    from PIL.Image import Image

    from clipcluster.data.tokenizer import Tokenizer
    from clipcluster.recipe.sections.image import Image as ImageSection

    AnyImage = Image | str | PathLike[str] | bytes | Tensor

BATCH = 64  # images or texts of one forward pass
T = TypeVar("T")


def load(
    what: str | Path,
    *,
    weights: Literal["ema", "raw"] | None = None,
    device: torch.device | str | None = None,
    precision: PrecisionName = "fp32",
    runs: str | Path | None = None,
) -> DualEncoderModel:
    """The dual encoder of a run, of a checkpoint's folder, or of another program's model folder, for use.

    what: a folder, or a run's name or a unique beginning of it, looked for in `runs` (default
    $CLIPCLUSTER_RUNS, else ./runs). weights: the moving average or the weights themselves; default the
    average where there is one. device: default an accelerator where there is one. precision: fp32, tf32, bf16
    or fp16; features are float32 in any case.

    Raises UserError where there is no such model, for a classifier, and where the device lacks the precision.
    """
    found = find_model(what, None if runs is None else Path(runs))
    if not TASKS[found.recipe.task].captions:
        raise UserError(
            f"{found.name} is of task {found.recipe.task} and has no text tower; load a model of images and "
            "captions, and measure this one with: clipcluster evaluate"
        )
    return DualEncoderModel(found.open(weights=weights, device=device), precision)


class Transform:
    """An image as the model's tower takes it: resized and cropped as in evaluation, normalised."""

    def __init__(self, image: ImageSection) -> None:
        self.size = image.size
        self._resized = evaluation_transform(image)
        self._mean, self._std = image.mean, image.std

    def __call__(self, image: AnyImage) -> Tensor:
        """(3, S, S) float32 of a path, a file's bytes, an image of Pillow, or pixels (3, H, W) uint8.

        Raises BadImage, with its path, where it cannot be decoded, and OSError where it cannot be read.
        """
        return normalise(self._resized(_pixels(image))[None], self._mean, self._std)[0]


def _pixels(image: AnyImage) -> Tensor:
    """(3, H, W) uint8."""
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
            shape = f"{tuple(image.shape)} {image.dtype}"
            raise TypeError(f"a tensor {shape} was given; pixels are (3, height, width) torch.uint8")
        return image
    if isinstance(image, bytes):
        return decode(image)
    if isinstance(image, str | PathLike):
        try:
            return decode(Path(image).read_bytes())
        except BadImage as error:
            raise BadImage(f"{image}: {error}") from None
    return from_pillow(image)


class DualEncoderModel:
    """Images and texts into one space, in evaluation mode and without gradients.

    transform: an image to (3, S, S) float32. tokenizer: a list of B texts to tokens (B, L) int64 and a mask
    (B, L) bool. embed_dim: width E of the space. logit_scale: the factor of the similarities; logit_bias:
    what is added to them, or None. `opened` has the module itself, its recipe, step and folder.
    """

    def __init__(self, opened: Opened, precision: PrecisionName = "fp32") -> None:
        assert opened.tokenizer is not None, "a dual encoder has a tokenizer"
        self.opened = opened
        self.model = opened.model
        self.transform = Transform(opened.recipe.data.image)
        self.tokenizer: Tokenizer = opened.tokenizer
        self.embed_dim: int = self.model.embed_dim
        self.logit_scale: float = self.model.logit_scale.exp().item()
        bias = self.model.logit_bias
        self.logit_bias: float | None = None if bias is None else bias.item()
        self.device = self.model.logit_scale.device
        self._precision = Precision(precision, self.device)
        self._precision.prepare(self.model)

    def __repr__(self) -> str:
        at = "" if self.opened.step is None else f", step {self.opened.step:,}"
        return f"{type(self).__name__}({self.opened.name!r}{at}, {self.embed_dim} dimensions, {self.device})"

    def encode_image(self, images: AnyImage | Iterable[AnyImage], *, batch_size: int = BATCH) -> Tensor:
        """(N, E) float32 of length one, on the model's device.

        images: what `transform` takes, one or many; or a batch (N, 3, S, S) float that went through it.
        Raises as `transform`.
        """
        if isinstance(images, Tensor) and images.is_floating_point():
            size = self.transform.size
            if images.shape[1:] != (3, size, size):
                raise TypeError(f"a batch {tuple(images.shape)} was given, not (N, 3, {size}, {size})")
            return self._encoded(images.float().split(batch_size), self.model.encode_image)
        pixels = isinstance(images, Tensor) and images.ndim == 3
        if pixels or isinstance(images, str | bytes | PathLike) or not isinstance(images, Iterable):
            images = [images]  # type: ignore[list-item]
        with ThreadPoolExecutor(usable_cores(1)) as threads:
            batches = (torch.stack([*threads.map(self.transform, own)]) for own in cut(images, batch_size))
            return self._encoded(batches, self.model.encode_image)

    def encode_text(self, texts: str | Iterable[str], *, batch_size: int = BATCH) -> Tensor:
        """(N, E) float32 of length one, on the model's device; texts beyond the context are cut."""
        texts = [texts] if isinstance(texts, str) else texts

        def encode(batch: Sequence[str]) -> Tensor:
            tokens, mask = self.tokenizer(batch)
            return self.model.encode_text(tokens.to(self.device), mask.to(self.device))

        return self._encoded(cut(texts, batch_size), encode)

    def similarity(self, images: Tensor, texts: Tensor) -> Tensor:
        """The model's logits (N, M) of features (N, E) and (M, E): scale x cosine, plus the bias if any."""
        return self.logit_scale * images @ texts.T + (self.logit_bias or 0.0)

    def classify(
        self,
        images: AnyImage | Iterable[AnyImage],
        names: Sequence[str],
        templates: Sequence[str] = (PLACEHOLDER,),
    ) -> Tensor:
        """(N, C) float32: how probable each of the C class names is for each image.

        A softmax over the classes; of a model with a bias (SigLIP), which is trained for each pair alone, a
        sigmoid of each. templates: sentences in which `{c}` stands for the name; a class is the normalised
        mean of its sentences' features (Radford et al. 2021, section 3.1.4). Raises UserError for a template
        without `{c}`, and as `encode_image`.
        """
        if not names or not templates:
            raise UserError("classify: there are no names, or no templates; give at least one of each.")
        check_templates(templates, "classify")
        classes = vectors_of(names, templates, self.encode_text)
        logits = self.similarity(self.encode_image(images), classes)
        return logits.softmax(dim=1) if self.logit_bias is None else logits.sigmoid()

    @torch.no_grad()
    def _encoded(self, batches: Iterable[Any], encode: Callable[[Any], Tensor]) -> Tensor:
        found = [torch.empty(0, self.embed_dim, device=self.device)]
        with self._precision.autocast():
            for batch in batches:
                on_device = batch.to(self.device) if isinstance(batch, Tensor) else batch
                found.append(encode(on_device).float())
        return torch.cat(found)


def cut(values: Iterable[T], size: int) -> Iterable[list[T]]:
    """The values in lists of `size`, the last one shorter."""
    iterator = iter(values)
    while batch := list(islice(iterator, size)):
        yield batch
