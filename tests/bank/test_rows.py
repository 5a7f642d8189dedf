"""Places of the rows of a batch in a graph of `AdapterBank`, and slots of adapters that running calls use."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lorasc_fx as lx
from lorasc_fx.bank import graph as bank_graph
from lorasc_fx.bank.rows import segments
from lorasc_fx.bank.slots import Slots
from tests.bank.kit import distance, random_pairs
from tests.kit import tiny
from tests.kit.errors import raises

X = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    with torch.inference_mode(False):
        return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def bank_of(*names: str, **options: Any) -> lx.AdapterBank:
    bank = lx.AdapterBank(mlp(), args=(X,), targets=("linear",), max_rank=2, **options)
    for name in names:
        bank.add(name, random_pairs(bank.sites, 2, ord(name)))
    return bank


class Encoder(nn.Module):
    """A text encoder with padding. `nn.MultiheadAttention` computes with sequence-first tensors."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8, padding_idx=0)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.layers(self.embedding(ids), src_key_padding_mask=ids == 0)
        return self.head(hidden.mean(1))  # type: ignore[no-any-return]


class SequenceFirst(nn.Module):
    """Linear layers whose input is [T, B, in], flattened or not. The sum over T comes last."""

    def __init__(self, flat: bool, layers: int = 1) -> None:
        super().__init__()
        self.flat, self.embedding = flat, nn.Embedding(20, 6, padding_idx=0)
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(layers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).transpose(0, 1)
        length, rows, size = x.shape
        for linear_layer in self.layers:
            x = linear_layer(x.reshape(length * rows, size) if self.flat else x).tanh().view(length, rows, size)
        return x.transpose(0, 1)  # type: ignore[no-any-return]


def padded(*texts: tuple[int, ...], length: int) -> Tensor:
    return torch.tensor([[*text, *[0] * (length - len(text))] for text in texts])


@pytest.mark.parametrize("frontend", ["export", "dynamo"])
@pytest.mark.parametrize(
    ("model", "ids"),
    [
        (lambda: Encoder(1), padded((3, 4), (5, 6), length=6)),
        (lambda: Encoder(2), padded((3, 4), (5,), (3, 7, 8), (9, 9), length=8)),
        (lambda: SequenceFirst(flat=False), padded((3, 4), (5, 6), length=6)),
        (lambda: SequenceFirst(flat=True), padded((3, 4), (5, 6), length=6)),
        (lambda: SequenceFirst(flat=True), padded((3, 4), (3, 5), length=3)),  # agrees with batch-first, too
        (lambda: SequenceFirst(flat=True), padded((3,), (5, 6), (3,), length=9)),
    ],
    ids=["encoder", "two layers", "sequence first", "flat", "ambiguous", "equal rows"],
)
def test_rows_that_differ_in_few_tokens(model: Any, ids: Tensor, frontend: str) -> None:
    torch.manual_seed(0)
    base = model().double().eval()
    bank = lx.AdapterBank(base, args=(ids,), targets=("layers*",), max_rank=2, frontend=frontend)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed, size=1.0))
    mix = [("a", None, "b")[row % 3] if len(ids) > 2 else "ab"[row] for row in range(len(ids))]
    for batch in (ids, torch.randint(1, 20, ids.shape), ids.flip(0)):
        mixed = bank(batch, adapter=mix)
        for row, adapter in enumerate(mix):
            assert distance(mixed, bank(batch, adapter=adapter), row, len(ids)) < 1e-12


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [("aaaabb", "aab"), ("aabbcc", "abc"), ("aabcc", "aabcc"), ("abab", "abab"), ("aaaaabb", "aaaaabb")],
)
def test_sorted_rows_are_segments(adapters: str, expected: str) -> None:
    assert "".join(segments(list(adapters))) == expected  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["mlp", "convolutions", "flat", "sequence first"])
def test_sorted_rows_share_factors(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only where the rows are the inner part of a flattened axis, each row needs its own factors."""
    torch.manual_seed(0)
    model: nn.Module = {
        "mlp": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)),
        "convolutions": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Conv2d(4, 8, 3, groups=2)),
        "flat": lambda: SequenceFirst(flat=True),
        "sequence first": lambda: SequenceFirst(flat=False),
    }[kind]()
    x = {"mlp": torch.randn(6, 6), "convolutions": torch.randn(6, 3, 7, 7)}.get(kind, torch.randint(1, 20, (6, 3)))
    x = x.double() if x.is_floating_point() else x
    bank = lx.AdapterBank(model.double().eval(), args=(x,), targets=("linear", "conv"), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    gathered: list[int] = []
    gather = Slots.gather
    monkeypatch.setattr(Slots, "gather", lambda self, slots: gathered.append(len(slots)) or gather(self, slots))
    for mix, count in ((["a", "a", "b", "b", None, None], 3), (["b", "b", "b", "b", "a", "a"], 3), ([*"abbbba"], 6)):
        mixed = bank(x, adapter=mix)
        assert gathered.pop() == (6 if kind == "flat" else count)
        for row, name in enumerate(mix):
            assert distance(mixed, bank(x, adapter=name), row, 6) < 1e-12


def test_a_permutation_of_the_rows_is_not_one_pass() -> None:
    """Row 0 keeps its place, so only the other rows show that the layer gets them in another order."""

    class Permuted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.cat([x[:1], x[1:].flip(0)]))
            return torch.cat([y[:1], y[1:].flip(0)])

    torch.manual_seed(0)
    bank = lx.AdapterBank(Permuted().double(), args=(X,), targets=("linear.weight",), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    mix = ["a", "b", "b", None, "a"]
    mixed = bank(X, adapter=mix)
    for row, adapter in enumerate(mix):
        assert distance(mixed, bank(X, adapter=adapter), row, len(X)) < 1e-13


def test_the_first_mixed_calls_may_run_in_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that reads the layout must find the graph that uses it."""
    torch.manual_seed(0)
    ids = torch.randint(1, 20, (2, 3))
    bank = lx.AdapterBank(SequenceFirst(True).double(), args=(ids,), targets=("layers*",), max_rank=2)
    for seed, name in enumerate("ab"):
        bank.add(name, random_pairs(bank.sites, 2, seed))
    writing, outputs = threading.Event(), []
    original = bank_graph.as_function  # type: ignore[attr-defined]

    def slow(module: Any) -> Any:
        writing.set()
        thread.join(0.5)
        return original(module)

    def call() -> None:
        writing.wait(30)
        outputs.append(bank(ids, adapter=["a", "b"]))

    thread = threading.Thread(target=call)
    thread.start()
    monkeypatch.setattr(bank_graph, "as_function", slow)
    outputs.append(bank(ids, adapter=["a", "b"]))
    thread.join()
    for mixed in outputs:
        for row, name in enumerate("ab"):
            assert distance(mixed, bank(ids, adapter=name), row, 2) < 1e-13


def test_a_batch_without_rows() -> None:
    bank = bank_of("a")
    assert bank(X[:0], adapter=[]).shape == (0, 4)
    with raises(lx.StateError, "rows-differ", "1 rows, and the batch has 0"):
        bank(X[:0], adapter=["a"])


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_call_keeps_an_adapter_that_is_removed_during_the_call() -> None:
    bank = bank_of("a", capacity=1)
    right = bank(X, adapter="a")

    def replace(graph: torch.fx.GraphModule, _: Any) -> Any:
        def run(*args: Any) -> Any:
            if "a" in bank.names:
                bank.remove("a")
                with raises(lx.SpecError, "bank-full", "1 of them were removed, but calls that use them are still"):
                    bank.add("b", random_pairs(bank.sites, 2, 3))
            return graph.forward(*args)

        return run

    bank.compile(backend=replace)
    assert distance(bank(X, adapter="a"), right) < 1e-13
    bank.add("b", random_pairs(bank.sites, 2, ord("a")))
    assert distance(bank(X, adapter="b"), right) < 1e-13


def test_generate_keeps_an_adapter_that_is_removed_meanwhile() -> None:
    torch.manual_seed(0)
    model = tiny.llama().double().eval()
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    ids = torch.randint(3, 40, (2, 5))
    bank = lx.AdapterBank(model, kwargs={"input_ids": ids}, targets=("*mlp*",), max_rank=2, capacity=2)
    for name in "ab":
        bank.add(name, random_pairs(bank.sites, 2, ord(name), size=2.0))
    removed: list[str] = []

    def stop(tokens: Tensor, scores: Tensor) -> Tensor:
        if not removed:
            bank.remove("a")
            removed.append("a")
            with raises(lx.SpecError, "bank-full", "still running"):
                bank.add("c", random_pairs(bank.sites, 2, 7, size=2.0))
        return torch.zeros(len(tokens), dtype=torch.bool)

    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    right = bank.generate(ids, adapter="a", **options)
    assert torch.equal(bank.generate(ids, adapter="a", stopping_criteria=[stop], **options), right)
    bank.add("c", random_pairs(bank.sites, 2, 7, size=2.0))
    assert bank.names == ("b", "c")


def test_an_error_of_a_call_does_not_keep_its_slot() -> None:
    bank = bank_of("a", capacity=1)
    with pytest.raises(lx.CaptureError) as fault:
        bank(X[:, :3], adapter="a")
    bank.remove("a")
    bank.add("b", random_pairs(bank.sites, 2, 3))
    assert fault.tb is not None


def test_backward_after_another_adapter_was_added() -> None:
    """Only if the slot of the call itself is used again, its saved factors are gone, and backward raises."""
    bank, x = bank_of("a", capacity=2), X.clone().requires_grad_()
    bank(x, adapter="a").sum().backward()
    right, x.grad = x.grad, None
    output = bank(x, adapter="a").sum()
    bank.add("b", random_pairs(bank.sites, 2, 3))
    output.backward()
    assert right is not None
    torch.testing.assert_close(x.grad, right)
    output = bank(x, adapter="a").sum()
    bank.remove("a")
    bank.add("c", random_pairs(bank.sites, 2, 4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.backward()


@pytest.mark.parametrize("building", [False, True])
def test_training_after_inference_mode(building: bool) -> None:
    """The same gradients as without inference mode, also if the bank is built and filled in it."""
    gradients = []
    for inference in (False, True):
        with torch.inference_mode(inference and building):
            bank = bank_of("f")
            bank.start("r", seed=1)
        with torch.inference_mode(inference):
            for adapter in ("r", "f", ["r", "f", None, "r", "r"]):
                bank(X, adapter=adapter)
            bank.add("g", random_pairs(bank.sites, 2, 9))
            bank.parameters_of("g")
        parameters = [value for name in "rg" for value in bank.parameters_of(name).values()]
        for adapter in ("r", "g", ["g", "r", "r", None, "f"]):
            bank(X, adapter=adapter).square().sum().backward()
        gradients.append([parameter.grad for parameter in parameters])
    for right, gradient in zip(*gradients, strict=True):
        assert right is not None
        torch.testing.assert_close(gradient, right)


def test_a_forward_that_writes_into_an_argument() -> None:
    class Stores(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, cache: dict[str, Tensor]) -> Tensor:
            cache["x"] = x
            return self.linear(x)  # type: ignore[no-any-return]

    for cache in ({}, {"x": torch.zeros(5, 6).double()}):
        with raises(lx.CaptureError, "no-whole-graph", "writes into an argument, such as a cache", "bank.generate"):
            lx.AdapterBank(Stores().double(), args=(X, cache), targets=("linear",))


def test_finding_the_rows_does_not_write_into_arguments() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, calls: Tensor) -> Tensor:
            calls.add_(1)
            return self.linear(x)  # type: ignore[no-any-return]

    calls = torch.zeros(1)
    bank = lx.AdapterBank(Writes().double(), args=(X, calls), targets=("linear",))
    bank.add("a", random_pairs(bank.sites, 2, 3))
    bank(X, calls, adapter=["a", None, "a", None, "a"])
    assert calls.item() == 1


def test_a_batch_for_each_adapter_writes_into_arguments() -> None:
    """A branch on a weight, which the model normalizes, has no factors by row, so each adapter has its own batch."""

    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            counts.add_(x.square())
            return x @ (self.linear.weight / self.linear.weight.norm()).t()

    counts = torch.zeros(5, 6).double()
    bank = lx.AdapterBank(Counts().double(), args=(X, counts), targets=("linear.weight",))
    bank.add("a", random_pairs(bank.sites, 2, 3))
    for inference in (False, True):
        counts = torch.zeros(5, 6).double()
        with torch.inference_mode(inference):
            mixed = bank(X, counts, adapter=["a", None, "a", None, "a"])
        torch.testing.assert_close(counts, X.square())
        assert distance(mixed, bank(X, counts.clone(), adapter="a"), 0, 5) < 1e-12
