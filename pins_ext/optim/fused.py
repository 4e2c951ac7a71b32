"""The base of the two optimizers: one kernel call per batch of alike parameters, with room for a pruner."""

from __future__ import annotations

import dataclasses
import warnings
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from pins_ext import ops
from pins_ext.distributed.shards import check_codes, like, local, local_gradient, locals_of, shard_of
from pins_ext.optim.listener import Batch, PruningArguments, StepListener
from pins_ext.optim.moments import converted_moment, exported_states, loaded_moments, take_loaded
from pins_ext.optim.norm import GradientNorm
from pins_ext.optim.release import Clip, GradientRelease
from pins_ext.optim.rounding import Alike
from pins_ext.optim.step import (
    Scaling,
    State,
    begin_on_device,
    begin_on_host,
    check_capturable,
    count_on_device,
    count_on_host,
    is_captured,
    is_rehearsal,
    refuse_capture,
)

COPY_WARNING = (
    "this optimizer is a copy of one that a Pruner takes part in, and prunes nothing: copy the pruner along, "
    "copy.deepcopy((model, optimizer, pruner)), or attach a new one"
)


class FusedOptimizer(Optimizer):
    """Which tensors take which pass, gradient scaling, and the listener that may take part in the step.

    Attributes:
        listener: told of every step, see `StepListener`; None: a plain optimizer.
        grad_clip: float32 [1], what the next step multiplies gradients by, see `clip_grad_norm_`.
        release: see `release_gradients`; None: gradients wait for the step.
        capturable: whether steps are counted on the parameters' device, so that a CUDA graph can hold one.

    Raises:
        ValueError: a parameter group, given or loaded, asks for something of torch.optim's that is not there.
    """

    capturable: bool = False

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        super().__init__(params, defaults)
        # torch.amp.GradScaler then leaves grad_scale and found_inf on the optimizer and always calls step.
        self._step_supports_amp_scaling = True
        self.listener: StepListener | None = None
        self.grad_clip: Tensor | None = None
        self.release: GradientRelease | None = None
        self._norm = GradientNorm()
        self._pointers = ops.PointerTables()
        self._uploads = ops.Uploads()
        self._kept = ops.KeptLists()
        self._left_listener = False  # a copy, of one that had a listener
        self._left_release = False  # a copy, of one that released its gradients
        self._eager_step = torch.compiler.disable(self._step)
        self._plain: dict[tuple[int, ...], tuple[PruningArguments, Alike | None]] = {}
        self._alike: dict[Hashable, Alike] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch.optim's. Raises ValueError for an unsupported option."""
        super().add_param_group(param_group)
        try:
            self._refuse_unsupported(self.param_groups[-1])
        except ValueError:
            self.param_groups.pop()
            raise

    def _refuse_unsupported(self, group: dict[str, Any]) -> None:
        for option in ("amsgrad", "maximize", "differentiable"):
            if group.get(option):
                name = type(self).__name__
                raise ValueError(f"{name} has no {option}: set it to False in the parameter group or use torch.optim's")

    def __getstate__(self) -> dict[str, Any]:
        # A listener knows the parameters it was made for: a copy is left without one.
        left: dict[str, Any] = {"_left_listener": self.listener is not None, "_left_release": self.release is not None}
        left["capturable"] = self.capturable
        return super().__getstate__() | left

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict ends here too: a refused checkpoint changes nothing.
        for group in state["param_groups"]:
            self._refuse_unsupported(group)
        super().__setstate__(state)
        self._step_supports_amp_scaling = True
        for name in ("listener", "grad_clip", "release"):
            self.__dict__.setdefault(name, None)
        for name in ("_plain", "_alike"):
            self.__dict__.setdefault(name, {})
        self.__dict__.setdefault("_norm", GradientNorm())
        self.__dict__.setdefault("_pointers", ops.PointerTables())
        self.__dict__.setdefault("_uploads", ops.Uploads())
        self.__dict__.setdefault("_kept", ops.KeptLists())
        for name in ("_left_listener", "_left_release"):
            self.__dict__.setdefault(name, False)
        self._eager_step = torch.compiler.disable(self._step)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; with a listener, importance and masks ride along.

        Args:
            closure: computes the loss anew; only without a listener.

        Raises:
            RuntimeError: a closure while pruning: its gradients would come too late for the importance; or a CUDA graph
                is captured, and this optimizer is not capturable or the step not one that can be.
        """
        loss = None
        captured = is_captured(self)
        if captured:
            self.check_captured()
        if self._left_listener:
            if self.listener is None:
                warnings.warn(COPY_WARNING, stacklevel=2)
            self._left_listener = False
        if self._left_release and self.release is None:
            raise RuntimeError(
                "this optimizer is a copy of one that released its gradients: call release_gradients() on it, too"
            )
        if closure is not None:
            if self.listener is not None or self.release is not None:
                raise RuntimeError("step(closure) computes gradients inside the step, too late for the importance")
            with torch.enable_grad():
                loss = closure()
        if is_rehearsal(self):
            self._rehearse()
            return loss
        if self.release is not None:
            self.release.end()
            return loss
        try:
            # torch.compile breaks its graph here: a listener's decisions are the host's, other ones in every step.
            alone = self.listener is None and not self.capturable
            (self._step if alone else self._eager_step)(self.listener)
        except BaseException:
            if captured and self.listener is not None:
                self.listener.abandon_step()
            raise
        self.grad_clip = None
        return loss

    def check_captured(self) -> None:
        """Raise RuntimeError for what a CUDA graph can't hold of this optimizer's steps."""
        if not self.capturable:
            refuse_capture(self)
        if self._optimizer_step_pre_hooks or self._optimizer_step_post_hooks:
            raise RuntimeError(
                "a CUDA graph does not call step hooks, such as that of SelfRegularizer.attach(model, optimizer): "
                "attach it without the optimizer, and call its step() after each step"
            )
        if self.release is not None:
            raise RuntimeError(
                "a CUDA graph can't hold a step with release_gradients(), which waits for the device: keep_gradients()"
            )
        check_capturable(self)

    def _step(self, listener: StepListener | None) -> None:
        if listener is not None:
            listener.begin_step()
            pruned, plain = self._batches(listener)
            self._refuse_late([*pruned, *plain])
            for batch in pruned:
                self._run(batch, listener.arguments(batch))
            listener.end_pass()
        else:
            _, plain = self._batches(None)
            self._refuse_late(plain)
        self._step_plain(plain)
        if listener is not None:
            listener.end_step()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch.optim's, but moments keep the dtype of this optimizer: torch's would cast them to the weights'.

        Raises:
            ValueError: as torch.optim's, or a moment has another shape than its parameter; nothing is loaded then.
        """
        given: list[dict[str, Any]] = []
        # Behind every hook that may change what is loaded.
        names = {name for group in self.param_groups for name in self._moments(group)}
        handle = self.register_load_state_dict_pre_hook(partial(take_loaded, given, names))
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        for p, moments in loaded_moments(self, given[0]):
            for name, moment in moments.items():
                self.state[p][name] = converted_moment(moment, p, self._storage(p, name))
        if self.release is not None:
            self.release.reset()
        if self.listener is not None:
            self.listener.states_replaced()

    def rounds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether the pass over these parameters rounds anything stochastically, and so needs random bits."""
        exact = (torch.float32, torch.float16)
        kinds = {p.dtype: p for p in parameters}.values()
        return any(p.dtype not in exact or self._storage(p, "exp_avg") not in exact for p in kinds)

    def coded(self, parameters: Sequence[Tensor]) -> bool:
        """Whether moments of these parameters are stored in 8 bits."""
        return any(self._storage(p, "exp_avg") in ops.CODED for p in parameters)

    def release_gradients(self, max_norm: float | None = None, clip: Clip = "previous") -> None:
        """Step each parameter inside backward from now on, and free its gradient at once.

        The first gradient of a backward begins the step, importance, update and mask of each parameter follow as its
        gradient comes, and `step` ends it: no two gradients need to exist together. Without clipping, weights and masks
        are those of ordinary steps to the last bit. There is one backward a step. Every gradient is read once more, to
        see whether it is finite, and `step` waits for the device once. Call it when the optimizer has all its
        parameters, and after the model is where it is trained.

        Args:
            max_norm: largest 2-norm that gradients keep; None: they are not clipped. torch's clip_grad_norm_ finds no
                gradients to clip.
            clip: "previous" multiplies all gradients by the factor that would have clipped those of the step before, as
                this step's norm is not known in time; the first step is not clipped. "tensor" clips each parameter's
                gradient by its own norm.

        Raises:
            ValueError: a negative max_norm, an unknown clip.
            RuntimeError: several ranks, here or inside backward; inside backward also where released gradients would
                mean something else: a second gradient of one parameter before `step` (accumulation), a criterion whose
                mask needs this step's gradients (see Pruner), score_gradient="task"; in `step`: a GradScaler, a
                gradient that is not finite, whose tensor is left as it is while others of the same step have moved.
        """
        if clip not in ("previous", "tensor"):
            raise ValueError(f"clip must be 'previous' or 'tensor', got {clip!r}")
        if max_norm is not None:
            check_not_negative({"max_norm": max_norm}, "max_norm")
        if self.release is not None:
            self.release.detach()
        self.release = GradientRelease(self, max_norm, clip)

    def keep_gradients(self) -> None:
        """Undo release_gradients: gradients wait for the step again."""
        if self.release is not None:
            self.release.detach()
            self.release = None

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's; the clip factor of these gradients goes with them."""
        self.grad_clip = None
        super().zero_grad(set_to_none)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float) -> Tensor:
        """Clip the gradients of all parameters by their total norm, within the next step's own pass.

        As torch.nn.utils.clip_grad_norm_ over this optimizer's parameters, but for one read of the gradients instead of
        a read and a write: norm and factor stay on the device, and the next step multiplies. `.grad` stays unclipped.
        The factor serves the next step alone; `zero_grad` drops it, and a second call replaces it. With a gradient
        scaler, call `scaler.unscale_(optimizer)` first, as for torch's. The norm of sharded gradients is that of the
        whole ones: every rank calls this.

        Args:
            max_norm: largest 2-norm that the gradients keep; of all of them together.

        Returns:
            float32 scalar on the gradients' device, the norm before clipping. Where it is not finite the clipped
            gradients are not either, as torch's.

        Raises:
            ValueError: max_norm is negative or NaN.
            RuntimeError: a sparse gradient.
        """
        check_not_negative({"max_norm": max_norm}, "max_norm")
        if self.release is not None:
            raise RuntimeError(
                "released gradients are gone when their norm is known: clip by the step before, or by tensor, with "
                "release_gradients(max_norm=...)"
            )
        parameters = [p for group in self.param_groups for p in group["params"]]
        total = self._norm.squared(parameters, type(self).__name__)
        norm, self.grad_clip = ops.clip_factor(total, float(max_norm))
        return norm.reshape(())

    def _rehearse(self) -> None:
        """Make the state that a first step will need, and leave it and the weights at the beginning."""
        for group in self.param_groups:
            names = self._moments(group)
            self._begun([p for p in group["params"] if (names or self.rounds([p])) and p.grad is not None], names)

    def _batches(self, listener: StepListener | None) -> tuple[list[Batch], list[Batch]]:
        """Parameters with a gradient, those that one kernel call can take together: pruned, plain.

        Groups are looked at anew in every step: a parameter may be moved or taken out.
        """
        batches: dict[Any, tuple[list[int], list[Tensor], list[dict[str, Any]]]] = {}
        place, kind = None, None
        for group in self.param_groups:
            moments = self._moments(group)
            for p in group["params"]:
                if p.grad is None:
                    continue
                if listener is not None:
                    place = listener.place_of(p)
                # Thousands of parameters in a row are alike: their batch is looked up once.
                if kind != (now := (place is None, p.device, p.dtype, moments)):
                    kind = now
                    places, parameters, owners = batches.setdefault(kind, ([], [], []))
                places.append(place or 0)
                parameters.append(p)
                owners.append(group)
        found: tuple[list[Batch], list[Batch]] = ([], [])
        for kind, (places, parameters, owners) in batches.items():
            # Pruned parameters in the order of the whole list, whatever that of the groups.
            order = sorted(range(len(places)), key=places.__getitem__)
            found[kind[0]].append(Batch(kind, [parameters[i] for i in order], [owners[i] for i in order]))
        return found

    def _refuse(self, part: Tensor, grad: Tensor) -> None:
        name = type(self).__name__
        if not part.is_contiguous():
            raise ValueError(
                f"{name} needs contiguous parameters, got strides {part.stride()} for shape {tuple(part.shape)}: "
                "set p.data = p.data.contiguous() before training"
            )
        if grad.layout != torch.strided:
            raise RuntimeError(
                f"{name} does not support sparse gradients, and that of a parameter of shape {tuple(part.shape)} is: "
                "build its embedding with sparse=False, or give it an optimizer of its own"
            )

    def _refuse_late(self, batches: list[Batch]) -> None:
        """What batches behind the first would refuse, before that has stepped: a step is taken whole or not at all."""
        for batch in batches[1:]:
            for p in batch.parameters:
                assert p.grad is not None
                self._refuse(local(p), p.grad)

    def _step_plain(self, batches: list[Batch]) -> None:
        live = {}
        for batch in batches:
            parameters = batch.parameters
            key = tuple(id(p) for p in parameters)
            arguments, alike = live[key] = self._plain[key] if key in self._plain else self._without_pruning(batch)
            if alike is not None:
                arguments = dataclasses.replace(arguments, rng=alike.keys(self.state))
            self._run(batch, arguments)
        # A graph, or the capture to come, reads all that was asked for.
        self._plain = self._plain | live if self.capturable else live

    def _without_pruning(self, batch: Batch) -> tuple[PruningArguments, Alike | None]:
        if not self.rounds(batch.parameters):
            return PruningArguments.none(ops.Layout.of(locals_of(batch.parameters))), None
        alike = self.alike(batch.kind)
        return PruningArguments.none(alike.layout(batch.parameters)), alike

    def kind_of(self, p: Tensor, group: dict[str, Any]) -> Hashable:
        """What parameters of one pass have in common."""
        place = None if self.listener is None else self.listener.place_of(p)
        return place is None, p.device, p.dtype, self._moments(group)

    def alike(self, kind: Hashable) -> Alike:
        """All parameters of this kind, those without a gradient, too."""
        owned = ((p, group) for group in self.param_groups for p in group["params"])
        parameters = [p for p, group in owned if self.kind_of(p, group) == kind]
        if kind not in self._alike or not self._alike[kind].has_just(parameters):
            self._alike[kind] = Alike(parameters)
        return self._alike[kind]

    def _run(self, batch: Batch, pruning: PruningArguments, released: Scaling | None = None) -> None:
        """Check tensors, count the step, run the kernel.

        Args:
            batch: to step; the groups agree on their moments.
            pruning: what the pass takes along.
            released: the scaling of a released gradient; one that is not finite ends the run, and counts as a step.
        """
        kind, parameters, owners = batch
        device = parameters[0].device
        parts, grads = locals_of(parameters), []
        for p, part in zip(parameters, parts, strict=True):
            grad = local_gradient(p)
            assert grad is not None
            self._refuse(part, grad)
            grads.append(grad.contiguous())
        scaling = released or Scaling.of(self, device)
        names = self._moments(owners[0])
        states: list[State] = []
        if names or self.rounds(parameters):
            states = self._begun(parameters, names)
            count = count_on_device if self.capturable else count_on_host
            count(states, scaling.found_inf if released is None else None)
        moments = {key: locals_of(state[key] for state in states) for key in names}
        operands = self._operands(moments)
        ends = pruning.boundary
        averages = () if ends is None else (ends.exp_avg_ipt, ends.exp_avg_unc)
        lists = (parts, *operands, pruning.ipt, pruning.shadow, grads, pruning.masks, *averages)
        # By the kind: a batch that changes replaces its own table; and by what is wanted: masks come and go. A compiled
        # step has no addresses to look at.
        use = (kind, *map(bool, lists))
        compiling = torch.compiler.is_compiling()
        pointers = None if compiling else self._pointers.of(use, pruning.layout.places, *lists)
        hyper = self._hyper(parameters, owners)
        kept, *kept_operands = self._kept.of(kind, parts, *operands)
        _run_operator(self._name, kept, kept_operands, grads, hyper, pruning, scaling, pointers)
        # Custom operators don't: a backward through weights saved before this step must fail, as with any optimizer.
        torch.autograd.graph.increment_version(parameters)

    def _begun(self, parameters: list[Tensor], names: tuple[str, ...]) -> list[State]:
        """The states of parameters, with the moments that this step needs, or a count of steps alone."""
        states: list[State] = [self.state[p] for p in parameters]
        captured = any(map(ops.capturing, {p.device for p in parameters}))
        if captured and not all({"skipped", *names} <= state.keys() for state in states):
            raise RuntimeError("a CUDA graph is captured before the optimizer has its state: take a step before")
        for p, state in zip(parameters, states, strict=True):
            if names and state.get(names[0]) is None:  # they come together
                moments = {name: _new_moment(p, self._storage(p, name)) for name in names}
                state.pop("skipped", None)
                state.update({"step": 0.0, **moments})
            if not names:
                state.setdefault("step", 0.0)
            if self.capturable:
                begin_on_device(state, p.device)
            else:
                begin_on_host(state)
        return states

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's of the same name, and loadable by it."""
        packed = super().state_dict()
        packed["state"] = exported_states(packed["state"])
        return packed

    @property
    @abstractmethod
    def _name(self) -> str:
        """Of the algorithm, as the operators are called."""

    @abstractmethod
    def _moments(self, group: dict[str, Any]) -> tuple[str, ...]:
        """Names of the state tensors that a step of this group needs."""

    @abstractmethod
    def _storage(self, p: Tensor, moment: str) -> torch.dtype:
        """The dtype that stores a moment of a parameter; one of ops.CODED for 8 bits."""

    @abstractmethod
    def _hyper(self, parameters: list[Tensor], owners: list[dict[str, Any]]) -> Tensor:
        """The `hyper` argument, float32 [n, 8], every column computed in float64 and rounded once."""

    @abstractmethod
    def _operands(self, moments: dict[str, list[Tensor]]) -> tuple[list[Tensor], ...]:
        """The lists of moments that the operator takes, in order; empty where there is none."""


def _run_operator(
    name: str,
    parameters: Sequence[Tensor],
    moments: Sequence[Sequence[Tensor]],
    grads: list[Tensor],
    hyper: Tensor,
    pruning: PruningArguments,
    scaling: Scaling,
    pointers: Tensor | None,
) -> None:
    """Step parameters with what pruning takes along; at a window's end by the operator that ends it in the same pass.

    Args:
        name: of the algorithm, as the operators are called: "adamw", "sgd".
        parameters: this rank's parts, contiguous; as all lists but that of gradients, maybe a kept one, see
            ops.KeptLists.
        moments: the lists of moments that the operator takes, in order.
        grads: gradients in the same order.
        hyper: float32 [n, 8], see reference.masked_adamw_ and masked_sgd_.
        pruning: masks, importance, and what ends a window.
        scaling: of the gradients.
        pointers: table of addresses, see ops.PointerTables; None: the operator makes it.
    """
    before = (parameters, *moments, pruning.ipt, pruning.shadow)
    tables = (pruning.layout.places, pruning.layout.chunks, hyper)
    after = (*tables, pruning.accepted, pruning.rng, pruning.criterion, pruning.clear_state)
    ends = pruning.boundary
    if ends is None:
        masked = getattr(torch.ops.pins_ext, f"masked_{name}_")
        masked(*before, grads, pruning.masks, *after, **vars(scaling), pointers=pointers)
        return
    boundary = getattr(torch.ops.pins_ext, f"boundary_{name}_")
    boundary(
        *before,
        pruning.masks,
        ends.exp_avg_ipt,
        ends.exp_avg_unc,
        grads,
        *after,
        clip=scaling.clip,
        around=ends.around,
        stats=ends.stats,
        threshold=ends.threshold,
        fold_rng=ends.fold_rng,
        beta1=ends.beta1,
        beta2=ends.beta2,
        bracket=ends.bracket,
        counts=ends.counts,
        pointers=pointers,
    )


def _new_moment(p: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype not in ops.CODED:
        return ops.new_state(p, dtype)
    check_codes("moment_dtype='8bit'", f"a parameter of shape {tuple(p.shape)}", p)
    return like(p, ops.new_state(local(p), dtype, shard_of("p", p)), coded=True)


def check_not_negative(values: Mapping[str, Any], *names: str) -> None:
    """Raise ValueError for what is missing among the values of a parameter group, or of a call, or is negative."""
    for name in names:
        if name not in values:
            raise ValueError(f"a parameter group has no {name}: it is that of another optimizer")
        if not float(values[name]) >= 0:
            raise ValueError(f"{name} must not be negative, got {values[name]}")
