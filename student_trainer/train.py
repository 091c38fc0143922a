"""The trainer process: parse, build, train, close. Under torchrun rank 0 trains and the others follow it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from contextlib import closing

import structlog
import torch
from transformers.utils.logging import disable_progress_bar
from tutelage_client.errors import TutelageError, invalid

from services import tracing
from services.logs import log_to_stderr
from services.queue import TRAINER_ROLE, Queue, sampler_role, teacher_role
from student_trainer.cached_scores import check_cached_scores
from student_trainer.channels import Channels, channels_of
from student_trainer.checkpoint import CheckpointStore
from student_trainer.collect import Collector
from student_trainer.config import RunConfig
from student_trainer.evaluations import Evaluations
from student_trainer.follower import follow
from student_trainer.learner import Learner
from student_trainer.metrics import open_trackers
from student_trainer.objective.custom import check_functions
from student_trainer.objective.plan import Plan
from student_trainer.objective.settings import ObjectiveError
from student_trainer.pacing import Pacer
from student_trainer.ranks import Ranks, accompany, is_loss, join
from student_trainer.recording import Recorder
from student_trainer.resume import restore
from student_trainer.run_queue import run_queue
from student_trainer.sharding import check_objective
from student_trainer.status import StatusServer
from student_trainer.student import Student, load_student
from student_trainer.trainer import Parts, Trainer, describe
from student_trainer.verify import Expectations
from student_trainer.waiting import Watch

log = structlog.get_logger(__name__)

LOST_SECONDS = 5.0  # for telling of a lost rank


def main(config: RunConfig, unfinished_status: int = 0) -> int:
    """Train until the last step, SIGTERM or SIGINT, and the run can be continued; the exit status.

    Args:
        unfinished_status: what is returned when the run was stopped before its end.

    Raises:
        TutelageError: the run cannot go on; says what is wrong.
    """
    log_to_stderr()
    with join(config.student.device, config.training.rank_timeout_seconds) as ranks:
        _configure_torch(config)
        plan = config.plan()
        check_objective(plan, ranks.world)
        _check_functions(plan)
        if not ranks.leads:
            finished = follow(_load_learner(config, plan, ranks), ranks)
            return 0 if finished else unfinished_status
        tracing.start("tutelage-trainer", config.run.name)
        try:
            finished = asyncio.run(_train(config, plan, ranks))
        finally:
            tracing.stop()
        ranks.tell("end", finished=finished)
    return 0 if finished else unfinished_status


def _check_functions(plan: Plan) -> None:
    """Before anything waits: the user's functions are imported, and a divergence is tried."""
    try:
        check_functions(plan)
    except ObjectiveError as error:
        raise invalid(str(error)) from error


async def _train(config: RunConfig, plan: Plan, ranks: Ranks) -> bool:
    """Whether the run has come to its end."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    for warning in plan.warnings:
        log.warning("objective", warning=warning)
    queue = run_queue(config)
    try:
        if ranks.alone:
            await queue.open()  # before the student is loaded: a wrong address is told at once
        with (
            queue.presence(TRAINER_ROLE, config.run.name),
            StatusServer(config.metrics, config.run.name) as status,
        ):
            log.info("status port", address=status.address)
            learner = _load_learner(config, plan, ranks)
            try:
                work = _lead(config, queue=queue, status=status, stop=stop, learner=learner, ranks=ranks)
                return await accompany(ranks, work, stop)
            except Exception as error:
                if is_loss(error):
                    await _say_lost(config, queue)
                raise
    finally:
        await queue.close()


async def _lead(
    config: RunConfig,
    *,
    queue: Queue,
    status: StatusServer,
    stop: asyncio.Event,
    learner: Learner,
    ranks: Ranks,
) -> bool:
    """The run, from the queue's first answer on; beside it the other ranks are told to wait."""
    if not ranks.alone:
        await queue.open(patience=None)  # giving up would cost one of torchrun's restarts
    parts = await _build(config, queue=queue, status=status, stop=stop, learner=learner, ranks=ranks)
    log.info("training", **describe(parts))
    with closing(parts.recorder):
        try:
            return await Trainer(parts).run()
        except Exception as error:
            if not is_loss(error):
                await parts.recorder.status(f"failed: {error}", parts.ledger)
            raise


async def _say_lost(config: RunConfig, queue: Queue) -> None:
    """The run has not failed: torchrun starts the ranks again, and sooner than an absent queue returns."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LOST_SECONDS):
            await queue.publish_progress(config.run.name, {"status": "restarting: lost a rank"})


async def _build(
    config: RunConfig,
    *,
    queue: Queue,
    status: StatusServer,
    stop: asyncio.Event,
    learner: Learner,
    ranks: Ranks,
) -> Parts:
    """Find where the run stands, and connect everything to it."""
    plan = learner.plan
    cached = check_cached_scores(config, plan, learner.student.fingerprint)
    cached.raise_for_problems()
    for warning in cached.warnings:
        log.warning("cached scores", warning=warning)
    checkpoints = CheckpointStore(config.run.directory / "checkpoints", ranks)
    ledger = restore(config, checkpoints, learner)
    await _check_queue(config, queue, ledger.run_id)
    channels = Channels(config, learner, ledger)
    pacer = Pacer(queue, config, ledger)
    roles = [sampler_role(config.run.name), *map(teacher_role, plan.scoring_teachers)]
    watch = Watch(queue, config.run.name, roles)
    return Parts(
        config=config,
        queue=queue,
        learner=learner,
        ledger=ledger,
        checkpoints=checkpoints,
        channels=channels,
        pacer=pacer,
        collector=Collector(
            config=config,
            reader=queue.scored(config.run.name),
            pacer=pacer,
            watch=watch,
            ledger=ledger,
            expected=_expectations(config, plan, learner.student),
            stop=stop,
        ),
        evaluations=Evaluations(queue, config, ledger, channels.live),
        recorder=Recorder(
            config=config,
            queue=queue,
            status=status,
            trackers=open_trackers(config, ledger.step),
            tokenizer=learner.student.tokenizer,
            ledger=ledger,
        ),
        watch=watch,
        stop=stop,
    )


def _load_learner(config: RunConfig, plan: Plan, ranks: Ranks) -> Learner:
    """The student as it was before training; of several ranks each keeps its shard."""
    # On the CPU first: a GPU that shares the student's weights with others may not hold all of them.
    settings = config.student if ranks.alone else config.student.model_copy(update={"device": "cpu"})
    own_weights = channels_of(plan, config.run.name).values()
    return Learner(load_student(settings), plan, config.training, ranks, with_ema="ema" in own_weights)


def _expectations(config: RunConfig, plan: Plan, student: Student) -> Expectations:
    model = student.model.config.get_text_config()
    return Expectations(
        run=config.run.name,
        plan=plan,
        sampling_temperature=config.sampling.temperature,
        vocab_size=student.vocab_size,
        tokenizer_fingerprint=student.fingerprint,
        fake_teachers=frozenset(name for name, entry in config.teachers.items() if entry.engine == "fake"),
        channels=channels_of(plan, config.run.name),
        hidden_size=model.hidden_size,
        max_positions=getattr(model, "max_position_embeddings", None),
    )


async def _check_queue(config: RunConfig, queue: Queue, run_id: str) -> None:
    """Refuse a queue that holds the groups of another run under this run's name."""
    found = (await queue.read_progress(config.run.name)).get("run_id")
    if found not in (None, run_id):
        raise TutelageError(
            "FAILED_PRECONDITION",
            f"the queue holds another run called {config.run.name!r}, which {config.run.directory} knows "
            "nothing of; choose another [run] name or [queue] namespace",
        )


def _configure_torch(config: RunConfig) -> None:
    disable_progress_bar()  # one for every published policy
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or CUDA refuses to be deterministic
    torch.use_deterministic_algorithms(config.run.deterministic)
    torch.manual_seed(config.run.seed)
