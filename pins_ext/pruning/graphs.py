"""Training steps by CUDA graphs: one for each kind of step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from pins_ext import ops
from pins_ext.optim.fused import FusedOptimizer
from pins_ext.pruning.captured import StepKind, hosted, kind_of
from pins_ext.pruning.pruner import Pruner


class Graph(Protocol):
    """Holds the launches of a function."""

    def replay(self) -> None:
        """Launch them again."""


def cuda_graph(step: Callable[[], Any]) -> Graph:
    """What a function launches on the current device, as a CUDA graph; nothing runs."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # The stream that torch would take is on the device of the first capture of all.
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
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
        capture: makes a graph of a function without running it, for one with a pool of its own; None: torch's. The
            weights' device is the current one.

    Attributes:
        graphs: by kind of step.

    Raises:
        ValueError: the pruner's optimizer is not capturable, or its weights are not on a GPU.
        RuntimeError: what no graph can hold: here what no step of this pruner is without, and in a call what its step
            has: gradients clipped before it, step hooks of the optimizer, a detached pruner, an open masked_view,
            another tensor as learning rate, grad_scale or found_inf than the captured one.
    """

    def __init__(
        self,
        pruner: Pruner,
        step: Callable[[], Any] | None = None,
        capture: Callable[[Callable[[], Any]], Graph] | None = None,
    ) -> None:
        optimizer = pruner.slots[0].optimizer
        if pruner.slots.captured is None or not isinstance(optimizer, FusedOptimizer):
            raise ValueError("StepGraphs needs the pruner of a PinsAdamW or PinsSGD with capturable=True")
        device = pruner.masks.weights_layout.places.device
        if capture is None and device.type != "cuda":
            raise ValueError(
                f"StepGraphs captures CUDA graphs, and the weights are on {device}: call optimizer.step(), or move the "
                "model to a GPU before its optimizer and its pruner are made"
            )
        self._pruner, self._optimizer, self._capture = pruner, optimizer, capture or cuda_graph
        self._steps = pruner.slots.captured
        # Looked up in every call: a scheduler that is made later wraps it.
        self._step = step or (lambda: optimizer.step())
        self.graphs: dict[StepKind, Graph] = {}
        self._check()

    @property
    def kind(self) -> StepKind:
        """Of the coming step."""
        return kind_of(self._pruner)

    def __call__(self) -> None:
        """Take a step."""
        self._check()
        kind = self.kind
        # A loaded checkpoint has brought other states.
        for gone in self.graphs.keys() - self._steps.captured.keys():
            del self.graphs[gone]
        if kind not in self._steps.taken or hosted(kind, self._pruner):
            self._step()
            return
        if kind not in self.graphs:
            with ops.on_device(self._pruner.masks.weights_layout.places.device):
                self.graphs[kind] = self._capture(self._step)
        self._steps.check_given(kind)
        self.graphs[kind].replay()
        torch.autograd.graph.increment_version([p for group in self._optimizer.param_groups for p in group["params"]])
        self._pruner.replayed(kind)

    def _check(self) -> None:
        """Refuse what a replay would leave out, or do to what is not there any more."""
        pruner = self._pruner
        if not pruner.slots[0].attached:
            raise RuntimeError("the Pruner of these StepGraphs is detached: call optimizer.step(), or make new ones")
        pruner.masks.refuse_in_view()
        if self._optimizer.grad_clip is not None:
            raise RuntimeError(
                "a CUDA graph does not see gradients that were clipped before it: clip inside the step, "
                "StepGraphs(pruner, step=...)"
            )
        self._steps.check(pruner)
        self._optimizer.check_captured()
