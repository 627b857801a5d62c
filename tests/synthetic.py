"""Audits of MoEs that do not exist, of any size, out of random numbers: for pages, not for truth."""

import torch

from frankenmoe.audit.answers import Whole, answers, layer_sentences
from frankenmoe.audit.collect import RouterSums
from frankenmoe.audit.examine import Audit
from frankenmoe.audit.facts import router_facts
from frankenmoe.audit.stats import pair_distances, reference_distances
from frankenmoe.audit.tokens import Passage, TokenTrace, as_data
from frankenmoe.audit.weights import BASE, Distances
from frankenmoe.moe.trace import LayerTrace

TOP_K = 2
HIDDEN = 32


def make_audit(
    *, experts: int, layers: int, tokens: int, name: str = "synthetic", seed: int = 0, plain: bool = True
) -> Audit:
    """An audit whose passages have `tokens` tokens in all; a third of the experts have a domain of their own.

    `plain=False` leaves the tokens out of the report, which the page does not read from there.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    domains = [f"expert {index}" for index in range(max(1, experts // 3))]
    names = {str(index): f"expert {index}" for index in range(experts)}
    logits_LTE = draw(layers, tokens, experts) + draw(layers, 1, experts) * 0.3
    weights_LTK, ids_LTK = logits_LTE.softmax(dim=-1).topk(TOP_K, dim=-1)
    words = [
        f"{' ' if index % 3 else ''}w{index % 977}" + ("\n" if index % 40 == 39 else "") for index in range(tokens)
    ]
    trace = TokenTrace(
        (Passage("prompt", tuple(range(tokens)), tuple(words)),),
        tuple(range(layers)),
        ids_LTK,
        weights_LTK / weights_LTK.sum(dim=-1, keepdim=True),
        logits_LTE,
    )
    routers = []
    for layer in range(layers):
        sums = RouterSums(layer, "", experts, TOP_K, len(domains))
        for row, _ in enumerate(domains):
            part = slice(row * tokens // len(domains), (row + 1) * tokens // len(domains))
            found = LayerTrace(
                layer, "", experts, weights_LTK[layer, part], ids_LTK[layer, part], logits_LTE[layer, part]
            )
            sums.add(found, draw(found.logits_TE.shape[0], HIDDEN), domain=row)
        difference_EN = draw(experts, 50).double()
        gram_EE = difference_EN @ difference_EN.T
        distances = Distances(
            layer, tuple(names), BASE, pair_distances(gram_EE, scale=30.0), reference_distances(gram_EE, scale=30.0), ()
        )
        facts = router_facts(
            sums, draw(experts, HIDDEN), domains=domains, own=list(range(len(domains))), distances=distances, moved=0.4
        )
        seen = {"tokens": tokens, "used": experts, "switches": 0.5}
        routers.append(facts | {"tokens_seen": seen})
    whole = Whole(routers, names, [], False, 0.3, None, True)
    return Audit(
        {
            "kind": "frankenmoe audit",
            "version": 1,
            "finished": "2026-01-01T00:00:00+00:00",
            "versions": {"frankenmoe": "0"},
            "subject": {"what": "recipe", "path": "synthetic.yml", "name": name},
            "recipe_digest": "0" * 64,
            "recipe": {},
            "record": None,
            "model": {
                "class": "None", "layers": layers, "experts": list(names.values()), "paths": names,
                "experts_per_token": TOP_K, "shared_expert": False, "shared_gated": False, "nested_routers": 0,
                "dtype": "float32", "sources_at_hand": True,
            },
            "text": {domain: {"tokens": tokens, "origin": [], "own_expert": 0, "digest": ""} for domain in domains},
            "answers": [vars(each) for each in answers(whole)],
            "outputs": {"tokens": 0, "other_experts": None, "base": None},
            "identical_experts": [],
            "routers": [facts | {"sentences": layer_sentences(facts, names)} for facts in routers],
            "passages": as_data(trace) if plain else [{"label": "prompt", "tokens": words}],
        },
        trace,
    )  # fmt: skip
