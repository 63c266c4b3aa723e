"""The page of a run: whole without a network, safe whatever the texts say, and seen in a browser where there is one."""

import html
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import page, report
from distill.encoder import Encoder
from distill.errors import DataError
from distill.evaluation import INDEX, MIXED, START, STUDENT, Score, Scores, closeup, fidelity_slices
from distill.evaluation.scores import mean_score, rank_score
from distill.export import Provenance
from distill.gates import read_gates
from distill.metrics import Interval
from distill.page.charts import lines, scale_of
from distill.page.comparing import labels
from distill.page.run import run_page
from distill.page.words import verdict
from distill.training import Run

FIGURES = ["retention", "fidelity", "length", "margin", "matrix", "loss", "rate", "size"]
VOID = {"meta", "br", "img", "link", "input"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = [
    "</style><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}{% for x in y %}",
    "&lt;b&gt; &amp; ]]> --> ' \"",
    "\u202eright to left\u202c and \x00 NUL, \ud800 half a pair",
    "nolinebreak" * 40,
]


class Page(HTMLParser):
    """Elements with their attributes, the text that is read, and whether every tag is closed where it should be."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def ids(self) -> list[str]:
        return [value for _, attributes in self.elements if (value := attributes.get("id"))]

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(text: str) -> Page:
    """What holds of every page: well-formed, ids unique, nothing fetched, nothing run, no number that is none."""
    parsed = Page(text)
    assert text.startswith("<!doctype html>")
    assert len(set(parsed.ids())) == len(parsed.ids())
    tags = {tag for tag, _ in parsed.elements}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "a", "use", "image", "form", "base"}
    for tag, attributes in parsed.elements:
        assert not {name for name in attributes if name.startswith("on") or name in ("src", "href", "xlink:href")}, tag
        for name, value in attributes.items():
            assert not re.search(r"\bnan\b|\binf\b|None|undefined", value or ""), (tag, name, value)
    style = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert not re.search(r"url\(|@import|https?:", style)
    text.encode("utf-8")
    return parsed


def shown(parsed: Page) -> None:
    assert not re.search(r"\b(nan|inf|None|undefined|Undefined)\b", parsed.text())


# A run of every kind of score


def scores_of(texts: list[str], task: str = "cacm-docs") -> Scores:
    teacher = torch.randn(10, 24)[torch.randint(10, (len(texts),))] + 0.5 * torch.randn(len(texts), 24)
    vectors = {START: teacher + 0.8 * torch.randn_like(teacher), STUDENT: teacher + 0.3 * torch.randn_like(teacher)}
    lengths = torch.randint(3, 30, (len(texts),), dtype=torch.int32)
    slices = {name: fidelity_slices(rows, teacher, token_counts=lengths) for name, rows in vectors.items()}
    gold = torch.randn(60)

    def row(level: float, system: str = "") -> dict[str, Score]:
        own = slices[system][0].scores if system else {}
        headlines = {name: own[name] for name in ("cosine to teacher", "neighbour overlap@10") if name in own}
        ndcg = level * torch.linspace(0.5, 1, 50, dtype=torch.float64) + 0.05 * torch.rand(50)
        found = {f"{task} ndcg@10": mean_score(ndcg), f"{task} recall@10": mean_score(ndcg)}
        return headlines | found | {"sts spearman": rank_score(gold + torch.randn(60) / (2 * level), gold)}

    def index(level: float) -> dict[str, Score]:
        return {name: score for name, score in row(level).items() if "spearman" not in name}

    undefined = Score(Interval(value=math.nan, low=math.nan, high=math.nan))
    table = {
        "teacher": row(0.8) | {"flat spearman": undefined},
        START: row(0.4, START),
        START + INDEX: index(0.4),
        STUDENT: row(0.6, STUDENT) | {"flat spearman": undefined},
        STUDENT + INDEX: index(0.75),
        STUDENT + MIXED: index(0.7),
    }
    speeds = {
        "teacher": {"parameters": 109_486_464, "bytes": 437_945_856, "texts_per_second": 11.2},
        STUDENT: {"parameters": 7_945_472, "bytes": 31_781_888, "texts_per_second": 26_912.0},
    }
    return Scores(table, speeds, slices, {name: closeup(texts, rows, teacher) for name, rows in vectors.items()})


def finished(folder: Path, model: Path, texts: list[str], said: str = "", **options: Any) -> Path:
    """A run's folder, as `finish` leaves it; `said` stands in whatever people may have written."""
    torch.manual_seed(0)
    student, teacher = Encoder.from_pretrained(model), Encoder.from_pretrained(model)
    student.name, teacher.name = f"a-student{said}", f"org/teacher{said}"
    folder.mkdir(parents=True, exist_ok=True)
    entries = [
        {"step": step + 1, "loss": 1 / (step + 1), f"loss/twin{said}": 0.5, "lr": 0.1 * step, "texts": 8}
        for step in range(options.pop("steps", 700))
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    run = Run(student, len(entries), 75.0, 1598.0, 0.1, folder, f"24,245 texts{said}", {"batch_size": 8, "note": said})
    provenance = Provenance(teacher=teacher, data=f"3 files{said}", loss=f"Loss(){said}", command=f"python x.py{said}")
    scores = options.pop("scores", None) or scores_of(texts, f"docs{said}")
    report.finish(run, scores, provenance, **options)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Path) -> Path:
    texts = [f"held-out text number {number}" for number in range(60)]
    gates = read_gates(
        ["overlap@10 >= 0", "student -> teacher's index: ndcg >= 0.1"], ["docs ndcg@10", "docs recall@10"]
    )
    return finished(tmp_path_factory.mktemp("page") / "run", tiny_bert, texts, gates=gates)


@pytest.fixture
def plain(run: Path) -> dict[str, Any]:
    return json.loads((run / page.REPORT).read_text())


# The page of a run


def test_the_page_holds_every_figure_once_and_says_what_a_reader_asks(run: Path, plain: dict[str, Any]) -> None:
    parsed = check_page((run / page.PAGE).read_text(encoding="utf-8"))
    shown(parsed)
    assert sorted(parsed.ids()) == sorted([*(f"figure-{name}" for name in FIGURES), "worst"])
    text = parsed.text()
    for part in (
        "a-student distilled from org/teacher",
        "with 13.8 times fewer parameters and 2,400 times the speed.",
        "passed overlap@10 >= 0",
        "before: untrained start",
        "the teacher itself",
        "The teacher finds",
        f'SentenceTransformer("{run}/student")',
        "python x.py",
        plain["teacher_fingerprint"]["weights"],
        plain["versions"]["torch"],
    ):
        assert part in text, part
    share = plain["retention_intervals"]["student -> teacher's index"]["docs ndcg@10"]
    assert f"{100 * share['value']:.1f} % [{100 * share['low']:.1f}, {100 * share['high']:.1f}]" in text
    first = plain["closeup"]["worst"]["student"][0]
    assert first["text"] in text
    cells = [attributes for tag, attributes in parsed.elements if tag == "rect" and "fill-opacity" in attributes]
    assert len(cells) == 3 * 20 * 20 + 11
    assert all(0 <= float(cell["fill-opacity"] or "") <= 1 for cell in cells)


def test_marks_stand_where_their_numbers_are(run: Path, plain: dict[str, Any]) -> None:
    text = (run / page.PAGE).read_text(encoding="utf-8")
    whole = plain["fidelity"]["student"][0]["scores"]["neighbour overlap@10"]["value"]
    assert f'<circle class="dot student" cx="{round(100 * whole, 2)}%"' in text
    shares = plain["retention_intervals"]
    ends = [one["high"] for row in shares.values() for one in row.values() if one["high"] is not None]
    value = shares["student"]["docs ndcg@10"]["value"]
    assert (
        f'<rect class="student" x="0" y="{{}}" width="{round(100 * value / max(1, *ends), 2)}%"'.partition("{}")[2]
        in text
    )


def test_report_json_keeps_its_keys_and_the_export_has_no_text_of_it(run: Path, plain: dict[str, Any]) -> None:
    assert {"teacher", "scores", "speed", "fidelity", "retention", "gains", "training", "settings"} <= plain.keys()
    assert (
        plain["retention"]["student"]["docs ndcg@10"]
        == plain["retention_intervals"]["student"]["docs ndcg@10"]["value"]
    )
    assert [gate["passed"] for gate in plain["gates"]] == [True, True]
    assert plain["closeup"]["texts"][0].startswith("held-out text")
    exported = "".join(path.read_text() for path in (run / "student").glob("*.*") if path.suffix in (".json", ".md"))
    assert "held-out text number" not in exported


@pytest.mark.parametrize(
    ("left_out", "gone"),
    [
        ("scores", "student → mixed index docs ndcg@10"),
        ("fidelity", "How near it is to the teacher"),
        ("closeup", "The student x teacher matrix"),
        ("closeup", "Where it is most wrong"),
        ("speed", "Size and speed"),
        ("retention_intervals", "{low:.1f}, {high:.1f}"),
        ("student", "parameters, vectors of width"),
        ("training", "Training 700 steps"),
        ("gains", "What training gained"),
    ],
)
def test_a_report_without_a_part_has_a_page_without_its_figures(
    plain: dict[str, Any], left_out: str, gone: str
) -> None:
    kept = plain["retention_intervals"]["student"]["docs ndcg@10"]
    gone = gone.format(**{name: 100 * value for name, value in kept.items()})
    assert gone in check_page(run_page(plain, [], "code")).text()
    del plain[left_out]
    parsed = check_page(run_page(plain, [], "code"))
    shown(parsed)
    assert gone not in parsed.text()


def test_a_run_of_an_early_release_or_of_nothing_has_a_page(plain: dict[str, Any]) -> None:
    early = {name: plain[name] for name in ("teacher", "scores", "retention", "speed", "training")}
    shown(check_page(run_page(early, [{"step": 1, "loss": 0.5, "lr": 0.1}], "code")))
    shown(check_page(run_page({"scores": {"teacher": {}, "student": {}}}, [], "code")))


def test_whatever_people_wrote_is_shown_as_they_wrote_it(tmp_path: Path, tiny_bert: Path) -> None:
    said = " ".join(HOSTILE)
    texts = [f"{HOSTILE[number % len(HOSTILE)]} {number}" for number in range(40)]
    folder = finished(tmp_path / "<b>run", tiny_bert, texts, said)
    text = (folder / page.PAGE).read_text(encoding="utf-8")
    parsed = check_page(text)
    assert "49" not in re.findall(r"\w+", html.unescape(said))
    readable = " ".join(said.replace("\x00", "\ufffd").replace("\ud800", "\ufffd").split())
    assert f"3 files{readable}" in parsed.text()
    assert f"python x.py{readable}" in parsed.text()
    other = page.write_comparison([folder], tmp_path / "compare.html").read_text(encoding="utf-8")
    assert "<b>run" in check_page(other).text()
    for figure in page.write_figures(folder, tmp_path / "figures"):
        assert "<script" not in figure.read_text(encoding="utf-8")


@settings(max_examples=15, deadline=None)
@given(text=st.text(min_size=1))
def test_any_text_leaves_the_page_whole(text: str) -> None:
    neighbour = {"text": text, "cosine": 0.5, "shared": True}
    worst = [{"text": text, "overlap": 0.1, "cosine": 0.2, "teacher": [neighbour], "student": [neighbour]}]
    found = {"teacher": text, "scores": {"teacher": {text: {"value": 0.5, "low": 0.4, "high": 0.6}}, "student": {}}}
    found |= {
        "closeup": {"texts": [text], "cosines": {"student": [[0.1]], "teacher": [[1.0]]}, "worst": {"student": worst}}
    }
    check_page(run_page(found, [], text))


# The verdict


def judged(**more: Any) -> str:
    score = {"value": 0.5, "low": 0.45, "high": 0.55}
    return verdict({"scores": {"teacher": {}, "student": {"neighbour overlap@10": score}}} | more)


def test_the_verdict_is_one_sentence_that_says_what_counts_first() -> None:
    assert judged() == "This student shares 50 % of the teacher’s ten nearest neighbours (45 to 55 %)."
    share = {"ndcg@10": 0.9, "recall@10": 0.95}
    speed = {
        "teacher": {"parameters": 100, "texts_per_second": 10.0},
        "student": {"parameters": 100, "texts_per_second": 25.0},
    }
    with_index = judged(retention={"student": {"ndcg@10": 0.8}, "student -> teacher's index": share}, speed=speed)
    assert with_index == (
        "This student keeps 90 % of the teacher’s ndcg@10 with your index unchanged, "
        "with no fewer parameters and 2.5 times the speed."
    )
    several = judged(retention={"student": {"sts spearman": 0.97, "ndcg@10": 0.8, "recall@10": 0.9}})
    assert several == "This student keeps 80 % (ndcg@10) to 97 % (sts spearman) of the teacher’s scores."


@pytest.mark.parametrize(
    ("low", "high", "begins"),
    [
        (
            -0.2,
            -0.1,
            "Training made this student worse than its untrained start in neighbour overlap@10: it shares 50 %",
        ),
        (
            -0.1,
            0.1,
            "Training this student gained nothing that stands out from chance over its untrained start: it shares",
        ),
        (0.1, 0.2, "This student shares 50 %"),
    ],
)
def test_the_verdict_warns_of_a_training_that_did_not_help(low: float, high: float, begins: str) -> None:
    gain = {"value": (low + high) / 2, "low": low, "high": high}
    assert judged(gains={"neighbour overlap@10": gain}).startswith(begins)
    near = {"neighbour overlap@10": {"value": 0.1, "low": 0.05, "high": 0.15}}
    labelled = judged(gains=near | {"ndcg@10": gain}, retention={"student": {"ndcg@10": 0.9}})
    assert labelled.startswith("Training made this student worse than its untrained start in ndcg@10") == (high < 0)
    assert labelled.startswith("This student keeps 90 %") == (high > 0)  # unclear by labels, but nearer to the teacher


# Charts


@pytest.mark.parametrize(
    ("values", "start", "steps"),
    [
        ([0.0, 1.0], None, [0, 0.5, 1]),
        ([3.2, 9.7], None, [2, 4, 6, 8, 10]),
        ([0.0003, 0.002], 0.0, [0, 0.0005, 0.001, 0.0015, 0.002]),
        ([5.0, 5.0], None, [2, 4, 6, 8]),
        ([0.0], 0.0, [0, 0.2, 0.4, 0.6]),
        ([], None, [0, 0.5, 1]),
    ],
)
def test_ticks_are_round_and_hold_the_values(values: list[float], start: float | None, steps: list[float]) -> None:
    scale = scale_of(values, start=start)
    assert scale.steps == pytest.approx(steps)
    assert all(scale.low <= value <= scale.high for value in values)


def test_long_curves_are_means_with_a_band_and_gaps_are_left_out() -> None:
    steps = list(range(1, 1001))
    values = [float("nan") if step == 3 else None if step == 4 else step % 2 for step in steps]
    chart = lines("loss", "Loss", steps, {"loss": values})
    assert chart is not None
    [line] = chart.lines
    assert len(line.points.split()) == 200
    assert line.band
    heights = [float(point.split(",")[1]) for point in line.points.split()]
    assert all(abs(height - 500) < 200 for height in heights)
    assert lines("loss", "Loss", [1, 2], {"loss": [None, math.nan]}) is None
    assert lines("loss", "Loss", [1], {"loss": [2.0]}).lines[0].points.count(",") == 2  # type: ignore[union-attr]


# Several runs, and the command


def test_runs_are_compared_on_one_page(
    run: Path, tmp_path: Path, tiny_bert: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = finished(tmp_path / "other", tiny_bert, [f"held-out text {n}" for n in range(60)], steps=1)
    capsys.readouterr()
    output = tmp_path / "compare.html"
    assert report.main([str(run), str(other / page.REPORT), "--output", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}\n"
    parsed = check_page(output.read_text(encoding="utf-8"))
    shown(parsed)
    names = labels([str(run), str(other)])
    assert all(name in parsed.text() for name in names)
    assert {"figure-retention", "figure-fidelity", "figure-size"} == set(parsed.ids())
    assert "Their numbers do not compare" not in parsed.text()  # the same seed, the same data
    changed = json.loads((other / page.REPORT).read_text())
    changed["scores"]["teacher"]["docs ndcg@10"]["value"] += 0.1
    (other / page.REPORT).write_text(json.dumps(changed))
    page.write_comparison([run, other], output)
    assert (
        f"{names[1]} was scored on other data than {names[0]}. Their numbers do not compare"
        in check_page(output.read_text()).text()
    )


def test_the_command_makes_a_page_anew_and_figures_that_stand_alone(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (run / page.PAGE).read_text()
    (run / page.PAGE).unlink()
    assert report.main([str(run)]) == 0
    assert (run / page.PAGE).read_text() == before
    assert report.main([str(run), "--figures", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"retention.svg", "fidelity.svg", "matrix.svg"}
    for path in tmp_path.iterdir():
        text = path.read_text(encoding="utf-8")
        assert text.lstrip().startswith("<svg xmlns=")
        assert len(text) < 200_000
        Page(text)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        report.main([str(run), str(run), "--figures", str(tmp_path)])


@pytest.mark.parametrize(("content", "message"), [(None, "does not exist"), ("{", "is no JSON"), ("[]", "no report")])
def test_what_is_no_run_is_named(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / page.REPORT).write_text(content)
    with pytest.raises(DataError, match=message):
        page.write_run(tmp_path)
    assert report.main([str(tmp_path)]) == 3
    assert capsys.readouterr().err.startswith("error: ")


def test_a_report_of_evaluate_is_compared_on_its_own_page(
    run: Path, plain: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = {"scores": {"a": plain["scores"][STUDENT], "teacher": plain["scores"]["teacher"]}, "differences": {}}
    (tmp_path / page.REPORT).write_text(json.dumps(models))
    for more in ([str(run)], ["--figures", str(tmp_path)], ["--output", str(tmp_path / "one.html")]):
        assert report.main([str(tmp_path), *more]) == 3
        assert f"of its own: {tmp_path / page.PAGE}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [page.REPORT]
    assert report.main([str(tmp_path)]) == 0


def test_names_lose_what_all_begin_with() -> None:
    assert labels(["runs/a/x", "runs/b/x"]) == ["a/x", "b/x"]
    assert labels(["/runs/a"]) == ["a"]
    assert labels(["runs/a", "runs/a/b"]) == ["a", "a/b"]


# In a browser

MEASURE = """<script>
const box = e => { const b = e.getBoundingClientRect(); return [e.id || e.getAttribute("class"), b.width, b.height]; };
const boxes = [...document.querySelectorAll("figure, svg.chart, svg.matrix, #worst")].map(box);
const clashes = [...document.querySelectorAll("svg text.value")].filter(value => {
  const label = value.previousElementSibling.querySelector("text").getBoundingClientRect();
  return label.right > value.getBoundingClientRect().left; }).map(value => value.textContent);
const wide = document.documentElement.scrollWidth;
parent.postMessage(JSON.stringify({boxes, clashes, wide, window: innerWidth}), "*");
</script>"""
# Headless windows are 500 pixels wide or more; a frame may be as narrow as a phone.
FRAME = """<!doctype html><script>onmessage = event => document.documentElement.dataset.measured = event.data;</script>
<iframe src="{src}" width="{width}" height="900" style="border: 0"></iframe>"""


@pytest.fixture(scope="module")
def browse(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[str, str]]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed to open the page in")
    profile = tmp_path_factory.mktemp("chromium")

    def call(path: Path) -> tuple[str, str]:
        flags = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-background-networking",
            "--disable-dev-shm-usage",
        ]
        flags += [
            f"--user-data-dir={profile}",
            "--enable-logging=stderr",
            "--window-size=1300,1000",
            "--virtual-time-budget=5000",
            "--dump-dom",
        ]
        done = subprocess.run(
            [CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=240, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)

    return call


def measured(document: str) -> dict[str, Any]:
    return json.loads(html.unescape(re.search(r'data-measured="([^"]*)"', document)[1]))  # type: ignore[index]


@pytest.mark.parametrize("width", [1100, 390])
def test_every_figure_is_seen_and_no_page_is_wider_than_its_window(
    browse: Callable[..., tuple[str, str]], run: Path, tmp_path: Path, width: int
) -> None:
    text = (run / page.PAGE).read_text(encoding="utf-8")
    probed = tmp_path / "probed.html"
    probed.write_text(re.sub(r"<meta http-equiv[^>]*>", "", text).replace("</body>", f"{MEASURE}</body>"))
    (tmp_path / "frame.html").write_text(FRAME.format(src=probed.name, width=width))
    found = measured(browse(tmp_path / "frame.html")[0])
    assert found["window"] == width
    assert found["wide"] <= width
    assert found["clashes"] == []
    boxes = {name: (wide, high) for name, wide, high in found["boxes"]}
    assert {*(f"figure-{name}" for name in FIGURES), "worst"} <= boxes.keys()
    assert all(wide >= 90 and high >= 12 for _, wide, high in found["boxes"]), found["boxes"]


def test_the_console_stays_silent(browse: Callable[..., tuple[str, str]], run: Path, tmp_path: Path) -> None:
    assert browse(run / page.PAGE)[1] == ""
    loud = tmp_path / "loud.html"  # what would be heard: a script that the page's own policy refuses
    loud.write_text((run / page.PAGE).read_text().replace("</body>", "<script>1</script></body>"))
    assert "Content Security Policy" in browse(loud)[1]
