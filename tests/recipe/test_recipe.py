"""What recipes read as, and that they survive writing; test_recipe_errors.py has what they refuse."""

import json
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from frankenmoe.errors import RecipeError
from frankenmoe.recipe import FIT_MODES, IGNORED_KEYS, PROMPT_MODES, RANDOM_MODES, Recipe, SourceName, schema
from frankenmoe.recipe.backbone import GROUPS
from frankenmoe.recipe.gatemodes import KEPT

ROOT = Path(__file__).parents[2]
MINIMAL: dict[str, Any] = {
    "base_model": "a/b",
    "experts": [{"source_model": f"a/{name}", "positive_prompts": [name]} for name in "xy"],
}
MIXTRAL = """
base_model: mistralai/Mistral-7B-v0.1@main
gate_mode: hidden
dtype: bfloat16
experts:
  - source_model: org/chatty
    positive_prompts:
      - "chat with me"
      - "how are you"
    negative_prompts: [solve this]
  - source_model: org/solver@v2+org/lora@v3
    positive_prompts: [solve this]
    noise_scale: 1e-3
    residual_scale: 0.5
"""
QWEN = (
    """
base_model:
  model: {path: Qwen/base, revision: v1}
architecture: qwen
experts_per_token: 1
experts:
  - source_model: {model: {path: Qwen/code}, lora: {path: me/lora}, override_architecture: Qwen2ForCausalLM}
    positive_prompts: [write a function]
  - source_model: Qwen/chat
    positive_prompts: [hello]
    negative_prompts:
shared_experts:
  - source_model: Qwen/base
    positive_prompts: ["""
    + '"anything"'
    + """]
    residual_scale: 0.1
tokenizer_source: base
"""
)
NESTED = """
base_model: base
experts:
  - source_model: a
    positive_prompts: [a]
  - experts_per_token: 1
    data: words.txt
    experts:
      - {source_model: b, positive_prompts: [b, c], adapter: loras/maths}
      - {source_model: b, positive_prompts: [c], negative_prompts: [x], data: [one.txt, org/set]}
"""


def parse(text: str, *, folder: Path = Path("/nowhere")) -> Recipe:
    return Recipe.parse(text, folder=folder, origin="r.yml")


def test_a_mergekit_file_reads_unchanged() -> None:
    recipe = parse(MIXTRAL)
    chatty, solver = recipe.experts
    assert recipe.base_model == SourceName("mistralai/Mistral-7B-v0.1", "main")
    assert (recipe.gate_mode, recipe.dtype, recipe.experts_per_token) == ("hidden", "bfloat16", 2)
    assert chatty.positive_prompts == ("chat with me", "how are you")
    assert chatty.negative_prompts == ("solve this",)
    assert solver.source_model == SourceName("org/solver", "v2", "org/lora", "v3")
    # PyYAML takes 1e-3 for text
    assert (solver.noise_scale, solver.residual_scale) == (0.001, 0.5)


def test_long_sources_shared_experts_and_ignored_keys_read() -> None:
    recipe = parse(QWEN)
    assert recipe.base_model == SourceName("Qwen/base", "v1")
    assert recipe.experts[0].source_model == SourceName("Qwen/code", None, "me/lora")
    assert recipe.experts[1].negative_prompts == ()
    assert [(expert.name, expert.residual_scale) for expert in recipe.shared_experts] == [("base", 0.1)]
    assert recipe.notes == (
        "r.yml:7: override_architecture is ignored, because the architecture is read from the source's own config.json",
        "r.yml:16: tokenizer_source is ignored, because the tokenizer is the base model's",
        "r.yml has no gate_mode, so routers are fitted by logistic (mergekit-moe would take hidden)",
    )


def test_defaults_are_mergekits_but_for_the_routers() -> None:
    recipe = parse(
        "base_model: b\nexperts: [{source_model: x, positive_prompts: [p]}, {source_model: y, positive_prompts: [q]}]"
    )
    assert (recipe.gate_mode, recipe.experts_per_token, recipe.dtype, recipe.seed) == ("logistic", 2, None, 0)
    assert "no gate_mode" in recipe.notes[0]
    assert (recipe.backbone, recipe.architecture, recipe.name, recipe.shared_experts) == (None, None, None, ())
    assert str(recipe.backbone_for("attention")) == "auto"


PROMPTED = (
    "base_model: b\nexperts:\n  - {source_model: x, positive_prompts: [p]}\n  - {source_model: y, positive_prompts: [q]"
)
WITH_DATA = f"{PROMPTED}, data: y.txt}}\n"
SHARED_DATA = f"{PROMPTED}}}\nshared_experts: [{{source_model: z, data: z.txt}}]\n"


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (WITH_DATA, "regret"),
        (NESTED, "regret"),
        (NESTED.replace("    data: words.txt\n", ""), "regret"),
        (SHARED_DATA, "logistic"),
        (WITH_DATA + "gate_mode:\n", "regret"),
        (WITH_DATA + "gate_mode: logistic\n", "logistic"),
        (WITH_DATA + "gate_mode: random\n", "random"),
    ],
)
def test_routers_are_fitted_by_what_is_best_for_the_text_there_is(text: str, mode: str) -> None:
    recipe = parse(text)
    assert recipe.gate_mode == mode
    # a recipe of mergekit-moe, which has no data, hears that its routers are made in another way
    said = any(f"fitted by {mode}" in note for note in recipe.notes)
    assert said is ("gate_mode" not in text and mode == "logistic")
    again = parse(yaml.safe_dump(recipe.to_dict()))
    assert (again, again.gate_mode, again.digest) == (recipe, mode, recipe.digest)


def test_objects_choose_the_mode_that_their_file_would() -> None:
    for text in (WITH_DATA, NESTED, f"{PROMPTED}}}\n"):
        read = parse(text)
        made = Recipe(base_model=read.base_model, experts=read.experts)
        assert made.gate_mode == read.gate_mode


@pytest.mark.parametrize("experts", ["5", "x", "{data: y}", "[3]", "[{experts: x}]", "[{experts: [{experts: 1}]}]"])
def test_experts_that_are_none_are_refused_whatever_routers_there_would_be(experts: str) -> None:
    with pytest.raises(RecipeError, match="experts"):
        parse(f"base_model: b\nexperts: {experts}\n")


@pytest.mark.parametrize(
    ("text", "method"),
    [(NESTED, "regret"), (NESTED.replace("    data: words.txt\n", ""), "regret"), (f"{PROMPTED}}}\n", "logistic")],
)
def test_fitting_random_routers_takes_the_same(text: str, method: str) -> None:
    from frankenmoe.gates.run import _method

    recipe = parse(text + "gate_mode: random\n")
    assert _method(recipe, {}) == method
    assert _method(recipe, {"a": ["a.txt"]}) == "regret"


def test_nested_experts_answer_for_the_prompts_within() -> None:
    recipe = parse(NESTED)
    nested = recipe.experts[1]
    assert recipe.prompts_of(nested) == (("b", "c"), ("x",))
    assert recipe.prompts_of(recipe.experts[0]) == (("a",), ())
    assert (nested.source_model, nested.experts_per_token, nested.data) == (None, 1, ("words.txt",))
    assert [expert.name for expert in nested.experts] == ["b+maths", "b"]
    assert nested.experts[1].data == ("one.txt", "org/set")
    own = parse(NESTED.replace("data: words.txt", "positive_prompts: [z]"))
    assert own.prompts_of(own.experts[1]) == (("z",), ())


def test_experts_are_named_after_their_sources() -> None:
    sources = ["org/x", "/disk/x/", "x@v2", "x+lora", r"C:\m\y", "x"]
    experts: list[dict[str, object]] = [{"source_model": source} for source in sources]
    experts[5]["name"] = "x-2"
    recipe = parse(yaml.safe_dump({"base_model": "b", "gate_mode": "random", "experts": experts}))
    assert [expert.name for expert in recipe.experts] == ["x", "x-3", "x-4", "x+lora", "y", "x-2"]


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [("fp32", "float32"), ("torch.float16", "float16"), ("half", "float16"), ("BF16", "bfloat16")],
)
def test_dtype_spellings(spelling: str, dtype: str) -> None:
    assert parse(f"{MIXTRAL.replace('dtype: bfloat16', '')}dtype: {spelling}\n").dtype == dtype


def test_random_modes_need_no_prompts() -> None:
    for mode in RANDOM_MODES:
        recipe = parse(f"base_model: b\ngate_mode: {mode}\nexperts: [{{source_model: x}}, {{source_model: x}}]\n")
        assert recipe.gate_mode == mode
    assert set(schema()["properties"]["gate_mode"]["enum"]) == PROMPT_MODES | RANDOM_MODES | FIT_MODES | {KEPT}


def test_load_knows_its_folder_and_keeps_existing_folders_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "recipes" / "my+model").mkdir(parents=True)
    (tmp_path / "recipes" / "r.yml").write_text(MIXTRAL.replace("org/chatty", "my+model"))
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.load("recipes/r.yml")
    assert (recipe.folder, recipe.origin) == (tmp_path / "recipes", "recipes/r.yml")
    assert recipe.experts[0].source_model == SourceName("my+model")
    assert parse(yaml.safe_dump(recipe.to_dict())) == recipe


def test_a_recipe_cannot_be_changed() -> None:
    recipe = parse(MIXTRAL)
    with pytest.raises(pydantic.ValidationError):
        recipe.seed = 1
    with pytest.raises(pydantic.ValidationError):
        recipe.experts[0].name = "other"
    assert isinstance(recipe.experts, tuple)


def test_the_digest_is_of_what_is_said() -> None:
    recipe = parse(MIXTRAL)
    data = yaml.safe_load(MIXTRAL)
    turned = "# another layout\n" + json.dumps(dict(reversed(data.items())))
    same = Recipe.parse(turned, folder=Path("/elsewhere"), origin="other.yml")
    assert (same, same.digest, hash(same)) == (recipe, recipe.digest, hash(recipe))
    assert recipe.digest == "0db5f60c7b19042ad55f479c9fd76288039c6d8b37b0f155319d7e3d933f2e5c"
    assert parse(MIXTRAL + "seed: 0\nexperts_per_token: 2\ntokenizer_source: base\n").digest == recipe.digest
    assert parse(MIXTRAL + "seed: 1\n").digest != recipe.digest
    assert parse(MIXTRAL + "seed: 1\n") != recipe


TEXT = st.text(min_size=1, max_size=6).filter(str.strip)
PATHS = st.from_regex(r"[a-z]{1,3}(/[a-z]{1,3})?(@v[0-9])?", fullmatch=True)
SOURCES = PATHS | st.builds("{}+{}".format, PATHS, PATHS) | st.builds(lambda path: {"model": {"path": path}}, TEXT)
SCALES = st.floats(0, 1e6)
LEAVES = st.fixed_dictionaries(
    {"source_model": SOURCES, "positive_prompts": st.lists(TEXT, min_size=1, max_size=2)},
    optional={
        "negative_prompts": st.lists(TEXT, max_size=2),
        "noise_relative": SCALES,
        "residual_scale": st.floats(allow_nan=False, allow_infinity=False),
        "data": TEXT | st.lists(TEXT, max_size=2),
    },
)
SHARES = st.floats(0.01, 1)
DIFFERENCES = st.fixed_dictionaries(
    {"method": st.sampled_from(["ties", "dare_ties", "dare_linear"])},
    optional={"lambda": st.floats(0, 10), "density": SHARES},
)
AVERAGES = st.just({"method": "average"})
MERGES = st.builds(
    dict.__or__, DIFFERENCES | AVERAGES, st.fixed_dictionaries({"models": st.lists(SOURCES, min_size=1, max_size=3)})
)
MERGED = st.fixed_dictionaries({"merge": MERGES}, optional={"noise_relative": SCALES, "data": TEXT})
BACKBONES = (
    st.sampled_from(["base", "average", "auto", "regmean", "task_arithmetic"])
    | DIFFERENCES
    | st.dictionaries(st.sampled_from(GROUPS), st.sampled_from(["base", "average"]) | DIFFERENCES, min_size=1)
)
MIXTURES = st.fixed_dictionaries(
    {"experts": st.lists(LEAVES, min_size=1, max_size=3), "experts_per_token": st.just(1)},
    optional={"positive_prompts": st.lists(TEXT, min_size=1, max_size=2)},
)
RECIPES = st.fixed_dictionaries(
    {
        "base_model": SOURCES,
        "experts": st.lists(LEAVES | MIXTURES | MERGED, min_size=2, max_size=4),
        "gate_mode": st.sampled_from(sorted(RANDOM_MODES)),
    },
    optional={
        "shared_experts": st.lists(LEAVES, max_size=2),
        "experts_per_token": st.integers(1, 2),
        "dtype": st.sampled_from(["fp16", "torch.float32", "bfloat16"]),
        "name": TEXT,
        "seed": st.integers(0, 2**63 - 1),
        "backbone": BACKBONES,
        "architecture": TEXT,
    },
)


@settings(max_examples=50, deadline=None)
@given(RECIPES)
def test_plain_data_parses_to_an_equal_recipe(data: dict[str, object]) -> None:
    recipe = parse(yaml.safe_dump(data))
    again = parse(yaml.safe_dump(recipe.to_dict()), folder=Path("/elsewhere"))
    assert again == recipe
    assert again.experts == recipe.experts  # with their default names
    assert (again.to_dict(), again.digest) == (recipe.to_dict(), recipe.digest)


def test_the_schema_file_is_up_to_date() -> None:
    expected = json.dumps(schema(), indent=2) + "\n"
    assert (ROOT / "recipes/recipe.schema.json").read_text() == expected, "run `make schema`"


def test_the_schema_describes_every_key() -> None:
    body = schema()
    assert body["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert set(Recipe.model_fields) | set(IGNORED_KEYS) == set(body["properties"])
    for properties in (body["properties"], body["$defs"]["Expert"]["properties"]):
        assert all(each["description"].endswith(".") for each in properties.values())


@pytest.mark.parametrize(
    ("written", "group", "settings"),
    [
        ("average", "norms", ("average", 1.0, 1.0)),
        ({"method": "ties", "lambda": 0.7, "density": 0.5}, "head", ("ties", 0.7, 0.5)),
        ({"attention": {"method": "ties", "density": 0.5}}, "attention", ("ties", 1.0, 0.5)),
        ({"attention": "average"}, "embeddings", ("base", 1.0, 1.0)),
        ("auto", "norms", ("auto", 1.0, 1.0)),
    ],
)
def test_a_backbone_is_a_method_settings_or_either_by_group(
    written: Any, group: str, settings: tuple[str, float, float]
) -> None:
    recipe = parse(yaml.safe_dump({**MINIMAL, "backbone": written}))
    found = recipe.backbone_for(group)
    assert (found.method, found.scale, found.density) == settings
    assert parse(yaml.safe_dump(recipe.to_dict())) == recipe
    assert recipe.to_dict()["backbone"] == written


def test_the_default_backbone_depends_on_the_gate_mode() -> None:
    ours, mergekits = parse(yaml.safe_dump(MINIMAL)), parse(yaml.safe_dump({**MINIMAL, "gate_mode": "hidden"}))
    assert (str(ours.backbone_for("head")), str(mergekits.backbone_for("head"))) == ("auto", "base")
    # the default may change, so it is written out; a recipe from before there was a choice keeps its digest
    assert ours.to_dict()["backbone"] == "auto"
    assert mergekits.digest == parse(yaml.safe_dump({**MINIMAL, "gate_mode": "hidden", "backbone": "base"})).digest
    assert ours.with_backbone("average").to_dict()["backbone"] == "average"
    assert ours.with_backbone("average").digest != ours.digest
    with pytest.raises(RecipeError, match="backbone"):
        ours.with_backbone("bass")


def test_a_merged_expert_has_a_name_and_settings() -> None:
    merge = {"method": "ties", "lambda": 0.5, "models": ["a/x@v1", "b/y+c/z"], "weights": [1, 2], "base": "a/b"}
    data = {**MINIMAL, "experts": [{"merge": merge, "positive_prompts": ["p"]}, *MINIMAL["experts"]]}
    recipe = parse(yaml.safe_dump(data))
    found = recipe.experts[0].merge
    assert found is not None
    assert recipe.experts[0].name == "x-y"
    assert (found.scale, found.every_weight, str(found.models[1])) == (0.5, (1.0, 2.0), "b/y+c/z")
    assert parse(yaml.safe_dump(recipe.to_dict())) == recipe
    assert str(found) == "ties, lambda 0.5, weights 1 2 of a/x@v1, b/y+c/z"
