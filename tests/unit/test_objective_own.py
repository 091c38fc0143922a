"""Objectives that a user adds from outside: a preset by path and functions of a file, through the loss."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tabular import (
    SUPPORTS,
    Array,
    V,
    divergence_of,
    expected_gradient,
    finite_difference,
    inside_of,
    log_softmax,
    pathwise_gradient,
    random_logits,
    restricted,
    support_of,
)
from torch import Tensor

from student_trainer.config import load_run_config
from student_trainer.objective.compile import Plan, compile_plan
from student_trainer.objective.custom import TokenValues, from_function
from student_trainer.objective.divergences import f_divergence
from student_trainer.objective.loss import TokenBatch, ViewTensors, objective_loss
from student_trainer.objective.settings import Divergence, ObjectiveError, ObjectiveSettings
from student_trainer.resume import fixed_settings

SOURCE = """
import torch
from student_trainer.objective.divergences import FDivergence

def kl(u): return -torch.log(u)
def forward(u): return u * torch.log(u)
def hellinger(u): return (torch.sqrt(u) - 1) ** 2 / 2
def chi(u): return (u - 1) ** 2
def shifted(u): return u * torch.log(u) + 1
def concave(u): return torch.log(u)
def scalar(u): return u.sum()
def broken(u): return torch.where(u > 2, torch.nan, u - 1)
row = FDivergence(
    share=lambda s, t: s.exp() * (s - t),
    psi=lambda s, t: s.exp() * (s - t),
    weight=lambda log_u: log_u,
    cost=lambda log_u: -log_u,
    slope=-1.0,
)
wrong = FDivergence(share=row.share, psi=row.psi, weight=lambda log_u: 2 * log_u, cost=row.cost, slope=-1.0)
def bounded(advantage, tokens): return torch.tanh(advantage) * (tokens.teacher_logprob > -3)
def fading(tokens): return 0.5 ** tokens.position * (1 - tokens.student_logprob.exp())
def seen(tokens):
    return tokens.reward.nan_to_num(7.0) + tokens.teacher_entropy.nan_to_num(5.0) + tokens.behaviour_logprob
def single(advantage): return advantage
def nothing(tokens): return tokens.reward
def pair(tokens): return torch.ones(2)
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("outside") / "own.py"
    path.write_text(SOURCE)
    return path


def plan_of(own: Path, custom: dict[str, Any], **settings: Any) -> Plan:
    named = {key: f"{own}:{name}" if isinstance(name, str) else name for key, name in custom.items()}
    chosen = ObjectiveSettings.model_validate({**settings, "custom": named})
    return compile_plan(chosen, student_temperature=1.0)


NAMES: dict[str, Divergence] = {
    "kl": "kl_student_teacher",
    "row": "kl_student_teacher",
    "forward": "kl_teacher_student",
    "hellinger": "hellinger",
    "chi": "chi_square_teacher_student",
}


@pytest.mark.parametrize("name", NAMES)
def test_own_divergence_from_sampled_tokens_is_unbiased(own: Path, name: str) -> None:
    plan = plan_of(own, {"divergence": name})
    logits, log_q = random_logits(1, 10)[0], random_logits(1, 11)[0].log_softmax(-1)

    def value(moved: Array) -> Array:
        return divergence_of({"divergence": NAMES[name]}, np.exp(log_softmax(moved)), log_q.exp().numpy())

    gradient = expected_gradient(plan, logits, logits.log_softmax(-1), {"teacher": log_q})
    expected = finite_difference(value, logits[None])[0]
    torch.testing.assert_close(gradient, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("where", ["full", "bucket", "renormalise"])
@pytest.mark.parametrize("name", NAMES)
def test_own_divergence_is_differentiated_on_every_support(own: Path, name: str, where: str) -> None:
    support = "full" if where == "full" else SUPPORTS[len(name) % 3]
    tail = {} if where == "full" else {"tail": where, "k": 3}
    plan = plan_of(own, {"divergence": name}, estimator="pathwise", support=support, monitor=False, **tail)
    logits, log_q = random_logits(5, 1), random_logits(5, 2).log_softmax(-1)
    ids = None if where == "full" else support_of(support, logits, log_q, 3)
    inside = np.ones((5, V)) if ids is None else inside_of(ids)

    def value(moved: Array) -> Array:
        p, q = (restricted(x, inside, where) for x in (np.exp(log_softmax(moved)), log_q.exp().numpy()))
        return divergence_of({"divergence": NAMES[name]}, p, q)

    gradient = pathwise_gradient(plan, logits, log_q, ids)
    torch.testing.assert_close(gradient, finite_difference(value, logits), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("name", ["kl_student_teacher", "kl_teacher_student", "hellinger"])
def test_a_row_made_of_its_function_is_finite_however_far_apart(name: Divergence) -> None:
    functions: dict[str, Callable[[Tensor], Tensor]] = {
        "kl_student_teacher": lambda u: -u.log(),
        "kl_teacher_student": lambda u: u * u.log(),
        "hellinger": lambda u: (u.sqrt() - 1) ** 2 / 2,
    }
    row, known = from_function(functions[name]), f_divergence(name, 0.5, 0.5)
    log_u = torch.linspace(-18, 18, 73, dtype=torch.float64)
    torch.testing.assert_close(row.weight(log_u), known.weight(log_u))
    s, t = torch.tensor([-300.0, -1e-9, -5.0]).double(), torch.tensor([-1e-9, -300.0, -5.0]).double()
    for values in (row.share(s, t), row.psi(s, t)):
        assert bool(torch.isfinite(values).all())
    assert float(row.psi(s, t)[2]) == 0


T = 6
LENGTHS = torch.tensor([4, 2])
POSITION = torch.tensor([0, 1, 2, 3, 0, 1])
LOGITS, LOG_Q = random_logits(T, 1), random_logits(T, 2).log_softmax(-1)
SAMPLED = LOGITS.topk(2).indices[:, 1]


def at_sampled(values: Tensor) -> Tensor:
    return values.gather(1, SAMPLED[:, None])[:, 0]


BEHAVIOUR = at_sampled(LOGITS.log_softmax(-1)) + 0.3 * random_logits(1, 3, T)[0]


def gradient(plan: Plan, **changes: Any) -> Tensor:
    ids = LOGITS.topk(3).indices
    fields: dict[str, Any] = {
        "sampled_ids": SAMPLED,
        "behaviour_logprobs": BEHAVIOUR,
        "mask": torch.ones(T, dtype=torch.bool),
        "weight": torch.linspace(0.5, 1, T).double(),
        "views": {
            "teacher": ViewTensors(
                sampled=at_sampled(LOG_Q), support_ids=ids, support_logprobs=LOG_Q.gather(1, ids)
            )
        },
        "sequence_lengths": LENGTHS,
    }
    leaf = LOGITS.clone().requires_grad_()
    head = torch.eye(V, dtype=torch.float64)
    batch = TokenBatch(**{**fields, **changes})
    objective_loss(leaf, head, None, batch, plan, chunk_rows=4).loss.backward()
    assert leaf.grad is not None
    return leaf.grad


def policy_gradient(advantage: Tensor) -> Tensor:
    leaf = LOGITS.clone().requires_grad_()
    weight = torch.linspace(0.5, 1, T).double()
    (-(weight * advantage) * at_sampled(leaf.log_softmax(-1))).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


def test_own_advantage_takes_the_place_of_the_distillations(own: Path) -> None:
    plan = plan_of(own, {"advantage": "bounded"}, mix="add", distill_coefficient=0.5, reward_coefficient=2.0)
    reward = torch.tensor([1.0, 1, 1, 1, -1, -1], dtype=torch.float64)
    log_q = at_sampled(LOG_Q)
    advantage = 0.5 * torch.tanh(log_q - BEHAVIOUR) * (log_q > -3) + 2 * reward
    assert 0 < int((log_q > -3).sum()) < T
    torch.testing.assert_close(gradient(plan, reward_advantage=reward), policy_gradient(advantage))


@pytest.mark.parametrize("chosen", [{}, {"top_fraction": 0.5}], ids=["all", "top fraction"])
def test_own_weight_multiplies_each_position(own: Path, chosen: dict[str, float]) -> None:
    settings: dict[str, Any] = {"estimator": "pathwise", "support": "student_topk", "k": 3, "tail": "bucket"}
    weight = 0.5**POSITION * (1 - at_sampled(LOGITS.softmax(-1)))
    weighed = gradient(plan_of(own, {"token_weight": "fading"}, **settings, tokens=chosen))
    plain = gradient(plan_of(own, {}, **settings, tokens=chosen))
    torch.testing.assert_close(weighed, weight[:, None] * plain)


def test_values_are_nan_where_unknown_and_those_of_the_batch_where_known(own: Path) -> None:
    rewards = torch.tensor([0.5] * 4 + [math.nan] * 2)
    plan = plan_of(own, {"token_weight": "seen"})
    plain = gradient(plan_of(own, {}))
    reward = torch.tensor([0.5] * 4 + [7.0] * 2, dtype=torch.float64)
    expected = (reward + 5.0 + BEHAVIOUR)[:, None] * plain
    torch.testing.assert_close(gradient(plan, rewards=rewards), expected)
    asking = plan_of(own, {"token_weight": "seen", "teacher_entropy": True})
    assert [signal.entropy for _, signal in asking.view_requests.values()] == [True]


@pytest.mark.parametrize(
    ("custom", "settings", "problem"),
    [
        ({"divergence": "absent"}, {}, r"own.py defines no 'absent' that takes \(u\); it has kl, forward"),
        ({"advantage": "single"}, {}, r"single in .*own.py must take \(advantage, tokens\)"),
        ({"divergence": "kl"}, {"divergence": "jsd"}, "objective.divergence: set to 'jsd'"),
        ({"divergence": "kl"}, {"beta": 0.5}, "objective.beta"),
        ({"divergence": "kl"}, {"mix": "multiply"}, "objective.custom.divergence: is set, but"),
        ({"advantage": "bounded"}, {"mix": "multiply"}, "objective.custom.advantage: is set, but"),
        ({"advantage": "bounded"}, {"preset": "gkd"}, "objective.custom.advantage: is set, but"),
        ({"teacher_entropy": True}, {}, "objective.custom.teacher_entropy: is set, but"),
    ],
)
def test_functions_that_cannot_act_are_refused_when_the_plan_is_made(
    own: Path, custom: dict[str, Any], settings: dict[str, Any], problem: str
) -> None:
    with pytest.raises(ObjectiveError, match=problem):
        plan_of(own, custom, **settings)


@pytest.mark.parametrize(
    ("reference", "problem"),
    [
        ("{directory}/none.py:f", "cannot read .*none.py: No such file"),
        ("{directory}/text.py:f", "text.py is not Python"),
        ("no_such_module_anywhere:f", "there is no Python module 'no_such_module_anywhere'"),
    ],
)
def test_files_that_cannot_be_read_are_refused(tmp_path: Path, reference: str, problem: str) -> None:
    (tmp_path / "text.py").write_text("this is no Python")
    custom = {"divergence": reference.format(directory=tmp_path)}
    with pytest.raises(ObjectiveError, match=f"objective.custom.divergence: .*{problem}"):
        compile_plan(ObjectiveSettings.model_validate({"custom": custom}), student_temperature=1.0)


@pytest.mark.parametrize(
    ("custom", "problem"),
    [
        ({"divergence": "shifted"}, "own.py:shifted is 1 at u = 1, and must be 0"),
        ({"divergence": "concave"}, "own.py:concave is not convex"),
        ({"divergence": "scalar"}, r"own.py:scalar failed: ValueError\('gave \(\)"),
        ({"divergence": "broken"}, "own.py:broken must give one finite number for every u"),
        ({"divergence": "wrong"}, "own.py:wrong has functions that do not belong together"),
        ({"token_weight": "pair"}, r"own.py:pair returned \(2,\), allowed: a tensor of shape \(4,\)"),
        ({"token_weight": "nothing"}, "own.py:nothing returned a number that is not finite"),
    ],
)
def test_answers_that_cannot_be_used_are_refused(own: Path, custom: dict[str, str], problem: str) -> None:
    with pytest.raises(ObjectiveError, match=problem):
        gradient(plan_of(own, custom))


def test_an_installed_module_may_be_named() -> None:
    custom = {"token_weight": "support.own_weights:half"}
    plan = compile_plan(ObjectiveSettings.model_validate({"custom": custom}), student_temperature=1.0)
    plain = compile_plan(ObjectiveSettings(), student_temperature=1.0)
    torch.testing.assert_close(gradient(plan), 0.5 * gradient(plain))


RUN_FILE = """
[run]
directory = "{directory}/out"
[student]
model = "unused"
[teachers.big]
model = "unused"
[data]
task = "addition"
[objective]
preset = "presets/mine.toml"
{more}
[training]
steps = 3
"""
PRESET = """
title = "mine"
[objective]
divergence = "jsd"
k = 7
support = "teacher_topk"
estimator = "pathwise"
[objective.custom]
token_weight = "../own.py:fading"
"""


def write_run(directory: Path, more: str = "", preset: str = PRESET) -> Path:
    (directory / "presets").mkdir()
    (directory / "presets/mine.toml").write_text(preset)
    (directory / "own.py").write_text(SOURCE)
    run_file = directory / "run.toml"
    run_file.write_text(RUN_FILE.format(directory=directory, more=more))
    return run_file


def test_a_preset_of_ones_own_is_found_beside_the_run_file_and_overridden_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_file = write_run(tmp_path, more="beta = 0.3")
    monkeypatch.chdir(tmp_path.parent)
    config = load_run_config(run_file.relative_to(tmp_path.parent))
    plan = config.plan()
    assert (plan.divergence, plan.beta, plan.k) == ("jsd", 0.3, 7)
    assert plan.custom["token_weight"].path.endswith("own.py")
    weight = plan.custom["token_weight"].load()
    nothing = torch.zeros(2, dtype=torch.float64)
    values = TokenValues(nothing - 1, nothing, nothing, nothing, nothing, torch.tensor([0, 1]))
    torch.testing.assert_close(weight(values), torch.tensor([1.0, 0.5]).double() * (1 - math.exp(-1)))


@pytest.mark.parametrize(
    ("preset", "problem"),
    [
        ("[objective\n", "mine.toml: "),
        ("[objective]\nk = 0", r"mine.toml: \[objective\] k: got 0; "),
        (
            "[objective.tokens]\nskip_first = 1",
            r"mine.toml: \[objective.tokens\] unknown key 'skip_first'; .*skip_first_n",
        ),
        ("[objectives]\nk = 3", "mine.toml: .*unknown section 'objectives'; .*'objective'"),
        ('title = "Mine"', "mine.toml: objective: missing"),
        (
            '[objective.custom]\nadvantage = "bounded"',
            r'\[objective.custom\] advantage: got .*allowed: "module:attribute"',
        ),
        ('[objective]\npreset = "gkd"', "mine.toml names a preset"),
    ],
)
def test_a_preset_that_is_none_is_named_in_the_error(tmp_path: Path, preset: str, problem: str) -> None:
    run_file = write_run(tmp_path, preset=preset)
    with pytest.raises(ValueError, match=f"(?s)objective.preset: .*{problem}"):
        load_run_config(run_file)


def test_what_a_function_was_is_part_of_the_run(tmp_path: Path) -> None:
    run_file = write_run(tmp_path)
    config = load_run_config(run_file)
    plan = config.plan()
    before = fixed_settings(config, plan)["objective.custom"]
    assert before["token_weight"]["name"] == "own.py:fading"
    (tmp_path / "own.py").write_text(SOURCE + "\n# another\n")
    assert fixed_settings(config, config.plan())["objective.custom"] != before
    with pytest.raises(ObjectiveError, match=r"own.py has changed since the objective was compiled"):
        plan.custom["token_weight"].load()


def test_whoever_only_compiles_imports_neither_torch_nor_the_file(tmp_path: Path) -> None:
    run_file = write_run(tmp_path)
    (tmp_path / "own.py").write_text(SOURCE + "\nraise RuntimeError('imported')\n")
    check = (
        "import sys; from pathlib import Path; from student_trainer.config import load_run_config; "
        f"load_run_config(Path({str(run_file)!r})).plan(); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
    plan = load_run_config(run_file).plan()
    with pytest.raises(ObjectiveError, match=r"importing .*own.py failed: RuntimeError\('imported'\)"):
        gradient(plan)
