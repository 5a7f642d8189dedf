"""`generate` with weights sharded over two processes gives the tokens of one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lorasc_fx as lx
from lorasc_fx.parallel import fsdp
from tests.integrations.kit import llama
from tests.parallel.ranks import on_ranks
from tests.parallel.sharding import Peak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PROMPTS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(1))


def prompt(rank: int) -> Tensor:
    """Of another length on each rank, which so ask for weights another number of times."""
    return PROMPTS[:, : 3 + 4 * rank]


def sampled(cascade: lx.Cascade, ids: Tensor, **how: Any) -> Tensor:
    return cascade.generate(ids, max_length=12, do_sample=False, pad_token_id=0, **how)  # type: ignore[no-any-return]


def generated(rank: int, count: int) -> dict[str, Tensor]:
    """Tokens before the first call, after a stage of training with the fast and the slow weights, and of a call in
    inference mode; each rank of several has its own prompt.
    """
    model = llama(use_cache=True, num_hidden_layers=4)
    spec = lx.CascadeSpec(rank=2, lora_alpha=6.0, noise=lx.Noise(0.1))
    cascade = lx.adapt(model, kwargs={"input_ids": PROMPTS, "attention_mask": torch.ones_like(PROMPTS)}, spec=spec)
    total = sum(parameter.numel() * parameter.itemsize for parameter in cascade.parameters())
    if count > 1:
        fsdp.shard(cascade)
    ranks = (rank,) if count > 1 else (0, 1)
    tokens = {f"{number}/before": sampled(cascade, prompt(number)) for number in ranks}
    optimizer = torch.optim.AdamW(cascade.param_groups(lr=0.05))
    for _ in cascade.stages(2, optimizer):
        for _ in range(3):
            cascade(input_ids=PROMPTS, attention_mask=torch.ones_like(PROMPTS), labels=PROMPTS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for number in ranks:
            tokens[f"{number}/fast"] = sampled(cascade, prompt(number))
            with cascade.weights("slow"):
                tokens[f"{number}/slow"] = sampled(cascade, prompt(number), use_cache=False)
            with torch.inference_mode():
                tokens[f"{number}/in inference mode"] = sampled(cascade, prompt(number)).clone()
    if count > 1:
        with Peak(cascade) as peak:
            sampled(cascade, prompt(rank))
        assert 0 < peak.most < total / 2, (peak.most, total)  # a layer, embedding and head
        attributes = [dict(vars(module)) for module in cascade.modules()]
        with pytest.raises(ZeroDivisionError):
            sampled(cascade, prompt(rank), logits_processor=[lambda *_: 1 / 0])
        assert all(hasattr(parameter, "to_local") for parameter in cascade.parameters())
        assert [set(vars(module)) for module in cascade.modules()] == [set(before) for before in attributes]
        with pytest.raises(RuntimeError, match="and DTensor"):  # of torch
            cascade.model(PROMPTS)
    return tokens


def test_generate_gives_the_tokens_of_one_process() -> None:
    (one,) = on_ranks(1, generated)
    for rank, sampled_by_rank in enumerate(on_ranks(2, generated, limit=500.0)):
        assert sampled_by_rank.keys() == {name for name in one if name.startswith(f"{rank}/")}
        for name, tokens in sampled_by_rank.items():
            assert torch.equal(tokens, one[name]), name
    assert not torch.equal(one["0/before"], one["0/fast"])
