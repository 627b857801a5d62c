"""An artifact of either form -> the subject of an export; knows nothing of torch, GGUF types or files to write."""

from collections.abc import Mapping
from dataclasses import replace

from frankenmoe.artifact import Artifact
from frankenmoe.checkpoint.reader import open_checkpoint
from frankenmoe.checkpoint.tensors import Lora, TensorRef, TensorWrite
from frankenmoe.errors import ArtifactError
from frankenmoe.families import FAMILIES, FORMATS
from frankenmoe.planning import ExpertNode, Plan
from frankenmoe.planning.compare import licence, shared_licence
from frankenmoe.planning.forecast import subject_of_plan
from frankenmoe.planning.gguf import Subject
from frankenmoe.planning.layout import SHARED
from frankenmoe.planning.recall import plan_of
from frankenmoe.recipe import RANDOM_MODES


def of_artifact(artifact: Artifact, *, trust_remote_code: bool = False) -> Subject:
    """What a finished artifact holds. PlanError where llama.cpp cannot say it, ArtifactError where parts are lost."""
    if artifact.form == "virtual":
        return of_plan(plan_of(artifact, trust_remote_code=trust_remote_code), artifact.routers)
    return _of_built(artifact)


def of_plan(made: Plan, routers: Mapping[str, TensorRef]) -> Subject:
    """A plan with the gates of a routers file."""
    found = subject_of_plan(made)
    gates = {name: _copy(routers, name, name) for name in found.gates}
    about = {"licence": _licence(made), "recipe_digest": made.recipe.digest}
    return replace(found, gates=gates, about=about)


def _licence(made: Plan) -> str | None:
    """What the file may say it is under: the author's word, or what all sources share."""
    folders = [source.folder for source in made.sources]
    folders += [source.adapter.folder for source in made.sources if source.adapter is not None]
    declared = made.recipe.card.license if made.recipe.card else None
    return declared or shared_licence([licence(folder) for folder in dict.fromkeys(folders)])


def routers_were_set(artifact: Artifact) -> bool:
    """Whether anything but chance decided the gates: prompts at the build, or a stage after it."""
    stages = artifact.record.get("stages") or []
    later = [stage for stage in stages if stage.get("stage") != "build"]
    return bool(later) or any(stage.get("gate_mode") not in RANDOM_MODES for stage in stages)


def _of_built(artifact: Artifact) -> Subject:
    record, tensors = artifact.record, open_checkpoint(artifact.folder).tensors
    fmt, config = FORMATS[record["format"]], record["base_config"]
    family = FAMILIES[config["model_type"]]
    layers = family.dims(config).layers

    def ffn(templates: Mapping[str, str], expert: int) -> tuple[Mapping[str, TensorWrite], ...]:
        return tuple(
            {
                suffix: _copy(tensors, name.format(layer=layer, expert=expert), f"model.layers.{layer}.mlp.{suffix}")
                for suffix, name in templates.items()
            }
            for layer in range(layers)
        )

    none: tuple[Mapping[str, Lora], ...] = ({},) * layers
    gated = fmt.shared_gate is not None and fmt.shared_gate.format(layer=0) in artifact.routers
    shared = tuple(ExpertNode(name, (*SHARED, 0), None, ffn(fmt.shared, 0), none) for name in record["shared_experts"])
    names = family.shapes(family.backbone, config)
    return Subject(
        name=record.get("name") or artifact.folder.resolve().name,
        fmt=fmt,
        family=family,
        config=config,
        folder=artifact.folder,
        backbone=tuple(_copy(tensors, name, name) for name in names),
        nodes=tuple(
            ExpertNode(name, (index,), None, ffn(fmt.expert, index), none)
            for index, name in enumerate(record["experts"])
        ),
        shared=shared,
        gates={name: _copy(tensors, name, name) for name in artifact.routers},
        gated_shared=gated,
        top_k=record["experts_per_token"],
        halve_shared=bool(shared) and fmt.shared_gate is not None and not gated,
        about={"licence": licence(artifact.folder), "recipe_digest": record.get("recipe_digest")},
    )


def _copy(tensors: Mapping[str, TensorRef], stored: str, name: str) -> TensorWrite:
    if stored not in tensors:
        raise ArtifactError(f"the artifact has lost its tensor {stored}", hint="build the artifact again")
    ref = tensors[stored]
    return TensorWrite(name, ref.dtype, ref.shape, (ref,))
