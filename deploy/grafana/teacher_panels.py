"""The dashboard of the teachers: is every one of them well, fast and right?"""

from __future__ import annotations

from panels import Json, Query, Row, dashboard, graph, heatmap, stat, variable

TEACHER = '{teacher=~"$teacher"}'
BUCKETS = "tutelage_request_duration_seconds_bucket"
PER_REPLICA = "{{teacher}} {{instance}}"


def of_teacher(expr: str) -> str:
    """A replica's figure with the label `teacher`, of the teachers that are chosen."""
    return f"{expr} * on (job, instance) group_left (teacher) tutelage_teacher_info{TEACHER}"


def rate_by(labels: str, counter: str) -> str:
    """Sum of a counter's rate over the replicas, for each combination of `labels`."""
    return f"sum by ({labels}) ({of_teacher(f'rate({counter}[$__rate_interval])')})"


def by_teacher(gauge: str) -> str:
    """Sum of a gauge over the replicas of a teacher."""
    return f"sum by (teacher) ({of_teacher(gauge)})"


def quantile(share: float, labels: str, buckets: str) -> str:
    """A quantile of a histogram of seconds."""
    return f"histogram_quantile({share}, {rate_by(f'{labels}, le', buckets)})"


def teacher() -> Json:
    return dashboard(
        "tutelage-teacher",
        "Tutelage: teachers",
        "Replicas of the teachers: requests, speed, mistakes.",
        [variable("teacher", "Teacher", "label_values(tutelage_queue_waiting_tokens, teacher)")],
        [
            Row("At a glance", _glance()),
            Row("Requests", _requests()),
            Row("Work", _work()),
            Row("vLLM, where it is the engine", _vllm()),
        ],
    )


def _glance() -> list[Json]:
    computed, reused = (
        rate_by("teacher", f"tutelage_{kind}_tokens_total") for kind in ("computed", "reused")
    )
    return [
        stat(
            "Replicas ready",
            "Replicas that accept requests.",
            "none",
            Query(by_teacher("tutelage_ready"), "{{teacher}}"),
            red_below=1,
        ),
        stat(
            "Tokens per second",
            "Computed by the engine, or taken from its cache.",
            "short",
            Query(f"{computed} + {reused}", "{{teacher}}"),
        ),
        stat(
            "Tokens waiting",
            "Tokens in the queue that no replica has taken.",
            "short",
            Query(f"max by (teacher) (tutelage_queue_waiting_tokens{TEACHER})", "{{teacher}}"),
        ),
        stat(
            "Time to clear the queue",
            "At the speed that the replicas measured while they were busy.",
            "s",
            Query(f"teacher:tutelage_queue_backlog_seconds{TEACHER}", "{{teacher}}"),
            yellow_from=120,
            red_from=600,
        ),
        stat(
            "Answers with an error",
            "INTERNAL, UNAVAILABLE or DEADLINE_EXCEEDED, of the worst replica.",
            "percentunit",
            Query("max(instance:tutelage_request_errors:ratio_rate5m)", "errors"),
            yellow_from=0.01,
            red_from=0.05,
        ),
        stat(
            "Invalid positions",
            "Positions without a finite score in the last hour. They are masked.",
            "none",
            Query("sum(increase(tutelage_invalid_positions_total[1h]))", "positions"),
            red_from=1,
        ),
    ]


def _requests() -> list[Json]:
    return [
        graph(
            "Requests",
            "Answered, by the door they came in by.",
            "reqps",
            Query(rate_by("transport", "tutelage_requests_total"), "{{transport}}"),
            stacked=True,
        ),
        graph(
            "Answers other than OK",
            "By the contract's code.",
            "reqps",
            Query(rate_by("code", 'tutelage_requests_total{code!="OK"}'), "{{code}}"),
            stacked=True,
        ),
        graph(
            "Sequences refused alone",
            "Per second; their neighbours in the request were scored.",
            "short",
            Query(rate_by("code", "tutelage_sequence_errors_total"), "{{code}}"),
            stacked=True,
        ),
        graph(
            "Latency",
            "From arrival to answer. A job of the queue arrives when a replica takes it.",
            "s",
            Query(quantile(0.5, "transport", BUCKETS), "{{transport}} median"),
            Query(quantile(0.99, "transport", BUCKETS), "{{transport}} p99"),
            width=12,
        ),
        heatmap(
            "Latency of all requests",
            "How the seconds from arrival to answer spread.",
            Query(rate_by("le", BUCKETS), "{{le}}"),
            width=12,
        ),
    ]


def _work() -> list[Json]:
    present = f"count by (teacher, engine, engine_version) (tutelage_teacher_info{TEACHER})"
    return [
        graph(
            "Positions scored",
            "Response positions answered, per second.",
            "short",
            Query(rate_by("teacher, instance", "tutelage_scored_positions_total"), PER_REPLICA),
            stacked=True,
        ),
        graph(
            "Tokens computed and reused",
            "Per second. Reused: taken from a cache of shared contexts.",
            "short",
            Query(rate_by("teacher", "tutelage_computed_tokens_total"), "{{teacher}} computed"),
            Query(rate_by("teacher", "tutelage_reused_tokens_total"), "{{teacher}} reused"),
            stacked=True,
        ),
        graph(
            "Speed while busy",
            "Tokens per second, as each replica measures it; from this follows what retry-after says.",
            "short",
            Query(of_teacher("tutelage_throughput_tokens_per_second"), PER_REPLICA),
        ),
        graph(
            "Tokens accepted and not yet scored",
            "In each replica.",
            "short",
            Query(of_teacher("tutelage_queued_tokens"), PER_REPLICA),
            stacked=True,
        ),
        graph(
            "Requests computed at once",
            "Seconds of compute per second, on average over the interval.",
            "none",
            Query(rate_by("teacher, instance", "tutelage_engine_compute_seconds_total"), PER_REPLICA),
        ),
        graph(
            "Requests handed to the engine",
            "Fewer than requests: the rest was refused before.",
            "reqps",
            Query(rate_by("teacher", "tutelage_engine_requests_total"), "{{teacher}}"),
        ),
        graph(
            "Jobs of the queue",
            "Per second, by what became of them.",
            "short",
            Query(rate_by("teacher, outcome", "tutelage_queue_jobs_total"), "{{teacher}} {{outcome}}"),
            stacked=True,
        ),
        graph(
            "Replicas",
            "That answer Prometheus, by engine, and that accept requests.",
            "none",
            Query(present, "{{teacher}}: {{engine}} {{engine_version}}"),
            Query(by_teacher("tutelage_ready"), "{{teacher}}: ready"),
        ),
        graph(
            "Invalid positions",
            "Without a finite score, per second. Anything but zero wants a look.",
            "short",
            Query(rate_by("teacher, instance", "tutelage_invalid_positions_total"), PER_REPLICA),
        ),
    ]


def _vllm() -> list[Json]:
    hits, asked = (rate_by("teacher", f"vllm:prefix_cache_{what}_total") for what in ("hits", "queries"))
    return [
        graph(
            "vLLM: sequences",
            "Each is a request of vLLM's own.",
            "none",
            Query(by_teacher("vllm:num_requests_running"), "{{teacher}} running"),
            Query(by_teacher("vllm:num_requests_waiting"), "{{teacher}} waiting"),
        ),
        graph(
            "vLLM: KV cache in use",
            "Near 100% sequences wait for memory.",
            "percentunit",
            Query(of_teacher("vllm:kv_cache_usage_perc"), PER_REPLICA),
        ),
        graph(
            "vLLM: prefix cache",
            "Share of the tokens looked up that were there.",
            "percentunit",
            Query(f"{hits} / {asked}", "{{teacher}}"),
        ),
        graph(
            "vLLM: tokens",
            "Per second, computed or from the cache.",
            "short",
            Query(rate_by("teacher", "vllm:prompt_tokens_total"), "{{teacher}}"),
        ),
        graph(
            "vLLM: preemptions",
            "Per second: sequences that had to make room, and are computed again.",
            "short",
            Query(rate_by("teacher, instance", "vllm:num_preemptions_total"), PER_REPLICA),
        ),
        graph(
            "vLLM: wait for a step",
            "Seconds that a sequence waits inside vLLM, p99.",
            "s",
            Query(quantile(0.99, "teacher", "vllm:request_queue_time_seconds_bucket"), "{{teacher}}"),
        ),
    ]
