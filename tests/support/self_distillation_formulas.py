"""The published formula of every self-distillation preset without a reward, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from support.preset_formulas import (
    among,
    evidence,
    jsd,
    kl,
    moved,
    per_response,
    reverse,
    with_rest,
)
from support.preset_problem import Formula, Problem


def after(x: Problem, skipped: int) -> Tensor:
    """bool [T]: all but the first tokens of every response."""
    return torch.cat([torch.arange(int(length)) >= skipped for length in x.lengths])


def opsd(x: Problem, log_p: Tensor) -> Tensor:
    ids = x.top(x.first)
    return jsd(with_rest(log_p, ids), with_rest(x.first, ids)).mean()


def opsd_top(x: Problem, log_p: Tensor) -> Tensor:
    ids = x.top(x.first)
    return jsd(among(log_p, ids), among(x.first, ids)).mean()


def opsd_sampled(x: Problem, log_p: Tensor) -> Tensor:
    return -(evidence(x) * x.of(log_p)).mean()


def opsd_clip(x: Problem, log_p: Tensor) -> Tensor:
    p, q = (with_rest(y, x.top(x.first)) for y in (log_p, x.first))
    return (q * (q / p).log()).clamp(max=0.05).sum(-1).mean()


def rgsd(x: Problem, log_p: Tensor) -> Tensor:
    p, q = (with_rest(y, x.top(x.first)) for y in (log_p, x.first))
    m = (p + q) / 2
    shares = (p * (p / m).log() + q * (q / m).log()) / 2
    return per_response(x, shares.clamp(max=0.05).sum(-1))


def sdft_paper(x: Problem, log_p: Tensor) -> Tensor:
    return reverse(x, log_p)[after(x, 3)].mean()


def sdft_tinker(x: Problem, log_p: Tensor) -> Tensor:
    """Cross-entropy with the renormalised top of the teacher, less the teacher's own entropy."""
    q = among(x.first, x.top(x.first))
    return (q * (q.log() - log_p.gather(1, x.top(x.first)))).sum(-1)[after(x, 3)].mean()


def sdft_trl(x: Problem, log_p: Tensor) -> Tensor:
    ids = x.top(x.student)
    return (moved(x, x.behaviour, 2.0) * jsd(among(log_p, ids), among(x.first, ids))).mean()


def sdpo(x: Problem, log_p: Tensor) -> Tensor:
    ids = x.top(x.student)
    weight = moved(x, x.old, 2.0) * (x.old - x.behaviour).exp().clamp(max=2.0)
    return (weight * jsd(with_rest(log_p, ids), with_rest(x.first, ids)))[x.marked].mean()


def opcd(x: Problem, log_p: Tensor) -> Tensor:
    s, t = (y.gather(1, x.top(x.student)) for y in (log_p, x.first))
    return (s.exp() * (s - t)).sum(-1).mean()


def credit(x: Problem, log_p: Tensor) -> Tensor:
    advantage = x.of(x.first) - 0.1 * x.of(x.second) - x.behaviour
    weight = moved(x, x.behaviour, 2.0)
    return -(weight * advantage * (1 + x.of(log_p) - x.of(x.student)))[x.marked].mean()


def towards(target: Callable[[Problem], Tensor]) -> Formula:
    """KL(p‖target), both over the student's most probable ids."""

    def loss(x: Problem, log_p: Tensor) -> Tensor:
        ids = x.top(x.student)
        return kl(among(log_p, ids), among(target(x), ids)).mean()

    return loss


def anchored(x: Problem) -> Tensor:
    return x.first + (x.second - x.first).clamp(-1, 1)


def distil(x: Problem, log_p: Tensor) -> Tensor:
    """Cross-entropy, less the view's own entropy; the next token's, all of it, is charged to this one."""
    q = among(x.first, x.top(x.first))
    crossed = -(q * log_p.gather(1, x.top(x.first))).sum(-1)
    value = crossed + (q * q.log()).sum(-1)
    trained = torch.where(x.marked, crossed.detach(), 0)
    last = after(x, 1).roll(-1)  # whether another token of the response follows
    following = torch.where(last, trained.roll(-1), 0)
    return (value + following * x.of(log_p))[x.marked].mean()


def consistency(x: Problem, log_p: Tensor) -> Tensor:
    """What the context teaches goes in; what is said under it stays what is said without."""
    assert x.under is not None
    return reverse(x, log_p).mean() + kl(x.student.exp(), x.under.exp()).mean()


def msd(x: Problem, log_p: Tensor) -> Tensor:
    q = among(x.first, x.top(x.student))
    weight = -(q * q.log()).sum(-1) * (1 - x.of(x.student).exp())
    return (weight * reverse(x, log_p)).mean()


FORMULAS: dict[str, Formula] = {
    "opsd": opsd,
    "opsd-top50": opsd_top,
    "opsd-sampled": opsd_sampled,
    "opsd-ema": opsd,
    "opsd-clip": opsd_clip,
    "rgsd": rgsd,
    "sdft-paper": sdft_paper,
    "sdft-tinker": sdft_tinker,
    "sdft-trl": sdft_trl,
    "sdpo": sdpo,
    "opcd": opcd,
    "credit": credit,
    "purified-opsd": towards(lambda x: x.first + x.second - x.views[2]),
    "ar-opd": towards(anchored),
    "msd": msd,
    "distil": distil,
    "consistency": consistency,
    "vpd": lambda x, log_p: reverse(x, log_p)[x.marked].mean(),
}
