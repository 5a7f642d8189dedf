"""The summary that `print(cascade)` shows: sites, refusals, parameters and front end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from lorasc_fx.cascade.run import Run

_SHOWN = 8
"""Maximum number of refusals, and of unreached weights, that the summary names."""


def summary(
    run: Run, frontend: str, refused_frontends: tuple[tuple[str, str], ...], placements: Mapping[str, str]
) -> str:
    """Return the summary of a cascade as lines of text."""
    plan, spec = run.plan, run.plan.spec
    total = sum(parameter.numel() for parameter in run.model.parameters())
    trainable = run.trained_entries
    pace = f"{spec.pace_at(plan.stage, run.slow.history.count):g}"
    kinds, counted = Counter(site.kind for site in plan.sites), Counter(placements.values())
    lines = [
        f"Cascade of {type(run.model).__name__}, "
        + (f"captured by {frontend}" if frontend else "captured at its first call"),
        f"  stage {plan.stage}, pace {pace}, noise {spec.noise.strength:g}, restart {spec.restart}",
        f"  {len(plan.sites)} sites: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()),
        f"  {trainable:,} trainable of {total:,} parameters ({100 * trainable / max(total, 1):.2f} %)",
    ]
    if counted:
        lines.append("  placements: " + ", ".join(f"{count} {where}" for where, count in counted.most_common()))
    lines += [f"  before: {name} refused: {reason}" for name, reason in refused_frontends]
    requested = Counter(refusal.reason.value for refusal in run.refusals if refusal.reason.requested)
    if requested:
        lines.append("  left as asked: " + ", ".join(f"{count} {reason}" for reason, count in requested.items()))
    refusals = [refusal for refusal in run.refusals if not refusal.reason.requested]
    if refusals:
        lines.append(f"  {len(refusals)} refusals:")
        lines += [f"    {refusal}" for refusal in refusals[:_SHOWN]]
        if len(refusals) > _SHOWN:
            lines.append(f"    and {len(refusals) - _SHOWN} more, see cascade.refusals")
    if run.unreached:
        shown = ", ".join(run.unreached[:_SHOWN])
        lines.append(f"  {len(run.unreached)} unreached (in no graph yet): {shown}")
    return "\n".join(lines)
