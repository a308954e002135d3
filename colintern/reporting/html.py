"""Templates to one HTML file that needs nothing else: its style is in it, and its policy forbids it to load anything.

Every value is escaped by the template engine, unless it was made here (`Markup`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:  # torch, for which a study has no use
    from colintern.reporting.cases import Case

TEMPLATES = Path(__file__).with_name("templates")


def render(template: str, cases: list[Case], **values: Any) -> str:
    """The page; `cases` decides how many tokens the style knows how to choose from."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    most = max((len(case.tokens) for case in cases), default=0)
    # A chosen token moves every heatmap of its case: no script is needed.
    chosen = "".join(f'.case:has(input[value="{i}"]:checked){{--t:{i}}}' for i in range(1, most + 1))
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8") + chosen)
    return environment.get_template(template).render(style=style, cases=cases, **values)
