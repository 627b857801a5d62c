"""Pushing with the real huggingface_hub to a hub on this machine: what is sent, what is rejected, what is resumed."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from fakehub import TOKEN, Hub
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

import frankenmoe as fm
import tiny
from frankenmoe.artifact.folder import Artifact, open_artifact
from frankenmoe.checkpoint.hub import resolve
from frankenmoe.cli.app import app
from frankenmoe.errors import ArtifactError
from frankenmoe.publish.upload import Shipment, explained, prepare, send


def push(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["push", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def sent_with(artifact: Artifact, repo: str = "me/moe", **options: object) -> Shipment:
    shipment = prepare(artifact, repo, **options)  # type: ignore[arg-type]
    send(shipment, message="test")
    return shipment


def test_everything_arrives_in_one_commit_byte_for_byte(artifact: Artifact, hub: Hub) -> None:
    (artifact.folder / "README.md").write_text("---\ntags:\n- moe\n---\n\n# Two\n")
    shipment = sent_with(artifact, private=True)
    ((repo, summary, paths),) = hub.commits
    assert (repo, summary) == ("me/moe", "test")
    assert paths == sorted(item.path for item in shipment.items)
    assert hub.private["me/moe"]
    for name in ("model-00001-of-00001.safetensors", "model-routers.safetensors", "README.md", "tokenizer.json"):
        assert hub.repos["me/moe"][name] == (artifact.folder / name).read_bytes()


def test_what_was_pushed_can_be_opened_and_names_no_folder_of_this_machine(
    artifact: Artifact, made: Path, hub: Hub, tmp_path: Path
) -> None:
    reports = artifact.folder / "reports"
    reports.mkdir()
    (reports / "audit.json").write_text(json.dumps({"from": f"{made}/parents/base/x.txt", "said": "see /etc/passwd"}))
    (reports / "audit.html").write_text(f"<p>{made}/recipe.yml</p>")
    sent_with(artifact)
    pulled = tmp_path / "pulled"
    for name, content in hub.repos["me/moe"].items():
        (pulled / name).parent.mkdir(parents=True, exist_ok=True)
        (pulled / name).write_bytes(content)
        assert str(made).encode() not in content, name
    assert open_artifact(pulled).form == "built"
    said = json.loads((pulled / "reports" / "audit.json").read_text())
    assert said == {"from": "base/x.txt", "said": "see /etc/passwd"}
    assert str(made) in (artifact.folder / "frankenmoe.json").read_text()  # here nothing changes


def test_a_dry_run_and_a_push_nobody_confirmed_send_nothing(artifact: Artifact, hub: Hub) -> None:
    listed = push(artifact.folder, "me/moe", "--dry-run")
    assert "model-00001-of-00001.safetensors" in listed
    assert "apache-2.0" in listed
    assert "README.md" in listed  # as a warning that it is missing
    assert max(map(len, listed.splitlines())) <= 120
    assert "add --yes" in push(artifact.folder, "me/moe")
    assert hub.requests == []


def test_the_list_as_json(artifact: Artifact, hub: Hub) -> None:
    result = CliRunner().invoke(app, ["push", str(artifact.folder), "me/moe", "--dry-run", "--json"])
    data = json.loads(result.stdout)
    assert data["bytes"] == sum(row["bytes"] for row in data["files"])
    assert data["licence"] == "apache-2.0"
    assert {row["group"] for row in data["files"]} == {"weights", "tokenizer"}


@pytest.mark.parametrize("groups", [["gguf"], ["gguf", "reports"], ["card", "gguf", "reports"]])
def test_only_the_groups_asked_for(artifact: Artifact, hub: Hub, groups: list[str]) -> None:
    for path in ("gguf/two-q4_0.gguf", "reports/eval.json", "README.md", "reports/samples/arc.jsonl"):
        (artifact.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (artifact.folder / path).write_text("{}")
    (artifact.folder / "gguf" / "half.gguf.partial").write_text("no")
    push(artifact.folder, "me/moe", "--files", ",".join(groups), "--yes")
    wanted = {"gguf": {"gguf/two-q4_0.gguf"}, "card": {"README.md"}}
    wanted["reports"] = {"reports/eval.json", "reports/samples/arc.jsonl"}
    assert set(hub.repos["me/moe"]) == set().union(*(wanted[group] for group in groups))


def test_after_a_broken_upload_only_the_rest_is_sent(artifact: Artifact, hub: Hub) -> None:
    hub.uploads_left = 1
    with pytest.raises(ArtifactError, match="sending to me/moe failed") as caught:
        sent_with(artifact)
    assert "continues from here" in str(caught.value)
    assert hub.commits == []  # half a model is not shown
    there = set(hub.objects)
    assert len(there) == 1
    hub.uploads_left = None
    hub.requests.clear()
    sent_with(artifact)
    again = {request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("PUT")}
    assert again
    assert not again & there
    assert len(hub.commits) == 1


def test_pushed_a_second_time_nothing_large_goes_over_the_wire(artifact: Artifact, hub: Hub) -> None:
    sent_with(artifact)
    hub.requests.clear()
    sent_with(artifact)
    assert not [request for request in hub.requests if request.startswith("PUT")]


def test_killed_while_uploading_the_same_command_goes_on(artifact: Artifact, hub: Hub) -> None:
    code = (
        "import os, signal, huggingface_hub.lfs as lfs\n"
        "real = lfs._upload_single_part\n"
        "def once(*a, **k):\n    real(*a, **k)\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "lfs._upload_single_part = once\nfrom frankenmoe.cli import main\nmain()"
    )
    command = [sys.executable, "-c", code, "push", str(artifact.folder), "me/moe", "--yes"]
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == -9
    assert hub.commits == []
    assert hub.objects
    assert "sent to" in push(artifact.folder, "me/moe", "--yes")
    assert "model-routers.safetensors" in hub.repos["me/moe"]


@pytest.mark.parametrize("token", ["hf_expired", None])
def test_a_login_that_is_not_good_is_one_sentence(
    artifact: Artifact, hub: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, token: str | None
) -> None:
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.delenv("HF_TOKEN")
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ArtifactError, match="expired or was revoked" if token else "nobody is logged in") as caught:
        sent_with(artifact)
    assert "hf auth login" in str(caught.value)
    assert len(caught.value.message.splitlines()) == 1
    assert hub.repos == {}


def test_a_repository_of_somebody_else_is_one_sentence(artifact: Artifact, hub: Hub) -> None:
    hub.repos["you/moe"] = {}
    for repo in ("you/moe", "you/new"):
        with pytest.raises(ArtifactError, match=f"does not let this login write to {repo}") as caught:
            sent_with(artifact, repo)
        assert len(caught.value.message.splitlines()) == 1
    assert hub.repos == {"you/moe": {}}
    assert hub.objects == {}


@pytest.mark.parametrize(
    ("piece", "status", "words"),
    [
        ("whoami", 429, "slow down"),
        ("repos/create", 503, "HTTP 503"),
        ("/commit/", 413, "no room"),
        ("preu", 404, "no"),
    ],
)
def test_other_answers_of_the_hub(artifact: Artifact, hub: Hub, piece: str, status: int, words: str) -> None:
    hub.fail[piece] = status
    with pytest.raises(ArtifactError, match=words) as caught:
        sent_with(artifact)
    assert len(caught.value.message.splitlines()) == 1


def test_a_card_that_the_hub_would_not_take_stops_before_anything_is_uploaded(artifact: Artifact, hub: Hub) -> None:
    (artifact.folder / "README.md").write_text("---\ntags: moe\n---\n\n# Two\n")
    with pytest.raises(ArtifactError, match="does not accept the head of README"):
        sent_with(artifact)
    assert hub.objects == {}


def test_nobody_there_is_one_sentence(artifact: Artifact, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ArtifactError, match="sending to me/moe failed"):
        sent_with(artifact)


def test_offline_is_said(artifact: Artifact, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import OfflineModeIsEnabled

    assert "HF_HUB_OFFLINE" in explained(OfflineModeIsEnabled("no"), repo="me/moe").message


@pytest.mark.parametrize("repo", ["moe", "me/moe/too", "me/a b", "/moe", ""])
def test_a_name_the_hub_would_not_take(artifact: Artifact, repo: str) -> None:
    with pytest.raises(ArtifactError, match="not a valid name for a repository"):
        prepare(artifact, repo)


def test_kinds_nobody_knows_and_kinds_without_files(artifact: Artifact) -> None:
    with pytest.raises(ArtifactError, match="ggfu") as caught:
        prepare(artifact, "me/moe", groups=["ggfu"])
    assert "'gguf'" in str(caught.value)
    with pytest.raises(ArtifactError, match="no files of the kind gguf"):
        prepare(artifact, "me/moe", groups=["weights", "gguf"])


def test_a_link_out_of_the_artifact_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "secret.json").write_text("{}")
    (artifact.folder / "secret.json").symlink_to(tmp_path / "secret.json")
    with pytest.raises(ArtifactError, match="outside the artifact"):
        prepare(artifact, "me/moe")


@pytest.mark.parametrize("link", ["adapters", "adapters/verse"])
def test_a_folder_of_adapters_that_is_a_link_is_refused(link: str, artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    place = artifact.folder / link
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=rf"{place.name} is a link to the folder .*elsewhere"):
        prepare(artifact, "me/moe")


@pytest.mark.parametrize(("name", "taken"), [("a b é#50%?.json", True), ("a\nb.json", False), ("a\udcff.json", False)])
def test_names_of_files_are_kept_or_refused(artifact: Artifact, hub: Hub, name: str, taken: bool) -> None:
    (artifact.folder / "reports").mkdir()
    (artifact.folder / "reports" / name).write_text("{}")
    if taken:
        sent_with(artifact)
        assert f"reports/{name}" in hub.repos["me/moe"]
    else:
        with pytest.raises(ArtifactError, match=r"does not accept the file name 'reports/a\\"):
            sent_with(artifact)


def test_hidden_and_foreign_files_stay_at_home(artifact: Artifact) -> None:
    before = prepare(artifact, "me/moe").items
    (artifact.folder / ".cache").mkdir()
    (artifact.folder / ".cache" / "token.json").write_text("{}")
    (artifact.folder / "notes.docx").write_text("mine")
    (artifact.folder / "build.json").write_text("{}")  # a build was killed right after it had become whole
    assert prepare(artifact, "me/moe").items == before


def test_a_virtual_artifact_says_what_it_lacks(made: Path) -> None:
    shipment = prepare(open_artifact(made / "virtual"), "me/moe")
    assert any("needs its sources" in text for text in shipment.warnings)
    assert shipment.size < 2**20


@pytest.mark.parametrize("text", ["", ",,"])
def test_no_kind_of_file_is_not_every_kind(artifact: Artifact, hub: Hub, text: str) -> None:
    with pytest.raises(ArtifactError, match="no kind of file to push is named") as found:
        push(artifact.folder, "me/moe", "--files", text, "--dry-run")
    assert found.value.hint == "choose from card, weights, gguf, reports, tokenizer"


def test_adapters_of_a_trained_artifact_are_sent_with_its_recipe(artifact: Artifact, hub: Hub) -> None:
    folder, path = artifact.folder, "adapters/one/adapter_config.json"
    for name in (path, "adapters/one/adapter_model.safetensors", "runs/events.1"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    (folder / path).write_text(json.dumps({"base_model_name_or_path": str(folder / "base")}))
    configs = [{"file": str(folder / path), "sha256": "of the local file"}]
    record = {**artifact.record, "recipe_folder": str(folder), "configs": [*artifact.record["configs"], *configs]}
    (folder / "frankenmoe.json").write_text(json.dumps(record))
    sent = sent_with(open_artifact(folder))
    groups = {item.path: item.group for item in sent.items}
    assert groups[path] == groups["adapters/one/adapter_model.safetensors"] == "weights"
    assert not any(name.startswith("runs") for name in groups)
    there = hub.repos["me/moe"]
    assert str(folder).encode() not in there[path]
    said = json.loads(there["frankenmoe.json"])["configs"]
    assert said[-1]["sha256"] == hashlib.sha256(there[path]).hexdigest()
    assert [each["sha256"] for each in said[:-1]] == [each["sha256"] for each in artifact.record["configs"]]


def test_what_is_in_adapters_comes_back_with_a_virtual_artifact(
    made: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of other sub-folders nothing comes: they hold the same model in other formats."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    sources = [
        {"source_model": str(made / "parents" / name), "name": name, "as_adapter": {"rank": 2}}
        for name in ("maths", "verse")
    ]
    recipe = tiny.write_recipe(tmp_path / "r.yml", made / "parents" / "base", [], experts=sources)
    virtual = fm.build(recipe, tmp_path / "virtual", virtual=True).folder
    files = {str(path.relative_to(virtual)): path.read_bytes() for path in virtual.rglob("*") if path.is_file()}
    adapters = sorted(name for name in files if name.startswith("adapters/"))
    assert adapters
    hub.repos["me/moe"] = files | {"onnx/config.json": b"{}", "onnx/model.safetensors": b"other"}
    found = resolve("me/moe", revision=None, folder=tmp_path)
    assert not [path for path in found.iterdir() if path.is_dir()]
    shutil.rmtree(tmp_path / "cache")
    model = AutoModelForCausalLM.from_pretrained("me/moe")
    (found,) = (tmp_path / "cache" / "models--me--moe" / "snapshots").iterdir()
    there = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file()}
    assert {name for name in there if "/" in name} == set(adapters)
    ids = tiny.ids()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, fm.load(virtual).model(ids).logits)
