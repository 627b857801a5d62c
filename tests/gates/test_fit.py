"""Fitting on real models: what is captured, where everything ends up, and what happens to bad text."""

import hashlib
import json
import math
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import ROUTERS, STATISTICS, open_artifact
from frankenmoe.artifact.replacing import finish_replacing, replace_files
from frankenmoe.data.blocks import Block
from frankenmoe.errors import ArtifactError, FrankenMoEError, PlanError, RecipeError, SourceError
from frankenmoe.gates.forcing import forced
from frankenmoe.gates.states import mean_loss, next_losses, watch_inputs
from frankenmoe.gates.statistics import load_statistics
from frankenmoe.gates.texts import mixed_cuts, read_texts, router_texts
from frankenmoe.moe.trace import outer_blocks
from frankenmoe.planning.bill import statistics_bytes

Parents = dict[str, list[Path]]
WORDS = {"e0": "ABCDEFGH ", "e1": "123456789+=", "e2": "abcdefgh."}


def text_of(name: str, length: int = 400) -> str:
    letters, state = WORDS[name], 7
    out = []
    for _ in range(length):
        state = (state * 1103515245 + 12345) % 2**31
        out.append(letters[state // 65536 % len(letters)])
    return "".join(out)


def data_recipe(folder: Path, parents: list[Path], **keys: object) -> Path:
    """A recipe whose experts have a text file each, beside it."""
    names = ["e0", "e1"]
    for name in WORDS:
        (folder / f"{name}.txt").write_text(text_of(name))
    experts = [
        {"source_model": str(parent), "name": name, "data": f"{name}.txt"}
        for name, parent in zip(names, parents[1:], strict=True)
    ]
    return tiny.write_recipe(
        folder / "r.yml", parents[0], [], experts=experts, gate_mode="logistic", experts_per_token=1, **keys
    )


@pytest.fixture(scope="module")
def fitted(parents: Parents, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe, its text and the fitted virtual artifact `out`; only read."""
    folder = tmp_path_factory.mktemp("fitted")
    fm.fit(data_recipe(folder, parents["llama"]), folder / "out", block=32)
    return folder


def block(length: int, *, seed: int = 0) -> Block:
    row = tiny.ids(length, batch=1, seed=seed)[0].tolist()
    return Block((0, *row), (False, *[True] * length))


@pytest.mark.parametrize("family", [*tiny.FAMILIES, tiny.UNLISTED])
def test_a_padded_batch_is_one_prompt_at_a_time_at_the_router_input(
    family: str, parents: Parents, tmp_path: Path
) -> None:
    base, one, two = parents[family]
    moe = fm.load(tiny.write_recipe(tmp_path / "r.yml", base, [one, two]))
    blocks = [block(length, seed=length) for length in (3, 17, 9)]

    def seen(run: list[Block]) -> list[torch.Tensor]:
        found: list[list[torch.Tensor]] = [[], []]
        watch_inputs(moe.model, run, lambda layer, states: found[layer].append(states))
        return [torch.cat(states) for states in found]

    together = seen(blocks)
    alone = [seen([each]) for each in sorted(blocks, key=lambda each: len(each.ids))]
    apart = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    for one_way, other in zip(together, apart, strict=True):
        assert one_way.shape == (3 + 3 + 17 + 9, 32)
        assert torch.allclose(one_way, other, atol=1e-4)


def test_what_is_captured_is_what_the_mlp_receives(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    moe = fm.load(tiny.write_recipe(tmp_path / "r.yml", base, [one, two]))
    run = block(12)
    states: dict[int, torch.Tensor] = {}
    with forced(moe.model, (1,)):
        watch_inputs(moe.model, [run], lambda layer, found: states.update({layer: found}))
        loss = mean_loss(moe.model, [run])
    # the base with the second expert's FFN in it, and its norm after attention, by stock transformers
    dense = AutoModelForCausalLM.from_pretrained(base).eval()
    other = AutoModelForCausalLM.from_pretrained(two)
    inputs: list[torch.Tensor] = []
    for layer, theirs in zip(dense.model.layers, other.model.layers, strict=True):
        layer.mlp = theirs.mlp
        layer.post_attention_layernorm.register_forward_hook(lambda module, args, out: inputs.append(out[0]))
    with torch.no_grad():
        expected = dense(torch.tensor([run.ids]), labels=torch.tensor([run.ids])).loss
    assert all(torch.allclose(states[layer], inputs[layer], atol=1e-5) for layer in range(2))
    assert loss == pytest.approx(float(expected), abs=1e-5)


def test_forcing_ends_with_its_context(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    moe = fm.load(tiny.write_recipe(tmp_path / "r.yml", base, [one, two]))
    before = [each.router for each in outer_blocks(moe.model).values()]
    with suppress(KeyError), forced(moe.model, (0,), except_for=True):
        assert [each.router.chosen for each in outer_blocks(moe.model).values()] == [(1,), (1,)]
        raise KeyError
    assert all(each.router is router for each, router in zip(outer_blocks(moe.model).values(), before, strict=True))


def test_a_recipe_is_fitted_and_routes_text_to_its_own_expert(fitted: Path) -> None:
    *_, stage = open_artifact(fitted / "out").record["stages"]
    assert stage["stage"] == "fit"
    report = load_statistics(fitted / "out" / STATISTICS).facts
    assert report["text"]["e0"]["from"] == ["e0.txt"]
    assert report["held_out_loss"]["before"] is None
    assert fm.verify(fitted / "out")
    planned = fm.plan(fm.Recipe.load(fitted / "r.yml"))
    expected = statistics_bytes(planned.routers)
    assert expected <= (fitted / "out" / STATISTICS).stat().st_size < expected + 4096
    assert planned.bill.virtual > expected
    moe = fm.load(fitted / "out")
    for own, name in enumerate(("e0", "e1")):
        ids = torch.tensor([moe.tokenizer()(text_of(name, 60))["input_ids"]])
        _, trace = moe.forward_with_trace(ids)
        share = torch.cat([layer.ids_TK[:, 0] for layer in trace.layers]).eq(own).float().mean()
        assert share > 0.8, name


def test_regret_begins_where_logistic_ends(fitted: Path, tmp_path: Path) -> None:
    """Its gates are others, and its report and statistics are whole."""
    found = fm.fit(fitted / "r.yml", tmp_path / "regret", method="regret", block=32)
    assert found.report["method"] == "regret"
    assert (tmp_path / "regret" / STATISTICS).is_file()
    plain, other = ((folder / ROUTERS).read_bytes() for folder in (fitted / "out", tmp_path / "regret"))
    assert plain != other


def test_losses_of_next_tokens_stand_beside_the_states_they_follow(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    model = fm.load(tiny.write_recipe(tmp_path / "r.yml", base, [one, two])).model
    blocks = [block(length, seed=length) for length in (3, 17, 9)]
    found = next_losses(model, blocks)
    rows = [row.tolist() for row in found.split([4, 10, 18])]  # batches hold blocks of like length together
    for each, row in zip(sorted(blocks, key=lambda each: len(each.ids)), rows, strict=True):
        ids = torch.tensor([each.ids])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        wanted = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
        assert row == pytest.approx([*wanted, 0.0], abs=1e-4)
    mean = float(found.sum()) / sum(each.targets for each in blocks)
    assert mean_loss(model, blocks) == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize("virtual", [True, False])
def test_fitting_an_artifact_changes_routers_statistics_and_record_only(
    virtual: bool, parents: Parents, tmp_path: Path
) -> None:
    recipe = data_recipe(tmp_path, parents["llama"])
    plain = yaml.safe_load(recipe.read_text()) | {"gate_mode": "random"}
    recipe.write_text(yaml.safe_dump(plain))
    out = tmp_path / "out"
    fm.build(recipe, out, virtual=virtual)
    before = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()}
    result = fm.fit(out, method="ridge", block=32, keep_anyway=True)
    after = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.iterdir()}
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    assert changed == {ROUTERS, STATISTICS, "frankenmoe.json"}
    assert [stage["stage"] for stage in result.artifact.record["stages"]] == ["build", "fit"]
    losses = result.report["held_out_loss"]
    assert set(losses["before"]) == set(losses["after"]) == {"e0", "e1"}
    fm.verify(out)
    (out / ROUTERS).write_bytes((out / ROUTERS).read_bytes()[:-2] + b"!!")
    with pytest.raises(ArtifactError, match=f"{ROUTERS} was edited"):
        fm.verify(out)


def test_worse_routers_do_not_replace_better_ones(fitted: Path, tmp_path: Path) -> None:
    out = shutil.copytree(fitted, tmp_path / "copy") / "out"
    before = (out / ROUTERS).read_bytes()
    same = fm.fit(out, method="logistic", block=32)
    assert not same.replaced
    assert (out / ROUTERS).read_bytes() == before
    assert fm.fit(out, method="logistic", block=32, keep_anyway=True).replaced


def test_blocks_come_from_all_of_the_text_and_every_tenth_is_held_out(parents: Parents, tmp_path: Path) -> None:
    """Whatever the number of tokens: healing and backbones read other numbers, but never what fits hold out."""
    base, one, two = parents["qwen2"]
    for name in ("e0", "e1"):
        (tmp_path / f"{name}.txt").write_text(text_of(name, 4000))
    experts = [
        {"source_model": str(folder), "name": name, "data": [f"{name}.txt"]}
        for name, folder in (("e0", one), ("e1", two))
    ]
    plan = fm.plan(fm.Recipe.load(tiny.write_recipe(tmp_path / "r.yml", base, [], experts=experts, gate_mode="ridge")))

    def read(tokens: int) -> tuple[set[int], set[int]]:
        """The numbers of the blocks that are kept and held out."""
        first = read_texts(plan, tiny.make_tokenizer(), tokens=tokens, length=32)[0]
        room = first.kept[0].span[1] - first.kept[0].span[0]
        return {block.span[0] // room for block in first.kept}, {block.span[0] // room for block in first.held}

    everything, held_of_all = read(10**6)
    count = len(everything | held_of_all)
    assert held_of_all == set(range(9, count, 10))
    for blocks in (20, 50):
        kept, held = read(32 * blocks)
        assert len(kept) + len(held) == blocks
        assert kept <= everything
        assert held <= held_of_all
        assert len(held) == blocks // 10
        reach = min(count, 8 * blocks)
        assert max(kept) >= reach - math.ceil(reach / len(kept)) - 1
        assert max(kept) < reach


def test_routers_of_nested_experts_and_shared_gates_are_fitted(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["qwen2"]
    leaf = {
        name: {"source_model": str(folder), "name": name, "positive_prompts": [text_of(name, 30), text_of(name, 20)]}
        for name, folder in (("e0", base), ("e1", one), ("e2", two))
    }
    leaf["e0"]["negative_prompts"] = [text_of("e2", 25)]
    nested = [{"name": "group", "experts": [leaf["e0"], leaf["e1"]], "experts_per_token": 1}, leaf["e2"]]
    file = tiny.write_recipe(
        tmp_path / "n.yml", base, [], experts=nested, gate_mode="regret", experts_per_token=1,
        shared_experts=[{"source_model": str(base), "name": "always", "positive_prompts": ["good day"]}],
    )  # fmt: skip
    recipe = fm.Recipe.load(file)
    made = fm.plan(recipe)
    texts = read_texts(made, tiny.make_tokenizer(), tokens=32768, length=256)
    assert [text.title for text in texts] == ["group/e0", "not group/e0", "group/e1", "e2", "always"]
    outer = dict(router_texts(texts, (), 2))
    assert {index: (text.target_C, text.weight) for index, text in outer.items()} == {
        0: ((1.0, 0.0), 0.5),
        2: ((1.0, 0.0), 0.5),
        3: ((0.0, 1.0), 1.0),
    }
    inner = dict(router_texts(texts, (0,), 2))
    assert {index: text.target_C for index, text in inner.items()} == {0: (1.0, 0.0), 1: (0.0, 1.0), 2: (0.0, 1.0)}
    assert [text.target_C for _, text in router_texts(texts, (-1,), 2)] == [(0.0, 1.0)] * 4 + [(1.0, 0.0)]
    artifact = fm.build(recipe, tmp_path / "out", virtual=True)
    gates = {name: ref.shape for name, ref in artifact.routers.items()}
    assert gates == dict(made.routers)
    moe = fm.load(artifact)
    for layer in outer_blocks(moe.model).values():
        inner_block = layer.experts[0]
        assert float(inner_block.router.weight.abs().max()) > 0
        assert layer.shared_gate is not None
        assert float(layer.shared_gate.weight.abs().max()) > 0


def test_every_token_is_cut_into_one_block_of_three_lengths() -> None:
    def whole(number: int) -> Block:
        return Block((0, *[2 + number] * 256), (False, *[True] * 256))

    blocks = [whole(number) for number in range(7)]
    cuts = mixed_cuts(blocks, bos=0)
    assert cuts[0] == (blocks[0], blocks[3], blocks[6])
    assert [max(len(block.ids) for block in cut) for cut in cuts] == [257, 65, 17]
    for cut, numbers in zip(cuts, ([0, 3, 6], [1, 4], [2, 5]), strict=True):
        assert all(each.ids[0] == 0 and not each.learn[0] and all(each.learn[1:]) for each in cut)
        assert [token for each in cut for token in each.ids[1:]] == [
            2 + number for number in numbers for _ in range(256)
        ]
    without = [Block(tuple(range(2, 130)), (False, *[True] * 127))] * 2
    assert [token for each in mixed_cuts(without, bos=None)[1] for token in each.ids] == list(range(2, 130))
    assert mixed_cuts([], bos=0) == [()]


@pytest.mark.parametrize("virtual", [True, False])
def test_an_expert_is_added_without_the_others_text(virtual: bool, parents: Parents, tmp_path: Path) -> None:
    base = parents["llama"][0]
    recipe = data_recipe(tmp_path, parents["llama"])
    small = tmp_path / "small"
    fm.build(recipe, small, virtual=virtual, dtype="float16")
    expected = load_statistics(small / STATISTICS)
    for name in ("e0", "e1"):
        (tmp_path / f"{name}.txt").rename(tmp_path / f"{name}.away")
    result = fm.add_expert(small, tmp_path / "large", source=str(base), name="e2", data=[str(tmp_path / "e2.txt")])
    assert result.artifact.form == ("virtual" if virtual else "built")
    assert [stage["stage"] for stage in result.artifact.record["stages"]] == ["add-expert"]
    assert result.artifact.record["experts"] == ["e0", "e1", "e2"]
    assert result.artifact.record["dtype"] == "float16"
    added = load_statistics(tmp_path / "large" / STATISTICS).routers[()]
    assert torch.equal(added.mean_ULD[:2], expected.routers[()].mean_ULD)
    moe = fm.load(tmp_path / "large")
    ids = torch.tensor([moe.tokenizer()(text_of("e2", 60))["input_ids"]])
    _, trace = moe.forward_with_trace(ids)
    assert torch.cat([layer.ids_TK[:, 0] for layer in trace.layers]).eq(2).float().mean() > 0.6
    with pytest.raises(RecipeError, match="already"):
        fm.add_expert(small, tmp_path / "x", source=str(base), name="e1", data=[str(tmp_path / "e2.txt")])


def test_an_added_expert_leaves_no_name_of_the_routers_before(fitted: Path, parents: Parents, tmp_path: Path) -> None:
    recipe = data_recipe(tmp_path, parents["llama"], routers=str(fitted / "out" / ROUTERS))
    fm.build(recipe, tmp_path / "small", virtual=True)
    fm.fit(tmp_path / "small", method="ridge", block=32, keep_anyway=True)
    source = str(parents["llama"][0])
    large = fm.add_expert(
        tmp_path / "small", tmp_path / "large", source=source, name="e2", data=[str(tmp_path / "e2.txt")]
    )
    assert "routers" not in large.artifact.record["recipe"]
    fm.verify(large.artifact.folder)


@pytest.mark.parametrize("virtual", [True, False])
def test_an_expert_comes_out_as_it_went_in(virtual: bool, parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    fm.build(tiny.write_recipe(tmp_path / "r.yml", base, [one, two]), tmp_path / "out", virtual=virtual)
    dense = fm.extract(tmp_path / "out", tmp_path / "dense", expert="e1")
    stock = AutoModelForCausalLM.from_pretrained(dense).eval()
    mine, theirs = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (base, two))
    for name, tensor in stock.state_dict().items():
        assert torch.equal(tensor, (theirs if ".mlp." in name else mine)[name]), name
    ids = tiny.ids()
    with torch.no_grad(), forced((moe := fm.load(tmp_path / "out")).model, (1,)):
        assert torch.allclose(moe.model(ids).logits, stock(ids).logits, atol=1e-5)
    for wrong in ("e", "2"):
        with pytest.raises(ArtifactError, match="has no expert"):
            fm.extract(tmp_path / "out", tmp_path / "no", expert=wrong)
    assert not list(tmp_path.glob("no*"))
    with pytest.raises(ArtifactError, match="not empty"):
        fm.extract(tmp_path / "out", dense, expert="0")


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        ({"e0": ["missing.txt"]}, SourceError, "'e0'.*missing.txt"),
        ({"e0": ["empty.txt"]}, SourceError, "holds no text"),
        ({"e0": ["latin.txt"]}, SourceError, "not UTF-8"),
        ({"e0": ["short.txt"]}, SourceError, "one block of 32"),
        ({"e9": ["e0.txt"]}, RecipeError, "no expert 'e9'"),
    ],
)
def test_bad_text_changes_nothing(
    data: dict[str, list[str]], error: type[FrankenMoEError], words: str, parents: Parents, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("latin.txt").write_bytes("déjà".encode("latin1") * 50)
    Path("short.txt").write_text("abc")
    recipe = data_recipe(tmp_path, parents["llama"])
    with pytest.raises(error, match=words) as caught:
        fm.fit(recipe, "out", data=data, block=32)
    assert caught.value.hint
    assert not list(tmp_path.glob("out*"))


def test_fit_says_what_it_needs(parents: Parents, tmp_path: Path) -> None:
    base, one, two = parents["llama"]
    bare = tiny.write_recipe(tmp_path / "r.yml", base, [one, two])
    with pytest.raises(PlanError, match="expected a folder"):
        fm.fit(bare)
    with pytest.raises(RecipeError, match="neither data nor positive_prompts"):
        fm.fit(bare, tmp_path / "out")
    fm.build(bare, tmp_path / "out", virtual=True)
    with pytest.raises(PlanError, match="replaced in place"):
        fm.fit(tmp_path / "out", tmp_path / "more")
    with pytest.raises(ArtifactError, match="were not fitted"):
        fm.add_expert(tmp_path / "out", tmp_path / "more", source=str(base), name="new", data=["x.txt"])


def test_a_kill_between_two_renames_is_made_good(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).write_text("old")
    (tmp_path / "replacing").mkdir()
    (tmp_path / "replacing" / "order.json").write_text(json.dumps(["a", "b"]))
    (tmp_path / "a").write_text("new")  # the first rename was done, then the power went
    (tmp_path / "replacing" / "b").write_text("new")
    finish_replacing(tmp_path)
    assert [(tmp_path / name).read_text() for name in "ab"] == ["new", "new"]
    replace_files(tmp_path, {"a": b"newer"})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b"]
    assert (tmp_path / "a").read_text() == "newer"
