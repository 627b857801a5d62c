"""Apple's GPUs have no float64: tensors that say that they are there, and refuse it as torch does."""

from typing import Any

import pytest
import torch

from frankenmoe.audit.collect import RouterSums
from frankenmoe.errors import PlanError
from frankenmoe.gates.statistics import Moments
from frankenmoe.moe import device
from frankenmoe.moe.trace import LayerTrace


class OnMps(torch.Tensor):
    """A tensor of the CPU that claims another device. Only `cpu` gets its numbers out."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func == torch.Tensor.device.__get__:
            return torch.device("mps")
        if name == "cpu":
            with torch._C.DisableTorchFunctionSubclass():
                return args[0].as_subclass(torch.Tensor)
        if name == "double" or any(each is torch.float64 for each in (*args, *kwargs.values())):
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        tensors = [each for each in args if isinstance(each, torch.Tensor)]
        if any(type(each) is torch.Tensor and each.dim() for each in tensors):
            raise RuntimeError("Expected all tensors to be on the same device, but found mps:0 and cpu!")
        return super().__torch_function__(func, types, args, kwargs)


def there(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.as_subclass(OnMps)


def test_the_fake_refuses_what_mps_refuses() -> None:
    fake = there(torch.randn(3, 4))
    assert fake.device.type == "mps"
    assert type(fake.float().softmax(-1)) is OnMps
    for refused in (lambda: fake.double(), lambda: fake.sum(dtype=torch.float64), lambda: fake.to(torch.float64)):
        with pytest.raises(TypeError, match="float64"):
            refused()
    with pytest.raises(RuntimeError, match="same device"):
        _ = fake + torch.ones(3, 4)
    assert device.in_float64(fake).dtype == torch.float64


def test_moments_of_states_there_are_those_of_states_here() -> None:
    states_ND = torch.randn(20, 8)
    here, away = Moments(1, 8), Moments(1, 8)
    here.add(0, states_ND)
    away.add(0, there(states_ND))
    torch.testing.assert_close(away.second_LDD, here.second_LDD, rtol=0, atol=0)
    torch.testing.assert_close(away.sum_LD, here.sum_LD, rtol=0, atol=0)


def test_an_audit_of_routing_there_is_that_of_routing_here() -> None:
    logits_TE = torch.randn(30, 5)
    weights_TK, ids_TK = logits_TE.softmax(-1).topk(2)
    hidden_TD = torch.randn(30, 8)
    here, away = (RouterSums(layer=0, path="", experts=5, top_k=2, domains=1) for _ in range(2))
    here.add(LayerTrace(0, "", 5, weights_TK, ids_TK, logits_TE), hidden_TD, domain=0)
    away.add(LayerTrace(0, "", 5, *map(there, (weights_TK, ids_TK, logits_TE))), there(hidden_TD), domain=0)
    for name in ("weight_E", "prob_E", "counts_CE", "first_CE"):
        torch.testing.assert_close(getattr(away, name), getattr(here, name), rtol=0, atol=0)
    assert (away.entropy, away.margin, away.spread, away.norm) == (here.entropy, here.margin, here.spread, here.norm)


def test_full_memory_there_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(torch.nn.Linear):
        def to(self, *_: Any, **__: Any) -> Any:
            raise RuntimeError("MPS backend out of memory (MPS allocated: 18.13 GB, other allocations: 1 MB)")

    monkeypatch.setattr(device, "free_memory", lambda place: 2**20)
    with pytest.raises(PlanError, match="does not fit into the memory of mps"):
        device.place(Full(2, 2), torch.device("mps"))
