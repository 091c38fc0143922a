"""From group indices to what the queue stores: sampled groups and what is asked about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tutelage.v1.rollout_pb2 import Group, Rollout, ViewRequest
from tutelage.v1.teacher_pb2 import Context, Pins
from tutelage_client.codec import signal_to_proto
from tutelage_client.types import Int32Array

from services import tracing
from student_trainer.lineage import Lineage, to_proto
from student_trainer.objective.compile import Plan
from student_trainer.sampler.candidates import student_candidates
from student_trainer.sampler.data import PromptSource
from student_trainer.sampler.generate import Generator, Response, Row
from student_trainer.sampler.prompts import EncodedPrompt, PromptEncoder
from student_trainer.sampler.settings import SamplingSettings
from student_trainer.sampler.uniforms import uniforms
from student_trainer.tasks import Example

STUDENT = "student"
_COIN = -1  # sample index of the number that decides who samples a group


@dataclass(frozen=True, slots=True)
class SampledGroup:
    """A group with one request per view of the objective."""

    group: Group
    requests: tuple[ViewRequest, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(rollout.response_ids) for rollout in self.group.rollouts) // 4


@dataclass(frozen=True, slots=True)
class OtherSampler:
    """The model that samples instead of the student, and its name in [sampling] sampler."""

    name: str
    generator: Generator


class GroupSampler:
    """Samples groups by index; stateless but for the student's weights.

    Args:
        pins: per teacher name, conditions sent with its requests.
        student_model: the student for packed forwards, needed when `other` samples and the plan asks
            for the student's candidates.
    """

    def __init__(
        self,
        *,
        run: str,
        seed: int,
        sampling: SamplingSettings,
        plan: Plan,
        prompts: PromptSource,
        encoder: PromptEncoder,
        tokenizer: Any,
        student: Generator,
        student_model: Any,
        pins: Mapping[str, Pins],
        other: OtherSampler | None = None,
    ) -> None:
        self.run = run
        self.seed = seed
        self.sampling = sampling
        self.plan = plan
        self.prompts = prompts
        self.encoder = encoder
        self.student = student
        self._tokenizer = tokenizer
        self._student_model = student_model
        self._pins = pins
        self._other = other

    def sample(
        self, indices: Sequence[int], policy_version: int, lineage: Lineage = ()
    ) -> list[SampledGroup]:
        """The groups of `indices`, in order, sampled with the weights that are loaded now.

        Args:
            policy_version, lineage: of those weights; written into the groups.
        """
        examples = [self.prompts.example(index) for index in indices]
        prompts = self.encoder.encode(examples)
        by_student = [self._student_samples(index) for index in indices]
        responses: dict[int, list[Response]] = {}
        for mine in (True, False):
            chosen = [i for i in range(len(indices)) if by_student[i] == mine]
            if chosen:
                rows = [
                    Row(prompts[i].ids, indices[i], sample)
                    for i in chosen
                    for sample in range(self.sampling.samples_per_prompt)
                ]
                flat = self._generate(rows) if mine else self._generate_other(rows)
                size = self.sampling.samples_per_prompt
                responses.update((i, flat[at * size : (at + 1) * size]) for at, i in enumerate(chosen))
        groups = []
        for i, example in enumerate(examples):
            group = self._group(indices[i], example, prompts[i], responses[i])
            group.traceparent = traceparent(group.id, lineage)
            group.policy_version = policy_version
            group.lineage.extend(to_proto(lineage))
            group.sampled_by = STUDENT if by_student[i] or self._other is None else self._other.name
            groups.append(SampledGroup(group, self._requests(group)))
        return groups

    def interrupt(self) -> None:
        """End a running `sample` or evaluation with GenerationInterruptedError; for good."""
        self.student.interrupt()
        if self._other is not None:
            self._other.generator.interrupt()

    def close(self) -> None:
        """Release what the generators hold; the last call."""
        self.student.close()
        if self._other is not None:
            self._other.generator.close()

    def texts(self, responses: Sequence[Response]) -> list[str]:
        """The responses without special tokens."""
        texts: list[str] = self._tokenizer.batch_decode(
            [response.ids for response in responses], skip_special_tokens=True
        )
        return texts

    def _student_samples(self, index: int) -> bool:
        """GKD's coin, a function of seed and group index alone."""
        share = self.sampling.student_share
        return share == 1.0 or float(uniforms(self.seed, index, _COIN, 1)[0]) < share

    def _generate(self, rows: list[Row]) -> list[Response]:
        return self.student.generate(
            rows,
            seed=self.seed,
            temperature=self.sampling.temperature,
            max_new_tokens=self.sampling.max_new_tokens,
            candidates=self.plan.student_candidates,
        )

    def _generate_other(self, rows: list[Row]) -> list[Response]:
        assert self._other is not None
        responses = self._other.generator.generate(
            rows,
            seed=self.seed,
            temperature=self.sampling.temperature,
            max_new_tokens=self.sampling.max_new_tokens,
        )
        if not self.plan.student_candidates:
            return responses
        candidates: list[Int32Array] = []
        for start in range(0, len(rows), self.sampling.batch_size):
            part = slice(start, start + self.sampling.batch_size)
            pairs = [(i, response.ids) for i, response in enumerate(responses[part])]
            prompts = [row.prompt_ids for row in rows[part]]
            candidates += student_candidates(
                self._student_model, prompts, pairs, self.plan.student_candidates
            )
        return [
            Response(response.ids, response.logprobs, ids, response.finished)
            for response, ids in zip(responses, candidates, strict=True)
        ]

    def _group(
        self, index: int, example: Example, prompt: EncodedPrompt, responses: Sequence[Response]
    ) -> Group:
        identifier = f"{self.run}-{index}"
        return Group(
            id=identifier,
            run=self.run,
            index=index,
            prompt_ids=_bytes(prompt.ids),
            rollouts=[
                self._rollout(example, response, text)
                for response, text in zip(responses, self.texts(responses), strict=True)
            ],
            temperature=self.sampling.temperature,
            prompt_text=prompt.text,
        )

    def _requests(self, group: Group) -> tuple[ViewRequest, ...]:
        return tuple(
            ViewRequest(
                view=view,
                teacher=teacher,
                pins=self._pins.get(teacher),
                signal=signal_to_proto(signal),
                contexts=[Context(ids=group.prompt_ids)],
            )
            for view, (teacher, signal) in self.plan.view_requests.items()
        )

    def _rollout(self, example: Example, response: Response, text: str) -> Rollout:
        rollout = Rollout(
            response_ids=_bytes(response.ids),
            behaviour_logprobs=response.logprobs.astype("<f4", copy=False).tobytes(),
            finished=response.finished,
            text=text,
        )
        reward = self.prompts.reward(example, text)
        if reward is not None:
            rollout.reward = reward
        if response.candidate_ids is not None:
            rollout.candidate_ids = _bytes(response.candidate_ids)
            rollout.num_candidates = response.candidate_ids.shape[1]
        return rollout


def _bytes(ids: Int32Array) -> bytes:
    return ids.astype("<i4", copy=False).tobytes()


def traceparent(identifier: str, lineage: Lineage = ()) -> str:
    """The W3C traceparent of a group's root span, the same when a redelivered order makes it again.

    Another run has other traces though it has the same name: its lineage begins with another stretch.
    """
    origin = lineage[0].id if lineage else ""
    digest = hashlib.blake2b(f"{origin}:{identifier}".encode(), digest_size=24).hexdigest()
    return tracing.root(digest[:32], digest[32:])
