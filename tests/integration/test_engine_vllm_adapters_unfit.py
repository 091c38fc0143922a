"""Adapters of another model: vLLM would apply a part or a corner of them and say nothing; we refuse."""

from dataclasses import replace
from pathlib import Path

import pytest
from support.adapters import CODE, save_adapter
from support.tiny_models import SERVABLE, save_tiny_model
from support.vllm_engines import small_engine
from tutelage_client.errors import TutelageError

pytest.importorskip("vllm", reason="vLLM is not installed")

OTHERS = {
    "narrower": (replace(SERVABLE, intermediate=32), "is a layer of 64 to 64, the adapter's is of "),
    "deeper": (replace(SERVABLE, layers=3), "the model has no layer model.layers.2."),
}


@pytest.mark.parametrize("other", OTHERS)
async def test_an_adapter_of_another_model_is_refused(tmp_path: Path, other: str) -> None:
    shape, reason = OTHERS[other]
    base = save_tiny_model(tmp_path / "base", shape=SERVABLE)
    directory, _ = save_adapter(tmp_path / "adapter", CODE, shape=shape)
    engine = small_engine(base, engine={"adapters": {"math": directory}})
    with pytest.raises(TutelageError) as refusal:
        await engine.start()
    assert refusal.value.code == "FAILED_PRECONDITION"
    assert f"adapters.math: vLLM cannot serve {directory} on this model" in refusal.value.message
    assert reason in refusal.value.message
