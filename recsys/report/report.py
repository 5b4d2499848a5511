"""The comparison as one self-contained page, and its outcome in plain words, made from the figures alone."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import flatten
from recsys.report.compared_runs import Run, free_facts, shared_facts
from recsys.report.comparison import Comparison, Measured, Setup, TimeFigures
from recsys.report.cost_plots import cost_plots
from recsys.report.curves import CurveOrder
from recsys.report.numbers import format_count, format_epochs, format_ratio, format_seconds, format_share
from recsys.report.page import as_script_data, render_page
from recsys.report.plots import Plot, choose_styles, find_splits, quality_plots
from recsys.report.result_table import choose_columns, describe_best_possible, describe_state, describe_target
from recsys.report.time_plots import time_columns, time_plots
from recsys.runs.run_dir import RunDir, write_atomically

_TEMPLATE = "report.html.j2"
_MOST_FINDINGS = 5


@dataclass(frozen=True)
class Finding:
    """How one setup stands to the baseline. index: its place among the setups."""

    index: int
    label: str
    text: str


def describe_title(comparison: Comparison) -> str:
    baseline, others = comparison.baseline, comparison.others
    if not others:
        return baseline.label
    if len(others) <= 3:
        *first, last = (setup.label for setup in others)
        return (
            f"{', '.join(first)} and {last} against {baseline.label}" if first else f"{last} against {baseline.label}"
        )
    return f"{len(others)} setups against {baseline.label}"


def describe_subject(comparison: Comparison) -> str:
    """What was compared, and where the baseline stands."""
    setup, several = comparison.baseline, len(comparison.setups) > 1
    summary, run = setup.summary, setup.runs[0]
    hardware = run.environment.get("device" if summary.device == "cuda" else "cpu") or summary.device
    what = f"{len(comparison.setups)} setups of the same {summary.architecture}" if several else summary.architecture
    threads = f"{run.threads} thread{'s' if run.threads > 1 else ''}"
    where = f"{summary.dataset} data, {format_count(summary.train_rows)} training rows; {threads} on {hardware}"
    return (
        f"{what[0].upper()}{what[1:]} on {where}. {'Baseline ' if several else ''}{_describe_alone(setup, comparison)}"
    )


def _describe_alone(setup: Setup, comparison: Comparison) -> str:
    figures, summary = setup.figures, setup.summary
    ranks = f"over {summary.world_size} ranks" if summary.world_size > 1 else "in one process"
    how = f"{'sharded' if summary.placement == 'shard' else 'replicated'} {ranks}" if summary.world_size > 1 else ranks
    size = format_count(summary.parameters.embedding)
    parts = [f"{setup.label}: {summary.method} with {size} embedding parameters, {how}"]
    if figures.test_auc:
        parts.append(f"test AUC {_with_spread(figures.test_auc)}")
    if figures.step_ms_p50:
        exposed = f", {_describe_exposed(figures.time)} of it exposed communication" if figures.time else ""
        parts.append(f"step {figures.step_ms_p50.mean:.3g} ms{exposed}")
    if outcome := _describe_arrival(setup, comparison):
        parts.append(outcome)
    return "; ".join(parts) + "."


def _describe_exposed(time: TimeFigures) -> str:
    return format_share(time.exposed_share) if time.mean.collectives else "none"


def _with_spread(value: Measured) -> str:
    return f"{value.mean:.4f}" + (f" ± {value.plus_minus:.4f}" if value.plus_minus is not None else "")


def _describe_arrival(setup: Setup, comparison: Comparison) -> str:
    arrival, target = setup.figures.target, comparison.target
    if arrival is None or target is None:
        return ""
    if arrival.observed is None:
        some = f" in {len(setup.runs) - arrival.runs} of {len(setup.runs)} runs" if arrival.runs else ""
        return f"does not reach the target {target.auc:.4f}{some} within {format_epochs(setup.figures.epochs)}"
    time, epochs = format_seconds(arrival.observed.time_s), format_epochs(arrival.observed.epochs)
    return f"reaches the target {target.auc:.4f} after {time} of training, {epochs}"


def find_findings(comparison: Comparison) -> list[Finding]:
    """One finding a setup but the baseline."""
    return [
        Finding(i, setup.label, _describe_against(setup, comparison))
        for i, setup in enumerate(comparison.setups)
        if not setup.is_baseline
    ]


def _describe_against(setup: Setup, comparison: Comparison) -> str:
    found, ratios, state = setup.figures, setup.ratios, describe_state(setup)
    size = f"{setup.summary.method} with {format_count(setup.summary.parameters.embedding)} embedding parameters"
    parts = [f"{state}; {size}" if state else size]
    if auc := _describe_auc(found.test_auc, comparison.baseline.figures.test_auc):
        parts.append(auc)
    if ratios.step_time is not None:
        parts.append(f"{format_ratio(ratios.step_time)} the step time")
    if found.time:
        own = comparison.baseline.figures.time
        against = f", against {_describe_exposed(own)}" if own else ""
        parts.append(f"{_describe_exposed(found.time)} of its step is exposed communication{against}")
    if ratios.embedding_bytes is not None:
        parts.append(f"{format_ratio(ratios.embedding_bytes)} the embedding memory per rank")
    if outcome := _describe_arrival(setup, comparison):
        if ratios.time_to_target is not None:
            outcome += f" ({format_ratio(ratios.time_to_target)} the baseline's time)"
        parts.append(outcome)
    text = "; ".join(parts) + "."
    return f"{text} {_describe_lead(setup.lead, comparison.baseline.summary.selected_on)}".strip()


def _describe_auc(value: Measured | None, baseline: Measured | None) -> str:
    if value is None or baseline is None:
        return "no test AUC yet" if value is None else f"test AUC {_with_spread(value)}"
    text = f"test AUC {_with_spread(value)} against {_with_spread(baseline)}"
    if value.plus_minus is None or baseline.plus_minus is None:
        return text
    within = abs(value.mean - baseline.mean) <= math.hypot(value.plus_minus, baseline.plus_minus)
    return f"{text}, a difference within the ±" if within else text


def _describe_lead(lead: CurveOrder | None, split: str) -> str:
    if lead is None:
        return ""
    first, then = ("ahead", "behind") if lead.ahead_at_first else ("behind", "ahead")
    turns = [format_seconds(time_s) for time_s in lead.changes_s]
    if not turns:
        course = f"{first} throughout"
    elif len(turns) == 1:
        course = f"{first} until {turns[0]}, {then} after"
    else:
        course = f"{then if len(turns) % 2 else first} after {turns[-1]}, having changed sides {len(turns)} times"
    span = f"{format_seconds(lead.start_s)} to {format_seconds(lead.end_s)}"
    return f"At equal training time ({span}) its {split} AUC is {course}."


def describe_overview(comparison: Comparison) -> str:
    """The extremes among many setups; '' for few, which are described one by one."""
    others = comparison.others
    if len(others) <= _MOST_FINDINGS:
        return ""
    parts = []
    if comparison.target:
        reached = [(s, s.figures.target.observed) for s in others if s.figures.target and s.figures.target.observed]
        parts.append(f"{len(reached)} of {len(others)} reach the target")
        if reached:
            smallest = min((s for s, _ in reached), key=lambda s: s.summary.parameters.embedding)
            fastest, place = min(reached, key=lambda pair: pair[1].time_s)
            size = format_count(smallest.summary.parameters.embedding)
            parts.append(f"the smallest of them is {smallest.label} with {size} embedding parameters")
            parts.append(f"the first of them in training time is {fastest.label} after {format_seconds(place.time_s)}")
    if aucs := [(s.figures.test_auc.mean, s.label) for s in others if s.figures.test_auc]:
        highest, label = max(aucs)
        own = comparison.baseline.figures.test_auc
        parts.append(f"the highest test AUC is {highest:.4f}, {label}" + (f", against {own.mean:.4f}" if own else ""))
    if steps := [(s.ratios.step_time, s.label) for s in others if s.ratios.step_time is not None]:
        parts.append(f"the shortest step is {format_ratio(min(steps)[0])}, {min(steps)[1]}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def build_plots(comparison: Comparison) -> list[Plot]:
    """Every plot the runs have figures for, in the order of the page."""
    styles = choose_styles(comparison)
    plots = [*quality_plots(comparison, styles), *cost_plots(comparison, styles), *time_plots(comparison)]
    return [plot for plot in plots if any(figure["data"] for figure in plot.figures.values())]


def write_report(comparison: Comparison, path: Path) -> None:
    """The page, in one piece: data, styles and plotly.js are inside it, and nothing is fetched."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_report(comparison))


def render_report(comparison: Comparison) -> str:
    plots = build_plots(comparison)
    findings = find_findings(comparison)
    return render_page(
        _TEMPLATE,
        comparison=comparison,
        title=describe_title(comparison),
        subject=describe_subject(comparison),
        overview=describe_overview(comparison),
        findings=findings,
        fold_findings=len(findings) > _MOST_FINDINGS,
        target=describe_target(comparison),
        best_possible=describe_best_possible(comparison),
        columns=choose_columns(comparison),
        time_columns=time_columns(comparison),
        traces=_trace_rows(comparison.runs),
        styles=choose_styles(comparison),
        states=[describe_state(setup) for setup in comparison.setups],
        plots={plot.id: plot for plot in plots},
        splits=find_splits(comparison),
        varied=[_varied_row(setup, comparison) for setup in comparison.setups],
        shared=_shared_rows(comparison),
        environments=_environment_rows(comparison.runs),
        figures=as_script_data([{"id": p.id, "title": p.title, "views": p.figures, "height": p.height} for p in plots]),
    )


def _varied_row(setup: Setup, comparison: Comparison) -> list[str]:
    """The setup's values of the keys on which any runs differ."""
    tables = [free_facts(run) for run in setup.runs]
    return [
        ", ".join(dict.fromkeys(_show(table.get(difference.key)) for table in tables))
        for difference in comparison.varied
    ]


def _shared_rows(comparison: Comparison) -> list[tuple[str, str]]:
    differing = {difference.key for difference in (*comparison.differences, *comparison.varied)}
    facts = {**shared_facts(comparison.runs[0]), **free_facts(comparison.runs[0])}
    return [(key, _show(value)) for key, value in facts.items() if key not in differing]


def _trace_rows(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Label of every profiled run -> rank 0's trace of each of its windows."""
    profiled = [run for run in runs if run.summary.profiles]
    return [(run.label, [str(RunDir(run.path).trace(w.step, 0)) for w in run.summary.profiles]) for run in profiled]


def _environment_rows(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[str]]]]]:
    """key -> its values, each with the labels of the runs that have it; no labels where all have the same."""
    tables = [flatten({k: v for k, v in run.environment.items() if k != "command"}) for run in runs]
    rows = []
    for key in dict.fromkeys(key for table in tables for key in table):
        values: dict[str, list[str]] = {}
        for run, table in zip(runs, tables, strict=True):
            values.setdefault(_show(table.get(key)), []).append(run.label)
        rows.append((key, [(v, labels if len(values) > 1 else []) for v, labels in values.items()]))
    return rows


def _show(value: Any) -> str:
    if value is None or value == "":
        return "–"
    return json.dumps(value) if isinstance(value, bool | list) else str(value)
