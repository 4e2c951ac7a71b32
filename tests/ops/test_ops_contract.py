"""Every operator passes torch.library.opcheck, and refuses bad arguments by name."""

from __future__ import annotations

import pytest
import torch
from operator_calls import CALLS, REFUSED

pins = torch.ops.pins_ext


@pytest.mark.parametrize("name", CALLS)
def test_opcheck(name: str) -> None:
    args, kwargs = CALLS[name]()
    torch.library.opcheck(getattr(pins, name).default, tuple(args), kwargs)


def test_every_operator_is_checked() -> None:
    registered = {
        s.name.removeprefix("pins_ext::") for s in torch._C._jit_get_all_schemas() if s.name.startswith("pins_ext::")
    }
    assert registered == {*CALLS, "cpu_capability"}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_refused_by_name(case: str) -> None:
    name, where, value, message = REFUSED[case]
    args, kwargs = CALLS[name]()
    if isinstance(where, int):
        args[where] = value
    else:
        kwargs[where] = value
    with pytest.raises(RuntimeError, match=message):
        getattr(pins, name)(*args, **kwargs)
