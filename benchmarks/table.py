"""Puts the results at full scale, as a table, into README.md beside it, and prints it; measures nothing."""

import json
from pathlib import Path

from common import RESULTS, goal, spell, verdict

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- results -->\n", "<!-- end of results -->\n"


def main() -> None:
    table = markdown(sorted(RESULTS.glob("*-full.json")))
    before, _, after = split(README.read_text())
    README.write_text(f"{before}{BEGIN}{table}{END}{after}")
    print(table, end="")


def markdown(files: list[Path]) -> str:
    """One line per row of every result, and where and when each result was measured."""
    results = [json.loads(file.read_text()) for file in files]
    lines = ["| what | value | at most, or at least (>) | reached |", "| --- | ---: | ---: | --- |"]
    for result in results:
        for row in result["rows"]:
            value, limit = spell(row["value"], row["unit"]), goal(row["limit"], row.get("at_least"), row["unit"])
            lines.append(f"| {row['what']} | {value} | {limit} | {verdict(row['reached'])} |")
    lines += ["", *map(circumstances, results)]
    return "\n".join(lines).rstrip() + "\n"


def circumstances(result: dict[str, object]) -> str:
    """A list item: the machine, versions and commit of one result."""
    machine, versions = result["machine"], result["versions"]
    assert isinstance(machine, dict)
    assert isinstance(versions, dict)
    gpus = "".join(f"{gpu}, " for gpu in machine.get("gpus", ()))
    return (
        f"- {result['benchmark']}: {result['rounds']} rounds, {result['finished']}, {gpus}{machine['cores']} cores of "
        f"{machine['cpu']}, {machine['memory'] / 2**30:.0f} GiB, {machine['filesystem']}, torch {versions['torch']}, "
        f"transformers {versions['transformers']}, commit {str(result['revision'])[:12]}"
    )


def split(text: str) -> tuple[str, str, str]:
    """README.md in three: before the table, the table, after it."""
    before, _, rest = text.partition(BEGIN)
    table, _, after = rest.partition(END)
    return before, table, after


if __name__ == "__main__":
    main()
