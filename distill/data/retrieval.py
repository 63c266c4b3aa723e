"""Documents, queries, and judgements of which document answers which query."""

import re
from dataclasses import dataclass
from pathlib import Path

from distill.errors import DataError
from distill.tables.files import read_lines, refuse_missing
from distill.tables.sources import Source, read_table
from distill.tables.table import find_column, with_left_out, with_names


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Documents, queries, and which document is how relevant to which query: qrels[query id][document id] = grade.

    `source` is where the three come from, a Hub data set with its commit; it names what was left out, too.
    """

    corpus_ids: list[str]
    corpus: list[str]
    query_ids: list[str]
    queries: list[str]
    qrels: dict[str, dict[str, int]]
    empty: int = 0  # documents and queries without text, left out
    unknown: int = 0  # judgements of documents or queries that do not exist, left out
    source: str = ""


def load_retrieval(corpus: Source, queries: Source, qrels: str | Path) -> Retrieval:
    """Documents and queries with columns id (or _id), text and perhaps title (put before the text); TREC or BEIR qrels.

    Documents and queries come from files or Hub data sets, judgements from a file.
    Negative grades, which TREC gives to junk, count as 0. Judgements of ids that do not exist are left out and counted.
    """
    corpus_ids, documents, empty_documents, corpus_name = _identified(corpus)
    query_ids, texts, empty_queries, queries_name = _identified(queries)
    judgements, unknown = _qrels(Path(qrels), set(query_ids), set(corpus_ids))
    empty = empty_documents + empty_queries
    left_out = {"empty": empty, "judgements of unknown ids": unknown}
    return Retrieval(
        corpus_ids=corpus_ids,
        corpus=documents,
        query_ids=query_ids,
        queries=texts,
        qrels=judgements,
        empty=empty,
        unknown=unknown,
        source=with_left_out(f"{corpus_name}, {queries_name}, {qrels}", left_out),
    )


def _identified(source: Source) -> tuple[list[str], list[str], int, str]:
    table = read_table(source, wanted=("id", "_id", "title", "text"))
    name, text = find_column(table, "_id", "id"), find_column(table, "text")
    heading = (with_names(table.columns, ["title"]) or ["title"])[0]
    seen: dict[str, int] = {}
    texts: list[str] = []
    empty = 0
    for number, row in table.rows:
        key = table.cell(number, row, name)
        key = str(key) if isinstance(key, int) and not isinstance(key, bool) else table.text(number, row, name)
        title = table.text(number, row, heading) if row.get(heading) else ""
        whole = f"{title} {table.text(number, row, text)}".strip()
        if not whole:
            empty += 1
            continue
        if key in seen:
            raise DataError(f"{table.at(number, name)}: the id {key!r} was given before, in {table.unit} {seen[key]}.")
        seen[key] = number
        texts.append(whole)
    if not seen:
        raise DataError(f"{table.name} holds no text with an id.")
    return list(seen), texts, empty, table.name


def _qrels(path: Path, queries: set[str], documents: set[str]) -> tuple[dict[str, dict[str, int]], int]:
    refuse_missing(path)
    qrels: dict[str, dict[str, int]] = {}
    unknown = total = 0
    for number, line in read_lines(path):
        parts = line.split("\t") if line.count("\t") in (2, 3) else line.split()
        parts = [part.strip() for part in parts]
        if not line.strip() or (number == 1 and parts[-1].lower() in ("score", "relevance", "grade")):
            continue
        if len(parts) not in (3, 4) or not (whole := re.fullmatch(r"([+-]?\d{1,9})(\.0+)?", parts[-1])):
            raise DataError(
                f"{path}, line {number}: expected 'query 0 document grade' (TREC) or 'query document grade' (BEIR) with a "
                f"whole number as grade, got {line.strip()[:80]!r}."
            )
        query, document, grade = parts[0], parts[-2], max(0, int(whole[1]))
        total += 1
        if query not in queries or document not in documents:
            unknown += 1
        elif qrels.setdefault(query, {}).setdefault(document, grade) != grade:
            raise DataError(
                f"{path}, line {number}: {document!r} has grade {grade} for query {query!r}, and "
                f"{qrels[query][document]} further up."
            )
    if not qrels:
        raise DataError(
            f"{path}: none of its {total} judgements names a query and a document that exist. "
            f"Do the files belong together? Query ids look like {sorted(queries)[:3]}, document ids like {sorted(documents)[:3]}."
        )
    return qrels, unknown
