"""MoEBlock against the sparse blocks of transformers, weights copied from them."""

import pytest
import torch
from torch import nn
from transformers import FlexOlmoConfig, MixtralConfig, Qwen2MoeConfig, Qwen3MoeConfig
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoSparseMoeBlock
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from frankenmoe.families.spec import RouterRule
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.router import Router
from oracles.moe_reference import SwiGLU

# T tokens, D hidden, E experts, K top-k

HIDDEN, FFN, EXPERTS, TOP_K = 32, 48, 6, 3
SIZES = {"hidden_size": HIDDEN, "intermediate_size": FFN, "num_experts_per_tok": TOP_K, "num_local_experts": EXPERTS}
QWEN = {"moe_intermediate_size": FFN, "num_experts": EXPERTS}


def mixtral() -> nn.Module:
    return MixtralSparseMoeBlock(MixtralConfig(**SIZES, experts_implementation="eager"))


def qwen2(norm_topk_prob: bool) -> nn.Module:
    sizes = SIZES | QWEN | {"shared_expert_intermediate_size": FFN}
    return Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(**sizes, norm_topk_prob=norm_topk_prob, experts_implementation="eager")
    )


def qwen3(norm_topk_prob: bool) -> nn.Module:
    return Qwen3MoeSparseMoeBlock(
        Qwen3MoeConfig(**SIZES | QWEN, norm_topk_prob=norm_topk_prob, experts_implementation="eager")
    )


def flex_olmo(norm_topk_prob: bool) -> nn.Module:
    sizes = SIZES | {"num_experts": EXPERTS}
    return FlexOlmoSparseMoeBlock(
        FlexOlmoConfig(**sizes, norm_topk_prob=norm_topk_prob, experts_implementation="eager")
    )


# stock block, renormalize, round_weights
CASES = [
    pytest.param(mixtral(), True, False, id="mixtral"),
    *(pytest.param(qwen2(norm), norm, True, id=f"qwen2-norm={norm}") for norm in (True, False)),
    *(pytest.param(qwen3(norm), norm, True, id=f"qwen3-norm={norm}") for norm in (True, False)),
    *(pytest.param(flex_olmo(norm), norm, True, id=f"flex_olmo-norm={norm}") for norm in (True, False)),
]


def randomized(block: nn.Module, dtype: torch.dtype) -> nn.Module:
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.2)
    return block.to(dtype)


def expert(stock: nn.Module, index: int) -> nn.Module:
    mlp = SwiGLU(HIDDEN, FFN)
    gate, up = stock.experts.gate_up_proj[index].chunk(2)
    for linear, weight in [(mlp.gate_proj, gate), (mlp.up_proj, up), (mlp.down_proj, stock.experts.down_proj[index])]:
        linear.weight = nn.Parameter(weight)
    return mlp


def ours(stock: nn.Module, *, renormalize: bool, round_weights: bool) -> MoEBlock:
    gate = getattr(stock, "shared_expert_gate", None)
    return MoEBlock(
        Router(stock.gate.weight, top_k=TOP_K, renormalize=renormalize, rule=RouterRule(rounds_weights=round_weights)),
        [expert(stock, index) for index in range(EXPERTS)],
        shared=getattr(stock, "shared_expert", None),
        shared_gate=None if gate is None else gate.weight,
    )


@pytest.mark.parametrize(("stock", "renormalize", "round_weights"), CASES)
def test_same_output_in_float32(stock: nn.Module, renormalize: bool, round_weights: bool) -> None:
    stock = randomized(stock, torch.float32)
    hidden = torch.randn(2, 20, HIDDEN)
    block = ours(stock, renormalize=renormalize, round_weights=round_weights)
    torch.testing.assert_close(block(hidden), stock(hidden), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("stock", "renormalize", "round_weights"), CASES)
def test_same_routing_and_close_output_in_bfloat16(stock: nn.Module, renormalize: bool, round_weights: bool) -> None:
    stock = randomized(stock, torch.bfloat16)
    hidden = torch.randn(2, 20, HIDDEN).bfloat16()
    block = ours(stock, renormalize=renormalize, round_weights=round_weights)
    logits_TE, weights_TK, ids_TK = stock.gate(hidden.reshape(-1, HIDDEN))
    for mine, theirs in zip(block.router(hidden.reshape(-1, HIDDEN)), (weights_TK, ids_TK, logits_TE), strict=True):
        assert mine.dtype == theirs.dtype
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(block(hidden), stock(hidden), rtol=2**-7, atol=2**-7)
