"""What a user's functions are given, and how their answers are checked. Shapes: N positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from student_trainer.objective.divergences import MAX_LOG_RATIO, FDivergence, f_divergence
from student_trainer.objective.functions import FunctionSource
from student_trainer.objective.plan import Plan
from student_trainer.objective.settings import ObjectiveError


@dataclass(frozen=True)
class TokenValues:
    """What is known of N sampled tokens when their weight or advantage is asked for; nothing of it is
    differentiated.

    Attributes:
        student_logprob: f64, log p(y). Of an advantage it is the probability that u is made of: the
            sampler's, or with log_ratio = "student" the student's as the step began.
        teacher_logprob: f64, log q(y) of the target; NaN where unknown.
        behaviour_logprob: f64, log μ(y).
        teacher_entropy: f64, nats; NaN where the objective does not ask for it.
        reward: f64, of the whole response; NaN without one.
        position: int64, the token's place in its response.
    """

    student_logprob: Tensor
    teacher_logprob: Tensor
    behaviour_logprob: Tensor
    teacher_entropy: Tensor
    reward: Tensor
    position: Tensor

    def at(self, rows: Tensor | slice) -> TokenValues:
        """Of these rows."""
        return TokenValues(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def check_functions(plan: Plan) -> None:
    """Import the user's functions, and try the divergence; raises ObjectiveError."""
    for source in plan.custom.values():
        source.load()
    if "divergence" in plan.custom:
        divergence_row(plan)


def divergence_row(plan: Plan) -> FDivergence:
    """The plan's divergence: a row of the table, or a user's."""
    source = plan.custom.get("divergence")
    if source is not None:
        return _own_divergence(source)
    assert plan.divergence != "custom"
    return f_divergence(plan.divergence, plan.beta, plan.alpha)


def transformed_advantage(plan: Plan, advantage: Tensor, tokens: TokenValues, where: Tensor) -> Tensor:
    """What the user's function makes of the distillation advantage, [N]; it must be finite `where`."""
    source = plan.custom["advantage"]
    return _checked(source, source.load()(advantage, tokens), advantage, where)


def own_weight(plan: Plan, tokens: TokenValues) -> Tensor:
    """The user's factor of every position, [N]."""
    source = plan.custom["token_weight"]
    everywhere = torch.ones_like(tokens.position, dtype=torch.bool)
    return _checked(source, source.load()(tokens), tokens.student_logprob, everywhere)


def _checked(source: FunctionSource, values: object, like: Tensor, where: Tensor) -> Tensor:
    if not isinstance(values, Tensor) or values.shape != like.shape:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ObjectiveError(
            f"objective.custom.{source.kind}: {source.name} returned {got}, allowed: a tensor of shape "
            f"{tuple(like.shape)}"
        )
    if not bool(torch.isfinite(values[where]).all()):
        raise ObjectiveError(
            f"objective.custom.{source.kind}: {source.name} returned a number that is not finite"
        )
    return values.detach().to(like.dtype)


@lru_cache
def _own_divergence(source: FunctionSource) -> FDivergence:
    found = source.load()
    row = found if isinstance(found, FDivergence) else from_function(found)
    _check_row(source, row)
    return row


def from_function(f: Callable[[Tensor], Tensor]) -> FDivergence:
    """The row of D_f(q‖p) = E_p f(u), u = q/p, from f alone, a function of a tensor element by element.

    f is centred, f̃ = f − f′(1)·(u − 1), and goes on as a straight line where u leaves [e^−20, e^20].
    """

    def value_and_slope(u: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = u.detach().requires_grad_()
            value = f(leaf)
            if value.shape != u.shape:
                raise ValueError(f"gave {tuple(value.shape)} for u of shape {tuple(u.shape)}")
            (slope,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), slope

    one = torch.ones((), dtype=torch.float64)
    middle = float(value_and_slope(one)[1])

    def at(log_u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """u within bounds, f̃(u) and f̃′(u)."""
        u = log_u.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        value, slope = value_and_slope(u)
        return u, value - middle * (u - 1), slope - middle

    def share(s: Tensor, t: Tensor) -> Tensor:
        u, value, slope = at(t - s)
        p = s.exp()
        return p * value + slope * (t.exp() - p * u)

    def weight(log_u: Tensor) -> Tensor:
        u, value, slope = at(log_u)
        return u * slope - value

    return FDivergence(
        share=share,
        psi=lambda s, t: -s.exp() * weight(t - s),
        weight=weight,
        cost=lambda log_u: at(log_u)[1],
    )


def _check_row(source: FunctionSource, row: FDivergence) -> None:
    """f is 0 at 1 and convex, and the four functions of a row are of one f."""
    log_u = torch.linspace(-6, 6, 121, dtype=torch.float64)
    p = torch.full_like(log_u, 1e-3)
    s, t = p.log(), p.log() + log_u
    try:
        cost, weight, share, psi = row.cost(log_u), row.weight(log_u), row.share(s, t), row.psi(s, t)
    except Exception as error:
        raise _wrong(source, f"failed: {error!r}") from error
    for values in (cost, weight, share, psi):
        if values.shape != log_u.shape or not bool(torch.isfinite(values).all()):
            raise _wrong(source, "must give one finite number for every u, from e^-6 to e^6")
    u = log_u.exp()
    if abs(float(cost[60])) > 1e-9:
        raise _wrong(source, f"is {float(cost[60]):.3g} at u = 1, and must be 0")
    slopes = cost.diff() / u.diff()
    if bool((slopes.diff() < -1e-6 * (1 + slopes[1:].abs())).any()):
        raise _wrong(source, "is not convex in u, so that it is no divergence")
    step = 1e-5
    numeric = (row.share(s + step, t) - row.share(s - step, t)) / (2 * step)
    consistent = [
        torch.allclose(psi, -p * weight, rtol=1e-6, atol=1e-12),
        torch.allclose(numeric, psi - row.slope * p, rtol=1e-4, atol=1e-9),
        torch.allclose(share, p * cost, rtol=1e-6, atol=1e-12),
    ]
    if not all(consistent):
        raise _wrong(source, "has functions that do not belong together: psi = -p·weight, and share's slope")


def _wrong(source: FunctionSource, problem: str) -> ObjectiveError:
    return ObjectiveError(f"objective.custom.divergence: {source.name} {problem}")
