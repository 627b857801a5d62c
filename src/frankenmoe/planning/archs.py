"""Which of llama.cpp's architectures computes an MoE, or why none does.

Reads no weights. Does not import torch or gguf.
"""

from collections.abc import Iterator, Mapping

from frankenmoe.errors import PlanError
from frankenmoe.families import is_neutral, rope
from frankenmoe.families.archkeys import Facts, multipliers
from frankenmoe.families.archs import ARCHS, MAX_EXPERTS, Arch
from frankenmoe.families.places import generic_name
from frankenmoe.planning.parts import Parts

# these override the attention factor computed from `factor`
OWN_YARN = ("attention_factor", "mscale", "mscale_all_dim")


def choose_arch(model: Parts, name: str | None = None) -> Arch:
    """The first architecture, or the one of that name, that computes exactly this MoE. PlanError if there is none."""
    reasons = list(_cannot(model))
    facts, names = facts_of(model), _plain_names(model)
    able = (arch for arch in ARCHS if model.stock[0].name in arch.formats and name in (None, arch.name))
    found = [(arch, list(_differences(arch, model, facts, names))) for arch in able]
    exact = next((arch for arch, odd in found if not odd), None)
    if exact and not reasons:
        return exact
    fewest = min((len(odd) for _, odd in found), default=0)
    near = [f"its {arch.name} {', '.join(odd)}" for arch, odd in found if odd and len(odd) == fewest]
    raise PlanError(
        f"llama.cpp does not support this MoE: {'; '.join((*reasons, *near))}",
        hint="chat, audit and eval run it; `frankenmoe build` writes it for transformers and vLLM",
    )


def _cannot(model: Parts) -> Iterator[str]:
    """A clause for everything that no architecture has."""
    fmt, family = model.stock
    if fmt.no_gguf:
        yield fmt.no_gguf
    if len(model.nodes) > MAX_EXPERTS:
        yield f"it allows {MAX_EXPERTS} experts, found {len(model.nodes)}"
    rotary = rope(family, model.config)
    if rotary["rope_type"] == "yarn":
        for key in OWN_YARN:
            if rotary.get(key) is not None:
                yield f"its yarn has no {key} {rotary[key]!r}"
        if rotary.get("truncate") is False:
            yield "its yarn always rounds its range (truncate: false is not supported)"


def _plain_names(model: Parts) -> dict[str, str]:
    """Plain name with `{layer}` -> the name of the first such tensor of the backbone."""
    found: dict[str, str] = {}
    for write in model.translation.plain(model.backbone):
        found.setdefault(generic_name(write.name)[1], write.name)
    return found


def _differences(arch: Arch, model: Parts, facts: Facts, names: Mapping[str, str]) -> Iterator[str]:
    """A clause, which follows the architecture's name, for everything that it computes otherwise.

    `names` are those of `_plain_names`.
    """
    family, dims = facts.family, facts.dims
    activation = family.read(model.config, "hidden_act")
    if activation != arch.activation:
        yield f"has experts with {arch.activation} only, found {activation}"
    if model.normalizes not in (arch.normalizes, None):
        yield f"{'scales' if arch.normalizes else 'does not scale'} the weights of the chosen experts to sum to one"
    if model.shared_kind not in arch.shared:
        kind = model.shared_kind
        yield "has always a shared expert" if kind == "none" else f"has no {kind} shared expert"
    odd = next((name for generic, name in names.items() if generic not in arch.places), None)
    if odd:
        yield f"has no place for {odd}"
    missing = next((generic for generic in arch.needs if generic not in names), None)
    if missing:
        yield f"needs {missing}"
    scaled = multipliers(family, model.config)
    if scaled and not arch.multipliers:
        yield f"has no multipliers, found {next(iter(scaled))}"
    if not arch.free_heads and dims.heads * dims.head_dim != dims.hidden:
        yield f"needs heads of hidden size / heads, found head_dim {dims.head_dim}"
    if not arch.windows and not is_neutral(family, model.config, "sliding_window"):
        yield f"has no sliding window, found {family.read(model.config, 'sliding_window')}"
    if not arch.unrotated and not is_neutral(family, model.config, "no_rope_layers"):
        yield "rotates in every layer"
    rotary = rope(family, model.config)
    if rotary["rope_type"] not in arch.ropes:
        yield f"has no rope scaling {rotary['rope_type']!r}"
    if "partial_rotary_factor" in rotary and not arch.partial_rotary:
        yield f"rotates whole heads, found partial_rotary_factor {rotary['partial_rotary_factor']}"
    if not dims.cached:  # llama.cpp aborts without a cache of keys
        yield "needs a layer with attention"
    lacks = arch.lacks(facts)
    if lacks:
        yield lacks


def sizes(model: Parts) -> dict[str, int]:
    """The hidden size and the widths of an expert and of the shared one, which is 0 if there is none."""
    dims = model.stock[1].dims(model.config)
    shared = model.translation.width(model.shared[0]) if model.shared else 0
    return {"hidden": dims.hidden, "ffn": dims.ffn, "shared_ffn": shared}


def facts_of(model: Parts, wide: Mapping[str, int] | None = None) -> Facts:
    """What metadata tell of an MoE; its sizes in the file may be the larger ones in `wide`."""
    family = model.stock[1]
    own = sizes(model)
    wide = wide or own
    return Facts(
        family=family,
        config=model.config,
        **wide,
        experts=len(model.nodes),
        top_k=model.top_k,
        eps=float(family.read(model.config, "rms_norm_eps")) * own["hidden"] / wide["hidden"],
        outer=model.outer,
    )


def notes_on(arch: Arch, model: Parts) -> tuple[str, ...]:
    """Sentences about harmless differences."""
    family = model.stock[1]
    notes = []
    rotary = rope(family, model.config)
    if rotary["rope_type"] == "longrope":
        notes.append(
            "llama.cpp takes the rotary factors for long texts if its context is set to more than "
            f"{rotary['original_max_position_embeddings']} tokens, the source if a text is longer than that"
        )
    if family.wide_range:
        notes.append(
            f"as {arch.name}, {family.model_type} has values too small for llama.cpp's usual cache in float16: "
            "run the file with --cache-type-v bf16"
        )
    if arch.inert == "ffn" and not model.shared:
        notes.append(f"llama.cpp's {arch.name} always has a shared expert: the file has one of zeros")
    if model.outer is not None:
        notes.append("the file has the text alone: what reads pictures (mmproj) is left out")
    return tuple(notes)
