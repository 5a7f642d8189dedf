"""`low_rank_pairs`: packed, transposed and quantized weights, and changes that factors cannot express."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

import lorasc_fx as lx
from lorasc_fx.peft.adapter_pairs import low_rank_pairs
from lorasc_fx.peft.change import compressed
from tests.kit.compare import Watch, tensors
from tests.kit.errors import raises
from tests.kit.models import randomize
from tests.kit.state import Factors
from tests.peft.models import BUILD, INPUTS, cascade_of, made, trained_by_peft


def test_tensors_of_a_packed_and_of_a_transposed_weight() -> None:
    """The input projection of attention, which is read in parts, and a weight stored as [in, out]."""
    torch.manual_seed(4)
    attention, x = nn.MultiheadAttention(8, 2).double(), torch.randn(3, 2, 8, dtype=torch.float64)
    fused = lx.adapt(attention, (x, x + 1, x - 1), {"need_weights": False}, spec=lx.CascadeSpec(rank=2, pace=1.0))
    for cascade, shape in ((fused, (4, 8)), (cascade_of("gpt2", targets=("*.c_fc",)), (4, 12))):
        randomize(cascade)
        site, adapter = cascade.sites[0], low_rank_pairs(cascade)
        written, cut = adapter.tensors(site, 4)
        assert tuple(written["lora_A"].shape) == shape
        assert cut.error < 1e-12
        branch = type(cascade.branches[site.key])(
            replace(site, options=replace(site.options, rank=4, lora_alpha=4.0)), 0, 1, torch.zeros(1).double()
        )
        for key in ("lora_A", "lora_B"):
            branch.get_parameter(key).data.copy_(written[key])
        pair = adapter.pairs[site.weight]
        delta = branch.delta()
        assert float((pair.b @ pair.a).norm()) > 0.1
        torch.testing.assert_close(delta.b @ delta.a, pair.b @ pair.a, rtol=0, atol=1e-12)


def test_changes_that_factors_cannot_express_are_one_error(tmp_path: Path) -> None:
    head = cascade_of("words", targets=("emb", "up"), train=("head",))
    with raises(lx.SpecError, "method-not-supported", "bank: one, a cascade", "head.0.weight", "in full"):
        low_rank_pairs(head, name="one", call="bank")
    noisy = cascade_of("suffixes", noise=lx.Noise(0.1, keep=True), targets=("lin.weight",))
    with raises(lx.SpecError, "method-not-supported", "lin.weight", "noise.keep"):
        low_rank_pairs(noisy)
    with raises(lx.SpecError, "method-not-supported", "up.weight", "DoRA"):
        low_rank_pairs(cascade_of("words", adapter="dora", targets=("up",)))
    counted = cascade_of("convs")
    with torch.no_grad():
        counted.model.get_buffer("bn.running_mean").add_(1)
    with raises(lx.SpecError, "method-not-supported", "bn.running_mean", "buffer"):
        low_rank_pairs(counted, made(BUILD["convs"]))
    trained_by_peft("words", tmp_path, target_modules=["up"], modules_to_save=["head"], use_dora=True)
    with raises(lx.SpecError, "method-not-supported", "up.weight", "DoRA", "head.0.weight", "in full"):
        low_rank_pairs(tmp_path, made(BUILD["words"]))
    with raises(lx.SpecError, "invalid-value", "the run", tmp_path, "model"):
        low_rank_pairs(tmp_path)


def test_an_unchanged_parameter_is_accepted() -> None:
    cascade = lx.adapt(made(BUILD["words"]), INPUTS["words"](), spec=lx.CascadeSpec(targets=("up",), train=("head",)))
    randomize(cascade)
    assert low_rank_pairs(cascade).pairs.keys() == {"up.weight"}


def test_the_delta_is_never_formed() -> None:
    factors, sizes = Factors(torch.randn(300, 6), torch.randn(6, 400)), list[int]()
    with Watch(lambda _, __, output: sizes.extend(tensor.numel() for tensor in tensors(output))):
        compressed(factors, 2)
    assert max(sizes) <= 400 * 6
