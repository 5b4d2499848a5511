"""Run directories as training leaves them, with plausible curves or with evaluations given point by point."""

import copy
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tomli_w

from recsys.runs.run_directory import RunDir
from recsys.runs.summary import RunSummary

FULL_PARAMETERS = 54_002_864
TRAIN_ROWS, BATCH = 400_000, 512
BEST_AUC, BEST_LOG_LOSS = 0.8041, 0.4389

CONFIG: dict[str, Any] = {
    "run": {"seed": 0, "dir": "runs", "device": "auto", "overwrite": True},
    "data": {"dataset": "synthetic", "cache_dir": ".cache", "synthetic": {"scale": 0.1, "train_rows": TRAIN_ROWS}},
    "model": {"architecture": "dlrm", "embedding_dim": 16, "dlrm": {"bottom_mlp": [64], "top_mlp": [64, 32]}},
    "embedding": {"method": "robe", "compression": 1.0, "init_scale": 0.01},
    "parallelism": {"world_size": 1, "threads_per_rank": 1, "sharding": "planner", "timeout_s": 300},
    "optimizer": {"dense": "adagrad", "dense_learning_rate": 0.05, "embedding": "sgd", "embedding_learning_rate": 3.0},
    "training": {"global_batch_size": BATCH, "epochs": 2.0, "stop_at_target": False},
    "evaluation": {"every_epochs": 0.25, "global_batch_size": 16384, "patience": 0},
    "logging": {"every_steps": 20, "tensorboard": True},
}

ENVIRONMENT: dict[str, Any] = {
    "commit": "5f0c7d0f4d9be0a1c2b3a4958677ffee00112233",
    "uncommitted_changes": False,
    "python": "3.11.9",
    "packages": {"torch": "2.13.0+cpu", "torchrec": "1.8.0", "fbgemm-gpu-cpu": "1.8.0", "numpy": "2.3.1"},
    "platform": "Linux-6.1-x86_64",
    "cpu": "Xeon Gold 6230 @ 2.10GHz",
    "cpu_cores": 2,
    "device": "cpu",
    "omp_wait_policy": "PASSIVE",
    "command": ["train.py", "configs/demo_robe.toml", "run.dir=runs/demo"],
}

PLAN = "Placement of the embeddings\n table  sharding  kernel  rank 0 bytes\n C1  <table_wise>  fused  1,024\n"

Evaluation = tuple[float, int, float, float]
"""time_s, samples, epoch, validation AUC"""


@dataclass
class FakeRun:
    """What a run is to be like; without evaluations these are plausible ones that approach final_auc.

    windows: how many are profiled. config, summary and environment: dotted keys laid over what is written otherwise,
    valid or not.
    """

    name: str
    method: str = "robe"
    compression: float = 1.0
    seed: int = 0
    ranks: int = 2
    threads: int = 1
    step_ms: float | None = 10.0
    evaluations: Sequence[Evaluation] | None = None
    final_auc: float = 0.766
    slowness: float = 1.0
    optimizer_bytes: int = 0
    windows: int = 0
    config: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    def write(self, root: Path) -> Path:
        """Write the run below root and return its directory."""
        machine = copy.deepcopy(ENVIRONMENT) | {"world_size": self.ranks, "threads_per_rank": self.threads}
        lay(machine, self.environment)
        config = self._config()
        summary = RunSummary.model_validate(self._facts(config) | self._measured()).model_dump()
        lay(summary, self.summary)
        run_dir = RunDir(root / self.name.replace("/", "_"))
        run_dir.start(tomli_w.dumps(config), machine, resume=False)
        run_dir.write_plan(PLAN)
        (run_dir.path / "summary.json").write_text(json.dumps(summary, indent=2))
        (run_dir.path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in self._records()))
        return run_dir.path

    @property
    def _at(self) -> Sequence[Evaluation]:
        if self.evaluations is not None:
            return self.evaluations
        return plausible_evaluations(self.step_ms or 10.0, self.final_auc, self.slowness, self.seed)

    def _config(self) -> dict[str, Any]:
        config = copy.deepcopy(CONFIG)
        lay(config, {"run.name": self.name, "run.seed": self.seed})
        lay(config, {"embedding.method": self.method, "embedding.compression": self.compression})
        lay(config, {"parallelism.world_size": self.ranks, "parallelism.threads_per_rank": self.threads})
        lay(config, self.config)
        return config

    def _facts(self, config: Mapping[str, Any]) -> dict[str, Any]:
        method, compression = config["embedding"]["method"], config["embedding"]["compression"]
        ranks, sharded = config["parallelism"]["world_size"], method == "sharded"
        stored = int(FULL_PARAMETERS / compression)
        held = [4 * stored] * ranks
        if sharded:
            held = [4 * stored * (5 + rank) // (5 * ranks + sum(range(ranks))) for rank in range(ranks)]
        return {
            "name": config["run"]["name"],
            "method": method,
            "seed": config["run"]["seed"],
            "status": "finished",
            "stop_reason": "epochs",
            "device": "cpu",
            "selected_on": "validation",
            "architecture": config["model"]["architecture"],
            "placement": "shard" if sharded else "replicate",
            "sharding": config["parallelism"]["sharding"] if sharded else None,
            "dataset": config["data"]["dataset"],
            "data_fingerprint": "8c1f0a77d2e94b10",
            "world_size": ranks,
            "threads_per_rank": config["parallelism"]["threads_per_rank"],
            "global_batch_size": config["training"]["global_batch_size"],
            "parameters": {"dense": 36_129, "embedding": stored, "embedding_full": FULL_PARAMETERS},
            "compression": {"target": compression, "actual": FULL_PARAMETERS / stored},
            "embedding_stored_bytes": 4 * stored,
            "bytes_per_rank": {
                "embedding": held,
                "embedding_optimizer": [self.optimizer_bytes] * ranks,
                "dense": 144_516,
            },
            "train_rows": TRAIN_ROWS,
            "test_rows": 60_000,
            "best_possible": {"auc": BEST_AUC, "log_loss": BEST_LOG_LOSS, "base_rate": 0.2531},
        }

    def _measured(self) -> dict[str, Any]:
        every = [_position(at) | quality("validation", at[3]) | quality("test", at[3]) for at in self._at]
        last: dict[str, Any] = every[-1] if every else {"step": 0, "samples": 0, "epoch": 0.0, "time_s": 0.0}
        step_ms, sharded = self.step_ms, self.method == "sharded"
        windows = range(1, self.windows + 1) if step_ms else ()
        return {
            "steps": last["step"],
            "samples": last["samples"],
            "epochs": last["epoch"],
            "train_time_s": last["time_s"],
            "evaluation_time_s": 2.5,
            "step_ms": step_ms and {"p50": step_ms, "p95": 1.3 * step_ms, "mean": 1.05 * step_ms},
            "data_ms": step_ms and {"p50": 0.6, "p95": 0.9, "mean": 0.65},
            "samples_per_s": last["samples"] / last["time_s"] if every else None,
            "profiles": [plausible_window(100 * n + 1, step_ms or 0.0, self.ranks, sharded) for n in windows],
            "peak_memory_gib": [1.21, 1.18] if every else None,
            "best": min(every, key=lambda e: e["validation_log_loss"], default=None),
            "last": last if every else None,
        }

    def _records(self) -> list[dict[str, Any]]:
        """Before each evaluation nine records of the training loss."""
        noise, records = random.Random(self.seed), []
        before: Evaluation = (0.0, 0, 0.0, 0.6)
        for at in self._at:
            for part in range(1, 10):
                *place, auc = (a + part / 10 * (b - a) for a, b in zip(before, at, strict=True))
                loss = BEST_LOG_LOSS + 1.15 * (BEST_AUC - auc) + noise.gauss(0, 0.006)
                speed = {"time/step_ms": self.step_ms, "speed/samples_per_s": 48_000.0}
                records.append(_position(place) | {"quality/train_log_loss": loss} | speed)
            shown = quality("validation", at[3]) | quality("test", at[3])
            records.append(
                _position(at) | {f"quality/{k}": value for k, value in shown.items() if not k.endswith("_se")}
            )
            before = at
        return records


def write_run(root: Path, name: str, **fields: Any) -> Path:
    """Write a `FakeRun` below root and return its directory."""
    return FakeRun(name, **fields).write(root)


def lay(table: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set {"training.epochs": 3} and the like in nested tables."""
    for key, value in changes.items():
        *path, last = key.split(".")
        inner = table
        for part in path:
            inner = inner.setdefault(part, {})
        inner[last] = value


def plausible_evaluations(step_ms: float, final_auc: float, slowness: float, seed: int) -> list[Evaluation]:
    """Return two epochs, every quarter; the AUC rises exponentially to final_auc, the slower the larger slowness."""
    noise, per_epoch = random.Random(seed), TRAIN_ROWS // BATCH
    evaluations = []
    for quarter in range(1, 9):
        steps, epoch = per_epoch * quarter // 4, quarter / 4
        auc = final_auc - 0.09 * math.exp(-epoch * 2.4 / slowness) + noise.gauss(0, 0.0008)
        evaluations.append((steps * (step_ms + 0.6) / 1000, steps * BATCH, epoch, auc))
    return evaluations


def quality(split: str, auc: float) -> dict[str, float]:
    """Return the metrics of a split that go with a validation AUC."""
    shift = 0.0012 if split == "test" else 0.0
    loss = BEST_LOG_LOSS + 1.15 * (BEST_AUC - auc) + shift
    metrics = {"auc": auc - shift, "auc_se": 0.0021, "log_loss": loss, "ne": loss / 0.5652, "calibration": 1.01}
    return {f"{split}_{name}": value for name, value in metrics.items()}


def profiled_rank(step_ms: float, **changes: Any) -> dict[str, Any]:
    """Return one rank of a profiled window: all of the step is computing and one phase, but for what is changed."""
    times = ("comm_ms", "exposed_comm_ms", "overlap_ms", "wait_ms", "exposed_wait_ms", "other_ms", "data_loading_ms")
    rank = dict.fromkeys(times, 0.0) | {"step_ms": step_ms, "compute_ms": step_ms, "unmatched": 0, "collectives": {}}
    return rank | {"wall_ms": step_ms, "blocked_ms": 0.0, "phases": phases({"other": step_ms})} | changes


def phases(ms: dict[str, float]) -> dict[str, dict[str, float]]:
    """Return phases of which half is computing and a quarter exposed communication."""
    return {
        name: {"ms": value, "compute_ms": 0.5 * value, "exposed_comm_ms": 0.25 * value} for name, value in ms.items()
    }


def collective(count: int, size: int, wait_ms: float, transfer_ms: float) -> dict[str, float]:
    """Return the collectives of one kind."""
    times = {"ms": wait_ms + transfer_ms, "wait_ms": wait_ms, "transfer_ms": transfer_ms}
    return {"count": float(count), "bytes": float(size), **times}


def profiled_window(step: int, ranks: list[dict[str, Any]], clock_error_ms: float = 0.0) -> dict[str, Any]:
    """Return a window of ten steps."""
    return {"step": step, "num_steps": 10, "clock_error_ms": clock_error_ms, "ranks": ranks}


def plausible_window(step: int, step_ms: float, ranks: int, sharded: bool) -> dict[str, Any]:
    """Return a step a fifth longer than step_ms, whose later ranks compute longer and wait less."""
    window = [_plausible_rank(1.2 * step_ms, rank / max(1, ranks - 1), ranks, sharded) for rank in range(ranks)]
    return profiled_window(step, window, 0.05 if ranks > 1 else 0.0)


def _plausible_rank(step_ms: float, late: float, ranks: int, sharded: bool) -> dict[str, Any]:
    transfer = 0.0 if ranks == 1 else 0.3 if sharded else 0.2
    waiting = 0.1 * (1 - late) if ranks > 1 else 0.0
    computing = 0.4 + 0.1 * late
    parts = {
        "compute_ms": computing,
        "comm_ms": 1.1 * transfer + waiting,
        "exposed_comm_ms": transfer + waiting,
        "overlap_ms": 0.1 * transfer,
        "wait_ms": waiting + 0.05 * transfer,  # half of the overlap
        "exposed_wait_ms": waiting,
        "other_ms": 1 - computing - transfer - waiting,
    }
    forward = {"bottom_mlp": 0.05, "embedding_lookup": 0.1, "interaction": 0.05, "top_mlp": 0.05}
    shares = {f"forward/{name}": share for name, share in forward.items()}
    shares |= {f"backward/{name}": 1.5 * share for name, share in forward.items()}
    if sharded:
        shares |= {"forward/input_distribution": 0.12, "forward/output_distribution": 0.08}
    if ranks > 1:
        shares |= {"gradient_all_reduce": 0.15, "optimizer": 0.02}
    shares["other"] = 1 - sum(shares.values())
    kinds = {"all_reduce": collective(1, 300_000, waiting * step_ms, 0.1 * step_ms)} if ranks > 1 else {}
    if sharded:
        kinds["all_to_all"] = collective(5, 700_000, 0.0, 0.2 * step_ms)
    return profiled_rank(
        step_ms,
        **{name: share * step_ms for name, share in parts.items()},
        phases=phases({name: share * step_ms for name, share in shares.items()}),
        collectives=kinds,
    )


def _position(at: Sequence[float]) -> dict[str, Any]:
    return {"step": int(at[1]) // BATCH, "samples": at[1], "epoch": at[2], "time_s": at[0]}


def write_demo(root: Path, windows: int = 0) -> list[Path]:
    """Write the demo's three runs: a sharded baseline, ROBE data-parallel, ROBE in one process."""
    robe: dict[str, Any] = {"compression": 1000.0, "slowness": 1.2, "windows": windows}
    return [
        write_run(root, "demo_sharded", method="sharded", step_ms=9.3, final_auc=0.7661, windows=windows),
        write_run(root, "demo_robe", step_ms=6.6, final_auc=0.7598, **robe),
        write_run(root, "demo_robe_single", step_ms=5.8, final_auc=0.7601, ranks=1, threads=2, **robe),
    ]


def write_sweep(root: Path, windows: int = 0) -> list[Path]:
    """Write thirty runs: full tables and compressed arms at several sizes, some with seeds, Adagrad state, no end."""
    runs = [
        write_run(root, f"full_s{s}", method="sharded", seed=s, step_ms=9.3, final_auc=0.766, windows=windows)
        for s in range(3)
    ]
    methods = (("robe", 0.001, 0.7, 3), ("hashing_trick", 0.006, 0.62, 1), ("quotient_remainder", 0.004, 0.8, 1))
    runs += [
        write_run(
            root,
            f"{method}_{10**power}x_s{seed}",
            method=method,
            compression=float(10**power),
            seed=seed,
            step_ms=9.3 * (cost - 0.05 * power) * (1 + 0.02 * seed),
            final_auc=0.766 - loss * max(0, power - 1.5),
            slowness=1 + 0.25 * power,
            optimizer_bytes=4 * int(FULL_PARAMETERS / 10**power) if method == "robe" else 0,
            windows=windows,
        )
        for method, loss, cost, seeds in methods
        for power in range(1, 6)
        for seed in range(seeds)
    ]
    cut, new = {"status": "interrupted"}, {"status": "running"}
    runs.append(write_run(root, "tt_rec_112x", method="tt_rec", compression=112.0, step_ms=17.0, summary=cut))
    runs.append(write_run(root, "starting", compression=50.0, step_ms=None, evaluations=[], summary=new))
    return runs
