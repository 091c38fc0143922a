"""`tutelage doctor`: what would go wrong with a run file is said before it does."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from support.adapters import MATH, save_adapter
from support.teachers import teacher_process
from support.training_run import write_model
from typer.testing import CliRunner

from launcher.cli import app
from services.queue.embedded import EmbeddedServer

ROOT = Path(__file__).parents[2]

RUN_FILE = """
[run]
directory = "{root}/run"
[queue]
url = "{queue}"
[teachers.big]
{teacher}
[student]
model = "{root}/student"
[data]
{data}
[sampling]
max_new_tokens = {max_new_tokens}
[objective]
divergence = "kl_student_teacher"
support = "teacher_topk"
k = {k}
estimator = "pathwise"
[training]
steps = 1
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoModelForCausalLM

    from student_trainer.tasks.characters import character_tokenizer

    root = tmp_path_factory.mktemp("doctor")
    for name in ("student", "teacher", "stranger", "narrow"):
        write_model(root / name, seed=1)
    character_tokenizer("0123456789+=,:abc").save_pretrained(root / "stranger")
    narrow = AutoModelForCausalLM.from_pretrained(root / "narrow")
    narrow.resize_token_embeddings(8)
    narrow.save_pretrained(root / "narrow")
    (root / "lines.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    return root


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    settings: dict[str, Any] = {"name": "big", "fake": {"vocab_size": 32}, "limits": {"max_top_k": 4}}
    with teacher_process(root / "replica", **settings) as teacher:
        yield teacher.grpc


def examine(root: Path, **changes: str | int) -> Result:
    values = {
        "root": root,
        "queue": "embedded",
        "teacher": f'model = "{root}/teacher"',
        "data": 'task = "addition"',
        "max_new_tokens": 8,
        "k": 4,
    }
    path = root / "run.toml"
    views = str(changes.pop("views", ""))
    path.write_text(RUN_FILE.format(**(values | changes)) + views)
    return CliRunner().invoke(app, ["doctor", str(path)], env={"COLUMNS": "400"})


def lines(result: Result, mark: str) -> list[str]:
    return [" ".join(line.split()[1:]) for line in result.stdout.splitlines() if line.startswith(mark + " ")]


def test_a_run_that_fits_has_nothing_to_complain_about(root: Path) -> None:
    result = examine(root)
    assert result.exit_code == 0, result.output
    assert lines(result, "fail") + lines(result, "warn") + lines(result, "?") == []
    assert any("the same as the student's" in line for line in lines(result, "ok"))
    assert "nothing found that would fail" in result.stdout


def test_memory_is_counted_for_every_process(root: Path) -> None:
    result = examine(root, teacher=f'model = "{root}/teacher"\nreplicas = 2')
    (memory,) = [line for line in lines(result, "ok") if line.startswith("memory")]
    assert all(name in memory for name in ("big-0", "big-1", "trainer", "sampler-0"))


def test_teachers_with_the_students_own_weights_are_known(root: Path) -> None:
    sections = '[objective.views.self]\nweights = "ema"\n[self_teacher]\nreplicas = 2\n'
    result = examine(root, views=sections)
    assert result.exit_code == 0, result.output
    (memory,) = [line for line in lines(result, "ok") if line.startswith("memory")]
    assert all(name in memory for name in ("run.ema-0", "run.ema-1", "trainer"))
    assert any(line.startswith("teacher run.ema serves the objective") for line in lines(result, "ok"))


TROUBLE: dict[str, tuple[dict[str, str | int], str]] = {
    "another tokenizer": ({"teacher": 'model = "{root}/stranger"'}, "differs from the student's"),
    "too small a vocabulary": ({"teacher": 'model = "{root}/narrow"'}, "cannot score"),
    "a model that is not there": ({"teacher": 'model = "{root}/nobody"'}, "there is no such directory"),
    "k above the teacher's vocabulary": ({"k": 33}, "above the teacher's limit 32"),
    "a field that the data lack": (
        {"data": 'path = "{root}/lines.jsonl"\nanswer_field = "anwser"'},
        "has no field 'anwser'; its fields are ['answer', 'prompt']",
    ),
    "responses longer than the model": ({"max_new_tokens": 100}, "takes 64 tokens"),
    "data that is not there": ({"data": 'path = "{root}/nothing.jsonl"'}, "there is no such file"),
    "a teacher nobody serves": ({"teacher": 'address = "127.0.0.1:1"'}, "127.0.0.1:1"),
    "a vLLM teacher for shorter sequences": (
        {"teacher": 'model = "{root}/teacher"\nengine = "vllm"\n[teachers.big.vllm]\nmax_model_len = 8'},
        "vllm.max_model_len is 8",
    ),
    "a queue nobody runs": ({"queue": "redis://127.0.0.1:1"}, "redis://127.0.0.1:1"),
}


@pytest.mark.parametrize("case", TROUBLE)
def test_what_would_fail_is_said_and_fails_the_command(case: str, root: Path) -> None:
    changes, expected = TROUBLE[case]
    filled = {key: v.format(root=root) if isinstance(v, str) else v for key, v in changes.items()}
    result = examine(root, **filled)
    assert result.exit_code == 1, result.output
    assert any(expected in line for line in lines(result, "fail")), result.output


@pytest.mark.parametrize("here", [True, False])
def test_whether_vllm_is_installed_is_said_where_it_is_needed(
    root: Path, here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("launcher.doctor_checks.find_spec", lambda name: object() if here else None)
    assert not any(line.startswith("vllm") for line in lines(examine(root), "ok"))
    result = examine(root, teacher=f'model = "{root}/teacher"\nengine = "vllm"')
    assert result.exit_code == (0 if here else 1)
    (said,) = [line for line in lines(result, "ok" if here else "fail") if line.startswith("vllm")]
    assert "teacher big" in said


def test_a_judge_is_looked_at_as_one(root: Path) -> None:
    """Its tokenizer is not the student's, and it is not asked for log-probabilities."""
    judge = f'model = "{root}/stranger"\n[teachers.big.judge]\nmax_new_tokens = 9\n'
    path = root / "judged.toml"
    text = RUN_FILE.format(
        root=root, queue="embedded", teacher=judge, data='task = "addition"', max_new_tokens=8, k=4
    )
    head, _, tail = text.partition("[objective]")
    head = head.replace("max_new_tokens = 8", "max_new_tokens = 8\nsamples_per_prompt = 2")
    objective = "[objective]\npreset = 'grpo'\njudge = 'big'\n"
    path.write_text(f"{head}{objective}[training]{tail.partition('[training]')[2]}")
    result = CliRunner().invoke(app, ["doctor", str(path)], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert any("the reward is what big judges" in line for line in lines(result, "ok")), result.output


def test_a_writer_is_looked_at_as_one(root: Path) -> None:
    """Its tokenizer is not the student's, and it is asked for no more continuations than it writes."""
    writer = f'model = "{root}/stranger"\n[teachers.big.writer]\nmax_continuations = 4\n'
    text = RUN_FILE.format(
        root=root, queue="embedded", teacher=writer, data='task = "addition"', max_new_tokens=8, k=4
    )
    head, _, tail = text.partition("[objective]")
    path = root / "written.toml"

    def said(level: str, continuations: int) -> list[str]:
        objective = (
            "[objective]\npreset = 'omniopd'\nk = 4\n[objective.audit]\nteacher = 'big'\nchunk_tokens = 2\n"
        )
        objective += f"continuations = {continuations}\n"
        path.write_text(f"{head}{objective}[training]{tail.partition('[training]')[2]}")
        result = CliRunner().invoke(app, ["doctor", str(path)], env={"COLUMNS": "400"})
        assert (result.exit_code == 1) == bool(lines(result, "fail")), result.output
        return lines(result, level)

    assert said("fail", 4) == []
    assert any("big writes 4 continuations" in line for line in said("ok", 4))
    assert said("ok", 5) == []  # no run file, and nothing is looked at
    refused = CliRunner().invoke(app, ["doctor", str(path)])
    assert refused.exit_code == 2
    assert "objective.audit.continuations: got 5, allowed: 1 to 4" in " ".join(refused.stderr.split())


def test_hidden_states_need_layers_and_a_width_that_both_have(root: Path) -> None:
    def said(layer: int, teacher: str) -> list[str]:
        hidden = f"[objective.hidden]\nlayers = [{layer}]"
        model = f'model = "{root}/{teacher}"'
        result = examine(root, teacher=f"{model}\n{hidden}")
        assert (result.exit_code == 1) == bool(lines(result, "fail")), result.output
        return lines(result, "fail")

    write_model(root / "wide", seed=1, head_dim=16, hidden=64)
    assert said(2, "teacher") == []
    deep = said(3, "teacher")
    assert any("asks for layer 3, the teacher answers 2 layers" in line for line in deep)
    assert any("layer 3 is asked for, the student has 2" in line for line in deep)
    assert any("states of big have 64 numbers, the student's 32" in line for line in said(1, "wide"))


def test_adapters_are_read_and_share_one_engine(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("launcher.doctor_checks.find_spec", lambda name: object())  # as if vLLM were here
    save_adapter(root / "math", MATH)
    engine = f'model = "{root}/teacher"\nengine = "vllm"\nvllm.kv_cache_memory_bytes = 100000000'
    teacher = f'{engine}\n[teachers.math]\n{engine}\nadapter = "{root}/math"'
    views = "[objective.views.teacher]\nweights = 'teacher:big'"
    shown = examine(root, teacher=f"{teacher}\n{views}").output
    assert "adapter of rank 3 on q_proj, v_proj" in " ".join(shown.split())
    assert "teachers big, math" in shown
    assert "share each of 1 vLLM engines" in shown
    assert "big-0 0.1 GB" in shown, "weights and cache are counted once"
    assert "math-0" not in shown
    refused = examine(root, teacher=f'model = "{root}/teacher"\nadapter = "{root}/nowhere"')
    assert refused.exit_code == 1
    assert "which has no adapter_config.json" in refused.output


@pytest.mark.parametrize(("tokens", "refused"), [(40_000, False), (140_000, True)])
def test_a_teacher_that_up_starts_has_the_limits_of_the_service(
    root: Path, tokens: int, refused: bool
) -> None:
    result = examine(root, max_new_tokens=tokens)
    said = [line for line in lines(result, "fail") if line.startswith("teacher big scores sequences up to")]
    assert bool(said) == refused, result.output


def test_a_served_teacher_is_asked_for_its_own_limits(root: Path, address: str) -> None:
    result = examine(root, teacher=f'address = "{address}"\nengine = "fake"', k=5)
    assert result.exit_code == 1
    assert any("above the teacher's limit 4" in line for line in lines(result, "fail"))
    assert any(line.startswith("teacher big ready: ") for line in lines(result, "ok"))


def test_a_queue_that_would_lose_work_is_refused(root: Path) -> None:
    with EmbeddedServer(root / "queue") as server:
        from services.queue.connection import connect_blocking

        assert "version and settings are right" in examine(root, queue=server.url).stdout
        connect_blocking(server.url, 5.0).config_set("maxmemory-policy", "allkeys-lru")
        result = examine(root, queue=server.url)
        assert any("noeviction" in line for line in lines(result, "fail"))
        connect_blocking(server.url, 5.0).config_set("maxmemory-policy", "noeviction")
        connect_blocking(server.url, 5.0).config_set("appendonly", "no")
        result = examine(root, queue=server.url)
        assert result.exit_code == 0
        assert any("append-only" in line for line in lines(result, "warn"))


def test_hub_models_that_are_not_here_are_said_to_be_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = ROOT / "recipes" / "qwen3-8b-to-0.6b.toml"
    result = CliRunner().invoke(app, ["doctor", str(recipe)], env={"COLUMNS": "400"})
    assert result.exit_code == 0, result.output
    assert any(
        "Qwen/Qwen3-8B is not here, nor in the local Hugging Face cache" in line
        for line in lines(result, "?")
    )
    assert re.search(r"[1-9]\d* could not be checked here", result.stdout)


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "recipes").glob("*.toml")))
def test_every_recipe_is_a_run_file_that_works(recipe: str) -> None:
    from student_trainer.config import load_run_config

    config = load_run_config(ROOT / "recipes" / recipe)
    assert config.run.directory.name == config.run.name
    assert json.dumps(config.run.name) in (ROOT / "recipes" / recipe).read_text()
