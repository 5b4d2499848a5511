"""A projection in rows and words: steps, totals to the target, crossovers, assumptions, and how far to trust them."""

from collections.abc import Sequence
from dataclasses import dataclass

from recsys.cost.cost_fit import FOLDS, Constant, Prediction, describe_errors
from recsys.cost.machines import Assumptions, Machine, Model
from recsys.cost.measured_steps import MeasuredStep, worst_byte_error
from recsys.cost.projection import FULL, Crossover, Point, Scenario
from recsys.cost.published_steps import Check
from recsys.report.numbers import MISSING, format_count, format_ratio, three_digits

PUBLISHED_BATCH = 2048
"""At which the paper's epochs to the target were counted."""


@dataclass(frozen=True)
class Validation:
    """The cost model on measured steps: fitted to all, and what it predicts of those left out."""

    steps: Sequence[MeasuredStep]
    constants: Sequence[Constant]
    predictions: Sequence[Prediction]

    @property
    def summaries(self) -> list[str]:
        lines = [f"left out by {fold}: {describe_errors(self.of_fold(fold))}" for fold in FOLDS]
        if (worst := worst_byte_error(self.steps)) is not None:
            lines.append(
                f"bytes of the collectives by formula are within {worst:.3%} of those that the profile counted"
            )
        return lines

    def of_fold(self, fold: str) -> list[Prediction]:
        return [prediction for prediction in self.predictions if prediction.fold == fold]


@dataclass(frozen=True)
class ProjectionReport:
    """validation None: no measurements were given."""

    scenario: Scenario
    points: Sequence[Point]
    crossovers: Sequence[Crossover]
    checks: Sequence[Check]
    validation: Validation | None


def describe_place(gpus: int, network_gbit: float | None) -> str:
    """'64 GPUs, 200 Gbit/s'"""
    if gpus == 1:
        return "1 GPU"
    return f"{gpus:,} GPUs" + (f", {network_gbit:g} Gbit/s" if network_gbit else "")


def sharded_of(points: Sequence[Point], point: Point) -> Point | None:
    """Sharded tables at the same place and batch size."""
    return next(
        (
            p
            for p in points
            if p.compression == FULL
            and p.model is point.model
            and (p.gpus, p.network_gbit, p.global_batch_size)
            == (point.gpus, point.network_gbit, point.global_batch_size)
        ),
        None,
    )


def step_cell(point: Point, sharded: Point | None = None) -> tuple[str, str]:
    """(step in ms, with its ratio to sharded tables; computing + exposed communication), or (–, why not)."""
    if point.cost is None:
        return MISSING, point.refusal
    ratio = f" {format_ratio(point.cost.step_ms / sharded.cost.step_ms)}" if sharded and sharded.cost else ""
    parts = f"{three_digits(point.cost.computing_ms)} + {three_digits(point.cost.exposed_comm_ms)}"
    return f"{three_digits(point.cost.step_ms)}{ratio}", parts


TOTAL_HEADINGS = (
    "setup", "place", "GPUs ≥", "step, ms", "samples/s", "epochs", "hours", "GPU-h", "kWh", "US $", "GB/GPU",
)  # fmt: skip
DOES_NOT_FIT = "does not fit"


def total_row(point: Point) -> list[str]:
    """Cells under TOTAL_HEADINGS."""
    devices = MISSING if point.devices is None else f"{point.devices:,}"
    where = describe_place(point.gpus, point.network_gbit)
    if point.cost is None:
        return [point.setup, where, devices, DOES_NOT_FIT, *([MISSING] * (len(TOTAL_HEADINGS) - 4))]
    totals = point.totals
    figures = ["not published", *[MISSING] * 4]
    if totals:
        figures = [f"{totals.epochs:.2f}", *map(_amount, (totals.hours, totals.gpu_hours, totals.kwh, totals.dollars))]
    return [
        point.setup,
        where,
        devices,
        three_digits(point.cost.step_ms),
        format_count(point.samples_per_s or 0),
        *figures,
        f"{point.stored_bytes / 1e9:.3g}",
    ]


def describe_refusals(points: Sequence[Point]) -> list[str]:
    """'ROBE 100×, one GPU: M of …', each once."""
    return list(dict.fromkeys(f"{point.setup}: {point.refusal}" for point in points if point.refusal))


def _amount(value: float) -> str:
    return f"{value:,.0f}" if value >= 99.5 else f"{value:.3g}"


def describe_crossover(crossover: Crossover) -> str:
    """'ROBE < 700 < sharded': who is the faster below and above which global batch size; 'ROBE': at every one."""
    names = {True: "sharded", False: "ROBE"}
    words = [names[crossover.sharded_first]]
    for size, is_sharded in crossover.changes:
        words += [_two_digits(size), names[is_sharded]]
    return " < ".join(words)


def crossover_table(report: ProjectionReport, model: Model) -> tuple[list[str], list[list[str]]]:
    """Headings and rows: a place against sharded tables on it, a ROBE setup each column."""
    found = [c for c in report.crossovers if c.model is model]
    setups = list(dict.fromkeys(c.setup.removeprefix("ROBE ") for c in found))
    rows = []
    for place in dict.fromkeys((c.gpus, c.network_gbit) for c in found):
        here = {
            c.setup.removeprefix("ROBE "): describe_crossover(c) for c in found if (c.gpus, c.network_gbit) == place
        }
        rows.append([describe_place(*place), *(here.get(setup, MISSING) for setup in setups)])
    return ["sharded on, against ROBE", *setups], rows


def _two_digits(value: float) -> str:
    return f"{float(f'{value:.2g}'):,.0f}"


def describe_cheapest(points: Sequence[Point]) -> list[str]:
    """For every model and batch size with totals: the fewest hours and the fewest dollars of both sides."""
    lines = []
    for model in models_of(points):
        for batch_size in sorted({point.global_batch_size for point in points}):
            found = [p for p in points if p.model is model and p.global_batch_size == batch_size and p.totals]
            full = [p for p in found if p.compression == FULL]
            robe = [p for p in found if p.compression != FULL]
            if full and robe:
                lines.append(f"{model.name}, batch {batch_size:,}: {_compare(full, robe)}")
    return lines


def _compare(full: Sequence[Point], robe: Sequence[Point]) -> str:
    parts = []
    for unit, amount in (("hours", lambda p: p.totals.hours), ("US $", lambda p: p.totals.dollars)):
        one, other = min(full, key=amount), min(robe, key=amount)
        parts.append(
            f"fewest {unit}: sharded {_amount(amount(one))} ({describe_place(one.gpus, one.network_gbit)}), ROBE "
            f"{_amount(amount(other))} ({other.compression:,.0f}×, {describe_place(other.gpus, other.network_gbit)})"
        )
    return "; ".join(parts)


def describe_assumptions(machine: Machine, assumed: Assumptions) -> list[tuple[str, str, str]]:
    """(key, value, meaning) of everything that `machine.key=value` and `assumed.key=value` change."""
    rows = []
    for prefix, section in (("machine", machine), ("assumed", assumed)):
        for key, info in type(section).model_fields.items():
            if key not in ("name", "source"):
                meaning = " ".join((info.description or "").split())
                rows.append((f"{prefix}.{key}", f"{getattr(section, key):g}", meaning))
    return rows


def describe_caveats(report: ProjectionReport) -> list[str]:
    """What must be known before a figure is used."""
    lines = ["Every time, energy and cost of a cluster here is projected by formula: none of these steps has been run."]
    if report.validation is None:
        lines.append(
            "No measurements were given: nothing here was checked on this machine, all rests on published figures."
        )
    else:
        lines.append(
            "The measurements check the formulas (bytes, messages, their sum), on CPUs over gloo. Their constants are "
            "of this machine and do not enter the projection, whose constants are published or assumed."
        )
    if any(size != PUBLISHED_BATCH for size in report.scenario.batch_sizes):
        lines.append(
            f"Epochs to the target were published at a batch size of {PUBLISHED_BATCH:,} with SGD: hours, energy and "
            "cost at another batch size take for granted that they hold there. Full tables are published to reach it "
            "in one epoch at 16,384 too (TorchRec's DLRM example), ROBE is not."
        )
    shares = [p.cost.compute_ms["fixed"] / p.cost.step_ms for p in report.points if p.cost]
    if shares:
        lines.append(
            f"A fixed {report.scenario.assumed.fixed_ms:g} ms is {min(shares):.0%} to {max(shares):.0%} of these steps "
            "and the same for all setups: assumed.fixed_ms=0 shows what the hardware alone would make of them."
        )
    steps = [check for check in report.checks if check.unit == "ms" and not check.is_calibration]
    low, high = min(c.ratio for c in steps), max(c.ratio for c in steps)
    lines.append(
        f"Published steps come out at {low:.2f} to {high:.2f} of what was published: the projection is kind to sharded "
        "tables, the more so between nodes. Nothing comparable is published for ROBE on these machines."
    )
    if any(model.name.startswith("scaled") for model in report.scenario.models):
        lines.append(
            "The models of 1 TB and 50 TB are Criteo-TB's with longer tables: real ones have hundreds of tables and "
            "many ids a bag. No quality is published for either side, so no totals."
        )
    return lines


def models_of(points: Sequence[Point]) -> list[Model]:
    return list(dict.fromkeys(point.model for point in points))


def check_row(check: Check) -> list[str]:
    """Source, step, published, projected, projected over published."""
    digits = ".2f" if check.unit != "ms" else ".1f"
    note = " (set by it)" if check.is_calibration else ""
    return [
        check.source,
        check.label,
        f"{check.published:{digits}} {check.unit}",
        f"{check.projected:{digits}} {check.unit}",
        f"{check.ratio:.2f}{note}",
    ]
