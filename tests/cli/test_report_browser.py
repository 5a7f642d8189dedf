"""A report looked at in headless Chromium, at a desktop's and at a phone's width; the screenshots are kept.

Chromium is driven by its command line alone: `--dump-dom` with a script that measures the page and writes what it found
into it, and `--screenshot`. Nothing of the network is there: every name resolves to nothing.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from lorasc_fx.cli import main
from tests.cli.long_run import write_long_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDTHS = {"phone": 375, "large phone": 390, "desktop": 1280}

MEASURE = """
<script>
addEventListener("load", () => {
  const wide = document.documentElement.clientWidth;
  const inside = (each) => each.closest(".scroll") !== null;
  const seen = [...document.querySelectorAll("body *")].filter((each) => !each.closest("svg") && !inside(each));
  const labels = [...document.querySelectorAll("svg text")].filter((each) => each.textContent.trim());
  const box = (each) => each.getBoundingClientRect();
  const found = {
    wide, scroll: document.documentElement.scrollWidth,
    over: seen.filter((each) => box(each).right > wide + 1).map((each) => each.tagName + ": " + each.textContent.trim()
      .slice(0, 40)),
    smallest: Math.min(...labels.map((each) => box(each).height)),
    outside: labels.filter((each) => { const svg = box(each.ownerSVGElement), own = box(each);
      return own.left < svg.left - 1 || own.right > svg.right + 1 || own.top < svg.top - 1 ||
        own.bottom > svg.bottom + 1;
      }).map((each) => each.textContent.trim()),
    pictures: [...document.querySelectorAll("figure svg")].map((each) => [box(each).width, box(each).height]),
    folded: document.querySelectorAll("details:not([open])").length,
    cut: (document.querySelectorAll("details").forEach((each) => { each.open = true; }),
      [...document.querySelectorAll("td")].filter((each) => box(each).right > wide + 1).map((each) =>
      each.textContent.trim().slice(0, 40))),
    tall: document.documentElement.scrollHeight,
    paper: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  };
  document.body.insertAdjacentHTML("beforeend", "<pre id=measured></pre>");
  document.getElementById("measured").textContent = JSON.stringify(found);
});
</script></body>
"""


@pytest.fixture(scope="module")
def browser() -> str:
    """The command of a Chromium; CI has to have one."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        told = f"none of {', '.join(BROWSERS)} is installed: apt-get install -y chromium"
        if os.environ.get("CI"):
            pytest.fail(told)
        pytest.skip(told)
    return found


def chromium(browser: str, profile: Path, *arguments: str) -> str:
    """Run a headless Chromium that reaches no network, and return what it printed."""
    fixed = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
             "--host-resolver-rules=MAP * ~NOTFOUND", "--no-first-run", f"--user-data-dir={profile}",
             "--virtual-time-budget=2000"]  # fmt: skip
    done = subprocess.run([browser, *fixed, *arguments], capture_output=True, text=True, check=False, timeout=200)
    assert done.returncode == 0, done.stderr
    return done.stdout


def measured(browser: str, folder: Path, page: Path, width: int, *arguments: str) -> dict[str, Any]:
    """Lay the page out in a frame of this width (a window cannot be as narrow as a phone), and measure it."""
    text = page.read_text(encoding="utf-8")
    (folder / "inside.html").write_text(text.replace("</body>", MEASURE), encoding="utf-8")
    frame = (
        f'<iframe id=frame src="inside.html" style="width:{width}px;height:800px;border:0"></iframe><pre id=out></pre>'
        "<script>addEventListener('load', () => setTimeout(() => { document.getElementById('out').textContent ="
        "document.getElementById('frame').contentDocument.getElementById('measured').textContent; }, 500));</script>"
    )
    (folder / "frame.html").write_text(f"<!doctype html><body>{frame}</body>", encoding="utf-8")
    options = ("--allow-file-access-from-files", "--window-size=1400,1000", "--dump-dom", *arguments)
    dumped = chromium(browser, folder / "profile", *options, (folder / "frame.html").as_uri())
    found = re.search(r'<pre id="out">(.*?)</pre>', dumped, re.DOTALL)
    assert found is not None, dumped[-2000:]
    assert found[1], "the page was not measured"
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_report_is_readable_on_a_desktop_and_on_a_phone(
    browser: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_long_run(tmp_path / "a-run-with-a-rather-long-name-of-its-folder")
    assert main(["report", str(run)]) == 0
    page = run / "report.html"
    shots = Path(os.environ.get("LORASC_SCREENSHOTS", tmp_path / "screenshots"))
    shots.mkdir(parents=True, exist_ok=True)
    for name, width in WIDTHS.items():
        found = measured(browser, tmp_path, page, width)
        assert found["wide"] == width
        assert found["scroll"] <= width, f"{name}: the page scrolls sideways"
        assert found["over"] == [], f"{name}: stands out of the page"
        assert found["cut"] == [], f"{name}: cells of tables that have to be scrolled to"
        assert found["outside"] == [], f"{name}: texts that a picture cuts off"
        assert found["smallest"] >= 10, f"{name}: a label {found['smallest']} pixels high"
        assert len(found["pictures"]) == 7
        assert all(across > 0.9 * min(width, 496) for across, _ in found["pictures"])
        assert found["folded"] >= 4
        for scheme in ("light", "dark"):
            shot = shots / f"report-{name}-{scheme}.png"
            wide, tall = (width, found["tall"]) if name == "desktop" else (max(width, 500), found["tall"])
            source = page
            if name != "desktop":  # a window has 500 pixels at least: the page in a frame
                source = tmp_path / "phone.html"
                frame = f'<iframe src="{page.as_uri()}" style="width:{width}px;height:{tall}px;border:0"></iframe>'
                source.write_text(f"<!doctype html><body style='margin:0'>{frame}</body>", encoding="utf-8")
            dark = ("--blink-settings=preferredColorScheme=0",) if scheme == "dark" else ()
            chromium(
                browser, tmp_path / "profile", *dark, f"--window-size={wide},{min(tall, 9000)}",
                f"--screenshot={shot}", source.as_uri(),
            )  # fmt: skip
            assert shot.stat().st_size > 20_000
    light = measured(browser, tmp_path, page, 375)
    dark = measured(browser, tmp_path, page, 375, "--blink-settings=preferredColorScheme=0")
    assert (light["paper"], dark["paper"]) == ("rgb(253, 253, 252)", "rgb(21, 24, 29)")
    with capsys.disabled():
        print(f"\nscreenshots of the report: {shots}")
