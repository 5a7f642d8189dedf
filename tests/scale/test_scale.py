"""docs/scale.md is what its command prints, and its formulas count what runs and what can be counted by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import lorasc_fx as lx
from benchmarks.fake_ranks import PARTS, RESULTS, Sent, fake_ranks, first_rows, sharded, step
from benchmarks.scale import LARGEST, PAGE, RANK, SPEC, Llama, Mixtral, Moves, fsdp2, page, weights_of
from lorasc_fx.parallel import fsdp
from tests.kit.state import weight_states

pytestmark = pytest.mark.slow


def test_the_page_is_what_the_command_prints() -> None:
    """`python -m benchmarks.scale --write` writes it anew."""
    assert PAGE.read_text(encoding="utf-8") == page(Llama())


def test_parameters_by_hand() -> None:
    """Llama 3's 70B has 70,553,706,496 parameters; a branch has rank times (in + out)."""
    weights = weights_of(Llama())
    assert sum(each.entries for each in weights) == 70_553_706_496
    wide, between, few, vocabulary = 8192, 28672, 8192 // 64 * 8, 128256
    ends = (2 * wide) + 2 * (wide + few) + (2 * wide) + 3 * (wide + between)
    assert sum(sum(each.factors) for each in weights) == 80 * RANK * (ends - 2 * wide) + 80 * RANK * 2 * wide
    linear = 2 * wide * wide + 2 * wide * few + 3 * wide * between
    assert sum(each.entries for each in weights if each.rank) == 80 * linear
    figures = fsdp2(weights, 8)
    trained = 80 * RANK * ends
    assert figures.base == 2 * 70_553_706_496 / 8
    assert figures.factors == figures.gradients == figures.optimizer / 2 == 4 * trained / 8
    assert figures.host == 2 * 80 * linear / 8
    layer = 2 * (linear + 2 * wide) + 4 * RANK * ends
    end, root = 2 * wide * vocabulary, 2 * wide  # embedding and head, and the last norm
    assert figures.gathered == root + layer + end
    assert figures.forward == pytest.approx(7 / 8 * (80 * layer + 2 * end + root))
    assert figures.backward == pytest.approx(7 / 8 * (80 * layer + 2 * end + root + 4 * trained))
    into = 6 * wide + between
    assert figures.transition == pytest.approx(7 / 8 * 4 * 80 * RANK * into, rel=1e-3)


@pytest.fixture
def many() -> Iterator[int]:
    with fake_ranks(64):
        yield 64


@pytest.mark.parametrize("model", [Llama(num_hidden_layers=2), Mixtral(num_hidden_layers=2)], ids=["70B", "8x22B"])
def test_wide_models_on_the_meta_device_are_cut_for_64_ranks(model: Llama, many: int) -> None:
    """Two layers of the large models, without memory: what a rank would hold. The router's 8 rows lie on 8 ranks."""
    cascade = lx.adapt(model.on_meta(2), kwargs={"input_ids": torch.zeros(1, 8, dtype=torch.long)}, spec=SPEC)
    fsdp.shard(cascade)
    expected = fsdp2(weights_of(model), many)
    assert all(each.is_meta for each in cascade.parameters())
    rows = 0 if type(model) is Llama else 2 * (1 - 8 / many)
    held = sum(_bytes(each) for each in cascade.model.parameters())
    assert held == expected.base + rows * 2 * model.hidden_size
    held = sum(_bytes(each) for each in cascade.branches.parameters())
    assert held == expected.factors + rows * 4 * RANK


def test_larger_models_by_hand() -> None:
    """Parameters of Llama 3.1 405B and Mixtral 8x22B; replicas add the sum of a shard's gradients, and nothing else."""
    assert sum(each.entries for each in weights_of(LARGEST)) == 405_853_388_800
    weights = weights_of(Mixtral())
    assert sum(each.entries for each in weights) == 140_630_071_296
    once, often = fsdp2(weights, 8), fsdp2(weights, 8, 64)
    assert often.device == once.device
    assert often.forward == once.forward
    assert often.backward - once.backward == pytest.approx(2 * 63 / 64 * once.gradients)
    assert Moves.of(weights, once, 8).seconds["merging"] * 50e9 == pytest.approx(
        7 / 8 * (8 * once.host + 8 * once.factors)
    )


@pytest.mark.parametrize("layers", [2, 3])
def test_fsdp_sends_and_holds_what_the_formulas_say(many: int, layers: int) -> None:
    """A narrow llama on 64 ranks, of which the others do nothing: a step and a transition, and the collectives."""
    llama = Llama(128, 256, layers, 4, 2, 128)
    sizes = {**vars(llama), "pad_token_id": 0, "tie_word_embeddings": False, "use_cache": False}
    model, ids = LlamaForCausalLM(LlamaConfig(**sizes)).to(torch.bfloat16), torch.randint(0, 64, (1, 8))
    cascade = fsdp.shard(lx.adapt(model, kwargs={"input_ids": ids}, spec=SPEC))
    expected = fsdp2(weights_of(llama), many)
    assert sum(_bytes(each) for each in cascade.model.parameters()) == expected.base
    assert sum(_bytes(each) for each in cascade.branches.parameters()) == expected.factors
    assert sum(state.base.nbytes for state in weight_states(cascade).values()) == expected.host
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    with Sent(many) as forward:
        logits = cascade(input_ids=ids).logits
    with Sent(many) as backward:
        logits.float().sum().backward()
    for parameter in cascade.branches.parameters():  # sums with what the other ranks have not sent are no numbers
        parameter.grad.to_local().fill_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    with Sent(many) as transition:
        cascade.transition(optimizer)
    units, sites = layers + 3, 7 * layers  # embedding, head and root are units as well
    assert forward.seen == {"_allgather_base_": units}
    assert backward.seen == {"_allgather_base_": units, "_reduce_scatter_base_": layers}
    assert transition.seen["all_gather_into_tensor"] == sites  # lora_A
    assert 6 * sites <= transition.seen["allreduce_"] < 6 * sites + 10
    assert forward.bytes == pytest.approx(expected.forward)
    assert backward.bytes == pytest.approx(expected.backward)
    assert transition.bytes == pytest.approx(expected.transition, rel=1e-2)


def check_counts(found: Mapping[str, tuple[Mapping[str, int], float]], layers: int, ranks: int) -> None:
    """A unit is gathered once in forward and once in backward, and has one reduce-scatter if it trains. A transition
    gathers each lora_A, and has six sums a site. There is nothing else.
    """
    units, sites = layers + 3, 7 * layers  # embedding, head and root are units as well
    expected = fsdp2(weights_of(Llama(num_hidden_layers=layers)), ranks)
    assert found["forward"] == ({"_allgather_base_": units}, pytest.approx(expected.forward))
    assert found["backward"] == (
        {"_allgather_base_": units, "_reduce_scatter_base_": layers},
        pytest.approx(expected.backward),
    )
    assert found["AdamW's step"] == ({}, 0.0)
    seen, sent = found["transition"]
    assert seen["all_gather_into_tensor"] == sites
    assert seen["allreduce_"] in (6 * sites + 4, 6 * sites + 5)  # the page was measured before buffers were checked
    assert len(seen) == 2
    assert sent == pytest.approx(expected.transition, rel=1e-4)


def test_a_step_and_a_transition_at_the_width_of_70b(many: int, tmp_path: Path) -> None:
    """Two layers: weights that are gathered have shapes alone; the shards of rank 0, and the slow weights that the
    transition makes of them, are numbers. What rank 0 gathers of lora_A is its own part for each rank.
    """
    spec, ids = replace(SPEC, lora_alpha=RANK, pace=0.5), torch.zeros(1, 4096, dtype=torch.long)
    cascade = sharded(Llama().on_meta(2), ids, spec, tmp_path)
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    found = step(cascade, optimizer, ids)
    factors = {name: value.to_local().clone() for name, value in cascade.branches.named_parameters()}
    with Sent(many) as found["transition"]:
        cascade.transition(optimizer)
    check_counts({name: (sent.seen, sent.bytes) for name, sent in found.items()}, 2, many)
    started = dict(cascade.model.named_parameters())
    noisy = {site.weight: started[site.weight].to_local().clone() for site in cascade.sites}
    with cascade.weights("slow"):
        for site in cascade.sites:
            weight = cascade.model.get_parameter(site.weight)
            a, b = (factors[f"{site.key}.{name}"] for name in ("lora_A", "lora_B"))
            base = first_rows(site.weight, weight.shape, many).float()
            delta = 0.5 * (b @ a.repeat(1, many))
            slow = weight.to_local()
            torch.testing.assert_close(slow.float(), base + delta, rtol=2**-8, atol=1e-6)
            assert delta.abs().mean() > 0.5 * base.std()
            noise = (noisy[site.weight].float() - slow.float()).std() / slow.float().std()
            assert noise == pytest.approx(0.1 / 12**0.5, rel=0.05)


def test_the_counts_of_the_page_are_those_of_the_formulas() -> None:
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert (found["layers"], found["ranks"]) == (80, 64)
    check_counts({part: (found[part]["seen"], found[part]["bytes"]) for part in PARTS}, 80, 64)


def _bytes(parameter: Any) -> int:
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return int(own.numel() * own.element_size())
