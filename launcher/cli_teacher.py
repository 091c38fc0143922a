"""`tutelage teacher`: command-line options to the settings of one replica."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from launcher.cli_errors import checked, one_line_errors
from launcher.queue_address import PASSWORD_BELONGS, QUEUE_URL_VARIABLE, given_queue_url
from launcher.vllm_arguments import parse_engine_arguments

# With --engine vllm, an option that is not ours is vLLM's.
PASSES_OPTIONS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}
VLLM = "Engine vllm (its names; any other engine argument of vLLM may be given, too)"


def teacher(
    context: typer.Context,
    *,
    model: Annotated[
        str | None, typer.Option(metavar="PATH_OR_ID", help="Local directory or hub id.", show_default=False)
    ] = None,
    follow: Annotated[
        Path | None,
        typer.Option(
            metavar="DIRECTORY",
            help="Instead of a model: weights that a trainer publishes here, always the newest or those that "
            "a job pins. RUN_DIR/policy, RUN_DIR/ema or RUN_DIR/initial.",
            show_default=False,
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="The name callers ask for.")] = "teacher",
    engine: Annotated[
        str,
        typer.Option(help="transformers, vllm, file (answers from --scores), or fake (no model, for tests)."),
    ] = "transformers",
    scores: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.parquet", help="What `tutelage score` wrote, for --engine file.", show_default=False
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Revision of a hub model.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]DIR",
            help="A LoRA adapter (PEFT): another teacher, called NAME, on the same engine; without NAME, of "
            "the replica's own name, in place of the bare model. With engine vllm it may be repeated.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENIZER",
            help="The model judges responses in words, and answers no log-probability. Callers' ids are of "
            "this tokenizer, a directory or hub id: the student's. More with --set judge.KEY=VALUE.",
            show_default=False,
        ),
    ] = None,
    writer: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENIZER",
            help="The model writes on from places in responses, says how far its text agrees with theirs, "
            "and answers no log-probability. Callers' ids are of this tokenizer, as with --judge. More with "
            "--set writer.KEY=VALUE.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    max_batch_tokens: Annotated[
        int, typer.Option(help="Tokens of one forward pass; not of engine vllm.")
    ] = 16_384,
    deterministic: Annotated[
        bool, typer.Option("--deterministic", help="Each request in its own pass, one thread.")
    ] = False,
    threads: Annotated[int | None, typer.Option(help="CPU threads of the engine.")] = None,
    tensor_parallel_size: Annotated[
        int, typer.Option(help="GPUs that share one copy of the weights.", rich_help_panel=VLLM)
    ] = 1,
    gpu_memory_utilization: Annotated[
        float | None, typer.Option(help="Share of a GPU's memory that vLLM takes.", rich_help_panel=VLLM)
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest sequence in tokens.", rich_help_panel=VLLM)
    ] = None,
    quantization: Annotated[
        str | None, typer.Option(help="How weights are quantized.", rich_help_panel=VLLM)
    ] = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one step.", rich_help_panel=VLLM)
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Sequences of one step.", rich_help_panel=VLLM)
    ] = None,
    enforce_eager: Annotated[
        bool, typer.Option("--enforce-eager", help="No compilation, no CUDA graphs.", rich_help_panel=VLLM)
    ] = False,
    kv_cache_memory_bytes: Annotated[
        int | None, typer.Option(help="Size of the KV cache.", rich_help_panel=VLLM)
    ] = None,
    implementation: Annotated[
        str,
        typer.Option(
            help="pooling; or stock: vLLM's own prompt_logprobs, for models that the first cannot serve.",
            rich_help_panel=VLLM,
        ),
    ] = "pooling",
    host: Annotated[
        str, typer.Option(help="Address to listen on; beyond loopback a token is required.")
    ] = "127.0.0.1",
    grpc_port: Annotated[int, typer.Option(help="0: any free port.")] = 50051,
    http_port: Annotated[int, typer.Option(help="0: any free port.")] = 8081,
    metrics_port: Annotated[int | None, typer.Option(help="Own port for /metrics.")] = None,
    token: Annotated[
        list[str] | None,
        typer.Option(envvar="TUTELAGE_TOKEN", help="Accepted bearer token; may be repeated."),
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="More tokens, one per line.")] = None,
    tls_certificate: Annotated[Path | None, typer.Option(help="PEM chain; turns TLS on.")] = None,
    tls_key: Annotated[Path | None, typer.Option(help="PEM private key.")] = None,
    tls_client_authority: Annotated[
        Path | None, typer.Option(help="PEM; callers must then present a certificate of it.")
    ] = None,
    queue: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            envvar=QUEUE_URL_VARIABLE,
            help=f"Also take jobs from this Redis or Valkey. {PASSWORD_BELONGS}",
        ),
    ] = None,
    namespace: Annotated[str, typer.Option(help="Prefix of the queue's keys.")] = "tutelage",
    heartbeat_seconds: Annotated[float, typer.Option(help="How often leases are renewed.")] = 5.0,
    consumer: Annotated[str | None, typer.Option(help="This replica's name in the queue.")] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|URL",
            envvar="TUTELAGE_CACHE",
            help="Keep scores in this directory or Redis, and answer from there what was scored before. "
            "With a password, set TUTELAGE_CACHE instead.",
        ),
    ] = None,
    ready_file: Annotated[Path | None, typer.Option(help="Written with the addresses once ready.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting, dotted: limits.max_top_k=512, service.max_queued_tokens=2000000, "
            "fake.vocab_size=32. May be repeated.",
        ),
    ] = None,
) -> None:
    """Serve a teacher: one replica, over gRPC and HTTP, and from the queue when given one.

    Answers requests for log-probabilities of response tokens. SIGTERM drains: what
    was accepted is finished first.

    [bold]Examples[/bold]

      tutelage teacher --model Qwen/Qwen3-8B --dtype bfloat16

      tutelage teacher --model ./teacher --queue redis://10.0.0.5:6379

      tutelage teacher --model Qwen/Qwen3-32B --engine vllm --tensor-parallel-size 2 --kv-cache-dtype fp8

      tutelage teacher --follow runs/run/ema --name run.ema --queue redis://10.0.0.5:6379

      tutelage teacher --model ./base --engine vllm --adapter math=./math-lora --adapter code=./code-lora

      tutelage teacher --engine fake --set fake.vocab_size=32
    """
    engine_args = _engine_args(context, engine)
    with one_line_errors():
        from services.teacher.settings import TeacherSettings

        tls = {"certificate": tls_certificate, "key": tls_key, "client_authority": tls_client_authority}
        settings: dict[str, Any] = {
            "name": name,
            "engine": engine,
            "model": model,
            "scores": scores,
            "follow": follow,
            "revision": revision,
            "adapters": _adapters(adapter or [], name),
            "judge": None if judge is None else {"tokenizer": judge},
            "writer": None if writer is None else {"tokenizer": writer},
            "dtype": dtype,
            "device": device,
            "max_batch_tokens": max_batch_tokens,
            "deterministic": deterministic,
            "threads": threads,
            "vllm": {
                "tensor_parallel_size": tensor_parallel_size,
                "gpu_memory_utilization": gpu_memory_utilization,
                "max_model_len": max_model_len,
                "quantization": quantization,
                "max_num_batched_tokens": max_num_batched_tokens,
                "max_num_seqs": max_num_seqs,
                "enforce_eager": enforce_eager,
                "kv_cache_memory_bytes": kv_cache_memory_bytes,
                "implementation": implementation,
                "engine_args": engine_args,
            },
            "service": {
                "host": host,
                "grpc_port": grpc_port,
                "http_port": http_port,
                "metrics_port": metrics_port,
                "tokens": tuple(token or ()),
                "token_file": token_file,
                "tls": tls if any(tls.values()) else None,
            },
            "queue_url": given_queue_url(queue),
            "namespace": namespace,
            "heartbeat_seconds": heartbeat_seconds,
            "ready_file": ready_file,
        }
        if consumer is not None:
            settings["consumer"] = consumer
        if cache is not None:
            settings["cache"] = {"location": cache}
        for text in set_ or []:
            _set(settings, text)
        wanted = checked(TeacherSettings, settings)
        from services.teacher.process import main as replica

        raise typer.Exit(replica(wanted))


def _engine_args(context: typer.Context, engine: str) -> dict[str, Any]:
    """Options that are not ours: vLLM's, or a mistake."""
    if context.args and engine != "vllm":
        word = context.args[0].partition("=")[0]
        if not word.startswith("-"):
            context.fail(f"Got unexpected extra argument ({word}).")
        ours = [option for parameter in context.command.params for option in parameter.opts]
        near = difflib.get_close_matches(word, ours, n=1)
        context.fail(f"No such option '{word}'." + (f" Did you mean '{near[0]}'?" if near else ""))
    try:
        return parse_engine_arguments(context.args)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--engine vllm") from error


def _adapters(words: list[str], own_name: str) -> dict[str, str]:
    """Directories by teacher name, from [NAME=]DIR; what has a slash before its '=' is a directory."""
    adapters: dict[str, str] = {}
    for word in words:
        name, equals, directory = word.partition("=")
        if not equals or "/" in name:
            name, directory = own_name, word
        if name in adapters:
            raise typer.BadParameter(f"got two for {name!r}, each teacher has one", param_hint="--adapter")
        adapters[name] = directory
    return adapters


def _set(settings: dict[str, Any], text: str) -> None:
    """Apply one KEY=VALUE; the settings themselves refuse keys that do not exist.

    No complaint repeats the value: it may be a token.
    """
    key, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter("got no '=', must be KEY=VALUE", param_hint="--set")
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
        if not isinstance(settings, dict):
            raise typer.BadParameter(f"got {key!r}, {section} has no settings of its own", param_hint="--set")
    settings[last] = value
