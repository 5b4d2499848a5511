"""What TensorBoard shows of two runs, looked at in a real browser."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest

from tests.browser import needs_chromium, open_browser

ROOT = Path(__file__).parent.parent.parent
ARTEFACTS = Path(os.environ.get("PSS_BENCH_ARTEFACTS", ROOT / ".artefacts"))
CHARTS = (
    "computing, ms a step",
    "exposed communication, ms a step",
    "overlap, ms a step",
    "waiting for a slower rank, ms a step",
    "other, ms a step",
    "parts of the step, ms",
    "bytes a step",
    "phases, ms a step",
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs")
    overrides = [f"run.dir={directory}", "run.name=one", "profile.every_steps=20", "training.epochs=1"]
    command = [sys.executable, "-m", "launch.train", "configs/debug.toml", *overrides]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=200)
    shutil.copytree(directory / "one", directory / "two")
    return directory


@pytest.fixture(scope="module")
def address(runs):
    """Of a TensorBoard over the runs."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(runs), "--port", "0", "--load_fast=false"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    try:
        said = (line for line in process.stderr if "http://" in line)
        found = next(said).partition("http://")[2].split()[0].rstrip("/")
        yield f"http://{found}"
    finally:
        process.terminate()
        process.wait(20)


def wait_for_runs(address, timeout_s=60):
    end = time.monotonic() + timeout_s
    while time.monotonic() < end:
        with urlopen(f"{address}/data/plugin/custom_scalars/layout") as answer:
            if b"communication against computing" in answer.read():
                return
        time.sleep(0.5)
    raise AssertionError(f"TensorBoard has no layout after {timeout_s} s")


@pytest.mark.slow
@needs_chromium
def test_two_runs_overlay_in_the_charts_of_communication_against_computing(address):
    wait_for_runs(address)
    with open_browser() as browser:
        page = browser.new_page(viewport={"width": 1500, "height": 1400})
        page.goto(f"{address}/#custom_scalars")
        page.get_by_text("communication against computing").first.wait_for(timeout=60_000)
        for chart in CHARTS:
            page.get_by_text(chart, exact=True).first.wait_for(timeout=30_000)
        # One tag, two runs: two curves in the same chart.
        page.get_by_text("Matches (2)").first.wait_for(timeout=30_000)
        ARTEFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTEFACTS / "tensorboard_custom_scalars.png")
        page.goto(f"{address}/#images")
        page.get_by_text("where the time goes").first.wait_for(timeout=30_000)
        page.screenshot(path=ARTEFACTS / "tensorboard_images.png")
    assert (ARTEFACTS / "tensorboard_custom_scalars.png").stat().st_size > 20_000
