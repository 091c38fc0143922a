"""The dashboard of a run: does the student learn, and who waits for whom?"""

from __future__ import annotations

from panels import Json, Query, Row, dashboard, graph, stat, variable

CHOSEN = '{run=~"$run"}'


def of_trainer(figure: str) -> str:
    """A trainer's figure with the label `run`, of the runs that are chosen."""
    return f"tutelage_trainer_{figure} * on (job, instance) group_left (run) tutelage_trainer_info{CHOSEN}"


def of_sampler(expr: str) -> str:
    """A sampler's figure with the label `run`, of the runs that are chosen."""
    return f"{expr} * on (job, instance) group_left (run) tutelage_sampler_info{CHOSEN}"


def rate(counter: str) -> str:
    """A rate of each sampler."""
    return of_sampler(f"rate(tutelage_sampler_{counter}[$__rate_interval])")


def training() -> Json:
    return dashboard(
        "tutelage-training",
        "Tutelage: training",
        "The trainer and the samplers of a run.",
        [variable("run", "Run", "label_values(tutelage_queue_trainers, run)")],
        [
            Row("At a glance", _glance()),
            Row("Learning", _learning()),
            Row("Speed", _speed()),
            Row("Freshness", _freshness()),
        ],
    )


def _glance() -> list[Json]:
    progress = of_trainer("step / tutelage_trainer_steps")
    return [
        stat("Progress", "Steps done.", "percentunit", Query(progress, "{{run}}")),
        stat("Loss", "Of the newest step.", "short", Query(of_trainer("loss"), "{{run}}")),
        stat(
            "KL to the teacher",
            "Nats per token that the student sampled, in the newest step.",
            "short",
            Query(of_trainer("kl"), "{{run}}"),
        ),
        stat(
            "Accuracy",
            "Of the newest evaluation, greedy.",
            "percentunit",
            Query(of_trainer("accuracy_greedy"), "{{run}}"),
        ),
        stat(
            "Tokens per second",
            "Trained in the newest step, waiting included.",
            "short",
            Query(of_trainer("tokens_per_second"), "{{run}}"),
        ),
        stat(
            "Staleness",
            "Policy versions between sampling and training, mean of the newest step.",
            "short",
            Query(of_trainer("staleness_mean"), "{{run}}"),
        ),
    ]


def _learning() -> list[Json]:
    return [
        graph("Loss", "Of each step.", "short", Query(of_trainer("loss"), "{{run}}")),
        graph("KL to the teacher", "Nats per token.", "short", Query(of_trainer("kl"), "{{run}}")),
        graph(
            "Accuracy",
            "Of each evaluation.",
            "percentunit",
            Query(of_trainer("accuracy_greedy"), "{{run}} greedy"),
            Query(of_trainer("accuracy_sampled"), "{{run}} sampled"),
        ),
        graph("Gradient norm", "Before clipping.", "short", Query(of_trainer("gradient_norm"), "{{run}}")),
        graph("Learning rate", "As scheduled.", "sci", Query(of_trainer("learning_rate"), "{{run}}")),
        graph(
            "Steps refused",
            "So far: steps whose numbers were not fit for the weights.",
            "none",
            Query(of_trainer("refused_steps"), "{{run}}"),
        ),
    ]


def _speed() -> list[Json]:
    sampling = f"avg by (run) ({rate('sampling_seconds_total')})"
    waiting = f"avg by (run, reason) ({rate('waiting_seconds_total')})"
    return [
        graph(
            "Trainer: seconds of a step",
            "Waiting for scored groups, and training.",
            "s",
            Query(of_trainer("seconds_wait"), "{{run}} waiting"),
            Query(of_trainer("seconds_train"), "{{run}} training"),
            stacked=True,
        ),
        graph(
            "Samplers: where the time goes",
            "Share of a process's time, mean over the processes.",
            "percentunit",
            Query(sampling, "{{run}} sampling"),
            Query(waiting, "{{run}} waiting: {{reason}}"),
            stacked=True,
        ),
        graph(
            "Tokens",
            "Per second. Who is slowest when all are busy is what the run waits for.",
            "short",
            Query(f"sum by (run) ({rate('tokens_total')})", "{{run}} sampled"),
            Query(of_trainer("tokens_per_second"), "{{run}} trained"),
            Query("sum(rate(tutelage_scored_positions_total[$__rate_interval]))", "scored, for everybody"),
        ),
    ]


def _freshness() -> list[Json]:
    groups = f"sum by (run, outcome) ({rate('groups_total')})"
    return [
        graph(
            "Policy version",
            "The trainer's newest, and what each sampler samples with.",
            "none",
            Query(of_trainer("policy_version"), "{{run}} trainer"),
            Query(of_sampler("tutelage_sampler_policy_version"), "{{run}} sampler {{instance}}"),
            width=6,
        ),
        graph(
            "Staleness",
            "Policy versions between sampling and training, and between the student's own weights that "
            "scored and those that are trained. Means of each step.",
            "short",
            Query(of_trainer("staleness_mean"), "{{run}} samples"),
            Query(of_trainer("weights_lag_mean"), "{{run}} scores"),
            width=6,
        ),
        graph(
            "Groups sampled",
            "Per second, by what became of them.",
            "short",
            Query(groups, "{{run}} {{outcome}}"),
            width=6,
            stacked=True,
        ),
        graph(
            "Groups dropped",
            "By the trainer so far, by reason. Their work is lost.",
            "none",
            Query(of_trainer("groups_dropped"), "{{run}} {{reason}}"),
            width=6,
            stacked=True,
        ),
    ]
