"""Small models in fp64 that adapters are exported from and imported into, calls of them, and adapters of peft."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
import torch.nn.functional as F
from torch import nn

import lorasc_fx as lx
from tests.kit import tiny
from tests.kit.models import randomize, train, trainable_parameters
from tests.kit.state import trained_in_full


def normal(*shape: int, seed: int = 2) -> torch.Tensor:
    """Return random inputs in fp64, which depend only on the seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(model: Callable[..., Any], args: Sequence[Any]) -> torch.Tensor:
    """Call a model with fixed dropout masks. For an output of transformers, return the logits."""
    torch.manual_seed(7)
    output = model(*args)
    return getattr(output, "logits", output)


def gap(output: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest absolute difference of two outputs with the same shape."""
    assert output.shape == expected.shape
    return (output.double() - expected.double()).abs().max().item()


def tokens(*shape: int, high: int = 11) -> torch.Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(2))


class Suffixes(nn.Module):
    """A model in which paths are suffixes of other paths: 1.lin and 11.lin, lin and deep.lin."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("1", "11"):
            self.add_module(name, nn.ModuleDict({"lin": nn.Linear(6, 6), "other": nn.Linear(6, 6, bias=False)}))
        self.lin, self.deep = nn.Linear(6, 5), nn.ModuleDict({"lin": nn.Linear(5, 4)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in ("1", "11"):
            block: Any = getattr(self, name)
            x = torch.tanh(block["lin"](x) + block["other"](x))
        out: torch.Tensor = self.deep["lin"](torch.tanh(self.lin(x)))
        return out


class Words(nn.Module):
    """An embedding with padding, and a head beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.norm = nn.Embedding(11, 6, padding_idx=0), nn.Linear(6, 8), nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(torch.tanh(self.up(self.emb(ids)))).mean(1))
        return out


class Convs(nn.Module):
    """A small residual network: 2d, 1d and 3d convolutions, strides, 1x1, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.same, self.down, self.short = (
            nn.Conv2d(6, 6, 3, padding=1),
            nn.Conv2d(6, 8, 3, 2, 1),
            nn.Conv2d(6, 8, 1, 2),
        )
        self.line, self.box, self.head = nn.Conv1d(8, 5, 3, padding=1), nn.Conv3d(1, 4, 2), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        x = torch.tanh(x + self.same(x))
        x = torch.tanh(self.down(x) + self.short(x))
        y = self.line(x.flatten(2)).unflatten(2, (4, 4))
        out: torch.Tensor = self.head(torch.tanh(self.box(y.unsqueeze(1))).mean((2, 3, 4)))
        return out


class Experts(nn.Module):
    """Stacked matrices, as transformers keeps them, in both layouts."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = ((6, 8), (8, 6)) if transposed else ((8, 6), (6, 8))
        self.up, self.down = nn.Parameter(torch.randn(3, *up) / 3), nn.Parameter(torch.randn(3, *down) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up, down = (self.up, self.down) if self.is_transposed else (self.up.mT, self.down.mT)
        return torch.bmm(torch.tanh(torch.bmm(x.expand(3, -1, -1), up)), down).sum(0)


class Mixture(nn.Module):
    """A router whose weight is a bare parameter, and both kinds of experts."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.gate = nn.Linear(5, 6), Gate()
        self.plain, self.transposed = Experts(False), Experts(True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.into(x)
        out: torch.Tensor = self.gate(x) * (self.plain(x) + self.transposed(x))
        return out


class Gate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.randn(6, 6) / 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sigmoid(F.linear(x, self.rows))


def llama() -> nn.Module:
    return tiny.llama(vocab_size=11, num_hidden_layers=2, tie_word_embeddings=False, use_cache=False)


def gpt2() -> nn.Module:
    return tiny.gpt2(vocab_size=11, use_cache=False, tie_word_embeddings=False)


def bert() -> nn.Module:
    return tiny.bert(vocab_size=11)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the matrices."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.dim() > 1}


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """Build the model in fp64 and eval mode, with the same weights at every call."""
    torch.manual_seed(1)
    return build().double().eval()


BUILD: dict[str, Callable[[], nn.Module]] = {
    "suffixes": Suffixes, "words": Words, "convs": Convs, "mixture": Mixture, "llama": llama, "gpt2": gpt2, "bert": bert
}  # fmt: skip
INPUTS: dict[str, Callable[[], tuple[torch.Tensor, ...]]] = {
    "suffixes": lambda: (normal(3, 4, 6),),
    "words": lambda: (tokens(3, 4),),
    "convs": lambda: (normal(2, 3, 8, 8),),
    "mixture": lambda: (normal(7, 5),),
    **dict.fromkeys(("llama", "gpt2", "bert"), lambda: (tokens(2, 5),)),
}


def cascade_of(name: str, stages: int = 2, running: bool = True, **spec: Any) -> lx.Cascade:
    """A cascade with random lora_B in each stage, and other values in each parameter that is trained in full.

    `running`: the last stage is not folded yet.
    """
    options = {"rank": 2, "lora_alpha": 3.0, "pace": 0.5, **spec}
    cascade = lx.adapt(made(BUILD[name]), INPUTS[name](), spec=lx.CascadeSpec(**options))
    for stage in range(stages):
        randomize(cascade, seed=10 + stage)
        with torch.no_grad():
            for index, parameter in enumerate(trained_in_full(cascade).values()):
                parameter.add_(torch.linspace(-0.3, 0.4, parameter.numel()).view(parameter.shape) * (1 + index % 3))
        if stage < stages - 1 or not running:
            cascade.transition(None)
    return cascade


def loaded(name: str, folder: Path) -> nn.Module:
    """Return the same base with the adapter, loaded by peft."""
    return peft.PeftModel.from_pretrained(made(BUILD[name]), folder).eval()


def folded(cascade: lx.Cascade, name: str) -> nn.Module:
    """Return the same base with the slow weights."""
    model = made(BUILD[name])
    model.load_state_dict(cascade.folded_state_dict())
    return model


def close(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert that the outputs are equal to 1e-10, and that the change is not zero."""
    assert output.dtype == expected.dtype == torch.float64
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-10)
    assert float(output.std()) > 1e-3


def trained_by_peft(name: str, folder: Path, **config: Any) -> peft.PeftModel:
    """Train an adapter with peft for a few steps, and save it."""
    torch.manual_seed(3)
    theirs = peft.get_peft_model(made(BUILD[name]), peft.LoraConfig(**{"r": 3, "lora_alpha": 5, **config}))
    optimizer = torch.optim.AdamW(trainable_parameters(theirs), lr=0.05)
    train(lambda args: seeded(theirs, args), optimizer, [INPUTS[name]()] * 4)
    theirs.save_pretrained(folder)
    return theirs.eval()


def merged(theirs: peft.PeftModel) -> nn.Module:
    """Return the base with the adapter, merged by peft."""
    return copy.deepcopy(theirs).merge_and_unload()
