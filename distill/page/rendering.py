"""Templates to text: everything is escaped but what the templates themselves say."""

import importlib.metadata
import re
from pathlib import Path
from typing import Any

import jinja2

from distill.page import words
from distill.page.charts import Matrices, Rows

FOLDER = Path(__file__).parent
# What no HTML may hold: control characters, halves of surrogate pairs, noncharacters.
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]")
WIDTH, MARGIN = 760, 24  # of a figure that is a file, in pixels


def rendered(template: str, **values: Any) -> str:
    """A page or a figure as text that UTF-8 can hold."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"number": words.number, "interval": words.interval, "score": words.score}
    foot = f"Written by distill {importlib.metadata.version('distill')}."
    text = environment.get_template(template).render(foot=foot, **values)
    return FORBIDDEN.sub("\ufffd", text)


def figure_file(chart: Rows | Matrices, legend: list[tuple[str, str]]) -> str:
    """A chart as an SVG file of its own, 760 pixels wide; dots say in a legend whose they are."""
    named = legend if isinstance(chart, Rows) and chart.kind == "dot" else []
    return rendered("figure.svg", chart=chart, legend=named, inner=WIDTH - 2 * MARGIN, margin=MARGIN, width=WIDTH)
