"""How an experiment's tables are to be read, and what is doubtful about them, in sentences."""

from collections.abc import Sequence

from recsys.report.numbers import format_seconds
from recsys.studies.experiment_cells import name_group
from recsys.studies.experiment_figures import GroupFigures
from recsys.studies.experiment_records import Results


def describe(results: Results, groups: Sequence[GroupFigures]) -> list[str]:
    facts, experiment = results.facts, results.experiment
    rule = "given" if facts.get("target") else "the lowest of the best test AUCs of the full tables' seeds"
    best = [f"{auc:.4f}" + (f" ({name} rows)" if name else "") for name, auc in facts["best_possible_auc"].items()]
    tuned = [group for group in groups if group.trials]
    trials = sum(len(group.trials) for group in tuned)
    is_alone = any(group.step_ms_alone for group in groups)
    steps = "all setups taking turns, nothing beside them" if is_alone else "medians of the runs themselves"
    rates = ", ".join(f"{rate:g}" for rate in facts["rates"])
    return [
        f"Small print, paper: {experiment.reference}. Every other figure was measured here.",
        facts["shows"],
        f"Target: {rule}, on the test rows." + (f" Best possible there: {', '.join(best)}." if best else ""),
        f"n: seeds that finished. Learning rate of the embeddings: the best of {rates}, and of the next beyond where "
        "the best was an end of these, by validation log loss for each method and compression at seed "
        f"{experiment.seeds[0]}; {trials} runs and {format_seconds(sum(g.tuning_seconds for g in tuned))} of training "
        "and evaluation in all, one of each grid among the results.",
        "AUC: of the evaluation of lowest validation log loss, mean ± sd over seeds. AUC − full: with its 95 % "
        "interval, by DeLong on the same test rows and the spread over seeds.",
        f"Verdict: same = the interval is within ± {experiment.epsilon:g}; better, worse = all of it is beyond; "
        "undecided = neither.",
        f"Steps: {steps}. Training times: of runs made {facts['jobs']}, without evaluation.",
        "Equal time: every group has the training time of the group that was done first.",
    ]


def find_caveats(groups: Sequence[GroupFigures]) -> list[str]:
    caveats = []
    if few := [name_group(g) for g in groups if 0 < len(g.runs) < min(3, g.asked)]:
        caveats.append(f"Fewer than 3 seeds finished: {', '.join(few)}.")
    elif any(g.asked < 3 for g in groups):
        caveats.append(f"{groups[0].asked} seeds: fewer than 3 say little of how results vary.")
    if edge := [name_group(g) for g in groups if g.is_at_edge]:
        caveats.append(f"The best learning rate is the lowest or highest that was tried: {', '.join(edge)}.")
    if chosen_on_test := [g for g in groups if any(r.row["selected_on"] == "test" for r in g.runs)]:
        caveats.append(f"No validation rows: best evaluations were chosen on test rows ({len(chosen_on_test)} groups).")
    return caveats
