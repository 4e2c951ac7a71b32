"""What one-shot pruning gathers from calibration batches, by criterion, and the scores that come of it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from pins_ext import ops
from pins_ext.pruning.config import PruneConfig
from pins_ext.pruning.inputs import InputNorms
from pins_ext.pruning.scores import Operands, own_score


class Gathered:
    """What batches say about n pruned tensors: nothing here, the weights alone score (magnitude).

    Args:
        parameters: the pruned tensors by name.
        config: the criterion.
        layout: of the tensors.

    Attributes:
        needs_batches: whether it is made of batches at all.
        needs_gradients: whether `take` must be told of gradients.
    """

    needs_batches = False
    needs_gradients = False

    def __init__(self, parameters: Mapping[str, Tensor], config: PruneConfig, layout: ops.Layout) -> None:
        self.names, self.weights = list(parameters), list(parameters.values())
        self.config, self.layout = config, layout
        if config.state_dtype == "8bit":
            raise ValueError("state_dtype must be float32 or bfloat16 for one-shot pruning, got '8bit'")

    def begin_batch(self, tokens: Tensor | None) -> None:
        """A batch comes; tokens: bool [batch, length], False where it is padding, if that is known."""

    def take(self, i: int, grad: Tensor) -> None:
        """The gradient of one tensor in the batch under way."""

    def end_batch(self, came: set[int]) -> None:
        """The batch is over; came: the tensors that got a gradient in it."""

    def detach(self) -> None:
        """Let go of the model."""

    def finish(self) -> None:
        """There are no more batches."""

    def operands(self) -> Operands:
        """What the scores of all tensors are made of."""
        return Operands("magnitude", self.weights, [])

    def score(self, i: int) -> Tensor:
        """The scores of one tensor, float32, of its shape."""
        kind, a, b, _ = self.operands()[:4]
        score = a[i].float()
        if kind == "magnitude":
            return score.abs()
        return score * score * b[i].float() if kind == "fisher" else score


class Inputs(Gathered):
    """Norms of input features: |w| ||x||_2, Wanda (Sun et al. 2023).

    Args:
        model: whose layers are followed.
        parameters, config, layout: see Gathered.
        dims: the dimension of each weight along which outputs lie.
    """

    needs_batches = True

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        config: PruneConfig,
        layout: ops.Layout,
        dims: list[int],
    ) -> None:
        super().__init__(parameters, config, layout)
        self._dims = dims
        self._norms = InputNorms(model, parameters)

    def begin_batch(self, tokens: Tensor | None) -> None:
        """See Gathered."""
        self._norms.tokens = tokens

    def detach(self) -> None:
        """See Gathered."""
        self._norms.detach()

    def finish(self) -> None:
        """See Gathered; what no layer was given is found before anything is pruned."""
        for name in self.names:
            self._norms.norm(name)
        self._norms.warn_of_unreached()

    def operands(self) -> Operands:
        """See Gathered; one float32 score a weight."""
        return Operands("identity", [self.score(i) for i in range(len(self.weights))], [])

    def score(self, i: int) -> Tensor:
        """See Gathered."""
        return self.weights[i].float().abs() * self._norms.norm(self.names[i]).unsqueeze(self._dims[i])


class Gradients(Gathered):
    """Means over the batches: of the instant score, or of g and g² where a criterion else reads AdamW's moments.

    Args:
        learning_rate: of the step that pins and pins-signed look ahead to.
        parameters, config, layout: see Gathered.
    """

    needs_batches = True
    needs_gradients = True

    def __init__(
        self, parameters: Mapping[str, Tensor], config: PruneConfig, layout: ops.Layout, learning_rate: float
    ) -> None:
        super().__init__(parameters, config, layout)
        self.learning_rate, self.batch = learning_rate, 0
        self._reached: set[int] = set()
        device = layout.places.device
        self._layouts = [layout.subset([i]) for i in range(len(self.weights))]
        self._lr = torch.full((1,), learning_rate, dtype=torch.float32, device=device)
        self._accepted = torch.zeros(1, dtype=torch.float32, device=device)
        rule = config.rule
        kinds = ("score",) if rule.instant else ("g", "g²") if rule.smoothed else ("g²",)
        self._means = {kind: [torch.zeros_like(p, dtype=config.dtype) for p in self.weights] for kind in kinds}

    def take(self, i: int, grad: Tensor) -> None:
        """See Gathered."""
        p = self.weights[i]
        if grad.layout != torch.strided:
            raise ValueError(f"{self.names[i]} has a sparse gradient; pruned parameters need dense ones (sparse=False)")
        grad = grad.contiguous()
        for stream, kind in enumerate(self._means):
            if kind != "score":
                self._average(kind, stream, i, grad.float() ** (2 if kind == "g²" else 1))
            elif callable(self.config.criterion):
                self._average(kind, stream, i, own_score(self.config.criterion, p, grad, self.learning_rate))
            else:
                self._average(kind, stream, i, grad, self.config.rule.name)

    def _average(self, kind: str, stream: int, i: int, values: Tensor, criterion: str = "precomputed") -> None:
        weights = [] if criterion == "precomputed" else [self.weights[i]]
        layout, mean = self._layouts[i], self._means[kind][i]
        key = ops.rounding_key(self.config.seed, self.batch, stream)
        rng = ops.to_device(torch.tensor(key, device="cpu"), layout.places.device)
        ops.accumulate_(
            [mean], weights, [values], layout.places, layout.chunks, self._lr, self._accepted, rng, criterion
        )

    def end_batch(self, came: set[int]) -> None:
        """See Gathered; no gradient is one of zero."""
        self._reached |= came
        for i, p in enumerate(self.weights):
            if i not in came:
                self.take(i, torch.zeros_like(p))
        self._accepted += 1
        self.batch += 1

    def finish(self) -> None:
        """See Gathered; the two moments become a score."""
        if out_of_reach := [name for i, name in enumerate(self.names) if i not in self._reached]:
            more = f" and {len(out_of_reach) - 1} other tensors" if len(out_of_reach) > 1 else ""
            warnings.warn(f"{out_of_reach[0]}{more} got no gradient in any batch: their weights score 0", stacklevel=3)
        if "g" not in self._means:
            return
        device = self.layout.places.device
        factors = torch.ones(1, 3, device=device)
        factors[0, 0] = self.learning_rate
        once, rng = torch.ones(1, device=device), torch.zeros(2, dtype=torch.int64, device=device)
        for i, (p, layout) in enumerate(zip(self.weights, self._layouts, strict=True)):
            score = torch.zeros_like(p, dtype=torch.float32)
            first, second = self._means["g"][i], self._means["g²"][i]
            tables = (layout.places, layout.chunks, factors, once, rng)
            ops.fold_moments_([score], [], [p], [first], [second], *tables, beta1=0.0, beta2=1.0)
            self._means["g"][i] = score
        del self._means["g²"]

    def operands(self) -> Operands:
        """See Gathered."""
        if "g²" in self._means:
            factors = torch.ones(len(self.weights), device=self.layout.places.device)
            return Operands("fisher", self.weights, self._means["g²"], factors)
        return Operands("identity", next(iter(self._means.values())), [])


def gathered(
    model: nn.Module,
    parameters: Mapping[str, Tensor],
    config: PruneConfig,
    dims: Sequence[int],
    learning_rate: float,
) -> Gathered:
    """What the criterion of a configuration gathers.

    Args:
        model: the model.
        parameters: the pruned tensors by name.
        config: the criterion.
        dims: of each tensor, see `output_dims`; empty where the criterion doesn't read inputs.
        learning_rate: see Gradients.
    """
    layout = ops.Layout.of(list(parameters.values()))
    if config.rule.reads_inputs:
        return Inputs(model, parameters, config, layout, list(dims))
    if config.rule.instant or config.rule.reads_moments:
        return Gradients(parameters, config, layout, learning_rate)
    return Gathered(parameters, config, layout)
