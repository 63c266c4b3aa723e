"""Gates for people's own CI: what a score must reach, read before the run and judged after all is written.

overlap@10 >= 0.6                                the student's score
overlap@10 low >= 0.55                           the low end of its interval
kept ndcg@10 >= 0.9                              its share of the teacher's score
student -> teacher's index: ndcg@10 >= 0.5       another row of the table
"""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distill import distributed
from distill.errors import GateMissed, RecipeError
from distill.evaluation import INDEX, START, STUDENT, Scores
from distill.evaluation.fidelity import FURTHER, HEADLINES
from distill.metrics import Interval

OF_A_RUN = (STUDENT, STUDENT + INDEX, START, START + INDEX, "teacher")  # rows of a training run's table
IN_AN_INDEX = ("ndcg@10", "recall@10")
FORM = re.compile(
    r"(?P<name>\S.*?)(?:\s+(?P<end>low|high))?"
    r"\s*(?P<operator>>=|<=|>|<)\s*(?P<bound>[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)",
    re.IGNORECASE,
)
HOLDS = {
    ">=": lambda value, bound: value >= bound,
    "<=": lambda value, bound: value <= bound,
    ">": lambda value, bound: value > bound,
    "<": lambda value, bound: value < bound,
}


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One gate, its names as the table prints them. `kept`: of the share of the teacher's score; `end`: of its interval."""

    text: str
    system: str
    metric: str
    operator: str
    bound: float
    kept: bool = False
    end: str | None = None

    def judge(self, scores: Scores) -> "Verdict":
        """A score that was not measured, or is no number, is missed."""
        of = [scores.of(name) for name in ((self.system, "teacher") if self.kept else (self.system,))]
        if not all(self.metric in row for row in of):
            return Verdict(self, None)
        if self.kept:
            return Verdict(self, scores.share(self.system, "teacher", self.metric))
        return Verdict(self, of[0][self.metric].interval)


@dataclass(frozen=True)
class Verdict:
    """A gate with the score that it was held against; None: not measured."""

    gate: Gate
    score: Interval | None

    @property
    def passed(self) -> bool:
        value = math.nan if self.score is None else getattr(self.score, self.gate.end or "value")
        return HOLDS[self.gate.operator](value, self.gate.bound)

    def __str__(self) -> str:
        what = f"{self.gate.system}{': kept' if self.gate.kept else ':'} {self.gate.metric}"
        found = "was not measured" if self.score is None else f"is {self.score}"
        return f"gate {self.gate.text}: {'passed' if self.passed else 'MISSED'}, {what} {found}"

    def as_json(self) -> dict[str, Any]:
        score = self.score.as_json() if self.score else None
        return {"gate": self.gate.text, "passed": self.passed, "score": score}


def read_gates(texts: Sequence[str], tasks: Sequence[str], systems: Sequence[str] = OF_A_RUN) -> tuple[Gate, ...]:
    """Gates from their texts. `tasks` are the names of scores with labels, `systems` the rows of the table to come, the first by default.

    RecipeError for what is no gate, or names a system or a score that there will not be, with the nearest names there are.
    """
    return tuple(_read(text, tasks, systems) for text in texts)


def judge(gates: Sequence[Gate], scores: Scores) -> list[Verdict]:
    return [gate.judge(scores) for gate in gates]


def enforce(verdicts: Sequence[Verdict]) -> None:
    """Print a line a gate on the main process; GateMissed, exit code 7, if any was missed."""
    if verdicts and distributed.is_main():
        print("", *verdicts, sep="\n", flush=True)
    missed = [verdict.gate.text for verdict in verdicts if not verdict.passed]
    if missed:
        raise GateMissed(f"{len(missed)} of {len(verdicts)} gates missed: {'; '.join(missed)}. Everything is written.")


def _read(text: str, tasks: Sequence[str], systems: Sequence[str]) -> Gate:
    found = FORM.fullmatch(text.strip())
    if found is None:
        raise RecipeError(
            f'--gate is a score, >= or <= and a number, as "overlap@10 >= 0.6", "overlap@10 low >= 0.55", '
            f'"kept ndcg@10 >= 0.9" or "SYSTEM: ndcg@10 >= 0.5"; got {text!r}.'
        )
    named, short = _parted(found["name"], tasks, systems)
    system = _system(named, systems)
    kept, short = _without_kept(short)
    tiers = _metrics(system, tasks) if not kept else [_in(system, tasks)]
    end = found["end"] and found["end"].lower()
    return Gate(
        text=text.strip(),
        system=system,
        metric=_metric(short, tiers, text),
        operator=found["operator"],
        bound=float(found["bound"]),
        kept=kept,
        end=end,
    )


def _parted(name: str, tasks: Sequence[str], systems: Sequence[str]) -> tuple[str | None, str]:
    """The system, if one is named, and the score. A colon may also stand in the name of a score, as of a Hub data set's split."""
    parts = [(name[:place].strip(), name[place + 1 :].strip()) for place, letter in enumerate(name) if letter == ":"]
    known = [part for part in parts if _plain(part[0]) in _known(systems)]
    words = _without_kept(name)[1].casefold().split()
    if known or not parts:
        return known[-1] if known else (None, name)
    is_a_score = any(all(_has(task.casefold(), word) for word in words) for task in tasks)
    return (None, name) if is_a_score else parts[-1]


def _without_kept(name: str) -> tuple[bool, str]:
    found = re.fullmatch(r"(kept\s+)?(.*)", name, re.IGNORECASE)
    assert found is not None
    return bool(found[1]), found[2]


def _metrics(system: str, tasks: Sequence[str]) -> list[Sequence[str]]:
    """The scores of a row of the table, and those that the summary tells of beside it."""
    if " -> " in system:
        return [_in(system, tasks)]
    return [tasks] if system == "teacher" else [[*HEADLINES, *tasks], FURTHER]


def _in(system: str, tasks: Sequence[str]) -> list[str]:
    """Those tasks that a system is scored on: with another's index, retrieval alone."""
    return [task for task in tasks if " -> " not in system or task.endswith(IN_AN_INDEX)]


def _system(name: str | None, systems: Sequence[str]) -> str:
    """A row by its name; "student" is the first row's system, whatever it is called, unless a row has that name."""
    if name is None:
        return systems[0]
    known, wanted = _known(systems), _plain(name)
    if wanted not in known:
        raise RecipeError(f"--gate knows no system {name!r}.{_nearest(wanted, systems)}")
    return known[wanted]


def _known(systems: Sequence[str]) -> dict[str, str]:
    aliases = {STUDENT + one.removeprefix(systems[0]).casefold(): one for one in systems if one.startswith(systems[0])}
    return aliases | {one.casefold(): one for one in systems}


def _plain(name: str) -> str:
    return " ".join(name.replace("→", "->").replace("’", "'").split()).casefold()


def _metric(short: str, tiers: Sequence[Sequence[str]], text: str) -> str:
    """The one name in which each of the words stands, sought among the table's first.

    A word is a whole one: "overlap@1" is not "overlap@10".
    """
    words = short.casefold().split()
    for names in tiers:
        exact = [name for name in names if name.casefold() == " ".join(words)]
        fitting = exact or [name for name in names if all(_has(name.casefold(), word) for word in words)]
        if len(fitting) > 1:
            raise RecipeError(
                f"--gate {text!r}: {short!r} may be {' or '.join(map(repr, fitting))}; give the whole name."
            )
        if fitting:
            return fitting[0]
    everything = [name for names in tiers for name in names]
    raise RecipeError(f"--gate {text!r}: there will be no score {short!r}.{_nearest(short, everything)}")


def _has(name: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", name) is not None


def _nearest(wanted: str, names: Sequence[str]) -> str:
    """Did you mean ...? And all that there are, where nothing is near or they are few."""
    by_case: Mapping[str, str] = {name.casefold(): name for name in names}
    near = [by_case[name] for name in difflib.get_close_matches(wanted.casefold(), by_case, n=2, cutoff=0.5)]
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{meant} There are: {', '.join(names)}." if names else " There are no labelled data to score on."
