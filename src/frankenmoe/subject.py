"""Opens a recipe, an artifact or a dense model: the input of every stage.

Imports torch only when routers are made or a model is loaded, so that mistakes in a recipe are reported early.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frankenmoe.artifact.folder import ROUTERS, Artifact, open_artifact
from frankenmoe.backbone import resolve as backbone
from frankenmoe.checkpoint.hub import resolve
from frankenmoe.checkpoint.jsonfile import read_object
from frankenmoe.checkpoint.tensors import safetensors_dtype
from frankenmoe.counted import counted
from frankenmoe.errors import ArtifactError, PlanError, RecipeError
from frankenmoe.gates.cached import key_of
from frankenmoe.gates.made import MadeRouters, RouterMaker, artifact_routers, make_routers
from frankenmoe.moe.processes import main_first
from frankenmoe.planning import Plan, plan
from frankenmoe.planning.adopting import mixture_in, recipe_of_mixture
from frankenmoe.planning.buildable import check_buildable
from frankenmoe.planning.kind import kind_of
from frankenmoe.planning.parts import Parts, parts_of_built, parts_of_plan, sharing_equal_experts
from frankenmoe.planning.recall import plan_of, recipe_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe

if TYPE_CHECKING:
    from frankenmoe.moe.load import MoE


@dataclass(frozen=True)
class Subject:
    """A recipe or an artifact with its plan, tensors and routers. Each is computed at first use and kept.

    `dtype` is the type to store weights in, by default the recipe's. `cache` allows fitted routers to be read from and
    written to the user's cache. `trust_remote_code` allows Python code found in a source to run. `maker` makes the
    routers instead of the recipe's gate mode. `known` is a plan of the same recipe and dtype to use again.
    `experts_per_token` replaces the recipe's number where the model runs or is exported; PlanError if there are fewer.
    """

    what: Recipe | Artifact
    dtype: str | None = None
    cache: bool = True
    trust_remote_code: bool = False
    maker: RouterMaker | None = field(default=None, repr=False)
    known: Plan | None = field(default=None, repr=False)
    experts_per_token: int | None = None
    _made: dict[object, MadeRouters] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        experts = len(self.what.record["experts"] if isinstance(self.what, Artifact) else self.what.experts)
        used = self.experts_per_token
        if used is not None and not (isinstance(used, int) and 1 <= used <= experts):
            raise PlanError(
                f"{self.origin} has {counted(experts, 'expert')}, found {used!r} experts per token",
                hint=f"choose a number from 1 to {experts}; its own is {self.own_experts_per_token}",
            )

    @property
    def own_experts_per_token(self) -> int:
        """The number in the recipe or the record, which `experts_per_token` may replace."""
        return int(self.artifact.record["experts_per_token"] if self.artifact else self.recipe.experts_per_token)

    @property
    def artifact(self) -> Artifact | None:
        return self.what if isinstance(self.what, Artifact) else None

    def need_artifact(self, *, hint: str) -> Artifact:
        """The artifact. Raises PlanError with this hint for a recipe."""
        if not isinstance(self.what, Artifact):
            if kind_of(self.origin) == "mixture":
                raise PlanError(
                    f"{self.origin} is a mixture of another program, expected an artifact",
                    hint=f"frankenmoe adopt {self.origin}",
                )
            raise PlanError(f"{self.origin} is a recipe, expected an artifact", hint=hint)
        return self.what

    @property
    def built(self) -> bool:
        """Whether this is a built artifact, which does not need its sources."""
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
        """The name in the recipe or the record, by default that of the file or folder."""
        if isinstance(self.what, Artifact):
            return self.what.record.get("name") or self.what.folder.resolve().name
        return self.what.name or Path(self.what.origin).stem

    @property
    def kind(self) -> str:
        """One of "recipe", "virtual artifact" and "built artifact"."""
        return f"{self.what.form} artifact" if isinstance(self.what, Artifact) else "recipe"

    @cached_property
    def plan(self) -> Plan:
        """The plan, with an explicit backbone; `resolved` shows progress if that must be measured first.

        Raises ArtifactError if an artifact's sources are missing or have changed.
        """
        return self._resolve(SILENT)

    def resolved(self, progress: Progress = SILENT, *, device: str = "auto") -> "Subject":
        """This subject, after what takes time before the plan is known: `as_adapter`, `backbone` auto and regmean.

        Backbones are measured on `device`. All processes of a launcher call this; the first one does the work, unless
        the plan is `known` already.
        """
        if "plan" not in self.__dict__:
            together = self.known is None
            with main_first() if together else nullcontext():  # which extracts, for the others to find it in the cache
                _ = self._extracted(progress)
            self.__dict__["plan"] = self._resolve(progress, device, together=together)  # where cached_property keeps it
        return self

    @property
    def settled(self) -> bool:
        """Whether `plan` is known, or can be made without running a model and without extracting adapters."""
        return "plan" in self.__dict__ or not (self.planned.backbone_open or not self.planned.all_extracted)

    def _resolve(self, progress: Progress, device: str = "auto", *, together: bool = False) -> Plan:
        _ = self._text if self.planned.backbone_open else None
        made = self._extracted(progress)
        made = backbone.resolve(made, cache=self.cache, together=together, device=device, progress=progress)
        _ = made.digest  # asked for now, so that a later change of the sources is noticed
        return made

    def _extracted(self, progress: Progress) -> Plan:
        """The plan with every `as_adapter` extracted."""
        made = self.planned
        if made.all_extracted:
            return made
        return plan(
            made.recipe,
            dtype=made.dtype_name,
            weights=True,
            trust_remote_code=self.trust_remote_code,
            progress=progress,
        )

    @cached_property
    def planned(self) -> Plan:
        """The plan of the recipe as written. Runs no model and extracts nothing, so its backbone may be open."""
        if isinstance(self.what, Recipe):
            made = self.known or plan(
                self.what,
                dtype=self.dtype,
                weights=True,
                trust_remote_code=self.trust_remote_code,
                extract=False,
            )
        else:
            self._check_dtype(self.what)
            made = plan_of(self.what, known=self.known, trust_remote_code=self.trust_remote_code)
        _ = made.digest  # asked for now, so that a later change of the sources is noticed
        return made

    @cached_property
    def plan_or_none(self) -> Plan | None:
        """The plan; None for a built artifact whose sources are missing or have changed."""
        try:
            return self.plan
        except ArtifactError:
            if self.built:
                return None
            raise

    @cached_property
    def parts(self) -> Parts:
        """The tensors: a built artifact's own, otherwise those of the sources. The gates of a recipe are zeros."""
        artifact = self.artifact
        made = parts_of_built(artifact) if artifact and self.built else parts_of_plan(self.plan)
        if artifact and not self.built:
            made = made.with_gates(artifact.routers)
        return replace(made, top_k=self.experts_per_token or made.top_k)

    def routers(self, progress: Progress = SILENT, *, device: str = "auto") -> MadeRouters:
        """Every gate: read from the artifact, or made as the recipe says; again if its file or text has changed.

        A model that must run for them runs on `device`.
        """
        if not self.built:
            self.resolved(progress, device=device)
        state = self._state_of_routers()
        if state not in self._made:
            self._made.clear()
            self._made[state] = self._make(progress, device)
        return self._made[state]

    def _state_of_routers(self) -> object:
        if self.maker is not None:
            return None
        if isinstance(self.what, Recipe):
            return key_of(self.plan)
        status = (self.what.folder / ROUTERS).stat()
        return status.st_size, status.st_mtime_ns, status.st_ino

    def current(self) -> "Subject":
        """This subject, or a new one if its artifact's record or its sources have changed on disk."""
        what = self.what
        if isinstance(what, Artifact):
            now = open_artifact(what.folder)
            what = what if now.record == what.record else now
        planned = self.__dict__.get("planned")
        if what is self.what and (planned is None or self._fresh(planned)):
            return self
        return replace(self, what=what, known=None)

    def _fresh(self, planned: Plan) -> bool:
        """Whether the files of the plan have not changed, nor the text that its backbone was measured on."""
        measured = planned.backbone_open and "plan" in self.__dict__
        return planned.digest_now() == planned.digest and (not measured or backbone.key_of(planned) == self._text)

    @cached_property
    def _text(self) -> str | None:
        """The state of plan and text when the backbone was measured."""
        return backbone.key_of(self.planned)

    def _make(self, progress: Progress, device: str) -> MadeRouters:
        if self.maker is not None:
            return self.maker(self.plan, progress)
        if isinstance(self.what, Artifact):
            return artifact_routers(self.what, None if self.built else self.plan)
        return make_routers(self.plan, progress, cache=self.cache, device=device)

    def load(
        self,
        *,
        dtype: str | None = None,
        device: str = "cpu",
        int8: bool = False,
        by_layer: bool = False,
        progress: Progress = SILENT,
        **options: Any,
    ) -> "MoE":
        """A running MoE. Makes a recipe's routers first; writes nothing except the cache of routers.

        `dtype` (float32, bfloat16, float16) converts the weights; by default they stay mapped as stored. `device` is a
        name of torch's, or auto for a GPU if there is one. `int8` rounds every linear layer to 8 bits in memory, for
        inference: half the memory of 16 bits, slightly different logits. `by_layer` allows a device that cannot hold
        the model: its layers are brought there one by one. `options` are those of MoEBlock: capacity_factor,
        drop_policy. Raises PlanError if there is no such device or its memory is too small.
        """
        if dtype is not None:
            _stored(dtype)
        if not isinstance(self.what, Artifact):
            check_buildable(self.planned, virtual=True, allow_identical=True)
            self.resolved(progress, device=device)
        import torch

        from frankenmoe.moe.bylayer import placed
        from frankenmoe.moe.dense import as_tensor
        from frankenmoe.moe.device import CPU, check_room, place, resolve
        from frankenmoe.moe.linear import to_int8
        from frankenmoe.moe.load import gate_tensors, load_parts, weights_of

        chosen, wanted = resolve(device), getattr(torch, dtype) if dtype else None
        parts = self.parts if self.built else sharing_equal_experts(self.parts, self.plan)
        check_room(weights_of(parts), CPU if by_layer else chosen, dtype=wanted, int8=int8)
        if self.artifact and self.maker is None:
            gates = {name: as_tensor(write) for name, write in parts.gates.items()}
        else:
            gates = dict(gate_tensors(self.routers(progress, device=device).routers))
        moe = load_parts(parts, gates, dtype=wanted, device=CPU if int8 or by_layer else chosen, **options)
        if int8:
            to_int8(moe.model, progress)
            place(moe.model, chosen)
        if by_layer:
            placed(moe.model, chosen)
        return moe

    def with_maker(self, maker: RouterMaker) -> "Subject":
        """The same subject, but `maker` makes its routers."""
        return replace(self, maker=maker, known=self.plan)

    def _check_dtype(self, artifact: Artifact) -> None:
        stored = artifact.record["dtype"]
        if self.dtype is not None and _stored(self.dtype) != safetensors_dtype(stored):
            raise ArtifactError(
                f"{artifact.folder} has dtype {stored}, found --dtype {self.dtype}",
                hint="an artifact keeps its dtype; build from the recipe to choose another",
            )


def _stored(dtype: str) -> str:
    """The safetensors name of a type. PlanError for a type that cannot be stored."""
    try:
        return safetensors_dtype(dtype)
    except (ValueError, TypeError):
        raise PlanError(
            f"dtype must be float32, bfloat16 or float16, found {dtype!r}", hint="leave it out for the recipe's type"
        ) from None


@dataclass(frozen=True)
class Dense:
    """A dense model to compare with: `folder` holds its checkpoint."""

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
    experts_per_token: int | None = None,
) -> Subject:
    """Opens a recipe or an artifact, given as an object or as a path.

    A Subject is returned unchanged, except for a new `dtype` or `experts_per_token`, or if its files have changed on
    disk. The plan of `like` is used again if it is of the same recipe and dtype. Raises RecipeError or ArtifactError
    for a path that is neither.
    """
    if isinstance(what, Subject):
        if dtype is not None and dtype != what.dtype:
            what = replace(what, dtype=dtype, known=None)
        if experts_per_token is not None:
            what = replace(what, experts_per_token=experts_per_token)
        return what.current()
    if not isinstance(what, Recipe | Artifact | str | Path):
        raise RecipeError(
            f"expected a recipe, an artifact or a path, found {what!r}"[:200], hint="open one by its path"
        )
    if isinstance(what, str | Path):
        what = _opened(str(what))
    known = like.plan if like and isinstance(what, Artifact) and same_plan(what, like) else None
    return Subject(what, dtype, cache, trust_remote_code, known=known, experts_per_token=experts_per_token)


def _opened(what: str) -> Recipe | Artifact:
    match kind_of(what):
        case "recipe":
            return Recipe.load(what)
        case "mixture":
            return recipe_of_mixture(what, mixture_in(what))
    return open_artifact(Path(what))


def same_plan(artifact: Artifact, like: Subject) -> bool:
    """Whether an artifact was made from the recipe of a subject, with the same dtype."""
    record = artifact.record
    if not like.settled:
        return False
    recipe = like.recipe if like.artifact else like.plan.recipe  # which says what `backbone: auto` means
    return bool(record["recipe_digest"] == recipe.digest and record["dtype"] == like.plan.dtype_name)


def open_model(what: str | Path, *, trust_remote_code: bool = False, **options: Any) -> Subject | Dense:
    """Like `open_subject`, but also opens a dense model: a folder or a hub id (with @revision), without `options`."""
    if kind_of(what) not in ("dense", "mixture"):
        return open_subject(what, trust_remote_code=trust_remote_code, **options)
    name, _, revision = str(what).partition("@") if not Path(what).exists() else (str(what), "", "")
    folder = resolve(name, revision=revision or None, folder=Path.cwd())
    read_object(folder / "config.json", hint="name an artifact, a recipe, or the folder or hub id of a model")
    return Dense(str(what), folder, trust_remote_code)


def load(
    what: "Subject | Recipe | Artifact | str | Path",
    *,
    dtype: str | None = None,
    device: str = "cpu",
    int8: bool = False,
    progress: Progress = SILENT,
    **options: Any,
) -> "MoE":
    """A running MoE from a recipe or an artifact, by default on the CPU, as transformers loads it; see Subject.load."""
    return open_subject(what).load(dtype=dtype, device=device, int8=int8, progress=progress, **options)
