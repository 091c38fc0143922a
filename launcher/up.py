"""`tutelage up RUN.toml`: the whole loop on one machine, every part a process of its own."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from tutelage_client.errors import TutelageError

from launcher.children import ChildSpec, RestartPolicy
from launcher.lost_files import check_files
from launcher.progress import make_view
from launcher.queue_address import QUEUE_URL_VARIABLE
from launcher.replica_sets import ReplicaSet, replica_sets
from launcher.snapshots import Lookout
from launcher.supervisor import Ending, Supervisor, install_signals
from launcher.vllm_arguments import spell_settings
from services.logs import log_to_stderr

if TYPE_CHECKING:
    from launcher.progress import View
    from services.models.text_settings import TextTeacherSettings
    from services.queue.embedded import EmbeddedServer
    from student_trainer.config import RunConfig

STATE = "up.json"
CACHE_VARIABLE = "TUTELAGE_CACHE"  # of `tutelage teacher --cache`; the address may hold a password
EXIT_CODES: dict[Ending, int] = {"finished": 0, "failed": 1, "stopped": 130}


def run_up(run_file: Path, policy: RestartPolicy | None = None, queue_url: str | None = None) -> int:
    """Run until the trainer is done; 0 finished, 1 failed, 130 stopped by a signal.

    Args:
        queue_url: takes the place of the run file's [queue] url.

    Raises:
        RunFileError: the run file cannot be used.
        TutelageError: another `up` works on the run, a file that it names is not there, or the embedded
            queue does not start.
    """
    from student_trainer.config import load_run_config

    log_to_stderr(logging.ERROR)  # the supervisor says itself when the queue is away
    config = load_run_config(run_file, queue_url=queue_url)
    config.run.directory.mkdir(parents=True, exist_ok=True)
    with only_one(config.run.directory), make_view() as view:
        if _finished(config):
            directory = config.run.directory
            view.say(f"run {config.run.name!r} is finished: {config.training.steps} steps in {directory}")
            if changed := _changed(config):
                view.say("nothing was trained with its run file as it is now", changed, problem=True)
                view.say(f"no run goes on so: choose another [run] directory and name, or remove {directory}")
            else:
                view.say(f"with more training.steps it goes on; for a fresh one, remove {directory}")
            return 0
        check_files(config)
        server = _embedded(config)
        url = server.start() if server is not None else config.queue.url
        specs = child_specs(config, run_file, url)
        supervisor = Supervisor(
            specs, config.run.directory / "logs", view, server, policy=policy or RestartPolicy()
        )
        lookout = Lookout(config, lambda: supervisor.children)
        ending = asyncio.run(_supervise(supervisor, lookout, view))
        _conclude(config, run_file, ending, supervisor.reason, view)
    return EXIT_CODES[ending]


async def _supervise(supervisor: Supervisor, lookout: Lookout, view: View) -> Ending:
    install_signals(supervisor.request_stop)
    watching = asyncio.create_task(lookout.run(view))
    try:
        return await supervisor.run(lookout.says_finished)
    finally:
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching
        await lookout.close()


def _conclude(config: RunConfig, run_file: Path, ending: Ending, reason: str, view: View) -> None:
    _write_state(config, ending)
    directory = config.run.directory
    if ending == "finished":
        view.say(f"finished: {config.training.steps} steps; the student is in {directory / 'student'}")
    elif ending == "stopped":
        view.say(f"stopped; `tutelage up {run_file}` continues from the last checkpoint")
    else:
        view.say(f"the run has FAILED: {reason}. Logs: {directory / 'logs'}", problem=True)


def child_specs(config: RunConfig, run_file: Path, queue_url: str) -> tuple[ChildSpec, ...]:
    """The processes of a run in the order they start: teachers, trainer, samplers."""
    specs = []
    # The address may hold a password; a command line is for every user of the machine to read.
    queue = {QUEUE_URL_VARIABLE: queue_url}
    for replicas in replica_sets(config.teachers):
        if replicas.entry.address is None:
            specs += [_replica(config, replicas, index, queue) for index in range(replicas.entry.replicas)]
    if not config.self_teacher.in_process:
        for name, entry in config.implied_teachers().items():
            alone = ReplicaSet(name, entry, (name,), {})
            specs += [_replica(config, alone, index, queue) for index in range(entry.replicas)]
    train = ("train", str(run_file))
    specs.append(ChildSpec("trainer", "trainer", train, grace_seconds=120.0, environment=queue))
    for name in (f"sampler-{index}" for index in range(config.sampling.replicas)):
        rollout = ("rollout", str(run_file), "--name", name)
        specs.append(ChildSpec(name, "sampler", rollout, environment=queue))
    return tuple(specs)


def _replica(config: RunConfig, replicas: ReplicaSet, index: int, queue: Mapping[str, str]) -> ChildSpec:
    name, entry = replicas.name, replicas.entry
    replica = f"{name}-{index}"
    arguments = [
        *(
            "teacher",
            "--name",
            name,
            "--engine",
            entry.engine if entry.scores is None else "file",
            "--dtype",
            entry.dtype,
            "--device",
            entry.device,
        ),
        *("--max-batch-tokens", str(entry.max_batch_tokens), "--grpc-port", "0", "--http-port", "0"),
        *("--namespace", config.queue.namespace, "--consumer", replica),
        *("--heartbeat-seconds", str(config.queue.heartbeat_seconds)),
        *("--ready-file", str(config.run.directory / "logs" / f"{replica}.ready.json")),
    ]
    if (directory := config.followed(name)) is not None:
        arguments += ["--follow", str(directory)]
    elif entry.model is not None:
        arguments += ["--model", entry.model]
    if entry.scores is not None:
        arguments += ["--scores", str(entry.scores)]
    if entry.revision is not None and directory is None:
        arguments += ["--revision", entry.revision]
    for teacher, directory in replicas.adapters.items():
        arguments += ["--adapter", f"{teacher}={directory}"]
    if config.run.deterministic:
        arguments.append("--deterministic")
    for kind, settings in (("judge", entry.judge), ("writer", entry.writer)):
        if settings is not None:
            arguments += _of_words(kind, settings, config.student.model)
    arguments += spell_settings(entry.vllm)
    # Said here or nowhere: what this command's own environment names is not meant for every teacher.
    environment = {**queue, CACHE_VARIABLE: entry.cache or ""}
    if config.threads is not None:
        if entry.engine == "vllm":
            environment["OMP_NUM_THREADS"] = str(config.threads)
        else:
            arguments += ["--threads", str(config.threads)]
    return ChildSpec(replica, "teacher", tuple(arguments), environment=environment)


def _of_words(kind: str, settings: TextTeacherSettings, student: str) -> list[str]:
    """A judge's or a writer's settings; the ids it is sent are the student's unless they say otherwise."""
    own = settings.model_dump(exclude={"tokenizer"}, exclude_defaults=True)
    words = [word for key, value in own.items() for word in ("--set", f"{kind}.{key}={value}")]
    return [f"--{kind}", settings.tokenizer or student, *words]


def _embedded(config: RunConfig) -> EmbeddedServer | None:
    if config.queue.url != "embedded":
        return None
    from services.queue.embedded import EmbeddedServer

    return EmbeddedServer(config.run.directory / "queue", dies_with_parent=True)


@contextmanager
def only_one(directory: Path) -> Iterator[None]:
    """Hold the run directory; a second `up` on it is refused while this one lives."""
    with (directory / "up.lock").open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TutelageError(
                "FAILED_PRECONDITION", f"{directory}: another `tutelage up` is working on this run"
            ) from None
        yield


def _finished(config: RunConfig) -> bool:
    path = config.run.directory / STATE
    if not path.is_file():
        return False
    state = json.loads(path.read_text())
    return bool(state["ending"] == "finished" and state["steps"] >= config.training.steps)


def _changed(config: RunConfig) -> list[str]:
    """What of the settings under which a finished run was trained the run file says otherwise."""
    from student_trainer.checkpoint import CheckpointStore
    from student_trainer.resume import differences, fixed_settings

    ledger = CheckpointStore(config.run.directory / "checkpoints").last_ledger()
    return [] if ledger is None else differences(fixed_settings(config, config.plan()), ledger)


def _write_state(config: RunConfig, ending: Ending) -> None:
    path = config.run.directory / STATE
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({"ending": ending, "steps": config.training.steps}))
    temporary.replace(path)
