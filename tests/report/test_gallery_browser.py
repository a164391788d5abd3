"""The gallery in headless Chromium, from the disk and without a network; skipped where there is no Chromium."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tritflow.report.gallery import verdicts, write_gallery
from tritflow.report.sources import collect

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here")

# A user's day: look, sort, filter, slide one picture, slide all, change the size.
SCRIPT = """
<pre id="findings"></pre>
<script>
addEventListener("load", () => {
  const out = {errors: window.failures || []};
  const shown = () => [...document.querySelectorAll("article")].filter(a => !a.hidden);
  const psnr = () => shown().map(a => +a.dataset.psnr);
  const set = (id, value, kind) => {
    const e = document.getElementById(id); e.value = value; e.dispatchEvent(new Event(kind, {bubbles: true}));
  };
  out.first = psnr();
  set("order", "alike", "change"); out.alike = psnr();
  set("order", "different", "change"); out.different = psnr();
  set("tag", "light", "change"); out.light = shown().map(a => a.dataset.tag);
  set("tag", "", "change");
  set("verdict", "lost", "change"); out.lost = shown().map(a => a.dataset.changed);
  set("verdict", "", "change");
  const card = shown()[0], slider = card.querySelector("input"), over = card.querySelector(".over");
  slider.value = 20; slider.dispatchEvent(new Event("input", {bubbles: true}));
  out.clip = getComputedStyle(over).clipPath;
  set("all", "75", "input"); out.all = shown().map(a => a.querySelector(".pair").style.getPropertyValue("--x"));
  set("size", "512", "input"); out.width = card.getBoundingClientRect().width;
  out.loaded = [...card.querySelectorAll("img")].map(i => i.complete && i.naturalWidth);
  out.status = document.getElementById("shown").textContent;
  document.getElementById("findings").textContent = JSON.stringify(out);
});
</script>
"""


@pytest.fixture(scope="module")
def page(evaluated: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tritflow.evaluation.images import read_verdicts

    sets = {s.model.name: s for s in collect([evaluated]).image_sets()}
    teacher, student = sets["teacher"], sets["student <b>"]
    judged = [verdicts(read_verdicts(s.folder.with_name(f"{s.folder.name}.scores.jsonl"))) for s in (teacher, student)]
    folder = tmp_path_factory.mktemp("browser")
    return write_gallery(folder, teacher, student, teacher_verdicts=judged[0], student_verdicts=judged[1])


def visit(page: Path, profile: Path) -> dict[str, Any]:
    """What the script finds in the page. Names resolve to nothing, so that whatever is fetched fails loudly."""
    text = page.read_text(encoding="utf-8")
    watch = (
        "<script>window.failures = []; addEventListener('error', e => failures.push(String(e.message)), true);</script>"
    )
    driven = page.with_name("driven.html")
    driven.write_text(text.replace("<head>", f"<head><script>{watch}</script>").replace("</body>", SCRIPT + "</body>"))
    command = [
        str(CHROMIUM),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={profile}",
        "--window-size=1200,900",
        "--virtual-time-budget=4000",
        "--dump-dom",
        driven.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    found = re.search(r'<pre id="findings">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    findings: dict[str, Any] = json.loads(found.group(1))
    return findings


def test_the_gallery_works_in_a_browser(page: Path, tmp_path: Path) -> None:
    found = visit(page, tmp_path / "profile")
    assert found["errors"] == []
    assert len(found["first"]) == 24
    assert found["first"] == sorted(found["first"])  # the most different first
    assert found["alike"] == sorted(found["first"], reverse=True)
    assert found["different"] == found["first"]
    assert set(found["light"]) == {"light"}
    assert set(found["lost"]) == {"lost"}
    assert found["clip"].endswith("20%)")
    assert set(found["all"]) == {"75%"}
    assert found["width"] > 400
    assert found["loaded"] == [16, 16]
    assert found["status"] == "24 of 24 shown"
