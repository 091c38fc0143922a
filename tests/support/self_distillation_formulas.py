"""The published formula of every self-distillation preset without a reward, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from support.preset_formulas import LOG_U, among, importance, jsd, kl, per_response, top, with_rest
from support.preset_problem import (
    FIRST,
    LENGTHS,
    LOG_MU,
    LOG_OLD,
    LOG_P,
    MARKED,
    SECOND,
    THIRD,
    Loss,
    T,
    at_sampled,
)


def after(skipped: int) -> Tensor:
    """bool [T]: all but the first tokens of every response."""
    return torch.cat([torch.arange(int(length)) >= skipped for length in LENGTHS])


def opsd(log_p: Tensor) -> Tensor:
    return jsd(with_rest(log_p, top(FIRST)), with_rest(FIRST, top(FIRST))).mean()


def opsd_top(log_p: Tensor) -> Tensor:
    return jsd(among(log_p, top(FIRST)), among(FIRST, top(FIRST))).mean()


def opsd_sampled(log_p: Tensor) -> Tensor:
    return -(LOG_U * at_sampled(log_p)).mean()


def opsd_clip(log_p: Tensor) -> Tensor:
    p, q = (with_rest(x, top(FIRST)) for x in (log_p, FIRST))
    return (q * (q / p).log()).clamp(max=0.05).sum(-1).mean()


def rgsd(log_p: Tensor) -> Tensor:
    p, q = (with_rest(x, top(FIRST)) for x in (log_p, FIRST))
    m = (p + q) / 2
    shares = (p * (p / m).log() + q * (q / m).log()) / 2
    return per_response(shares.clamp(max=0.05).sum(-1))


def sdft_paper(log_p: Tensor) -> Tensor:
    return kl(with_rest(log_p, top(LOG_P)), with_rest(FIRST, top(LOG_P)))[after(3)].mean()


def sdft_tinker(log_p: Tensor) -> Tensor:
    """Cross-entropy with the renormalised top of the teacher, less the teacher's own entropy."""
    q = among(FIRST, top(FIRST))
    return (q * (q.log() - log_p.gather(1, top(FIRST)))).sum(-1)[after(3)].mean()


def sdft_trl(log_p: Tensor) -> Tensor:
    weight = (at_sampled(LOG_P) - LOG_MU).exp().clamp(max=2.0)
    return (weight * jsd(among(log_p, top(LOG_P)), among(FIRST, top(LOG_P)))).mean()


def sdpo(log_p: Tensor) -> Tensor:
    moved = (at_sampled(LOG_P) - LOG_OLD).exp().clamp(max=2.0)
    rolled = (LOG_OLD - LOG_MU).exp().clamp(max=2.0)
    value = jsd(with_rest(log_p, top(LOG_P)), with_rest(FIRST, top(LOG_P)))
    return (moved * rolled * value)[MARKED].sum() / T


def opcd(log_p: Tensor) -> Tensor:
    s, t = (x.gather(1, top(LOG_P)) for x in (log_p, FIRST))
    return (s.exp() * (s - t)).sum(-1).mean()


def credit(log_p: Tensor) -> Tensor:
    advantage = at_sampled(FIRST) - 0.1 * at_sampled(SECOND) - LOG_MU
    return importance(torch.where(MARKED, advantage, 0), cap=2.0)(log_p)


def towards(log_target: Tensor) -> Loss:
    """KL(p‖target), both over the student's most probable ids."""
    return lambda log_p: kl(among(log_p, top(LOG_P)), among(log_target, top(LOG_P))).mean()


def msd(log_p: Tensor) -> Tensor:
    q = among(FIRST, top(LOG_P))
    weight = -(q * q.log()).sum(-1) * (1 - at_sampled(LOG_P).exp())
    return (weight * kl(with_rest(log_p, top(LOG_P)), with_rest(FIRST, top(LOG_P)))).mean()


def vpd(log_p: Tensor) -> Tensor:
    return kl(with_rest(log_p, top(LOG_P)), with_rest(FIRST, top(LOG_P)))[MARKED].sum() / T


FORMULAS: dict[str, Loss] = {
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
    "purified-opsd": towards(FIRST + SECOND - THIRD),
    "ar-opd": towards(FIRST + (SECOND - FIRST).clamp(-1, 1)),
    "msd": msd,
    "vpd": vpd,
}
