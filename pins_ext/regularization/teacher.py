"""The teacher of self-regularization: an earlier state of the model itself, or a fixed model, and when it changes."""

from __future__ import annotations

import copy
import inspect
import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pins_ext.distributed.first import on_first
from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import forget_gathered, local
from pins_ext.regularization.borrowed import Borrowed, parts_of
from pins_ext.wrappers import is_flattened, is_sharded

POLICIES = ("latest", "best", "ema", "none")

Source = str | os.PathLike[str] | nn.Module


class Teacher:
    """A frozen copy of the model that the policy renews; it shares nothing with the model that could change.

    Of a model that is cut over ranks each rank keeps a copy of its own parts, see `borrowed`.

    Args:
        model: the model that is trained.
        teacher: "latest" becomes the model at every multiple of `every` steps; "best" when a dev score beats all
            before; "ema" becomes the model at step `every` and is a running average of the weights from then on; "none"
            is never there; a folder, hub name or module is fixed.
        every: steps between snapshots, None while it is not known.
        ema_decay: weight of the old average, None for 1 - 1 / every.
        start: folder, hub name or module that is the teacher before the first snapshot.

    Attributes:
        module: the teacher, None while there is none.
        steps: optimizer steps seen.
        snapshot_step: the step it is from.
        best_score: the dev score of the "best" one.
        answers: whether a forward pass of it is under way.

    Raises:
        ValueError: a setting out of range, a teacher that can't be loaded or doesn't fit; the message says which.
    """

    def __init__(
        self, model: nn.Module, teacher: Source, every: int | None, ema_decay: float | None, start: Source | None
    ) -> None:
        self.model = model
        self.policy = teacher if isinstance(teacher, str) and teacher in POLICIES else "fixed"
        self.source = type(teacher).__name__ if isinstance(teacher, nn.Module) else str(teacher)
        self.every, self.ema_decay = every, ema_decay
        self.module: nn.Module | None = None
        self.steps = 0
        self.snapshot_step: int | None = None
        self.best_score: float | None = None
        self.answers = False
        self.snapshots_in: Callable[[], AbstractContextManager[None]] = nullcontext
        self._average: dict[str, Tensor] = {}
        if every is not None and every < 1:
            raise ValueError(f"every is a number of steps, at least 1, got {every}")
        if ema_decay is not None and not 0 <= ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {ema_decay}")
        if start is not None and self.policy in ("fixed", "none"):
            raise ValueError(
                f"teacher_init starts a teacher that changes later; teacher={self.source!r} has no use for it"
            )
        if teacher is model:
            raise ValueError("the teacher is the model itself: give another module, or teacher='latest'")
        if self.policy == "fixed":
            self.module = _frozen(teacher if isinstance(teacher, nn.Module) else load(model, teacher))
        elif start is not None:
            self.module = _frozen(copy.deepcopy(start) if isinstance(start, nn.Module) else load(model, start))
            self._pairs()

    @torch.no_grad()
    def __call__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The teacher's outputs: no gradient, no dropout, and the random streams given back as they were."""
        assert self.module is not None
        self._follow_device()
        self.answers = True
        try:
            with _untouched_rng(next(self.model.parameters()).device):
                outputs = self.module(*args, **kwargs)
        finally:
            self.answers = False
        return outputs

    # ---- when it changes --------------------------------------------------------------------------------------------

    def step(self, step: int | None = None) -> None:
        """An optimizer step has ended; see SelfRegularizer.step."""
        step = self.steps + 1 if step is None else step
        if step < self.steps:
            raise ValueError(
                f"step went back from {self.steps} to {step}: load the state that was saved at step {step}"
            )
        before, self.steps = self.steps, step
        if step == before or self.policy not in ("latest", "ema"):
            return
        every = self._every()
        if self.policy == "ema" and self.module is not None:
            self._update_average()
        elif step // every > before // every:
            self._snapshot()

    def evaluated(self, score: float) -> bool:
        """A dev score is known; see SelfRegularizer.evaluated."""
        if self.policy == "best" and self._is_cut():
            # Each rank keeps its own parts: they must be of one moment.
            own = score
            score = on_first(lambda: own)
        beaten = self.best_score is None or score > self.best_score
        if self.policy != "best" or math.isnan(score) or not beaten:
            return False
        self.best_score = float(score)
        self._snapshot()
        return True

    @property
    def decay(self) -> float:
        """Weight of the old average in one update of the "ema" teacher."""
        return 1 - 1 / self._every() if self.ema_decay is None else self.ema_decay

    def _every(self) -> int:
        if self.every is None:
            raise ValueError(f"teacher={self.policy!r} must know when to take snapshots: give every or total_steps")
        return self.every

    @torch.no_grad()
    def _snapshot(self) -> None:
        """Become the model as it is now, in place; the first time, a deep copy."""
        self.snapshot_step = self.steps
        with nullcontext() if self.policy == "ema" else self.snapshots_in():
            if self.module is None:
                self.module = self._copy()
                return
            own, model = self._pairs()
            torch._foreach_copy_(list(own.values()), list(model.values()))

    @torch.no_grad()
    def _update_average(self) -> None:
        """average += (1 - decay) (weights - average), in float32 also for 16-bit weights; buffers are copied."""
        own, model = self._pairs()
        weights = dict(self.model.named_parameters())
        rate = 1 - self.decay
        wide = [name for name in weights if own[name].dtype in (torch.float32, torch.float64)]
        if wide:
            torch._foreach_lerp_([own[name] for name in wide], [model[name] for name in wide], rate)
        for name in own.keys() - set(wide):
            if name in weights and own[name].is_floating_point():
                # In 16 bits a small change would round to nothing.
                average = self._average.setdefault(name, own[name].float())
                own[name].copy_(average.lerp_(model[name].float(), rate))
            else:
                own[name].copy_(model[name])
        self.snapshot_step = self.steps

    def _copy(self) -> nn.Module:
        self.refuse_flattened()
        if self._is_cut():
            return Borrowed(self.model)
        teacher = copy.deepcopy(self.model)
        for name, module in teacher.named_modules():
            # A function is not copied; a bound method is.
            if inspect.isfunction(vars(module).get("forward")):
                raise RuntimeError(
                    f"{name or type(module).__name__}.forward was replaced by a function, which a copy of the model "
                    f"would share with it: give a module or a path as teacher"
                )
        return _frozen(_without_cache(teacher))

    def _pairs(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The teacher's parameters and buffers and the model's, by name, in the same order; tied ones once."""
        self.refuse_flattened()
        self._follow_device()
        assert self.module is not None
        if self._is_cut() and not isinstance(self.module, Borrowed):
            # The one that it started with, whole so far.
            self.module = Borrowed(self.model, parts_of(self.module))
        own, model = parts_of(self.module), parts_of(self.model)
        _refuse_others(own, model, "the teacher")
        return own, {name: model[name] for name in own}

    def _follow_device(self) -> None:
        """Move after a model that was moved."""
        assert self.module is not None
        if isinstance(self.module, Borrowed):
            return
        device = next(self.model.parameters()).device
        if next(self.module.parameters()).device != device:
            self.module.to(device)
            self._average = {name: average.to(device) for name, average in self._average.items()}

    def _is_cut(self) -> bool:
        """Whether the model is cut over ranks."""
        forget_gathered(self.model)
        return is_sharded(self.model)

    def refuse_flattened(self) -> None:
        """Raise RuntimeError where this teacher would be a copy of flat vectors, those of FSDP 1."""
        if self.policy not in ("fixed", "none") and is_flattened(self.model):
            raise RuntimeError(
                f"FSDP 1 makes flat vectors of the weights, of which there is no teacher={self.policy!r}: use FSDP 2"
            )

    # ---- what is saved ----------------------------------------------------------------------------------------------

    @property
    def ranks(self) -> Ranks | None:
        """Those that hold the teacher together; None where each has all of it."""
        return self.module.ranks if isinstance(self.module, Borrowed) else None

    def nbytes(self) -> dict[str, int]:
        """Memory it takes, or will take, by what it is for."""
        source = self.module if self.policy == "fixed" and self.module is not None else self.model
        weights = 0 if self.policy == "none" else sum(t.nbytes for t in parts_of(source).values())
        narrow = [local(p) for p in self.model.parameters() if self.policy == "ema" and p.element_size() < 4]
        return {"teacher": weights, "running average": sum(4 * p.numel() for p in narrow)}

    def state_dict(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Plain data, and tensors by parameter name: none for a fixed teacher; a 16-bit average in float32.

        Of a model that is cut over ranks they are put together; every rank calls it.
        """
        meta = {"steps": self.steps, "snapshot_step": self.snapshot_step, "best_score": self.best_score}
        tensors: dict[str, Tensor] = {}
        if self.module is not None and self.policy != "fixed":
            stored = {name: self._average.get(name, t) for name, t in _persistent(self.module).items()}
            tensors = {name: tensor.detach().contiguous() for name, tensor in stored.items()}
            if isinstance(self.module, Borrowed):
                tensors = self.module.whole(tensors)
        return meta, tensors

    @torch.no_grad()
    def load_state_dict(self, meta: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Raises ValueError when the tensors are not those of this model."""
        if self.policy != "fixed":
            module = (self.module or self._copy()) if tensors else None
            own = {} if module is None else _persistent(module)
            if isinstance(module, Borrowed):
                tensors = module.cut(tensors)
            _refuse_others(tensors, own, "the checkpoint's teacher")
            self._average = {}
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
                if self.policy == "ema" and tensors[name].dtype != tensor.dtype:
                    self._average[name] = tensors[name].to(tensor.device, copy=True)
            self.module = module
        self.steps, self.snapshot_step, self.best_score = meta["steps"], meta["snapshot_step"], meta["best_score"]


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """A teacher from a folder or hub name, of the model's class and dtype.

    Raises:
        ValueError: it can't be loaded, lacks weights (the task's head, say), or orders its labels differently.
    """
    name = repr(str(path))
    from_pretrained = getattr(type(model), "from_pretrained", None)
    if from_pretrained is None:
        raise ValueError(
            f"teacher {name} is none of {', '.join(POLICIES)}, and {type(model).__name__} has no from_pretrained: "
            f"give a module as teacher"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            teacher, info = from_pretrained(path, dtype=next(model.parameters()).dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"teacher {name} is none of {', '.join(POLICIES)} and can't be loaded: {error}") from error
    lacking = [str(key) for kind in ("missing_keys", "mismatched_keys") for key in sorted(info[kind])]
    if lacking:
        raise ValueError(
            f"teacher {name} lacks {len(lacking)} weights, {lacking[0]} first: it must be a {type(model).__name__} "
            f"that was fine-tuned for the task"
        )
    own, other = (dict(getattr(module.config, "id2label", None) or {}) for module in (model, teacher))
    if own != other and sorted(own.values()) == sorted(other.values()):
        raise ValueError(f"teacher {name} orders its labels {other}, the model {own}: make them agree")
    module: nn.Module = _without_cache(teacher)
    return module


def _frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


def _without_cache(module: Any) -> Any:
    """Let a decoder not collect keys and values that nobody asks for. The configuration must be the module's own."""
    if getattr(getattr(module, "config", None), "use_cache", False):
        module.config.use_cache = False
    return module


def _persistent(module: nn.Module) -> dict[str, Tensor]:
    saved = (module.model if isinstance(module, Borrowed) else module).state_dict().keys()
    return {name: tensor for name, tensor in parts_of(module).items() if name in saved}


def _untouched_rng(device: torch.device) -> AbstractContextManager[None]:
    """Gives the random streams back as they were: modules exist that draw in eval mode, too."""
    on_gpu = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    return torch.random.fork_rng(devices=[device] if on_gpu else [])


def _refuse_others(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> None:
    lacking, foreign = [n for n in wanted if n not in found], [n for n in found if n not in wanted]
    reshaped = [n for n in wanted if n in found and wanted[n].shape != found[n].shape]
    if first := (lacking + foreign + reshaped)[:1]:
        raise ValueError(
            f"{where} does not fit the model: {len(lacking)} tensors missing, {len(foreign)} foreign, {len(reshaped)} "
            f"of another shape, {first[0]} first; it must be of the same architecture"
        )
