"""What the numbers say, in words that are chosen by the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from mmc_fast.diagnose.document import signed
from mmc_fast.diagnose.statistics import mean_sd
from mmc_fast.diagnose.verdict import KINDS, ModalityVerdict

from .comparison import AVERAGE, COMPLETE, Comparison, Difference
from .runs import RunSet, display_name

__all__ = [
    "collapse_sentence",
    "collapse_summary",
    "collapse_words",
    "comparison_words",
    "game_words",
    "reliance_verdicts",
]

INVARIANT_MAX = 0.1
"""Share of the way from chance to certainty up to which a fresh discriminator counts as beaten."""


def reliance_verdicts(runs: RunSet, method: str) -> list[ModalityVerdict]:
    """One verdict per modality over the runs of a method: the kind of most runs, else "undecided", and mean evidence.

    ``evidence["runs"]`` counts the runs and ``evidence["same"]`` those of that kind; each run's own verdict is what the diagnosis
    of it says.
    """
    entries = [run["scores"].get("reliance") or {} for run in runs.methods[method]]
    verdicts = []
    for modality in entries[0]:
        own = [entry[modality] for entry in entries]
        kinds = [entry["verdict"] for entry in own]
        kind = max(KINDS, key=kinds.count)
        same = kinds.count(kind)
        names = set.intersection(*({k for k, v in e["evidence"].items() if v is not None} for e in own))
        evidence = {k: mean_sd([e["evidence"][k] for e in own])[0] for k in sorted(names)}
        evidence |= {"runs": len(own), "same": same}
        verdicts.append(ModalityVerdict(modality, kind if 2 * same > len(own) else "undecided", evidence))
    return verdicts


def collapse_summary(runs: RunSet, method: str) -> str:
    """One sentence: which modalities collapsed in the method's model."""
    verdicts = reliance_verdicts(runs, method)
    model = display_name(method)
    if not verdicts or all(v.kind == "undecided" for v in verdicts):
        return f"On {runs.dataset} collapse cannot be judged in the {model} model."
    lost = [v for v in verdicts if v.kind in ("collapsed", "misleading")]
    if not lost:
        under = [f"**{v.modality}**" for v in verdicts if v.kind == "under-used"]
        found = f" Under-used: {_join(under)}." if under else ""
        return f"On {runs.dataset} no modality collapsed in the {model} model.{found}"
    worst = max(lost, key=lambda v: v.evidence["ability"])
    return f"On {runs.dataset}, {model} model: {collapse_sentence(worst)}" + (
        f" The same holds for {_join([f'**{v.modality}**' for v in lost if v is not worst])}." if len(lost) > 1 else ""
    )


def collapse_words(runs: RunSet, method: str, masked: str | None = None) -> list[str]:
    """One sentence per modality that is not relied on. ``masked``: a method that met missing modalities in training."""
    other = {v.modality: v for v in reliance_verdicts(runs, masked)} if masked is not None else {}
    found = []
    for verdict in reliance_verdicts(runs, method):
        if verdict.kind == "relied on":
            continue
        text = collapse_sentence(verdict)
        if verdict.kind in ("collapsed", "under-used") and verdict.modality in other:
            text += f" Trained with modality dropout it is {other[verdict.modality].kind}."
        found.append(text)
    return found


def collapse_sentence(verdict: ModalityVerdict) -> str:
    """The sentence of the verdict, with its runs where there are several."""
    runs, same = int(verdict.evidence.get("runs", 1)), int(verdict.evidence.get("same", 1))
    return verdict.sentence() + (f" ({same} of {runs} runs.)" if runs > 1 else "")


def comparison_words(comparison: Comparison, method: str) -> list[str]:
    """Sentences on what ``method`` gains or loses against every other method, on complete and on missing data."""
    result = []
    for condition, phrase in ((AVERAGE, "on average over the missing rates"), (COMPLETE, "on complete data")):
        if condition not in comparison.conditions:
            continue
        score = comparison.scores[method][condition]
        against = [comparison.difference(method, m, condition) for m in comparison.scores if m != method]
        parts = [
            _against(group, verdict)
            for verdict in ("better", "worse", "undecided")
            if (group := [d for d in against if d.verdict == verdict])
        ]
        result.append(
            f"On {comparison.dataset}, {phrase}, {display_name(method)} scores {score.mean:.3f}: {'; '.join(parts)}."
        )
    return result


def game_words(runs: RunSet, method: str) -> str:
    """Whether the adversarial game reached invariance, from a fresh discriminator, and what λ changed."""
    games = [run["game"] for run in runs.methods[method] if run.get("game")]
    if not games:
        return f"On {runs.dataset}, {display_name(method)} plays no game."
    accuracy, sd = mean_sd([g["fresh_discriminator"]["balanced_accuracy"] for g in games])
    chance = games[0]["fresh_discriminator"]["chance"]
    share = (accuracy - chance) / (1 - chance) if chance < 1 else 0.0
    spread = "" if sd is None else f" ± {sd:.3f}"
    if share <= INVARIANT_MAX:
        verdict = "the latents are close to modality-invariant"
    elif share >= 0.5:
        verdict = (
            "the latents still tell their modality, so a gain or loss of this run cannot be credited to invariance"
        )
    else:
        verdict = "the latents are partly modality-invariant"
    text = (
        f"On {runs.dataset} a discriminator trained afresh on the frozen latents of {display_name(method)} names the "
        f"modality with balanced accuracy {accuracy:.3f}{spread} (chance {chance:.3f}): {verdict}."
    )
    distances = [g["distance_to_lambda0"] for g in games if g.get("distance_to_lambda0") is not None]
    if distances:
        text += (
            f" With λ = {games[0]['lambda']:g} the weights end at a relative distance of {mean_sd(distances)[0]:.3f} "
            "from the same run with λ = 0."
        )
    inactive = sum(run["label"] == "inactive" for run in runs.methods[method])
    if inactive:
        text += f" In {inactive} of {len(runs.methods[method])} runs λ changed nothing; they are labelled inactive."
    return text


def _against(group: Sequence[Difference], verdict: str) -> str:
    listed = _join(
        [
            f"{display_name(d.second)} ({signed(d.estimate)}, interval {signed(d.low)} to {signed(d.high)})"
            for d in group
        ]
    )
    return {
        "better": f"better than {listed}",
        "worse": f"worse than {listed}",
        "undecided": f"no difference that the data can show from {listed}",
    }[verdict]


def _join(items: Sequence[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"
