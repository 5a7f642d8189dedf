"""One rank of 64 in torch's `fake` process group, whose other ranks do nothing: its shards, and its collectives."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import lorasc_fx as lx
from lorasc_fx.parallel import fsdp
from tests.kit import tiny
from tests.kit.state import weight_states

pytestmark = pytest.mark.slow

RANKS, LAYERS, RANK = 64, 2, 16
SPEC = lx.CascadeSpec(targets=("*.self_attn.*", "*.mlp.*"), rank=RANK, noise=lx.Noise(0.1))


class Collectives(TorchDispatchMode):
    """Counts collectives by name."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:
            return NotImplemented
        if "c10d" in func.namespace:
            self.seen[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def ranks() -> Iterator[None]:
    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def local_bytes(parameters: Any) -> int:
    tensors = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in parameters]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.filterwarnings("ignore:transition. the rounding of")  # of what trained in one step, in bf16
def test_a_step_and_a_transition_make_the_collectives_of_fsdp2() -> None:
    """A unit is a layer, the embedding, the head, and the root. No weight travels at a transition, only lora_A."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = tiny.llama(num_hidden_layers=LAYERS, vocab_size=128, **sizes).to(torch.bfloat16)
    weights = {name: value.nbytes for name, value in model.named_parameters()}
    ids = torch.randint(0, 64, (1, 8))
    cascade = fsdp.shard(lx.adapt(model, kwargs={"input_ids": ids}, spec=SPEC))
    sites = {site.weight for site in cascade.sites}
    assert len(sites) == 7 * LAYERS
    assert local_bytes(cascade.model.parameters()) == sum(weights.values()) / RANKS
    assert sum(state.base.nbytes for state in weight_states(cascade).values()) == sum(map(weights.get, sites)) / RANKS
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=1e-3))
    with Collectives() as forward:
        logits = cascade(input_ids=ids).logits
    with Collectives() as backward:
        logits.float().sum().backward()
    for parameter in cascade.branches.parameters():  # sums with what the other ranks have not sent are no numbers
        parameter.grad.to_local().fill_(1.0)
    optimizer.step()
    optimizer.zero_grad()
    with Collectives() as transition:
        cascade.transition(optimizer)
    units = LAYERS + 3
    assert forward.seen["_allgather_base_"] == backward.seen["_allgather_base_"] == units
    assert not forward.seen["_reduce_scatter_base_"]
    assert backward.seen["_reduce_scatter_base_"] == LAYERS
    assert not transition.seen["_allgather_base_"]
    assert transition.seen["all_gather_into_tensor"] == len(sites)
    assert 6 * len(sites) <= transition.seen["allreduce_"] < 6 * len(sites) + 10
