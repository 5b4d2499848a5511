"""The outcome of a comparison in plain words, made from its figures alone."""

import math
from dataclasses import dataclass

from recsys.compare.comparison import Comparison
from recsys.compare.table import describe_state
from recsys.report.curves import CurveOrder
from recsys.report.frame import Arm, Measured, ProfiledSteps
from recsys.report.numbers import (
    format_count,
    format_epochs,
    format_measured,
    format_ratio,
    format_seconds,
    format_share,
    plural,
)

UNFAIR = "Not a fair comparison"
MOST_FINDINGS = 5
_SPREADS = {
    "seeds": "± over seeds is their standard deviation",
    "sampling": "± of test sampling is the standard error of one run's AUC by its finite test rows",
}


@dataclass(frozen=True)
class Outcome:
    """Hold the sentences about a comparison.

    subject: what was compared, and where the baseline stands. overview: the extremes among many arms, '' for few.
    findings: label of an arm and how it stands to the baseline, one for each but the baseline. reading: the target,
    and what the figures are to be read against. varied: what differs and may. warnings: what a reader must not miss.
    """

    title: str
    subject: str
    overview: str
    findings: tuple[tuple[str, str], ...]
    reading: tuple[str, ...]
    varied: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def blocks(self) -> list[list[str]]:
        """Return what the table alone does not say, in blocks of lines; the warnings stand last."""
        findings = [self.overview] if self.overview else [f"{label}: {text}" for label, text in self.findings]
        blocks = [[self.subject, *findings], [*self.reading], [*self.varied], [*self.warnings]]
        return [block for block in blocks if block]


def build_outcome(comparison: Comparison) -> Outcome:
    """Return the sentences about a comparison."""
    reading = (_target(comparison), _best_possible(comparison), _spread(comparison))
    unlike = [f"{UNFAIR}: runs differ in {difference}." for difference in comparison.differences]
    return Outcome(
        title=_title(comparison),
        subject=_subject(comparison),
        overview=_overview(comparison) if len(comparison.others) > MOST_FINDINGS else "",
        findings=tuple((arm.label, _finding(arm, comparison)) for arm in comparison.others),
        reading=tuple(line for line in reading if line),
        varied=tuple(f"Differs: {difference}." for difference in comparison.varied),
        warnings=(*unlike, *comparison.caveats),
    )


def _title(comparison: Comparison) -> str:
    labels, baseline = [arm.label for arm in comparison.others], comparison.baseline.label
    if not labels:
        return baseline
    if len(labels) > 3:
        return f"{len(labels)} arms against {baseline}"
    *first, last = labels
    return f"{', '.join(first)} and {last} against {baseline}" if first else f"{last} against {baseline}"


def _subject(comparison: Comparison) -> str:
    arm, several = comparison.baseline, len(comparison.arms) > 1
    run = comparison.runs_of(arm)[0]
    summary = run.summary
    hardware = run.environment.get("device" if summary.device == "cuda" else "cpu") or summary.device
    what = f"{len(comparison.arms)} arms of the same {summary.architecture}" if several else summary.architecture
    where = f"{summary.dataset} data, {format_count(summary.train_rows)} training rows"
    machine = f"{plural(run.threads, 'thread')} on {hardware}"
    intro = f"{what[0].upper()}{what[1:]} on {where}; {machine}."
    return f"{intro} {'Baseline ' if several else ''}{_alone(arm, comparison)}"


def _alone(arm: Arm, comparison: Comparison) -> str:
    ranks, size = arm.fact("world_size"), format_count(arm.fact("parameters.embedding"))
    placed = "sharded" if arm.fact("placement") == "shard" else "replicated"
    how = f"{placed} over {ranks} ranks" if ranks > 1 else "in one process"
    parts = [f"{arm.label}: {arm.fact('method')} with {size} embedding parameters, {how}"]
    if auc := arm.at_best("test_auc", sampling_error=True):
        parts.append(f"test AUC {format_measured(auc)}")
    if step := arm.mean("step_ms.p50"):
        exposed = f", {_exposed(arm.profiled)} of it exposed communication" if arm.profiled else ""
        parts.append(f"step {step.mean:.3g} ms{exposed}")
    if reached := _reached(arm, comparison):
        parts.append(reached)
    return "; ".join(parts) + "."


def _exposed(steps: ProfiledSteps) -> str:
    return format_share(steps.exposed_share) if steps.mean.collectives else "none"


def _reached(arm: Arm, comparison: Comparison) -> str:
    """Return whether the arm reaches the target, and when; '' where nothing is known of it."""
    reached, target = comparison.time_to_target(arm), comparison.target
    if reached is None or target is None:
        return ""
    if reached.observed is None:
        some = f" in {len(arm) - reached.runs} of {len(arm)} runs" if reached.runs else ""
        trained = arm.mean("epochs")
        within = format_epochs(trained.mean if trained else 0.0)
        return f"does not reach the target {target.auc:.4f}{some} within {within}"
    time, epochs = format_seconds(reached.observed.time_s), format_epochs(reached.observed.epochs)
    return f"reaches the target {target.auc:.4f} after {time} of training, {epochs}"


def _finding(arm: Arm, comparison: Comparison) -> str:
    """Return how an arm stands to the baseline."""
    baseline, ratios, state = comparison.baseline, comparison.ratios(arm), describe_state(arm)
    size = f"{arm.fact('method')} with {format_count(arm.fact('parameters.embedding'))} embedding parameters"
    parts = [f"{state}; {size}" if state else size]
    parts.append(_auc(*(a.at_best("test_auc", sampling_error=True) for a in (arm, baseline))))
    if ratios.step_time is not None:
        parts.append(f"{format_ratio(ratios.step_time)} the step time")
    if arm.profiled:
        against = f", against {_exposed(baseline.profiled)}" if baseline.profiled else ""
        parts.append(f"{_exposed(arm.profiled)} of its step is exposed communication{against}")
    if ratios.embedding_bytes is not None:
        parts.append(f"{format_ratio(ratios.embedding_bytes)} the embedding memory per rank")
    if reached := _reached(arm, comparison):
        over = ratios.time_to_target
        parts.append(reached + (f" ({format_ratio(over)} the baseline's time)" if over is not None else ""))
    return f"{'; '.join(parts)}. {_order(comparison.order(arm), comparison.split)}".strip()


def _auc(value: Measured | None, baseline: Measured | None) -> str:
    if value is None or baseline is None:
        return "no test AUC yet" if value is None else f"test AUC {format_measured(value)}"
    text = f"test AUC {format_measured(value)} against {format_measured(baseline)}"
    if value.plus_minus is None or baseline.plus_minus is None:
        return text
    # Both figures vary, independently of each other: the ± of their difference is the root of the sum of squares.
    within = abs(value.mean - baseline.mean) <= math.hypot(value.plus_minus, baseline.plus_minus)
    return f"{text}, a difference within the ±" if within else text


def _order(order: CurveOrder | None, split: str) -> str:
    if order is None:
        return ""
    first, then = ("ahead", "behind") if order.ahead_at_first else ("behind", "ahead")
    changes = [format_seconds(time_s) for time_s in order.changes_s]
    if not changes:
        course = f"{first} throughout"
    elif len(changes) == 1:
        course = f"{first} until {changes[0]}, {then} after"
    else:
        last = then if len(changes) % 2 else first
        course = f"{last} after {changes[-1]}, having changed sides {len(changes)} times"
    span = f"{format_seconds(order.start_s)} to {format_seconds(order.end_s)}"
    return f"At equal training time ({span}) its {split} AUC is {course}."


def _overview(comparison: Comparison) -> str:
    others, parts = comparison.others, []
    if comparison.target:
        places = [(arm, comparison.time_to_target(arm)) for arm in others]
        reached = [(arm, place.observed) for arm, place in places if place and place.observed]
        parts.append(f"{len(reached)} of {len(others)} reach the target")
        if reached:
            smallest = min((arm for arm, _ in reached), key=lambda arm: arm.fact("parameters.embedding"))
            fastest, place = min(reached, key=lambda pair: pair[1].time_s)
            size = format_count(smallest.fact("parameters.embedding"))
            parts.append(f"the smallest of them is {smallest.label} with {size} embedding parameters")
            parts.append(f"the first of them in training time is {fastest.label} after {format_seconds(place.time_s)}")
    if aucs := [(auc.mean, arm.label) for arm in others if (auc := arm.at_best("test_auc"))]:
        highest, label = max(aucs)
        own = comparison.baseline.at_best("test_auc")
        parts.append(f"the highest test AUC is {highest:.4f}, {label}" + (f", against {own.mean:.4f}" if own else ""))
    ratios = [(comparison.ratios(arm).step_time, arm.label) for arm in others]
    if steps := [(step, label) for step, label in ratios if step is not None]:
        parts.append(f"the shortest step is {format_ratio(min(steps)[0])}, {min(steps)[1]}")
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}." if text else ""


def _target(comparison: Comparison) -> str:
    target = comparison.target
    if target is None:
        return "No target AUC: none was given, and no finished run has full tables to take it from."
    return f"Target: {target.split} AUC {target.auc:.4f}, {target.rule}."


def _best_possible(comparison: Comparison) -> str:
    best = comparison.best_possible
    if best is None:
        return ""
    return (
        f"Best possible on these test rows, by the probabilities that generated them: AUC {best.auc:.4f}, "
        f"log loss {best.log_loss:.4f}, base rate {best.base_rate:.4f}."
    )


def _spread(comparison: Comparison) -> str:
    aucs = [arm.at_best("test_auc", sampling_error=True) for arm in comparison.arms]
    sources = {auc.source for auc in aucs if auc}
    meanings = [meaning for source, meaning in _SPREADS.items() if source in sources]
    return "; ".join(meanings) + "." if meanings else ""
