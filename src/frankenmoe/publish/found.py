"""The sections of a card about what was measured: routing, results, samples, limits.

A section without evidence returns the reason. Bad results are reported as plainly as good ones.
"""

from collections.abc import Iterator, Mapping, Sequence
from urllib.parse import quote

from frankenmoe.artifact.reports import AuditReport, EvalReport, EvaluatedModel, ExportReport, SamplesReport
from frankenmoe.counted import counted
from frankenmoe.publish.facts import Facts
from frankenmoe.publish.leaderboard import TASKS, LeaderboardReport, average, ordered, rounded
from frankenmoe.publish.markdown import fenced, plain, sentence, table
from frankenmoe.publish.reports import Evidence
from frankenmoe.publish.sections import Missing, gib, left_to_chance, prompted

PICTURE = "routing.png"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
TRACED = 24  # tokens of the first sample
RIVALS = {"base": "its base", "parent": "the parent {name}", "merge": "the dense merge {name}"}


def routing(facts: Facts, evidence: Evidence, *, picture: bool) -> str | Missing:
    """The picture of the routing if there is one, its legend, and the experts of a few tokens."""
    seen, said = evidence.get(AuditReport), evidence.get(SamplesReport)
    parts = []
    if seen is not None:
        legend = ", ".join(f"{index} {plain(name)}" for index, name in enumerate(seen.model.experts))
        top = max(max(row) for row in seen.shares)
        if picture:
            parts.append(
                f"![Share of tokens per layer and expert]({PICTURE})\n\nA row per layer, a column per expert "
                f"({legend}); the darkest square stands for {top:.0%} of a layer's assignments. Counted over "
                f"{seen.tokens:,} tokens of {plain(', '.join(seen.text))}."
            )
        if seen.own:
            rows = [(plain(domain), f"{min(shares):.0%} to {max(shares):.0%}") for domain, shares in seen.own.items()]
            parts.append(table(("text of", "tokens whose first expert is its own, lowest to highest layer"), rows))
    if said is not None and any(item.trace for item in said.samples):
        parts.append(_trace(said))
    if not parts and seen is not None:
        return Missing("the picture could not be drawn")
    if not parts:
        return Missing("routing was not audited; run `frankenmoe audit`")
    return "\n\n".join(parts)


def _trace(said: SamplesReport) -> str:
    item = next(item for item in said.samples if item.trace)
    legend = "  ".join(f"{_digit(index)} {' '.join(name.split())}" for index, name in enumerate(said.experts))
    lines = [f"{repr(step.token)[1:-1]:<14}{''.join(map(_digit, step.experts))}" for step in item.trace[:TRACED]]
    shown = fenced("\n".join([f"experts: {legend}", *lines]))
    return f"Token by token, the first expert of every layer from the first to the last:\n\n{shown}"


def _digit(index: int) -> str:
    return "-" if index < 0 else DIGITS[index] if index < len(DIGITS) else "+"


def results(facts: Facts, evidence: Evidence) -> str | Missing:
    """Published scores as the leaderboard lists them, then scores measured beside base and parents."""
    published, measured = evidence.get(LeaderboardReport), evidence.get(EvalReport)
    parts = []
    if published is not None:
        where = f"[{plain(published.source.name)}]({quote(published.source.url, safe=':/?&=#%+,;~')})"
        parts.append(f"As measured by {where}:\n\n{leaderboard_table(published.published)}")
    if measured is not None:
        own_name = [
            model.model_copy(update={"name": facts.name}) if model.kind == "moe" else model for model in measured.models
        ]
        parts += _measured(measured.model_copy(update={"models": tuple(own_name)}))
    parts += _other_counts(facts, measured, evidence.counts)
    if not parts:
        return Missing("the model was not evaluated; run `frankenmoe eval`")
    return "\n\n".join(parts)


def leaderboard_table(scores: Mapping[str, float]) -> str:
    """The leaderboard's table: the average, then one row per task."""
    rows = [(TASKS[task].dataset_name, f"{rounded(scores[task])}") for task in ordered(scores)]
    mean = average(scores)
    return table(("Metric", "Value"), [("Avg.", f"{mean}"), *rows] if mean is not None else rows)


def _measured(measured: EvalReport) -> Iterator[str]:
    models = measured.models
    tasks = ordered({task for row in models for task in row.scores if task in TASKS})
    if tasks:
        yield (
            "Measured with `frankenmoe eval`, in percent (the figure after ± is one standard error):\n\n"
            + table(
                ("model", *(TASKS[task].dataset_name for task in tasks), "Avg."),
                [(plain(row.name), *(_score(row, task) for task in tasks), _mean(row)) for row in models if row.scores],
            )
        )
        short = [
            f"{TASKS[task].dataset_name}: {measured.documents[task]:,} of {TASKS[task].documents:,}"
            for task in tasks
            if measured.documents.get(task, TASKS[task].documents) < TASKS[task].documents
        ]
        if short:
            yield f"Not all rows were used, so these are not leaderboard scores: {'; '.join(short)}."
    domains = list(dict.fromkeys(domain for row in models for domain in row.loss))
    if domains:
        yield (
            "Loss on held-out text, in nats per token, lower is better:\n\n"
            + table(
                ("model", *map(plain, domains)),
                [(plain(row.name), *(_loss(row, domain) for domain in domains)) for row in models if row.loss],
            )
        )
    costs = [row for row in models if row.tokens_per_second is not None or row.memory_bytes is not None]
    if costs:
        yield table(
            ("model", "tokens per second", "memory"),
            [
                (
                    plain(row.name),
                    "-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}",
                    "-" if row.memory_bytes is None else gib(row.memory_bytes),
                )
                for row in costs
            ],
        )


def _other_counts(facts: Facts, measured: EvalReport | None, counts: Mapping[int, EvalReport]) -> Iterator[str]:
    """The same model with other numbers of experts per token, if they were measured, beside its own number."""
    if not counts:
        return
    own = facts.artifact.record["experts_per_token"]
    reports = {**counts, **({own: measured} if measured else {})}
    rows = {used: report.moe for used, report in sorted(reports.items()) if report.moe}
    tasks = ordered({task for row in rows.values() for task in row.scores if task in TASKS})
    domains = list(dict.fromkeys(domain for row in rows.values() for domain in row.loss))
    head = ("experts per token", *(TASKS[task].dataset_name for task in tasks), *map(plain, domains))
    cells = [
        (
            f"{used} (its own)" if used == own else str(used),
            *(_score(row, task) for task in tasks),
            *(_loss(row, domain) for domain in domains),
        )
        for used, row in rows.items()
    ]
    yield (
        "With other numbers of experts per token (`--experts-per-token`), on the same routers; tasks in percent, text "
        f"in nats per token:\n\n{table(head, cells)}"
    )


def _score(row: EvaluatedModel, task: str) -> str:
    if task not in row.scores:
        return "-"
    error = row.tasks[task].stderr
    return f"{rounded(row.scores[task])}" + (f" ± {rounded(100 * error)}" if error else "")


def _mean(row: EvaluatedModel) -> str:
    mean = average({task: score for task, score in row.scores.items() if task in TASKS})
    return "-" if mean is None else str(mean)


def _loss(row: EvaluatedModel, domain: str) -> str:
    return f"{row.loss[domain]:.3f}" if domain in row.loss else "-"


def samples(facts: Facts, evidence: Evidence) -> str | Missing:
    """Each prompt with its unedited reply, and the sampling settings."""
    said = evidence.get(SamplesReport)
    if said is None or not said.samples:
        return Missing("no prompts were given; use `frankenmoe card --prompt`")
    asked = said.settings
    how = "greedy" if asked.temperature == 0 else f"temperature {asked.temperature:g}, seed {asked.seed}"
    parts = [f"Unedited and complete; {how}, at most {counted(asked.max_new_tokens, 'new token')}."]
    for item in said.samples:
        quoted = "\n> ".join(plain(item.prompt).splitlines())
        parts.append(f"> {quoted}\n\n{fenced(item.reply)}")
    return "\n\n".join(parts)


def limits(facts: Facts, evidence: Evidence) -> str | Missing:
    """The faults that audit, evaluation and export found."""
    said = list(_limits(facts, evidence))
    if not said:
        return Missing("faults were not looked for; run `frankenmoe audit` and `frankenmoe eval`")
    return "\n".join(f"- {_sentence(sentence(text))}" for text in dict.fromkeys(said))


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def _limits(facts: Facts, evidence: Evidence) -> Iterator[str]:
    if facts.plan is not None:
        # licences have a section of their own
        yield from (text for text in facts.plan.warnings if "licence" not in text)
    if left_to_chance(facts):
        yield "its routers are random: they were neither fitted nor trained"
    elif prompted(facts):
        yield ("its routers were set from a few prompts and never trained together with the experts")
    seen = evidence.get(AuditReport)
    if seen is not None:
        yield from (answer.sentence for answer in seen.answers if answer.level in ("bad", "mind"))
        if seen.dead:
            shown = ", ".join(f"{seen.model.experts[expert]} in layer {layer}" for layer, expert in seen.dead[:6])
            more = f" and {len(seen.dead) - 6} more" if len(seen.dead) > 6 else ""
            yield f"of {seen.tokens:,} tokens none went to {shown}{more}"
    measured = evidence.get(EvalReport)
    if measured is not None:
        yield from measured.verdict
        yield from rivals(measured.models)
    exported = evidence.get(ExportReport)
    if exported is not None:
        unchecked = [file.name for file in exported.files if file.check is None or file.check.kl is None]
        if unchecked:
            yield f"not compared with their source in llama.cpp: {', '.join(unchecked)}"


def rivals(rows: Sequence[EvaluatedModel]) -> Iterator[str]:
    """A sentence for every parent that does better than the MoE somewhere: lower loss or a higher score."""
    own = next((row for row in rows if row.kind == "moe"), None)
    for row in rows if own else ():
        if own is None or row.kind not in RIVALS:
            continue
        who = RIVALS[row.kind].format(name=row.name)
        better = [
            f"{domain} ({row.loss[domain]:.3f} against {own.loss[domain]:.3f} nats per token)"
            for domain in row.loss
            if domain in own.loss and row.loss[domain] < own.loss[domain]
        ]
        better += [
            f"{TASKS[task].dataset_name if task in TASKS else task} ({rounded(row.scores[task])} against "
            f"{rounded(own.scores[task])})"
            for task in row.scores
            if task in own.scores and rounded(row.scores[task]) > rounded(own.scores[task])
        ]
        if better:
            yield f"{who} does better on {', '.join(better)}"
