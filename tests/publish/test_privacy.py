"""Nothing that is sent names a folder, the user or the host of this machine, whatever was done to the artifact."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from fakehub import Hub
from safetensors import safe_open

import gguftools
from frankenmoe.artifact.folder import RECORD, STATISTICS, open_artifact
from frankenmoe.cli.app import app
from frankenmoe.errors import ArtifactError
from frankenmoe.pipeline import run
from frankenmoe.publish.privacy import local_names
from frankenmoe.publish.upload import prepare, send

# parts of every local path that the artifacts below were made from
MARKS = ("zaphod", "acmeclient", "betelgeuse")

pytest.importorskip("gguf")
pytest.importorskip("lm_eval")


@pytest.fixture(scope="module", params=[True, False], ids=["virtual", "built"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of every stage from sources and texts all over the disk, then fitted again to a text by its whole path."""
    root = tmp_path_factory.mktemp("zaphod")
    models, texts, work = root / "betelgeuse", root / "disk" / "acmeclient", root / "home" / "acmeclient-work"
    for folder in (models, texts, work):
        folder.mkdir(parents=True)
    for parent in gguftools.parents(models, "llama"):
        config = parent / "tokenizer_config.json"
        named = {"name_or_path": str(root / "trained" / "base"), "tokenizer_file": str(parent / "tokenizer.json")}
        config.write_text(json.dumps(json.loads(config.read_text()) | named))
    for name, words in (("abc", "abc bca cab "), ("xyz", "xyz zyx yxz "), ("more", "xyz abc ")):
        (texts / f"{name}.txt").write_text(words * 260)
    recipe = {
        "name": "two",
        "base_model": "../../betelgeuse/llama0",
        "gate_mode": "random",
        "experts": [
            {"source_model": "../../betelgeuse/llama1", "name": "abc", "data": str(texts / "abc.txt")},
            {"source_model": str(models / "llama2"), "name": "xyz", "data": "../../disk/acmeclient/xyz.txt"},
        ],
        "build": {"virtual": request.param},
        "fit": {"method": "ridge", "tokens": 512, "block": 32},
        "audit": {"tokens": 256, "data": [f"abc={texts / 'abc.txt'}"]},
        "eval": {"limit": 2, "texts": {"more": str(texts / "more.txt")}},
        "export": {"types": ["q8_0"], "check": False},
        "card": {"prompts": ["abc"], "max_new_tokens": 4},
    }
    (work / "two.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    moe = run(work / "two.yml", work / "out").artifact
    more = ["--data", f"abc={texts / 'more.txt'}", "--data", f"xyz={texts / 'xyz.txt'}", "--keep-anyway"]
    for command in (["fit", str(moe.folder), *more, "--block", "32"], ["card", str(moe.folder)]):
        done = CliRunner().invoke(app, command, catch_exceptions=False)
        assert done.exit_code == 0, done.output
    return moe.folder


def test_nothing_that_is_sent_names_this_machine(made: Path, hub: Hub, tmp_path: Path) -> None:
    assert MARKS[0] in (made / RECORD).read_text()
    with safe_open(made / STATISTICS, "np") as file:
        assert MARKS[1] in file.metadata()["facts"]
    shipment = prepare(open_artifact(made), "me/moe")
    assert {item.group for item in shipment.items} == {"card", "weights", "gguf", "reports", "tokenizer"}
    send(shipment, message="test")
    sent = hub.repos["me/moe"]
    assert {"reports/audit.html", "reports/eval.json", "README.md", STATISTICS, RECORD} <= set(sent)
    found = [(name, mark) for name, data in sent.items() for mark in MARKS if mark.encode() in data]
    assert found == []

    for name, data in sent.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(data)
    pulled = open_artifact(tmp_path / "pulled")
    assert [Path(source["file"]).parent.name for source in pulled.record["sources"]] == ["llama0", "llama1", "llama2"]
    assert pulled.record["recipe"]["experts"][1]["data"] == ["xyz.txt"]
    assert pulled.record["recipe_folder_from_here"] == "."
    with safe_open(pulled.folder / STATISTICS, "np") as file:
        facts = json.loads(file.metadata()["facts"])
        assert facts["text"]["abc"]["from"] == ["more.txt"]
        assert file.keys()
    if pulled.form == "built":
        done = CliRunner().invoke(app, ["verify", str(pulled.folder)])
        assert "was edited" not in done.output


def test_the_card_names_no_folder_before_it_is_sent(made: Path) -> None:
    text = (made / "README.md").read_text()
    assert not [mark for mark in MARKS if mark in text]
    assert "is that of `llama0`" in text
    assert "| 1 xyz | `llama2` | - | `xyz.txt` |" in text


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("vocab.txt", "a\n{root}/betelgeuse/llama1/x\nb", "vocab.txt names the path"),
        ("added_tokens.json", '{{"note": "see {root}/betelgeuse/llama1"}}', "in the field 'note'"),
        ("chat_template.jinja", "{{# {home}/notes.txt #}}", "names the path /mansion/zaphod in byte 3"),
        ("vocab.txt", "/srv/zaphod/notes", "names the user zaphod"),
        ("vocab.txt", "trained on heart-of-gold-42", "names the host heart-of-gold-42"),
    ],
)
def test_what_cannot_be_shortened_is_refused(
    made: Path, name: str, text: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/mansion/zaphod")
    monkeypatch.setattr("getpass.getuser", lambda: "zaphod")
    monkeypatch.setattr("platform.node", lambda: "heart-of-gold-42")
    root = next(parent for parent in made.parents if parent.name.startswith("zaphod"))
    file = made / name
    file.write_text(text.format(root=root, home="/mansion/zaphod"))
    try:
        with pytest.raises(ArtifactError, match=words) as caught:
            prepare(open_artifact(made), "me/moe")
        assert "--files" in str(caught.value)
        assert prepare(open_artifact(made), "me/moe", groups=["gguf"]).items
    finally:
        file.unlink()


def test_paths_of_one_name_stay_apart_and_evidence_stays_as_it_is(made: Path) -> None:
    names = local_names(open_artifact(made))
    assert names.short("org/model@v1") == "org/model@v1"
    assert names.short("texts/a.txt") == "texts/a.txt"
    assert names.short("abc=/x/y/acmeclient/z.txt") == "abc=z.txt"
    assert names.short("../y/z.txt") == "z.txt"
    assert names.text("see /etc/passwd and https://hub/zaphod") == "see /etc/passwd and https://hub/zaphod"
    assert names.text(f"in {made}/config.json") == f"in {made.name}/config.json"
    assert names.text(f"in {made}. It is file://{made}/config.json") == "in model. It is file://model/config.json"
    assert names.text(f"{made.parent}/work/more.txt, {made}.partial") == "more.txt, model.partial"


def test_a_path_after_an_escaped_line_end_is_shortened(made: Path) -> None:
    names = local_names(open_artifact(made))
    for escape in (r"\n", r"\t", r"\r", "\n"):
        assert names.text(f"see{escape}{made}/config.json") == f"see{escape}{made.name}/config.json"
        assert list(names.leaks(f"see{escape}{made}/x".encode()))
