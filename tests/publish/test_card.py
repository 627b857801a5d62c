"""Model cards: what the hub accepts, what evidence puts in, and that nothing else gets in."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard
from test_leaderboard import GOLDEN, PAGE, RAIDEN

from frankenmoe.artifact.folder import ROUTERS, Artifact
from frankenmoe.build.run import build
from frankenmoe.checkpoint.fingerprint import sha256
from frankenmoe.cli.app import app
from frankenmoe.errors import ArtifactError, FrankenMoEError
from frankenmoe.publish.card import is_ours, make_card, write_card
from frankenmoe.publish.leaderboard import TASKS
from frankenmoe.publish.markdown import without_controls
from frankenmoe.recipe.sections import CardSettings as Settings


def settings(**keys: Any) -> Settings:
    return Settings.model_validate(keys)


def put(artifact: Artifact, name: str, report: Any) -> Path:
    file = artifact.folder / "reports" / name
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(report))
    return file


def headings(text: str) -> list[str]:
    return re.findall(r"^## (.*)$", text, flags=re.M)


PUBLISHED = {"source": {"name": PAGE.name, "url": PAGE.url}, "scores": RAIDEN}
EXPORT = [
    {
        "path": "/somewhere/gguf/two-Q4_0.gguf",
        "type": "q4_0",
        "bytes": 18_800_000_000,
        "bits_per_weight": 4.52,
        "holds": {"Q4_0": 10},
        "notes": ["q4_k_m would be larger on this shape"],
        "check": {"kl": 0.0123, "top1": 0.951, "perplexity_ratio": 1.0101, "tokens_per_second": 12.3},
    },
    {"path": "two-Q5_0.gguf", "type": "q5_0", "bytes": 5, "bits_per_weight": 5.5, "notes": [], "check": None},
]


def audit(artifact: Artifact, **changes: Any) -> dict[str, Any]:
    """A report as the audit writes it, cut down to what a card quotes."""
    routers = [
        {"layer": layer, "path": "", "load": {"share": share, "dead": dead}, "domains": {"own_first": own}}
        for layer, share, dead, own in (
            (0, [0.75, 0.25], [], {"maths": 0.8, "verse": 0.3}),
            (1, [1.0, 0.0], [1], {"maths": 1.0, "verse": 0.0}),
        )
    ]
    return {
        "kind": "frankenmoe audit",
        "recipe_digest": artifact.record["recipe_digest"],
        "record": dict(artifact.record),
        "model": {"experts": ["maths", "verse"]},
        "text": {"maths": {"tokens": 700}, "verse": {"tokens": 300}},
        "answers": [
            {"level": "good", "sentence": "This is praise."},
            {"level": "bad", "sentence": "Expert verse gets no token in layer 1."},
        ],
        "routers": [*routers, {"layer": 0, "path": "1", "load": {"share": [1.0], "dead": []}}],
    } | changes


def test_the_head_is_what_the_hubs_client_reads_back(artifact: Artifact) -> None:
    card = make_card(artifact, settings=settings(base_model=["org/base", "org/maths"], tags=["verse", "moe"]))
    data = ModelCard(card.text, ignore_metadata_errors=False).data
    assert data.language == ["en"]
    assert data.license == "apache-2.0"
    assert data.base_model == ["org/base", "org/maths"]
    assert data.tags == ["merge", "moe", "frankenmoe", "verse"]
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert data.datasets == ["togethercomputer/RedPajama-Data-1T"]
    assert data.eval_results is None
    assert yaml.safe_load(card.text.split("---")[1]) == data.to_dict() == card.metadata


def test_raidens_numbers_give_raidens_head_and_table(made: Path, tmp_path: Path) -> None:
    recipe = yaml.safe_load((made / "recipe.yml").read_text()) | {"name": "Raiden-16x3.43B"}
    (made / "raiden.yml").write_text(yaml.safe_dump(recipe))
    artifact = build(made / "raiden.yml", tmp_path / "raiden", virtual=True)
    put(artifact, "leaderboard.json", PUBLISHED)
    card = make_card(artifact)
    head = yaml.safe_load(card.text.split("---")[1])
    assert head["model-index"] == yaml.safe_load(GOLDEN.read_text())["model-index"]
    assert (head["language"], head["license"], head["tags"][:2]) == (["en"], "apache-2.0", ["merge", "moe"])
    assert "| Avg. | 39.93 |\n| AI2 Reasoning Challenge (25-Shot) | 41.89 |" in card.text
    assert "| HellaSwag (10-Shot) | 66.20 |" in card.text
    (one, *_) = ModelCard(card.text).data.eval_results
    assert (one.dataset_args, one.metric_value, one.source_name) == ({"num_few_shot": 25}, 41.89, PAGE.name)


def test_without_reports_nothing_is_claimed_and_what_lacks_is_listed(artifact: Artifact) -> None:
    card = make_card(artifact)
    assert headings(card.text) == [
        "What was merged",
        "What it costs",
        "How its routers were made",
        "How to run it",
        "Limits, and what was found",
        "Licences",
        "How a mixture of experts works",
        "The recipe",
        "Not in this card",
    ]
    lacking = card.text.partition("## Not in this card")[2]
    for section in ("Where tokens go", "Results", "What it says", "Files for llama.cpp", "model-index"):
        assert section in lacking
    assert card.picture is None
    assert "never trained" in card.text
    assert "KL" not in card.text
    assert "llama-cli" not in card.text


def test_every_number_of_the_bill_is_the_plans(artifact: Artifact) -> None:
    from frankenmoe.planning.recall import plan_of

    made = plan_of(artifact)
    text = make_card(artifact).text
    for count in (made.bill.total, made.bill.active):
        assert f"{count:,}" in text
    assert "| 0 e0 | `parents/maths` | 2 | - |" in text
    assert f"{made.layers} x {made.experts}, {made.recipe.experts_per_token}" in text


def test_a_card_says_that_the_balance_loss_stays_off(made: Path) -> None:
    assert "leave `router_aux_loss_coef` at 0" in make_card(made / "moe").text
    assert json.loads((made / "moe" / "config.json").read_text())["router_aux_loss_coef"] == 0
    assert "router_aux_loss_coef" not in make_card(made / "virtual").text


def test_an_audit_gives_picture_legend_and_faults(artifact: Artifact) -> None:
    put(artifact, "audit.json", audit(artifact))
    card = make_card(artifact)
    assert "![Share of tokens per layer and expert](routing.png)" in card.text
    assert "0 maths, 1 verse" in card.text
    assert "100% of a layer's assignments. Counted over 1,000 tokens of maths, verse." in card.text
    assert "| maths | 80% to 100% |" in card.text
    assert "- Expert verse gets no token in layer 1.\n" in card.text
    assert "- Of 1,000 tokens none went to verse in layer 1.\n" in card.text
    assert "praise" not in card.text
    assert card.picture is not None
    assert card.picture.startswith(b"\x89PNG")


def test_a_card_without_the_drawing_library_says_so(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("frankenmoe.charts.can_draw", lambda: False)
    put(artifact, "audit.json", audit(artifact))
    card = make_card(artifact)
    assert card.picture is None
    assert "routing.png" not in card.text
    assert "not installed; pip install 'frankenmoe[audit]'" in card.text.partition("\n- picture: drawing needs")[2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recipe_digest": "of another"}, "is about another model"),
        ({"record": {"stages": []}}, "was made before the model was changed"),
        ({"routers_sha256": "0" * 64}, "was made before the routers were changed"),
    ],
)
def test_a_report_of_another_model_is_not_quoted(artifact: Artifact, change: dict[str, Any], words: str) -> None:
    file = put(artifact, "audit.json", audit(artifact, **change))
    card = make_card(artifact)
    assert "Where tokens go" not in headings(card.text)
    assert f"reports/audit.json {words}" in card.text
    with pytest.raises(ArtifactError, match=words):
        make_card(artifact, reports=[file])


def test_the_newest_report_of_a_kind_counts_and_one_given_goes_before_it(artifact: Artifact, tmp_path: Path) -> None:
    import os

    for age, tokens in ((2, 111), (1, 222)):
        report = audit(artifact, text={"maths": {"tokens": tokens}})
        file = put(artifact, f"audit-{tokens}.json", report)
        os.utime(file, (1e9 - age, 1e9 - age))
    assert "222 tokens" in make_card(artifact).text
    given = tmp_path / "elsewhere.json"
    given.write_text(json.dumps(audit(artifact, text={"maths": {"tokens": 333}})))
    assert "333 tokens" in make_card(artifact, reports=[given]).text


def test_gguf_files_with_and_without_a_check(artifact: Artifact) -> None:
    put(artifact, "export.json", EXPORT)
    text = make_card(artifact).text
    assert "| `two-Q4_0.gguf` | q4_0 | 18.80 GB | 4.52 | 1.2e-02 | 95.1% | 1.0101 | 12.3 |" in text
    assert "| `two-Q5_0.gguf` | q5_0 | 0.00 MB | 5.50 | - | - | - | - |" in text
    assert "llama-cli -m two-Q4_0.gguf" in text
    assert "- Not compared with their source in llama.cpp: two-Q5_0.gguf." in text
    assert "Q4_k_m would be larger on this shape." in text
    assert "/somewhere" not in text


def test_samples_are_asked_for_and_quoted_word_for_word(artifact: Artifact) -> None:
    arguments = ["card", str(artifact.folder), "--prompt", "say |this|", "--max-new-tokens", "6", "--json"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    said = json.loads((artifact.folder / "reports" / "samples.json").read_text())
    text = (artifact.folder / "README.md").read_text()
    assert said["routers_sha256"] == sha256(artifact.folder / ROUTERS)
    (sample,) = said["samples"]
    assert f"> say &#124;this&#124;\n\n```text\n{without_controls(sample['reply'])}\n```" in text or "````" in text
    assert "greedy, at most 6 new tokens" in text
    assert "experts: 0 e0  1 e1\n" in text
    assert len(sample["trace"][0]["experts"]) == 2
    assert "What it says" not in json.loads(result.stdout)["missing"]


def test_training_is_told_with_its_losses(artifact: Artifact) -> None:
    report = {
        "settings": {"what": ["routers", "norms"]},
        "data": {"maths": ["m.txt"], "verse": ["v.txt"]},
        "steps": 200,
        "best_step": 180,
        "improved": True,
        "mean_held_out_loss": {"before": 4.438, "best": 4.36, "after": 4.37},
    }
    (artifact.folder / "training.json").write_text(json.dumps(report))
    text = make_card(artifact).text
    assert "Then routers, norms were trained, 200 steps." in text
    assert "4.4380 nats per token before, 4.3600 in the state that was kept (step 180)" in text


def test_licences_that_differ_are_named_and_the_head_declares_none(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "parents", tmp_path / "parents")
    (tmp_path / "parents" / "verse" / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n")
    shutil.copy(made / "recipe.yml", tmp_path / "recipe.yml")
    artifact = build(tmp_path / "recipe.yml", tmp_path / "out", virtual=True)
    card = make_card(artifact)
    assert "license" not in card.metadata
    assert "| `parents/verse` | cc-by-nc-4.0 |" in card.text
    assert "forbids commercial use, which then holds for the whole mixture" in card.text
    chosen = make_card(artifact, settings=settings(license="cc-by-nc-4.0"))
    assert chosen.metadata["license"] == "cc-by-nc-4.0"
    assert "declares no licence" not in chosen.text
    assert chosen.metadata["library_name"] == "frankenmoe"  # nobody else loads a virtual artifact


def test_a_licence_with_a_name_of_its_own_is_declared_as_the_hub_wants_it(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "parents", tmp_path / "parents")
    for parent in (tmp_path / "parents").iterdir():
        (parent / "README.md").write_text("---\nlicense: other\nlicense_name: bigcode\n---\n")
    shutil.copy(made / "recipe.yml", tmp_path / "recipe.yml")
    head = make_card(build(tmp_path / "recipe.yml", tmp_path / "out", virtual=True)).metadata
    assert (head["license"], head["license_name"]) == ("other", "bigcode")


def test_sources_out_of_reach_cost_their_sections_and_nothing_else(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "parents", tmp_path / "parents")
    shutil.copy(made / "recipe.yml", tmp_path / "recipe.yml")
    artifact = build(tmp_path / "recipe.yml", tmp_path / "out")
    shutil.rmtree(tmp_path / "parents")
    card = make_card(artifact)
    assert not {"What it costs", "Licences"} & set(headings(card.text))
    assert "cannot be used any more" in card.missing["What it costs"]
    assert str(tmp_path) not in card.text
    assert "license" not in card.metadata


def test_the_sources_of_a_trained_expert_are_on_the_hub_only_if_they_came_from_there(artifact: Artifact) -> None:
    card = make_card(artifact)
    assert "base_model" not in card.metadata  # parents/base looks like an id and is a folder
    assert "`base_model` in the head" in card.missing


def test_what_a_person_wrote_is_not_replaced(artifact: Artifact) -> None:
    card = make_card(artifact)
    file = write_card(artifact, card)
    assert is_ours(file.read_text())
    write_card(artifact, make_card(artifact, settings=Settings(repo="me/two")))  # ours again: replaced without a word
    assert "me/two" in file.read_text()
    file.write_text(file.read_text().replace("# Two-of-them", "# My own words"))
    with pytest.raises(ArtifactError, match="by hand") as caught:
        write_card(artifact, card)
    assert "--overwrite" in str(caught.value)
    assert "My own words" in file.read_text()
    write_card(artifact, card, overwrite=True)
    assert "My own words" not in file.read_text()


def test_a_head_the_hub_would_refuse_is_refused_here(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="would not be accepted by the hub"):
        make_card(artifact, settings=settings(base_model=["not an id at all"]))


def test_a_fence_in_a_reply_does_not_end_its_block(artifact: Artifact) -> None:
    report = {
        "kind": "frankenmoe samples",
        "experts": ["e0", "e1"],
        "settings": {"max_new_tokens": 3, "temperature": 0.7, "seed": 4},
        "samples": [{"prompt": "a\nb", "reply": "x\n```\ny", "trace": []}],
    }
    put(artifact, "samples.json", report)
    text = make_card(artifact).text
    assert "> a\n> b\n\n````text\nx\n```\ny\n````" in text
    assert "temperature 0.7, seed 4" in text


def test_a_mixture_of_mixtures_is_described(parents: dict[str, list[Path]], tmp_path: Path) -> None:
    base, one, two = map(str, parents["llama"])
    inner = {"name": "inner", "experts": [{"source_model": one}, {"source_model": two}]}
    recipe = {"base_model": base, "gate_mode": "random", "experts": [inner, {"source_model": two, "name": "plain"}]}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe))
    text = make_card(build(tmp_path / "r.yml", tmp_path / "out", virtual=True)).text
    assert "a mixture of its own" in text
    assert "neither fitted nor trained" in text
    assert str(tmp_path.parent) not in text


def test_html_in_a_name_is_shown_and_does_not_act(artifact: Artifact) -> None:
    names = ["<script>alert(1)</script>", "b|`<i>"]
    put(artifact, "audit.json", audit(artifact, model={"experts": names}, text={"<b>": {"tokens": 9}}))
    text = make_card(artifact).text
    assert not [tag for tag in ("<script>", "<b>", "<i>") if tag in text]
    assert "0 &lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_the_command_says_what_is_missing(made: Path, tmp_path: Path) -> None:
    with pytest.raises(FrankenMoEError, match="not an artifact"):
        CliRunner().invoke(app, ["card", str(made)], catch_exceptions=False)
    shutil.copytree(made / "virtual", tmp_path / "virtual")
    out = CliRunner().invoke(app, ["card", str(tmp_path / "virtual")], catch_exceptions=False).stdout
    assert out.splitlines()[0] == f"card in {tmp_path / 'virtual' / 'README.md'}"
    assert "missing: Results" in out


def test_the_six_have_as_many_documents_as_their_sets() -> None:
    assert {name: task.documents for name, task in TASKS.items()} == {
        "arc_challenge": 1172, "hellaswag": 10042, "mmlu": 14042, "truthfulqa": 817, "winogrande": 1267, "gsm8k": 1319,
    }  # fmt: skip


def evaluated(documents: int) -> dict[str, Any]:
    """A report as `frankenmoe eval --json` writes it, cut down to what a card quotes: the MoE and its base."""

    def model(name: str, kind: str, score: float, loss: float) -> dict[str, Any]:
        task = {"value": score, "stderr": 0.01, "documents": documents}
        return {
            "name": name,
            "kind": kind,
            "tasks": {"gsm8k": task, "mmlu": {"value": None, "error": "too long", "documents": 0}},
            "domains": {"maths": {"nats_per_token": loss}},
            "tokens_per_second": 100.0,
            "memory_bytes": 2**31,
        }

    models = [model("base", "base", 0.30, 3.5), model("moe", "moe", 0.25, 4.25)]
    return {"harness": "h", "models": models, "verdict": ["Not worth its memory: it is worse than its base."]}


def test_results_stand_beside_the_base_and_a_base_that_wins_is_said(artifact: Artifact) -> None:
    put(artifact, "scores.json", evaluated(TASKS["gsm8k"].documents))
    card = make_card(artifact)
    assert "| Two-of-them | 25.00 ± 1.00 | - |" in card.text
    assert "| base | 30.00 ± 1.00 | - |" in card.text
    assert "| Two-of-them | 4.250 |" in card.text
    assert "| base | 100 | 2.00 GiB |" in card.text
    assert "- Not worth its memory: it is worse than its base.\n" in card.text
    assert (
        "- Its base does better on maths (3.500 against 4.250 nats per token), GSM8k (5-shot) (30.00 against 25.00)."
        in (card.text)
    )
    (only,) = ModelCard(card.text).data.eval_results
    assert (only.dataset_type, only.metric_value, only.source_name) == ("gsm8k", 25.0, None)


def test_other_numbers_of_experts_are_a_table_and_not_the_result(artifact: Artifact) -> None:
    more = evaluated(10)
    more["models"][1] |= {"experts_per_token": 1, "domains": {"maths": {"nats_per_token": 4.5}}}
    put(artifact, "eval.json", evaluated(10))
    put(artifact, "eval-1.json", more)
    text = make_card(artifact).text
    assert "| Two-of-them | 4.250 |" in text
    assert "| 1 | 25.00 ± 1.00 | 4.500 |\n| 2 (its own) | 25.00 ± 1.00 | 4.250 |" in text


def test_a_run_on_some_rows_is_no_leaderboard_score(artifact: Artifact) -> None:
    put(artifact, "eval.json", evaluated(10))
    card = make_card(artifact)
    assert "model-index" not in card.metadata
    assert "these are not leaderboard scores: GSM8k (5-shot): 10 of 1,319." in card.text
