"""Traces and their statistics against small cases worked out by hand."""

import pytest
import torch
from torch import nn

from frankenmoe.errors import ArtifactError
from frankenmoe.moe.block import MoEBlock
from frankenmoe.moe.router import Router
from frankenmoe.moe.trace import LayerTrace, RoutingTrace, concat, load, record

# T tokens, E experts, K top-k


class Layer(nn.Module):
    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.mlp(hidden)


def block(*experts: nn.Module, top_k: int = 1, **options: object) -> MoEBlock:
    """The first len(experts) coordinates of a token are its logits."""
    return MoEBlock(Router(torch.eye(len(experts), 3), top_k=top_k, renormalize=False), experts, **options)


def nested_model() -> nn.Module:
    """Layer 0 is dense, layer 1 an MoE of three whose expert 2 is an MoE of two."""
    same = nn.Identity()
    moe = block(same, same, block(same, same))
    return nn.ModuleDict({"layers": nn.Sequential(Layer(same), Layer(moe))})


def run(model: nn.Module, *tokens: list[float]) -> None:
    model["layers"](torch.tensor(tokens)[None])


def trace_of(ids_TK: list[list[int]], logits_TE: list[list[float]]) -> LayerTrace:
    ids, logits = torch.tensor(ids_TK), torch.tensor(logits_TE)
    return LayerTrace(0, "", logits.shape[1], torch.ones(ids.shape), ids, logits)


def test_records_what_each_router_decided() -> None:
    model = nested_model()
    tokens = [[0.0, 0.0, 9.0], [8.0, 0.0, 0.0], [0.0, 1.0, 9.0]]
    with record(model) as traces:
        run(model, *tokens)
    outer, inner = traces
    assert (outer.layer, outer.path, outer.experts) == (1, "", 3)
    assert (inner.layer, inner.path, inner.experts) == (1, "2", 2)
    assert outer.ids_TK.tolist() == [[2], [0], [2]]
    assert outer.logits_TE.tolist() == tokens
    torch.testing.assert_close(outer.weights_TK, torch.tensor(tokens).softmax(dim=1).amax(dim=1, keepdim=True))
    # the rows of path "2" are the tokens that the outer router sent there, in order
    assert inner.logits_TE.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert inner.ids_TK[1].tolist() == [1]
    assert not any(tensor.requires_grad for tensor in (outer.weights_TK, outer.logits_TE))


def test_path_goes_as_deep_as_the_blocks() -> None:
    same = nn.Identity()
    moe = block(same, block(block(same), same, shared=block(same)))
    model = nn.ModuleDict({"layers": nn.Sequential(Layer(moe))})
    with record(model) as traces:
        run(model, [0.0, 9.0, 0.0])  # to expert 1 and, its first two logits being these too, to the inner expert 1
        run(model, [8.0, 9.0, 0.0])
    assert [trace.path for trace in traces] == ["", "1", "1.shared"] * 2
    with record(model) as traces:
        moe.experts[1].experts[0](torch.ones(1, 3))
    assert [(trace.layer, trace.path) for trace in traces] == [(0, "1.0")]


def test_the_layer_is_the_last_index_of_the_name() -> None:
    model = nn.Sequential(nn.Identity(), nn.Sequential(*[nn.Identity()] * 5, Layer(block(nn.Identity()))))
    with record(model) as traces:
        model(torch.ones(1, 3))
    assert [trace.layer for trace in traces] == [5]


def test_records_what_capacity_dropped() -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(Layer(block(nn.Identity(), nn.Identity(), capacity_factor=0.5)))})
    with record(model) as traces:
        run(model, [9.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [9.0, 0.0, 0.0])
    assert traces[0].ids_TK.tolist() == [[0], [-1], [1], [-1]]
    assert load(traces[0]).tolist() == [0.5, 0.5]


def test_hooks_go_even_after_an_error() -> None:
    model = nested_model()
    with pytest.raises(ZeroDivisionError), record(model) as traces:
        raise ZeroDivisionError
    run(model, [0.0, 0.0, 9.0])
    assert traces == []


def test_two_recorders_do_not_disturb_each_other() -> None:
    model = nested_model()
    with record(model) as outside:
        with record(model) as inside:
            run(model, [9.0, 0.0, 0.0])
        run(model, [9.0, 0.0, 0.0])
    assert (len(outside), len(inside)) == (2, 1)


def test_concat_joins_successive_forwards_by_router() -> None:
    model = nested_model()
    with record(model) as traces:
        run(model, [9.0, 0.0, 0.0], [0.0, 9.0, 0.0])
        run(model, [0.0, 0.0, 9.0])
        run(model, [0.0, 1.0, 9.0])
    whole = concat(traces)
    assert whole.layer(1).ids_TK.tolist() == [[0], [1], [2], [2]]
    assert whole.layer(1).weights_TK.shape == (4, 1)
    assert whole.layer(1, path="2").logits_TE.tolist() == [[0.0, 0.0], [0.0, 1.0]]
    assert [(trace.layer, trace.path) for trace in whole.layers] == [(1, ""), (1, "2")]


@pytest.mark.parametrize(("path", "where"), [("", "layer 0"), ("2", "layer 0, path '2'")])
def test_a_layer_that_was_not_traced_is_an_error(path: str, where: str) -> None:
    trace = RoutingTrace((LayerTrace(1, "", 1, *[torch.zeros(1, 1)] * 3),))
    with pytest.raises(ArtifactError, match=f"no router at {where}, found layers 1"):
        trace.layer(0, path=path)


def test_a_model_without_blocks_is_an_error() -> None:
    with (
        pytest.raises(ArtifactError, match="Sequential has no layer with an MoEBlock"),
        record(nn.Sequential(Layer(nn.Identity()))),
    ):
        pass


def test_a_block_in_two_places_is_an_error() -> None:
    twice = block(nn.Identity())
    with (
        pytest.raises(ArtifactError, match="one MoEBlock in two places"),
        record(nn.Sequential(Layer(twice), Layer(twice))),
    ):
        pass


def test_load_counts_kept_assignments_only() -> None:
    trace = trace_of([[0, 1], [0, -1], [0, 2], [-1, -1]], [[0.0] * 4] * 4)
    assert load(trace).tolist() == pytest.approx([0.6, 0.2, 0.2, 0.0])


def test_load_is_zero_where_nothing_was_kept() -> None:
    assert load(trace_of([[-1]], [[0.0, 0.0]])).tolist() == [0.0, 0.0]
