from __future__ import annotations

import pytest
import torch

from ranksearch.search.errors import NumericalError, RanksearchError
from ranksearch.worker.bank import build_bank
from ranksearch.worker.evaluate import Evaluation
from ranksearch.worker.prefix import PrefixModel
from ranksearch.worker.scorer import Scorer
from ranksearch.worker.targets import find_targets


@pytest.fixture
def scorer(tiny, blocks):
    model = tiny()
    targets = find_targets(model)
    evaluation = Evaluation(model, blocks[:4], batch_tokens=blocks.shape[1])
    scorer = Scorer(PrefixModel(model, build_bank(model, targets, None, metric="weight"), targets), evaluation)
    yield scorer
    scorer.close()


def ranks_of(scorer, rank):
    return {target.name: rank for target in scorer.prefix.targets}


def test_parts_come_to_the_score_of_the_whole(scorer):
    answers = [scorer.score_part(7, ranks_of(scorer, 3), index) for index in range(5)]
    assert [last for _, last in answers] == [False] * 4 + [True]
    assert answers[-1][0] == scorer.evaluation.score(scorer.prefix.model)
    assert [loss for part, _ in answers[:-1] for loss in part.nll] == answers[-1][0].nll


def test_a_trial_goes_on_only_where_it_was_begun(scorer):
    scorer.score_part(1, ranks_of(scorer, 3), 0)
    for number, index in ((2, 1), (1, 2), (1, -1)):
        with pytest.raises(RanksearchError, match="was not begun"):
            scorer.score_part(number, ranks_of(scorer, 3), index)
    _, last = scorer.score_part(1, ranks_of(scorer, 3), 1)
    assert not last
    scorer.score_part(2, ranks_of(scorer, 4), 0)  # the first one was stopped
    with pytest.raises(RanksearchError, match="was not begun"):
        scorer.score_part(1, ranks_of(scorer, 3), 2)


def test_a_trial_whose_part_failed_is_over(scorer):
    scorer.score_part(1, ranks_of(scorer, 3), 0)
    norm = scorer.prefix.model.model.norm.weight
    kept = norm.detach().clone()
    with torch.no_grad():
        norm.fill_(float("nan"))
    with pytest.raises(NumericalError):
        scorer.score_part(1, ranks_of(scorer, 3), 1)
    with torch.no_grad():
        norm.copy_(kept)
    with pytest.raises(RanksearchError, match="was not begun"):
        scorer.score_part(1, ranks_of(scorer, 3), 1)
    assert not scorer.score_part(2, ranks_of(scorer, 3), 0)[1]
