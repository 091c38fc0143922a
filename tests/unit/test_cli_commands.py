"""The command line: quick to answer, light to load, and clear about what is wrong with its input."""

from __future__ import annotations

import json
import re
import resource
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from click.testing import Result
from typer.main import get_command
from typer.testing import CliRunner

from launcher.cli import app
from launcher.up import child_specs
from services.models.judge_settings import JudgeSettings
from services.models.vllm_settings import VllmSettings
from services.models.writer_settings import WriterSettings
from services.teacher.settings import TeacherSettings
from student_trainer.config import parse_run_config
from student_trainer.sections import QueueSettings

COMMANDS = (
    "quickstart", "up", "teacher", "rollout", "train", "exporter",
    "status", "views", "sample", "score", "doctor", "report", "bench",
)  # fmt: skip
HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "grpc", "redis", "numpy", "matplotlib", "vllm")


def tutelage(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"})


def process(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "launcher", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        check=False,
    )


def test_help_takes_less_than_half_a_second_of_processor_time() -> None:
    # Processor time, best of three: the wall clock of a loaded machine says nothing about the command.
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert process("--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert min(spent) < 0.5


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["up", "--help"], ["teacher", "--help"], ["exporter", "--help"], ["status", "--help"]],
)
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import json, sys\n"
        "from launcher.cli import app\n"
        "try:\n    app(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        f"print('LOADED', json.dumps(sorted(set({HEAVY!r}) & set(sys.modules))))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(ran.stdout.rsplit("LOADED ", 1)[1]) == []


def test_help_names_every_command() -> None:
    text = tutelage("--help").stdout
    assert [command for command in COMMANDS if command not in text] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str) -> None:
    ran = tutelage(command, "--help")
    assert ran.exit_code == 0
    assert f"tutelage {command}" in ran.stdout.split("Example", 1)[1]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_every_word_of_every_option(command: str) -> None:
    """What stands in brackets is markup to rich unless it is escaped, and is not shown."""
    wide = {"COLUMNS": "1000", "NO_COLOR": "1", "TERM": "dumb"}
    shown = " ".join(CliRunner().invoke(app, [command, "--help"], env=wide).stdout.split())
    parameters = get_command(app).commands[command].params
    texts = [parameter.help.replace("\\[", "[") for parameter in parameters]
    assert [text for text in texts if " ".join(text.split()) not in shown] == []


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[TeacherSettings]:
    """Settings of the replicas that a command would have started."""
    settings: list[TeacherSettings] = []
    monkeypatch.setattr("services.teacher.process.main", settings.append)
    return settings


def test_a_teacher_without_options_has_the_defaults_of_its_settings(started: list[TeacherSettings]) -> None:
    assert tutelage("teacher", "--engine", "fake", "--consumer", "me").exit_code == 0
    assert started == [TeacherSettings(engine="fake", consumer="me")]
    assert started[0].heartbeat_seconds == QueueSettings().heartbeat_seconds


def test_options_of_vllm_are_taken_in_its_own_spelling(started: list[TeacherSettings]) -> None:
    ran = tutelage(
        *("teacher", "--model", "m", "--engine", "vllm", "--tensor-parallel-size", "2"),
        *("--gpu-memory-utilization", "0.8", "--max-model-len", "4096", "--quantization", "fp8"),
        *("--kv-cache-dtype", "fp8", "--block-size=32", "--enable-expert-parallel", "--name", "large"),
        *("--no-enable-prefix-caching", "--hf-overrides", '{"rope_theta": 1.5}', "--seed", "-1"),
        *("--compilation-config.mode", "0", "--max-num-seqs", "64", "--enforce-eager"),
    )
    assert ran.exit_code == 0, ran.output
    assert started[0].name == "large"
    assert started[0].vllm == VllmSettings(
        tensor_parallel_size=2,
        gpu_memory_utilization=0.8,
        max_model_len=4096,
        quantization="fp8",
        max_num_seqs=64,
        enforce_eager=True,
        engine_args={
            "kv_cache_dtype": "fp8",
            "block_size": 32,
            "enable_expert_parallel": True,
            "enable_prefix_caching": False,
            "hf_overrides": {"rope_theta": 1.5},
            "seed": -1,
            "compilation_config": {"mode": 0},
        },
    )


def test_vllm_settings_of_a_run_file_reach_the_replica_that_up_starts(
    started: list[TeacherSettings], tmp_path: Path
) -> None:
    settings = {
        "tensor_parallel_size": 2,
        "max_num_batched_tokens": 8192,
        "kv_cache_memory_bytes": 1 << 30,
        "enforce_eager": True,
        "implementation": "stock",
        "engine_args": {
            "served_model_name": "1",
            "hf_overrides": {"a": [1, "-x"]},
            "seed": -1,
            "numa_bind": False,
        },
    }
    document = tomllib.loads(RUN_FILE) | {
        "teachers": {"t": {"model": "m", "engine": "vllm", "vllm": settings}}
    }
    config = parse_run_config(document | {"run": {"threads": 3}})
    spec = child_specs(config, tmp_path / "run.toml", "redis://queue")[0]
    ran = tutelage(*spec.arguments)
    assert ran.exit_code == 0, ran.output
    assert started[0].vllm == VllmSettings(**settings)
    assert spec.environment["OMP_NUM_THREADS"] == "3"


def test_adapters_are_teachers_of_their_own_name_or_of_the_replica_s(started: list[TeacherSettings]) -> None:
    vllm = ["teacher", "--model", "base", "--engine", "vllm", "--adapter"]
    assert tutelage(*vllm, "math=runs/math", "--adapter", "./code=2", "--name", "code").exit_code == 0
    assert started[-1].adapters == {"math": Path("runs/math"), "code": Path("./code=2")}
    assert tutelage("teacher", "--model", "base", "--adapter", "runs/math").exit_code == 0
    assert started[-1].adapters == {"teacher": Path("runs/math")}


def test_teachers_that_differ_in_their_adapter_alone_share_the_processes_that_up_starts(
    started: list[TeacherSettings], tmp_path: Path
) -> None:
    vllm = {"model": "base", "engine": "vllm", "replicas": 2}
    teachers = {
        "math": {**vllm, "adapter": "runs/math"},
        "general": vllm,
        "code": {**vllm, "adapter": "runs/code"},
        "again": vllm,
        "half": {**vllm, "adapter": "runs/half", "dtype": "bfloat16"},
        "merged": {"model": "base", "adapter": "runs/math"},
        "elsewhere": {**vllm, "adapter": "runs/far", "address": "10.0.0.7:50051"},
    }
    config = parse_run_config(tomllib.loads(RUN_FILE) | {"teachers": teachers})
    specs = [
        spec for spec in child_specs(config, tmp_path / "run.toml", "redis://q") if spec.role == "teacher"
    ]
    names = ["general-0", "general-1", "again-0", "again-1", "half-0", "half-1", "merged-0"]
    assert [spec.name for spec in specs] == names
    for spec in (specs[0], specs[2], specs[4], specs[6]):
        assert tutelage(*spec.arguments).exit_code == 0
    assert [(settings.name, set(settings.adapters)) for settings in started] == [
        ("general", {"math", "code"}),
        ("again", set()),
        ("half", {"half"}),
        ("merged", {"merged"}),
    ]


def test_a_judge_that_up_starts_reads_the_student_s_ids(
    started: list[TeacherSettings], tmp_path: Path
) -> None:
    judge = {"user": "Q: {prompt}\nA = {response}", "reply": "[{score}]", "largest": 5}
    teachers = {
        "referee": {"model": "big", "judge": judge},
        "other": {"model": "big", "engine": "vllm", "judge": {"tokenizer": "elsewhere"}},
    }
    config = parse_run_config(tomllib.loads(RUN_FILE) | {"teachers": teachers})
    for spec in child_specs(config, tmp_path / "run.toml", "redis://queue")[:2]:
        ran = tutelage(*spec.arguments)
        assert ran.exit_code == 0, ran.output
    assert started[0].judge == JudgeSettings(tokenizer="student", **judge)
    assert started[1].judge == JudgeSettings(tokenizer="elsewhere")


def test_a_writer_that_up_starts_reads_the_student_s_ids(
    started: list[TeacherSettings], tmp_path: Path
) -> None:
    writer = {"user": "Q: {prompt}\nA =", "temperature": 0.7, "max_continuations": 4}
    teachers = {
        "author": {"model": "big", "writer": writer},
        "other": {"model": "big", "engine": "vllm", "writer": {"tokenizer": "elsewhere"}},
    }
    config = parse_run_config(tomllib.loads(RUN_FILE) | {"teachers": teachers})
    for spec in child_specs(config, tmp_path / "run.toml", "redis://queue")[:2]:
        ran = tutelage(*spec.arguments)
        assert ran.exit_code == 0, ran.output
    assert started[0].writer == WriterSettings(tokenizer="student", **writer)
    assert started[1].writer == WriterSettings(tokenizer="elsewhere")


@pytest.mark.parametrize("document", ["vllm.md", "other-teachers.md"])
def test_every_teacher_command_of_a_guide_starts_one(started: list[TeacherSettings], document: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / document).read_text()
    commands = re.findall(r"^tutelage (teacher .*)$", text, re.MULTILINE)
    for command in commands:
        ran = tutelage(*shlex.split(command))
        assert ran.exit_code == 0, ran.output
    assert len(started) == len(commands) > 0


def test_a_teacher_that_a_recipe_tells_to_start_elsewhere_works_for_that_recipe(
    started: list[TeacherSettings],
) -> None:
    """It has the name that the run calls it by, the run's queue, and asks what the run file says it asks."""
    recipes = [path.read_text() for path in (Path(__file__).parents[2] / "recipes").glob("*.toml")]
    told = [
        (c, text) for text in recipes for c in re.findall(r"^# +tutelage (teacher .*)$", text, re.MULTILINE)
    ]
    for command, text in told:
        ran = tutelage(*shlex.split(command.replace("--host 0.0.0.0 --token-file tokens", "")))
        assert ran.exit_code == 0, ran.output
        config, replica = parse_run_config(tomllib.loads(text)), started[-1]
        entry = config.teachers[replica.name]
        assert (replica.model, replica.engine, replica.dtype) == (entry.model, entry.engine, entry.dtype)
        assert replica.queue_url == "redis://HOST:6379"
        if entry.judge is not None:
            assert replica.judge == entry.judge.model_copy(update={"tokenizer": config.student.model})
    assert len(told) == len(started) == 2


def test_several_processes_that_torchrun_did_not_start_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They could not find each other, and would be several trainers of one run."""
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_file = tmp_path / "run.toml"
    run_file.write_text(RUN_FILE + f"\n[run]\ndirectory = '{tmp_path / 'run'}'\n")
    ran = tutelage("train", str(run_file))
    assert ran.exit_code == 2, ran.output
    assert "WORLD_SIZE: got 2 without RANK" in ran.stderr
    assert "torchrun" in ran.stderr
    assert not (tmp_path / "run").exists()


RUN_FILE = """
[student]
model = "student"
[data]
task = "addition"
[objective]
preset = "grpo"
[sampling]
samples_per_prompt = 2
[training]
steps = 1
"""

BAD_INPUT = {
    "unknown command": (["uo"], "uo"),
    "missing argument": (["up"], "RUN.toml"),
    "no such run file": (["up", "nowhere.toml"], "nowhere.toml: there is no such file"),
    "directory in place of a run file": (["doctor", "empty"], "tutelage: empty: Is a directory"),
    "unknown key in a run file": (["train", "typo.toml"], "unknown key 'stepps'; the nearest key is 'steps'"),
    "not TOML": (["doctor", "garbage.toml"], "not a TOML document"),
    "no run directory": (["report", "empty"], "is not a run directory"),
    "teacher without a model": (["teacher"], "model: got none"),
    "listening to the world without a token": (
        ["teacher", "--engine", "fake", "--host", "0.0.0.0"],
        "without a token",
    ),
    "fake setting without a value": (["teacher", "--engine", "fake", "--set", "fake.seed"], "KEY=VALUE"),
    "two adapters under one name": (
        ["teacher", "--model", "m", "--engine", "vllm", "--adapter", "a=x", "--adapter", "a=y"],
        "got two for 'a'",
    ),
    "adapters of an engine that merges one": (
        ["teacher", "--model", "m", "--adapter", "math=x", "--adapter", "code=y"],
        "adapters: got code, math; the engine 'transformers' merges one into the model",
    ),
    "argument of vLLM's that the adapters decide": (
        ["teacher", "--model", "m", "--engine", "vllm", "--max-lora-rank", "8"],
        "got 'max_lora_rank', which is not for a run to choose",
    ),
    "unknown limit": (
        ["teacher", "--engine", "fake", "--set", "limits.max_topk=3"],
        "limits.max_topk: unknown key 'max_topk'; the nearest key is 'max_top_k' (all: ",
    ),
    "unknown fake setting": (["teacher", "--engine", "fake", "--set", "fake.sed=1"], "fake.sed"),
    "unknown option": (
        ["teacher", "--engine", "fake", "--max-batch-token", "5"],
        "Did you mean '--max-batch-tokens'?",
    ),
    "option of vLLM for another engine": (
        ["teacher", "--model", "m", "--kv-cache-dtype", "fp8"],
        "No such option",
    ),
    "setting of vLLM for another engine": (
        ["teacher", "--model", "m", "--max-num-seqs", "8"],
        "vllm: got max_num_seqs, but the engine is 'transformers'",
    ),
    "short option of vLLM": (["teacher", "--model", "m", "--engine", "vllm", "-tp", "2"], "got '-tp'"),
    "option of vLLM twice": (
        ["teacher", "--model", "m", "--engine", "vllm", "--seed", "2", "--seed=3"],
        "got --seed twice",
    ),
    "setting of vLLM by a second name": (
        ["teacher", "--model", "m", "--engine", "vllm", "--no-enforce-eager"],
        "got 'enforce_eager', which is a key beside engine_args",
    ),
    "device of vLLM": (
        ["teacher", "--model", "m", "--engine", "vllm", "--device", "cuda:1"],
        "CUDA_VISIBLE_DEVICES",
    ),
    "deterministic vLLM": (
        ["teacher", "--model", "m", "--engine", "vllm", "--deterministic"],
        "deterministic: got",
    ),
    "threads of vLLM": (["teacher", "--model", "m", "--engine", "vllm", "--threads", "2"], "OMP_NUM_THREADS"),
    "tokens of a batch of vLLM": (
        ["teacher", "--model", "m", "--engine", "vllm", "--max-batch-tokens", "99"],
        "max_num_batched_tokens",
    ),
    "engine that does not exist": (["teacher", "--engine", "vlm"], "engine: got 'vlm'"),
    "setting inside a number": (["teacher", "--set", "threads.x=1"], "has no settings of its own"),
    "score without a teacher": (["score", "rows.jsonl"], "exactly one of --teacher"),
    "score into an unknown format": (
        ["score", "rows.jsonl", "--model", "m", "--output", "out.csv"],
        "must end in .jsonl or .parquet",
    ),
    "score of a missing file": (["score", "nowhere.jsonl", "--model", "m"], "there is no such file"),
    "score of a line that is not JSON": (
        ["score", "bad.jsonl", "--model", "m"],
        "bad.jsonl, line 2: not JSON",
    ),
    "score of negative ids": (["score", "negative.jsonl", "--model", "m"], "must be a list of token ids"),
    "bench outside a clone": (["bench"], "clone of the repository"),
}


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bad")
    (directory / "empty").mkdir()
    (directory / "typo.toml").write_text(RUN_FILE.replace("steps = 1", "stepps = 1"))
    (directory / "garbage.toml").write_text("steps == 1")
    good = '{"context_ids": [1], "response_ids": [2]}\n'
    (directory / "rows.jsonl").write_text(good)
    (directory / "bad.jsonl").write_text(good + "{not json\n")
    (directory / "negative.jsonl").write_text('{"context_ids": [1], "response_ids": [-2]}\n')
    return directory


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_gives_one_clear_message_and_status_2(
    case: str, bad_files: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bad_files)
    arguments, expected = BAD_INPUT[case]
    ran = tutelage(*arguments)
    assert ran.exit_code == 2, ran.output
    assert expected in " ".join(ran.stderr.split())
    assert ran.exception is None or isinstance(ran.exception, SystemExit)


def test_an_embedded_queue_that_is_away_is_said_to_be_that_of_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(RUN_FILE)
    ran = tutelage("status", "run.toml", "--once")
    assert ran.exit_code != 0
    assert "`tutelage up` starts that server, and does not run" in ran.stderr
    ran = tutelage("status", "run.toml", "--once", "--queue", "redis://127.0.0.1:1")
    assert "queue server redis://127.0.0.1:1" in ran.stderr
    assert "tutelage up" not in ran.stderr


def test_bad_input_of_the_real_command_shows_no_traceback(bad_files: Path) -> None:
    ran = process("train", "typo.toml", cwd=bad_files)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("tutelage: typo.toml")
    assert "Traceback" not in ran.stderr
