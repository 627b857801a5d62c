"""The sections of a card about what was found: routing, results, samples, limits; a section without evidence says why.

What speaks against the model is said as plainly as what speaks for it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from frankenmoe.publish.facts import Facts
from frankenmoe.publish.leaderboard import TASKS, average, ordered, rounded
from frankenmoe.publish.privacy import local_names, without_folders
from frankenmoe.publish.reports import Evidence, Exported, Measured, Published, Routing, Row, Samples
from frankenmoe.publish.sections import Missing, gib, left_to_chance, markdown, prompted

PICTURE = "routing.png"
DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
TRACED = 24  # tokens of the first sample
RIVALS = {"base": "its base", "parent": "the parent {name}", "average": "the average of the parents' weights"}


def routing(facts: Facts, evidence: Evidence) -> str | Missing:
    """The picture, its legend, and a few tokens on their way."""
    seen, said = evidence.get(Routing), evidence.get(Samples)
    parts = []
    if seen is not None:
        legend = ", ".join(f"{index} {name}" for index, name in enumerate(seen.experts))
        top = max(max(row) for row in seen.share_LE)
        parts.append(
            f"![Share of tokens per layer and expert]({PICTURE})\n\nA row per layer, a column per expert ({legend}); "
            f"the darkest square stands for {top:.0%} of a layer's assignments. Counted over {seen.tokens:,} tokens of "
            f"{', '.join(seen.texts)}."
        )
        if seen.own:
            rows = [(domain, f"{min(shares):.0%} to {max(shares):.0%}") for domain, shares in seen.own.items()]
            parts.append(markdown(("text of", "tokens whose first expert is its own, lowest to highest layer"), rows))
    if said is not None and any(item.trace for item in said.items):
        parts.append(_trace(said))
    if not parts:
        return Missing("nobody has looked where tokens go; `frankenmoe audit` does")
    return "\n\n".join(parts)


def _trace(said: Samples) -> str:
    item = next(item for item in said.items if item.trace)
    legend = "  ".join(f"{_digit(index)} {name}" for index, name in enumerate(said.experts))
    lines = [f"{repr(token)[1:-1]:<14}{''.join(map(_digit, experts))}" for token, experts in item.trace[:TRACED]]
    return (
        "Token by token, the first expert of every layer from the first to the last:\n\n```text\n"
        + "\n".join([f"experts: {legend}", *lines])
        + "\n```"
    )


def _digit(index: int) -> str:
    return "-" if index < 0 else DIGITS[index] if index < len(DIGITS) else "+"


def results(facts: Facts, evidence: Evidence) -> str | Missing:
    """Published scores as the leaderboard lists them, then what was measured beside base and parents."""
    published, measured = evidence.get(Published), evidence.get(Measured)
    parts = []
    if published is not None:
        where = f"[{published.origin.name}]({published.origin.url})"
        parts.append(f"As measured by {where}:\n\n{leaderboard_table(published.scores)}")
    if measured is not None:
        own_name = [replace(row, name=facts.name) if row.role == "moe" else row for row in measured.rows]
        parts += _measured(replace(measured, rows=tuple(own_name)))
    if not parts:
        return Missing("nothing was measured; `frankenmoe eval` measures it")
    return "\n\n".join(parts)


def leaderboard_table(scores: Mapping[str, float]) -> str:
    """The table that the leaderboard put into cards: the average first, then task by task."""
    rows = [(TASKS[task].dataset_name, f"{rounded(scores[task])}") for task in ordered(scores)]
    mean = average(scores)
    return markdown(("Metric", "Value"), [("Avg.", f"{mean}"), *rows] if mean is not None else rows)


def _measured(measured: Measured) -> Iterator[str]:
    tasks = ordered({task for row in measured.rows for task in row.scores if task in TASKS})
    if tasks:
        yield (
            "Measured with `frankenmoe eval`, in percent (the figure after ± is one standard error):\n\n"
            + markdown(
                ("model", *(TASKS[task].dataset_name for task in tasks), "Avg."),
                [(row.name, *(_score(row, task) for task in tasks), _mean(row)) for row in measured.rows if row.scores],
            )
        )
        short = [
            f"{TASKS[task].dataset_name}: {measured.documents[task]:,} of {TASKS[task].documents:,}"
            for task in tasks
            if measured.documents.get(task, TASKS[task].documents) < TASKS[task].documents
        ]
        if short:
            yield f"Not all rows were used, so these are not leaderboard scores: {'; '.join(short)}."
    domains = list(dict.fromkeys(domain for row in measured.rows for domain in row.loss))
    if domains:
        yield (
            "Loss on held-out text, in nats per token, lower is better:\n\n"
            + markdown(
                ("model", *domains),
                [(row.name, *(_loss(row, domain) for domain in domains)) for row in measured.rows if row.loss],
            )
        )
    costs = [row for row in measured.rows if row.speed is not None or row.memory is not None]
    if costs:
        yield markdown(
            ("model", "tokens per second", "memory"),
            [
                (
                    row.name,
                    "-" if row.speed is None else f"{row.speed:,.0f}",
                    "-" if row.memory is None else gib(row.memory),
                )
                for row in costs
            ],
        )


def _score(row: Row, task: str) -> str:
    if task not in row.scores:
        return "-"
    error = row.errors.get(task)
    return f"{rounded(row.scores[task])}" + (f" ± {rounded(error)}" if error else "")


def _mean(row: Row) -> str:
    mean = average({task: score for task, score in row.scores.items() if task in TASKS})
    return "-" if mean is None else str(mean)


def _loss(row: Row, domain: str) -> str:
    return f"{row.loss[domain]:.3f}" if domain in row.loss else "-"


def samples(facts: Facts, evidence: Evidence) -> str | Missing:
    """Prompt and reply, word for word, and how they came about."""
    said = evidence.get(Samples)
    if said is None or not said.items:
        return Missing("it was asked nothing; `frankenmoe card --prompt` asks")
    how = "greedy" if said.temperature == 0 else f"temperature {said.temperature:g}, seed {said.seed}"
    parts = [f"Unedited, none left out; {how}, at most {said.max_new_tokens} new tokens."]
    parts += [f"> {_quoted(item.prompt)}\n\n{_fenced(item.reply)}" for item in said.items]
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    return "\n> ".join(text.splitlines())


def _fenced(text: str) -> str:
    longest = max((len(run) for run in _ticks(text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _ticks(text: str) -> list[str]:
    return [run for run in "".join(c if c == "`" else " " for c in text).split() if run]


def limits(facts: Facts, evidence: Evidence) -> str | Missing:
    """What was found wanting, by anybody who looked."""
    said = list(_limits(facts, evidence))
    if not said:
        return Missing("nobody has looked for faults; `frankenmoe audit` and `frankenmoe eval` do")
    return "\n".join(f"- {_sentence(text)}" for text in dict.fromkeys(said))


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[0].upper()}{text[1:]}{'' if text.endswith(('.', '!', '?')) else '.'}"


def _limits(facts: Facts, evidence: Evidence) -> Iterator[str]:
    names = local_names(facts.artifact)
    if facts.plan is not None:
        # licences have a section of their own
        yield from (without_folders(text, names) for text in facts.plan.warnings if "licence" not in text)
    if left_to_chance(facts):
        yield "its routers are what chance made them: nothing has taught them which expert is good at what"
    elif prompted(facts):
        yield (
            "its routers were set from a few prompts and never trained together with the experts, which somebody "
            "ought to do"
        )
    seen = evidence.get(Routing)
    if seen is not None:
        yield from (text for level, text in seen.findings if level in ("bad", "mind"))
        if seen.dead:
            shown = ", ".join(f"{seen.experts[expert]} in layer {layer}" for layer, expert in seen.dead[:6])
            more = f" and {len(seen.dead) - 6} more" if len(seen.dead) > 6 else ""
            yield f"of {seen.tokens:,} tokens none went to {shown}{more}"
    measured = evidence.get(Measured)
    if measured is not None:
        yield from measured.verdict
        yield from rivals(measured.rows)
    exported = evidence.get(Exported)
    if exported is not None:
        unchecked = [file.name for file in exported.files if file.kl is None]
        if unchecked:
            yield f"not compared with their source in llama.cpp: {', '.join(unchecked)}"


def rivals(rows: Sequence[Row]) -> Iterator[str]:
    """A sentence for every model it is made of that does better somewhere: lower loss, or a higher score."""
    own = next((row for row in rows if row.role == "moe"), None)
    for row in rows if own else ():
        if own is None or row.role not in RIVALS:
            continue
        who = RIVALS[row.role].format(name=row.name)
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
