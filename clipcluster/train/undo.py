"""Taking back an update of any optimizer, without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

Values = dict[str, Any]
"""What an optimizer keeps for a parameter, or counts for a group of them: tensors and numbers."""


def counters(group: Values, given: frozenset[str]) -> Values:
    """What an optimizer itself keeps in a parameter group: not the settings `given` to it."""
    return {key: value for key, value in group.items() if key not in given}


class Undo:
    """Makes updates that are taken back where they should not have been made.

    Most optimizers cannot be told on the device to skip an update. So the update is made, and where
    `found_inf` is 1 its parameters and state are put back: tensors on the parameters' device at once, by a
    copy from before; numbers, and tensors that an optimizer keeps on the host, before the next update (or
    reading of the state), when `found_inf` has long arrived. The host waits only until the device has
    finished the previous step's gradients, so a step's kernels are always queued meanwhile.

    The cost is a copy of parameters and state while the update is made, when activations are gone, and
    reading and writing each of them once more.
    """

    def __init__(self) -> None:
        self._late: _Late | None = None

    @torch.no_grad()
    def step(self, optimizer: torch.optim.Optimizer, given: frozenset[str], found_inf: Tensor) -> None:
        """One update of the parameters that have a gradient; none at all where `found_inf` is 1.

        given: the keys of a parameter group that are settings.
        """
        self.settle()
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        weights = [parameter.clone() for parameter in parameters]
        states = [copied(optimizer.state.get(parameter, {})) for parameter in parameters]
        counted = [copied(counters(group, given)) for group in optimizer.param_groups]
        optimizer.step()
        skip = found_inf.bool()
        for parameter, weight, before in zip(parameters, weights, states, strict=True):
            torch.where(skip, weight, parameter, out=parameter.data)
            state = optimizer.state.get(parameter, {})
            for key, old in _on(parameter.device, before):
                torch.where(skip, old, state[key], out=state[key])
        self._late = _Late(optimizer, given, parameters, states, counted, found_inf)

    def settle(self) -> None:
        """Put back what the last update changed on the host, if it is to be taken back."""
        late, self._late = self._late, None
        if late is not None and late.skipped():
            late.put_back()


class _Late:
    """What the host learns of an update after it was made."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        given: frozenset[str],
        parameters: list[nn.Parameter],
        states: list[Values],
        counted: list[Values],
        found_inf: Tensor,
    ) -> None:
        self._optimizer, self._given, self._parameters = optimizer, given, parameters
        self._states = [
            {key: value for key, value in state.items() if not _is_on(parameter.device, value)}
            if state
            else None
            for parameter, state in zip(parameters, states, strict=True)
        ]
        self._counted = counted
        self._event: torch.Event | None = None
        self._flag = found_inf.clone()
        if found_inf.device.type != "cpu":
            self._flag = torch.empty_like(found_inf, device="cpu", pin_memory=True)
            self._flag.copy_(found_inf, non_blocking=True)
            self._event = torch.Event(found_inf.device)
            self._event.record()

    def skipped(self) -> bool:
        if self._event is not None:
            self._event.synchronize()
        return bool(self._flag)

    def put_back(self) -> None:
        """Numbers and tensors of the host as they were; a state that began with the update is dropped."""
        for parameter, before in zip(self._parameters, self._states, strict=True):
            if before is None:
                self._optimizer.state.pop(parameter, None)
            else:
                self._optimizer.state[parameter].update(before)
        for group, before in zip(self._optimizer.param_groups, self._counted, strict=True):
            for key in counters(group, self._given):
                del group[key]
            group.update(before)


def copied(values: Values) -> Values:
    """The same values, no tensor shared."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def _is_on(device: torch.device, value: Any) -> bool:
    return isinstance(value, Tensor) and value.device == device


def _on(device: torch.device, values: Values) -> Iterator[tuple[str, Tensor]]:
    return ((key, value) for key, value in values.items() if _is_on(device, value))
