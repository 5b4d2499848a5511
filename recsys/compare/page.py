"""A comparison as one self-contained page: answer, table, plots, where the time goes, and what made the runs."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from configs.load import flatten
from recsys.compare.comparison import Comparison
from recsys.compare.outcome import MOST_FINDINGS, UNFAIR, Outcome, build_outcome
from recsys.compare.plots import build_plots, find_splits
from recsys.compare.table import build_profiled_table, build_table, choose_styles
from recsys.report.fairness import free_facts, shared_facts
from recsys.report.numbers import MISSING, plural
from recsys.report.page import (
    Block,
    Code,
    Controls,
    Details,
    Grid,
    Lines,
    Notice,
    Page,
    Pairs,
    Plot,
    Section,
)
from recsys.report.run import Run
from recsys.report.table import Cell, Table
from recsys.runs.run_directory import RunDir

_PROFILED = (
    "From profiled windows: some steps now and then are recorded by PyTorch's profiler, which makes them slower. They "
    "serve for shares, phases and bytes; step time and throughput elsewhere on this page are those of the other steps."
)
_PARTS_OF_A_STEP = (
    "Computing: the rank runs operators (on CUDA: kernels). Exposed communication: it is in a collective and nothing "
    "computes beside it. Other: neither, as Python between operators. Step = computing + exposed communication + "
    "other.",
    "A collective lasts until the slowest rank has joined it. Waiting is the time in a collective that not all ranks "
    "have joined; transfer is the rest. Exposed communication = exposed waiting + exposed transfer.",
    "Phases follow the thread that makes the step; on it an asynchronous collective costs only where it is waited for. "
    "An operator of the backward pass belongs to the phase whose gradient it computes.",
)
_LIMITS = (
    "AUC is exact over all rows of a split, ties counting one half. Quality in the table is of the best evaluation, "
    "chosen on the selecting rows; the curves show every evaluation.",
    "A target is reached at an evaluation: how closely is set by evaluation.every_epochs.",
    "With fewer than three seeds a difference in quality is an observation. The ± of test sampling concerns all arms "
    "alike, as they are tested on the same rows.",
    "Times of separate runs carry the machine's drift: small differences need repeats in alternation.",
)


def build_page(comparison: Comparison) -> Page:
    """Return the page of a comparison."""
    outcome, plots = build_outcome(comparison), build_plots(comparison)
    timed = [plot for plot in plots if plot.id.startswith("time-")]
    return Page(
        outcome.title,
        outcome.subject,
        [
            Section("", _findings(comparison, outcome)),
            Section("Results", [" ".join(outcome.reading[:2]), build_table(comparison)]),
            Section("Plots", _plots(comparison, [plot for plot in plots if plot not in timed])),
            *([Section("Where the time goes", _profiled(comparison, timed))] if timed else []),
            Section("What differs, what is shared", _facts(comparison)),
            Section("Environment", _environment(comparison.runs)),
            Section("Limits", [Lines(_LIMITS)]),
        ],
        kicker=f"comparison · {plural(len(comparison.runs), 'run')}",
        origin="Times, sizes and quality are read from the run directories; nothing here is entered by hand.",
    )


def _findings(comparison: Comparison, outcome: Outcome) -> list[Block]:
    findings = Lines([f"{label}: {text}" for label, text in outcome.findings], choose_styles(comparison)[1:])
    is_long = len(outcome.findings) > MOST_FINDINGS
    return [
        Notice(
            f"{UNFAIR}. These runs differ in what a fair comparison shares:", [str(d) for d in comparison.differences]
        ),
        *([outcome.overview] if outcome.overview else []),
        Details("Each arm against the baseline", [findings]) if is_long else findings,
        Notice("Keep in mind", comparison.caveats),
    ]


def _plots(comparison: Comparison, plots: Sequence[Plot]) -> list[Block]:
    splits, sizes = find_splits(comparison), [plot for plot in plots if plot.id.startswith("size-")]
    arms = [(arm.label, style) for arm, style in zip(comparison.arms, choose_styles(comparison), strict=True)]
    return [
        "Click an arm to hide or show it in every plot. The camera above a plot saves it as SVG with its legend.",
        Controls(arms, splits),
        *([] if splits else ["No run has been evaluated yet: there is no quality to plot."]),
        Grid([plot for plot in plots if plot not in sizes]),
        Grid(sizes, columns=3),
    ]


def _profiled(comparison: Comparison, plots: Sequence[Plot]) -> list[Block]:
    traces = [
        f"{run.label}: {RunDir(run.path).trace(window.step, 0)}"
        for run in comparison.runs
        for window in run.summary.profiles
    ]
    where = "One file a rank, here rank 0's. Open them in Perfetto or chrome://tracing."
    return [
        _PROFILED,
        Grid(plots),
        build_profiled_table(comparison),
        Lines(_PARTS_OF_A_STEP),
        Details("Traces of the windows", [where, Lines(traces)]),
    ]


def _facts(comparison: Comparison) -> list[Block]:
    """Return a table of what differs, one row an arm, and all that does not."""
    keys = [difference.key for difference in comparison.varied]
    rows = []
    for arm, style in zip(comparison.arms, choose_styles(comparison), strict=True):
        tables = [free_facts(run) for run in comparison.runs_of(arm)]
        values = [", ".join(dict.fromkeys(_show(table.get(key)) for table in tables)) for key in keys]
        rows.append([Cell(arm.label, style=style), *values])
    first = comparison.runs[0]
    differing = {*keys, *(difference.key for difference in comparison.differences)}
    facts = {**shared_facts(first), **free_facts(first)}
    shared = {key: _show(value) for key, value in facts.items() if key not in differing}
    same = "Nothing differs in [embedding], [parallelism] and seed: these are repeats of one run."
    differs: list[Block] = [Table(["arm", *keys], rows)] if keys else [same] if len(comparison.runs) > 1 else []
    return [*differs, Details("Shared by all runs", [Pairs(shared)])]


def _environment(runs: Sequence[Run]) -> list[Block]:
    """Return every key with its values, with the runs that have each where they differ, and each run's command."""
    tables = [flatten({k: v for k, v in run.environment.items() if k != "command"}) for run in runs]
    pairs: dict[str, list[Cell]] = {}
    for key in dict.fromkeys(key for table in tables for key in table):
        pairs[key] = [
            Cell(value, ", ".join(labels) if len(labels) < len(runs) else "")
            for value, labels in _labels_by_value(runs, tables, key).items()
        ]
    commands = [
        Details(
            f"{run.label}: command and plan",
            [
                str(run.path),
                Code(" ".join(run.environment.get("command", []))),
                Code(run.plan or "No plan was written."),
            ],
        )
        for run in runs
    ]
    return [Pairs(pairs), *commands]


def _labels_by_value(runs: Sequence[Run], tables: Sequence[Mapping[str, Any]], key: str) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for run, table in zip(runs, tables, strict=True):
        values.setdefault(_show(table.get(key)), []).append(run.label)
    return values


def _show(value: Any) -> str:
    if value is None or value == "":
        return MISSING
    return json.dumps(value) if isinstance(value, bool | list) else str(value)
