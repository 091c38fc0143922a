"""Views in a run file: whose weights, which context, who scores what; and what cannot be meant."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from student_trainer.config import RunConfig, RunFileError, parse_run_config
from student_trainer.objective.view_names import self_teacher
from student_trainer.objective.view_settings import ContextTemplate, template_fields

RUN_FILE = """
[run]
name = "run"
[teachers.maths]
model = "m"
[teachers.prose]
model = "m"
[student]
model = "s"
[data]
path = "rows.jsonl"
{data}
[sampling]
samples_per_prompt = 2
{sampling}
[objective]
{objective}
[training]
steps = 1
{training}
"""
ANSWERS = 'answer_field = "answer"'
EMA = '[objective.views.a]\nweights = "ema"'
MARKED_ONLY, RENORMALISE = f"tokens.marked_only = true\n{EMA}", f'missing_view = "renormalise"\n{EMA}'


def parse(
    objective: str, *, data: str = ANSWERS, sampling: str = "", training: str = "", teachers: bool = True
) -> RunConfig:
    text = RUN_FILE.format(objective=objective, data=data, sampling=sampling, training=training)
    document = tomllib.loads(text)
    if not teachers:
        del document["teachers"]
    return parse_run_config(document)


def view(line: str) -> str:
    return f"[objective.views.a]\n{line}"


@pytest.mark.parametrize(
    ("weights", "teacher", "implied"),
    [
        ("teacher:maths", "maths", {}),
        ("initial", "run.initial", {"run.initial": "initial"}),
        ("live", "run.live", {"run.live": "live"}),
        ("ema", "run.ema", {"run.ema": "ema"}),
        ("reference", "run.initial", {"run.initial": "initial"}),
        ("checkpoint:runs/a", self_teacher("checkpoint:runs/a", "run"), None),
    ],
)
def test_every_kind_of_weights_has_its_teacher(
    weights: str, teacher: str, implied: dict[str, str] | None
) -> None:
    plan = parse(view(f'weights = "{weights}"')).plan()
    assert plan.teachers == {"a": teacher}
    assert plan.implied_teachers == ({teacher: weights} if implied is None else implied)
    assert plan.scoring_teachers == (teacher,)


def test_checkpoints_are_told_apart_and_a_section_called_reference_is_the_reference() -> None:
    first, second = (self_teacher(f"checkpoint:{path}", "run") for path in ("a", "b"))
    assert first != second
    assert first == self_teacher("checkpoint:a", "another run"), "runs may share it"
    document = tomllib.loads(
        RUN_FILE.format(objective=view('weights = "reference"'), data=ANSWERS, sampling="", training="")
    )
    document["teachers"]["reference"] = {"model": "m"}
    plan = parse_run_config(document).plan()
    assert (plan.teachers, plan.implied_teachers) == ({"a": "reference"}, {})


def test_self_views_need_no_teacher_section_and_others_do() -> None:
    assert parse(view('weights = "ema"'), teachers=False).plan().scoring_teachers == ("run.ema",)
    with pytest.raises(RunFileError, match=r"\[teachers.NAME\]: the objective needs a teacher"):
        parse(view('weights = "teacher"'), teachers=False)


def test_context_is_one_template_or_several_in_order() -> None:
    one = parse(view('weights = "ema"\ncontext = { user = "{prompt} {solution}" }')).plan()
    assert one.contexts == {"a": (ContextTemplate(user="{prompt} {solution}"),)}
    assert one.missing == {"a": "error"}
    two = parse(
        view('weights = "ema"\nmissing = "same"\ncontext = [{ user = "{a}" }, { system = "{b}" }]')
    ).plan()
    assert two.contexts == {"a": (ContextTemplate(user="{a}"), ContextTemplate(system="{b}"))}
    assert two.missing == {"a": "same"}
    assert parse(view('weights = "ema"\ncontext = "same"')).plan().contexts == {}


def test_template_that_can_never_be_filled_may_stand_before_one_that_can() -> None:
    templates = 'context = [{ user = "{success}" }, { user = "{feedback}" }]'
    assert parse(f"{EMA}\n{templates}", data="").plan().contexts


def test_fields_of_a_template() -> None:
    template = ContextTemplate(user="{prompt} {{literal}} {x}", system="{success}")
    assert template.fields == {"prompt", "x", "success"}
    assert template.per_rollout
    assert not ContextTemplate(user="{prompt}{other_prompt}").per_rollout
    assert template_fields("{a}{b}{a}") == ["a", "b", "a"]


def test_routed_view_names_all_its_teachers() -> None:
    config = parse(
        view('route = { x = "maths", y = "prose", z = "maths" }'), data=f'{ANSWERS}\ntag_field = "kind"'
    )
    plan = config.plan()
    assert plan.teachers_of("a") == plan.scoring_teachers == ("maths", "prose")
    assert [plan.teacher_of("a", tag) for tag in ("x", "y", "w")] == ["maths", "prose", None]


@pytest.mark.parametrize(
    ("objective", "how", "message"),
    [
        (view('weights = "emma"'), {}, "objective.views.a.weights: got 'emma', allowed: \"teacher\""),
        (view('weights = "checkpoint:"'), {}, "objective.views.a.weights: got 'checkpoint:'"),
        (view('weights = "teacher:"'), {}, "objective.views.a.weights: got 'teacher:'"),
        (view('weights = "teacher"'), {}, "is ambiguous"),
        (view('weights = "ema"\nmissing = "same"'), {}, "objective.views.a.missing: set to 'same'"),
        (view('weights = "ema"\ncontext = "other"'), {}, "[objective.views.a.context]: got 'other', allowed"),
        (view('weights = "ema"\ncontext = []'), {}, "[objective.views.a.context]: got [], allowed"),
        (view('weights = "ema"\ncontext = {}'), {}, "[objective.views.a.context]: got neither user"),
        (view('weights = "ema"\ncontext = {usr = "x"}'), {}, "'usr'; the nearest key is 'user'"),
        (view('weights = "ema"\ncontext = [{usr = "x"}]'), {}, "'usr'; the nearest key is 'user'"),
        (view('weights = "ema"\ncontext = {user = "{a.b}"}'), {}, "context] user: got field 'a.b'"),
        (view('weights = "ema"\ncontext = {user = "{a!r}"}'), {}, "got field 'a', allowed: a plain name"),
        (view('weights = "ema"\ncontext = {user = "{"}'), {}, "write {{ and }} for braces that are no field"),
        (view('weights = "ema"\ncontext = {user = "{success}"}'), {"data": ""}, "{success} needs answers"),
        (
            view('weights = "ema"\ncontext = {user = "{success}"}'),
            {"sampling": "samples_per_prompt = 1"},
            "objective.views.a.context: {success} needs siblings",
        ),
        (
            view('weights = "ema"\ncontext = {user = "{other_prompt}"}'),
            {"training": "prompts_per_step = 1"},
            "{other_prompt} needs [training] prompts_per_step above 1",
        ),
        (view('route = { x = "maths" }'), {}, "objective.views.a.route: needs [data] tag_field"),
        (view('route = { x = "math" }'), {}, "a.route.x: got teacher 'math', allowed: maths, prose"),
        (view('weights = "live"\nroute = { x = "maths" }'), {}, "a.weights: got 'live' with route"),
        (MARKED_ONLY, {}, "no view has a context of its own"),
        (RENORMALISE, {}, "only acts with several views"),
        (
            view('weights = "ema"'),
            {"sampling": 'context = { user = "{success}" }'},
            "[sampling] context: got field 'success', which there is only once responses are sampled",
        ),
        (
            view('weights = "ema"'),
            {"sampling": 'sampler = "teacher:maths"\ncontext = { user = "{solution}" }'},
            "[sampling] context: is set with sampler = \"teacher:maths\", and the student samples nothing",
        ),
        (
            view('weights = "ema"'),
            {"sampling": 'context = { user = "{solution}" }'},
            'objective.correction: got "none" with [sampling] context',
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(objective: str, how: dict[str, Any], message: str) -> None:
    sampling = how.get("sampling", "")
    text = RUN_FILE.replace("samples_per_prompt = 2\n", "") if "samples_per_prompt" in sampling else RUN_FILE
    filled = text.format(
        objective=objective,
        data=how.get("data", ANSWERS),
        sampling=sampling,
        training=how.get("training", ""),
    )
    with pytest.raises(RunFileError) as caught:
        parse_run_config(tomllib.loads(filled))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "correction",
    [
        'correction = { kind = "importance", cap = 2.0 }',
        'correction = { kind = "ppo" }',
        "weights.rollout_cap = 2.0",
    ],
)
def test_guided_sampling_goes_with_a_correction(correction: str) -> None:
    guide = 'context = { user = "{solution} {prompt}" }'
    config = parse(correction + "\n" + EMA, sampling=guide)
    assert config.sampling.context == ContextTemplate(user="{solution} {prompt}")
    assert not config.plan().behaviour_comparable, "the sampler's log-probabilities are of another prompt"


PREFERENCE = """
preference = { scale = 0.1 }
normalisation = "sequence_mean"
[objective.views.taught]
weights = "live"
context = { user = "{prompt} {solution}" }
"""
GUIDE = 'context = { user = "{prompt} {solution}" }'


@pytest.mark.parametrize(
    ("sampling", "message"),
    [
        ("", "guided_samples: 0 of samples_per_prompt = 2 responses"),
        (GUIDE, "guided_samples: 2 of samples_per_prompt = 2 responses"),
        (
            f'guided_samples = 1\n{GUIDE}\nsampler = "m"\nstudent_fraction = 0.5',
            'sampler: got "m" with objective.preference',
        ),
    ],
    ids=["none", "all", "another sampler"],
)
def test_preference_needs_responses_of_both_kinds(sampling: str, message: str) -> None:
    assert parse(PREFERENCE, sampling=f"guided_samples = 1\n{GUIDE}").plan().preference
    with pytest.raises(RunFileError, match=message):
        parse(PREFERENCE, sampling=sampling)


def test_run_that_reads_other_fields_is_another_run(tmp_path: Path) -> None:
    """What is queued was built with the old templates; a resumption with others must not train on it."""
    from student_trainer.resume import fixed_settings

    def fixed(line: str, **how: Any) -> dict[str, Any]:
        config = parse(view(line), **how)
        return fixed_settings(config, config.plan())

    base = fixed('weights = "ema"\ncontext = { user = "{a}" }')
    assert base == fixed('weights = "ema"\ncontext = { user = "{a}" }')
    assert base != fixed('weights = "ema"\ncontext = { user = "{b}" }')
    assert base != fixed('weights = "ema"\ncontext = { user = "{a}" }\nmissing = "same"')
    assert base != fixed('weights = "ema"\ncontext = { user = "{a}" }\nweight_field = "w"')


@pytest.mark.parametrize(
    ("line", "warned"),
    [
        ('context = { user = "{success}" }', True),
        ('context = [{ user = "{feedback}" }, { user = "{prompt} {success}" }]', True),
        ('context = { user = "{success}" }\nmissing = "same"', False),
        ('context = [{ user = "{success}" }, { user = "{solution}" }]', False),
    ],
)
def test_field_that_is_seldom_there_and_may_not_lack_warns(line: str, warned: bool) -> None:
    warnings = parse(f"{EMA}\n{line}").plan().warnings
    assert (
        any(
            "ends the run at the first response without {success}, {failure} or {feedback}" in w
            for w in warnings
        )
        == warned
    )
