"""Steps that are none: how torch's distributed checkpoints make an optimizer's state before there is a first step."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from pins_ext.distributed.ranks import Ranks
from pins_ext.distributed.shards import local
from pins_ext.optim import rates


@torch.no_grad()
def is_rehearsal(optimizer: Optimizer) -> bool:
    """Whether this step is taken for the sake of the state alone.

    `torch.distributed.checkpoint.state_dict` steps an optimizer without state with gradients of zero and a learning
    rate of 0, to know what its state will be. Such a step is not one of training. One synchronisation and, with
    several ranks, one collective where the learning rate is 0 and there is no state yet.
    """
    if optimizer.state or any(rates.host_rate(group.get("lr", 1)) != 0 for group in optimizer.param_groups):
        return False
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    moved = any(bool(torch.count_nonzero(grad.coalesce().values() if grad.is_sparse else grad)) for grad in grads)
    # A rank whose shards get no gradient must not think otherwise than the others.
    return not Ranks(parameters).any(moved)
