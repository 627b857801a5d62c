"""Recipe + headers -> Plan: every tensor to write, what stays unused and why, the bill and the warnings.

Reads config.json and safetensors headers only. Writes nothing. Does not import torch.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

from frankenmoe.checkpoint.tensors import TensorWrite
from frankenmoe.errors import PlanError
from frankenmoe.planning.asadapter import extracted_adapters
from frankenmoe.planning.backbone import backbone_writes, choose, lost_differences
from frankenmoe.planning.compare import (
    COMPARE_LIMIT,
    compared_whole,
    identical_groups,
    licence_warnings,
    same_expert,
    source_warnings,
    spare_warnings,
)
from frankenmoe.planning.distance import distances
from frankenmoe.planning.files import check_small_files
from frankenmoe.planning.heads import with_own_head
from frankenmoe.planning.layout import (
    SHARED,
    built_writes,
    choose_format,
    expert_conflicts,
    format_notes,
    gates_shared,
    lost_in,
    misfits,
    router_shapes,
    rule_of,
    stored_dtype,
    without_weights,
)
from frankenmoe.planning.mixture import opened_sources
from frankenmoe.planning.passed import passed_writes
from frankenmoe.planning.plan import Plan
from frankenmoe.planning.siblings import check_ffns, check_siblings
from frankenmoe.planning.sources import Source, anatomy, check_tensors
from frankenmoe.planning.trained import check_used, nodes_with_trained, open_trained, with_trained
from frankenmoe.planning.translate import Translation
from frankenmoe.planning.tree import ExpertNode, expert_nodes, ffn_writes
from frankenmoe.planning.unused import unused_tensors
from frankenmoe.planning.vocabulary import with_rows_of
from frankenmoe.progress import SILENT, Progress
from frankenmoe.recipe import Recipe


def plan(
    recipe: Recipe,
    *,
    dtype: str | None = None,
    weights: bool = False,
    trust_remote_code: bool = False,
    extract: bool = True,
    inside: Path | None = None,
    progress: Progress = SILENT,
) -> Plan:
    """Plans a recipe. `dtype` overrides the recipe's. `weights=True` downloads and requires weights, not only configs.

    With weights and `extract`, adapters of `as_adapter` experts are extracted into the user's cache, unless it or the
    artifact `inside` has them. Raises RecipeError, SourceError or PlanError if not even a virtual MoE is possible.
    """
    opened = opened_sources(recipe, weights=weights, trust_remote_code=trust_remote_code)
    opened = {key: with_own_head(one, limit=None if weights else COMPARE_LIMIT) for key, one in opened.items()}
    base = opened[(str(recipe.base_model), None)]
    opened = {key: with_rows_of(base, one) for key, one in opened.items()}
    check_small_files(base)
    others = [source for source in opened.values() if source is not base]
    check_siblings(base, others)
    parts = {key: (source, anatomy(source)) for key, source in opened.items()}
    for source, found in parts.values():
        check_tensors(source, found)
    base_pair = parts[(str(recipe.base_model), None)]
    base_parts = base_pair[1]
    check_ffns(base_pair, parts.values())
    if len(recipe.shared_experts) > 1:
        raise PlanError(
            f"the recipe has {len(recipe.shared_experts)} shared experts, expected at most one",
            hint="make the others routed experts",
        )
    stored = stored_dtype(dtype or recipe.dtype or base.dtype)
    trained = open_trained(recipe)
    extracted = extracted_adapters(recipe, parts, may=weights and extract, inside=inside, progress=progress)
    adapters = {path: each.adapter for path, each in extracted.items()}
    made_of = partial(expert_nodes, recipe, sources=parts, dtype=stored, extracted=adapters)
    nodes = nodes_with_trained(made_of(experts=recipe.experts), trained)
    shared = nodes_with_trained(made_of(experts=recipe.shared_experts, path=SHARED), trained)
    fmt, problems = choose_format(recipe, base)
    to = Translation(fmt, base.family, base.config, len(nodes)) if fmt is not None and base.family is not None else None
    if to is not None:
        problems = (*problems, *expert_conflicts(to, nodes, shared), *lost_in(stored, base))
    passed = passed_writes(to.fmt, base, dtype=stored) if to is not None else ()
    problems = (*problems, *without_weights(opened.values()))
    gated = gates_shared(recipe, fmt)
    apart = distances(base_pair, nodes)
    choice = choose(recipe, base_pair, nodes, apart)
    writes = backbone_writes(recipe, base, base_parts, nodes=nodes, by_group=choice.by_group, dtype=stored)
    backbone = with_trained(writes, trained)
    check_used(recipe, trained, backbone=backbone, nodes=(*nodes, *shared))
    groups: tuple[tuple[TensorWrite, ...], ...] = ()
    if to is not None:
        groups = built_writes(to, backbone, nodes, shared, gated_shared=gated, dtype=stored)
        groups = (*((write,) for write in passed), *groups)
    layers, hidden = tuple(base_parts.ffn), int(base.config["hidden_size"])
    routers = router_shapes(fmt, layers=layers, hidden=hidden, nodes=nodes, gated_shared=gated)
    identical = identical_groups(nodes)
    base_node = ExpertNode("base", (), base, *ffn_writes(base, base_parts, dtype=stored))
    whole = rule_of(fmt, base).renormalizes(recipe.experts_per_token)
    plain = whole and not shared and choice.from_base and backbone == writes
    equals_base = plain and all(same_expert(leaf, base_node) for node in nodes for leaf in node.leaves())
    made = Plan(
        recipe=recipe,
        translation=to,
        base=base,
        sources=tuple(opened.values()),
        dtype=stored,
        layers=base.family.dims(base.config).layers if base.family else len(layers),
        hidden=hidden,
        nodes=nodes,
        shared=shared,
        gated_shared=gated,
        backbone=backbone,
        passed=passed,
        groups=groups,
        routers=routers,
        identical_experts=tuple(map(tuple, identical)),
        equals_base=equals_base,
        identical_sampled=not all(
            compared_whole(nodes[group[0]], nodes[index]) for group in identical for index in group[1:]
        )
        or (equals_base and not all(compared_whole(leaf, base_node) for node in nodes for leaf in node.leaves())),
        unused=unused_tensors(
            parts.values(),
            base=base,
            by_group=choice.by_group,
            trained=bool(trained),
            nodes=(*nodes, *shared),
            backbone=backbone,
            passed=passed,
        ),
        trained=tuple(trained.values()),
        extracted=extracted,
        choice=choice,
        distances=apart,
        problems=problems,
    )
    return _with_warnings(made, others)


def _with_warnings(made: Plan, others: list[Source]) -> Plan:
    warnings = (*_identity_warnings(made), *_own_warnings(made), *source_warnings(made.base, others))
    return replace(made, warnings=warnings)


def _identity_warnings(made: Plan) -> list[str]:
    same = "identical in every block compared" if made.identical_sampled else "bit-identical"
    if made.all_identical:
        computes = "its base" if made.equals_base else "one dense model"
        return [
            f"all {made.experts} experts are {same}: this MoE computes {'' if made.identical_sampled else 'exactly '}"
            f"{computes}, whatever its routers are, even trained ones; break the symmetry with "
            "noise_relative (such as 0.01) or adapters, then train"
        ]
    return spare_warnings(made.nodes, made.identical_experts, same=same)


def _own_warnings(made: Plan) -> list[str]:
    recipe, found = made.recipe, list(made.recipe.notes)
    fmt = None if misfits(made.problems) else made.fmt
    if not made.trained:  # training, or regmean, has replaced tensors of the backbone
        found.extend(lost_differences(made.choice, made.distances))
    if fmt is not None and not fmt.loads_in_transformers:
        found.append(f"{fmt.title} loads in llama.cpp and frankenmoe; transformers and vLLM need remote code for it")
    if fmt is not None and fmt.loads_in_transformers and not made.bill.kv_per_token:
        found.append(
            "no layer has attention, so transformers cannot count the tokens in its cache; with stock transformers "
            "call generate(use_cache=False)"
        )
    if fmt is not None and fmt.inert_shared_ffn and not made.shared:
        found.append(f"{fmt.title} must have a shared expert: one of {fmt.inert_shared_ffn} zero neurons is written")
    if made.base.own_head:
        found.append(
            f"{made.base.name} sets tie_word_embeddings, but its stored lm_head.weight differs from its embeddings; "
            "the stored head is used, as in transformers, and the MoE is untied"
        )
    if fmt is not None and made.base.family is not None:
        found.extend(format_notes(fmt, made.base, made.base.family, experts=made.experts, recipe=recipe))
    if made.shared and all(expert.residual_scale is None for expert in (*recipe.experts, *recipe.shared_experts)):
        found.append(
            "shared and routed experts add up to about two FFNs; residual_scale: 0.5 on all experts corrects this"
        )
    if recipe.experts_per_token == 1 and made.experts > 1 and made.rule.renormalizes(1):
        found.append(
            "with one expert per token its weight is always 1, so a language-model loss cannot train the routers"
        )
    found += [each.warning for each in made.extracted.values() if not each.certain]
    found += licence_warnings(made.sources)
    return found
