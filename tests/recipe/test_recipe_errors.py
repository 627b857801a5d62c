"""Every recipe that is refused: its line, its sentence, its hint; what a good one reads as is in test_recipe.py."""

from pathlib import Path

import pytest

from frankenmoe.errors import RecipeError
from frankenmoe.recipe import Recipe

# lines 1 to 6; a case adds line 7 and on, or replaces a part
GOOD = """base_model: a/b
experts:
- source_model: a/x
  positive_prompts: [p]
- source_model: a/y
  positive_prompts: [q]
"""


def refused(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, folder=Path("/nowhere"), origin="r.yml")
    error = caught.value
    assert "\n" not in error.message
    assert "pydantic" not in str(error)
    assert error.hint
    return error


def check(text: str, *, message: str, hint: str) -> None:
    error = refused(text)
    assert error.message.startswith(f"r.yml:{message}")
    assert error.hint is not None
    assert hint in error.hint


def test_the_good_one_is_good() -> None:
    assert len(Recipe.parse(GOOD, folder=Path("/nowhere"), origin="r.yml").experts) == 2


@pytest.mark.parametrize(
    ("wrong", "right", "message", "hint"),
    [
        ("base_modle: a/b", "base_model: a/b", "1: base_modle is not a known key", "did you mean 'base_model'?"),
        ("  positve_prompts: [p]", "  positive_prompts: [p]", "4: experts[0].positve_prompts is", "'positive_prompts'"),
        ("{model: {path: y, revison: v}}", "a/y", "5: experts[1].source_model.model.revison is not", "'revision'"),
        ("{modle: y}", "a/y", "5: experts[1].source_model.modle is not", "'model'"),
    ],
)  # fmt: skip
def test_a_misspelt_key_is_refused_with_the_right_one(wrong: str, right: str, message: str, hint: str) -> None:
    check(GOOD.replace(right, wrong), message=message, hint=hint)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("gate_mode: hiden", "7: gate_mode must be one of hidden, hidden_avg, ", "did you mean 'hidden'?"),
        ("gate_mode: zzz", "7: gate_mode must be one of hidden, ", "choose one of hidden, hidden_avg, "),
        ("gate_mode: [hidden]", "7: gate_mode must be one of ", "hidden"),
        ("dtype: bfloat61", "7: dtype must be one of float32, float16, bfloat16, found", "did you mean 'bfloat16'?"),
        ("backbone: bass", "7: backbone must be one of base, average, task_arithmetic, ", "did you mean 'base'?"),
        ("backbone: {}", "7: backbone.method is missing", "add a line"),
        ("backbone: 3", "7: backbone must be a mapping of keys to values, found 3", "key: value"),
        ("backbone: {metod: ties, lambda: 1}", "7: backbone.metod is not a known key", "did you mean 'method'?"),
        ("backbone: {atention: base}", "7: backbone.atention is not a known key", "did you mean 'attention'?"),
        ("backbone: {method: ties, scale: 1}", "7: backbone.scale is not a known key", "choose one of method, lambda"),
        ("backbone: {lambda: 1}", "7: backbone.method is missing", "add a line"),
        ("backbone: {method: tis}", "7: backbone.method must be one of base, ", "did you mean 'ties'?"),
        ("backbone:\n  method: ties\n  density: 0", "9: backbone.density must be more than 0, found 0", "such a value"),
        ("backbone: {method: ties, density: 1.1}", "7: backbone.density must be at most 1, found 1.1", "such a value"),
        ("backbone: {method: ties, lambda: 11}", "7: backbone.lambda must be at most 10, found 11", "such a value"),
        ("backbone: {method: ties, lambda: .nan}", "7: backbone.lambda must be a finite number", "such a value"),
        ("backbone: {method: ties, lambda: yes}", "7: backbone.lambda must be a number, found true", "such a value"),
        ("backbone: {method: slerp, t: -0.1}", "7: backbone.t must be at least 0, found -0.1", "such a value"),
        ("backbone: {method: regmean, alpha: 2}", "7: backbone.alpha must be at most 1, found 2", "such a value"),
        ("backbone: {method: average, density: 0.5}", "7: backbone.density must be absent, as average has weights, "
         "found 0.5", "choose a method that has it: ties, dare_ties, dare_linear"),
        ("backbone: {method: base, lambda: 1}", "7: backbone.lambda must be absent, as base has no settings", "delete"),
        ("backbone: {method: ties, weights: {z: 2}}", "7: backbone.weights.z is not an expert of this recipe, expected "
         "one of x, y", "choose one of x, y"),
        ("backbone: {method: ties, weights: [1, 2]}", "7: backbone.weights must be a mapping of keys", "such a value"),
        ("backbone: {method: ties, weights: {x: .inf}}", "7: backbone.weights.x must be a finite number", "such a"),
        ("backbone: {method: average, weights: {x: -1}}", "7: backbone.weights must have a positive sum", "delete"),
        ("backbone:\n  attention: auto", "8: backbone.attention must be a method without measurements", "whole"),
        ("backbone:\n  norms: regmean", "8: backbone.norms must be another method, found regmean", "average"),
        ("backbone:\n  head: {method: ties, density: 3}", "8: backbone.head.density must be at most 1", "such a value"),
        ("backbone:\n  head: bass", "8: backbone.head must be one of base, average", "did you mean 'base'?"),
        ("- {source_model: a/z, positive_prompts: [r]}\nbackbone: slerp", "8: backbone must have exactly two parents "
         "for slerp, found 3 experts", "choose average"),
        ("- {merge: ties}", "7: experts[2].merge must be a mapping of keys to values", "key: value"),
        ("- {merge: {models: [a]}}", "7: experts[2].merge.method is missing", "add a line"),
        ("- {merge: {method: ties}}", "7: experts[2].merge.models is missing", "add a line"),
        ("- {merge: {method: ties, models: []}}", "7: experts[2].merge.models must be a list with at least", "- "),
        ("- {merge: {method: ties, models: [a], model: b}}", "7: experts[2].merge.model is not", "'models'"),
        ("- {merge: {method: regmean, models: [a]}}", "7: experts[2].merge.method must be one of average, ", "average"),
        ("- {merge: {method: slerp, models: [a, b, c]}}", "7: experts[2].merge.models must be exactly two", "average"),
        ("- {merge: {method: ties, models: [a, b], weights: [1]}}", "7: experts[2].merge.weights must be one number "
         "for each of the 2 models, found 1", "order"),
        ("- {merge: {method: average, models: [a, b], base: c}}", "7: experts[2].merge.base must be absent", "delete"),
        ("- {merge: {method: average, models: [a, b], t: 1}}", "7: experts[2].merge.t must be absent", "slerp"),
        ("- {merge: {method: average, models: [a]}, source_model: b}", "7: experts[2].source_model must be absent "
         "beside merge, found b", "models:"),
        ("- {merge: {method: average, models: [a]}, adapter: b}", "7: experts[2].adapter must be absent beside", "mod"),
        ("- {merge: {method: average, models: [a]}, experts: [{source_model: b}]}", "7: experts[2].merge must be "
         "absent beside nested experts", "within"),
        ("experts_per_token: 3", "7: experts_per_token must be at most 2, the number of", "experts_per_token: 2"),
        ("experts_per_token: 0", "7: experts_per_token must be at least 1, found 0", "such a value"),
        ("experts_per_token: true", "7: experts_per_token must be a number, found true", "such a value"),
        ("experts_per_token: 1.5", "7: experts_per_token must be a whole number, found 1.5", "such a value"),
        ("experts_per_token: two", "7: experts_per_token must be a whole number, found the text 'two'", "such a value"),
        ("seed: -1", "7: seed must be at least 0, found -1", "such a value"),
        ("seed: 9223372036854775808", "7: seed must be less than 9223372036854775808", "such a value"),
        ("seed: 1" + "0" * 30, "7: seed must be", "such a value"),
        ("experts_per_token: 3000000000", "7: experts_per_token must be at most 2147483647, found 3", "such a value"),
        ("card: {temperature: .nan}", "7: card.temperature must be a finite number, found nan", "such a value"),
        ("card: {temperature: 0.0001}", "7: card.temperature must be 0 or from 0.001 to 1000, found 0", "0 is greedy"),
        ("card: {seed: 1" + "0" * 30 + "}", "7: card.seed must be", "such a value"),
        ("train: {rate: 0}", "7: train.rate must be more than 0, found 0", "such a value"),
        ("name: 3", "7: name must be text, found 3", "quotes"),
        ("name: ' '", "7: name must not be empty", "write the text"),
        ("  noise_scale: .nan", "7: experts[1].noise_scale must be a finite number, found nan", "such a value"),
        ("  noise_relative: .inf", "7: experts[1].noise_relative must be a finite number, found inf", "such a value"),
        ("  residual_scale: -.inf", "7: experts[1].residual_scale must be a finite number", "such a value"),
        ("  noise_scale: -0.5", "7: experts[1].noise_scale must be at least 0, found -0.5", "such a value"),
        ("  noise_scale: no", "7: experts[1].noise_scale must be a number, found false", "such a value"),
        ("  noise_scale: 1\n  noise_relative: 1", "8: experts[1].noise_relative must stand alone", "keep noise_scale"),
        ("  negative_prompts: q", "7: experts[1].negative_prompts must be a list of strings, found the", '["q"]'),
        ("  negative_prompts: {a: b}", "7: experts[1].negative_prompts must be a list, found a mapping", "- "),
        ("  negative_prompts:\n  - a\n  - yes", "9: experts[1].negative_prompts[1] must be text, found true", "quotes"),
        ("  data: 3", "7: experts[1].data must be a list, found 3", "- "),
        ("  adapter: a+b", "7: experts[1].adapter must be one adapter, found the text 'a+b'", "org/name@revision"),
        ("  adapter: a@b@c", "7: experts[1].adapter must read path", "write `model:"),
        ("  experts_per_token: 1", "7: experts[1].experts_per_token must come with nested experts", "top level"),
        ("  name: z\n- {source_model: z, name: z}", "8: experts[2].name must be unique, found 'z' a second", "another"),
        ("  experts: [{source_model: z}]", "5: experts[1].source_model must be absent beside nested experts", "within"),
        ("- {name: z}", "7: experts[2] must have a source_model or experts of its own, found neither", "source_model"),
        ("- z", "7: experts[2] must be a mapping of keys to values, found the text 'z'", "key: value"),
        ("- {source_model: z}", "7: experts[2].positive_prompts must be given, as gate_mode logistic needs data or "
         "prompts for expert 'z', found none", "gate_mode: random"),
        ("base_model: a/c", "7: 'base_model' is given twice, first on line 1", "delete one"),
    ],
)  # fmt: skip
def test_a_wrong_line_is_refused(line: str, message: str, hint: str) -> None:
    check(f"{GOOD}{line}\n", message=message, hint=hint)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("experts: [{source_model: x}]\n", "1: base_model is missing", "add a line"),
        ("base_model: b\n", "1: experts is missing", "add a line"),
        ("base_model: b\nexperts: []\n", "2: experts must be a list with at least one entry, found an empty", "- "),
        ("base_model: b\nexperts: x\n", "2: experts must be a list, found the text 'x'", "- "),
        ("base_model: 3\nexperts: []\n", "1: base_model must be a hub id or a folder, found 3", "org/name@revision"),
        (GOOD.replace("[q]", "[p]"), "2: experts must have data or prompts that differ, found the same for all, which "
         "makes all gate rows equal", "data or prompts that only it should get"),
        (GOOD.replace("[p]", "[p, q]").replace("[q]", "[q, p]"), "2: experts must have data or prompts that differ",
         "that only it should get"),
        (GOOD.replace("[p]", "[p, q]").replace("[q]", "[q, p]") + "gate_mode: hidden\n",
         "2: experts must have prompts that differ", "that only it should get"),
        (GOOD.replace("a/y", "a@b@c"), "5: experts[1].source_model must read path", "write `model: {path: ...}`"),
        (GOOD.replace("a/y", "a/y+l") + "  adapter: m\n", "7: experts[1].adapter must be the only adapter, found '+l'",
         "keep one"),
        ("base_model: b\nexperts:\n- {source_model: x, positive_prompts: [p]}\n",
         "1: experts_per_token must be at most 1, the number of experts there, found 2", "experts_per_token: 1"),
    ],
)  # fmt: skip
def test_a_recipe_that_says_too_little_or_too_much_is_refused(text: str, message: str, hint: str) -> None:
    check(text, message=message, hint=hint)


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("- experts:\n  - {source_model: z, positive_prompts: [z]}",
         "7: experts[2].experts_per_token must be at most 1, the number of experts there, found 2", "_token: 1"),
        ("- experts:\n  - {source_model: z, positive_prompts: [z]}\n  - {source_model: z}",
         "9: experts[2].experts[1].positive_prompts must be given, as gate_mode logistic needs data or prompts for "
         "expert 'z-2'",
         "gate_mode: random"),
        ("- experts:\n  - {source_model: z, positive_prompts: [z]}\n  - {source_model: z, positive_prompts: [z]}",
         "7: experts[2].experts must have data or prompts that differ", "data or prompts that only it should get"),
        ("- residual_scale: 2\n  experts: [{source_model: z}]", "7: experts[2].residual_scale must be", "within"),
        ("shared_experts:\n- {source_model: s}\n- {source_model: t, positive_prompts: [t]}",
         "8: shared_experts[0].positive_prompts must be given for all shared experts or for none", "'s'"),
        ("shared_experts:\n- experts: [{source_model: t}]", "8: shared_experts[0].experts must be absent", "can nest"),
    ],
)  # fmt: skip
def test_nested_and_shared_experts_are_checked(line: str, message: str, hint: str) -> None:
    check(f"{GOOD}{line}\n", message=message, hint=hint)


def test_different_negative_prompts_tell_experts_apart() -> None:
    text = GOOD.replace("[q]", "[p]") + "  negative_prompts: [n]\n"
    assert len(Recipe.parse(text, folder=Path("/nowhere"), origin="r.yml").experts) == 2


def test_the_first_wrong_line_is_named() -> None:
    assert refused(f"{GOOD}seed: -1\nbackbone: bass\n").message.startswith("r.yml:7: seed ")


@pytest.mark.parametrize("experts", [1, 2, 16])
def test_the_same_slip_in_all_experts_is_told_as_what_it_is(experts: int) -> None:
    text = "base_model: a/b\nexperts:\n" + "- source_modle: a/x\n" * experts
    check(text, message="3: experts[0].source_modle is not a known key", hint="did you mean 'source_model'?")


def test_the_same_slip_in_all_nested_experts_is_told_as_what_it_is() -> None:
    text = f"{GOOD}- experts:\n  - source_model: z\n    positive_prompts: [z]\n    noise_scale: -1\n"
    check(text, message="10: experts[2].experts[0].noise_scale must be at least 0", hint="such a value")


@pytest.mark.parametrize("gate_mode", ["random", "uniform_random"])
def test_blank_prompts_are_fine_where_gates_are_random(gate_mode: str) -> None:
    # as in mergekit's own examples
    text = (
        GOOD.replace("[p]", "['']").replace("[q]", "[' ', '']") + f"  negative_prompts: ['']\ngate_mode: {gate_mode}\n"
    )
    recipe = Recipe.parse(text, folder=Path("/nowhere"), origin="r.yml")
    assert recipe.experts[1].positive_prompts == (" ", "")
    assert Recipe.parse(str(recipe.to_dict()), folder=Path("/nowhere"), origin="r.yml") == recipe


BLANK = GOOD.replace("[p]", "[p, '']").replace("[q]", "['\t']") + "  negative_prompts: [n, ' ']\n"


@pytest.mark.parametrize("gate_mode", ["hidden", "hidden_avg", "hidden_last", "cheap_embed"])
def test_blank_prompts_are_taken_as_mergekit_takes_them_and_said(gate_mode: str) -> None:
    recipe = Recipe.parse(f"{BLANK}gate_mode: {gate_mode}\n", folder=Path("/nowhere"), origin="r.yml")
    assert recipe.experts[1].positive_prompts == ("\t",)
    said = [note for note in recipe.notes if "a blank prompt stands for the begin token alone" in note]
    assert [note.split(":")[1] for note in said] == ["4", "6", "7"]


def test_blank_prompts_are_left_out_where_routers_are_fitted() -> None:
    text = BLANK.replace("'\t'", "q, '\t'")
    recipe = Recipe.parse(f"{text}gate_mode: ridge\n", folder=Path("/nowhere"), origin="r.yml")
    assert len([note for note in recipe.notes if note.endswith("a blank prompt is left out")]) == 3
    check(f"{BLANK}gate_mode: ridge\n", message="6: experts[1].positive_prompts must be given", hint="add data")


@pytest.mark.parametrize("gate_mode", ["hidden", "logistic"])
def test_blank_prompts_that_tell_nothing_apart_are_refused(gate_mode: str) -> None:
    text = GOOD.replace("[p]", "['']").replace("[q]", "['']")
    assert "experts" in refused(f"{text}gate_mode: {gate_mode}\n").message


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        (r'base_model: "..\models\x"', 'forward slashes: base_model: "../models/x"'),
        (r'base_model: "C:\users\x"', 'forward slashes: base_model: "C:/users/x"'),
        (r'base_model: "D:\xlarge"', "a backslash begins an escape"),
    ],
)
def test_a_backslash_that_yaml_takes_for_an_escape_is_named(line: str, hint: str) -> None:
    error = refused(f"{line}\n{GOOD.partition(chr(10))[2]}")
    assert error.message.startswith("r.yml:1:")
    assert error.hint is not None
    assert hint in error.hint


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\u2028"])
def test_the_line_with_a_backslash_is_found_whatever_ends_a_line(end: str) -> None:
    error = refused(f'seed: 1{end}base_model: "a\\m"{end}')
    assert error.message.startswith("r.yml:2:")
    assert str(error.hint).endswith('base_model: "a/m"')
