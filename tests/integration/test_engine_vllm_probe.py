"""After a step that failed vLLM is asked a small question: whoever it serves, it has to be askable."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.judges import JUDGED
from support.vllm_engines import run_vllm
from support.writers import save_random_writer, writing
from tutelage_client import codec
from tutelage_client.errors import TutelageError
from tutelage_client.types import ScoreRequest

from services.models.writer_settings import WriterSettings
from student_trainer.tasks.characters import character_tokenizer

pytest.importorskip("vllm", reason="vLLM is not installed")
CALLER = character_tokenizer(JUDGED)


def asked(response: str) -> ScoreRequest:
    return codec.build_request(
        [CALLER("1+1=")["input_ids"]], [CALLER(response)["input_ids"]], anchors=[[0]], signal=writing(2, 3)
    )


async def test_a_writer_of_bare_text_outlives_a_request_that_breaks_a_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first token says nothing, as that of many tokenizers, and before it stands no template."""
    assert CALLER.decode([0], skip_special_tokens=True) == ""
    model = save_random_writer(tmp_path / "writer")
    async with run_vllm(model, engine={"writer": WriterSettings()}, max_num_batched_tokens=256) as engine:
        stepped = engine._line._engine
        step, failures = stepped.step, []

        def fragile() -> list[Any]:
            outputs = step()
            if not failures:
                failures.append(1)
                raise RuntimeError("kernel launch failed")
            return outputs

        monkeypatch.setattr(stepped, "step", fragile)
        with pytest.raises(TutelageError, match="kernel launch failed"):
            await engine.score(asked("abc"))
        (score,) = (await engine.score(asked("abc"))).raise_for_errors().sequences
        assert score.agreement is not None
