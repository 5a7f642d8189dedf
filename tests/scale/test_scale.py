"""benchmarks/scale.md is what its command prints, and its formulas count what runs and what can be counted by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

import lorasc_fx as lx
from benchmarks.fake_ranks import Sent, fake_ranks
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


def test_a_wide_model_on_the_meta_device_is_cut_for_64_ranks(many: int) -> None:
    """Two layers of Mixtral 8x22B, without memory: what a rank would hold. The router's 8 rows lie on 8 ranks."""
    model = Mixtral(num_hidden_layers=2)
    cascade = lx.adapt(model.on_meta(2), kwargs={"input_ids": torch.zeros(1, 8, dtype=torch.long)}, spec=SPEC)
    fsdp.shard(cascade)
    expected = fsdp2(weights_of(model), many)
    assert all(each.is_meta for each in cascade.parameters())
    rows = 2 * (1 - 8 / many)
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


def test_fsdp_sends_and_holds_what_the_formulas_say(many: int) -> None:
    """A narrow llama on 64 ranks, of which the others do nothing: a step and a transition, and the collectives."""
    layers = 2
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


def _bytes(parameter: Any) -> int:
    own = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return int(own.numel() * own.element_size())
