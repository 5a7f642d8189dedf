"""The HTML of a cascade in a notebook: parameters, a bar for each weight, sites and refusals."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from lorasc_fx.pictures.graph import STYLES
from lorasc_fx.pictures.svg import MUTED
from lorasc_fx.plan import Plan, Refusal

WIDTH, HEIGHT = 560, 48
"""CSS pixels of the drawing."""
MAX_ROWS = 50
"""Maximum number of rows of a table, which then ends with the number of the others."""


def cascade_html(
    text: str, names: Sequence[str], plan: Plan, placements: Mapping[str, str], refusals: Sequence[Refusal]
) -> str:
    """Return HTML of a cascade.

    Args:
        text: as printed. Its first lines are the heading, stage, kinds of sites, and parameters.
        names: of the weights, in the model's order.
        plan: of the running stage.
        placements: of the branch of each weight, if known.
        refusals: of the weights that are not adapted.
    """
    head, *lines = text.splitlines()
    refused = {refusal.weight: refusal.reason.value for refusal in refusals}
    sites = [
        (site.weight, " × ".join(map(str, site.shape)), site.kind, str(site.rank), placements.get(site.weight, ""))
        for site in plan.sites
    ]
    parts = [f"<b>{html.escape(head)}</b>", *(html.escape(line.strip()) for line in lines[:3])]
    parts.append(_bars(names, plan, placements, refused))
    parts.append(_table(f"{len(sites)} sites", ("weight", "shape", "kind", "rank", "placement"), sites))
    if refusals:
        rows = [(refusal.weight, str(refusal).removeprefix(f"{refusal.weight}: ")) for refusal in refusals]
        parts.append(_table(f"{len(rows)} weights are not adapted", ("weight", "reason"), rows))
    return "<div>" + "".join(f"<div>{part}</div>" for part in parts) + "</div>"


def _bars(names: Sequence[str], plan: Plan, placements: Mapping[str, str], refused: Mapping[str, str]) -> str:
    """Return a bar for each site or refused weight. Its height is the rank, its colour the placement."""
    chosen = [name for name in names if name in plan.by_weight or name in refused]
    step, most = WIDTH / max(len(chosen), 1), max((site.rank for site in plan.sites), default=1)
    bars = []
    for index, name in enumerate(chosen):
        site = plan.by_weight.get(name)
        colour = STYLES[placements[name]][0] if name in placements else STYLES["site"][0] if site is not None else MUTED
        tall = 4.0 if site is None else 4 + (HEIGHT - 4) * site.rank / most
        title = f"{name}: {refused[name]}" if site is None else f"{name}, rank {site.rank} {placements.get(name, '')}"
        bars.append(
            f'<rect x="{index * step:.2f}" y="{HEIGHT - tall:.1f}" width="{max(0.8 * step, 0.5):.2f}" '
            f'height="{tall:.1f}" fill="{colour}"><title>{html.escape(title.strip())}</title></rect>'
        )
    description = f"{len(plan.sites)} of {len(chosen)} weight matrices are adapted; the height of a bar is the rank."
    return (
        f'<svg role="img" aria-label="{description}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'style="width:100%;max-width:{WIDTH}px;height:auto">{"".join(bars)}</svg>'
    )


def _table(title: str, head: Iterable[str], rows: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{html.escape(column)}</th>" for column in head)
    body = "".join(f"<tr>{''.join(f'<td>{html.escape(cell)}</td>' for cell in row)}</tr>" for row in rows[:MAX_ROWS])
    more = f"<div>and {len(rows) - MAX_ROWS} more</div>" if len(rows) > MAX_ROWS else ""
    return (
        f"<details><summary>{html.escape(title)}</summary><table><thead><tr>{cells}</tr></thead>"
        f"<tbody>{body}</tbody></table>{more}</details>"
    )
