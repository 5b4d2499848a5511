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
    """A job did not succeed; the message ends with the last lines of what its ranks said."""


def setup(label: str, config: str, overrides: Sequence[str]) -> dict[str, Any]:
    """One setup of a plan. config: name of a file in configs/. Raises ConfigError where it is mistaken."""
    path = _ROOT / "configs" / f"{config}.toml"
    load_config(str(path), overrides, CHOICES)
    return {"label": label, "config": str(path), "overrides": list(overrides)}


def measure(setups: Sequence[Mapping[str, Any]], **plan: Any) -> list[dict[str, Any]]:
    """What `launch.runners.measure_steps` writes of each setup, all of one world size. plan: its other keys. Raises
    MeasuringFailed."""
    first = load_config(setups[0]["config"], setups[0]["overrides"], CHOICES).parallelism
    with tempfile.TemporaryDirectory() as directory:
        asked, found = Path(directory) / "plan.json", Path(directory) / "found.json"
        asked.write_text(json.dumps({"setups": list(setups), **plan}))
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        command += [str(first.world_size), "-m", "launch.runners.measure_steps", str(asked), str(found)]
        variables = {
            "OMP_NUM_THREADS": str(first.threads_per_rank),
            "OMP_WAIT_POLICY": "PASSIVE",
            "PYTHONPATH": os.pathsep.join([str(_ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=os.environ | variables, stdout=pipe, stderr=pipe, text=True) as process:
            try:
                _, said = process.communicate()
            except BaseException:
                process.terminate()  # torchrun ends its ranks then; killed, it would leave them
                raise
        if process.returncode:
            tail = "\n".join(said.splitlines()[-_TAIL_LINES:])
            raise MeasuringFailed(f"measuring {', '.join(s['label'] for s in setups)} failed:\n{tail}")
        return json.loads(found.read_text())["setups"]
