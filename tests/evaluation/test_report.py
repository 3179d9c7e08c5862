"""The report: whole, self-contained, and right in a real browser."""

import csv
import html
import io
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.evaluation.made import made_evaluation
from xception_pl.evaluation.results import Evaluated, classes_csv, confusion_csv, confusion_png, spelled_out
from xception_pl.evaluation.run import write_evaluation
from xception_pl.evaluation.scores import score

PROBE = """<script>
  for (const image of document.images) image.loading = "eager";
  for (const details of document.querySelectorAll("details")) details.open = true;
  addEventListener("load", () => {
    const table = document.querySelector(".sortable");  // of the first network
    const heads = [...table.querySelectorAll("th")], column = heads.findIndex(th => th.textContent === "top-1");
    const values = () => [...table.tBodies[0].rows].map(r => +r.cells[column].dataset.value);
    heads[column].click();
    const down = values();
    heads[column].click();
    document.body.dataset.probe = JSON.stringify({
      images: document.images.length,
      broken: [...document.images].filter(image => !image.complete || !image.naturalWidth).length,
      overflow: document.documentElement.scrollWidth - innerWidth,
      down, up: values(),
      page: getComputedStyle(document.body).backgroundColor,
      svg: [...document.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect().height > 100),
    });
  });
</script></body>"""


def browser() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        assert "CI" not in os.environ, "continuous integration has to install chromium"
        pytest.skip("the report is checked in a real browser: install Debian's chromium")
    return found


def in_browser(folder: Path, page: str, *options: str) -> str:
    (folder / "probe.html").write_text(page)
    command = [
        browser(),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder}/profile",
    ]
    done = subprocess.run(
        [*command, *options, (folder / "probe.html").as_uri()], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluation")
    write_evaluation(folder, *made_evaluation(networks=2))
    return folder


def test_the_files(written: Path) -> None:
    assert sorted(path.name for path in written.iterdir()) == [
        "classes.csv", "classes_2.csv", "confusion.csv", "confusion.png", "confusion_2.csv", "confusion_2.png",
        "evaluation.json", "report.html",
    ]  # fmt: skip
    evaluation, _ = made_evaluation(networks=2)
    stored = json.loads((written / "evaluation.json").read_text())
    assert stored == json.loads(json.dumps(evaluation.plain()))
    assert stored["networks"][0]["top1"] == evaluation.networks[0].summary.top1
    assert stored["comparisons"][0]["only_second"] == evaluation.compared()[0].only_second


def test_tables_add_up(written: Path) -> None:
    confusion = list(csv.reader((written / "confusion.csv").open()))
    assert confusion[0][1:] == [row[0] for row in confusion[1:]]
    counts = np.array([row[1:] for row in confusion[1:]], int)
    classes = list(csv.DictReader((written / "classes.csv").open()))
    assert counts.sum() == 1000
    assert counts.sum(1).tolist() == [int(row["images"]) for row in classes]
    assert np.diag(counts).tolist() == [int(row["correct"]) for row in classes]
    assert counts.sum(0).tolist() == [int(row["predicted"]) for row in classes]
    with Image.open(written / "confusion.png") as image:
        assert min(image.size) > 400


def test_nothing_comes_from_elsewhere(written: Path) -> None:
    page = (written / "report.html").read_text()
    places = re.findall(r'(?:src|href|srcset|action|data|poster)="([^"]*)"', page) + re.findall(r"url\(([^)]*)\)", page)
    assert places
    assert all(place.startswith("data:image/") for place in places)
    assert "@import" not in page
    assert "default-src 'none'" in page


def test_names_are_text_not_markup(written: Path) -> None:
    page = (written / "report.html").read_text()
    assert "runs/&lt;made&gt;/0.safetensors" in page
    assert "<made>" not in page
    assert "<they>" not in page


def test_the_numbers_stand_in_the_page(written: Path) -> None:
    page, (evaluation, _) = (written / "report.html").read_text(), made_evaluation(networks=2)
    for network in evaluation.networks:
        assert f"{network.summary.top1 * 100:.2f} %" in page
        assert f"{network.summary.loss:.4f}" in page
    assert f"{evaluation.compared()[0].p_value:.3g}" in page
    text = html.unescape(evaluation.table())
    assert f"{evaluation.networks[0].summary.top1:.4%}" in text
    assert "1 cannot be decoded and do not count" in text


def test_many_classes_have_a_picture_instead_of_names() -> None:
    evaluation, images = made_evaluation()
    logits = torch.randn(50, 300, generator=torch.Generator().manual_seed(0))
    many = Evaluated(
        weights="w",
        network="n",
        fingerprint="f",
        preprocessing=spelled_out(299, "timm", 3),
        class_names=[f"class {i}" for i in range(300)],
        scores=score(logits, torch.arange(50), torch.arange(50)),
    )
    from xception_pl.evaluation.report import report_html

    page = report_html(replace(evaluation, networks=[many]), images)
    assert 'class="matrix"' in page
    assert "No image" not in page
    assert len(classes_csv(many).splitlines()) == len(confusion_csv(many).splitlines()) == 301
    assert Image.open(io.BytesIO(confusion_png(many))).format == "PNG"


def test_the_preprocessing_is_spelled_out() -> None:
    assert spelled_out(299, "timm", 3) == (
        "timm: RGB, the shorter side resized to 333 pixels (bicubic), the central 299 × 299: timm's, crop 0.8975; "
        "scaled to [-1, 1] as x / 127.5 - 1"
    )


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1100])
def test_a_browser_shows_it(written: Path, tmp_path: Path, width: int) -> None:
    page = (written / "report.html").read_text().replace("</body>", PROBE)
    dom = in_browser(tmp_path, page, f"--window-size={width},900", "--virtual-time-budget=4000", "--dump-dom")
    probe = json.loads(html.unescape(re.search(r'data-probe="([^"]*)"', dom)[1]))  # type: ignore[index]
    assert probe["images"] > 60
    assert probe["broken"] == 0
    assert probe["overflow"] <= 0
    assert probe["down"] == sorted(probe["down"], reverse=True)
    assert probe["up"] == sorted(probe["up"])
    assert probe["svg"] == [True] * 4
    assert probe["page"] == "rgb(246, 247, 249)"


@pytest.mark.slow
def test_a_browser_shows_it_dark_where_that_is_wanted(written: Path, tmp_path: Path) -> None:
    page = (written / "report.html").read_text()
    means = []
    for options in ([], ["--blink-settings=preferredColorScheme=0"]):
        in_browser(tmp_path, page, *options, "--window-size=1000,900", f"--screenshot={tmp_path}/page.png")
        with Image.open(tmp_path / "page.png") as image:
            pixels = np.asarray(image.convert("L"))
        means.append(float(pixels.mean()))
        assert pixels.std() > 15  # there is something to see
    assert means[0] > 180
    assert means[1] < 80
