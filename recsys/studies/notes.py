"""How the tables of a study are to be read, and what is doubtful about them, in sentences."""

import textwrap
from collections.abc import Sequence

from recsys.report.numbers import format_count, format_seconds, plural
from recsys.studies.arms import StudyArm
from recsys.studies.records import StudyResults

UNFAIR = "Not a fair comparison: the runs differ in what they should share"
_LONGEST = 300


def name_arm(arm: StudyArm) -> str:
    """Return the name of an arm in sentences and tables: 'fresh dlrm robe 1,000×'."""
    parts = [arm.setting, arm.architecture, arm.method, "" if arm.is_baseline else f"{arm.compression:,g}×"]
    return " ".join(part for part in parts if part)


def describe(results: StudyResults, arms: Sequence[StudyArm]) -> list[str]:
    """Return what was run, how it was tuned, and what the words of the tables mean."""
    facts, study = results.facts, results.study
    rule = "given" if facts.get("target") else "the lowest of the best test AUCs of the full tables' seeds"
    best = [f"{auc:.4f}" + (f" ({name} rows)" if name else "") for name, auc in facts["best_possible_auc"].items()]
    tuned = [arm for arm in arms if len(arm.trials)]
    trials = sum(len(arm.trials) for arm in tuned)
    is_interleaved = any(arm.is_interleaved for arm in arms)
    steps = "all arms interleaved, nothing beside them" if is_interleaved else "medians of the runs themselves"
    rates = ", ".join(f"{rate:g}" for rate in facts["rates"])
    return [
        *([f"Small print, paper: {study.reference}. Every other figure was measured here."] if study.reference else []),
        *([_describe_subject(results, arms)] if study.layout == "grid" else []),
        facts["shows"],
        f"Target: {rule}, on the test rows." + (f" Best possible there: {', '.join(best)}." if best else ""),
        f"n: seeds that finished. Learning rate of the embeddings: the best of {rates}, and of the next beyond where "
        "the best was an end of these, by validation log loss for each method and compression at seed "
        f"{study.seeds[0]}; {trials} runs and {format_seconds(sum(arm.tuning_seconds for arm in tuned))} of training "
        "and evaluation in all, one of each grid among the results.",
        "AUC: of the evaluation of lowest validation log loss, mean ± sd over seeds. AUC − full: with its 95 % "
        "interval, by DeLong on the same test rows and the spread over seeds.",
        f"Verdict: same = the interval is within ± {study.epsilon:g}; better, worse = all of it is beyond; "
        "undecided = neither.",
        f"Steps: {steps}. Training times: of runs made {facts['jobs']}, without evaluation.",
        "Equal time: every arm has the training time of the arm that was done first.",
    ]


def _describe_subject(results: StudyResults, arms: Sequence[StudyArm]) -> str:
    """Return what was run on what."""
    measured = [arm for arm in arms if len(arm.runs)]
    if not measured:
        return "Nothing was measured."
    fact = measured[0].runs.fact
    return (
        f"{len({arm.method for arm in arms})} methods, {format_count(fact('parameters.embedding_full'))} parameters in "
        f"full tables, on {fact('dataset')} data: {format_count(fact('train_rows'))} training and "
        f"{format_count(fact('test_rows'))} test rows; {plural(len(results.study.seeds), 'seed')}."
    )


def find_caveats(results: StudyResults, arms: Sequence[StudyArm]) -> list[str]:
    """Return what a reader must know of how the figures came about."""
    caveats = [_shorten(f"{UNFAIR}: {difference}.") for difference in results.facts.get("differences", [])]
    if few := [name_arm(arm) for arm in arms if 0 < len(arm.runs) < min(3, arm.num_seeds)]:
        caveats.append(f"Fewer than 3 seeds finished: {', '.join(few)}.")
    elif any(arm.num_seeds < 3 for arm in arms):
        caveats.append(f"{arms[0].num_seeds} seeds: fewer than 3 say little of how results vary.")
    if edge := [name_arm(arm) for arm in arms if arm.is_at_edge]:
        caveats.append(f"The best learning rate is the lowest or highest that was tried: {', '.join(edge)}.")
    if chosen_on_test := [arm for arm in arms if "test" in arm.runs.values("selected_on")]:
        caveats.append(f"No validation rows: best evaluations were chosen on test rows ({len(chosen_on_test)} arms).")
    if results.study.layout == "grid":
        cut = [name_arm(arm) for arm in arms if any(why != "patience" for why in arm.runs.values("stop_reason"))]
        if cut:
            caveats.append(f"Not stopped by patience, so quality may still have risen: {', '.join(cut)}.")
    return [*caveats, *(_shorten(caveat) for caveat in results.facts.get("caveats", []))]


def _shorten(text: str) -> str:
    return textwrap.shorten(text, _LONGEST, placeholder=" …")
