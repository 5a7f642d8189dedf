"""The examples of one's own parts run, are what CONTRIBUTING shows, and compute what they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import lorasc_fx as lx
from examples import own_form, own_pass
from lorasc_fx.graph import branch_nodes
from lorasc_fx.passes import FoldBranches
from tests.kit.errors import raises
from tests.kit.state import weight_state
from tests.passes.kit import branches_of, deltas, weights_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["own_form", "own_pass"])
def test_contributing_shows_the_example(name: str) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    example = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```\n" in page


def test_own_form() -> None:
    cascade = own_form.main()
    assert [site.form for site in cascade.sites] == ["my.linear_gelu", ""]
    assert cascade.placements["0.weight"] == "weight"


def test_own_pass_limits_every_branch_and_is_folded() -> None:
    torch.manual_seed(0)
    inserted, folded = own_pass.main()
    x = torch.ones(2, 6)
    with torch.no_grad():
        free = FoldBranches()(inserted).graph_module
        for weight, delta in deltas(inserted).items():
            before = weight_state(inserted, weight).base
            share = min(1.0, float(0.2 * before.norm() / delta.norm()))
            assert share < 0.9  # the limit is felt
            torch.testing.assert_close(weights_of(folded)[weight].detach(), before + 0.5 * share * delta)  # pace
        assert not branch_nodes(folded)
        assert (free(x) - folded(x)).abs().max() > 1e-2


def test_own_pass_is_one_as_ours_are() -> None:
    torch.manual_seed(0)
    inserted, _ = own_pass.main()
    limit = own_pass.LimitNorm(0.2)
    branches = {key: branch.lora_B.detach().clone() for key, branch in branches_of(inserted).items()}
    result = limit(inserted)
    assert result.modified
    assert not limit(result.graph_module).modified
    assert any(not torch.equal(branch.lora_B, branches[key]) for key, branch in branches_of(inserted).items())
    with raises(lx.PassError, "requirement-not-met", "limit-norm requires branches-inserted"):
        limit(torch.fx.symbolic_trace(torch.nn.Linear(2, 3)))
