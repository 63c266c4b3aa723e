"""Flags in, one message and an exit code out: every kind of error, in this process."""

import dataclasses
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import runs

from distill import cli, errors
from distill.config import SUITED, StudentConfig, TeacherConfig, unused
from distill.embed import embed
from distill.errors import IntegrityError, RecipeError, ResourceError, Stopped
from distill.training import LabelConfig, TrainConfig, checkpoint


@dataclass(frozen=True, kw_only=True)
class Group:
    size: int = 3
    """How large."""
    factor: float = 1.0
    """How much."""

    def __post_init__(self) -> None:
        if self.size < 1:
            raise RecipeError(f"size is 1 or more, got {self.size}.")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    data: str = "a.txt"
    """The texts."""
    output: Path = Path("runs/x")
    """Where to."""
    group: Group = field(default_factory=Group)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.data == "bad":
            raise RecipeError("--data cannot be bad.")


@dataclass(frozen=True, kw_only=True)
class Quick:
    output: Path = Path("runs/x")
    resume: bool = False


@dataclass(frozen=True, kw_only=True)
class Anew:
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        unused("train", self.train, ("resume",), "each training begins anew.")


Ran = tuple[int, str, str]
Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("--flag", raises=error)`: exit code, output and error output of a program that does no more than that."""

    def call(*arguments: str, raises: BaseException | None = None, kind: type = Recipe) -> Ran:
        def main(recipe: Any) -> None:
            """What it is for."""
            if raises is not None:
                raise raises
            cli.say(recipe)

        monkeypatch.setattr(sys, "argv", ["recipes/x.py", *arguments])
        with pytest.raises(SystemExit) as exit_:
            cli.run(main, kind)
        shown = capsys.readouterr()
        return int(exit_.value.code or 0), shown.out, shown.err

    return call


@dataclass(frozen=True, kw_only=True)
class Several:
    data: tuple[str, ...]
    seed: int = 0
    widths: tuple[int, ...] = ()
    student: StudentConfig = field(default_factory=StudentConfig)


def test_a_flag_of_several_values_may_be_given_several_times() -> None:
    def parsed(flags: str) -> Several:
        return cli._parse(Several, flags.split(), "A recipe.")

    words = "--data a b --seed 1 --data=c --student.layers 0 --widths 4 --student.layers 1 2 --data d --widths 8"
    found = parsed(f"{words} --student.kind layers")
    assert (found.data, found.seed, found.widths) == (("a", "b", "c", "d"), 1, (4, 8))
    assert found.student.layers == (0, 1, 2)
    assert parsed("--data a --seed 1 --seed 2").seed == 2
    again = cli.varied(found, "--widths 1 --widths 2")
    assert (again.data, again.widths) == (found.data, (1, 2))


def test_flags_become_fields(run: Run) -> None:
    code, out, _ = run("--data", "b.txt", "--group.size", "7", "--train.epochs", "2")
    assert code == 0
    assert "data='b.txt'" in out
    assert "size=7" in out
    assert "epochs=2.0" in out


@dataclass(frozen=True, kw_only=True)
class OfAKind:
    data: str
    """The texts."""
    plan: bool = False
    student: StudentConfig = field(default_factory=StudentConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(learning_rate=2e-3, bank_size=4))


@pytest.mark.parametrize("kind", [*SUITED, "static"])
@pytest.mark.parametrize("form", ["--student.kind {}", "--student.kind static --student.kind={}"])
def test_a_kind_of_student_brings_its_rate_unless_one_is_given(kind: str, form: str) -> None:
    def parsed(*flags: str) -> OfAKind:
        name = ["--student.name", "some-model"] if kind == "pretrained" else []
        return cli._parse(OfAKind, [*flags, *form.format(kind).split(), *name, "--data", "a.txt"], "A recipe.")

    batch_size, rate = SUITED.get(kind, (256, 2e-3))
    alone = parsed().train
    assert (alone.batch_size, alone.learning_rate, alone.bank_size) == (batch_size, rate, 4)
    given = parsed("--plan", "--train.learning-rate", "7e-3", "--train.dropout")
    assert (given.plan, given.train.dropout) == (True, True)
    assert (given.train.batch_size, given.train.learning_rate) == (batch_size, 7e-3)
    assert cli.varied(given, "--train.epochs 7").train == dataclasses.replace(given.train, epochs=7.0)


def test_the_help_names_what_a_kind_brings(run: Run) -> None:
    _, out, _ = run("--help", "student", kind=OfAKind)
    brought = " ".join(out.split())
    for kind, (batch_size, rate) in SUITED.items():
        assert f"{batch_size} and {rate:.0e} for {kind}".replace("e-0", "e-") in brought


@dataclass(frozen=True, kw_only=True)
class OnLabels:
    train: TrainConfig = field(default_factory=TrainConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)


@pytest.mark.parametrize("group", ["train", "labels"])
def test_the_clipping_is_turned_off_as_its_help_says(run: Run, group: str) -> None:
    code, out, _ = run("--help", group, kind=OnLabels)
    assert (code, "0: do not clip. (default: 1.0)" in " ".join(out.split())) == (0, True)
    recipe = cli._parse(OnLabels, [f"--{group}.clip-norm", "0"], "A recipe.")
    assert getattr(recipe, group).clip_norm == 0
    assert run(f"--{group}.clip-norm", "-1", kind=OnLabels)[2] == (
        f"\nerror: --{group}: clip_norm is 0 or more, got -1.0.\n"
    )


def test_help_says_what_it_is_for_and_names_debug(run: Run) -> None:
    code, out, err = run("--help")
    assert (code, err) == (0, "")
    assert "What it is for." in out
    assert "--debug" in out
    assert "--train.resume" in out
    assert "--train.no-resume" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group.sise", "3"], "--group.size"),
        (["--group.size", "x"], "--group.size"),
        (["--train.schedule", "cosin"], "cosine"),
    ],
)
def test_a_flag_that_is_not_understood_is_shown_with_what_is_meant(
    run: Run, arguments: list[str], message: str
) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "bad"], "error: --data cannot be bad."),
        (["--group.size", "0"], "error: --group: size is 1 or more, got 0."),
        (["--train.warmup-fraction", "2"], "error: --train: warmup_fraction is 0..1, got 2.0."),
    ],
)
def test_a_value_that_cannot_be_is_one_plain_line(run: Run, arguments: list[str], message: str) -> None:
    assert run(*arguments) == (2, "", f"\n{message}\n")


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.DistillError)]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind is not errors.DistillError])
def test_every_kind_of_error_has_its_exit_code_and_no_traceback(run: Run, kind: type[errors.DistillError]) -> None:
    code, _, err = run(raises=kind("what went wrong."))
    assert (code, err) == (kind.exit_code, "\nerror: what went wrong.\n")
    assert 2 <= code <= 7


@pytest.mark.parametrize("flags", ["--data it's", '--data "b', "--data b\\"])
def test_a_quote_that_is_not_closed_is_told(flags: str) -> None:
    with pytest.raises(RecipeError, match=r"--data .*: a quote is not closed, or a backslash is the end"):
        cli.varied(Recipe(data="a"), flags)
    assert cli.varied(Recipe(data="a"), "--data it\\'s").data == "it's"


def test_debug_adds_the_traceback(run: Run) -> None:
    code, _, err = run("--debug", raises=errors.DataError("what went wrong."))
    assert code == 3
    assert "error: what went wrong." in err
    assert "Traceback" in err
    assert "test_cli.py" in err


def test_an_error_of_the_program_itself_is_not_hidden(run: Run) -> None:
    with pytest.raises(TypeError):
        run(raises=TypeError("a mistake of ours"))


def test_a_disk_that_is_full_says_which_and_how_to_go_on(run: Run) -> None:
    code, _, err = run("--data", "b.txt", raises=OSError(errno.ENOSPC, "No space left on device", "/data/x"))
    assert code == 6
    assert "/data/x: No space left on device; free some space there." in err
    assert "python recipes/x.py --data b.txt --train.resume" in err


@pytest.mark.parametrize(
    ("kind", "arguments", "command"),
    [
        (Recipe, ["--data", "b c.txt"], "go on:\n  python recipes/x.py --data 'b c.txt' --train.resume"),
        (Recipe, ["--train.resume"], "go on:\n  python recipes/x.py --train.resume"),
        (Quick, [], "go on:\n  python recipes/x.py --resume"),
        (Anew, [], "begin again:\n  python recipes/x.py"),
        (Group, ["--size", "4"], "begin again:\n  python recipes/x.py --size 4"),
    ],
)
def test_a_stop_tells_the_command_that_goes_on(run: Run, kind: type, arguments: list[str], command: str) -> None:
    stop = Stopped("stopped after step 3 of 9; everything is saved. Run the same command with ...", 143)
    code, _, err = run(*arguments, raises=stop, kind=kind)
    assert code == 143
    kept = "everything is saved" if command.startswith("go on") else "this recipe cannot resume"
    assert err == f"\nerror: stopped after step 3 of 9; {kept}. To {command}\n"
    code, _, err = run(*arguments, raises=KeyboardInterrupt(), kind=kind)
    assert code == 130
    assert err.endswith(f" To {command}\n")


def test_a_termination_outside_of_the_training_is_a_stop_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def main(recipe: Recipe) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("it went on")

    monkeypatch.setattr(sys, "argv", ["recipes/x.py"])
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as exit_:
        cli.run(main, Recipe)
    assert exit_.value.code == 143
    assert "python recipes/x.py --train.resume" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "error", [SystemError("returned a result with an exception set"), RuntimeError("gloo"), ValueError()]
)
def test_an_error_that_a_library_makes_of_sigterm_is_the_signal(
    error: Exception, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(recipe: Recipe) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Stopped:
            raise error from None

    with pytest.raises(SystemExit) as exit_:
        cli.run(main, Recipe, [])
    assert exit_.value.code == 143
    assert "terminated; what was saved stays" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (None, 7, ""),
        (IntegrityError("damaged."), 4, "error: damaged.\n"),
        (NotADirectoryError(errno.ENOTDIR, "Not a directory", "a/b"), 6, "error: a/b: Not a directory.\n"),
        (
            IsADirectoryError(errno.EISDIR, "Is a directory", "a/.x.tmp", None, "a/b"),
            6,
            "error: a/b: Is a directory.\n",
        ),
    ],
)
def test_other_programs_end_with_the_same_codes(
    error: Exception | None, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        if error:
            raise error
        return 7

    assert errors.reported(main) == code
    assert capsys.readouterr().err == message


# What is recorded


@pytest.fixture
def begun(tmp_path: Path) -> Recipe:
    """A recipe whose run has reached a checkpoint."""
    recipe = Recipe(data="texts/a.txt", output=tmp_path)
    cli.record(recipe, tmp_path)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    return recipe


def changed(recipe: Any, **train: Any) -> Any:
    return dataclasses.replace(recipe, train=dataclasses.replace(recipe.train, resume=True, **train))


def test_the_recipe_is_written_with_every_field(tmp_path: Path) -> None:
    cli.record(Recipe(output=tmp_path), tmp_path)
    written = json.loads((tmp_path / "recipe.json").read_text())
    assert written["recipe"]["train"]["batch_size"] == TrainConfig().batch_size
    assert written["recipe"]["output"] == str(tmp_path)
    assert set(written) == {"command", "recipe"}


def test_a_run_does_not_write_over_the_model_it_is_made_from(tmp_path: Path) -> None:
    student = tmp_path / "run" / "student"
    student.mkdir(parents=True)
    (student / "modules.json").write_text("[]")
    for config in (
        Recipe(output=tmp_path / "run", data=str(student)),
        Recipe(output=tmp_path / "run", data=f"{student}/"),
    ):
        with pytest.raises(RecipeError, match=r"^--data .*student/? would be overwritten by this run's own student"):
            cli.record(config, tmp_path / "run")
    assert not (tmp_path / "run" / "recipe.json").exists()
    cli.record(Recipe(output=tmp_path / "other", data=str(student)), tmp_path / "other")


def test_a_run_is_not_resumed_with_another_recipe(begun: Recipe) -> None:
    before = (begun.output / "recipe.json").read_bytes()
    with pytest.raises(IntegrityError, match=r"--train\.batch-size: was 256, is 128\nResume with the same flags"):
        cli.record(changed(begun, batch_size=128), begun.output)
    assert (begun.output / "recipe.json").read_bytes() == before


def test_a_recipe_that_fails_before_it_trains_leaves_the_earlier_run_resumable(begun: Recipe) -> None:
    for data in ("typo.txt", "typo-2.txt"):
        cli.record(dataclasses.replace(begun, data=data), begun.output)
    with pytest.raises(IntegrityError, match=r"--data: was texts/a\.txt, is typo\.txt"):
        cli.record(dataclasses.replace(changed(begun), data="typo.txt"), begun.output)
    cli.record(changed(begun), begun.output)
    cli.record(dataclasses.replace(begun, data="b.txt"), begun.output)
    checkpoint.clear(begun.output / "checkpoints")  # training begins
    (begun.output / "checkpoints" / "step-00000001").mkdir()
    cli.record(dataclasses.replace(changed(begun), data="b.txt"), begun.output)


def test_a_folder_of_other_files_is_not_taken_for_the_student(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    cli.record(Recipe(output=tmp_path), tmp_path)
    (tmp_path / "student" / "thesis.txt").write_text("")
    with pytest.raises(RecipeError, match="not a model's folder"):
        cli.record(Recipe(output=tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("held", "leaves", "refused"),
    [
        ("student", ("student",), False),
        ("student", (), True),
        ("student", ("head",), True),
        ("student", ("head", "student"), False),
        ("head", ("student",), True),
        ("head", (), True),
        ("head", ("head",), False),
        ("head", ("head", "student"), False),
        ("checkpoints", ("student",), False),
        ("checkpoints", (), True),
        ("checkpoints", ("head",), True),
    ],
)
def test_a_part_of_another_run_is_not_left_beside_the_result(
    tmp_path: Path, held: str, leaves: tuple[str, ...], refused: bool
) -> None:
    written = {"student": "modules.json", "head": "config.json", "checkpoints": "step-00000003/state.json"}
    path = tmp_path / held / written[held]
    path.parent.mkdir(parents=True)
    path.write_text('{"nb_proxy": 1}' if held == "head" else "[]")
    if held == "head":
        (path.parent / "model.safetensors").write_text("")
    if not refused:
        return cli.record(Recipe(output=tmp_path), tmp_path, leaves=leaves)
    with pytest.raises(RecipeError, match=rf"leave the rest \({held}\); name another --output"):
        cli.record(Recipe(output=tmp_path), tmp_path, leaves=leaves)
    assert not (tmp_path / "recipe.json").exists()


@pytest.mark.parametrize("recipe", ["classify", "evaluate", "match_embeddings"])
def test_recipes_say_what_they_leave(tmp_path: Path, recipe: str) -> None:
    """None of these makes what the folder holds; each is refused before it reads its data, which is not there."""
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "modules.json").write_text("[]")
    module, options = runs.recipe_module(recipe), {"train_data": "absent.csv", "test_data": "absent.csv"}
    if recipe == "evaluate":
        options = {"models": ("x",), "texts": ("absent.txt",)}
    if recipe == "match_embeddings":
        (tmp_path / "student").rename(tmp_path / "head")
        (tmp_path / "head" / "modules.json").unlink()
        (tmp_path / "head" / "config.json").write_text('{"nb_proxy": 1}')
        (tmp_path / "head" / "model.safetensors").write_text("")
        options = {"data": ("absent.txt",)}
    with pytest.raises(RecipeError, match="name another --output"):
        module.main(module.Recipe(output=tmp_path, **options))


@pytest.mark.parametrize(
    ("name", "content"), [("recipe.json", '{"flour": 500}'), ("recipe.json", ""), ("report.json", "{}")]
)
def test_a_file_of_somebody_else_is_not_overwritten(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=rf"{name} would be overwritten, .* distill.*--output"):
        cli.record(Recipe(output=tmp_path), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize("options", [{"save_every": 7}, {"keep_checkpoints": 9}, {"trackers": ("tensorboard",)}])
def test_a_run_is_resumed_with_what_changes_no_step(begun: Recipe, options: dict[str, Any]) -> None:
    cli.record(changed(begun, **options), begun.output)
    cli.record(dataclasses.replace(changed(begun), data="elsewhere/texts/a.txt"), begun.output)


def test_a_student_of_another_folder_is_another_student(tmp_path: Path) -> None:
    """The checkpoint knows it by names and shapes, which two students of one name share."""
    module = runs.recipe_module("match_embeddings")
    student = StudentConfig(kind="layers", name="runs/a/student")
    recipe = module.Recipe(data=("texts/a.txt",), student=student, output=tmp_path)
    cli.record(recipe, tmp_path)
    (tmp_path / "checkpoints" / "step-00000003").mkdir(parents=True)
    cli.record(dataclasses.replace(changed(recipe), data=("elsewhere/a.txt",)), tmp_path)
    other = dataclasses.replace(student, name="runs/b/student")
    with pytest.raises(IntegrityError, match=r"--student\.name: was runs/a/student, is runs/b/student\n"):
        cli.record(dataclasses.replace(changed(recipe), student=other), tmp_path)


def test_a_variant_is_resumed_with_its_own_flags_alone(
    tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablate, texts = runs.recipe_module("ablate"), runs.texts(40)
    recipe = ablate.Recipe(
        data=("a.txt",),
        teacher=TeacherConfig(name=str(tiny_bert)),
        student=StudentConfig(kind="layers", layers=(0, 3)),
        train=TrainConfig(steps=2, batch_size=8, bank_size=16),
    )
    teacher = recipe.teacher.load()
    store = embed(texts, teacher, tmp_path / "store")

    def trained(one: Any) -> Any:
        return ablate.trained(one, 0, teacher, store, texts, tmp_path / "seed-0" / "variant-0")

    assert trained(recipe).steps == 2
    before = (tmp_path / "seed-0" / "variant-0" / "metrics.jsonl").read_text()
    trained(dataclasses.replace(changed(recipe), variants=("loss.kl 1",), seeds=(0, 1)))  # these stand beside it
    assert (tmp_path / "seed-0" / "variant-0" / "metrics.jsonl").read_text() == before
    other = dataclasses.replace(recipe.student, layers=(1, 4))  # of the same shapes
    with pytest.raises(IntegrityError, match=r"--student\.layers: was \[0, 3\], is \[1, 4\]"):
        trained(dataclasses.replace(changed(recipe), student=other))
    trained(dataclasses.replace(recipe, student=other))
    assert "earlier run" not in capsys.readouterr().err


COMMIT = "a" * 40


@pytest.mark.parametrize("name", ["org/name::train", "org/name@v1::train", f"org/name@{COMMIT}::train"])
def test_a_run_on_a_hub_data_set_is_resumed_by_the_branch_and_by_the_commit(begun: Recipe, name: str) -> None:
    path = begun.output / "recipe.json"
    written = json.loads(path.read_text())
    for before in ("org/name::train", f"org/name@{COMMIT}::train"):
        written["recipe"]["data"] = before
        path.write_text(json.dumps(written))
        cli.record(dataclasses.replace(changed(begun), data=name), begun.output)
    for other in ("org/other::train", f"org/name@{COMMIT}::test", "name@v1.txt"):
        with pytest.raises(IntegrityError, match="--data: was"):
            cli.record(dataclasses.replace(changed(begun), data=other), begun.output)


def test_a_flag_that_is_newer_than_the_run_is_at_its_default(begun: Recipe) -> None:
    path = begun.output / "recipe.json"
    written = json.loads(path.read_text())
    del written["recipe"]["group"], written["recipe"]["train"]["ema_decay"]
    path.write_text(json.dumps(written))
    cli.record(changed(begun), begun.output)
    path.write_text(json.dumps(written))
    with pytest.raises(IntegrityError, match=r"differs:\n  --train\.ema-decay: was None, is 0\.9\nResume"):
        cli.record(changed(begun, ema_decay=0.9), begun.output)
    with pytest.raises(IntegrityError, match=r"--group\.size: was 3, is 4"):
        cli.record(dataclasses.replace(changed(begun), group=Group(size=4)), begun.output)
    del written["recipe"]["data"]
    path.write_text(json.dumps(written))
    with pytest.raises(IntegrityError, match=r"--data: was a\.txt, is b\.txt"):
        cli.record(dataclasses.replace(changed(begun), data="b.txt"), begun.output)


def test_a_new_run_says_that_it_replaces_an_earlier_one(begun: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    (begun.output / "non-finite.json").write_text("{}")
    cli.record(begun, begun.output)
    assert "holds an earlier run, which this one replaces" in capsys.readouterr().err
    assert not (begun.output / "non-finite.json").exists()


def test_an_output_that_cannot_be_written_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ResourceError, match=rf"{output}: .* Name a folder you may write to with --output\."):
            cli.record(Recipe(output=output), output)


@pytest.fixture
def small_recipe(tmp_path: Path) -> Path:
    script = tmp_path / "threads.py"
    script.write_text(
        "import os\nimport torch\nfrom distill import cli, distributed\nfrom dataclasses import dataclass\n"
        "@dataclass(frozen=True)\nclass Recipe:\n    pass\n"
        "def main(recipe):\n"
        "    line = f'threads {torch.get_num_threads()} of {distributed.world_size()} processes\\n'\n"
        "    os.write(1, line.encode())\n"  # at once: of two processes' buffers the words may come mixed
        "if __name__ == '__main__':\n    cli.run(main, Recipe)\n"
    )
    return script


def test_a_lone_process_of_accelerate_launch_uses_all_cores(small_recipe: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", str(small_recipe)]
    for given, expected in ((None, len(os.sched_getaffinity(0))), ("2", 2)):
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        environment |= {"OMP_NUM_THREADS": given} if given else {}
        ran = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=120, check=True)
        assert f"threads {expected}" in ran.stdout


def test_a_launcher_that_starts_fewer_processes_than_it_was_asked_for_is_told_of(small_recipe: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("MASTER_ADDR", "WORLD_SIZE")}
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    for flags, processes in (
        (["--cpu", "--num_processes=2"], 1),
        (["--cpu"], 1),
        (["--multi_gpu", "--num_processes=2"], 2),
    ):
        command = [*launch, *flags, "--main_process_port=0", str(small_recipe)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
        assert f"of {processes} processes" in ran.stdout
        assert ("accelerate launch --multi_gpu --num_processes N" in ran.stderr) == (
            "--num_processes=2" in flags and processes == 1
        )


@pytest.mark.parametrize("kind", [*KINDS, Stopped])
def test_errors_travel_between_processes(kind: type[BaseException]) -> None:
    error = Stopped("stopped after step 3", 143) if kind is Stopped else kind("what was wrong")
    arrived = pickle.loads(pickle.dumps(error))
    assert (type(arrived), str(arrived), arrived.exit_code) == (kind, str(error), error.exit_code)


def test_a_stop_is_no_failure_that_could_be_swallowed() -> None:
    assert not issubclass(Stopped, Exception)


def test_bytes_that_are_no_unicode_are_told_by_their_escapes(capsys: pytest.CaptureFixture) -> None:
    """A stream that takes strict UTF-8, as pytest's and a notebook's do, would refuse them."""

    @dataclass(frozen=True)
    class Nothing:
        """No flags."""

    with pytest.raises(SystemExit):
        cli._parse(Nothing, ["--nothing", "\udcff"], "A recipe.")
    assert "\\udcff" in "".join(capsys.readouterr())
