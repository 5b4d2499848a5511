"""A projection as JSON: every figure with its origin, measured, emulated, published or projected."""

from dataclasses import asdict
from typing import Any

from recsys.cost.machines import Model
from recsys.cost.projection import Point
from recsys.cost.projection_table import ProjectionReport, Validation, describe_caveats

VERSION = 1


def to_json(report: ProjectionReport) -> dict[str, Any]:
    """Of all that is on the page."""
    scenario = report.scenario
    return {
        "version": VERSION,
        "machine": scenario.machine.model_dump(),
        "assumed": scenario.assumed.model_dump(),
        "price_per_gpu_hour": scenario.price,
        "optimizer": scenario.optimizer,
        "models": {model.name: _describe_model(model) for model in scenario.models},
        "points": [_describe_point(point) for point in report.points],
        "crossovers": [asdict(c) | {"model": c.model.name, "origin": "projected"} for c in report.crossovers],
        "published": [asdict(check) | {"ratio": check.ratio} for check in report.checks],
        "validation": _describe_validation(report.validation) if report.validation else None,
        "caveats": describe_caveats(report),
    }


def _describe_model(model: Model) -> dict[str, Any]:
    return model.model_dump() | {"table_bytes": 4 * model.table_parameters, "layer_parameters": model.layer_parameters}


def _describe_point(point: Point) -> dict[str, Any]:
    figures = asdict(point) | {"model": point.model.name, "setup": point.setup, "origin": "projected"}
    if point.cost:
        cost = point.cost
        figures |= {"step_ms": cost.step_ms, "computing_ms": cost.computing_ms}
        figures |= {"exposed_comm_ms": cost.exposed_comm_ms, "samples_per_s": point.samples_per_s}
    return figures


def _describe_validation(validation: Validation) -> dict[str, Any]:
    return {
        "constants": [asdict(constant) for constant in validation.constants],
        "summaries": validation.summaries,
        "predictions": [
            asdict(p.step) | {"fold": p.fold, "predicted_ms": p.predicted_ms, "origin": p.step.origin}
            for p in validation.predictions
        ],
    }
