"""What a notebook shows of a cascade: well-formed HTML with every weight, and nothing of a name that is markup."""

from __future__ import annotations

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import nn

import lorasc_fx as lx

X = torch.zeros(2, 5)


class Odd(nn.Module):
    """A name that is markup, a weight that is left out by the spec, and one that nothing can adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("<b>&'", nn.Linear(5, 6))
        self.second = nn.Linear(6, 7)
        self.out = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second, out = self.children()
        return out(second(first(x)))


def adapted() -> lx.Cascade:
    rules = (lx.Rule("second.weight", rank=4),)
    return lx.adapt(Odd(), (X,), spec=lx.CascadeSpec(rank=2, exclude=("out.weight",), rules=rules), frontend="symbolic")


def texts(page: ElementTree.Element, tag: str) -> list[str]:
    return ["".join(each.itertext()) for each in page.iter(tag)]


def test_the_weights_are_drawn_and_listed() -> None:
    cascade = adapted()
    page = ElementTree.fromstring(cascade._repr_html_())  # of our own making
    heads, bars = [each.text for each in page.iter("summary")], list(page.iter("rect"))
    assert heads == ["2 sites", "1 weights are not adapted"]
    cells = texts(page, "td")
    first = cells.index("<b>&'.weight")
    assert cells[first : first + 5] == ["<b>&'.weight", "6 × 5", "linear", "2", cascade.placements["<b>&'.weight"]]
    assert "out.weight" in cells
    assert [float(bar.get("height", "")) for bar in bars] == [26.0, 48.0, 4.0]  # by rank; one that is not adapted
    assert ["".join(bar.itertext()).split(",")[0].split(":")[0] for bar in bars] == [
        "<b>&'.weight",
        "second.weight",
        "out.weight",
    ]
    assert f"{2 * 11 + 4 * 13:,} trainable" in "".join(page.itertext())


def test_it_is_html_and_stays_so_after_release() -> None:
    cascade = adapted()
    cascade.release()
    tags: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            tags.append(tag)

    Reader().feed(cascade._repr_html_())
    assert "b" in tags
    assert tags.count("b") == 1  # the heading


def test_a_long_table_is_cut() -> None:
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(60)))
    page = ElementTree.fromstring(lx.adapt(model, (X,), frontend="symbolic")._repr_html_())
    assert (len(list(page.iter("tr"))), len(list(page.iter("rect")))) == (51, 60)
    assert "and 10 more" in "".join(page.itertext())


def test_no_extra_is_needed() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = sys.modules['igraph'] = None\n"
        "import lorasc_fx as lx, torch\n"
        "print(len(lx.adapt(torch.nn.Linear(5, 3), (torch.zeros(2, 5),), frontend='symbolic')._repr_html_()))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500
