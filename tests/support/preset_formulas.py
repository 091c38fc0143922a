"""The published formula of every preset with teachers or rewards, in plain torch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from support.preset_problem import CHUNK_TOKENS, CONTINUATIONS, SKIPPED, Formula, Problem


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p log(p/q), [T]."""
    return (p * (p / q).log()).sum(-1)


def jsd(p: Tensor, q: Tensor) -> Tensor:
    """Jensen–Shannon divergence, [T]."""
    return (kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2


def with_rest(log_x: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the ids, and of everything else together."""
    inside = log_x.gather(1, ids).exp()
    return torch.cat([inside, 1 - inside.sum(-1, keepdim=True)], dim=1)


def among(log_x: Tensor, ids: Tensor) -> Tensor:
    """Probabilities of the ids, normalised among themselves."""
    inside = log_x.gather(1, ids).exp()
    return inside / inside.sum(-1, keepdim=True)


def moved(x: Problem, since: Tensor, cap: float = math.inf) -> Tensor:
    """min(p/since, cap) of the sampled token, a fixed weight, [T]."""
    return (x.of(x.student) - since).exp().clamp(max=cap)


def evidence(x: Problem) -> Tensor:
    """log q(y) − log μ(y), [T]."""
    return x.of(x.first) - x.behaviour


def importance(advantage: Callable[[Problem], Tensor], cap: float = math.inf) -> Formula:
    """−min(p/μ, cap)·A: the weight is fixed, the sampled log-probability learns."""

    def loss(x: Problem, log_p: Tensor) -> Tensor:
        learns = 1 + x.of(log_p) - x.of(x.student)
        return -(moved(x, x.behaviour, cap) * advantage(x) * learns).mean()

    return loss


def clipped(
    x: Problem,
    advantage: Tensor,
    log_p: Tensor,
    since: Tensor,
    *,
    high: float = 0.2,
    dual: float = math.inf,
) -> Tensor:
    """PPO's surrogate with the dual clip, [T]."""
    ratio = (x.of(log_p) - since).exp()
    worst = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1 + high) * advantage)
    return torch.where(advantage < 0, torch.minimum(worst, -dual * advantage), worst)


def per_response(x: Problem, losses: Tensor) -> Tensor:
    """Every response alike: the mean of the responses' means."""
    return torch.stack([part.mean() for part in losses.split(x.lengths.tolist())]).mean()


def grpo(x: Problem, log_p: Tensor) -> Tensor:
    return per_response(x, clipped(x, x.advantage, log_p, x.behaviour))


def g_opd(target: Callable[[Problem], Tensor]) -> Formula:
    """A = target − log p_old, between p_old and p; from μ to p_old a weight of at most 5."""

    def loss(x: Problem, log_p: Tensor) -> Tensor:
        weight = (x.old - x.behaviour).exp().clamp(max=5.0)
        return (weight * clipped(x, x.of(target(x)) - x.old, log_p, x.old, dual=3.0)).mean()

    return loss


def gkd(x: Problem, log_p: Tensor) -> Tensor:
    ids = x.top(x.first)
    return jsd(with_rest(log_p, ids), with_rest(x.first, ids)).mean()


def rock_tokens(x: Problem, log_p: Tensor) -> Tensor:
    kept = ~torch.isin(x.sampled, torch.tensor(SKIPPED))
    learns = 1 + x.of(log_p) - x.of(x.student)
    return -(moved(x, x.behaviour) * evidence(x) * learns)[kept].mean()


def typhoon_s(x: Problem, log_p: Tensor) -> Tensor:
    ids = x.top(x.first)
    return kl(with_rest(x.first, ids), with_rest(log_p, ids)).mean()


def reverse(x: Problem, log_p: Tensor) -> Tensor:
    """KL(p‖q) on the student's most probable ids and the rest, [T]."""
    ids = x.top(x.student)
    return kl(with_rest(log_p, ids), with_rest(x.first, ids))


def stopped(x: Problem, log_p: Tensor) -> Tensor:
    """−Σ_S p (log q − sg log p), [T]."""
    s, t = (y.gather(1, x.top(x.student)) for y in (log_p, x.first))
    return -(s.exp() * (t - s.detach())).sum(-1)


def ta_opd(x: Problem, log_p: Tensor) -> Tensor:
    score = stopped(x, x.student) * x.first.gather(1, x.top(x.student)).exp().sum(-1)
    kept = score.topk(math.ceil(0.05 * len(score))).indices
    return stopped(x, log_p)[kept].sum() / len(score)


def iw_advantage(x: Problem) -> Tensor:
    rows = []
    for sizes in evidence(x).abs().split(x.lengths.tolist()):
        rows.append(1 + 0.5 * (1 - sizes.cumsum(0) / sizes.sum()))
    return torch.cat(rows) * evidence(x)


def opd_plus(x: Problem) -> Tensor:
    return 0.5 * ((1 + evidence(x).exp()) / 2).log()


def mad_opd(x: Problem, log_p: Tensor) -> Tensor:
    total = torch.zeros(len(log_p), dtype=log_p.dtype)
    for q, factor in zip(x.views, x.factors, strict=False):
        total = total + factor * jsd(with_rest(log_p, x.top(q)), with_rest(q, x.top(q)))
    return total.mean()


def pbsd(x: Problem, log_p: Tensor) -> Tensor:
    """DPO's loss of every guided response with every own one, a group's pairs alike, and groups alike."""
    apart = (x.of(log_p) - x.of(x.first)).split(x.lengths.tolist())
    groups, guided = x.pairing
    losses = []
    for number in range(int(groups.max()) + 1):
        of_group = [i for i in range(len(apart)) if groups[i] == number]
        pairs = [
            -torch.nn.functional.logsigmoid(0.1 * (apart[i].sum() - apart[j].sum()))
            for i in of_group
            for j in of_group
            if guided[i] and not guided[j]
        ]
        losses.append(torch.stack(pairs).mean())
    return torch.stack(losses).mean()


def omniopd(x: Problem, log_p: Tensor) -> Tensor:
    """−π̂ log p(y) in audited chunks, π̂ of writer and student; 0.1 KL(reference‖p) elsewhere."""
    ids = x.top(x.first)
    losses = 0.1 * kl(with_rest(x.first, ids), with_rest(log_p, ids))
    for first, agreement in x.chunks:
        cells = torch.arange(first, first + CHUNK_TOKENS)
        confidence = x.old[cells].exp().log().sum().div(CHUNK_TOKENS).exp()
        weight = (CONTINUATIONS * agreement + 1.0 * confidence) / (CONTINUATIONS + 1.0)
        losses = losses.index_copy(0, cells, -weight.to(losses.dtype) * x.of(log_p)[cells])
    return losses.mean()


FORMULAS: dict[str, Formula] = {
    "omniopd": omniopd,
    "pbsd": pbsd,
    "thinking-machines": importance(evidence),
    "rock-tokens": rock_tokens,
    "qwen3-strong-to-weak": lambda x, log_p: reverse(x, log_p).mean(),
    "gkd": gkd,
    "typhoon-s": typhoon_s,
    "many-faces": lambda x, log_p: stopped(x, log_p).mean(),
    "grpo": grpo,
    "opd-plus": importance(opd_plus),
    "g-opd": g_opd(lambda x: x.first),
    "exopd": g_opd(lambda x: 1.25 * x.first - 0.25 * x.second),
    "ta-opd": ta_opd,
    "iw-opd": importance(iw_advantage),
    "mad-opd": mad_opd,
    "lightning": lambda x, log_p: -((x.of(x.first) - x.old) * x.of(log_p)).mean(),
}
