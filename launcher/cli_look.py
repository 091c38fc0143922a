"""`tutelage status`, `exporter` and `views`: command-line options of what only looks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launcher.cli_errors import one_line_errors
from launcher.queue_address import PASSWORD_BELONGS, QUEUE_URL_VARIABLE, embedded_is_ups, given_queue_url

if TYPE_CHECKING:
    from student_trainer.config import RunConfig

QueueUrl = Annotated[
    str | None,
    typer.Option(
        "--queue",
        metavar="URL",
        envvar=QUEUE_URL_VARIABLE,
        help=f"The queue's address: redis://, rediss:// or unix://. {PASSWORD_BELONGS}",
        show_default=False,
    ),
]
Namespace = Annotated[str, typer.Option(help="Prefix of the queue's keys.")]
Heartbeat = Annotated[
    float, typer.Option(help="Of the replicas, as in the run file: it says when a lease has run out.")
]


def exporter(
    *,
    queue: QueueUrl = None,
    namespace: Namespace = "tutelage",
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback a token is required.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: any free port.")] = 9465,
    token: Annotated[
        list[str] | None,
        typer.Option(envvar="TUTELAGE_TOKEN", help="Accepted bearer token; may be repeated."),
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="More tokens, one per line.")] = None,
    heartbeat_seconds: Heartbeat = 5.0,
) -> None:
    """Tell Prometheus what is in the queue: the signal that teachers are scaled by.

    Serves /metrics (and /health, which needs no token): tokens that wait for each
    teacher and tokens its replicas hold, the age of the oldest job, replicas, dead
    letters; orders, scored groups, samplers and trainer of each run; the server's
    memory. Asks the queue at every scrape, and keeps nothing: while the queue is away
    there is tutelage_queue_up 0 and nothing else. One exporter is enough.

    [bold]Examples[/bold]

      tutelage exporter --queue redis://10.0.0.5:6379

      tutelage exporter --queue redis://10.0.0.5:6379 --host 0.0.0.0 --token-file /run/tutelage/token
    """
    with one_line_errors():
        from services.exporter.process import ExporterSettings
        from services.exporter.process import main as export

        settings = ExporterSettings.model_validate(
            {
                "queue_url": needed_queue_url(queue),
                "namespace": namespace,
                "heartbeat_seconds": heartbeat_seconds,
                "host": host,
                "port": port,
                "tokens": tuple(token or ()),
                "token_file": token_file,
            }
        )
        raise typer.Exit(export(settings))


def status(
    run_file: Annotated[
        Path | None,
        typer.Argument(metavar="[RUN.toml]", help="Says where the queue is, and what should be there."),
    ] = None,
    *,
    queue: QueueUrl = None,
    namespace: Namespace = "tutelage",
    heartbeat_seconds: Heartbeat = 5.0,
    once: Annotated[
        bool, typer.Option("--once", help="Print a table and end; 1 when the queue does not answer.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object and end.")] = False,
) -> None:
    """Watch a running stack: teachers and runs, straight from the queue.

    For each teacher its replicas, the tokens that wait and those that are being
    scored, the oldest job, scored jobs per second and dead letters; for each run its
    step, loss, KL, accuracy, samplers and staleness, what it is doing and what is
    missing. Without a terminal it prints once.

    [bold]Examples[/bold]

      tutelage status recipes/quickstart.toml

      tutelage status --queue redis://10.0.0.5:6379

      tutelage status --queue redis://10.0.0.5:6379 --json
    """
    with one_line_errors():
        config = _run_config(run_file, queue)
        if config is None:
            url = needed_queue_url(queue)
        else:
            from student_trainer.run_queue import queue_url

            url, namespace = queue_url(config), config.queue.namespace
            heartbeat_seconds = config.queue.heartbeat_seconds
        from launcher.status import watch

        with embedded_is_ups(config):
            ended = watch(
                url,
                namespace,
                heartbeat_seconds=heartbeat_seconds,
                expected=config,
                once=once,
                as_json=json_,
            )
        raise typer.Exit(ended)


def views(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.", show_default=False)],
    *,
    example: Annotated[
        int, typer.Option(min=0, help="Which example, counted in the order in which the run takes them.")
    ] = 0,
    response: Annotated[
        list[str] | None,
        typer.Option(
            help="A response, as if the student had sampled it; several are siblings of one group.",
            show_default=False,
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every token, not only those around the first position.")
    ] = False,
) -> None:
    """Show what each view would see for one example, before anything is trained.

    For each view: who scores it, which of its templates was filled and what the others
    lack, its context with everything that the student does not see between ⟦ and ⟧,
    and the tokens with their positions: position t scores response token t. Reads the
    data and the student's tokenizer, no model and no queue.

    [bold]Examples[/bold]

      tutelage views run.toml

      tutelage views run.toml --example 7 --response "12,13,09:932" --response "12,13,08:832"
    """
    with one_line_errors():
        from rich.console import Console
        from tutelage_client.errors import invalid

        from services.models.load import load_tokenizer
        from student_trainer.config import load_run_config

        config = load_run_config(run_file)
        tokenizer = load_tokenizer(config.student.model, config.student.revision)
        if tokenizer is None:
            raise invalid(f"student.model: {config.student.model} has no tokenizer")
        from launcher.preview import preview
        from launcher.preview_view import render

        found = preview(config, tokenizer, example, response or [])
        Console(highlight=False).print(render(found, tokenizer, everything=everything))


def needed_queue_url(option: str | None) -> str:
    """The queue's address from wherever it is said; raises TutelageError when it is said nowhere."""
    found = given_queue_url(option)
    if found is None:
        from tutelage_client.errors import invalid

        raise invalid(
            f"queue: got no address; give --queue redis://HOST:PORT, or set {QUEUE_URL_VARIABLE} "
            f"or {QUEUE_URL_VARIABLE}_FILE"
        )
    return found


def _run_config(run_file: Path | None, queue: str | None) -> RunConfig | None:
    if run_file is None:
        return None
    from student_trainer.config import load_run_config

    return load_run_config(run_file, queue_url=given_queue_url(queue))
