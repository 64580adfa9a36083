"""`report`: one HTML file about one OUT or several, with nothing in it that is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from streamprune.disk import durable
from streamprune.disk.header import show
from streamprune.disk.report import REPORT
from streamprune.errors import UsageError
from streamprune.reporting.comparison import by_kind, differences, evaluations, figures, summary
from streamprune.reporting.evaluations import Measured, read_measured
from streamprune.reporting.facts import Facts, plain, read_facts
from streamprune.reporting.figures import drawing
from streamprune.reporting.markup import Html, element, page
from streamprune.reporting.scales import with_scales
from streamprune.reporting.sections import section


@dataclass(frozen=True)
class Page:
    """What `report` wrote."""

    path: Path
    models: int
    bytes: int


def report(
    outs: str | Path | Sequence[str | Path], output: str | Path, *, against: Sequence[str | Path] | None = None,
    eval: Sequence[str | Path] | None = None,
) -> Page:  # fmt: skip
    """Writes the page `output` about the finished outputs `outs` of prune; a file that is there is replaced.

    Several are shown side by side, and what differs stands to the first; `against` are more of them. `eval` are files
    with what `eval --json` printed. Raises the errors of streamprune.errors: UsageError, too, where matplotlib is
    missing, the extra `report`.
    """
    folders = [Path(outs)] if isinstance(outs, str | Path) else [Path(out) for out in outs]
    folders += map(Path, against or ())
    target, evals = Path(output), eval or ()
    if not folders:
        raise UsageError("report needs an OUT of prune, or several")
    if target.is_dir():
        raise UsageError(f"{show(target)} is a folder; give the page a file's name, such as {target / 'report.html'}")
    for read in (*(folder / REPORT for folder in folders), *map(Path, evals)):
        if read.exists() and target.exists() and read.samefile(target):
            raise UsageError(f"{show(target)} is what the page is made of; give the page another name")
    with drawing():
        models = told_apart([with_scales(read_facts(folder)) for folder in folders])
        measured = [read_measured(Path(file)) for file in evals]
        data = page_of(models, measured).encode()
    durable.replace_file(target, data)
    return Page(target, len(models), len(data))


def told_apart(models: Sequence[Facts]) -> list[Facts]:
    """Those that have a name in common are called by more of their paths: by so many last parts that they differ."""
    found = list(models)
    for name in {facts.name for facts in models}:
        alike = [i for i, facts in enumerate(models) if facts.name == name]
        paths = [models[i].path.resolve().parts for i in alike]
        last = 1
        while len({path[-last:] for path in paths}) < len(set(paths)):
            last += 1
        for i, path in zip(alike, paths, strict=True) if last > 1 else ():
            found[i] = replace(models[i], name=plain("/".join(path[-last:])))
    return found


def page_of(models: Sequence[Facts], measured: Sequence[Measured]) -> str:
    """The document."""
    places = [f"out-{number}" for number in range(1, len(models) + 1)]
    title = ", ".join(facts.name for facts in models[:3]) + (f" and {len(models) - 3} more" if len(models) > 3 else "")
    body: list[Html] = [element("h1", title), element("p", "What streamprune did, and what came of it.")]
    body.append(summary(models, places))
    if len(models) > 1:
        body += (differences(models), by_kind(models), figures(models))
    if measured:
        body += evaluations(measured, models, places)
    body += (section(facts, place) for facts, place in zip(models, places, strict=True))
    return page(f"{title} – streamprune", [element("main", *body)])
