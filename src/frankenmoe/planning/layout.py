"""Which MoE format a recipe becomes, what that format cannot say, and every tensor it holds in byte order."""

from dataclasses import replace

from frankenmoe.checkpoint.tensors import Constant, Scale, TensorWrite
from frankenmoe.errors import PlanError
from frankenmoe.families import FAMILIES, FORMATS, Family, MoEFormat, rope
from frankenmoe.families.formats import FFN_SUFFIXES
from frankenmoe.planning.sources import Source
from frankenmoe.planning.tree import ExpertNode
from frankenmoe.recipe import Recipe
from frankenmoe.suggest import did_you_mean

# raised whenever the same recipe and sources would give other bytes than before, so that no build goes on halfway
LAYOUT_VERSION = 2
# the path of the shared expert, beside those of the routed ones
SHARED = (-1,)
# rotary types that DeepSeek-MoE v1's own code knows
DEEPSEEK_ROPE = ("default", "linear", "dynamic")


def choose_format(recipe: Recipe, base: Source) -> tuple[MoEFormat | None, tuple[str, ...]]:
    """The format to build and the reasons why it cannot be built; (None, reasons) where no format fits at all.

    Follows mergekit: Mixtral where it fits, DeepSeek-MoE for a shared expert without prompts, Qwen-MoE for one with.
    """
    family = base.family
    if family is None:
        return None, (
            f"{base.config.get('model_type')!r} has no MoE format to build; families that have one: "
            f"{', '.join(FAMILIES)}",
        )
    if any(expert.experts for expert in recipe.experts):
        return None, ("an expert that is an MoE itself has no words in any stock MoE format",)
    fitting = [fmt for fmt in _asked(recipe) if family.model_type in fmt.families]
    if not fitting:
        return None, (f"architecture {recipe.architecture} cannot be built from {family.model_type}",)
    chosen = next((fmt for fmt in fitting if not _cannot_share(fmt, recipe)), fitting[0])
    problems = (*_cannot_share(chosen, recipe), *_cannot_say(chosen, base, family))
    others = [fmt for fmt in FORMATS.values() if family.model_type in fmt.families and fmt is not chosen]
    able = [fmt.title for fmt in others if not _cannot_share(fmt, recipe) and not _cannot_say(fmt, base, family)]
    # never chosen silently: another format is loaded by other programs
    return chosen, (*problems, f"architecture: {able[0]} could say it") if problems and able else problems


def _asked(recipe: Recipe) -> list[MoEFormat]:
    """The formats a recipe's `architecture` means: mergekit's prefix of a title, or our own name."""
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


def _cannot_share(fmt: MoEFormat, recipe: Recipe) -> tuple[str, ...]:
    """What the recipe wants of shared experts and this format does not have."""
    shared = recipe.shared_experts
    if len(shared) > fmt.max_shared:
        return (f"{fmt.title} holds {fmt.max_shared} shared experts at most, the recipe asks for {len(shared)}",)
    if shared and shared[0].positive_prompts and fmt.shared_gate is None:
        return (f"{fmt.title} cannot gate its shared expert, and the recipe gives it prompts",)
    return ()


def _cannot_say(fmt: MoEFormat, base: Source, family: Family) -> tuple[str, ...]:
    """Everything in the base's config that this format has no words for, a clause each."""
    found = []
    for rule in fmt.rules:
        value = family.value(base.config, rule.field)
        if value not in rule.allowed:
            found.append(f"{base.name} has {rule.field} {value}, and {fmt.title} cannot say that: {rule.why}")
    rotary = rope(family, base.config)
    if any(isinstance(value, dict) for value in rotary.values()):
        found.append(f"{base.name} has rotary settings per layer type, and {fmt.title} has one for all layers")
    if fmt.name == "deepseek":
        dims = family.dims(base.config)
        if rotary["rope_type"] not in DEEPSEEK_ROPE:
            found.append(f"{base.name} has rope scaling {rotary['rope_type']!r}, DeepSeek MoE knows {DEEPSEEK_ROPE}")
        if dims.head_dim * dims.heads != dims.hidden:
            found.append(f"{base.name} has head_dim {dims.head_dim}, DeepSeek MoE only knows hidden size / heads")
    return tuple(found)


def expert_conflicts(base: Source, nodes: tuple[ExpertNode, ...], shared: tuple[ExpertNode, ...]) -> tuple[str, ...]:
    """What experts compute with that a built format shares among all of them: the activation and FFN biases."""
    found = []
    family = base.family
    assert family is not None
    for leaf in (leaf for node in (*nodes, *shared) for leaf in node.leaves()):
        source = leaf.source
        assert source is not None
        for key in ("hidden_act", "mlp_bias"):
            ours, theirs = family.value(base.config, key), family.value(source.config, key)
            if (ours or False) != (theirs or False):
                found.append(f"expert {leaf.name} has {key} {theirs}, the base {ours}; a built MoE has one for all")
    return tuple(found)


def format_notes(fmt: MoEFormat, base: Source, family: Family, *, experts: int, recipe: Recipe) -> list[str]:
    """What other programs make of this format that a person should know, where it concerns this recipe."""
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
    """Name -> (experts, hidden) of every gate, as they stand in model-routers.safetensors.

    A router nested in expert 2 is `...experts.2.gate.weight` below its parent's block. Where no stock format exists
    the names are those of Qwen-MoE. A gated shared expert has a row of its own.
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
    """Path of every router -> how many experts it chooses among."""
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
    """Every tensor of the body in byte order, in groups that a shard border should not cut.

    First the backbone, then layer by layer the experts: gate and up of one expert after the other, then their downs.
    In that order the bytes of a layer are what a packed (experts, 2 x FFN, hidden) parameter holds, so that a loader
    may map them as such while every other reader sees ordinary names.
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
    """The shared expert: its own matrices, or zeros as narrow as the format allows where the recipe has none.

    A format that always gates can still say "ungated": sigmoid(0) is one half, and doubling the down projection is
    exact in every binary float type.
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
