"""Chooses the MoE format of a recipe and lists its tensors in byte order."""

from dataclasses import replace

from frankenmoe.checkpoint.tensors import Constant, Scale, TensorWrite, safetensors_dtype
from frankenmoe.errors import PlanError
from frankenmoe.families import FAMILIES, FORMATS, Family, MoEFormat, rope
from frankenmoe.families.formats import FFN_SUFFIXES
from frankenmoe.planning.sources import Source
from frankenmoe.planning.tree import ExpertNode
from frankenmoe.recipe import Recipe
from frankenmoe.suggest import did_you_mean

# increased when a release writes other bytes for the same recipe, so that no build resumes with mixed layouts
LAYOUT_VERSION = 2
RouterPath = tuple[int, ...]
"""The way to an expert, or to the router above experts: one number per level of nesting, from 0; () is outermost."""

# the path of the shared expert
SHARED: RouterPath = (-1,)
# rotary types that DeepSeek-MoE v1's own code supports
DEEPSEEK_ROPE = ("default", "linear", "dynamic")


def choose_format(recipe: Recipe, base: Source) -> tuple[MoEFormat | None, tuple[str, ...]]:
    """The format to build, and the reasons why it cannot be built; (None, reasons) where no format fits.

    Follows mergekit: Mixtral where it fits, DeepSeek-MoE for a shared expert without prompts, Qwen-MoE for one with.
    """
    family = base.family
    if family is None:
        return None, (
            f"{base.config.get('model_type')!r} has no MoE format to build; families that have one: "
            f"{', '.join(FAMILIES)}",
        )
    if any(expert.experts for expert in recipe.experts):
        return None, ("no stock MoE format has nested experts",)
    fitting = [fmt for fmt in _asked(recipe) if family.model_type in fmt.families]
    if not fitting:
        return None, (f"architecture {recipe.architecture} cannot be built from {family.model_type}",)
    chosen = next((fmt for fmt in fitting if not _unshareable(fmt, recipe)), fitting[0])
    problems = (*_unshareable(chosen, recipe), *_unsupported(chosen, base, family))
    others = [fmt for fmt in FORMATS.values() if family.model_type in fmt.families and fmt is not chosen]
    able = [fmt.title for fmt in others if not _unshareable(fmt, recipe) and not _unsupported(fmt, base, family)]
    # suggested, never chosen silently: other programs load another format
    return chosen, (*problems, f"architecture: {able[0]} supports it") if problems and able else problems


def _asked(recipe: Recipe) -> list[MoEFormat]:
    """The formats that a recipe's `architecture` allows: mergekit's prefix of a title, or our name."""
    if recipe.architecture is None:
        return list(FORMATS.values())
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
    found = []
    for rule in fmt.rules:
        value = family.value(base.config, rule.field)
        if value not in rule.allowed:
            found.append(f"{base.name} has {rule.field} {value}, which {fmt.title} does not support: {rule.why}")
    rotary = rope(family, base.config)
    if any(isinstance(value, dict) for value in rotary.values()):
        found.append(f"{base.name} has rotary settings per layer type, but {fmt.title} has one for all layers")
    if fmt.name == "deepseek":
        dims = family.dims(base.config)
        if rotary["rope_type"] not in DEEPSEEK_ROPE:
            found.append(f"{base.name} has rope scaling {rotary['rope_type']!r}, DeepSeek MoE supports {DEEPSEEK_ROPE}")
        if dims.head_dim * dims.heads != dims.hidden:
            found.append(f"{base.name} has head_dim {dims.head_dim}, DeepSeek MoE requires hidden size / heads")
    return tuple(found)


def expert_conflicts(base: Source, nodes: tuple[ExpertNode, ...], shared: tuple[ExpertNode, ...]) -> tuple[str, ...]:
    """A clause for every expert whose activation or FFN bias differs: a built format has one for all experts."""
    found = []
    family = base.family
    assert family is not None
    for leaf in (leaf for node in (*nodes, *shared) for leaf in node.leaves()):
        assert leaf.source is not None
        for source, key in ((source, key) for source in leaf.source.singles for key in ("hidden_act", "mlp_bias")):
            ours, theirs = family.value(base.config, key), family.value(source.config, key)
            if (ours or False) != (theirs or False):
                found.append(f"expert {leaf.name} has {key} {theirs}, the base {ours}; a built MoE has one for all")
    return tuple(dict.fromkeys(found))


def format_notes(fmt: MoEFormat, base: Source, family: Family, *, experts: int, recipe: Recipe) -> list[str]:
    """Warnings about how other programs compute this format, where they apply to this recipe."""
    rope_type, top_k = rope(family, base.config)["rope_type"], recipe.experts_per_token
    renormalized = top_k < experts and (top_k > 1 or fmt.renormalizes_top1)
    return [
        f"{fmt.title}: {note.text}"
        for note in fmt.notes
        if note.rope in (None, rope_type) and (renormalized or not note.renormalizing)
    ]


def router_shapes(
    fmt: MoEFormat | None,
    *,
    layers: int,
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
        zip(router_names(fmt, layers=layers, path=path), [width] * layers, strict=True)
        for path, width in widths.items()
    ]
    return {name: (width, hidden) for row in zip(*named, strict=True) for name, width in row}


def router_names(fmt: MoEFormat | None, *, layers: int, path: tuple[int, ...]) -> tuple[str, ...]:
    """Per layer `...mlp.gate.weight` for the outer router, `...mlp.experts.2.experts.0.gate.weight` for path (2, 0)."""
    naming = fmt or FORMATS["qwen2_moe"]
    if path == SHARED:
        template = naming.shared_gate or FORMATS["qwen2_moe"].shared_gate
        assert template is not None
    else:
        nested = "".join(f"experts.{index}." for index in path)
        template = naming.gate.replace("gate.weight", f"{nested}gate.weight")
    return tuple(template.format(layer=layer) for layer in range(layers))


def gate_paths(nodes: tuple[ExpertNode, ...], path: tuple[int, ...] = ()) -> dict[tuple[int, ...], int]:
    """Path of every router -> its number of experts."""
    found = {path: len(nodes)}
    for node in nodes:
        if node.children:
            found |= gate_paths(node.children, node.path)
    return found


def built_writes(
    fmt: MoEFormat,
    *,
    family: Family,
    base: Source,
    backbone: tuple[TensorWrite, ...],
    nodes: tuple[ExpertNode, ...],
    shared: tuple[ExpertNode, ...],
    gated_shared: bool,
    dtype: str,
) -> tuple[tuple[TensorWrite, ...], ...]:
    """Every tensor of the body in byte order, in groups that should stay in one shard.

    First the backbone, then per layer the experts: gate and up of every expert, then all downs. So a layer's bytes are
    those of a packed (experts, 2 x FFN, hidden) parameter, which a loader may map directly.
    """
    dims = family.dims(base.config)
    present = {write.name for write in backbone}
    added = tuple(
        _zeros(spec.name.format(layer=layer), tuple(map(dims.size, spec.shape)), dtype)
        for layer in range(dims.layers)
        for spec in fmt.added
        if spec.name.format(layer=layer) not in present
    )
    groups: list[tuple[TensorWrite, ...]] = [(write,) for write in (*backbone, *added)]
    gate_up, down = FFN_SUFFIXES[:2], FFN_SUFFIXES[2:]
    for layer in range(dims.layers):
        groups.append(
            tuple(
                replace(node.folded(layer, suffix), name=fmt.expert[suffix].format(layer=layer, expert=index))
                for suffixes in (gate_up, down)
                for index, node in enumerate(nodes)
                for suffix in suffixes
            )
        )
        if fmt.max_shared and (shared or fmt.inert_shared_ffn):
            groups.append(_shared_writes(fmt, layer, shared, hidden=dims.hidden, gated=gated_shared, dtype=dtype))
    return tuple(groups)


def _shared_writes(
    fmt: MoEFormat, layer: int, shared: tuple[ExpertNode, ...], *, hidden: int, gated: bool, dtype: str
) -> tuple[TensorWrite, ...]:
    """The shared expert's tensors; where the recipe has none, zeros of the smallest width that the format allows.

    An ungated expert in a format that always gates: the gate is about 0, so sigmoid gives one half, and the down
    projection is doubled, which is exact in binary floats.
    """
    if not shared:
        assert fmt.inert_shared_ffn is not None
        wide, narrow = (fmt.inert_shared_ffn, hidden), (hidden, fmt.inert_shared_ffn)
        writes = tuple(
            _zeros(name.format(layer=layer), narrow if suffix.startswith("down") else wide, dtype)
            for suffix, name in fmt.shared.items()
        )
    else:
        doubled = fmt.shared_gate is not None and not gated
        writes = tuple(
            _named(shared[0].folded(layer, suffix), name.format(layer=layer), doubled and suffix.startswith("down"))
            for suffix, name in fmt.shared.items()
        )
    if fmt.shared_gate is not None and not gated:
        # not zero itself: llama.cpp computes a sigmoid as silu(x) / x, which is NaN there
        nearly_zero = Constant(2.0**-24 if dtype == "F16" else 2.0**-60)
        name = fmt.shared_gate.format(layer=layer)
        writes = (*writes, TensorWrite(name=name, dtype=dtype, shape=(1, hidden), inputs=(), steps=(nearly_zero,)))
    return writes


def _named(write: TensorWrite, name: str, doubled: bool) -> TensorWrite:
    return replace(write, name=name, steps=(*write.steps, Scale(2.0)) if doubled else write.steps)


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
