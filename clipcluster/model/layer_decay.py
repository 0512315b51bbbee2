"""Layer-wise learning-rate decay: rates that fall from a tower's last layer to its first."""

from __future__ import annotations

from torch import nn

from clipcluster.errors import UserError
from clipcluster.model.layers import layers_of

_GROUPED = 27  # the most blocks of ConvNeXt's third stage: ids 3 to 11 have three each


def layer_scales(tower: nn.Module, decay: float, *, groups: bool = False) -> dict[str, float]:
    """Parameter name in the tower -> `decay ** (last - id)`, its factor of the learning rate.

    The ids (as in the fine-tuning code of BEiT, Bao et al. 2022): 0 for parameters before the first of D
    blocks (embeddings, stem), 1 to D for the blocks, D + 1 for parameters after them, like a projection or a
    head outside the tower (factor 1). ConvNeXt's stem has the id 1 of the first block (ConvNeXt V2's code,
    `single`).

    groups: ConvNeXt's 14 ids instead (Liu et al. 2022): stem 0, the first two stages 1 and 2, the third stage
    three blocks per id from 3 on, the last stage 12, the final norm 13.

    Raises UserError for a tower without layers, and for `groups` where the tower is not such a ConvNeXt.
    """
    ids = _grouped(tower) if groups else _by_block(tower)
    last = 13 if groups else len(layers_of(tower))
    return {name: decay ** (last - number) for name, number in ids.items()}


def _by_block(tower: nn.Module) -> dict[str, int]:
    layers = layers_of(tower)
    if len(layers) < 2:
        raise UserError("layer_decay: the tower has no layers that are known")
    ids = {name: number for number, layer in enumerate(layers) for name in layer.parameters}
    if _is_convnext(tower):
        ids |= dict.fromkeys(layers[0].parameters, 1)
    return ids | dict.fromkeys(layers[-1].after, len(layers))


def _grouped(tower: nn.Module) -> dict[str, int]:
    stem, *blocks = layers_of(tower)
    third = sum(layer.stage == 2 for layer in blocks)
    if not _is_convnext(tower) or {layer.stage for layer in blocks} != {0, 1, 2, 3} or third > _GROUPED:
        raise UserError(
            "layer_ids: groups is for a ConvNeXt of four stages whose third has at most "
            f"{_GROUPED} blocks; use blocks"
        )
    ids = dict.fromkeys(stem.parameters, 0)
    for layer in blocks:
        assert layer.stage is not None
        assert layer.block is not None
        number = (1, 2, 3 + layer.block // 3, 12)[layer.stage]
        ids |= dict.fromkeys(layer.parameters, number)
    return ids | dict.fromkeys(blocks[-1].after, 13)


def _is_convnext(tower: nn.Module) -> bool:
    return any(type(module).__name__.lower().startswith("convnext") for module in tower.modules())
