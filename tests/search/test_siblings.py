"""What a search learns from studies of earlier jobs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import optuna
import pytest
from optuna.storages import BaseStorage

from ranksearch.search.errors import InvalidInput
from ranksearch.search.sampler import RankSampler
from ranksearch.search.siblings import read_earlier
from ranksearch.search.space import RankSpace
from ranksearch.search.spec import Search
from ranksearch.search.study import RankStudy
from ranksearch.search.trials import study_name, trials_of

from .cases import llama_space, power_spectra
from .synthetic import DENSE, Problem, problem


def open_study(
    storage: BaseStorage,
    made: Problem,
    job_id: str,
    kept: float,
    *,
    space: RankSpace | None = None,
    preset: str = "ranksearch",
    learn_from: Sequence[str] = (),
    **search: object,
) -> RankStudy:
    spec = Search(**{"trials": 40, "pruner": "none", **search})  # type: ignore[arg-type]
    return RankStudy(
        storage=storage,
        job_id=job_id,
        kept=kept,
        space=space or made.space,
        spectra=made.spectra,
        spec=spec,
        dense_score=DENSE if spec.objective == "perplexity" else 0.0,
        preset=preset,
        learn_from=learn_from,
    )


def measure(storage: BaseStorage, made: Problem, kept: float, trials: int = 40, **earlier: object) -> None:
    """The earlier job: as many random tilts as trials."""
    run(open_study(storage, made, "early", kept, trials=trials, **{"sampler": "random", **earlier}), made)  # type: ignore[arg-type]


def run(study: RankStudy, made: Problem) -> list[float]:
    """The true score of every trial."""
    found = []
    while (proposal := study.ask()) is not None:
        score = made.score(proposal.ranks)
        kl = 0.6 * float(np.log(score / DENSE)) ** 1.1
        scores = {"perplexity": score, "kl": kl}
        study.tell(proposal.number, score=scores[study.spec.objective], scores=scores, seconds=0, worker="w")
        found.append(score)
    return found


def excesses(study: RankStudy, storage: BaseStorage, name: str, trials: int) -> dict[int, float]:
    """Trial number -> excess of an earlier study as the sampler of this one reads it."""
    sampler = study.proposer.rank_sampler()
    assert isinstance(sampler, RankSampler)
    assert [len(s.trials) for s in sampler._siblings] == [trials]
    return {t.number: t.excess for t in sampler._told(study._trials()) if t.group == 1}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_search_that_learned_is_at_trial_3_better_than_a_cold_one_at_10(seed: int) -> None:
    made, storage = problem(seed), optuna.storages.InMemoryStorage()
    measure(storage, made, 0.6, seed=seed)
    cold = run(open_study(storage, made, "cold", 0.4, trials=10, seed=seed), made)
    warm = run(open_study(storage, made, "warm", 0.4, trials=3, seed=seed, learn_from=["early/0.6"]), made)
    print("gain cold at 10 and warm at 3:", made.gain(min(cold), 0.4), made.gain(min(warm), 0.4))
    assert warm[:2] == cold[:2]
    assert min(warm) < min(cold)


@pytest.mark.parametrize(
    "earlier",
    [
        {"form": "pivoted"},
        {"rank_multiple": 4, "keep_dense": ("*.v_proj",)},
        {"objective": "kl"},
        {"preset": "dp-knapsack"},
        {"preset": "asvd"},
    ],
    ids=["form", "multiple", "objective", "probes-from-uniform", "probes-from-dense"],
)
def test_trials_of_another_kind_of_job_teach_as_well(earlier: dict[str, object]) -> None:
    made, storage = problem(0, blocks=4), optuna.storages.InMemoryStorage()
    space = {key: earlier.pop(key) for key in ("form", "rank_multiple", "keep_dense") if key in earlier}
    other = RankSpace(targets=made.space.targets, **space)  # type: ignore[arg-type]
    measure(storage, made, 0.6, space=other, **earlier)
    cold = run(open_study(storage, made, "cold", 0.4, trials=6), made)
    warm = run(open_study(storage, made, "warm", 0.4, trials=3, learn_from=["early/0.6"]), made)
    print("gain cold at 6 and warm at 3:", made.gain(min(cold), 0.4), made.gain(min(warm), 0.4))
    assert min(warm) < min(cold)


def test_a_trial_is_read_with_the_space_objective_and_dense_score_of_its_own_study() -> None:
    made, storage = problem(0, blocks=2), optuna.storages.InMemoryStorage()
    pivoted = RankSpace(targets=made.space.targets, form="pivoted")
    measure(storage, made, 0.8, trials=4, space=pivoted, objective="kl")
    rows = trials_of(storage, "early", 0.8)
    assert any(not made.space.is_allowed(pivoted.unpack(row["ranks"])) for row in rows)
    study = open_study(storage, made, "late", 0.4, learn_from=["early/0.8"])
    assert excesses(study, storage, "early/0.8", 4) == {row["number"]: row["score"] for row in rows}
    (sibling,) = read_earlier(storage, {"early/0.8": 4})
    assert sibling.space == pivoted
    assert (sibling.objective, sibling.dense_score) == ("kl", 0.0)


def test_what_an_earlier_study_gets_later_changes_nothing() -> None:
    made = problem(2, blocks=2)

    def proposals(grows: bool) -> list[str]:
        storage = optuna.storages.InMemoryStorage()
        measure(storage, made, 0.6, trials=8)
        pending = open_study(storage, made, "early", 0.6, trials=30, sampler="random")
        proposal = pending.ask()  # begun, but not finished, when the search begins
        assert proposal is not None
        while (late := open_study(storage, made, "late", 0.4, trials=6, learn_from=["early/0.6"])).finished < 6:
            following = late.ask()
            assert following is not None
            if grows and following.number == 2:
                pending.tell(proposal.number, score=12.0, scores={}, seconds=0, worker="w")
                run(pending, made)
            late.tell(following.number, score=made.score(following.ranks), scores={}, seconds=0, worker="w")
        assert len(pending.history()) == (30 if grows else 9)
        return [row["ranks"] for row in late.history()]

    assert proposals(grows=True) == proposals(grows=False)


def test_a_search_goes_on_without_a_study_that_is_gone() -> None:
    made, storage = problem(2, blocks=2), optuna.storages.InMemoryStorage()
    measure(storage, made, 0.6, trials=6)
    names = ["never/0.6", "early/0.6"]
    first = open_study(storage, made, "late", 0.4, trials=3, learn_from=names)
    assert len(first.proposer.earlier) == 1
    optuna.delete_study(study_name="early/0.6", storage=storage)
    again = open_study(storage, made, "late", 0.4, trials=3, learn_from=names)
    assert again.proposer.earlier == []
    assert len(run(again, made)) == 3


def test_a_study_of_other_targets_is_refused_and_no_study_is_made() -> None:
    made, storage = problem(0, blocks=2), optuna.storages.InMemoryStorage()
    space = llama_space(blocks=3)
    other = RankStudy(
        storage=storage,
        job_id="job_other",
        kept=0.6,
        space=space,
        spectra=power_spectra(space),
        spec=Search(),
        dense_score=DENSE,
    )
    with pytest.raises(
        InvalidInput, match=r"search\.learn_from: study job_other/0\.6 has other targets.*job_other out"
    ):
        open_study(storage, made, "late", 0.4, learn_from=["job_other/0.6"])
    names = [study.study_name for study in optuna.get_all_study_summaries(storage)]
    assert names == [study_name("job_other", other.kept)]
