"""The run file: what it accepts, and what it says about mistakes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from student_trainer.config import RunConfig, load_run_config, parse_run_config
from student_trainer.config_errors import RunFileError
from student_trainer.config_reference import reference_markdown

MINIMAL = """
[student]
model = "models/student"

[teachers.large]
model = "models/teacher"

[data]
task = "addition"

[objective]
preset = "thinking-machines"

[training]
steps = 10
"""


def load(tmp_path: Path, text: str) -> RunConfig:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return load_run_config(path)


def problems(tmp_path: Path, text: str) -> list[str]:
    with pytest.raises(RunFileError) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "run.toml") in str(caught.value)
    return caught.value.problems


def test_minimal_run_file_gets_documented_defaults(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    assert config.queue.url == "embedded"
    assert config.training.max_staleness == 1
    assert config.teachers["large"].engine == "transformers"
    assert config.student.lora is None
    assert config.threads is None


def test_deterministic_run_uses_one_thread(tmp_path: Path) -> None:
    assert load(tmp_path, MINIMAL + "[run]\ndeterministic = true\nthreads = 8\n").threads == 1


def test_configuration_cannot_be_changed_after_loading(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    with pytest.raises(ValueError, match="frozen"):
        config.training.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("addition", "section", "wrong", "nearest"),
    [
        ("[run]\nsede = 3\n", "[run]", "'sede'", "'seed'"),
        ("[sampling]\ntemprature = 1.0\n", "[sampling]", "'temprature'", "'temperature'"),
        ("[teachers.other]\nmodle = 'x'\n", "[teachers.other]", "'modle'", "'model'"),
        ("[queu]\nurl = 'embedded'\n", "unknown section", "'queu'", "'queue'"),
        ("[student.lora]\nrnak = 4\n", "[student.lora]", "'rnak'", "'rank'"),
        ("[objective.tokens]\nskip_first = 4\n", "[objective.tokens]", "'skip_first'", "'skip_first_n'"),
        ("[objective.correction]\nkind='ppo'\nclipp=0.2\n", "[objective.correction]", "'clipp'", "'clip'"),
        ("[objective.views.v]\nweight='teacher:large'\n", "[objective.views.v]", "'weight'", "'weights'"),
    ],
)
def test_unknown_key_names_section_key_and_nearest(
    tmp_path: Path, addition: str, section: str, wrong: str, nearest: str
) -> None:
    (problem,) = problems(tmp_path, MINIMAL + addition)
    assert section in problem
    assert f"{wrong}; the nearest" in problem
    assert f"is {nearest} (" in problem


@pytest.mark.parametrize(
    ("section", "line", "expected"),
    [
        ("student", "lora = 16", "[student.lora]: got 16; allowed: a table of alpha, dropout, rank, "),
        ("objective", "views = 'large'", "[objective] views: got 'large'; allowed: a table"),
        (
            "objective",
            "correction = 'importance'",
            "[objective.correction]: got 'importance'; allowed: a table of cap, clip, clip_high, dual_clip, ",
        ),
        (
            "objective",
            "correction = {kind = 'is'}",
            "[objective.correction] kind: got 'is'; allowed: 'none', 'importance', 'ppo'",
        ),
        (
            "objective",
            "correction = {cap = 2.0}",
            "[objective.correction] kind: missing; allowed: 'none', 'importance', 'ppo'",
        ),
    ],
)
def test_a_value_in_place_of_a_section_is_answered_with_what_belongs_there(
    tmp_path: Path, section: str, line: str, expected: str
) -> None:
    found = problems(tmp_path, MINIMAL.replace(f"[{section}]", f"[{section}]\n{line}"))
    assert any(problem.startswith(expected) for problem in found), found


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (
            'task = "addition"',
            "task = 'addition'\npath = 'x'",
            "[data]: got ['task', 'path']; give exactly one",
        ),
        (
            "steps = 10",
            "steps = 10\n[sampling]\nstudent_fraction = 0.5",
            "[sampling] student_fraction: got 0.5 with sampler",
        ),
        ('model = "models/teacher"', "dtype = 'float32'", "[teachers.large] model: missing; give a local"),
    ],
)
def test_a_check_of_a_section_names_it_once(tmp_path: Path, old: str, new: str, expected: str) -> None:
    (problem,) = problems(tmp_path, MINIMAL.replace(old, new))
    assert problem.startswith(expected)


def test_an_address_in_place_of_the_queues_section_is_not_shown(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, 'queue = "redis://:hunter2@host:6379"\n' + MINIMAL)
    assert problem.startswith("[queue]: got what is not shown")
    assert "hunter2" not in problem


def test_every_problem_is_listed(tmp_path: Path) -> None:
    text = MINIMAL.replace("steps = 10", "step = 10\nlearning_rate = 'fast'\nmax_staleness = -1")
    found = problems(tmp_path, text)
    assert any(p.startswith("[training] steps: missing") for p in found)
    assert any("unknown key 'step'; the nearest key is 'steps'" in p for p in found)
    assert any("[training] learning_rate: got 'fast'" in p for p in found)
    assert any("[training] max_staleness: got -1" in p and "0" in p for p in found)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("[teachers.large]", "[teachers.small]\nmodel='m'\n[teachers.large]", "ambiguous"),
        ('preset = "thinking-machines"', "views.v.weights = 'teacher:larg'", "did you mean 'large'"),
        ('preset = "thinking-machines"', 'preset = "thinking-machine"', "did you mean 'thinking-machines'"),
        ('preset = "thinking-machines"', 'preset = "grpo"', "samples_per_prompt"),
        ('preset = "thinking-machines"', "tokens.marked_only = true", "objective.tokens.marked_only"),
        ('preset = "thinking-machines"', 'support = "full"\nestimator = "pathwise"', "one process"),
        (
            "steps = 10",
            "steps = 10\nprompts_per_step = 3\nupdates_per_step = 4",
            "at most prompts_per_step = 3",
        ),
        (
            'task = "addition"\n\n[objective]\npreset = "thinking-machines"',
            "path = 'x.jsonl'\n\n[objective]\ntokens.reward_above = 0.5",
            "objective.tokens: a reward gate is set; a reward needs answers to check",
        ),
        ('[teachers.large]\nmodel = "models/teacher"', "", "none"),
        ('model = "models/teacher"', "", "[teachers.large]"),
        ("[teachers.large]", '[teachers."a b"]', "'a b'"),
        ("steps = 10", "steps = 10\n[sampling]\nsampler = 'teacher:huge'", "teachers with a model are large"),
        (
            'model = "models/teacher"\n',
            "model = 'm'\nadapter = 'a'\n[sampling]\nsampler = 'teacher:large'\n",
            "which has an adapter; samplers load none",
        ),
        ('model = "models/teacher"', "engine = 'fake'\nadapter = 'a'", "the engine 'fake' has no model to"),
        (
            'task = "addition"',
            "path = 'x.jsonl'\nholdout=0.0\n[training]\nevaluate_every=5\n#",
            "holdout is 0",
        ),
    ],
)
def test_sections_that_disagree_are_refused(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = MINIMAL.replace(old, new)
    if "[training]\nevaluate" in new:
        text = text.replace("\n[training]\nsteps = 10", "").replace(
            "evaluate_every=5", "steps=9\nevaluate_every=5"
        )
    assert any(expected in p for p in problems(tmp_path, text)), problems(tmp_path, text)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (
            "[run]\ndeterministic = true\n[sampling]\nengine = 'vllm'",
            "[run] deterministic: got true with [sampling]",
        ),
        ("[sampling]\nengine = 'vllm'\ntemperature = 3.0", "from 0.01 to 2.0"),
        ("[sampling]\nengine = 'vllm'\ntemperature = 0.001", "[sampling] temperature: got 0.001"),
        ("[sampling]\nengine = 'vllm'\n[sampling.vllm]\nimplementation = 'stock'", "how a teacher scores"),
        ("[sampling]\nengine = 'vllm'\n[sampling.vllm]\nmax_num_seq = 3", "nearest key is 'max_num_seqs'"),
        ("[sampling]\n[sampling.vllm]\nmax_num_seqs = 3", 'got max_num_seqs with engine = "transformers"'),
        ("[sampling]\nengine = 'vlm'", "'vllm'"),
    ],
)
def test_what_vllm_cannot_sample_is_refused_by_name(tmp_path: Path, sections: str, expected: str) -> None:
    found = problems(tmp_path, f"{MINIMAL}\n{sections}\n")
    assert any(expected in problem for problem in found), found


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ("engine = 'vlm'", "'vllm'"),
        (
            "[teachers.large.vllm]\nmax_num_seqs = 3",
            "vllm: got max_num_seqs, but the engine is 'transformers'",
        ),
        ("engine = 'vllm'\ndevice = 'cuda:1'", "CUDA_VISIBLE_DEVICES"),
        ("engine = 'vllm'\nmax_batch_tokens = 5", "max_num_batched_tokens"),
        ("engine = 'vllm'\n[run]\ndeterministic = true", "deterministic: got true with [teachers.large]"),
        ("engine = 'vllm'\n[teachers.large.vllm]\nmax_num_seq = 3", "nearest key is 'max_num_seqs'"),
        ("engine = 'vllm'\n[teachers.large.vllm.engine_args]\nmax_num_seqs = 3", "a key beside engine_args"),
        ("engine = 'vllm'\n[teachers.large.vllm.engine_args]\ndtype = 'half'", "outside the vLLM settings"),
    ],
)
def test_what_the_teachers_engine_would_not_look_at_is_refused(
    tmp_path: Path, sections: str, expected: str
) -> None:
    text = MINIMAL.replace('model = "models/teacher"', f'model = "models/teacher"\n{sections}')
    found = problems(tmp_path, text)
    assert any(expected in problem for problem in found), found


def test_the_command_line_chooses_another_sampling_engine(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    assert load_run_config(path, sampling_engine="vllm").sampling.engine == "vllm"
    path.write_text(f"{MINIMAL}\n[sampling]\nengine = 'vllm'\n[sampling.vllm]\nmax_num_seqs = 3\n")
    assert load_run_config(path).sampling.vllm.max_num_seqs == 3
    assert load_run_config(path, sampling_engine="transformers").sampling.engine == "transformers"
    path.write_text(f"{MINIMAL}\n[run]\ndeterministic = true\n")
    with pytest.raises(RunFileError, match="deterministic"):
        load_run_config(path, sampling_engine="vllm")
    path.write_text("sampling = 3\n")
    with pytest.raises(RunFileError, match="sampling"):
        load_run_config(path, sampling_engine="vllm")


def test_the_command_line_chooses_another_queue_and_port(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(MINIMAL)
    metrics = {"trainer_port": 8082, "host": None}
    config = load_run_config(path, queue_url="redis://elsewhere", metrics=metrics)
    assert (config.queue.url, config.metrics.trainer_port) == ("redis://elsewhere", 8082)
    assert (config.metrics.host, config.metrics.sampler_port) == ("127.0.0.1", None)
    for arguments in ({"queue_url": "http://no"}, {"metrics": {"trainer_port": -1}}):
        with pytest.raises(RunFileError):
            load_run_config(path, **arguments)  # type: ignore[arg-type]
    path.write_text("queue = 3\n")
    with pytest.raises(RunFileError, match="queue"):
        load_run_config(path, queue_url="redis://elsewhere")


def test_reward_alone_needs_no_teacher(tmp_path: Path) -> None:
    text = MINIMAL.replace('[teachers.large]\nmodel = "models/teacher"', "[sampling]\nsamples_per_prompt = 4")
    assert load(tmp_path, text.replace("thinking-machines", "grpo")).teachers == {}


def test_missing_file_and_broken_toml_say_so(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="no such file"):
        load_run_config(tmp_path / "absent.toml")
    assert "not a TOML document" in problems(tmp_path, "[run\n")[0]


def test_reading_a_run_file_loads_no_torch() -> None:
    code = "import sys, student_trainer.config; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_reference_lists_every_section_and_key() -> None:
    text = reference_markdown()
    for header in ("## [run]", "## [teachers.NAME]", "## [student.lora]", "## [objective]", "## [training]"):
        assert header in text
    for key in ("max_staleness", "learning_rate", "samples_per_prompt", "heartbeat_seconds", "preset"):
        assert f"| `{key}` |" in text
    assert "| `steps` | integer | required |" in text


def test_configuration_survives_a_round_trip_through_plain_data(tmp_path: Path) -> None:
    config = load(tmp_path, MINIMAL)
    dumped: dict[str, Any] = config.model_dump(mode="json", exclude_unset=True)
    assert parse_run_config(dumped) == config


def test_a_wrong_queue_address_is_refused_without_showing_its_password(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, MINIMAL + '\n[queue]\nurl = "http://:hunter2@host"\n')
    assert "[queue] url" in problem
    assert "redis://" in problem
    assert "hunter2" not in problem
