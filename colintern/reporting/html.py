"""Render templates to one HTML file that needs nothing else: its style is in it, and its policy forbids loading.

Every value is escaped by the template engine, unless it was made here (`Markup`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

if TYPE_CHECKING:  # torch, for which a study has no use
    from colintern.reporting.examples import QueryExample

TEMPLATES = Path(__file__).with_name("templates")


def make_environment(autoescape: bool = True) -> Environment:
    """Make the template engine; `autoescape` is off for Markdown."""
    return Environment(  # nosec B701
        loader=FileSystemLoader(TEMPLATES),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def render_html(template: str, examples: list[QueryExample], **values: object) -> str:
    """Render the page; `examples` decides how many tokens the style knows how to choose from."""
    num_tokens = max((len(example.tokens) for example in examples), default=0)
    # A chosen token moves every heatmap of its example: no script is needed.
    chosen = "".join(f'.case:has(input[value="{i}"]:checked){{--t:{i}}}' for i in range(1, num_tokens + 1))
    style = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8") + chosen)
    return make_environment().get_template(template).render(style=style, examples=examples, **values)
