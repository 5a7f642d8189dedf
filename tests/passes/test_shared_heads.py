"""Grouped-query attention: a graph without a mask reads few key heads without repeating them, as eager mode does."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lorasc_fx as lx
from tests.kit.compare import saved_storages
from tests.passes.test_attention_masks import (
    ATTENTION,
    FEW,
    FRONT_ENDS,
    SMALL,
    WINDOW,
    attention,
    batch,
    build,
    graph_of,
    inputs,
    run,
    same,
    simplified,
)

LLAMA = SMALL | FEW
COPIES = {torch.ops.aten.expand.default, torch.ops.aten.reshape.default}


def shared(graph_module: Any) -> list[bool]:
    """Whether each attention of a graph reads fewer heads of keys than of queries."""
    calls = [node for node in graph_module.graph.nodes if node.target is ATTENTION]
    heads = [
        (call.kwargs.get("enable_gqa", False), *(argument.meta["val"].shape[1] for argument in call.args[:3]))
        for call in calls
    ]
    assert all(keys == values and on == (keys < queries) for on, queries, keys, values in heads)
    return [on for on, *_ in heads]


def embedded(size: int, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(length)
    return {"inputs_embeds": torch.randn(size, length, 16, dtype=dtype, requires_grad=True)}


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
def test_outputs_gradients_and_memory_are_those_of_eager(dtype: torch.dtype, front_end: Any) -> None:
    """Outputs and gradients have equal bits, and the saved tensors equal bytes."""
    model = build("LlamaForCausalLM", LLAMA, training=True).to(dtype)
    captured = simplified(model, (), embedded(2, 7, dtype), front_end)
    assert shared(captured.module) == [True, True]
    assert attention(captured.module) == ["causal", "causal"]
    for size, length in ((2, 7), (3, 33), (1, 4)):
        kwargs = embedded(size, length, dtype)
        wanted = [
            *kwargs.values(),
            *(parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name),
        ]
        weights = torch.randn(size, length, 50, dtype=dtype)
        ours, theirs = (call(**kwargs).logits for call in (captured.module, model))
        assert torch.equal(ours, theirs)
        grads = [torch.autograd.grad((output * weights).sum(), wanted) for output in (ours, theirs)]
        for ours_grad, theirs_grad in zip(*grads, strict=True):
            assert theirs_grad.abs().max() > 0
            assert torch.equal(ours_grad, theirs_grad)
        ours, theirs = (saved_storages(partial(call, **kwargs)) for call in (captured.module, model))
        assert sum(ours.values()) == sum(theirs.values()) > 0


@pytest.mark.parametrize("name", ["a user's mask", "a window"])
def test_attention_with_a_mask_keeps_the_repetition(name: str) -> None:
    kwargs = inputs("llama", 2, 7)
    kind, config = ("MistralForCausalLM", WINDOW) if name == "a window" else ("LlamaForCausalLM", LLAMA)
    if name == "a user's mask":
        kwargs["attention_mask"] = torch.ones(2, 7, dtype=torch.long)
        kwargs["attention_mask"][0, :3] = 0
    model = build(kind, config)
    eager = copy.deepcopy(model)
    cascade = lx.adapt(model, kwargs=kwargs)
    graph = graph_of(cascade, kwargs)
    layers = eager.config.num_hidden_layers
    assert shared(graph) == [False] * layers
    assert sum(node.meta["val"].dim() == 5 for node in graph.graph.nodes if node.target in COPIES) == 2 * layers
    same(run(cascade, kwargs), run(eager, kwargs))


def repeated(x: Tensor, times: int = 3) -> Tensor:
    size, heads, length, width = x.shape
    return x[:, :, None].expand(size, heads, times, length, width).reshape(size, heads * times, length, width)


def tiled(x: Tensor, times: int = 3) -> Tensor:
    size, heads, length, width = x.shape
    return x[:, None].expand(size, times, heads, length, width).reshape(size, heads * times, length, width)


def joined(x: Tensor) -> Tensor:
    size, heads, length, width = x.shape
    return x[:, :, None].expand(size, heads, 3, length, width).reshape(1, heads * 3, size * length, width)


def within(x: Tensor) -> Tensor:
    size, heads, length, width = x.shape
    return x[:, :, None, 1:].expand(size, heads, 3, length - 1, width).reshape(size, heads * 3, length - 1, width)


def twice(x: Tensor) -> Tensor:
    size, heads, length, width = x.shape
    return (x[:, :, None].expand(size, heads, 3, length, width) * 2).reshape(size, heads * 3, length, width)


def once(x: Tensor) -> Tensor:
    return repeated(x[:1])


def written_after(x: Tensor) -> Tensor:
    clone = x * 1
    output = repeated(clone[..., :])
    clone[:, 1:].zero_()
    return output


def written_itself(x: Tensor) -> Tensor:
    output = repeated(x)
    output[:, 1:].zero_()
    return output


PAIRS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool]] = {
    "both": (repeated, repeated, True),
    "computed before": (lambda k: repeated(k * 2), lambda v: repeated(v.sin()), True),
    "keys only": (repeated, lambda v: v.repeat(1, 3, 1, 1), False),
    "values only": (lambda k: torch.cat([k, k, k], 1), repeated, False),
    "tiles": (tiled, tiled, False),
    "other heads": (repeated, lambda v: repeated(v[:, :1], 6), False),
    "joined": (joined, joined, False),
    "fewer places": (within, within, False),
    "fewer copies": (lambda k: repeated(k)[:, :, 1:], lambda v: repeated(v)[:, :, :-1], False),
    "computed in between": (twice, repeated, False),
    "one batch": (once, once, False),
    "written after": (written_after, repeated, False),
    "written itself": (repeated, written_itself, False),
}


class Grouped(nn.Module):
    """Attention with several query heads and two key and value heads, under a mask of ones."""

    def __init__(self, keys: Any, values: Any, width: int = 4, value_width: int = 4, queries: int = 6) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.keys, self.values, self.width, self.wide = keys, values, width, value_width
        self.q, self.k, self.v = nn.Linear(8, queries * width), nn.Linear(8, 2 * width), nn.Linear(8, 2 * value_width)

    def forward(self, x: Tensor) -> Tensor:
        q, k = (project(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for project in (self.q, self.k))
        key, value = self.keys(k), self.values(self.v(x).unflatten(-1, (-1, self.wide)).transpose(1, 2))
        mask = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool)
        return F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=0.3)


@pytest.mark.parametrize("name", PAIRS)
def test_only_a_repetition_of_keys_and_values_is_removed(name: str) -> None:
    keys, values, expected = PAIRS[name]
    model = Grouped(keys, values).double()
    captured = simplified(model, (batch(2, 5),))
    assert attention(captured.module) == ["none"]
    assert shared(captured.module) == [expected]
    for size, length in ((2, 5), (3, 9)):
        same(captured.module(batch(size, length)), model(batch(size, length)))


@pytest.mark.parametrize(("width", "value_width", "expected"), [(256, 256, True), (257, 257, False), (4, 8, False)])
def test_heads_that_eager_mode_repeats_without_a_mask(width: int, value_width: int, expected: bool) -> None:
    """The result agrees with `use_gqa_in_sdpa` of transformers."""
    from transformers.integrations.sdpa_attention import use_gqa_in_sdpa

    assert use_gqa_in_sdpa(None, torch.empty(1, 2, 3, width), torch.empty(1, 2, 3, value_width)) == expected
    model = Grouped(repeated, repeated, width, value_width).double()
    captured = simplified(model, (batch(2, 5),))
    assert shared(captured.module) == [expected]
    same(captured.module(batch(3, 9)), model(batch(3, 9)))
