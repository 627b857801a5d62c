"""Low-rank experts against merged weights and against PEFT."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from frankenmoe.errors import ArtifactError
from frankenmoe.moe.adapter import LoraLinear, with_adapter
from oracles.moe_reference import FFN, HIDDEN, SwiGLU

# R rank, I inputs, O outputs


def lora(inputs: int, outputs: int, rank: int = 3) -> tuple[torch.Tensor, torch.Tensor, float]:
    return torch.randn(rank, inputs), torch.randn(outputs, rank), 0.5


def test_equals_the_merged_weight() -> None:
    base, (a_RI, b_OR, scale), hidden = nn.Linear(5, 7), lora(5, 7), torch.randn(2, 4, 5)
    merged = nn.functional.linear(hidden, base.weight + scale * b_OR @ a_RI, base.bias)
    torch.testing.assert_close(LoraLinear(base, a_RI, b_OR, scale)(hidden), merged, rtol=1e-5, atol=1e-5)


def test_equals_peft() -> None:
    peft = pytest.importorskip("peft")
    names = ["gate_proj", "up_proj", "down_proj"]
    mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=24, num_attention_heads=2))
    loras = {"gate_proj": lora(16, 24), "up_proj": lora(16, 24), "down_proj": lora(24, 16)}
    expert = with_adapter(mlp, loras)
    hidden = torch.randn(2, 5, 16)
    ours = expert(hidden)
    config = peft.LoraConfig(r=3, lora_alpha=1.5, target_modules=names)  # scale = alpha / r = 0.5
    adapted = peft.inject_adapter_in_model(config, mlp)
    for name, (a_RI, b_OR, _) in loras.items():
        layer = adapted.get_submodule(name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a_RI, b_OR
    torch.testing.assert_close(ours, adapted(hidden), rtol=1e-6, atol=1e-6)


def test_shares_every_base_parameter_and_leaves_the_base_alone() -> None:
    base, hidden = SwiGLU(), torch.randn(4, HIDDEN)
    before, modules = base(hidden), dict(base.named_modules())
    first = with_adapter(base, {"up_proj": lora(HIDDEN, FFN)})
    second = with_adapter(base, {"up_proj": lora(HIDDEN, FFN), "down_proj": lora(FFN, HIDDEN)})
    shared = {id(parameter) for parameter in base.parameters()}
    for expert, adapters in [(first, 1), (second, 2)]:
        ids = {id(parameter) for parameter in expert.parameters()}
        assert shared <= ids
        assert len(ids - shared) == 2 * adapters
    assert dict(base.named_modules()) == modules
    assert torch.equal(base(hidden), before)
    assert not torch.allclose(first(hidden), second(hidden))


def test_a_hook_on_the_expert_does_not_fire_on_the_base() -> None:
    base, fired = SwiGLU(), []
    expert = with_adapter(base, {})
    expert.register_forward_hook(lambda *_: fired.append(True))
    base(torch.randn(1, HIDDEN))
    assert not fired
    expert(torch.randn(1, HIDDEN))
    assert fired


def test_wraps_linears_that_lie_deeper() -> None:
    inner = SwiGLU()
    base, hidden = nn.Sequential(nn.Sequential(inner)), torch.randn(4, HIDDEN)
    loras = {"gate_proj": lora(HIDDEN, FFN), "up_proj": lora(HIDDEN, FFN)}
    deep = with_adapter(base, {f"0.0.{name}": value for name, value in loras.items()})
    assert torch.equal(deep(hidden), with_adapter(inner, loras)(hidden))
    assert type(inner.up_proj) is nn.Linear


def test_float32_adapter_on_a_bfloat16_base_answers_in_bfloat16() -> None:
    base, (a_RI, b_OR, scale) = nn.Linear(8, 8, bias=False).bfloat16(), lora(8, 8)
    hidden = torch.randn(3, 8).bfloat16()
    out = LoraLinear(base, a_RI, b_OR, scale)(hidden)
    assert torch.equal(out, (base(hidden).float() + scale * (hidden.float() @ a_RI.T @ b_OR.T)).bfloat16())


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_sixteen_bit_adapter_answers_one_token_as_it_answers_many(tokens: int) -> None:
    torch.manual_seed(0)
    base = nn.Linear(32, 48, bias=False).bfloat16()
    lora = LoraLinear(base, torch.randn(4, 32).bfloat16(), torch.randn(48, 4).bfloat16(), 0.5)
    hidden = torch.randn(tokens, 32).bfloat16()
    found = lora(hidden)
    exact = hidden.double() @ (base.weight.double() + 0.5 * lora.b.double() @ lora.a.double()).T
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2e-2, atol=2e-2 * float(exact.detach().abs().max()))


def test_refuses_a_name_that_is_no_linear_layer() -> None:
    with pytest.raises(ArtifactError, match=r"SwiGLU \(gate_proj, up_proj, down_proj\), found one on 'q_proj'"):
        with_adapter(SwiGLU(), {"q_proj": lora(HIDDEN, HIDDEN)})


@pytest.mark.parametrize(("a", "b"), [((2, 9), (12, 2)), ((2, 8), (12, 3)), ((2, 8), (8, 2)), ((8,), (12, 2))])
def test_refuses_shapes_that_do_not_fit(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ArtifactError, match=r"8 -> 12 layer must have A"):
        with_adapter(SwiGLU(), {"up_proj": (torch.randn(a), torch.randn(b), 1.0)})
