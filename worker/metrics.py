"""The metrics in which a target W can be factored, and what a calibration must know of the text for each.

All but the last are the best rank-r matrix in a norm |G^(1/2) (W - W_r) C^(1/2)|_F, with x the target's input, y = W x
and L the summed negative log-likelihood:

    weight       C = G = I: the plain singular value decomposition
    feature      C = E[x x'], G = I                                               [SVDLLM2024]_
    two_sided    C = E[x x'], G = E[g g'] with g = dL/dy                          [IOSVD2026]_
    centred      C = E[(x - E x)(x - E x)'] within pools of sequences, G = I, and a bias b + (W - W_r) E x, so that the
                 mean output is exact at any rank                                 [AFM2023]_, [Bolaco2024]_
    activation   C = diag(E|x_j|), G = I                                          [ASVD2023]_
    fisher       C = diag(sum_o E[(dL/dW_oj)^2]), over sequences, G = I           [FWSVD2022]_
    attribution  the plain decomposition, component i ranked by |sigma_i u_i' D v_i| instead of sigma_i, where D is the
                 gradient of the mean loss with respect to W: the first-order change of the loss without it
                                                                                  [GRASP2025]_

.. [SVDLLM2024] SVD-LLM, https://arxiv.org/abs/2403.07378
.. [IOSVD2026] IO-SVD, https://arxiv.org/abs/2605.15626
.. [AFM2023] Yu, Wu, Compressing Transformers: Features Are Low-Rank, but Weights Are Not!, AAAI 2023
.. [Bolaco2024] Ji et al., Adaptive Feature-based Low-Rank Compression of Large Language Models via Bayesian
   Optimization, Findings of EMNLP 2024, https://arxiv.org/abs/2405.10616
.. [ASVD2023] Yuan et al., ASVD, https://arxiv.org/abs/2312.05821, with its exponent alpha at 1/2
.. [FWSVD2022] Hsu et al., Language model compression with weighted low-rank factorization, ICLR 2022,
   https://arxiv.org/abs/2207.00112
.. [GRASP2025] GRASP, https://arxiv.org/abs/2501.00339
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from ranksearch.search.targets import Metric

Only = Literal["absolute", "fisher", "weight_gradient"]
"""What may be collected in place of covariances."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a calibration collects; the fields are arguments of `calibrate`.

    Attributes:
        gradients: Second moments of output gradients, too.
        pool: Sequences per pool, if second moments of inputs are centred.
        only: What is collected in place of second moments.
    """

    gradients: bool = False
    pool: int | None = None
    only: Only | None = None

    @property
    def backward(self) -> bool:
        """Whether the loss is differentiated."""
        return self.gradients or self.only in ("fisher", "weight_gradient")


#: Metric -> what it needs; `weight` needs no calibration. 32 sequences make a pool, as published.
NEEDS: Final[dict[Metric, Needs]] = {
    "feature": Needs(),
    "two_sided": Needs(gradients=True),
    "centred": Needs(pool=32),
    "activation": Needs(only="absolute"),
    "fisher": Needs(only="fisher"),
    "attribution": Needs(only="weight_gradient"),
}
