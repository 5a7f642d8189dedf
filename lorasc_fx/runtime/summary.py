"""What `print(cascade)` shows."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorasc_fx.runtime.described import Described

__all__ = ["summary"]

SHOWN = 8


def summary(cascade: Described) -> str:
    """Return a few lines: model, front end, sites by kind, refusals by reason, parameters, stage."""
    plan, spec = cascade.plan, cascade.plan.spec
    pace = spec.pace_at(plan.stage)
    total = sum(parameter.numel() for parameter in cascade.model.parameters())
    trainable = sum(parameter.numel() for parameter in cascade.core.trainable().values())
    kinds = Counter(site.kind for site in cascade.sites)
    lines = [
        f"Cascade of {type(cascade.model).__name__}, captured by {cascade.frontend}",
        f"  stage {plan.stage}, pace {pace:g}, noise {spec.noise.strength:g}, restart {spec.restart}",
        f"  {len(cascade.sites)} sites: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        f"  {trainable:,} trainable of {total:,} parameters ({100 * trainable / max(total, 1):.2f} %)",
    ]
    lines += _placements(cascade)
    lines += [f"  before: {name} refused: {reason}" for name, reason in cascade.refused_frontends]
    asked = Counter(refusal.reason.value for refusal in cascade.refusals if refusal.reason.asked)
    if asked:
        lines.append("  left as asked: " + ", ".join(f"{count} {reason}" for reason, count in asked.items()))
    ours = [refusal for refusal in cascade.refusals if not refusal.reason.asked]
    if ours:
        lines.append(f"  {len(ours)} refusals:")
        lines += [f"    {refusal}" for refusal in ours[:SHOWN]]
        if len(ours) > SHOWN:
            lines.append(f"    and {len(ours) - SHOWN} more, see cascade.refusals")
    if cascade.unreached:
        shown = ", ".join(cascade.unreached[:SHOWN])
        lines.append(f"  {len(cascade.unreached)} unreached (in no graph yet): {shown}")
    return "\n".join(lines)


def _placements(cascade: Described) -> list[str]:
    """Return the line on where branches compute and what a step is expected to cost."""
    counted = Counter(cascade.placements.values())
    if not counted:
        return []
    ratio = cascade.expected_step_ratio
    told = f"; expected step {ratio:.2f} of the frozen model's" if ratio is not None else ""
    return ["  placements: " + ", ".join(f"{count} {where}" for where, count in counted.most_common()) + told]
