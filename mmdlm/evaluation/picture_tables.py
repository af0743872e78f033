"""The tables of a picture world's results (results.json of eval/pictures) as Markdown: shares with their intervals."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mmdlm.evaluation.geneval import CLASSES
from mmdlm.evaluation.intervals import percent, share
from mmdlm.evaluation.scene_facts import FACTS


def page(results: Mapping[str, Any]) -> str:
    """What a run measured: one table for each part; a share in percent with its 95 % interval."""
    run = results["run"]
    trained, command = run["trained_on"], run["command"]
    lines = [
        f"`{command if isinstance(command, str) else shlex.join(command)}`",
        "",
        f"Model {run['model']['hash']}, {run.get('concepts', trained['concepts'])} concepts, styles "
        f"{', '.join(trained['styles'])} (said by {trained['said_by']}), {run['hardware']}, seed {run['seed']}. "
        "Wilson 95 % intervals.",
    ]
    heads = {"judge": "the judge on ", "draw": "drawn from "}
    rows = [(heads[part] + name, counted) for part in heads for name, counted in _sets(results, part)]
    if rows:
        lines += ["", *table("drawing", FACTS, [(name, counted["all kinds"]) for name, counted in rows])]
        for name, counted in rows:
            kinds = [(kind, facts) for kind, facts in counted.items() if kind != "all kinds"]
            lines += ["", *table(name, FACTS, kinds)]
        confused = results.get("judge", {}).get("notes", {}).get("confused on renders", {})
        told = ", ".join(f"{pair} ({count})" for pair, count in confused.items()) or "nothing"
        lines += ["", f"What the judge confused on renders (it counts as wrong): {told}."]
    for name, counted in _sets(results, "geneval"):
        lines += ["", *classes_table(name, counted)]
    for name, counted in _sets(results, "describe"):
        lines += ["", *table(f"captions: {name}", ("exact", *FACTS), list(counted.items()))]
    for name, counted in _sets(results, "ask"):
        lines += ["", *table(f"answers: {name}", ("answer", "without looking"), list(counted.items()))]
    return "\n".join(lines)


def table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Markdown rows; the number of cases stands beside each name."""
    lines = [f"| {title} | cases | " + " | ".join(columns) + " |", "|---|---:|" + "---|" * len(columns)]
    for name, facts in rows:
        cases = max(counted["total"] for counted in facts.values())
        cells = (percent(facts.get(column, share(0, 0))) for column in columns)
        lines.append(f"| {name} | {cases} | " + " | ".join(cells) + " |")
    return lines


def classes_table(title: str, classes: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """GenEval's classes: the score, and beside it how often the judge is right about real pictures of the class."""
    columns = ("drawn", "the judge on renders", "the judge on renders through the tokenizer")
    lines = [f"| GenEval's classes: {title} | cases | " + " | ".join(columns) + " |", "|---|---:|---|---|---|"]
    for name in (*CLASSES, "mean of classes"):
        row = classes[name]
        cells = " | ".join(percent(row[column]) for column in columns)
        lines.append(f"| {name} | {row['drawn'].get('total', '')} | {cells} |")
    return lines


def _sets(results: Mapping[str, Any], part: str) -> list[tuple[str, Any]]:
    return [(name, counted) for name, counted in results.get(part, {}).items() if name != "notes"]
