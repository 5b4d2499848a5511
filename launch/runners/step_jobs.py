"""Jobs that measure steps on this machine, started through torchrun: a plan in, measurements out."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from configs.load import load_config
from recsys.train.registry import CHOICES

_ROOT = Path(__file__).resolve().parents[2]
_TAIL_LINES = 15


class MeasuringFailed(RuntimeError):
    """Raised where a job does not succeed; the message ends with the last lines that its ranks printed."""


def setup(label: str, config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Return one setup of a plan. config: name of a file in configs/. Raises ConfigError where it is mistaken."""
    path = _ROOT / "configs" / f"{config}.toml"
    load_config(str(path), overrides, CHOICES)
    return {"label": label, "config": str(path), "overrides": list(overrides)}


def measure(setups: Sequence[Mapping[str, Any]], **plan: Any) -> list[dict[str, Any]]:
    """Measure setups, all of one world size, in one job and return what it writes of each.

    plan: the other keys of a plan of `launch.runners.measure_steps`. Raises MeasuringFailed.
    """
    first = load_config(setups[0]["config"], setups[0]["overrides"], CHOICES).parallelism
    with tempfile.TemporaryDirectory() as directory:
        plan_file, results = Path(directory) / "plan.json", Path(directory) / "results.json"
        plan_file.write_text(json.dumps({"setups": list(setups), **plan}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(first.world_size), "-m", "launch.runners.measure_steps", str(plan_file), str(results)]
        variables = {
            "OMP_NUM_THREADS": str(first.threads_per_rank),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                _, errors = process.communicate()
            except BaseException:
                process.terminate()  # torchrun ends its ranks then; killed, it would leave them
                raise
        if process.returncode:
            tail = "\n".join(errors.splitlines()[-_TAIL_LINES:])
            raise MeasuringFailed(f"measuring {', '.join(s['label'] for s in setups)} failed:\n{tail}")
        return json.loads(results.read_text())["setups"]
