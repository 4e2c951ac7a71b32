"""Training steps by CUDA graphs: one for each kind of step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from pins_ext.pruning.captured import StepKind, hosted, kind_of
from pins_ext.pruning.pruner import Pruner


class Graph(Protocol):
    """Holds the launches of a function."""

    def replay(self) -> None:
        """Launch them again."""


def capture(step: Callable[[], Any]) -> Graph:
    """What a function launches on the current device, as a CUDA graph; nothing runs."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


class StepGraphs:
    """Takes the steps of a capturable optimizer and its pruner by CUDA graphs, to the same bits as eager ones.

    Call it in place of `optimizer.step()`. Not all steps are alike: some end a window, some choose a mask. The first
    one of a kind is taken as ever, the second is captured, and from then on its graph is replayed. Steps whose mask
    only the host can choose stay eager: other scopes than global, densities, patterns, one-shot, a function as
    schedule. Gradients must stay where they are: capture forward and backward before, or zero them in place.

    Args:
        pruner: of one PinsAdamW or PinsSGD with capturable=True, whose learning rate is a tensor on the device.
        step: takes a step, for one that does more than `optimizer.step`, such as to clip before; None: that.
        capture: makes a graph of a function without running it, for one with a pool of its own.

    Attributes:
        graphs: by kind of step.

    Raises:
        ValueError: the pruner's optimizer is not capturable.
        RuntimeError: in a call, what a step has that no graph can hold.
    """

    def __init__(
        self,
        pruner: Pruner,
        step: Callable[[], Any] | None = None,
        capture: Callable[[Callable[[], Any]], Graph] = capture,
    ) -> None:
        if pruner.slots.captured is None:
            raise ValueError("StepGraphs needs the pruner of a PinsAdamW or PinsSGD with capturable=True")
        self._pruner, self._capture = pruner, capture
        self._steps = pruner.slots.captured
        self._step = step or pruner.slots[0].optimizer.step
        self.graphs: dict[StepKind, Graph] = {}

    @property
    def kind(self) -> StepKind:
        """Of the coming step."""
        pruner = self._pruner
        return kind_of(pruner.step, pruner.schedule, pruner.importance, pruner.masks)

    def __call__(self) -> None:
        """Take a step."""
        kind, pruner = self.kind, self._pruner
        if kind not in self._steps.taken or hosted(kind, pruner.step, pruner.schedule, pruner.masks):
            self._step()
            return
        # A loaded checkpoint has brought other states.
        if kind not in self.graphs or kind not in self._steps.held:
            self.graphs[kind] = self._capture(self._step)
        self.graphs[kind].replay()
        self._note(kind)

    def _note(self, kind: StepKind) -> None:
        """The host's part of a step that was replayed: the device has counted it by itself."""
        pruner, t = self._pruner, self._pruner.step
        if kind.chooses:
            masks = pruner.masks
            masks.chosen_for = masks.choice(pruner.importance, pruner.schedule.remaining_ratio(t), t)
        pruner.masks.applied = kind.zeroes
        pruner.step += 1
