"""`launch.train` with a fault: FAULT = "<rank>:<step>:<raise|kill|nan>" strikes when that rank begins that step."""

import os
import signal

import launch.train
from recsys.train.assemble import TrainStep

_train_step = TrainStep.__call__


def train_step(self, batch, step):
    faulty_rank, faulty_step, kind = os.environ["FAULT"].split(":")
    if os.environ["RANK"] == faulty_rank and step == int(faulty_step) + 1:
        if kind == "raise":
            raise ZeroDivisionError("the planted fault")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        batch.dense_features.fill_(float("nan"))
    return _train_step(self, batch, step)


if __name__ == "__main__":
    TrainStep.__call__ = train_step
    launch.train.main()
