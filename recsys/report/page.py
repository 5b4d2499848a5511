"""Pages that stand alone: one HTML file with its data, styles and plotly.js inside, which fetches nothing."""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from recsys.runs.run_dir import write_atomically


def render_page(template: str, **values: Any) -> str:
    """Return the page of a template of any room, given `values`, `plotly` and `written`, the time."""
    environment = Environment(
        loader=FileSystemLoader([room for room in Path(__file__).parents[1].iterdir() if room.is_dir()]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    written = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template(template).render(plotly=Markup(get_plotlyjs()), written=written, **values)


def write_page(path: Path, template: str, **values: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_page(template, **values))


def as_script_data(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in."""
    return Markup(json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))
