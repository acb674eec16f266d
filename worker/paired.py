"""Two models on the same sequences: the mean difference of their losses and how sure it is.

With x_s and y_s the mean negative log-likelihoods per token of sequence s and d_s = x_s - y_s, the interval is that of
the paired t-test [Student1908],

    mean(d) +- t * sd(d) / sqrt(S),        t the 0.975 quantile of Student's distribution with S - 1 degrees of freedom.

How hard a sequence is cancels in d_s, so the interval is far narrower than that of either loss. Sequences are of one
length: mean(d) is the logarithm of the ratio of the perplexities. The interval speaks of other text of the same kind,
sequences taken as independent, and not of another calibration or seed.

[Student1908] The probable error of a mean. Biometrika 6.
[Abramowitz1964] Abramowitz and Stegun, Handbook of mathematical functions, 26.7.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from functools import cache

COVERAGE = 0.95


def difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean of `ours - theirs` and its 95% interval.

    Args:
        ours: Mean negative log-likelihood per token of each sequence, nats.
        theirs: The same of another model on the same sequences.

    Returns:
        The mean, nats per token, and the ends of the interval; None in their place for fewer than two sequences.
    """
    each = [x - y for x, y in zip(ours, theirs, strict=True)]
    mean = math.fsum(each) / len(each)
    if len(each) < 2:
        return mean, None
    half = t_quantile(len(each) - 1) * statistics.stdev(each, mean) / math.sqrt(len(each))
    return mean, [mean - half, mean + half]


@cache
def t_quantile(degrees: int) -> float:
    """t with P(|T| <= t) = 0.95 for T of Student's distribution with this many degrees of freedom, at least one.

    With t = sqrt(n) tan a, P is a finite sum for n degrees [Abramowitz1964]_:

        n even:  sin a (1 + 1/2 cos^2 a + 1*3/(2*4) cos^4 a + ... to cos^(n-2) a)
        n odd:   2/pi (a + sin a cos a (1 + 2/3 cos^2 a + 2*4/(3*5) cos^4 a + ... to cos^(n-3) a))
    """
    odd = degrees % 2

    def probability(a: float) -> float:
        sine, cosine = math.sin(a), math.cos(a)
        total, term = 0.0, 1.0
        for k in range(degrees // 2):
            total += term
            term *= (2 * k + 1 + odd) / (2 * k + 2 + odd) * cosine * cosine
        return 2 / math.pi * (a + sine * cosine * total) if odd else sine * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the interval down to rounding
        middle = (low + high) / 2
        low, high = (middle, high) if probability(middle) < COVERAGE else (low, middle)
    return math.sqrt(degrees) * math.tan(low)
