"""The command line. Every command imports the process it starts only when it is called.

Bad input ends with one clear line on stderr and exit status 2, never with a traceback.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from launcher.cli_errors import one_line_errors
from launcher.cli_look import exporter, status, views
from launcher.cli_score import sample, score
from launcher.cli_teacher import PASSES_OPTIONS_ON, teacher
from launcher.queue_address import PASSWORD_BELONGS, QUEUE_URL_VARIABLE, embedded_is_ups, given_queue_url
from services.exit_status import end_here

app = typer.Typer(
    name="tutelage",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "[bold]Teacher-as-a-service for on-policy distillation of language models.[/bold]\n\n"
        "The student samples its own responses, a teacher service scores every token of them, "
        "and the student is trained on those scores."
    ),
    epilog=(
        "[bold]First steps[/bold]\n\n"
        "  tutelage quickstart                     watch a student learn on 2 CPU cores\n\n"
        "  tutelage doctor RUN.toml                would this run file work?\n\n"
        "  tutelage up recipes/quickstart.toml     the whole loop on this machine\n\n"
        "  tutelage teacher --model Qwen/Qwen3-8B  serve a teacher to any trainer\n\n"
        "[dim]tutelage COMMAND --help explains a command with examples.[/dim]"
    ),
)

RunFile = Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.", show_default=False)]
Token = Annotated[str | None, typer.Option(envvar="TUTELAGE_TOKEN", help="The teacher's access token.")]
QueueUrl = Annotated[
    str | None,
    typer.Option(
        "--queue",
        metavar="URL",
        envvar=QUEUE_URL_VARIABLE,
        help=f"The queue's address, instead of the run file's. {PASSWORD_BELONGS}",
        show_default=False,
    ),
]
MetricsHost = Annotated[
    str | None,
    typer.Option(
        help="Address of the metrics port, instead of the run file's; beyond loopback a token is required.",
        show_default=False,
    ),
]
MetricsTokenFile = Annotated[
    Path | None,
    typer.Option(
        help="Tokens of the metrics port, one per line, instead of the run file's.", show_default=False
    ),
]
EVERYTHING, PIECES, LOOK = "Everything at once", "One process at a time", "Look and check"


@app.command(rich_help_panel=EVERYTHING)
def quickstart(
    *,
    engine: Annotated[
        str, typer.Option(help="The teacher's engine: transformers, or vllm.")
    ] = "transformers",
    compare: Annotated[
        bool, typer.Option("--compare", help="Also run off-policy distillation and GRPO at equal tokens.")
    ] = False,
) -> None:
    """Train a small teacher, then improve a student with it through the real services.

    Needs no download and no GPU. The models are trained once and kept for the
    next run. Ends with a table of the teacher and the student before and after,
    and exits with status 1 when the student closed less than three quarters of
    the gap. Writes runs/quickstart or runs/quickstart-vllm (an earlier run there is
    replaced) and artifacts/quickstart.

    [bold]Examples[/bold]

      tutelage quickstart --engine vllm

      tutelage quickstart --compare
    """
    with one_line_errors():
        from launcher.quickstart import run_quickstart

        raise typer.Exit(run_quickstart(engine=engine, compare=compare))


@app.command(rich_help_panel=EVERYTHING)
def up(run_file: RunFile, *, queue: QueueUrl = None) -> None:
    """Run a whole training on this machine: queue, teachers, sampler and trainer.

    Shows progress, keeps the log of each process in RUN_DIR/logs, restarts a
    process that dies, and stops cleanly on Ctrl-C (once: everything is saved;
    twice: at once). The same command again continues an interrupted run.

    [bold]Example[/bold]

      tutelage up recipes/quickstart.toml
    """
    with one_line_errors():
        from launcher.up import run_up

        raise typer.Exit(run_up(run_file, queue_url=given_queue_url(queue)))


app.command(rich_help_panel=PIECES, context_settings=PASSES_OPTIONS_ON)(teacher)
app.command(rich_help_panel=PIECES)(exporter)


@app.command(rich_help_panel=PIECES)
def rollout(
    run_file: RunFile,
    *,
    name: Annotated[
        str, typer.Option(help="Name of this process, unique among the run's samplers.")
    ] = "sampler-0",
    engine: Annotated[
        Literal["transformers", "vllm"] | None,
        typer.Option(
            help="What computes, instead of the run file's \\[sampling] engine.", show_default=False
        ),
    ] = None,
    queue: QueueUrl = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            help="Port of /health and /metrics, instead of the run file's; without one it listens nowhere.",
            show_default=False,
        ),
    ] = None,
    metrics_host: MetricsHost = None,
    metrics_token_file: MetricsTokenFile = None,
) -> None:
    """Sample responses for a run, as one of its rollout processes.

    Takes orders from the run's queue, samples with the policy version that the
    order asks for, and hands the responses to the teachers.

    [bold]Examples[/bold]

      tutelage rollout run.toml --name sampler-1

      tutelage rollout run.toml --name sampler-2 --engine vllm --metrics-port 9467
    """
    with one_line_errors():
        from student_trainer.config import load_run_config

        metrics = {"sampler_port": metrics_port, "host": metrics_host, "token_file": metrics_token_file}
        config = load_run_config(
            run_file, sampling_engine=engine, queue_url=given_queue_url(queue), metrics=metrics
        )
        from student_trainer.sampler.process import main as sampler

        with embedded_is_ups(config):
            status = sampler(config, name)
        raise typer.Exit(status)


@app.command(rich_help_panel=PIECES)
def train(
    run_file: RunFile,
    *,
    queue: QueueUrl = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(help="Port of /health and /metrics, instead of the run file's.", show_default=False),
    ] = None,
    metrics_host: MetricsHost = None,
    metrics_token_file: MetricsTokenFile = None,
    unfinished_status: Annotated[
        int,
        typer.Option(
            min=0,
            max=255,
            help="Exit status when stopped (SIGTERM, SIGINT) before the last step. For starters that take 0 "
            "for a finished run, as a Kubernetes Job and torchrun do: give another one there.",
        ),
    ] = 0,
) -> None:
    """Train the student of a run, continuing from its newest checkpoint.

    Orders groups from the run's samplers and trains on what its teachers scored: start
    them beside it, with the same queue. SIGTERM and Ctrl-C finish the step and save. On
    several GPUs: torchrun --nproc-per-node N -m launcher train RUN.toml.

    [bold]Examples[/bold]

      tutelage train run.toml

      tutelage train run.toml --unfinished-status 75
    """
    with one_line_errors():
        from student_trainer.config import load_run_config

        metrics = {"trainer_port": metrics_port, "host": metrics_host, "token_file": metrics_token_file}
        config = load_run_config(run_file, queue_url=given_queue_url(queue), metrics=metrics)
        from launcher.self_teachers import scoring_in_process
        from student_trainer.train import main as trainer

        with embedded_is_ups(config), scoring_in_process(config):
            status = trainer(config, unfinished_status)
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            end_here(status)  # torchrun would take an abort after the end for a failure of the run
        raise typer.Exit(status)


app.command(rich_help_panel=LOOK)(status)
app.command(rich_help_panel=LOOK)(views)


@app.command(rich_help_panel=LOOK)
def doctor(
    run_file: RunFile,
    *,
    download: Annotated[
        bool, typer.Option("--download", help="Fetch configuration and tokenizer of hub models (no weights).")
    ] = False,
    token: Token = None,
    queue: QueueUrl = None,
) -> None:
    """Check a run file against everything it names, before any time is spent.

    The objective against the limits of every teacher, tokenizers and vocabularies
    of student and teachers, memory, the queue and its settings. Says what it could
    not check, and exits with status 1 when something would fail.

    [bold]Example[/bold]

      tutelage doctor recipes/qwen3-8b-to-0.6b.toml
    """
    with one_line_errors():
        from launcher.doctor import run_doctor

        queue_url = given_queue_url(queue)
        raise typer.Exit(run_doctor(run_file, download=download, token=token, queue_url=queue_url))


@app.command(rich_help_panel=LOOK)
def report(
    run_directory: Annotated[
        Path,
        typer.Argument(
            metavar="RUN_DIR", show_default=False, help="What the run file calls \\[run] directory."
        ),
    ],
) -> None:
    """Write one HTML page and PNGs about a run, finished or not.

    Accuracy, KL to the teacher, loss, throughput, and sample rollouts with every
    token coloured by what the teacher thought of it. The page, RUN_DIR/report.html,
    needs no network; the PNGs are in RUN_DIR/report.

    [bold]Example[/bold]

      tutelage report runs/quickstart
    """
    with one_line_errors():
        from student_trainer.report.page import write_report

        print(write_report(run_directory))


app.command(rich_help_panel=LOOK)(sample)
app.command(rich_help_panel=LOOK)(score)


@app.command(rich_help_panel=LOOK)
def bench(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Which figures; all when none is named.")
    ] = None,
) -> None:
    """Measure this machine: our scoring, loss and wire side by side with their peers.

    Prints a table and writes benchmarks/results/latest.jsonl. Needs a clone of the
    repository as the working directory.

    [bold]Example[/bold]

      tutelage bench
    """
    with one_line_errors():
        from launcher.bench import run_benchmarks

        raise typer.Exit(run_benchmarks(names or []))


def main() -> None:
    """Entry point of the console script."""
    app()
