"""What commands print and write of stored runs and measurements, byte for byte as it was stored.

`inputs/` holds run directories, results of studies and measurements, made once by tiny runs and by the tests' fakes;
`expected/` what the commands made of them. After a deliberate change of an output:

    python -m tests.golden.test_golden --update [words of the cases]      then read `git diff tests/golden/expected`

A case whose command was renamed or moved is one entry of CASES. Numbers of an output that a numerical solver made are
compared to nine digits: the last ones differ between processors.
"""

import contextlib
import difflib
import io
import json
import os
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch import compare, compress, figure2, project, study
from launch.netlab.validation import print_proofs
from launch.runners import compress_runs, figure2_runs
from launch.runners.trial import Outcome
from launch.theory import main as theory
from recsys.bench import kernel_run
from recsys.bench.kernel_bench import to_json as kernels_to_json
from recsys.bench.kernel_report import build_size_tables
from recsys.bench.timing_proofs import Proof
from recsys.cost import crossover_report, projection
from recsys.cost.crossover import load_crossover
from recsys.cost.published_steps import Check
from recsys.report.page import print_page
from recsys.report.terminal import open_console
from recsys.runs.run_directory import RunDir
from tests.recsys.bench.kernel_bars import read_report

HERE = Path(__file__).parent
INPUTS, EXPECTED = HERE / "inputs", HERE / "expected"
STDOUT, STDERR = "stdout", "stderr"
_TERMINAL = ("COLUMNS", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PSS_BENCH_WIDTH")
_DIGITS = re.compile(r"-?\d+\.\d{9,}(?:e[+-]?\d+)?")


@dataclass(frozen=True)
class Case:
    """One run of a command, in a copy of the inputs.

    outputs: file in expected/ -> STDOUT, STDERR, or the path of a file that the command writes. status: how it exits.
    is_solved: numbers come of a numerical solver.
    """

    call: Callable[[], object]
    outputs: dict[str, str]
    status: int = 0
    is_solved: bool = False

    @property
    def name(self) -> str:
        return next(iter(self.outputs))


def command(main: Callable[[Sequence[str]], object], words: str, outputs: dict[str, str], **changes: Any) -> Case:
    """words: arguments of the command. In them PATH/* is every run of a directory, as a shell has it."""

    def call() -> object:
        return main([path for word in words.split() for path in _expand(word)])

    return Case(call, outputs, **changes)


def _expand(word: str) -> list[str]:
    return sorted(map(str, Path().glob(word))) if "*" in word else [word]


# --- What takes the place of training and measuring


def run_stored(root: str) -> Callable[..., list[Outcome]]:
    """Stands for `run_trials`: the runs are those under root, what is not there has failed."""

    def run_trials(trials: Sequence[Any], runner: object, title: str = "runs") -> list[Outcome]:
        outcomes = []
        for trial in trials:
            run_dir = RunDir(Path(root, trial.name))
            error = None if run_dir.exists() else "FloatingPointError: nan at step 9, batch 9"
            outcomes.append(Outcome(trial, run_dir, error, None if error else 7.5))
        return outcomes

    return run_trials


def compress_stored_runs() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_runs, "run_trials", run_stored("compress"))
        configs = ["methods/configs/synthetic_full.toml", "methods/configs/synthetic_robe.toml"]
        compress.main([*configs, "--seeds", "0,1", "--jobs", "1"])


def draw_stored_figure(part: str) -> None:
    stored = json.loads(Path(f"figure2/{part}.json").read_text())["setups"]
    found = {setup["label"]: setup["repeats"][0] for setup in stored}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figure2_runs, "measure", lambda setups, **_: [found[setup["label"]] for setup in setups])
        compressions = "10,100" if part == "b" else "1000"
        figure2.main([part, "--batch", "64", "--compression", compressions, "--repeats", "2", "--output", "out"])


def print_stored_kernels(grid: str) -> None:
    report, console = read_report(Path(f"kernels/{grid}.json")), Console(highlight=False, width=120)
    for size in dict.fromkeys(measurement.size for measurement in report.measurements):
        for table in build_size_tables(report, [m for m in report.measurements if m.size == size]):
            console.print(table)
    kernel_run.print_outcome(report, console)
    Path(f"{grid}.json").write_text(json.dumps(kernels_to_json(report), indent=2, allow_nan=False))


def print_stored_crossover(name: str) -> None:
    print_page(crossover_report.build_page(load_crossover(Path(name))), open_console())


def project_stored(words: str) -> None:
    """The published steps are not computed again: TorchRec's planner takes a quarter of a minute over them."""
    checks = [Check(**check) for check in json.loads(Path("project/checks.json").read_text())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "check_published", lambda _: checks)
        project.main([*words.split(), "--model", "criteo_tb", "--output", "out"])


def print_stored_proofs() -> None:
    print_proofs([Proof(**proof) for proof in json.loads(Path("proofs.json").read_text())])


SWEEP = "sweep/full_s* sweep/robe_* sweep/hashing_10x_s0 sweep/tt_rec_112x_s0 sweep/starting_s0 sweep/failed_s0"
FINISHED = "sweep/full_s* sweep/robe_*"
CASES = [
    command(compare.main, "demo/*", {"compare/demo.txt": STDOUT}),
    command(compare.main, "demo/* --json", {"compare/demo.json": STDOUT}),
    command(compare.main, "demo/* --markdown", {"compare/demo.md": STDOUT}),
    command(compare.main, "demo/*_s0 --markdown", {"compare/demo_one_seed.md": STDOUT}),
    command(compare.main, SWEEP, {"compare/sweep.txt": STDOUT}),
    command(compare.main, f"{SWEEP} --json", {"compare/sweep.json": STDOUT}),
    command(compare.main, f"{SWEEP} --markdown", {"compare/sweep.md": STDOUT}),
    command(compare.main, f"{FINISHED} --target-auc 0.75", {"compare/target.txt": STDOUT}),
    command(compare.main, f"{FINISHED} --target-auc 0.75 --json", {"compare/target.json": STDOUT}),
    command(compare.main, f"{FINISHED} --target-auc 0.9 --markdown", {"compare/target_out_of_reach.md": STDOUT}),
    command(compare.main, f"{FINISHED} sweep/unlike_s0", {"compare/refused.txt": STDERR}, status=2),
    command(compare.main, "sweep/full_s0 sweep/none", {"compare/not_there.txt": STDERR}, status=2),
    command(compare.main, f"{FINISHED} sweep/unlike_s0 --allow-differences", {"compare/unlike.txt": STDOUT}),
    command(compare.main, f"{FINISHED} sweep/unlike_s0 --allow-differences --json", {"compare/unlike.json": STDOUT}),
    command(compare.main, f"{FINISHED} sweep/unlike_s0 --allow-differences --markdown", {"compare/unlike.md": STDOUT}),
    *(
        command(
            study.main,
            f"--show experiments/{name}/results.parquet",
            {
                f"experiments/{name}.txt": STDOUT,
                f"experiments/{name}.md": f"experiments/{name}/tables.md",
                f"experiments/{name}.tex": f"experiments/{name}/tables.tex",
            },
            status=1,
        )
        for name in ("table1", "table3", "table4", "methods")
    ),
    *(
        command(
            study.main,
            f"--show experiments/{name}/results.parquet --json",
            {f"experiments/{name}.json": STDOUT},
            status=1,
        )
        for name in ("table1", "table3", "table4", "methods")
    ),
    Case(compress_stored_runs, {"compress/table.txt": STDOUT}),
    Case(lambda: draw_stored_figure("a"), {"figure2/a.txt": STDOUT}),
    Case(lambda: draw_stored_figure("b"), {"figure2/b.txt": STDOUT}),
    Case(lambda: print_stored_kernels("models"), {"kernels/models.txt": STDOUT, "kernels/models.json": "models.json"}),
    Case(lambda: print_stored_kernels("paper"), {"kernels/paper.txt": STDOUT, "kernels/paper.json": "paper.json"}),
    Case(lambda: print_stored_crossover("netlab/crossover.json"), {"netlab/crossover.txt": STDOUT}),
    Case(print_stored_proofs, {"timing/proofs.txt": STDOUT}),
    Case(
        lambda: project_stored("--gpus 8,128 --network-gbit 100,400 --compression 100,1000"),
        {"project/published.txt": STDOUT, "project/published.json": "out/projection.json"},
        is_solved=True,
    ),
    Case(
        lambda: project_stored(
            "netlab/made.json machine.memory_gb=40 assumed.link_efficiency=0.5 --machine h100 --gpus 128 "
            "--network-gbit 100 --compression 1000 --batch 2048,65536"
        ),
        {"project/fitted.txt": STDOUT, "project/fitted.json": "out/projection.json"},
        is_solved=True,
    ),
    command(theory, "--rows 40000000 --dim 128 --eps 0.5 --delta 0.01", {"theory/size.txt": STDOUT}),
    command(
        theory,
        "measure --rows 500 --dim 8 --sizes 32,64 --seeds 20 --sketch gaussian,sparse,hashing",
        {"theory/measure.txt": STDOUT},
    ),
    command(
        theory, "identical --rows 2000 --dim 16 --memory-mb 0.001,0.01 --seeds 3", {"theory/identical.txt": STDOUT}
    ),
]


# --- Running and comparing


@contextlib.contextmanager
def working_copy() -> Iterator[None]:
    """Of the inputs, as current directory; environment and signal handlers are left as they were."""
    before, handler = Path.cwd(), signal.getsignal(signal.SIGTERM)
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        for name in _TERMINAL:
            patch.delenv(name, raising=False)
        shutil.copytree(INPUTS, directory, dirs_exist_ok=True)
        os.chdir(directory)
        try:
            yield
        finally:
            os.chdir(before)
            signal.signal(signal.SIGTERM, handler)


def run(case: Case) -> dict[str, str]:
    """File in expected/ -> what the case makes of it now."""
    streams = {STDOUT: io.StringIO(), STDERR: io.StringIO()}
    status: Any = 0
    with working_copy():
        with contextlib.redirect_stdout(streams[STDOUT]), contextlib.redirect_stderr(streams[STDERR]):
            try:
                case.call()
            except SystemExit as left:
                status = left.code or 0
        assert status == case.status, f"exit status {status}, not {case.status}\n{streams[STDERR].getvalue()}"
        found = {
            name: streams[where].getvalue() if where in streams else Path(where).read_text()
            for name, where in case.outputs.items()
        }
    return {name: _DIGITS.sub(_shorten, text) for name, text in found.items()} if case.is_solved else found


def _shorten(number: re.Match[str]) -> str:
    return f"{float(number[0]):.9g}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_are_as_stored(case):
    differences = []
    for name, text in run(case).items():
        expected = (EXPECTED / name).read_text()
        if text != expected:
            lines = expected.splitlines(keepends=True), text.splitlines(keepends=True)
            differences += difflib.unified_diff(*lines, f"expected/{name}", "now", n=1)
    assert not differences, "\n" + "".join(differences)


def test_every_stored_output_belongs_to_a_case():
    stored = {str(path.relative_to(EXPECTED)) for path in EXPECTED.rglob("*") if path.is_file()}
    assert stored == {name for case in CASES for name in case.outputs}


def update(words: Sequence[str]) -> None:
    """Writes the outputs of the cases whose name holds any of the words; of all without words."""
    for case in CASES:
        if words and not any(word in case.name for word in words):
            continue
        for name, text in run(case).items():
            path = EXPECTED / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists() or path.read_text() != text:
                path.write_text(text)
                print(f"written: {path.relative_to(HERE)}")


if __name__ == "__main__":
    if sys.argv[1:2] != ["--update"]:
        sys.exit("usage: python -m tests.golden.test_golden --update [words of the cases]")
    update(sys.argv[2:])
