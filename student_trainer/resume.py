"""Starting or resuming a run: the newest whole checkpoint decides where it stands."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import structlog
from tutelage_client.errors import TutelageError

from student_trainer.channels import channels_of, publish_initial, withdraw
from student_trainer.checkpoint import CheckpointStore
from student_trainer.config import RunConfig
from student_trainer.learner import Learner
from student_trainer.ledger import Ledger
from student_trainer.lineage import continued
from student_trainer.objective.compile import Plan
from student_trainer.objective.settings import TokenSettings

_NO_VIEWS = ("continuations", "chunk_tokens")  # of a signal; views ask for neither

log = structlog.get_logger(__name__)


def restore(config: RunConfig, checkpoints: CheckpointStore, learner: Learner) -> Ledger:
    """Put `learner` where the newest whole checkpoint left it and return that checkpoint's ledger.

    A run without a checkpoint gets one of step 0, so that a resumption always finds one.

    Raises:
        TutelageError: FAILED_PRECONDITION when every checkpoint is damaged, or belongs to a run
            with other settings.
    """
    fixed = fixed_settings(config, learner.plan) | {"student.model (content)": _base(config, learner)}
    checkpoint, damaged = checkpoints.newest()
    if checkpoint is None:
        if damaged:
            raise _precondition(
                f"none of the {len(damaged)} checkpoints in {checkpoints.directory} is whole "
                f"({damaged[0].path.name}: {damaged[0].reason}); restore one, or start in another directory"
            )
        first_evaluation = [0] if config.training.evaluate_every else []
        ledger = Ledger(settings=fixed, pending_evaluations=first_evaluation)
        withdraw(config.run.directory)
        publish_initial(config, learner)
        # In the checkpoint too: who resumes from it has to know that something was published before.
        ledger.lineage = continued((), 0)
        checkpoints.save(learner.state_tensors(), ledger)
        return ledger
    _check_same_run(fixed, checkpoint.ledger, checkpoints)
    publish_initial(config, learner)  # as long as it is what it was before training
    learner.load(checkpoint)
    for skipped in damaged:
        aside = checkpoints.set_aside(skipped)
        log.warning("checkpoint is damaged and skipped", moved_to=str(aside), reason=skipped.reason)
    ledger = checkpoint.ledger
    ledger.lineage = continued(ledger.lineage, ledger.step)
    log.info("resumed", step=ledger.step, checkpoint=str(checkpoint.path))
    return ledger


def fixed_settings(config: RunConfig, plan: Plan) -> dict[str, Any]:
    """What may not change between a run and its resumption, by its place in the run file.

    Groups that are queued were sampled and scored as the run file then said: whatever shapes them
    belongs here, or they would be refused one after the other, or trained as what they are not. What a
    later version adds is None where it is not used, which is what the ledgers of earlier runs say of it.
    """
    lora, deterministic, guide = config.student.lora, config.run.deterministic, config.sampling.context
    own_weights = channels_of(plan, config.run.name).values()
    guided, size = config.sampling.guided, config.sampling.samples_per_prompt
    tokens = TokenSettings() if plan.audit is None else plan.tokens  # else the trainer alone selects by them
    return {
        "run.name": config.run.name,
        "run.seed": config.run.seed,
        "run.deterministic": deterministic,
        "training.prompts_per_step": config.training.prompts_per_step,
        "training.max_staleness": config.training.max_staleness if deterministic else None,
        "sampling.temperature": config.sampling.temperature,
        "objective.temperature": plan.temperature,
        "objective.k": plan.k,
        "objective.judge": plan.judge,
        "objective.audit": None if plan.audit is None else plan.audit.model_dump(mode="json"),
        "objective.tokens.skip_first_n": tokens.skip_first_n or None,
        "objective.tokens.keep_first_n": tokens.keep_first_n,
        "objective.tokens.skip_ids": sorted(set(tokens.skip_ids)) or None,
        "objective.auxiliary": None if plan.auxiliary is None else plan.auxiliary.model_dump(mode="json"),
        "objective.custom": {kind: source.identity for kind, source in plan.custom.items()},
        "objective.ema_rate": plan.ema_rate if "ema" in own_weights else None,
        "objective.views": {
            view: {
                "teacher": teacher,
                **{key: value for key, value in asdict(signal).items() if key not in _NO_VIEWS},
                "hidden_layers": list(signal.hidden_layers),  # as JSON gives it back
                "context": [template.model_dump() for template in plan.contexts.get(view, ())],
                "missing": plan.missing.get(view),
                "route": dict(plan.routes.get(view, {})),
                "weight_field": plan.weight_fields.get(view),
            }
            for view, (teacher, signal) in plan.view_requests.items()
        },
        "sampling.context": None if guide is None else guide.model_dump(),
        "sampling.guided_samples": guided if 0 < guided < size else None,
        "sampling.sampler": None if config.sampling.replayed is None else config.sampling.sampler,
        "student.model": config.student.model,
        "student.revision": config.student.revision,
        "student.dtype": config.student.dtype,
        "student.lora": None if lora is None else lora.model_dump(mode="json"),
    }


def _base(config: RunConfig, learner: Learner) -> str | None:
    """Revision of the model before training where it goes on to count: checkpoints do not hold it."""
    initial = "initial" in channels_of(learner.plan, config.run.name).values()
    return learner.student.revision if learner.student.lora or initial else None


def differences(fixed: dict[str, Any], ledger: Ledger) -> list[str]:
    """What of a run's fixed settings is otherwise in its ledger, setting by setting."""
    saved = ledger.settings
    return [
        f"{name} = {saved.get(name)!r}, the run file says {value!r}"
        for name, value in fixed.items()
        if saved.get(name) != value
    ]


def _check_same_run(fixed: dict[str, Any], ledger: Ledger, checkpoints: CheckpointStore) -> None:
    if found := differences(fixed, ledger):
        raise _precondition(
            f"{checkpoints.directory} holds a run with {found[0]}; "
            "a run continues only as it began: choose another [run] directory and name"
        )


def _precondition(message: str) -> TutelageError:
    return TutelageError("FAILED_PRECONDITION", message)
