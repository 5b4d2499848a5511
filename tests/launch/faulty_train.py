"""`launch.train` with a fault: FAULT = "<rank>:<step>:<raise|kill|nan>" strikes when that rank begins that step."""

import os
import signal

import launch.train
from recsys.trainer import Trainer

_train_step = Trainer.train_step


def train_step(self, batch):
    rank, step, kind = os.environ["FAULT"].split(":")
    if self.ranks.rank == int(rank) and self.progress.step == int(step):
        if kind == "raise":
            raise ZeroDivisionError("the planted fault")
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        batch.dense_features.fill_(float("nan"))
    return _train_step(self, batch)


if __name__ == "__main__":
    Trainer.train_step = train_step
    launch.train.main()
