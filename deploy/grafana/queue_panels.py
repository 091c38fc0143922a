"""The dashboard of the queue: does work move?"""

from __future__ import annotations

from panels import Json, Query, Row, dashboard, graph, stat, variable

TEACHER = '{teacher=~"$teacher"}'
RUN = '{run=~"$run"}'


def of_teacher(metric: str, *more: str) -> str:
    """A gauge of the teachers that are chosen; the same from every exporter, so one is taken."""
    return f"max by ({', '.join(['teacher', *more])}) (tutelage_queue_{metric}{TEACHER})"


def of_run(metric: str, *more: str) -> str:
    """A gauge of the runs that are chosen."""
    return f"max by ({', '.join(['run', *more])}) (tutelage_queue_{metric}{RUN})"


def queue() -> Json:
    return dashboard(
        "tutelage-queue",
        "Tutelage: queue",
        "Jobs of the teachers, orders and groups of the runs, and the server itself.",
        [
            variable("teacher", "Teacher", "label_values(tutelage_queue_waiting_tokens, teacher)"),
            variable("run", "Run", "label_values(tutelage_queue_trainers, run)"),
        ],
        [
            Row("At a glance", _glance()),
            Row("Jobs of the teachers", _jobs()),
            Row("Runs", _runs()),
            Row("Server", _server()),
        ],
    )


def _glance() -> list[Json]:
    jobs = f"sum(increase(tutelage_queue_dead_jobs_total{TEACHER}[1h]))"
    orders = f"sum(increase(tutelage_queue_dead_orders_total{RUN}[1h]))"
    memory = "max(tutelage_queue_memory_bytes / (tutelage_queue_memory_limit_bytes > 0))"
    return [
        stat("Queue", "1: it answers.", "none", Query("min(tutelage_queue_up)", "up"), red_below=1),
        stat(
            "Tokens waiting",
            "Tokens that no replica has taken.",
            "short",
            Query(of_teacher("waiting_tokens"), "{{teacher}}"),
        ),
        stat(
            "Oldest job",
            "Since it was submitted.",
            "s",
            Query(of_teacher("oldest_job_age_seconds"), "{{teacher}}"),
            yellow_from=120,
            red_from=600,
        ),
        stat(
            "Replicas",
            "That say in the queue that they live.",
            "none",
            Query(of_teacher("replicas"), "{{teacher}}"),
            red_below=1,
        ),
        stat(
            "Given up",
            "Jobs and orders in the last hour.",
            "none",
            Query(f"{jobs} + {orders}", "given up"),
            red_from=1,
        ),
        stat(
            "Memory",
            "Share of the server's limit; nothing when it has none.",
            "percentunit",
            Query(memory, "used"),
            yellow_from=0.7,
            red_from=0.85,
        ),
    ]


def _jobs() -> list[Json]:
    scored = f"max by (teacher) (rate(tutelage_queue_scored_jobs_total{TEACHER}[$__rate_interval]))"
    dead = f"max by (teacher) (increase(tutelage_queue_dead_jobs_total{TEACHER}[5m]))"
    expired = f"max by (teacher) (increase(tutelage_queue_expired_jobs_total{TEACHER}[5m]))"
    return [
        graph(
            "Tokens",
            "Waiting for a replica, or with one.",
            "short",
            Query(of_teacher("waiting_tokens"), "{{teacher}} waiting"),
            Query(of_teacher("in_flight_tokens"), "{{teacher}} in flight"),
            stacked=True,
        ),
        graph(
            "Jobs",
            "A job is one view of one group.",
            "none",
            Query(of_teacher("jobs", "state"), "{{teacher}} {{state}}"),
            stacked=True,
        ),
        graph(
            "Oldest job",
            "Since it was submitted. It grows second by second when nobody works.",
            "s",
            Query(of_teacher("oldest_job_age_seconds"), "{{teacher}}"),
        ),
        graph("Jobs scored", "Per second.", "short", Query(scored, "{{teacher}}")),
        graph(
            "Jobs lost",
            "In five minutes: given up after every delivery failed, or past their deadline.",
            "none",
            Query(dead, "{{teacher}} given up"),
            Query(expired, "{{teacher}} expired"),
        ),
        graph(
            "Replicas",
            "That say in the queue that they live.",
            "none",
            Query(of_teacher("replicas"), "{{teacher}}"),
        ),
    ]


def _runs() -> list[Json]:
    dead = f"max by (run) (increase(tutelage_queue_dead_orders_total{RUN}[5m]))"
    return [
        graph(
            "Orders",
            "Each asks a sampler for some groups.",
            "none",
            Query(of_run("orders", "state"), "{{run}} {{state}}"),
            stacked=True,
        ),
        graph(
            "Scored groups",
            "In flight: with the trainer, until a checkpoint covers them.",
            "none",
            Query(of_run("scored_groups", "state"), "{{run}} {{state}}"),
            stacked=True,
        ),
        graph(
            "Oldest order",
            "Since it was placed.",
            "s",
            Query(of_run("oldest_order_age_seconds"), "{{run}}"),
        ),
        graph(
            "Processes",
            "That say in the queue that they live.",
            "none",
            Query(of_run("samplers"), "{{run}} samplers"),
            Query(of_run("trainers"), "{{run}} trainers"),
        ),
        graph("Orders given up", "In five minutes.", "none", Query(dead, "{{run}}")),
    ]


def _server() -> list[Json]:
    return [
        graph(
            "Memory",
            "At its limit the queue refuses everything new.",
            "bytes",
            Query("max(tutelage_queue_memory_bytes)", "used"),
            Query("max(tutelage_queue_memory_limit_bytes > 0)", "limit"),
            width=12,
        ),
        graph(
            "Clients",
            "Connections to the server.",
            "none",
            Query("max(tutelage_queue_clients)", "clients"),
            width=12,
        ),
    ]
