"""Every embedding method at several compressions beside full tables: quality, size and time on MovieLens.

Each configs/movielens/<method>.toml is run at every compression that it reaches, or at its highest where it reaches
none of them. The learning rate of a method's embeddings is chosen from one grid, at its lowest compression, by the
validation log loss of the first seed, with one step beyond the grid where the best lies at its end; all its other runs
are made at that rate. Everything else is shared. Runs that are there already are taken as they are, those of a changed
config made anew.
"""

import argparse
import json
import math
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torchrec.modules.embedding_configs import EmbeddingBagConfig
from torchrec.modules.embedding_modules import EmbeddingBagCollectionInterface
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from configs.load import ConfigError, load_config
from configs.request import CompressionRefused
from configs.schema import RunConfig
from launch.cli import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_MISTAKE
from launch.runners.local import LocalRunner, count_jobs
from launch.runners.trial import Outcome, Runner, Trial, find_log, run_trials
from launch.runners.tuning import RATE, choose_rate, tune
from recsys.data.registry import build_dataset, find_dataset
from recsys.embedding.embeddings import METHODS, build_embedding
from recsys.report.run import ComparisonError, load_runs
from recsys.runs.run_dir import write_atomically
from recsys.studies.method_page import write_method_page
from recsys.studies.method_rows import MethodRow, MethodTable, RateTrial, build_method_table, to_json
from recsys.studies.method_table import COLUMNS, describe_context, format_markdown
from recsys.train.assemble import plan_tables
from recsys.train.registry import CHOICES

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
_STD_ROWS = 4096
_PIPE_WIDTH = 400

Key = tuple[MethodRow, float, int]
"""A run by its row, learning rate and seed."""


def find_configs() -> list[str]:
    return [str(path) for path in sorted((CONFIGS / "movielens").glob("*.toml")) if path.name != "base.toml"]


def data_overrides(path: str | None) -> list[str]:
    """Return the keys of a config that name the files at a path, none without one. Raises ConfigError."""
    return [] if path is None else find_dataset(path)[1]


def load_methods(paths: Sequence[str], overrides: Sequence[str]) -> dict[str, tuple[str, RunConfig]]:
    """Name -> path and config, in the order of the registry of methods, then of names."""
    found = {}
    for path in paths:
        config = load_config(path, overrides, CHOICES)
        if METHODS[config.embedding.method].placement == "shard":
            continue  # the same tables as full ones, placed differently
        name = config.run.name.removeprefix(f"{config.data.dataset}_")
        if name in found:
            raise ConfigError(f"{path} and {found[name][0]} are both called {name}")
        found[name] = path, config
    if not found:
        raise ConfigError("no config of a method is given")
    if len({config.data.model_dump_json() for _, config in found.values()}) > 1:
        raise ConfigError(f"{', '.join(path for path, _ in found.values())}: they differ in [data]")
    order = list(METHODS)
    return dict(sorted(found.items(), key=lambda item: (order.index(item[1][1].embedding.method), item[0])))


def plan_rows(methods: dict[str, tuple[str, RunConfig]], compressions: Sequence[float]) -> list[MethodRow]:
    """The rows of the table, none of them run yet: what each method reaches is found by building it."""
    config = next(iter(methods.values()))[1]
    dataset = build_dataset(config.data)
    tables, id_counts = plan_tables(config, dataset)

    def plan(name: str, config: RunConfig, compression: float) -> MethodRow:
        row = MethodRow(name, compression)
        section = config.embedding.model_copy(update={"compression": compression})
        try:
            module = build_embedding(section, tables, seed=0, device=torch.device("cpu"), id_counts=id_counts)
        except CompressionRefused as refused:
            return replace(row, limit=refused.nearest)
        except ValueError as error:
            return replace(row, errors=(str(error),))
        return replace(row, initial_std=initial_std(module, tables) / (section.init_scale / math.sqrt(3)))

    rows = []
    for name, (_, config) in methods.items():
        own = [plan(name, config, compression) for compression in sorted(compressions)]
        if own[0].limit is not None:
            highest = plan(name, config, own[0].limit)
            own = [highest if highest.limit is not None else replace(highest, limit=highest.compression)]
        rows += own
    return rows


def initial_std(module: EmbeddingBagCollectionInterface, tables: Sequence[EmbeddingBagConfig]) -> float:
    """Standard deviation of all elements of random rows, as many of each table."""
    generator = torch.Generator().manual_seed(0)
    features = [(name, table.num_embeddings) for table in tables for name in table.feature_names]
    ids = [torch.randint(rows, (_STD_ROWS,), generator=generator) for _, rows in features]
    lengths = torch.ones(len(features) * _STD_ROWS, dtype=torch.int64)
    with torch.no_grad():
        bags = module(KeyedJaggedTensor([name for name, _ in features], torch.cat(ids), lengths=lengths))
    return float(bags.values().double().std())


def default_rates(rate: float) -> list[float]:
    """The grid around a config's own learning rate, half a decade apart: 0.1 -> 0.03, 0.1, 0.3."""
    return [float(f"{rate * 10**power:.1g}") for power in (-0.5, 0, 0.5)]


class Bench:
    """Runs rows: tunes the learning rate of each, then makes its other seeds. overrides: laid over every config."""

    def __init__(self, paths: dict[str, str], overrides: Sequence[str], seeds: Sequence[int], runs: Runner) -> None:
        self.paths, self.overrides, self.seeds, self.runs = paths, overrides, seeds, runs
        self.outcomes: dict[Key, Outcome] = {}

    def run(self, rows: Sequence[MethodRow], rates: Sequence[float]) -> list[MethodRow]:
        """The rows with what was measured. Those that can be run have an initial_std."""
        able, first = [row for row in rows if row.initial_std is not None], self.seeds[0]
        tuned = {row.name: row for row in reversed(able)}  # the first of each name, its lowest compression
        found = tune(
            list(tuned.values()), rates, lambda title, tried: self._make(title, [(*key, first) for key in tried])
        )
        trials = {row.name: found[row] for row in tuned.values()}
        chosen = {row: rate for row in able if (rate := choose_rate(trials[row.name])) is not None}
        keys = [(row, rate, seed) for row, rate in chosen.items() for seed in self.seeds]
        self._make("other runs", [key for key in keys if key not in self.outcomes])
        read = {row: self._read(row, chosen.get(row), trials[row.name], row is tuned[row.name]) for row in able}
        return [read.get(row, row) for row in rows]

    def _make(self, title: str, keys: Sequence[Key]) -> list[Outcome]:
        outcomes = run_trials([self._trial(*key) for key in keys], self.runs, title) if keys else []
        self.outcomes |= dict(zip(keys, outcomes, strict=True))
        return outcomes

    def _trial(self, row: MethodRow, rate: float, seed: int) -> Trial:
        settings = (f"embedding.compression={row.compression!r}", f"{RATE}={rate!r}", f"run.seed={seed}")
        name = f"{row.name}_{row.compression:g}x_lr{rate:g}_s{seed}".replace("+", "")
        return Trial(self.paths[row.name], (*self.overrides, *settings), name)

    def _read(self, row: MethodRow, rate: float | None, trials: Sequence[RateTrial], is_tuned: bool) -> MethodRow:
        read = replace(row, trials=tuple(trials)) if is_tuned else row
        if rate is None:
            return replace(read, errors=tuple(f"{t.learning_rate:g}: {t.error}" for t in trials))
        outcomes = [self.outcomes[row, rate, seed] for seed in self.seeds]
        runs = load_runs([outcome.run_dir.path for outcome in outcomes if not outcome.failure])
        errors = [f"{o.trial.name}: {o.failure} (log: {find_log(o.run_dir)})" for o in outcomes if o.failure]
        return replace(read, runs=tuple(runs), errors=tuple(errors))


def write_results(table: MethodTable, directory: Path) -> None:
    """index.html, table.md and results.json."""
    context = describe_context(table)
    markdown = [
        *(line + "\n" for line in context[:1]),
        format_markdown(table),
        "",
        *(f"- {line}" for line in context[1:]),
    ]
    write_method_page(table, directory / "index.html")
    write_atomically(directory / "table.md", "\n".join(markdown) + "\n")
    write_atomically(directory / "results.json", json.dumps(to_json(table), indent=2, allow_nan=False))


def print_table(table: MethodTable) -> None:
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_PIPE_WIDTH)
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in COLUMNS:
        heading = column.heading.replace(" ", "\n", 1)
        grid.add_column(heading, justify="left" if column is COLUMNS[0] else "right", overflow="fold")
    for row, after in zip(table.rows, [*table.rows[1:], None], strict=True):
        cells = [column.cell(row, table) for column in COLUMNS]
        grid.add_row(
            *(escape(c.text) + (f"\n[dim]{escape(c.detail)}[/]" if c.detail else "") for c in cells),
            end_section=after is None or after.name != row.name,
        )
    console.print(grid)
    for line in describe_context(table):
        console.print(line, markup=False, soft_wrap=True)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m launch.bench_methods",
        description=__doc__,
        epilog="examples:\n"
        "  python -m launch.bench_methods --data ~/ml-25m\n"
        "  python -m launch.bench_methods --data ~/ml-25m --compressions 50 --rates 0.01 0.03 0.1 0.3 --seeds 0 1 2\n"
        "  python -m launch.bench_methods configs/movielens/full.toml configs/movielens/robe.toml \\\n"
        "      training.global_batch_size=1024 --data ~/ml-25m --output runs/batch_1024\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "items",
        nargs="*",
        metavar="config.toml | section.key=value",
        help="configs instead of all configs/movielens/*.toml, and values laid over all of them",
    )
    parser.add_argument("--data", metavar="DIR", help="directory of MovieLens: ratings and movies as .csv or .parquet")
    parser.add_argument("--compressions", nargs="+", type=float, default=[10.0, 100.0, 1000.0], metavar="X")
    parser.add_argument(
        "--rates", nargs="+", type=float, default=[0.03, 0.1, 0.3], metavar="X", help="grid of the rates"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2, 3, 4], metavar="N")
    parser.add_argument("--jobs", type=int, metavar="N", help="runs at a time (default: cores / threads of a run)")
    parser.add_argument("--output", default="runs/bench_methods", metavar="DIR", help="default: %(default)s")
    return parser.parse_intermixed_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    asked = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    output, paths = Path(asked.output), [item for item in asked.items if "=" not in item] or find_configs()
    try:
        overrides = [
            *data_overrides(asked.data),
            f"run.dir={json.dumps(str(output / 'runs'))}",
            "run.overwrite=true",
            "logging.tensorboard=false",
            *(item for item in asked.items if "=" in item),
        ]
        methods = load_methods(paths, overrides)
        configs = {name: config for name, (_, config) in methods.items()}
        jobs = count_jobs(list(configs.values()), asked.jobs)
        rates = asked.rates or default_rates(next(iter(configs.values())).optimizer.embedding_learning_rate)
        rows = plan_rows(methods, asked.compressions)
        with LocalRunner(jobs) as runs:
            bench = Bench({name: path for name, (path, _) in methods.items()}, overrides, asked.seeds, runs)
            rows = bench.run(rows, sorted(rates))
        table = build_method_table(rows, configs, asked.seeds, rates, jobs.one)
    except (ValueError, FileNotFoundError, ComparisonError) as error:
        hint = "\nor give --data DIR, with make: DATA=DIR" if isinstance(error, FileNotFoundError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        sys.exit(EXIT_MISTAKE)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    write_results(table, output)
    print_table(table)
    print(f"page: {output / 'index.html'}; also table.md and results.json")
    sys.exit(EXIT_FAILED if any(row.errors for row in table.rows) else 0)


if __name__ == "__main__":
    main()
