"""Sends an artifact to a repository on the hub, after listing files, sizes and licences.

Nothing is sent that was not listed. The login is huggingface_hub's own.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from frankenmoe.artifact.folder import ROUTERS, UNFINISHED, Artifact
from frankenmoe.checkpoint.links import ADAPTERS
from frankenmoe.checkpoint.weights import INDEX, SINGLE
from frankenmoe.errors import ArtifactError, FrankenMoEError, first_line
from frankenmoe.progress import SILENT, Progress
from frankenmoe.publish.facts import gather
from frankenmoe.publish.privacy import LocalNames, as_published
from frankenmoe.publish.scan import first_leak
from frankenmoe.subject import Subject, open_subject
from frankenmoe.suggest import did_you_mean

CARD = "README.md"
# a group's files, as patterns below the artifact's folder; a file belongs to the first group that matches it
GROUPS: Mapping[str, tuple[str, ...]] = {
    "card": (CARD, "routing.png"),
    "weights": (
        *("*.safetensors", "*.safetensors.index.json", "config.json", "frankenmoe.json", "recipe.yml"),
        "modeling_frankenmoe.py",  # of a virtual artifact, for transformers
        f"{ADAPTERS}/**/*",  # of a virtual artifact that was trained
    ),
    "gguf": ("*.gguf", "gguf/*.gguf", "*.Modelfile", "gguf/*.Modelfile"),
    "reports": ("reports/**/*", "training.json"),
    "tokenizer": ("*.json", "*.model", "*.txt", "*.jinja"),
}
LEFTOVERS = (".partial", ".lock", ".tmp")


@dataclass(frozen=True)
class Item:
    """One file to send: its path in the repository, the local file, its size in bytes, its group."""

    path: str
    file: Path
    size: int
    group: str


@dataclass(frozen=True)
class Shipment:
    """What a push would send. `warnings` are shown before it is confirmed."""

    repo: str
    private: bool
    items: tuple[Item, ...]
    licences: tuple[tuple[str, str | None], ...]
    declared: str | None
    warnings: tuple[str, ...]
    names: LocalNames = field(repr=False)

    @property
    def size(self) -> int:
        """Bytes in all."""
        return sum(item.size for item in self.items)

    def to_dict(self) -> dict[str, Any]:
        """The shipment as plain data."""
        return {
            "repo": self.repo,
            "private": self.private,
            "bytes": self.size,
            "files": [{"path": item.path, "bytes": item.size, "group": item.group} for item in self.items],
            "licence": self.declared,
            "licences": [{"source": source, "licence": found} for source, found in self.licences],
            "warnings": list(self.warnings),
        }


def prepare(
    what: Subject | Artifact | str | Path,
    repo: str,
    *,
    private: bool = False,
    groups: Sequence[str] | None = None,
    progress: Progress = SILENT,
) -> Shipment:
    """Lists the files of an artifact to send, and reads them all for private names. `groups` are names in GROUPS, None
    for all.

    Raises ArtifactError for an unknown group, an invalid `repo`, groups without files, or a file with a private path.
    """
    check_repo_name(repo)
    subject = open_subject(what)
    artifact = subject.need_artifact(hint="build it first")
    for group in groups or ():
        if group not in GROUPS:
            raise ArtifactError(f"{group!r} is not a kind of file to push", hint=did_you_mean(group, GROUPS))
    if groups is not None and not groups:  # an empty choice does not mean all groups
        raise ArtifactError("no kind of file to push is named", hint=f"choose from {', '.join(GROUPS)}")
    wanted = groups or tuple(GROUPS)
    items = tuple(item for item in list_files(artifact.folder) if item.group in wanted)
    empty = [group for group in groups or () if not any(item.group == group for item in items)]
    if empty or not items:
        raise ArtifactError(
            f"{artifact.folder} has no files of the kind {', '.join(empty) or 'asked for'}",
            hint="`frankenmoe export` writes gguf, `frankenmoe card` the card, `frankenmoe audit` and `eval` reports",
        )
    facts = gather(subject)
    progress.start("looking for private names", sum(item.size for item in items), "B")
    for item in items:
        leak = first_leak(item.file, path=item.path, names=facts.names, on_bytes=progress.advance)
        if leak:
            raise ArtifactError(
                f"{item.path} names {leak}, which is private to this machine",
                hint="remove it from that file, or leave files of that kind out with --files",
            )
    return Shipment(
        repo=repo,
        private=private,
        items=items,
        licences=facts.licences.by_source,
        declared=facts.licences.chosen,
        warnings=tuple(_warnings(artifact, facts.licences.findings, facts.lost, items, wanted)),
        names=facts.names,
    )


def list_files(folder: Path) -> Iterator[Item]:
    """Every file of an artifact that belongs to a group, by path. ArtifactError for a link out of the folder."""
    root, groups = folder.resolve(), dict[Path, str]()
    for place in (folder / ADAPTERS, *sorted(folder.glob(f"{ADAPTERS}/**/*"))):
        if place.is_symlink() and place.is_dir():  # `**` does not go into it
            raise ArtifactError(
                f"{place} is a link to the folder {place.resolve()}, whose files would not be sent",
                hint="put the folder itself there",
            )
    for group, patterns in GROUPS.items():
        for file in (file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
            groups.setdefault(file, group)
    for file, group in sorted(groups.items()):
        path = PurePosixPath(file.relative_to(folder).as_posix())
        if path.name.endswith((*LEFTOVERS, UNFINISHED)) or any(part.startswith(".") for part in path.parts):
            continue
        if not str(path).isprintable():
            raise ArtifactError(
                f"the hub does not accept the file name {str(path)!a}", hint="give the file another name"
            )
        if not file.resolve().is_relative_to(root) and group != "gguf":
            raise ArtifactError(
                f"{file} is a link to {file.resolve()}, outside the artifact", hint="put the file itself there"
            )
        yield Item(str(path), file, file.stat().st_size, group)


def _warnings(
    artifact: Artifact, findings: Sequence[str], lost: str | None, items: Sequence[Item], groups: Sequence[str]
) -> Iterator[str]:
    if "card" in groups and not any(item.path == CARD for item in items):
        yield "there is no README.md: visitors will not know what this is; `frankenmoe card` writes one"
    yield from findings
    if lost:
        yield f"the sources' licences cannot be read: {lost}"
    if artifact.form == "virtual" and "weights" in groups:
        if any((artifact.folder / name).is_file() for name in (SINGLE, INDEX)):
            yield (
                f"other programs read the routers in the weights, but a fit changes only those in {ROUTERS}; "
                "`frankenmoe build` writes a checkpoint with the fitted ones"
            )
        else:
            yield "a virtual artifact has only recipe and routers, and needs its sources to run"


def send(shipment: Shipment, *, message: str, bars: bool = False) -> str:
    """Creates the repository if it is new, and sends everything as one commit: all of it or nothing.

    After an interruption the same call resumes: files that the hub has received are not sent again. `bars` lets
    huggingface_hub draw its progress bars. Returns the address of the repository's page. Raises ArtifactError
    with a hint if the hub rejects it.
    """
    import huggingface_hub
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    (enable_progress_bars if bars else disable_progress_bars)()
    api = huggingface_hub.HfApi(library_name="frankenmoe")
    try:
        api.whoami()
        page = api.create_repo(shipment.repo, private=shipment.private, exist_ok=True)
        operations = [
            huggingface_hub.CommitOperationAdd(item.path, as_published(item.file, path=item.path, names=shipment.names))
            for item in shipment.items
        ]
        api.create_commit(shipment.repo, operations, commit_message=message)
    except FrankenMoEError:
        raise
    except Exception as error:  # the HTTP libraries below the client have errors of their own
        raise explained(error, repo=shipment.repo) from error
    return str(page)


def check_repo_name(repo: str) -> None:
    """ArtifactError for a name that the hub would not accept, or that has no owner."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo)
        problem = "" if repo.count("/") == 1 else "it names no owner"
    except HFValidationError as error:
        problem = str(error).splitlines()[0]
    if problem:
        raise ArtifactError(
            f"{repo!r} is not a valid name for a repository on the hub: {problem}", hint="write it as org/name"
        )


def explained(error: BaseException, *, repo: str) -> ArtifactError:
    """An error of the hub's client as an ArtifactError with a hint."""
    from huggingface_hub import errors

    status = next((code for cause in _causes(error) if (code := _status(cause)) is not None), None)
    match error, status:
        case errors.LocalTokenNotFoundError(), _:
            said, hint = "nobody is logged in to the hub on this machine", "log in with `hf auth login`"
        case errors.OfflineModeIsEnabled(), _:
            said, hint = "HF_HUB_OFFLINE is set, so nothing can be sent", "unset it to push"
        case _, 401:
            said, hint = (
                f"the hub does not accept this machine's login for {repo}: its token has expired or was revoked",
                "log in again with `hf auth login` (if HF_TOKEN is set, it is used instead)",
            )
        case _, 403:
            said, hint = (
                f"the hub does not let this login write to {repo}",
                "push to a name of your own, or use a token that may write there",
            )
        case _, 404:
            said, hint = f"the hub has no {repo} that this login can see", "check the spelling of org/name"
        case _, 413 | 507:
            said, hint = f"{repo} has no room for this: {first_line(error)}", "send less with --files, or ask for room"
        case _, 429:
            said, hint = "the hub asks to slow down", "wait some minutes; the same command then continues from here"
        case ValueError(), _ if "metadata" in str(error).lower():
            said, hint = (
                f"the hub does not accept the head of {CARD}: {' '.join(str(error).split())}",
                "write it again with `frankenmoe card`",
            )
        case _ if status is not None and status >= 500:
            said, hint = f"the hub failed (HTTP {status})", "try again later; the same command continues from here"
        case _:
            said, hint = (
                f"sending to {repo} failed: {first_line(error)}",
                "check the network; the same command continues from here",
            )
    return ArtifactError(said, hint=hint)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes: uploads in threads wrap the hub's answer."""
    found: BaseException | None = error
    while found is not None:
        yield found
        found = found.__cause__ or found.__context__


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None
