"""From group indices to what the queue stores: sampled groups and what is asked about them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tutelage.v1 import teacher_pb2 as pb
from tutelage.v1.rollout_pb2 import Group, Rollout, ViewRequest
from tutelage_client.codec import signal_to_proto
from tutelage_client.types import Int32Array

from services import tracing
from services.models.generate import Response, Row
from services.models.uniforms import uniforms
from student_trainer.lineage import Lineage, to_proto
from student_trainer.objective.compile import Plan
from student_trainer.objective.weights import token_mask
from student_trainer.sampler.anchors import peak_anchors
from student_trainer.sampler.contexts import AUXILIARY, Context, Sampled, without_thinking
from student_trainer.sampler.examples import Examples
from student_trainer.sampler.generate import Generator
from student_trainer.sampler.pins import TeacherPins
from student_trainer.sampler.prompts import EncodedPrompt
from student_trainer.sampler.read_back import ReadBack, read_back
from student_trainer.sampler.settings import GUIDED, STUDENT, SamplingSettings
from student_trainer.tasks import Example

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


@dataclass(frozen=True, slots=True)
class Written(Response):
    """A response, and where its chunks begin that are audited."""

    anchors: Int32Array | None = None  # [F]; None where the objective audits nothing


class GroupSampler:
    """Samples groups by index; stateless but for the student's weights.

    Args:
        examples: prompts, and what privileged views and, with [sampling] context, the student itself see.
        pins: conditions sent with the requests of a teacher.
        student_model: the student for packed forwards, needed where the plan audits responses, and where it
            asks for the student's candidates and another model or another context samples.
    """

    def __init__(
        self,
        *,
        run: str,
        seed: int,
        sampling: SamplingSettings,
        plan: Plan,
        examples: Examples,
        tokenizer: Any,
        student: Generator,
        student_model: Any,
        pins: TeacherPins,
        other: OtherSampler | None = None,
    ) -> None:
        self.run = run
        self.seed = seed
        self.sampling = sampling
        self.plan = plan
        self.prompts = examples.prompts
        self.encoder = examples.encoder
        self.student = student
        self._contexts = examples.contexts
        self._labels = examples.labels
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
        responses = self._responses(indices, examples, prompts, by_student)
        sampled = [self._sampled(*each) for each in zip(indices, examples, responses, strict=True)]
        contexts = self._contexts.contexts(sampled, prompts)
        groups = []
        for i, each in enumerate(sampled):
            group = self._group(each, prompts[i], responses[i])
            group.traceparent = traceparent(group.id, lineage)
            group.policy_version = policy_version
            group.lineage.extend(to_proto(lineage))
            group.sampled_by = self._sampler_name(by_student[i])
            for place, rollout in enumerate(group.rollouts):
                rollout.guided = by_student[i] and place < self.sampling.guided
            for view, rollouts in contexts[i].items():
                for rollout, context in zip(group.rollouts, rollouts, strict=True):
                    if context.template is None:
                        continue
                    if view == AUXILIARY:
                        rollout.auxiliary_context_ids = _bytes(context.prompt.ids)
                    else:
                        rollout.privileged_views.append(view)
            bare = self.encoder.bare(each.example) if self.plan.beside else None
            groups.append(SampledGroup(group, self._requests(group, contexts[i], bare)))
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

    def _sampler_name(self, by_student: bool) -> str:
        if not by_student and self._other is not None:
            return self._other.name
        return STUDENT if self.sampling.context is None else GUIDED

    def _responses(
        self,
        indices: Sequence[int],
        examples: Sequence[Example],
        prompts: Sequence[EncodedPrompt],
        by_student: Sequence[bool],
    ) -> list[list[Written]]:
        """samples_per_prompt responses for each group."""
        size = self.sampling.samples_per_prompt
        found: dict[int, list[Written]] = {}
        for mine in (True, False):
            chosen = [i for i in range(len(indices)) if by_student[i] == mine]
            if not chosen:
                continue
            own = [prompts[i] for i in chosen]
            guided, seen = (self.sampling.guided if mine else 0), own
            if guided:
                seen = self._contexts.guided([indices[i] for i in chosen], [examples[i] for i in chosen])
            rows = [
                Row((under if sample < guided else prompt).ids, indices[i], sample)
                for i, prompt, under in zip(chosen, own, seen, strict=True)
                for sample in range(size)
            ]
            flat = self._generate(rows, [prompt.ids for prompt in own for _ in range(size)], mine=mine)
            found.update((i, flat[at * size : (at + 1) * size]) for at, i in enumerate(chosen))
        return [found[i] for i in range(len(indices))]

    def _generate(self, rows: list[Row], prompts: list[Int32Array], *, mine: bool) -> list[Written]:
        """A response for each row; candidates and entropies are the student's own under `prompts`."""
        recorded = mine and self.sampling.context is None
        generator = self.student if mine or self._other is None else self._other.generator
        responses = generator.generate(
            rows,
            seed=self.seed,
            temperature=self.sampling.temperature,
            max_new_tokens=self.sampling.max_new_tokens,
            candidates=self.plan.student_candidates if recorded else 0,
        )
        wanted = 0 if recorded else self.plan.student_candidates
        told = self._read_back([response.ids for response in responses], prompts, wanted)
        return [
            Written(
                response.ids,
                response.logprobs,
                each.candidate_ids if wanted else response.candidate_ids,
                response.finished,
                self._anchors(response.ids, each.entropy),
            )
            for response, each in zip(responses, told, strict=True)
        ]

    def _read_back(
        self, responses: list[Int32Array], prompts: list[Int32Array], candidates: int
    ) -> list[ReadBack]:
        """What must be asked of the student once the responses are there, of one forward; often nothing."""
        if not candidates and self.plan.audit is None:
            return [ReadBack(None, None)] * len(responses)
        at = None if self.plan.audit is None else self.plan.temperature
        return read_back(self._student_model, prompts, responses, candidates=candidates, entropy_at=at)

    def _anchors(self, ids: Int32Array, entropy: npt.NDArray[np.float64] | None) -> Int32Array | None:
        audit = self.plan.audit
        if audit is None or entropy is None:
            return None
        selected = token_mask(self.plan.tokens, torch.tensor([len(ids)]), torch.from_numpy(ids)).numpy()
        return peak_anchors(entropy, selected, chunks=audit.chunks, chunk_tokens=audit.chunk_tokens)

    def _sampled(self, index: int, example: Example, responses: Sequence[Response]) -> Sampled:
        texts, ids = self.texts(responses), [response.ids for response in responses]
        return Sampled(
            index,
            example,
            texts=tuple(texts),
            answers=without_thinking(self._tokenizer, ids) if self._contexts.reads_answers else tuple(texts),
            rewards=tuple(self.prompts.reward(example, text) for text in texts),
        )

    def _group(self, sampled: Sampled, prompt: EncodedPrompt, responses: Sequence[Written]) -> Group:
        return Group(
            id=f"{self.run}-{sampled.index}",
            run=self.run,
            index=sampled.index,
            prompt_ids=_bytes(prompt.ids),
            rollouts=[
                _rollout(response, text, reward)
                for response, text, reward in zip(responses, sampled.texts, sampled.rewards, strict=True)
            ],
            temperature=self.sampling.temperature,
            prompt_text=prompt.text,
            tag=self._labels.tag(sampled.index, sampled.example),
            view_weights=self._labels.weights(sampled.index, sampled.example),
        )

    def _requests(
        self, group: Group, contexts: Mapping[str, tuple[Context, ...]], bare: str | None
    ) -> tuple[ViewRequest, ...]:
        """`bare` is the prompt without a template, for those who read words."""
        requests = []
        for view, (_, signal) in self.plan.requests.items():
            teacher = self._labels.teacher(view, group.index, group.tag)
            seen = [_bytes(context.prompt.ids) for context in contexts.get(view, ())] or [group.prompt_ids]
            text = bare if view in self.plan.beside else None
            requests.append(
                ViewRequest(
                    view=view,
                    teacher=teacher,
                    pins=self._pins.of(teacher, group.policy_version),
                    signal=signal_to_proto(signal),
                    contexts=[
                        pb.Context(ids=ids, text=text) for ids in (seen if len(set(seen)) > 1 else seen[:1])
                    ],
                )
            )
        return tuple(requests)


def _rollout(response: Written, text: str, reward: float | None) -> Rollout:
    rollout = Rollout(
        response_ids=_bytes(response.ids),
        behaviour_logprobs=response.logprobs.astype("<f4", copy=False).tobytes(),
        finished=response.finished,
        text=text,
    )
    if reward is not None:
        rollout.reward = reward
    if response.anchors is not None:
        rollout.anchors = _bytes(response.anchors)
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
