"""Chooses the MoE format of a recipe and lists its tensors in byte order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from frankenmoe.checkpoint.tensors import Constant, Scale, TensorWrite, safetensors_dtype
from frankenmoe.errors import PlanError
from frankenmoe.families import FORMATS, SOFTMAX, Family, MoEFormat, is_neutral, rope, unsupported, why_virtual
from frankenmoe.families.places import generic_name
from frankenmoe.families.spec import RouterRule
from frankenmoe.families.words import DOWN
from frankenmoe.planning.sources import Source
from frankenmoe.planning.translate import Translation, joined, turned
from frankenmoe.planning.tree import ExpertNode
from frankenmoe.recipe import RANDOM_MODES, Recipe
from frankenmoe.recipe.gatemodes import KEPT
from frankenmoe.suggest import did_you_mean

# increased when a release writes other bytes for the same recipe, so that no build resumes with mixed layouts
LAYOUT_VERSION = 2
RouterPath = tuple[int, ...]
"""The way to an expert, or to the router above experts: one number per level of nesting, from 0; () is outermost."""

# the path of the shared expert
SHARED: RouterPath = (-1,)


NO_WEIGHTS = "no weights in"  # how a problem begins that only the sources' files have


def without_weights(sources: Iterable[Source]) -> tuple[str, ...]:
    """The problem of sources that have a config alone."""
    lacking = ", ".join(str(source.name) for source in sources if not source.checkpoint.has_weights)
    return (f"{NO_WEIGHTS} {lacking} (enough for a plan, not for a model)",) if lacking else ()


def misfits(problems: Sequence[str]) -> tuple[str, ...]:
    """The reasons why an MoE cannot be built whatever files its sources have: then it has no sizes as a checkpoint."""
    return tuple(problem for problem in problems if not problem.startswith(NO_WEIGHTS))


def choose_format(recipe: Recipe, base: Source) -> tuple[MoEFormat | None, tuple[str, ...]]:
    """The format to build, and the reasons why it cannot be built; (None, reasons) where no format fits.

    The first format in the order of the table that can represent the base and the recipe; if none can, the first that
    holds the recipe's shared experts, with its reasons.
    """
    family = base.family
    if family is None:
        return None, (why_virtual(str(base.config.get("model_type"))),)
    if any(expert.experts for expert in recipe.experts):
        return None, ("no stock MoE format has nested experts",)
    mixture = base.part.mixture if base.part else None
    asked = [mixture.fmt] if mixture and recipe.architecture is None else _asked(recipe)
    fitting = [fmt for fmt in asked if fmt.takes(family, base.wrapper)]
    if not fitting:
        return None, (f"architecture {recipe.architecture} cannot be built from {base.wrapper or family.model_type}",)
    if recipe.architecture is None and any(fmt.inside for fmt in fitting):
        # a model that reads pictures becomes one of text on request only
        fitting = [fmt for fmt in fitting if fmt.inside]
    fitting.sort(key=lambda fmt: bool(_unshareable(fmt, recipe)))
    problems = {fmt.name: (*_unshareable(fmt, recipe), *_unsupported(fmt, base, family)) for fmt in fitting}
    chosen = next((fmt for fmt in fitting if not problems[fmt.name]), fitting[0])
    reasons = problems[chosen.name]
    if mixture and chosen is not mixture.fmt and not mixture.rule.normalizes:
        reasons += (f"{base.name} does not divide the weights of the chosen experts by their sum, {chosen.title} does",)
    others = [fmt for fmt in FORMATS.values() if fmt.takes(family, base.wrapper) and fmt not in fitting]
    able = [fmt.title for fmt in others if not _unshareable(fmt, recipe) and not _unsupported(fmt, base, family)]
    # a format that the recipe asks for is never replaced silently
    return chosen, (*reasons, f"architecture: {able[0]} supports it") if reasons and able else reasons


def _asked(recipe: Recipe) -> list[MoEFormat]:
    """The formats that a recipe's `architecture` allows: mergekit's prefix of a title, or our name."""
    if recipe.architecture is None:
        return [fmt for fmt in FORMATS.values() if not fmt.on_request]
    asked = recipe.architecture.lower()
    found = [fmt for fmt in FORMATS.values() if fmt.title.lower().startswith(asked) or fmt.name == asked]
    if not found:
        raise PlanError(
            f"architecture {recipe.architecture!r} is not one that can be built: "
            f"{', '.join(fmt.title for fmt in FORMATS.values())}",
            hint=did_you_mean(recipe.architecture, [fmt.title for fmt in FORMATS.values()]),
        )
    return found


def _unshareable(fmt: MoEFormat, recipe: Recipe) -> tuple[str, ...]:
    """The recipe's demands on shared experts that this format cannot meet."""
    shared = recipe.shared_experts
    if len(shared) > fmt.max_shared:
        return (f"{fmt.title} holds {fmt.max_shared} shared experts at most, the recipe asks for {len(shared)}",)
    if shared and shared[0].positive_prompts and fmt.shared_gate is None:
        return (f"{fmt.title} cannot gate its shared expert, and the recipe gives it prompts",)
    return ()


def _unsupported(fmt: MoEFormat, base: Source, family: Family) -> tuple[str, ...]:
    """A clause for every setting in the base's config that this format cannot represent."""
    return tuple(f"{base.name} {clause}" for clause in unsupported(fmt, family, base.config))


def lost_in(stored: str, base: Source) -> tuple[str, ...]:
    """A clause if a built MoE would lose numbers in the stored type."""
    if stored == "F16" and base.family is not None and base.family.wide_range:
        return (f"{base.name} as float16 would lose small numbers of its attention; dtype: bfloat16 keeps them",)
    return ()


def expert_conflicts(to: Translation, nodes: tuple[ExpertNode, ...], shared: tuple[ExpertNode, ...]) -> tuple[str, ...]:
    """A clause for every expert whose activation or FFN bias differs: a built format has one for all experts.

    And one for a shared expert of a width that the format cannot write, as it counts experts side by side.
    """
    found = []
    for leaf in (leaf for node in (*nodes, *shared) for leaf in node.leaves()):
        assert leaf.source is not None
        for source, key in ((source, key) for source in leaf.source.singles for key in ("hidden_act", "mlp_bias")):
            ours, theirs = to.family.read(to.config, key), to.family.read(source.config, key)
            if (ours or False) != (theirs or False):
                found.append(f"expert {leaf.name} has {key} {theirs}, the base {ours}; a built MoE has one for all")
    whole = to.dims.ffn
    for wide in map(to.width, shared):
        if to.fmt.counts_shared and wide % whole:
            found.append(f"{to.fmt.title} has shared experts as wide as others, found widths {wide} and {whole}")
    return tuple(dict.fromkeys(found))


def gates_shared(recipe: Recipe, fmt: MoEFormat | None) -> bool:
    """Whether the shared expert gets a gate: it has prompts, or it can have one that is random or kept."""
    if not recipe.shared_experts:
        return False
    can = fmt is not None and fmt.shared_gate is not None
    return bool(recipe.shared_experts[0].positive_prompts) or (can and recipe.gate_mode in {*RANDOM_MODES, KEPT})


def rule_of(fmt: MoEFormat | None, base: Source) -> RouterRule:
    """How gates become weights: as in the mixture that the base is, if it is one, else as in the format."""
    if base.part is not None and base.part.mixture.fmt is fmt:
        return base.part.mixture.rule
    return SOFTMAX if fmt is None else fmt.router


def format_notes(fmt: MoEFormat, base: Source, family: Family, *, experts: int, recipe: Recipe) -> list[str]:
    """Warnings about how other programs compute this format, where they apply to this recipe."""
    rope_type, top_k = rope(family, base.config)["rope_type"], recipe.experts_per_token
    renormalized = top_k < experts and rule_of(fmt, base).renormalizes(top_k)
    dims = family.dims(base.config)
    free = dims.heads * dims.head_dim != dims.hidden
    return [
        f"{fmt.title}: {note.text}"
        for note in fmt.notes
        if note.rope in (None, rope_type)
        and (renormalized or not note.renormalizing)
        and (free or not note.free_heads)
        and (note.setting is None or not is_neutral(family, base.config, note.setting))
        and note.tied in (None, bool(family.read(base.config, "tie_word_embeddings")))
    ]


def router_shapes(
    fmt: MoEFormat | None,
    *,
    layers: Sequence[int],
    hidden: int,
    nodes: tuple[ExpertNode, ...],
    gated_shared: bool,
) -> dict[str, tuple[int, int]]:
    """Name -> (experts, hidden) of every gate in model-routers.safetensors.

    The router nested in expert 2 is called `...experts.2.gate.weight`. Without a stock format, names are Qwen-MoE's.
    A gated shared expert has a gate with one row.
    """
    widths = gate_paths(nodes) | ({SHARED: 1} if gated_shared else {})
    named = [
        [(name, width) for name in router_names(fmt, layers=layers, path=path).values()]
        for path, width in widths.items()
    ]
    return {name: (width, hidden) for row in zip(*named, strict=True) for name, width in row}


def router_names(fmt: MoEFormat | None, *, layers: Sequence[int], path: tuple[int, ...]) -> dict[int, str]:
    """Layer -> `...mlp.gate.weight` for the outer router, `...mlp.experts.2.experts.0.gate.weight` for path (2, 0)."""
    naming = fmt or FORMATS["qwen2_moe"]
    if path == SHARED:
        template = naming.shared_gate or FORMATS["qwen2_moe"].shared_gate
        assert template is not None
    else:
        nested = "".join(f"experts.{index}." for index in path)
        template = naming.gate.replace("gate.weight", f"{nested}gate.weight")
    return {layer: template.format(layer=layer) for layer in layers}


def gate_paths(nodes: tuple[ExpertNode, ...], path: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
    """Path of every router -> its number of experts."""
    found = {path: len(nodes)}
    for node in nodes:
        if node.children:
            found |= gate_paths(node.children, node.path)
    return found


def built_writes(
    translation: Translation,
    backbone: tuple[TensorWrite, ...],
    nodes: tuple[ExpertNode, ...],
    shared: tuple[ExpertNode, ...],
    *,
    gated_shared: bool,
    dtype: str,
) -> tuple[tuple[TensorWrite, ...], ...]:
    """Every tensor of the body in byte order, in groups that should stay in one shard.

    First the backbone, then per layer the experts: gate and up of every expert, then all downs. So a layer's bytes are
    those of a packed (experts, 2 x FFN, hidden) parameter, which a loader may map directly.
    """
    fmt = translation.fmt
    groups: list[tuple[TensorWrite, ...]] = [(write,) for write in translation.backbone(backbone)]
    for layer in translation.layers:
        groups.append(tuple(_expert_writes(fmt, [translation.ffn(node, layer) for node in nodes], layer)))
        if fmt.shared and (shared or fmt.inert_shared_ffn is not None):
            groups.append(_shared_writes(translation, layer, shared, gated=gated_shared, dtype=dtype))
    layers, idle = translation.dims.layers, fmt.idle_layers(translation.family, translation.config)
    groups += [tuple(_idle_writes(translation, groups, layer, dtype=dtype)) for layer in range(layers, layers + idle)]
    return tuple(groups)


def _idle_writes(
    translation: Translation, groups: list[tuple[TensorWrite, ...]], layer: int, *, dtype: str
) -> Iterator[TensorWrite]:
    """A layer of zeros, shaped like the last one; numbers that the format gives stay. Its norms let nothing through."""
    last = translation.dims.layers - 1
    for write in (write for group in groups for write in group):
        where, generic = generic_name(write.name)
        if where == last:
            steps = (Constant(0.0),) if write.inputs else write.steps
            yield replace(write, name=generic.format(layer=layer), inputs=(), steps=steps)
    gate = translation.fmt.gate.format(layer=layer)
    yield _zeros(gate, (translation.experts, translation.dims.hidden), dtype)


def extra_writes(
    translation: Translation | None,
    groups: tuple[tuple[TensorWrite, ...], ...],
    backbone: tuple[TensorWrite, ...],
    nodes: tuple[ExpertNode, ...],
    shared: tuple[ExpertNode, ...],
    *,
    passed: tuple[TensorWrite, ...],
) -> list[TensorWrite]:
    """Writes that are neither the sources' backbone nor routed experts: the shared expert and what a format adds.

    Those in `passed` are left out.
    """
    if translation is None:
        return [write for node in shared for write in node.folded_writes()]
    given = {translation.fmt.named(write.name) for write in translation.plain(backbone)}
    given |= {write.name for write in passed}
    given |= {
        name.format(layer=layer, expert=index)
        for name in translation.fmt.expert
        for layer in translation.layers
        for index in range(len(nodes))
    }
    return [write for group in groups for write in group if write.name not in given]


def _expert_writes(fmt: MoEFormat, rows: list[dict[str, TensorWrite]], layer: int) -> Iterator[TensorWrite]:
    """The experts of a layer, from the plain matrices of each."""
    first = {name: suffixes for name, suffixes in fmt.expert.items() if suffixes != DOWN}
    for names in (first, {name: suffixes for name, suffixes in fmt.expert.items() if name not in first}):
        for index, row in enumerate(rows):
            for name, suffixes in names.items():
                if "{expert}" in name:
                    yield _stacked([row[suffix] for suffix in suffixes], name.format(layer=layer, expert=index))
        for name, suffixes in names.items():
            if "{expert}" not in name:
                matrices = [row[suffix] for row in rows for suffix in suffixes]
                if fmt.turned:
                    matrices = [turned([row[suffix] for suffix in suffixes]) for row in rows]
                yield joined(name.format(layer=layer), matrices, experts=len(rows))


def _stacked(matrices: list[TensorWrite], name: str) -> TensorWrite:
    return replace(matrices[0], name=name) if len(matrices) == 1 else joined(name, matrices)


def _shared_writes(
    translation: Translation, layer: int, shared: tuple[ExpertNode, ...], *, gated: bool, dtype: str
) -> tuple[TensorWrite, ...]:
    """The shared expert's tensors; where the recipe has none, zeros of the smallest width that the format allows.

    An ungated expert in a format that always gates: the gate is about 0, so sigmoid gives one half, and the down
    projection is doubled, which is exact in binary floats.
    """
    fmt, hidden = translation.fmt, translation.dims.hidden
    half = fmt.shared_gate is not None and not gated
    row = translation.ffn(shared[0], layer) if shared else {}
    writes = []
    for name, suffixes in fmt.shared.items():
        name = name.format(layer=layer)
        if shared:
            write = _stacked([row[suffix] for suffix in suffixes], name)
            doubled = half and suffixes == DOWN
            writes.append(replace(write, steps=(*write.steps, Scale(2.0))) if doubled else write)
        else:
            assert fmt.inert_shared_ffn is not None
            wide = fmt.inert_shared_ffn * len(suffixes)
            writes.append(_zeros(name, (hidden, wide) if suffixes == DOWN else (wide, hidden), dtype))
    if half:
        assert fmt.shared_gate is not None
        # not zero itself: llama.cpp computes a sigmoid as silu(x) / x, which is NaN there
        nearly_zero = Constant(2.0**-24 if dtype == "F16" else 2.0**-60)
        name = fmt.shared_gate.format(layer=layer)
        writes.append(TensorWrite(name=name, dtype=dtype, shape=(1, hidden), inputs=(), steps=(nearly_zero,)))
    return tuple(writes)


def _zeros(name: str, shape: tuple[int, ...], dtype: str) -> TensorWrite:
    return TensorWrite(name=name, dtype=dtype, shape=shape, inputs=(), steps=(Constant(0.0),))


def stored_dtype(name: str) -> str:
    """The safetensors type of a name such as bfloat16. PlanError for an unsupported one."""
    try:
        found = safetensors_dtype(name)
    except ValueError:
        found = name
    if found not in ("F32", "F16", "BF16"):
        raise PlanError(
            f"an MoE cannot be stored with dtype {name}, expected float32, float16 or bfloat16",
            hint="write dtype: bfloat16 in the recipe",
        )
    return found
