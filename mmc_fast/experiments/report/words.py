"""What the numbers say, in words that are chosen by the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from mmc_fast.diagnose.document import signed
from mmc_fast.diagnose.statistics import mean_sd

from .comparison import AVERAGE, COMPLETE, Comparison, Difference
from .reliance import Verdict, judge, sentence
from .runs import RunSet, display_name

__all__ = ["collapse_summary", "collapse_words", "comparison_words", "game_words", "reliance_verdicts"]

INVARIANT_MAX = 0.1
"""Share of the way from chance to certainty up to which a fresh discriminator counts as beaten."""


def reliance_verdicts(runs: RunSet, method: str, chance: float) -> list[Verdict]:
    """The verdict on every modality that has a unimodal model."""
    scored = {m: s for m, s in runs.reliance(method).items() if "alone" in s}
    return judge(scored, runs.complete(method), chance)


def collapse_summary(runs: RunSet, method: str, chance: float) -> str:
    """One sentence: which modalities collapsed in the method's model."""
    verdicts = reliance_verdicts(runs, method, chance)
    model = display_name(method)
    if not verdicts:
        return f"On {runs.dataset} the {model} model is not above chance; collapse cannot be judged."
    collapsed = [v for v in verdicts if v.kind == "collapsed"]
    if not collapsed:
        return f"On {runs.dataset} no modality collapsed in the {model} model."
    worst = max(collapsed, key=lambda v: v.signal * (1 - v.kept))
    others = len(collapsed) - 1
    text = (
        f"On {runs.dataset} **{worst.modality}** collapsed in the {model} model: {worst.alone:.3f} alone, but the "
        f"fused model scores {worst.without:.3f} without it against {worst.all:.3f} with it, and {worst.only:.3f} when "
        f"it is all there is (chance {worst.chance:.3f})."
    )
    if others:
        names = _join([f"**{v.modality}**" for v in collapsed if v is not worst])
        text += f" The same holds for {names}."
    return text


def collapse_words(runs: RunSet, method: str, chance: float, masked: str | None = None) -> list[str]:
    """One sentence per collapsed modality. ``masked``: a method that met missing modalities in training."""
    rescued = runs.reliance(masked) if masked is not None else {}
    return [
        sentence(v, display_name(method), rescued.get(v.modality, {}).get("only"))
        for v in reliance_verdicts(runs, method, chance)
        if v.kind == "collapsed"
    ]


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
    games = [run["adversarial"] for run in runs.methods[method] if run.get("adversarial")]
    if not games:
        return f"On {runs.dataset}, {display_name(method)} plays no game."
    accuracy, sd = mean_sd([g["modality_probe"]["balanced_accuracy"] for g in games])
    chance = games[0]["modality_probe"]["chance"]
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
    inactive = sum(run["label"] == "without-effect" for run in runs.methods[method])
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
