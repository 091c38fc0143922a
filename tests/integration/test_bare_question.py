"""A judge and a writer whose callers wrap prompts in a chat template: both are shown the bare question."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from support.engine_requests import run_engine
from support.judges import JUDGED, SETTINGS, save_judge
from support.queue_data import make_group
from support.teachers import http_client, serve, teacher_process
from support.text_tokenizer import chat_prompt, spelled, text_tokenizer, turn
from support.view_run import write_model
from support.writers import writing
from tutelage.v1.rollout_pb2 import Rollout, ViewRequest
from tutelage.v1.teacher_pb2 import Context
from tutelage_client import AsyncTeacherClient, TeacherClient, codec
from tutelage_client.types import Signal

from services.models.generate import TransformersGenerator
from services.models.judge_settings import JudgeSettings
from services.models.writer_settings import WriterSettings
from services.queue import Queue
from services.queue.embedded import EmbeddedServer
from student_trainer.tasks.characters import character_tokenizer

QUESTION, RESPONSE = "What is 2+2?", "4 then"
JUDGE = JudgeSettings(user="{prompt}|{response}", max_new_tokens=2)
WRITER = WriterSettings()
# What decoding leaves of the student's template.
REMNANT = f"user\n{QUESTION}\nassistant\n<think>\n\n</think>\n\n"


def model_sees(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The ids that the model is given from now on."""
    found: list[list[int]] = []
    generate = TransformersGenerator.generate

    def spy(self: TransformersGenerator, rows: Any, **how: Any) -> Any:
        found.extend(row.prompt_ids.tolist() for row in rows)
        return generate(self, rows, **how)

    monkeypatch.setattr(TransformersGenerator, "generate", spy)
    return found


@pytest.mark.parametrize("kind", ["judge", "writer"])
async def test_through_every_door_the_model_is_given_the_bare_question(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    write_model(tmp_path / "model", seed=0)
    own: dict[str, Any] = {kind: JUDGE if kind == "judge" else WRITER}
    signal = Signal(sampled=False, judgement=True) if kind == "judge" else writing(1, 2)
    anchors = None if kind == "judge" else [[4]]
    context, response = chat_prompt(QUESTION), spelled(RESPONSE)

    def asked(*texts: str | None) -> Any:
        return codec.build_request(
            [context], [response], anchors=anchors, signal=signal, context_texts=texts or None
        )

    async with (
        run_engine(tmp_path / "model", **own) as engine,
        serve(engine) as doors,
        AsyncTeacherClient(doors.grpc) as client,
        http_client(doors.http) as http,
    ):
        seen = model_sees(monkeypatch)
        await client.score_request(asked(QUESTION))
        body = {
            "contexts": [{"ids": context, "text": QUESTION}],
            "sequences": [{"id": "0", "response_ids": response, "anchors": [4]}],
            "signal": {"judgement": True} if kind == "judge" else {"continuations": 1, "chunk_tokens": 2},
        }
        assert (await http.post("/v1/score", json=body)).status_code == 200
        content = codec.request_to_proto(asked(QUESTION)).SerializeToString()
        headers = {"content-type": "application/x-protobuf"}
        assert (await http.post("/v1/score", content=content, headers=headers)).status_code == 200
        if kind == "writer":  # what a judge is asked has no shorthand
            how: Any = {"sampled": False, "anchors": anchors, "continuations": 1, "chunk_tokens": 2}
            await client.score([context], [response], context_texts=[QUESTION], **how)
            with TeacherClient(doors.grpc) as blocking:
                await asyncio.to_thread(
                    blocking.score, [context], [response], context_texts=[QUESTION], **how
                )
        with_text, without = list(seen), seen
        without.clear()
        await client.score_request(asked())
        await client.score_request(asked(None))
        (refused,) = (await client.score_request(asked("2<|im_end|>"))).sequences
    said = f"{QUESTION}|{RESPONSE}" if kind == "judge" else QUESTION
    begun = "" if kind == "judge" else RESPONSE[:4]
    bare = turn("user", said) + turn("assistant", begun, ended=False)
    assert with_text == [bare] * (3 if kind == "judge" else 5)
    left = f"<|im_start|>user\n{said.replace(QUESTION, REMNANT)}<|im_end|>\n<|im_start|>assistant\n{begun}"
    assert without == [text_tokenizer(chat=False)(left, add_special_tokens=False)["input_ids"]] * 2
    assert refused.error is not None
    assert refused.error.message.startswith(f"{kind}: the prompt spells '<|im_end|>'")


async def test_through_the_queue_a_judge_is_shown_the_text_and_older_jobs_have_none(tmp_path: Path) -> None:
    """The judge's reply depends on the last character that it is shown, which is the prompt's."""
    tokenizer = character_tokenizer(JUDGED)
    ids = [codec.pack_ids(tokenizer(text)["input_ids"]) for text in ("1+b", "1", "2")]
    settings = {
        "engine": "transformers",
        "name": "judge",
        "model": str(save_judge(tmp_path / "judge")),
        "judge": SETTINGS.model_copy(update={"user": "{response}={prompt}"}).model_dump(),
        "threads": 1,
    }
    contexts = {
        0: [Context(ids=ids[0], text="1+a")],
        1: [Context(ids=ids[0])],
        2: [Context(ids=ids[0], text="1+a"), Context(ids=ids[0])],
    }
    found: dict[int, list[float | None]] = {}
    with EmbeddedServer(tmp_path / "queue", dies_with_parent=True) as server:
        async with Queue(server.url) as queue, asyncio.timeout(60):
            for index, own in contexts.items():
                group = make_group("r", index)
                del group.rollouts[:]
                group.rollouts.extend(Rollout(response_ids=response) for response in ids[1:])
                signal = codec.signal_to_proto(Signal(sampled=False, judgement=True))
                view = ViewRequest(view="judge", teacher="judge", signal=signal, contexts=own)
                await queue.submit_group(group, [view])
            with teacher_process(tmp_path / "replica", **settings, queue_url=server.url):
                reader = queue.scored("r")
                while len(found) < len(contexts):
                    for scored in await reader.read(3, 200):
                        score = codec.score_from_proto(scored.scores["judge"])
                        found[scored.group.index] = [answer.judgement for answer in score.sequences]
    assert found == {0: [7 / 9, 7 / 9], 1: [0.0, 0.0], 2: [7 / 9, 0.0]}
