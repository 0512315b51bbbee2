"""Undoing an update of any optimizer, without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Values = dict[str, Any]
"""The state that an optimizer keeps for a parameter, or counts for a group: tensors and numbers."""


def counters(group: Values, given: frozenset[str]) -> Values:
    """What an optimizer itself counts in a parameter group: all but the settings `given` to it."""
    return {key: value for key, value in group.items() if key not in given}


class Undo:
    """Makes updates, and undoes those of steps that have to be skipped.

    Most optimizers have no way to skip an update on the device. So the update is made, and where `found_inf`
    is 1 parameters and state are restored: tensors on the parameters' device at once, from a copy; numbers,
    and tensors that an optimizer keeps on the host, before the next update (or reading of the state), when
    the host has `found_inf`. It waits for no more than the gradients of the previous step, with a whole step
    queued behind them.

    The cost is a copy of parameters and state during the update, when the activations are already freed, and
    one more read and write of each.
    """

    def __init__(self) -> None:
        self._late: tuple[_Flag, Callable[[], None]] | None = None

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, given: frozenset[str], found_inf: Tensor) -> None:
        """One update of the parameters that have a gradient; none at all where `found_inf` is 1.

        given: the keys of a parameter group that are settings.
        """
        self.settle()
        flag, skip = _Flag(found_inf), found_inf.bool()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        weights = [parameter.clone() for parameter in parameters]
        states = [copied(optimizer.state.get(parameter, {})) for parameter in parameters]
        counted = [copied(counters(group, given)) for group in optimizer.param_groups]
        optimizer.step()
        on_host: list[tuple[nn.Parameter, Values | None]] = []
        for parameter, weight, before in zip(parameters, weights, states, strict=True):
            torch.where(skip, weight, parameter, out=parameter.data)
            state = optimizer.state.get(parameter, {})
            on_device = [key for key, old in before.items() if _is_on(parameter.device, old)]
            for key in on_device:
                torch.where(skip, before[key], state[key], out=state[key])
            rest = {key: old for key, old in before.items() if key not in on_device}
            on_host.append((parameter, rest if before else None))
        self._late = flag, partial(_restore, optimizer, given, on_host, counted)

    def settle(self) -> None:
        """Restore what the last update changed on the host, if that update has to be undone."""
        late, self._late = self._late, None
        if late is not None and late[0].read():
            late[1]()


def _restore(
    optimizer: torch.optim.Optimizer,
    given: frozenset[str],
    on_host: list[tuple[nn.Parameter, Values | None]],
    counted: list[Values],
) -> None:
    """Restore state and counts on the host; a state that the update created (None before) is removed."""
    for parameter, before in on_host:
        if before is None:
            optimizer.state.pop(parameter, None)
        else:
            optimizer.state[parameter].update(before)
    for group, before in zip(optimizer.param_groups, counted, strict=True):
        for key in counters(group, given):
            del group[key]
        group.update(before)


class _Flag:
    """A number on the device that is being copied to the host."""

    def __init__(self, value: Tensor) -> None:
        self._value = value.clone()
        self._event: torch.Event | None = None
        if value.device.type != "cpu":
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.Event(value.device)
            self._event.record()

    def read(self) -> bool:
        """Whether it is not 0. Waits until the device has computed it."""
        if self._event is not None:
            self._event.synchronize()
        return bool(self._value)


def copied(values: Values) -> Values:
    """A copy of the values that shares no tensor with them."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _is_on(device: torch.device, value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == device
