"""A projection in tables and words: on the terminal, as JSON, and as a page with plots.

Every figure carries what it is: measured, emulated, published or projected.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from recsys.cost.fit import FOLDS, describe_errors, worst_byte_error
from recsys.cost.machines import Model
from recsys.cost.projection import FULL, Crossover, Point, Projection, Totals, Validation
from recsys.cost.projection_plots import build_plots
from recsys.cost.published_steps import PUBLISHED, Check
from recsys.report.numbers import (
    MISSING,
    format_amount,
    format_count,
    format_ratio,
    format_rounded,
    three_digits,
)
from recsys.report.page import Details, Lines, Notice, Page, Pairs, Section
from recsys.report.table import Cell, CellLike, Column, Table

DOES_NOT_FIT = "does not fit"
_ORIGIN = "Nothing on this page was measured on the machines it is about."


def build_page(projection: Projection) -> Page:
    """Return the page of a projection; what a terminal can show of it, `print_page` prints."""
    cheapest, caveats = describe_cheapest(projection.points), describe_caveats(projection)
    sections = [
        Section("", [Lines(cheapest), Notice("How far to trust it", caveats), *build_plots(projection)]),
        *([_validation_section(projection.validation)] if projection.validation else []),
        Section(
            "Published steps, and the model's",
            ["×: projected over published. Set by it: the fixed time of a step was taken from that one.",
             checks_table(projection.checks)],
            ("published", "projected"),
        ),
        *(_model_section(projection, model) for model in projection.models),
        Section(
            "Assumptions",
            ["Each can be set on the command line: pss-bench project assumed.link_efficiency=0.5",
             assumptions_table(projection), Pairs(_sources(projection))],
        ),
    ]  # fmt: skip
    return Page(
        f"Sharded tables and ROBE on {projection.scenario.cost_model.machine.name}: a projection",
        "Projected by formula, not run: steps, devices and memory of both sides, and what the target takes.",
        sections,
        "projection",
        _ORIGIN,
    )


def _validation_section(validation: Validation) -> Section:
    table = Table(
        ["constant", "value", Column("unit", align="left"), Column("meaning", align="left")],
        [[c.name, Cell.of(c.value, "{:.3g}".format), c.unit, c.meaning] for c in validation.constants],
        title=f"Constants fitted to {len(validation.steps)} measured and emulated steps of this machine",
        notes=describe_validation(validation),
    )
    return Section("Constants of this machine", [table], ("measured", "emulated"))


def _model_section(projection: Projection, model: Model) -> Section:
    points = [point for point in projection.points if point.model is model]
    blocks: list[Any] = []
    for batch_size in projection.scenario.batch_sizes:
        of_batch = [point for point in points if point.global_batch_size == batch_size]
        refusals = list(dict.fromkeys(f"{point.setup}: {point.refusal}" for point in of_batch if point.refusal))
        blocks += [steps_table(projection, of_batch), totals_table(of_batch), *([Lines(refusals)] if refusals else [])]
    if (crossovers := crossover_table(projection, model)).rows:
        blocks.append(crossovers)
    blocks.append(Details("Every projected step", [points_table(projection, points)]))
    return Section(model.name, blocks, ("projected",))


def _sources(projection: Projection) -> dict[str, CellLike | Sequence[CellLike]]:
    scenario = projection.scenario
    machine = scenario.cost_model.machine
    return {
        "machine": f"{machine.name}: {machine.source}",
        **{f"model {model.name}": model.source for model in scenario.models},
        "optimizer": scenario.cost_model.optimizer,
        "price": f"${scenario.price:g} a GPU-hour, assumed",
    }


def checks_table(checks: Sequence[Check]) -> Table:
    """Return published steps beside the model's."""

    def figure(check: Check, value: float) -> Cell:
        digits = ".1f" if check.unit == "ms" else ".2f"
        return Cell(f"{value:{digits}} {check.unit}", "", value)

    columns: list[Column[Check]] = [
        Column("source", cell=lambda check: check.source),
        Column("step", cell=lambda check: check.label, align="left"),
        Column("published", cell=lambda check: figure(check, check.published)),
        Column("projected", cell=lambda check: figure(check, check.projected)),
        Column("×", "Projected over published.",
               lambda check: Cell(f"{check.ratio:.2f}{' (set by it)' * check.is_calibration}", value=check.ratio)),
    ]  # fmt: skip
    return Table.of(checks, columns, title="Published steps, and the model's", pinned=2)


def steps_table(projection: Projection, points: Sequence[Point]) -> Table:
    """Return the steps of one model and batch size: a row a place, a column a setup."""

    def cell(point: Point | None, sharded: Point | None) -> Cell:
        if point is None:
            return Cell("")
        if point.cost is None:
            return Cell(DOES_NOT_FIT)
        ratio = f" {format_ratio(point.cost.step_ms / sharded.cost.step_ms)}" if sharded and sharded.cost else ""
        return Cell(three_digits(point.cost.step_ms) + ratio, describe_parts(point), point.cost.step_ms)

    rows = []
    for place in dict.fromkeys(point.place for point in points):
        here = {point.compression: point for point in points if point.place == place}
        sharded = here.get(FULL)
        how = f"{sharded.placement}, busiest {sharded.imbalance:.2f}×" if sharded and sharded.cost else ""
        robe = [cell(here.get(compression), sharded) for compression in projection.scenario.compressions]
        rows.append([str(place), how, cell(sharded, None), *robe])
    columns = [
        "step, ms, × sharded", Column("placement", align="left"), "sharded",
        *(f"ROBE {compression:,.0f}×" for compression in projection.scenario.compressions),
    ]  # fmt: skip
    return Table(columns, rows, f"{_subject(points)}: projected steps (computing + exposed communication)", pinned=2)


def describe_parts(point: Point) -> str:
    """Return computing + exposed communication in ms, or why there is no step."""
    if point.cost is None:
        return point.refusal
    return f"{three_digits(point.cost.computing_ms)} + {three_digits(point.cost.exposed_comm_ms)}"


def _subject(points: Sequence[Point]) -> str:
    return f"{points[0].model.name}, batch {points[0].global_batch_size:,}"


def _total(
    title: str, amount: Callable[[Totals], float], text: Callable[[float], str] = format_amount
) -> Column[Point]:
    """Return the column of a total, empty where it does not fit or no epochs are published."""
    return Column(title, cell=lambda point: Cell.of(amount(point.totals) if point.totals else None, text))


TOTALS: Sequence[Column[Point]] = (
    Column("setup", cell=lambda point: point.setup),
    Column("place", cell=lambda point: str(point.place), align="left"),
    Column("GPUs ≥", "The fewest that hold it.", lambda point: Cell.of(point.devices, "{:,.0f}".format)),
    Column(
        "step", "Projected.", unit="ms",
        cell=lambda point: Cell.of(point.step_ms, three_digits) if point.cost else Cell(DOES_NOT_FIT),
    ),
    Column("samples/s", "Projected.", lambda point: Cell.of(point.samples_per_s, format_count)),
    Column(
        "epochs", "Published, to the target.",
        lambda point: Cell.of(point.totals.epochs, "{:.2f}".format)
        if point.totals else Cell("not published" if point.cost else MISSING),
    ),
    _total("hours", lambda totals: totals.hours),
    _total("GPU-h", lambda totals: totals.gpu_hours),
    _total("kWh", lambda totals: totals.kwh),
    _total("US $", lambda totals: totals.dollars),
    Column(
        "GB/GPU", "Tables or M with their optimizer state, layers, activations and buffers, of the fullest GPU.",
        lambda point: Cell.of(point.stored_bytes / 1e9 if point.cost else None, "{:.3g}".format),
    ),
)  # fmt: skip


def totals_table(points: Sequence[Point]) -> Table:
    """Return every setup of one model and batch size on the fewest GPUs and on the fastest."""
    rows = []
    for setup in dict.fromkeys(point.setup for point in points):
        of_setup = [point for point in points if point.setup == setup]
        fitting = [point for point in of_setup if point.cost] or of_setup[:1]
        fastest = min(fitting, key=lambda point: point.step_ms or 0.0)
        rows += [fitting[0], *([fastest] if fastest is not fitting[0] else [])]
    title = f"{_subject(points)}: on the fewest and on the fastest GPUs, projected"
    return Table.of(rows, TOTALS, title=title, pinned=2)


def points_table(projection: Projection, points: Sequence[Point]) -> Table:
    """Return all points of a model."""

    def ratio(point: Point) -> Cell:
        sharded = projection.sharded_beside(point)
        return Cell.of(point.cost.step_ms / sharded.cost.step_ms if point.cost and sharded and sharded.cost else None,
                       format_ratio)  # fmt: skip

    columns: list[Column[Point]] = [
        *TOTALS[:2],
        Column("batch", cell=lambda point: point.global_batch_size),
        *TOTALS[2:4],
        Column("computing + exposed communication", unit="ms", cell=describe_parts),
        Column("× sharded", "The step over that of sharded tables on the same GPUs.", ratio),
        *TOTALS[4:],
    ]
    return Table.of(points, columns)


def describe_crossover(crossover: Crossover) -> str:
    """Return 'ROBE < 700 < sharded', who is the faster below and above a global batch size; 'ROBE': at all."""
    names = {True: "sharded", False: "ROBE"}
    words = [names[crossover.sharded_first]]
    for size, is_sharded in crossover.changes:
        words += [format_rounded(size), names[is_sharded]]
    return " < ".join(words)


def crossover_table(projection: Projection, model: Model) -> Table:
    """Return the crossovers of a model: a row a place with sharded tables on it, a column a ROBE setup."""
    crossovers = [c for c in projection.crossovers if c.model is model]
    words = {(c.place, c.setup): describe_crossover(c) for c in crossovers}
    setups = list(dict.fromkeys(c.setup for c in crossovers))
    rows = [
        [str(place), *(words.get((place, setup), MISSING) for setup in setups)]
        for place in dict.fromkeys(c.place for c in crossovers)
    ]
    title = f"{model.name}: who is the faster below < and above a global batch size, projected"
    return Table(["sharded on, against ROBE", *(setup.removeprefix("ROBE ") for setup in setups)], rows, title)


def assumptions_table(projection: Projection) -> Table:
    """Return everything that `machine.key=value` and `assumed.key=value` change."""
    cost_model, rows = projection.scenario.cost_model, []
    for prefix, section in (("machine", cost_model.machine), ("assumed", cost_model.assumed)):
        for key, info in type(section).model_fields.items():
            if key not in ("name", "source"):
                meaning = " ".join((info.description or "").split())
                rows.append([f"{prefix}.{key}", f"{getattr(section, key):g}", meaning])
    columns = ["key", Column("value", align="left"), Column("meaning", align="left")]
    title, source = f"Assumptions: {cost_model.machine.name}", f"{cost_model.machine.source}."
    return Table(columns, rows, title, [source], pinned=2)


def describe_validation(validation: Validation) -> list[str]:
    """Return how far predictions and byte formulas are off what was measured."""
    lines = [f"left out by {fold}: {describe_errors(validation.of_fold(fold))}" for fold in FOLDS]
    if (worst := worst_byte_error(validation.steps)) is not None:
        lines.append(f"bytes of the collectives by formula are within {worst:.3%} of those that the profile counted")
    return lines


def describe_cheapest(points: Sequence[Point]) -> list[str]:
    """Return for every model and batch size with totals the fewest hours and the fewest dollars of both sides."""
    lines = []
    for model, batch_size in dict.fromkeys((point.model, point.global_batch_size) for point in points):
        reached = [
            (point, point.totals)
            for point in points
            if (point.model, point.global_batch_size) == (model, batch_size) and point.totals
        ]
        full = [pair for pair in reached if pair[0].compression == FULL]
        robe = [pair for pair in reached if pair[0].compression != FULL]
        if full and robe:
            parts = [
                f"fewest {unit}: {_least(full, amount)}, {_least(robe, amount)}"
                for unit, amount in (("hours", lambda totals: totals.hours), ("US $", lambda totals: totals.dollars))
            ]
            lines.append(f"{model.name}, batch {batch_size:,}: {'; '.join(parts)}")
    return lines


def _least(reached: Sequence[tuple[Point, Totals]], amount: Callable[[Totals], float]) -> str:
    point, totals = min(reached, key=lambda pair: amount(pair[1]))
    if point.compression == FULL:
        return f"sharded {format_amount(amount(totals))} ({point.place})"
    return f"ROBE {format_amount(amount(totals))} ({point.compression:,.0f}×, {point.place})"


def describe_caveats(projection: Projection) -> list[str]:
    """Return what must be known before a figure is used."""
    scenario, published_batch = projection.scenario, PUBLISHED.pss.global_batch_size
    lines = ["Every time, energy and cost of a cluster here is projected by formula: none of these steps has been run."]
    if projection.validation is None:
        lines.append(
            "No measurements were given: nothing here was checked on this machine, all rests on published figures."
        )
    else:
        lines.append(
            "The measurements check the formulas (bytes, messages, their sum), on CPUs over gloo. Their constants are "
            "of this machine and do not enter the projection, whose constants are published or assumed."
        )
    if any(size != published_batch for size in scenario.batch_sizes):
        lines.append(
            f"Epochs to the target were published at a batch size of {published_batch:,} with SGD: hours, energy and "
            "cost at another batch size take for granted that they hold there. Full tables are published to reach it "
            "in one epoch at 16,384 too (TorchRec's DLRM example), ROBE is not."
        )
    shares = [p.cost.compute_ms["fixed"] / p.cost.step_ms for p in projection.points if p.cost]
    if shares:
        lines.append(
            f"A fixed {scenario.cost_model.assumed.fixed_ms:g} ms is {min(shares):.0%} to {max(shares):.0%} of these "
            "steps and the same for all setups: assumed.fixed_ms=0 shows what the hardware alone would make of them."
        )
    ratios = [check.ratio for check in projection.checks if check.unit == "ms" and not check.is_calibration]
    lines.append(
        f"Published steps come out at {min(ratios):.2f} to {max(ratios):.2f} of what was published: the projection is "
        "kind to sharded tables, the more so between nodes. Nothing comparable is published for ROBE on these machines."
    )
    if any(model.name.startswith("scaled") for model in scenario.models):
        lines.append(
            "The models of 1 TB and 50 TB are Criteo-TB's with longer tables: real ones have hundreds of tables and "
            "many ids a bag. No quality is published for either side, so no totals."
        )
    return lines


def to_json(projection: Projection) -> dict[str, Any]:
    """Return every figure with its origin."""
    scenario, validation = projection.scenario, projection.validation
    return {
        "version": 1,
        "machine": scenario.cost_model.machine.model_dump(),
        "assumed": scenario.cost_model.assumed.model_dump(),
        "price_per_gpu_hour": scenario.price,
        "optimizer": scenario.cost_model.optimizer,
        "models": {
            model.name: model.model_dump()
            | {"table_bytes": 4 * model.table_parameters, "layer_parameters": model.layer_parameters}
            for model in scenario.models
        },
        "points": [_point_json(point) for point in projection.points],
        "crossovers": [_flat(c) | {"model": c.model.name, "origin": "projected"} for c in projection.crossovers],
        "published": [asdict(check) | {"ratio": check.ratio} for check in projection.checks],
        "validation": validation and {
            "constants": [asdict(constant) for constant in validation.constants],
            "summaries": describe_validation(validation),
            "predictions": [
                asdict(p.step) | {"fold": p.fold, "predicted_ms": p.predicted_ms, "origin": p.step.origin}
                for p in validation.predictions
            ],
        },
        "caveats": describe_caveats(projection),
    }  # fmt: skip


def _flat(record: Point | Crossover) -> dict[str, Any]:
    """Return the fields of a record, those of its place among them."""
    figures: dict[str, Any] = {}
    for name, value in asdict(record).items():
        figures |= value if name == "place" else {name: value}
    return figures


def _point_json(point: Point) -> dict[str, Any]:
    figures = _flat(point) | {"model": point.model.name, "setup": point.setup, "origin": "projected"}
    if cost := point.cost:
        figures |= {"step_ms": cost.step_ms, "computing_ms": cost.computing_ms}
        figures |= {"exposed_comm_ms": cost.exposed_comm_ms, "samples_per_s": point.samples_per_s}
    return figures
