"""One pass over text: the sums are those of recorded traces, and memory is that of the sums."""

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import frankenmoe as fm
import tiny
from frankenmoe.audit.collect import CLOSE, batches, collect
from frankenmoe.moe import trace as traces
from frankenmoe.moe.load import MoE

Parents = dict[str, list[Path]]


@pytest.fixture(scope="module")
def moe(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> MoE:
    base, one, two = parents["llama"]
    folder = tmp_path_factory.mktemp("collect")
    return fm.load(tiny.write_recipe(folder / "r.yml", base, [base, one, two], experts_per_token=2))


def blocks(count: int, length: int, seed: int) -> list[list[int]]:
    return tiny.ids(length, batch=count, seed=seed).tolist()


def test_sums_are_those_of_the_whole_trace(moe: MoE) -> None:
    texts = {"a": blocks(5, 12, 1), "b": [*blocks(3, 12, 2), [5, 6, 7]]}
    sums, read = collect(moe, texts, limit=10**6)
    assert read == {"a": 60, "b": 39}
    with torch.no_grad(), traces.record(moe.model) as found:
        for text in texts.values():
            for ids in text:
                moe.model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False)
    whole = traces.concat(found)
    for each in sums:
        trace = whole.layer(each.layer)
        counts_E = each.counts_CE.sum(dim=0)
        assert each.tokens == len(trace.ids_TK) == 99
        assert torch.equal(counts_E, torch.bincount(trace.ids_TK.flatten(), minlength=3))
        assert torch.equal(each.first_CE[1], torch.bincount(trace.ids_TK[60:, 0], minlength=3))
        torch.testing.assert_close((counts_E / counts_E.sum()).float(), traces.load(trace))
        logits_TE = trace.logits_TE.float()
        prob_TE = logits_TE.softmax(dim=-1)
        torch.testing.assert_close((each.prob_E / each.tokens).float(), prob_TE.mean(dim=0), atol=1e-5, rtol=1e-4)
        assert each.entropy == pytest.approx(float(-(prob_TE * prob_TE.log()).sum()), rel=1e-4)
        best_TE = logits_TE.sort(descending=True).values
        assert each.margin == pytest.approx(float((best_TE[:, 1] - best_TE[:, 2]).sum()), rel=1e-4)
        assert each.close == int((best_TE[:, 1] - best_TE[:, 2] < CLOSE).sum())
        assert each.spread == pytest.approx(float(logits_TE.std(dim=-1, unbiased=False).sum()), rel=1e-4)
        weight_E = torch.zeros(3).index_add_(0, trace.ids_TK.flatten(), trace.weights_TK.flatten().float())
        torch.testing.assert_close(each.weight_E.float(), weight_E, atol=1e-4, rtol=1e-4)


def test_the_hidden_norm_is_of_what_the_router_reads(moe: MoE) -> None:
    ids = blocks(1, 10, 3)
    (first, _), _ = collect(moe, {"a": ids}, limit=10**6)
    with torch.no_grad():
        out = moe.model.get_decoder()(input_ids=torch.tensor(ids), output_hidden_states=True)
        layer = moe.model.get_decoder().layers[0]
        read: list[torch.Tensor] = []
        handle = layer.mlp.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
        moe.model.get_decoder()(input_ids=torch.tensor(ids))
        handle.remove()
    assert out.hidden_states is not None
    assert first.norm == pytest.approx(float(read[0].norm(dim=-1).sum()), rel=1e-5)


def test_what_capacity_would_drop_is_counted_batch_by_batch(moe: MoE) -> None:
    texts = {"a": blocks(4, 16, 5)}
    (sums, _), _ = collect(moe, texts, limit=10**6)
    counts = sums.counts_CE.sum(dim=0).tolist()
    limit = -(-64 * 2 // 3)  # one batch of 64 tokens, two choices, three experts
    assert sums.over[0] == sum(max(0, count - limit) for count in counts)
    assert sums.over[2] == sum(max(0, count - -(-2 * 64 * 2 // 3)) for count in counts)


def test_dropped_choices_still_count_as_choices(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [base, one, two], experts_per_token=2)
    texts = {"a": blocks(2, 16, 5)}
    (tight, _), _ = collect(fm.load(recipe, capacity_factor=0.5), texts, limit=10**6)
    (free, _), _ = collect(fm.load(recipe), texts, limit=10**6)
    assert tight.dropped > 0 == free.dropped
    assert torch.equal(tight.counts_CE, free.counts_CE)


def test_nested_routers_have_sums_of_their_own(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    nested = {"name": "inner", "experts": [{"source_model": str(each), "name": each.name} for each in (one, two)]}
    recipe = tiny.write_recipe(tmp_path / "r.yml", base, [one], experts_per_token=1)
    text = recipe.read_text().replace("experts:\n", f"experts:\n- {nested}\n")
    recipe.write_text(text)
    sums, _ = collect(fm.load(recipe), {"a": blocks(3, 12, 1)}, limit=10**6)
    by_place = {(each.layer, each.path): each for each in sums}
    assert set(by_place) == {(0, ""), (0, "0"), (1, ""), (1, "0")}
    for layer in (0, 1):
        assert by_place[layer, "0"].tokens == int(by_place[layer, ""].counts_CE[0, 0])


def test_batches_hold_one_length_and_stop_at_the_limit() -> None:
    found = list(batches([[1, 2], [3, 4], [5, 6, 7], [], [8, 9]], limit=8))
    assert found == [[[1, 2], [3, 4]], [[5, 6, 7]], [[8]]]
    assert list(batches([], limit=8)) == []


def test_memory_does_not_grow_with_the_text(moe: MoE) -> None:
    """Python's and torch's own objects: what is held after twenty times the text is what was held before."""

    def stream(count: int) -> Iterator[list[int]]:
        for seed in range(count):
            yield tiny.ids(32, batch=1, seed=seed)[0].tolist()

    def held(count: int) -> int:
        tracemalloc.start()
        sums, read = collect(moe, {"a": stream(count)}, limit=10**9)
        size, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        tensors = sum(value.nbytes for each in sums for value in vars(each).values() if isinstance(value, torch.Tensor))
        assert read["a"] == 32 * count
        return size + tensors

    held(4)
    assert held(80) < held(4) + 20_000
