"""AttentionMasks removes a mask only if it is redundant for all sizes, and then repeated heads of keys and values."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, fx, nn

import lorasc_fx as lx
from lorasc_fx.capture import Captured
from lorasc_fx.capture.captured import EXPORT
from lorasc_fx.capture.torch_export import capture_export
from lorasc_fx.graph import text
from lorasc_fx.passes import AttentionMasks
from lorasc_fx.signature import leaves
from tests.kit.compare import saved_storages
from tests.kit.models import seeded
from tests.kit.state import variant_for

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default


def simplified(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None = None) -> Captured:
    """Capture with dynamic sizes, and run AttentionMasks."""
    inputs = enumerate(leaves(args, kwargs or {}))
    axes = {(index, axis) for index, leaf in inputs if isinstance(leaf, Tensor) for axis in range(leaf.dim())}
    module, conditions = capture_export(model, args, kwargs or {}, axes)
    return Captured(AttentionMasks()(module).graph_module, EXPORT, conditions)


def attention(graph_module: Any) -> list[str]:
    """Return `mask`, `causal` or `none` for each attention call of a graph."""
    kinds = []
    for node in graph_module.graph.nodes:
        if node.target is ATTENTION:
            mask, _, causal = (*node.args[3:], *(None, 0.0, False)[len(node.args) - 3 :])
            kinds.append("mask" if isinstance(mask, fx.Node) else "causal" if causal else "none")
    return kinds


class Masked(nn.Module):
    """Attention with each mask that functions compute from the module and its input [batch, length, 8]."""

    def __init__(self, *masks: Callable[[Masked, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body, self.masks = nn.Linear(8, 12), masks
        self.register_buffer("open", torch.ones((), dtype=torch.bool))

    def forward(self, x: Tensor) -> list[Tensor]:
        qkv = [projection.unsqueeze(1) for projection in self.body(x).chunk(3, -1)]
        return [F.scaled_dot_product_attention(*qkv, attn_mask=mask(self, x)) for mask in self.masks]


def square(x: Tensor, **options: Any) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], **{"dtype": torch.bool, **options})


def steps(x: Tensor) -> Tensor:
    return torch.arange(x.shape[1])


def gap(x: Tensor) -> Tensor:
    return steps(x)[:, None] - steps(x)[None, :]


def filled(shut: Tensor, value: float) -> Tensor:
    return torch.zeros(shut.shape, dtype=torch.float64).masked_fill(shut, value)


def written(x: Tensor) -> Tensor:
    mask = square(x)
    mask[:, 1:].logical_and_(x[0, 0, 0] > 0)
    return mask


def written_whole(x: Tensor) -> Tensor:
    mask = square(x)
    view = mask[:, 1:]
    mask.logical_and_(x[0, 0, 0] > 0)
    return view.expand(x.shape[1], -1)[:, :1]


@torch.library.custom_op("lorasc_masks::clone", mutates_args=())
def _other_clone(self: Tensor) -> Tensor:
    """An op with the name of an aten op and another meaning."""
    return self.logical_not()


@_other_clone.register_fake
def _(self: Tensor) -> Tensor:
    return torch.empty_like(self)


LOWEST = torch.finfo(torch.float64).min
ALWAYS: dict[str, tuple[Callable[[Masked, Tensor], Tensor], str]] = {
    "ones": (lambda m, x: square(x), "none"),
    "full": (lambda m, x: torch.full((x.shape[0], 1, 1, x.shape[1]), True), "none"),
    "positions": (lambda m, x: (steps(x) >= 0).expand(x.shape[0], 1, x.shape[1], -1), "none"),
    "below": (lambda m, x: (steps(x) > -1)[None, :], "none"),
    "not": (lambda m, x: ~(steps(x)[None, :] * -1 > 0), "none"),
    "converted": (lambda m, x: square(x, dtype=torch.float64).to(torch.bool), "none"),
    "itself": (lambda m, x: (steps(x) == steps(x))[None, :], "none"),
    "differences": (lambda m, x: torch.diff(torch.arange(x.shape[1] + 1))[None, :] == 1, "none"),
    "one sequence": (lambda m, x: torch.diff(steps(x) * 2 + 3, prepend=steps(x)[:1] * 2 + 1)[None, :] == 2, "none"),
    "zeros": (lambda m, x: square(x, dtype=torch.float64) * 0, "none"),
    "nothing filled": (lambda m, x: filled(steps(x)[None, :] < 0, -torch.inf), "none"),
    "tril": (lambda m, x: square(x).tril(), "causal"),
    "not triu": (lambda m, x: ~square(x).triu(1), "causal"),
    "key <= query": (lambda m, x: steps(x)[None, :] <= steps(x)[:, None], "causal"),
    "key < query + 1": (lambda m, x: steps(x) < (steps(x) + 1).unsqueeze(1), "causal"),
    "gap": (lambda m, x: gap(x) * 3 >= 0, "causal"),
    "strange gap": (lambda m, x: (gap(x) > -1) & square(x), "causal"),
    "transposed": (lambda m, x: (gap(x) <= 0).transpose(0, 1), "causal"),
    "indexed": (lambda m, x: steps(x)[steps(x)[None, :]] <= steps(x)[steps(x)[:, None]], "causal"),
}
SOMETIMES: dict[str, Callable[[Masked, Tensor], Tensor]] = {
    "window": lambda m, x: (gap(x) >= 0) & (gap(x) < 6),
    "near": lambda m, x: gap(x).abs() < 6,
    "sixth": lambda m, x: steps(x)[None, :] != 6,
    "every other": lambda m, x: (square(x) * (x.shape[1] % 2)).bool(),
    "late": lambda m, x: gap(x) > 5 - x.shape[1] * 2,
    "slope": lambda m, x: steps(x)[:, None] * 2 >= steps(x)[None, :] * 2 - x.shape[1] // 6,
    "triangle of -inf": lambda m, x: filled(gap(x) < 0, -torch.inf),
    "triangle of the lowest": lambda m, x: filled(gap(x) < 0, LOWEST),
    "wide window": lambda m, x: (gap(x) >= 0) & (gap(x) < 40),
    "last": lambda m, x: square(x) & (steps(x)[-1:] < 40),
    "counted": lambda m, x: square(x) & (square(x).sum() < 1600),
    "counted along": lambda m, x: square(x).cumsum(0) < 40,
    "filled with a size": lambda m, x: square(x) & (torch.full((), x.shape[1]) < 40),
    "downwards": lambda m, x: square(x) & (torch.arange(x.shape[1] - 1, -1, -1) < 40),
    "squared": lambda m, x: square(x) & (steps(x) * steps(x) < 1600),
    "few bits": lambda m, x: square(x) & (torch.arange(x.shape[1], dtype=torch.uint8) * 6 < 240),
    "leap": lambda m, x: square(x) & (torch.diff(steps(x), append=torch.full((1,), x.shape[1])) == 1),
}
"""Masks that are redundant at the captured size, but not at others, or not provably."""
NEVER: dict[str, Callable[[Masked, Tensor], Tensor]] = {
    "buffer": lambda m, x: square(x) & m.open,
    "value": lambda m, x: square(x) & (x[0, 0, 0] == x[0, 0, 0]),
    "chance": lambda m, x: torch.rand(x.shape[1], x.shape[1]) >= 0,
    "written": lambda m, x: written(x),
    "written whole": lambda m, x: written_whole(x),
    "another library's": lambda m, x: _other_clone(square(x).tril()),
    "first only": lambda m, x: steps(x)[None, :] < 1,
    "other side": lambda m, x: gap(x) <= 0,
    "a step off": lambda m, x: gap(x) >= -1,
    "bias": lambda m, x: gap(x).double(),
    "weak triangle": lambda m, x: filled(gap(x) < 0, -5.0),
    "wide and never": lambda m, x: (steps(x)[None, :] < x.shape[1]) & (steps(x)[:, None] != 2),
}


def batch(size: int, length: int) -> Tensor:
    return torch.randn(size, length, 8, generator=torch.Generator().manual_seed(length), dtype=torch.float64)


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12, equal_nan=True)


def test_redundant_masks_are_removed() -> None:
    model = Masked(*(mask for mask, _ in ALWAYS.values())).double()
    captured = simplified(model, (batch(2, 5),))
    expected = {name: kind for name, (_, kind) in ALWAYS.items()}
    assert dict(zip(ALWAYS, attention(captured.module), strict=True)) == expected
    assert captured.conditions.sizes == ((None, None, None),)
    calls = [node.args[3:] for node in captured.module.graph.nodes if node.target is ATTENTION]
    assert set(calls) == {(), (None, 0.0, True)}
    ops = [node.target for node in captured.module.graph.nodes if node.op == "call_function"]
    left = {ATTENTION: len(ALWAYS), aten.linear.default: 1, aten.chunk.default: 1, operator.getitem: 3}
    assert Counter(ops) == left | {aten.unsqueeze.default: 3}  # nothing that computes a mask or a size
    for size, length in ((2, 5), (3, 2), (1, 7), (4, 19)):
        same(captured.module(batch(size, length)), model(batch(size, length)))


@pytest.mark.parametrize("masks", [SOMETIMES, NEVER], ids=["sometimes", "never"])
def test_masks_that_matter_at_some_size_are_kept(masks: dict[str, Callable[[Masked, Tensor], Tensor]]) -> None:
    model = Masked(*masks.values()).double()
    captured = simplified(model, (batch(2, 5).abs(),))
    assert dict(zip(masks, attention(captured.module), strict=True)) == dict.fromkeys(masks, "mask")
    assert captured.conditions.sizes == ((None, None, None),)
    for length in (5, 9, 50):
        for x in (batch(2, length), -batch(2, length)):
            same(seeded(captured.module, x), seeded(model, x))


def test_a_graph_of_one_size_has_the_values_of_its_masks() -> None:
    model, x = Masked(*SOMETIMES.values()).double(), batch(2, 5)
    module = AttentionMasks()(capture_export(model, (x,), {})[0]).graph_module
    expected = {}
    for name, make in SOMETIMES.items():
        mask = make(model, x)
        no_mask = bool(mask.all() if mask.dtype is torch.bool else (mask == 0).all())
        causal = mask.dtype is torch.bool and torch.equal(mask, torch.ones(5, 5).bool().tril())
        expected[name] = "none" if no_mask else "causal" if causal else "mask"
    assert dict(zip(SOMETIMES, attention(module), strict=True)) == expected
    same(module(x), model(x))


@pytest.mark.parametrize(("mask", "changes"), [(ALWAYS["tril"][0], True), (NEVER["first only"], False)])
def test_the_result_is_truthful(mask: Any, changes: bool) -> None:
    """The input is unchanged, a second run changes nothing, and the pass has a repr."""
    before = capture_export(Masked(mask).double(), (batch(2, 5),), {})[0]
    written = text(before)
    result = AttentionMasks()(before)
    assert text(before) == written
    assert (result.modified, result.graph_module is before) == (changes, not changes)
    assert (text(result.graph_module) != written) == changes
    again = AttentionMasks()(result.graph_module)
    assert not again.modified
    assert again.graph_module is result.graph_module


class Cross(nn.Module):
    """A triangular mask with more keys than queries."""

    def __init__(self, lower: bool) -> None:
        super().__init__()
        self.body, self.lower = nn.Linear(8, 8), lower

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = torch.ones(x.shape[1], y.shape[1], dtype=torch.bool)
        return F.scaled_dot_product_attention(self.body(x), y, y, attn_mask=mask.tril() if self.lower else mask)


@pytest.mark.parametrize("lower", [True, False])
def test_more_keys_than_queries(lower: bool) -> None:
    model = Cross(lower).double()
    captured = simplified(model, (batch(2, 5), batch(2, 7)))
    assert attention(captured.module) == ["mask" if lower else "none"]
    for length in (7, 5, 3):
        same(captured.module(batch(2, 5), batch(2, length)), model(batch(2, 5), batch(2, length)))


# fmt: off
SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ONE = {"num_hidden_layers": 1}
FEW = {"num_key_value_heads": 2, "use_cache": False}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 4, "n_positions": 64, "use_cache": False}
# fmt: on
MODELS: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "bert": ("BertModel", SMALL | ONE, ["none"]),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"bos_token_id": 1, "eos_token_id": 2}, ["causal"]),
    "llama": ("LlamaForCausalLM", SMALL | FEW, ["causal", "causal"]),
}
WINDOW = SMALL | ONE | FEW | {"sliding_window": 8}


def build(model: str, config: dict[str, Any], training: bool = False) -> nn.Module:
    torch.manual_seed(5)
    kind = getattr(transformers, model)
    model = kind(kind.config_class(**config))
    assert isinstance(model, nn.Module)
    return model.double().train(training)


def inputs(batch: int, length: int) -> dict[str, Tensor]:
    torch.manual_seed(batch + length)
    return {"input_ids": torch.randint(3, 50, (batch, length))}


def run(model: Any, kwargs: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(7)
    output = model(**kwargs)
    logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
    assert isinstance(logits, Tensor)
    return logits


def graph_of(cascade: lx.Cascade, kwargs: dict[str, Tensor]) -> fx.GraphModule:
    module = variant_for(cascade, (), kwargs).module
    assert isinstance(module, fx.GraphModule)
    return module


@pytest.mark.parametrize("name", MODELS)
def test_attention_has_the_mask_of_eager_mode(name: str, captures: Any) -> None:
    """Equal bits at the captured size and others. There is one graph for it, and one for all."""
    kind, config, expected = MODELS[name]
    model = build(kind, config)
    eager = copy.deepcopy(model)
    cascade = lx.adapt(model, kwargs=inputs(2, 7))
    assert cascade.frontend == "export"
    assert attention(graph_of(cascade, inputs(2, 7))) == expected
    for count, length in ((2, 7), (3, 40), (1, 9), (4, 3)):
        kwargs = inputs(count, length)
        assert torch.equal(run(cascade, kwargs), run(eager, kwargs))
    assert captures() == 2


def test_dropout_of_attention_is_kept() -> None:
    kind, config, expected = MODELS["gpt2"]
    model = build(kind, config | {"attn_pdrop": 0.4}, training=True)
    eager = copy.deepcopy(model)
    kwargs = inputs(2, 7)
    cascade = lx.adapt(model, kwargs=kwargs)
    graph = graph_of(cascade, kwargs)
    assert attention(graph) == expected
    assert [node.args[4] for node in graph.graph.nodes if node.target is ATTENTION] == [0.4]
    assert torch.equal(run(cascade, kwargs), run(eager, kwargs))
    assert not torch.equal(run(cascade, kwargs), run(copy.deepcopy(eager).eval(), kwargs))


@pytest.mark.parametrize("captured_length", [5, pytest.param(20, marks=pytest.mark.slow)])
def test_a_sliding_window_is_kept(captured_length: int, captures: Any) -> None:
    """There is a graph for the captured length and one for all. A graph of a length below the window needs no mask."""
    model = build("MistralForCausalLM", WINDOW)
    eager = copy.deepcopy(model)
    cascade = lx.adapt(model, kwargs=inputs(2, captured_length))
    for count, length in ((2, captured_length), (3, 8), (3, 9), (2, 30), (1, 6)):
        kwargs = inputs(count, length)
        expected = "causal" if (count, length) == (2, captured_length) and length < 8 else "mask"
        graph = graph_of(cascade, kwargs)
        assert attention(graph) == [expected]
        assert shared(graph) == [expected == "causal"]
        torch.testing.assert_close(run(cascade, kwargs), run(eager, kwargs), rtol=1e-12, atol=1e-12)
    assert captures() == 2


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


@pytest.mark.parametrize("dtype", [pytest.param(torch.float32, marks=pytest.mark.slow), torch.float64])
def test_outputs_gradients_and_memory_are_those_of_eager(dtype: torch.dtype) -> None:
    """Outputs and gradients have equal bits, and the saved tensors equal bytes."""
    model = build("LlamaForCausalLM", LLAMA, training=True).to(dtype)
    captured = simplified(model, (), embedded(2, 7, dtype))
    assert shared(captured.module) == [True, True]
    assert attention(captured.module) == ["causal", "causal"]
    for size, length in ((2, 7), (3, 33), (1, 4)):
        kwargs = embedded(size, length, dtype)
        leaves_of_both = [
            *kwargs.values(),
            *(parameter for name, parameter in model.named_parameters() if "embed_tokens" not in name),
        ]
        weights = torch.randn(size, length, 50, dtype=dtype)
        ours, theirs = (call(**kwargs).logits for call in (captured.module, model))
        assert torch.equal(ours, theirs)
        grads = [torch.autograd.grad((output * weights).sum(), leaves_of_both) for output in (ours, theirs)]
        for ours_grad, theirs_grad in zip(*grads, strict=True):
            assert theirs_grad.abs().max() > 0
            assert torch.equal(ours_grad, theirs_grad)
        ours, theirs = (saved_storages(partial(call, **kwargs)) for call in (captured.module, model))
        assert sum(ours.values()) == sum(theirs.values()) > 0


def test_a_mask_from_the_user_is_kept() -> None:
    """Also a mask of ones, because another call may have zeros; and the repetition of keys and values."""
    model = build("LlamaForCausalLM", LLAMA)
    eager = copy.deepcopy(model)
    kwargs = inputs(2, 7) | {"attention_mask": torch.ones(2, 7, dtype=torch.long)}
    cascade = lx.adapt(model, kwargs=kwargs)
    graph = graph_of(cascade, kwargs)
    assert attention(graph) == ["mask", "mask"]
    assert shared(graph) == [False, False]
    assert sum(node.meta["val"].dim() == 5 for node in graph.graph.nodes if node.target in COPIES) == 4
    same(run(cascade, kwargs), run(eager, kwargs))
    kwargs["attention_mask"][0, 4:] = 0
    assert torch.equal(run(cascade, kwargs), run(eager, kwargs))


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
    output = repeated(x * 1)
    output[:, 1:].zero_()
    return output


PAIRS: dict[str, tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor], Tensor], bool]] = {
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
    "of an input": (None, repeated, False),
}


class Grouped(nn.Module):
    """Attention with several query heads and two key and value heads, under masks of ones, for each pair of rows."""

    def __init__(self, pairs: Collection[Any], width: int = 4, value_width: int = 4) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.pairs, self.width, self.value_width = pairs, width, value_width
        self.q, self.k, self.v = nn.Linear(8, 6 * width), nn.Linear(8, 2 * width), nn.Linear(8, 2 * value_width)

    def forward(self, x: Tensor) -> list[Tensor]:
        q, k = (project(x).unflatten(-1, (-1, self.width)).transpose(1, 2) for project in (self.q, self.k))
        v, outputs = self.v(x).unflatten(-1, (-1, self.value_width)).transpose(1, 2), []
        for keys, values, _ in self.pairs:
            key = keys(k) if keys is not None else repeated(x.unflatten(-1, (2, 4)).transpose(1, 2))
            value = values(v)
            mask = torch.ones(x.shape[1], key.shape[2], dtype=torch.bool)
            outputs.append(F.scaled_dot_product_attention(q, key, value, attn_mask=mask, scale=0.3))
        return outputs


def test_only_repetitions_of_keys_and_values_are_removed() -> None:
    model = Grouped(PAIRS.values()).double()
    captured = simplified(model, (batch(2, 5),))
    assert attention(captured.module) == ["none"] * len(PAIRS)
    removed = dict(zip(PAIRS, shared(captured.module), strict=True))
    assert removed == {name: expected for name, (*_, expected) in PAIRS.items()}
    for size, length in ((2, 5), (3, 9)):
        same(captured.module(batch(size, length)), model(batch(size, length)))


@pytest.mark.parametrize(("width", "value_width", "expected"), [(256, 256, True), (257, 257, False), (4, 8, False)])
def test_heads_that_eager_mode_repeats_without_a_mask(width: int, value_width: int, expected: bool) -> None:
    """The result agrees with `use_gqa_in_sdpa` of transformers."""
    from transformers.integrations.sdpa_attention import use_gqa_in_sdpa

    assert use_gqa_in_sdpa(None, torch.empty(1, 2, 3, width), torch.empty(1, 2, 3, value_width)) == expected
    model = Grouped([PAIRS["both"]], width, value_width).double()
    captured = simplified(model, (batch(2, 5),))
    assert shared(captured.module) == [expected]
    assert any(node.target in COPIES for node in captured.module.graph.nodes) == (not expected)
    same(captured.module(batch(3, 9)), model(batch(3, 9)))
