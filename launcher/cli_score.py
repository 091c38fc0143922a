"""`tutelage sample` and `tutelage score`: responses into files, and what a teacher says about them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from launcher.cli_errors import one_line_errors


def sample(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.toml", help="The run file.", show_default=False)],
    *,
    groups: Annotated[int, typer.Option(min=1, help="Prompts, in the order in which the run takes them.")],
    output: Annotated[Path, typer.Option(help="A .jsonl file.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH_OR_ID", help="Sample with this model, instead of the student.", show_default=False
        ),
    ] = None,
) -> None:
    """Sample responses of a run's student before training, into a file.

    Each line has the token ids of a context and a response, the log-probabilities at
    which the response was sampled, and the number of the example: what `tutelage score`
    reads, and with its scores, what a run replays.

    [bold]Example[/bold]

      tutelage sample recipes/lightning.toml --groups 2048 --output artifacts/lightning/rollouts.jsonl
    """
    with one_line_errors():
        from launcher.sample import sample_file

        raise typer.Exit(sample_file(run_file, groups=groups, output=output, model=model))


def score(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", show_default=False, help="What to score.")],
    *,
    teacher: Annotated[str | None, typer.Option(metavar="HOST:PORT", help="A running teacher.")] = None,
    name: Annotated[
        str, typer.Option(help="The teacher's name, where the address answers for several.")
    ] = "",
    model: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="Load this model here instead.")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="What computes with --model: transformers or vllm.")
    ] = "transformers",
    tokenizer: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="For text; the model's own by default.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(help="A .parquet or .jsonl file. \\[default: FILE.scores.jsonl]", show_default=False),
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Most probable tokens per position.")] = 0,
    entropy: Annotated[bool, typer.Option("--entropy", help="Also the teacher's entropy.")] = False,
    temperature: Annotated[float, typer.Option(help="Temperature of the log-probabilities.")] = 1.0,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens of one request.")] = 16_384,
    written_by: Annotated[
        str, typer.Option(help="The model that wrote what the responses' author was trained on; noted.")
    ] = "",
    token: Annotated[
        str | None, typer.Option(envvar="TUTELAGE_TOKEN", help="The teacher's access token.")
    ] = None,
) -> None:
    """Score the responses of a file against a teacher.

    Each line is an object with context_ids and response_ids; or with prompt (text or
    chat messages) and response as text; or with messages of which the assistant's is the
    last. --tokenizer or --model says how text is read. An id, behaviour_logprobs,
    sampling_temperature, finished and example are kept.

    A .parquet output is a score file: a run may answer from it and replay it. A command
    that was killed goes on where it stood when it is given again.

    [bold]Examples[/bold]

      tutelage score rollouts.jsonl --teacher 127.0.0.1:50051 --top-k 8 --output scores.parquet

      tutelage score answers.jsonl --model Qwen/Qwen3-8B --engine vllm
    """
    with one_line_errors():
        from tutelage_client.types import Signal

        from launcher.score import ScoreOptions, score_file

        options = ScoreOptions(
            teacher=teacher,
            model=model,
            engine=engine,
            tokenizer=tokenizer,
            output=output or file.with_suffix(".scores.jsonl"),
            signal=Signal(top_k=top_k, entropy=entropy, temperature=temperature),
            batch_tokens=batch_tokens,
            token=token,
            name=name,
            written_by=written_by,
        )
        raise typer.Exit(score_file(file, options))
