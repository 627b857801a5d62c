"""What a stage works on: a recipe or an artifact, opened once. The only place that asks what it was given.

Imports torch only when routers are made or a model is loaded, so that mistakes in a recipe are reported early.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from frankenmoe.artifact.folder import RECORD, Artifact, open_artifact
from frankenmoe.checkpoint.hub import resolve
from frankenmoe.checkpoint.tensors import safetensors_dtype
from frankenmoe.errors import ArtifactError
from frankenmoe.gates.made import MadeRouters, RouterMaker, artifact_routers, make_routers
from frankenmoe.planning import Plan, plan
from frankenmoe.planning.buildable import check_buildable
from frankenmoe.planning.parts import Parts, parts_of_built, parts_of_plan, sharing_equal_experts
from frankenmoe.planning.recall import plan_of, recipe_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe

if TYPE_CHECKING:
    from frankenmoe.moe.load import MoE

Kind = Literal["recipe", "artifact", "gguf", "dense"]


@dataclass(frozen=True)
class Subject:
    """A recipe or an artifact, with everything that follows from it: each part is worked out once, when asked for.

    `dtype` is the type that weights are stored in, where it is not the recipe's. `cache` allows fitted routers to be
    read from the user's cache. `trust_remote_code` allows code that a source brings along to run. `maker` makes the
    routers in place of the gate mode. `known` is a plan of the same recipe that is not made again.
    """

    what: Recipe | Artifact
    dtype: str | None = None
    cache: bool = True
    trust_remote_code: bool = False
    maker: RouterMaker | None = field(default=None, repr=False)
    known: Plan | None = field(default=None, repr=False)
    _made: list[MadeRouters] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def artifact(self) -> Artifact | None:
        return self.what if isinstance(self.what, Artifact) else None

    @property
    def built(self) -> bool:
        """Whether this is a built artifact, which needs none of its sources."""
        return isinstance(self.what, Artifact) and self.what.form == "built"

    @cached_property
    def recipe(self) -> Recipe:
        return recipe_of(self.what) if isinstance(self.what, Artifact) else self.what

    @property
    def origin(self) -> str:
        """The recipe's file or the artifact's folder, for messages."""
        return str(self.what.folder) if isinstance(self.what, Artifact) else self.what.origin

    @property
    def name(self) -> str:
        """The name that recipe or record gives, else that of file or folder."""
        if isinstance(self.what, Artifact):
            return self.what.record.get("name") or self.what.folder.resolve().name
        return self.what.name or Path(self.what.origin).stem

    @property
    def kind(self) -> str:
        """ "recipe", "virtual artifact" or "built artifact"."""
        return f"{self.what.form} artifact" if isinstance(self.what, Artifact) else "recipe"

    @cached_property
    def plan(self) -> Plan:
        """The plan; ArtifactError for an artifact whose sources are gone or have changed."""
        if isinstance(self.what, Recipe):
            return self.known or plan(
                self.what, dtype=self.dtype, weights=True, trust_remote_code=self.trust_remote_code
            )
        self._check_dtype(self.what)
        return plan_of(self.what, known=self.known, trust_remote_code=self.trust_remote_code)

    @cached_property
    def plan_if_there(self) -> Plan | None:
        """The plan; None for a built artifact whose sources are gone."""
        try:
            return self.plan
        except ArtifactError:
            if self.built:
                return None
            raise

    @cached_property
    def parts(self) -> Parts:
        """The tensors: of a built artifact its own, otherwise the sources'. A recipe's gates are zeros."""
        if isinstance(self.what, Recipe):
            return parts_of_plan(self.plan)
        if self.built:
            return parts_of_built(self.what)
        return parts_of_plan(self.plan).with_gates(self.what.routers)

    def routers(self, progress: Progress = SILENT) -> MadeRouters:
        """Every gate: those of the artifact, or those that the recipe asks for, made at the first call."""
        if not self._made:
            self._made.append(self._make(progress))
        return self._made[0]

    def _make(self, progress: Progress) -> MadeRouters:
        if self.maker is not None:
            return self.maker(self.plan, progress)
        if isinstance(self.what, Artifact):
            return artifact_routers(self.what, None if self.built else self.plan)
        return make_routers(self.plan, progress, cache=self.cache)

    def load(
        self, *, dtype: str | None = None, int8: bool = False, progress: Progress = SILENT, **options: Any
    ) -> "MoE":
        """A running MoE. A recipe's routers are made first; nothing is written but the cache of routers.

        `dtype` (float32, bfloat16, float16) converts; without it weights stay mapped as they are stored. `int8` rounds
        every linear layer to 8 bits in memory, for inference: half the memory of 16 bits, logits a little off.
        `options` are those of MoEBlock: capacity_factor, drop_policy.
        """
        if not isinstance(self.what, Artifact):
            check_buildable(self.plan, virtual=True, allow_identical=True)
        import torch

        from frankenmoe.moe.dense import as_tensor
        from frankenmoe.moe.linear import to_int8
        from frankenmoe.moe.load import gate_tensors, load_parts

        parts = self.parts if self.built else sharing_equal_experts(self.parts, self.plan)
        if self.artifact and self.maker is None:
            gates = {name: as_tensor(write) for name, write in parts.gates.items()}
        else:
            gates = dict(gate_tensors(self.routers(progress).routers))
        moe = load_parts(parts, gates, dtype=getattr(torch, dtype) if dtype else None, **options)
        if int8:
            to_int8(moe.model, progress)
        return moe

    def _check_dtype(self, artifact: Artifact) -> None:
        stored = artifact.record["dtype"]
        if self.dtype is not None and safetensors_dtype(self.dtype) != safetensors_dtype(stored):
            raise ArtifactError(
                f"{artifact.folder} is made for {stored}, found --dtype {self.dtype}",
                hint="an artifact is built in its own type; build from a recipe to choose another",
            )


@dataclass(frozen=True)
class Dense:
    """A dense model beside an MoE: `folder` holds its checkpoint."""

    origin: str
    folder: Path
    trust_remote_code: bool = False


def open_subject(
    what: "Subject | Recipe | Artifact | str | Path",
    *,
    dtype: str | None = None,
    cache: bool = True,
    trust_remote_code: bool = False,
    like: Subject | None = None,
) -> Subject:
    """Opens a recipe or an artifact, as an object or as a path; a Subject is returned as it is.

    `like` is a subject whose plan is used again where it is of the same recipe. Raises RecipeError or ArtifactError for
    a path that is neither.
    """
    if isinstance(what, Subject):
        return what
    if isinstance(what, str | Path):
        what = Recipe.load(what) if kind_of(what) == "recipe" else open_artifact(Path(what))
    known = like.plan if like and isinstance(what, Artifact) and same_plan(what, like) else None
    return Subject(what, dtype=dtype, cache=cache, trust_remote_code=trust_remote_code, known=known)


def same_plan(artifact: Artifact, like: Subject) -> bool:
    """Whether an artifact was made from the recipe of a subject, in the same type."""
    record = artifact.record
    return bool(record["recipe_digest"] == like.recipe.digest and record["dtype"] == like.plan.dtype_name)


def open_model(what: str | Path, *, cache: bool = True, trust_remote_code: bool = False) -> Subject | Dense:
    """The same for whatever can be measured: also a folder with a dense model, or its hub id (with @revision)."""
    if kind_of(what) != "dense":
        return open_subject(what, cache=cache, trust_remote_code=trust_remote_code)
    name, _, revision = str(what).partition("@") if not Path(what).exists() else (str(what), "", "")
    folder = resolve(name, revision=revision or None, folder=Path.cwd())
    return Dense(str(what), folder, trust_remote_code)


def kind_of(what: str | Path) -> Kind:
    """What a path names. A missing file is a recipe if it ends like one; a folder without a record is dense."""
    path = Path(what)
    if path.suffix == ".gguf" and not path.is_dir():
        return "gguf"
    if path.is_file() or (path.suffix in (".yml", ".yaml") and not path.is_dir()):
        return "recipe"
    return "artifact" if (path / RECORD).is_file() else "dense"


def with_maker(subject: Subject, maker: RouterMaker) -> Subject:
    """The same subject, whose routers `maker` makes."""
    return replace(subject, maker=maker, known=subject.plan)


def load(
    what: "Subject | Recipe | Artifact | str | Path",
    *,
    dtype: str | None = None,
    int8: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> "MoE":
    """A running MoE from a recipe or an artifact; see Subject.load."""
    return open_subject(what).load(dtype=dtype, int8=int8, progress=progress, **options)
