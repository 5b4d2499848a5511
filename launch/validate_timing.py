"""Prove the measuring of communication and computing: experiments whose outcome is known, in a table.

Two ranks on this machine: parts and phases against the wall clock, a sleeping rank, bytes against the closed form,
DDP's own clock. Two ranks over emulated networks (Linux and root): known rate and delay, a step without its all-reduce,
the CPU time of the step's thread. Exit status 1 where a claim does not hold; beside other work some will not.
"""

import json
from dataclasses import asdict

import click

from launch import cli


@cli.command(
    "bench timing",
    __doc__,
    summary="Prove that communication and computing are measured rightly.",
    examples=["", "--json | jq '.[] | select(.holds | not)'"],
)
@cli.json_option("Print the proofs as JSON instead of the table.")
@click.option("--steps", type=click.IntRange(min=1), default=10, metavar="N", help="Steps of every profiled window.")
def main(as_json: bool, steps: int) -> int:
    """Prove what this machine can show of its clocks, and print the proofs."""
    from launch.netlab import validation
    from launch.netlab.network_ranks import RankFailed

    with cli.failures(RankFailed):
        proofs = validation.prove(steps)
    if as_json:
        print(json.dumps([{**asdict(proof), "holds": proof.holds} for proof in proofs], indent=2))
    else:
        validation.print_proofs(proofs)
    return 0 if all(proof.holds for proof in proofs) else cli.EXIT_FAILED


if __name__ == "__main__":
    main()
