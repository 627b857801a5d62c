"""Nothing that is sent names a folder, the user or the host of this machine, whatever was done to the artifact."""

import io
import json
import random
import tempfile
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
from frankenmoe.publish import rewrite, scan
from frankenmoe.publish.privacy import LocalNames, as_published, local_names
from frankenmoe.publish.scan import leaks
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
        named["special_tokens_map_file"] = "C:\\Users\\zaphod\\acmeclient\\vocab.json"
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


def found_in(data: bytes, names: LocalNames, **options: int) -> list[str]:
    return [what for what, _ in leaks(io.BytesIO(data), names, **options)]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("vocab.txt", "a\n{root}/betelgeuse/llama1/x\nb", "vocab.txt names the path"),
        ("added_tokens.json", '{{"note": "see {root}/betelgeuse/llama1"}}', "in the field 'note'"),
        ("chat_template.jinja", "{{# {home}/notes.txt #}}", "names the path /mansion/zaphod in byte 3"),
        ("vocab.txt", "/srv/zaphod/notes", "names the user zaphod"),
        ("vocab.txt", "see ../../betelgeuse/llama0 there", "names the path ../../betelgeuse/llama0"),
        ("chat_template.jinja", "{{# file://{other} #}}", "names the path"),
        ("added_tokens.json", '{{"note": "a\\\\n{other}/x"}}', "names the path.*'note'"),
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
    file, other = made / name, root / "of nobody's records"
    other.mkdir(exist_ok=True)
    file.write_text(text.format(root=root, home="/mansion/zaphod", other=other))
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
    assert names.short("C:\\Users\\zaphod\\z.txt") == names.short("\\\\pc\\zaphod\\z.txt") == "z.txt"
    assert names.text("see /etc/passwd and https://hub/zaphod") == "see /etc/passwd and https://hub/zaphod"
    assert names.text(f"in {made}/config.json") == f"in {made.name}/config.json"
    assert names.text(f"in {made}. It is file://{made}/config.json") == "in model. It is file://model/config.json"
    assert names.text(f"{made.parent}/work/more.txt, {made}.partial") == "more.txt, model.partial"


def test_a_path_after_an_escaped_line_end_is_shortened(made: Path) -> None:
    names = local_names(open_artifact(made))
    for escape in (r"\n", r"\t", r"\r", "\n"):
        assert names.text(f"see{escape}{made}/config.json") == f"see{escape}{made.name}/config.json"
        assert found_in(f"see{escape}{made}/x".encode(), names)


@pytest.mark.parametrize("piece", [1, 7, 64, 2**24])
def test_a_name_is_found_wherever_pieces_end(made: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    names = local_names(open_artifact(made))
    monkeypatch.setattr(scan, "PIECE", piece)
    monkeypatch.setattr(scan, "OVERLAP", 512)
    longer = f"{made}stone, {made}-x and x{made} ".encode()  # other names
    assert not any(str(made) == what.removeprefix("the path ") for what in found_in(longer, names))
    clean = b"see /etc/passwd, /usr/lib/x, https://hub/tmp/a and <b></a/b> " * 20
    assert found_in(clean, names) == []
    for numbers in ({}, {"text": 64}):
        assert any(str(made) in what for what in found_in(clean + f" {made}/x ".encode() + clean, names, **numbers))


def test_numbers_raise_no_alarm_by_chance(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ann")
    monkeypatch.setattr("platform.node", lambda: "pc-7")
    names = local_names(open_artifact(made))
    data = random.Random(0).randbytes(2**24) + b"(/ann)\0(/tmp/x)"
    assert found_in(data, names, text=0) == []
    assert found_in(data[-16:], names)[0] == "the user ann"
    text, numbers = b"words of a vocabulary ", b"(/ann)"
    assert found_in(text + numbers, names, text=len(text)) == []
    assert found_in(text + numbers, names)[0] == found_in(numbers + text, names, text=6)[0] == "the user ann"


def test_paths_of_the_machine_count_in_text_only(made: Path) -> None:
    names = local_names(open_artifact(made))
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        other = f"({folder}/x)".encode()
        assert found_in(other + b"numbers", names, text=len(other))[0] == f"the path {folder}"
        assert found_in(b"text" + other, names, text=4) == []


@pytest.mark.parametrize("text", ["{}/x", "see {} there", "It is in {}.", "/usr or {}", "file://{}/My File"])
def test_a_path_with_spaces_is_found(made: Path, text: str) -> None:
    with tempfile.TemporaryDirectory(prefix="My Shared Drive ", dir="/tmp") as folder:
        assert f"the path {folder}" in found_in(text.format(folder).encode(), local_names(open_artifact(made)))


def test_folders_of_the_system_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.lexists", lambda path: True)
    folders = [b"/usr/lib", b"/System/Library", b"/private/var", b"/nix/store", b"/Volumes/Disk", b"/data/x"]
    assert [path for path in folders if scan.is_here.__wrapped__(path)] == [b"/Volumes/Disk", b"/data/x"]


@pytest.mark.parametrize("user", ["root", "a", "app", "ubuntu"])
def test_user_names_of_nobody_in_particular(made: Path, user: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: user)
    monkeypatch.setenv("HOME", "/")
    assert found_in(f"/srv/{user}/notes, {user}, /{user}/x".encode(), local_names(open_artifact(made))) == []


@pytest.mark.parametrize("name", ["gguf/x.gguf", "model-x.safetensors"])
def test_bytes_of_weights_and_gguf_are_looked_at_too(made: Path, name: str) -> None:
    file = made / name
    file.parent.mkdir(exist_ok=True)
    header = b'{"a":{"dtype":"U8","shape":[999],"data_offsets":[0,999]}}'
    body = b"\1" * 500 + f"\0{made.parent}/x\0".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + body + b"\1" * (999 - len(body)))
    try:
        with pytest.raises(ArtifactError, match=rf"{file.name} names the path"):
            prepare(open_artifact(made), "me/moe")
    finally:
        file.unlink()


def test_a_large_file_with_other_metadata_is_sent_in_pieces(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = local_names(open_artifact(made))
    whole = as_published(made / STATISTICS, path=STATISTICS, names=names)
    monkeypatch.setattr(rewrite, "LARGE", 100)
    spliced = as_published(made / STATISTICS, path=STATISTICS, names=names)
    assert isinstance(whole, bytes)
    assert isinstance(spliced, rewrite.Spliced)
    with spliced as stream:
        assert b"".join(iter(lambda: stream.read(777), b"")) == whole
        for place in (0, 5, len(whole) // 2, len(whole) - 3, len(whole) + 9):
            stream.seek(place)
            assert stream.read(100) == whole[place : place + 100]
        assert stream.seek(-4, io.SEEK_END) == len(whole) - 4
        assert stream.read() == whole[-4:]


def test_the_hub_takes_a_file_in_pieces(made: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = as_published(made / STATISTICS, path=STATISTICS, names=local_names(open_artifact(made)))
    monkeypatch.setattr(rewrite, "LARGE", 100)
    send(prepare(open_artifact(made), "me/large"), message="test")
    assert hub.repos["me/large"][STATISTICS] == whole
