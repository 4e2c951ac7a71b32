"""What to prune, how much, when and by which criterion: one frozen dataclass, validated once."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pins_ext.criteria import CRITERIA, PRECOMPUTED, Criterion
from pins_ext.patterns import ACCEPTED, NONE, Pattern
from pins_ext.storage import STORAGES

SCHEDULES = ("cubic", "linear", "cosine", "constant", "one-shot")

TRAINING_ONLY = (
    "initial_sparsity", "beta1", "beta2", "importance_every", "delta_t", "schedule", "warmup", "cooldown",
    "mask_policy", "regrow", "state_device", "mask_optimizer_state",
)  # fmt: skip
"""Options that mean nothing to one-shot pruning."""

_ZERO_AT_ZERO = ", ".join(c.name for c in CRITERIA.values() if c.zero_at_zero and not c.reads_inputs)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    ScoreFunction = Callable[[Tensor, Tensor, float], Tensor]
else:
    # The flags of the command are made from this file; its help is there before torch could be loaded.
    ScoreFunction = Callable
RatioFunction = Callable[[int], float]
Density = float | Mapping[str, float]


def _option(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


def _documented(config: type[Any]) -> type[Any]:
    """The class with an Args section made of the help of its fields."""
    if config.__doc__:  # none under -OO
        lines = [f"    {f.name}: {f.metadata['help']}.{_default(f)}\n" for f in dataclasses.fields(config)]
        # Python 3.13 takes the indentation away, earlier ones leave it.
        text = inspect.cleandoc(config.__doc__)
        config.__doc__ = text.replace("Raises:", f"Args:\n{''.join(lines)}\nRaises:", 1)
    return config


def _default(option: dataclasses.Field[Any]) -> str:
    return "" if option.default in (None, dataclasses.MISSING) else f" Default: {option.default!r}."


@_documented
@dataclass(frozen=True)
class PruneConfig:
    """How a model is pruned during fine-tuning. The metadata of each field is its command-line help.

    Raises:
        ValueError: on construction, for any value out of range; the message names the field and what it accepts.
    """

    # ruff: noqa: RUF009 (_option makes a dataclass field)
    sparsity: float = _option(0.8, "share of the prunable weights that is zero at the end, in [0, 1)")
    initial_sparsity: float = _option(0.0, "share that is zero when the schedule starts, in [0, sparsity]")
    criterion: str | ScoreFunction = _option(
        "pins",
        "importance of a weight, from its value, its gradient and the learning rate; platon is |p g| as its paper "
        "writes it, pins-update what its released code computes; wanda, by its layer's inputs, is one-shot only",
        tuple(CRITERIA),
    )
    beta1: float = _option(0.85, "decay of the running average of importance, in [0, 1)")
    beta2: float = _option(
        0.95, "decay of the running average of its uncertainty; 1 ignores uncertainty, 0 uses the last deviation"
    )
    importance_every: int = _option(
        1, "take importance in every so many steps only; it divides delta_t, and other steps cost what dense ones do"
    )
    delta_t: int = _option(10, "window in steps: importance is averaged over it, and a new mask is chosen at its end")
    schedule: str | RatioFunction = _option("cubic", "how sparsity grows between warm-up and cool-down", SCHEDULES)
    warmup: int | float = _option(
        0.1, "steps before the schedule starts (an integer), or their share of training (< 1)"
    )
    cooldown: int | float = _option(0.3, "steps at the final sparsity (an integer), or their share of training (< 1)")
    ties: str = _option(
        "exact",
        "exact: precisely the wanted number of zeros; reference: the released code's rule",
        ("exact", "reference"),
    )
    mask_policy: str = _option(
        "reference",
        "reference: weights grow back between masks until the final sparsity is reached, as in the released code; "
        "strict: they are zero after every step",
        ("reference", "strict"),
    )
    regrow: str = _option(
        "shadow",
        f"under strict masks, criteria that are 0 at a zero weight ({_ZERO_AT_ZERO}) score a pruned weight "
        "by its last unmasked value (shadow, one more state) or let it stay pruned (never)",
        ("shadow", "never"),
    )
    scope: str | Mapping[str, tuple[str, ...]] = _option(
        "auto",
        "weights compete globally, within each tensor (layer), within groups of name patterns, or, one-shot only, "
        "within each output of a layer (row); auto: row for wanda without a pattern, else global",
    )
    include: tuple[str, ...] = _option(
        (), "prune the parameters whose names match these patterns, instead of the default"
    )
    exclude: tuple[str, ...] = _option((), "never prune parameters whose names match these patterns")
    min_density: Density = _option({}, "least share of weights kept per tensor: a number, or pattern to number")
    max_density: Density = _option({}, "largest share of weights kept per tensor: a number, or pattern to number")
    pattern: str | Mapping[str, str] = _option(
        NONE,
        "zeros as hardware likes them: N:M (2:4, at most 2 of 4 inputs in a row are kept), blocks of outputs x inputs "
        "(4x1, 16x16), none, or name pattern to one of these; tensors that it does not fit are pruned without",
    )
    state_dtype: str = _option(
        "float32",
        "storage of the importance states: bfloat16 halves it, with stochastic rounding; 8bit takes a "
        "quarter: a byte each and a scale for every 32 weights",
        STORAGES,
    )
    state_device: str | None = _option(
        None,
        "cpu: keep the importance states in host memory while the weights are on a GPU; weights and gradients are "
        "copied there when importance is taken, masks come back as bits (default: where the weights are)",
        ("cpu",),
    )
    mask_optimizer_state: bool = _option(False, "also clear the optimizer state of pruned weights")
    parameter_set: str = _option(
        "default",
        "default: 2-D weights of the transformer blocks; released: the released code's BERT set, biases included",
        ("default", "released"),
    )
    seed: int = _option(0, "seed of the stochastic rounding of bfloat16 states")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            object.__setattr__(self, f.name, _plain(getattr(self, f.name)))
        for name in ("include", "exclude"):
            object.__setattr__(self, name, self._patterns(name, getattr(self, name)))
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata.get("choices")
            own = f.name in ("criterion", "schedule") and callable(value)
            unset = value is None and f.default is None
            if choices and not own and not unset and value not in choices:
                raise ValueError(f"{f.name} must be one of {', '.join(choices)}; got {value!r}")
        if self.scope == "auto":
            object.__setattr__(self, "scope", "row" if self.rule.reads_inputs and not self.patterned else "global")
        percent = _fits(self.sparsity, 2, 99)
        hint = f" ({self.sparsity:g} % is {self.sparsity / 100:g})" if percent else ""
        self._check(_fits(self.sparsity, 0, 1) and self.sparsity < 1, "sparsity", f"a number in [0, 1){hint}")
        fits = _fits(self.initial_sparsity, 0, self.sparsity)
        self._check(fits, "initial_sparsity", "a number between 0 and sparsity")
        self._check(_fits(self.beta1, 0, 1) and self.beta1 < 1, "beta1", "a number in [0, 1)")
        self._check(_fits(self.beta2, 0, 1), "beta2", "a number in [0, 1]")
        self._check(_is_integer(self.delta_t) and self.delta_t >= 1, "delta_t", "an integer of at least 1")
        every = self.importance_every
        fits = _is_integer(every) and every >= 1 and self.delta_t % every == 0
        self._check(fits, "importance_every", f"an integer that divides delta_t ({self.delta_t})")
        if every > 1 and not self.rule.instant:
            raise ValueError(f"importance_every must be 1 for criterion={self.criterion!r}, which takes none in a step")
        if self.state_dtype == "8bit" and self.rule.signed and (self.smoothed or self.rule.instant):
            raise ValueError(
                f"state_dtype must be float32 or bfloat16 for criterion={self.to_dict()['criterion']!r}, whose "
                "scores may be below zero: 8bit stores none"
            )
        if self.rule.reads_moments and self.smoothed and self.beta2 == 0:
            raise ValueError(f"beta2 must be above 0 for criterion={self.criterion!r}, which keeps no window mean")
        self._check(_is_integer(self.seed), "seed", "an integer")
        self._check(isinstance(self.mask_optimizer_state, bool), "mask_optimizer_state", "True or False")
        for name in ("warmup", "cooldown"):
            value = getattr(self, name)
            fits = _fits(value, 0, math.inf) and (isinstance(value, int) or value < 1)
            self._check(fits, name, "a number of steps (an integer) or a share of training in [0, 1)")
        if not isinstance(self.scope, Mapping):
            known = self.scope in ("global", "layer", "row")
            self._check(known, "scope", "auto, global, layer, or groups of name patterns (row in one shot)")
        else:
            self._check(len(self.scope) > 0, "scope", "at least one group")
            self._patterns("scope", tuple(self.scope))
            groups = {group: self._patterns(f"scope[{group}]", p) for group, p in self.scope.items()}
            object.__setattr__(self, "scope", groups)
        for name in ("min_density", "max_density"):
            value = getattr(self, name)
            densities = value if isinstance(value, Mapping) else {"*": value}
            self._patterns(name, tuple(densities))
            for pattern, density in densities.items():
                self._check(_fits(density, 0, 1), f"{name}[{pattern}]", "a number in [0, 1]", density)
            object.__setattr__(self, name, densities if densities is value else {"*": float(value)})
        if self.ties == "reference" and (self.min_density or self.max_density):
            raise ValueError("min_density and max_density need an exact count: use ties='exact'")
        self._check_pattern()

    def _check_pattern(self) -> None:
        wanted = self.pattern if isinstance(self.pattern, Mapping) else {"*": self.pattern}
        self._patterns("pattern", tuple(wanted))
        self._check(len(wanted) > 0, "pattern", "a pattern, or at least one name pattern with one")
        self._check(all(isinstance(p, str) for p in wanted.values()), "pattern", ACCEPTED)
        for text in wanted.values():
            Pattern.parse(text)
        if self.patterned and self.scope == "row":
            raise ValueError(
                "scope='row' prunes every row alike, a pattern every group or block: leave one of them out"
            )
        if self.patterned and self.ties == "reference":
            raise ValueError("a pattern needs an exact count: use ties='exact'")
        if self.patterned and self.sparsity == 0:
            raise ValueError("a pattern needs zeros: set sparsity above 0, or pattern='none'")

    def check_training(self) -> None:
        """Refuse what only one-shot pruning can do.

        Raises:
            ValueError: a criterion that reads inputs, or scope="row".
        """
        if self.rule.reads_inputs:
            raise ValueError(
                f"criterion={self.criterion!r} scores weights by their layers' inputs, not seen in training: prune "
                "in one shot with prune_once or pins-ext prune, and go on with Pruner.from_sparse"
            )
        if self.scope == "row":
            raise ValueError("scope='row' is for one-shot pruning (prune_once); training takes global, layer or groups")

    def check_once(self) -> None:
        """Refuse what only training can do, so that no option is silently without effect.

        Raises:
            ValueError: an option of the schedule, of the running averages or of the masks' policy was set.
        """
        fields = {f.name: f for f in dataclasses.fields(self)}
        if given := [name for name in TRAINING_ONLY if getattr(self, name) != fields[name].default]:
            raise ValueError(
                f"{', '.join(given)}: one-shot pruning has no schedule and no running averages; leave it out"
            )

    def _check(self, holds: bool, name: str, accepts: str, *got: Any) -> None:
        if not holds:
            raise ValueError(f"{name} must be {accepts}; got {got[0] if got else getattr(self, name)!r}")

    def _patterns(self, name: str, value: Any) -> tuple[str, ...]:
        patterns = (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else (None,)
        self._check(all(isinstance(p, str) for p in patterns), name, "name patterns (strings)", value)
        return patterns

    @property
    def rule(self) -> Criterion:
        """What is known of the criterion; a user's function arrives at the operators as precomputed scores."""
        return CRITERIA[self.criterion] if isinstance(self.criterion, str) else PRECOMPUTED

    @property
    def smoothed(self) -> bool:
        """Whether the score is built from running averages."""
        return self.rule.smoothed

    @property
    def patterned(self) -> bool:
        """Whether any tensor is to have a pattern."""
        wanted = self.pattern.values() if isinstance(self.pattern, Mapping) else [self.pattern]
        return any(pattern != NONE for pattern in wanted)

    @property
    def needs_shadow(self) -> bool:
        """Whether a pruned weight's last unmasked value is kept, so that it can score above zero and return."""
        return self.mask_policy == "strict" and self.regrow == "shadow" and self.rule.zero_at_zero

    @property
    def dtype(self) -> torch.dtype:
        """Storage of the importance states; uint8 for 8 bits, see ops.encode."""
        import torch

        return dict(zip(STORAGES, (torch.float32, torch.bfloat16, torch.uint8), strict=True))[self.state_dtype]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; a callable becomes its name in angle brackets, the same in every process."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {k: f"<{_name(v)}>" if callable(v) else v for k, v in plain.items()}


def _plain(value: Any) -> Any:
    """Python's own number for a NumPy or torch scalar, also inside a mapping."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fits(value: Any, least: float, most: float) -> bool:
    """Whether it is a number between these two."""
    return (_is_integer(value) or isinstance(value, float)) and least <= value <= most


def _name(value: Any) -> str:
    """Qualified name of a callable: of an object its class's, of a partial its function's with the arguments."""
    if isinstance(value, functools.partial):
        named = (f"{key}={_argument(item)}" for key, item in value.keywords.items())
        return f"partial({', '.join([_name(value.func), *map(_argument, value.args), *named])})"
    return getattr(value, "__qualname__", type(value).__qualname__)


def _argument(value: Any) -> str:
    return _name(value) if callable(value) else repr(value)
