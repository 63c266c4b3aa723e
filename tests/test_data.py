"""What is read from files, lists and data sets, and how a row that cannot be used is named."""

import csv
import gzip
import io
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distill.data import load_labelled, load_pairs, load_retrieval, load_texts
from distill.errors import DataError, DistillError, ResourceError
from distill.evaluation import EvaluationData
from distill.tables import files, sources

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def real() -> Callable[[str], Path]:
    def find(name: str) -> Path:
        path = REAL / name
        if not path.exists():
            pytest.skip(f"{path} is not on this machine")
        return path

    return find


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, str | bytes], Path]:
    """Write a file under a name; gzip it where the name says so."""

    def write(name: str, content: str | bytes) -> Path:
        path = tmp_path / name
        raw = content.encode() if isinstance(content, str) else content
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return write


def refused(path: Any, *words: str, **options: Any) -> str:
    """The message with which a source is refused, which holds all `words` and takes one line."""
    with pytest.raises(DataError) as caught:
        load_texts(path, **options)
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    return message


# Formats


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one\ntwo\n\n  \none\nthree"),
        (
            "a.jsonl",
            '{"text": "one"}\n{"text": "two"}\n{"text": ""}\n{"text": " "}\n{"text": "one"}\n{"text": "three"}',
        ),
        ("a.csv", 'text,n\none,1\ntwo,2\n,3\n"  ",4\none,5\nthree,6\n'),
        ("a.tsv", "n\ttext\n1\tone\n2\ttwo\n3\t\n4\t \n5\tone\n6\tthree\n"),
    ],
)
def test_unique_texts_in_order_with_a_count_of_the_rest(write, name: str, content: str, packed: str) -> None:
    result = load_texts(write(name + packed, content))
    assert result.texts == ["one", "two", "three"]
    report = result.report
    assert (report.rows, report.kept, report.empty, report.duplicates) == (6, 3, 2, 1)
    assert "3 texts from 6 rows (2 empty and 1 duplicates left out)" in str(report)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.txt", "one\ntwo\none\n"), ("a.csv", "text,n\none,1\ntwo,2\none,3\n"), ("a.jsonl", '{"text":"one"}\n' * 3)],
)
def test_duplicates_can_be_kept_so_that_rows_stay_aligned(write, name: str, content: str) -> None:
    result = load_texts(write(name, content), unique=False)
    assert result.texts == (["one", "two", "one"] if "two" in content else ["one"] * 3)
    assert (result.report.rows, result.report.kept, result.report.duplicates) == (3, 3, 0)
    assert load_texts(["b", "a", "b"], unique=False).texts == ["b", "a", "b"]
    assert load_texts(["b", "b", "a"], unique=False, limit=2).texts == ["b", "b"]


@pytest.mark.parametrize("blank", ["", " ", "\u2003"])
def test_an_empty_row_is_named_where_leaving_it_out_would_move_the_others(write, blank: str) -> None:
    path = write("a.txt", f"one\n{blank}\ntwo\n")
    assert load_texts(path).texts == ["one", "two"]
    with pytest.raises(DataError, match=r"a\.txt, line 2, column 'text': the text is empty"):
        load_texts(path, unique=False)
    with pytest.raises(DataError, match="item 3, column 'text': the text is empty"):
        load_texts(["x", "y", blank], unique=False)


def test_windows_line_ends_and_a_byte_order_mark(write) -> None:
    assert load_texts(write("a.txt", b"\xef\xbb\xbfone\r\ntwo\r\n")).texts == ["one", "two"]
    assert load_texts(write("a.csv", b"\xef\xbb\xbftext,n\r\none,1\r\n")).texts == ["one"]
    assert load_texts(write("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n')).texts == ["one"]


def test_only_line_feeds_end_a_line(write) -> None:
    text = "a\x0bb\x0cc\x1cd\x85e\u2028f"
    assert load_texts(write("a.txt", text + "\n")).texts == [text]


def test_parquet(tmp_path: Path) -> None:
    table = {"text": ["one", "two", " ", "one"], "vector": [[0.1], [0.2], [0.3], [0.4]]}
    path = parquet(tmp_path, table)
    assert load_texts(path).texts == ["one", "two"]
    refused(parquet(tmp_path, {"text": ["one", None]}), "row 2", "'text'", "null")
    refused(parquet(tmp_path, {"text": [1, 2]}), "row 1", "int 1")
    refused(parquet(tmp_path, {"n": [1, 2]}), "no column holds text", "'n'")
    refused(parquet(tmp_path, {"a": ["x"], "b": ["y"]}), "several columns", "'a', 'b'")
    assert load_texts(parquet(tmp_path, {"a": ["x"], "b": ["y"]}), column="a,b").texts == ["x", "y"]
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no PAR1")
    refused(tmp_path / "broken.parquet", "no Parquet file")


def parquet(folder: Path, columns: dict[str, list[Any]]) -> Path:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), folder / "a.parquet")
    return folder / "a.parquet"


def test_a_very_long_text_is_read_whole(write) -> None:
    text = "word " * 200_000
    assert load_texts(write("a.csv", f"text,n\n{text},1\n")).texts == [text]


def test_several_sources_globs_and_lists(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = write("a.txt", "one\ntwo\n"), write("b.txt.gz", "two\nthree\n")
    assert load_texts([first, second]).texts == ["one", "two", "three"]
    assert load_texts(str(tmp_path / "*.txt*")).texts == ["one", "two", "three"]
    mixed = load_texts([str(first), ["four", "one"]])
    assert mixed.texts == ["one", "two", "four"]
    assert str(mixed.report) == "2 sources: 3 texts from 4 rows (0 empty and 1 duplicates left out)"
    assert [source.kept for source in mixed.report.sources] == [2, 1]
    monkeypatch.chdir(tmp_path)
    refused(["a.txt", "b.text"], "texts or sources", "'b.text'", "item 2")
    assert load_texts(("a.txt", ["four"])).texts == ["one", "two", "four"]
    for name, why in {"*.nope": "No file matches", "a.md": "does not exist"}.items():
        refused((name,), why)
        refused((name, name), why)


def test_a_list_of_texts_is_checked_as_a_file_is() -> None:
    assert load_texts(["and/or", "to be or not", "to be or not"]).texts == ["and/or", "to be or not"]
    refused([" ", ""], "no text to use", "2 empty")
    refused([], "no text to use")


@pytest.mark.usefixtures("unchecked")
def test_an_item_that_is_no_text_is_named() -> None:
    refused(["fine", None], "item 2", "null")
    refused(["fine", math.nan], "item 2", "NaN")
    refused(["fine", 3], "item 2", "int 3")
    refused(["fine", b"bytes"], "item 2", "bytes")
    refused(3, "not from int")
    refused((text for text in "ab"), "not from generator", "list(...)")
    refused({"a", "b"}, "not from set", "list(...)")


def test_limit_counts_kept_texts(write) -> None:
    path = write("a.txt", "one\none\ntwo\nthree\n")
    assert load_texts(path, limit=2).texts == ["one", "two"]
    assert load_texts([path, path], limit=99).texts == ["one", "two", "three"]
    refused(path, "at least 1", limit=0)


# Rows that cannot be used


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": null}\n', ["line 3", "'text'", "null"]),
        ("a.jsonl", '{"text": "x"}\n{"text": 1.5}\n', ["line 2", "float 1.5"]),
        ("a.jsonl", '{"text": "x"}\n{"text": NaN}\n', ["line 2", "NaN"]),
        ("a.jsonl", '{"text": "x"}\n{"text": true}\n', ["line 2", "bool True"]),
        ("a.jsonl", '{"text": "x"}\n{"text": ["y"]}\n', ["line 2", "list ['y']"]),
        ("a.jsonl", '{"text": "x"}\n{"txt": "y"}\n', ["line 2", "no 'text'", "'txt'"]),
        ("a.jsonl", '{"text": "x"}\n{"text": "y"\n', ["line 2", "no JSON"]),
        ("a.jsonl", '{"text": "x"}\n["y"]\n', ["line 2", "an object"]),
        ("a.jsonl", '{"text": "x"}\n{"text": "a\\ud83d"}\n', ["line 2", "surrogate", "position 1"]),
        ("a.jsonl", '{"text": "x"}\n{"text": "a\\u0000"}\n', ["line 2", "NUL", "position 1"]),
        ("a.jsonl", "[" * 100_000 + "\n", ["line 1", "no JSON"]),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}\n", ["line 1", "no JSON"]),
        ("a.jsonl", "", ["empty"]),
        ("a.txt", "x\ny\0z\n", ["line 2", "NUL"]),
        ("a.txt", b"x\ny\n\xff\xfez\n", ["line 3", "0xff", "no UTF-8"]),
        ("a.txt", "x\n".encode("utf-16"), ["line 1", "UTF-16", "iconv"]),
        ("a.csv", b"text,n\nx,1\n\xe9t\xe9,2\n", ["line 3", "0xe9"]),
        ("a.csv", 'text,n\n"two\nlines",1\nx\0y,2\n', ["line 4", "NUL"]),
        ("a.csv", 'text,n\nx,1\n"never closed,2\ny,3\n', ["starts in line 3", "no sound CSV"]),
        ("a.csv", "text,n\nx,1\none, two,2\n", ["line 3", "3 cells", "2 in the first row"]),
        ("a.csv", "text,text\nx,1\n", ["line 1", "one name"]),
        ("a.csv", "", ["empty"]),
        ("a.csv", "text,n\n", ["empty"]),
        ("a.tsv", "text\tn\nx\t1\ny\n", ["line 3", "1 cells"]),
    ],
)
def test_the_row_is_named(write, name: str, content: str | bytes, words: list[str]) -> None:
    refused(write(name, content), name, *words)


def test_a_damaged_gzip_is_named(write) -> None:
    path = write("a.txt.gz", "\n".join(map(str, range(10_000))))
    path.write_bytes(path.read_bytes()[:-2000])
    refused(path, "gzip", "damaged after line")
    path.write_bytes(b"\x1f\x8b not gzip at all")
    refused(path, "gzip")


def test_a_binary_file_is_not_read_into_memory(write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LONGEST_LINE", 100)
    refused(write("a.txt", "x" * 1000), "line 1", "longer than")


def test_files_that_are_not_there(write, tmp_path: Path) -> None:
    write("train.jsonl", "{}")
    refused(tmp_path / "trian.jsonl", "does not exist", "Did you mean train.jsonl?")
    refused(str(tmp_path / "trian.jsonl"), "does not exist")
    refused(str(tmp_path), f"is a folder; name a file in it, or several: {tmp_path}/*.parquet")
    for address in ("https://example.org/a.csv", "s3://bucket/a.parquet", "hf://datasets/org/name/a.csv"):
        refused(address, f"{address} is an address", "Download it", "org/name:config:split")
        refused((address,), f"{address} is an address")
    refused(("hello there", "bye"), "hello there does not exist", "Texts themselves are given as a list")
    refused(write("a.docx", "x"), "ending '.docx'", ".jsonl")
    refused(str(tmp_path / "*.nothing"), "No file matches")


def test_a_file_that_may_not_be_read(write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("a.txt", "x")

    def refuse(self: Path, *args: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ResourceError, match="Permission denied"):
        load_texts(path)


# Columns


def test_columns_by_name_position_and_default(write) -> None:
    bare = write("bare.csv", "a man runs,someone runs,4.5\na cat,a dog,1.0\n")
    assert load_texts(bare).texts == ["a man runs", "someone runs", "a cat", "a dog"]
    assert load_texts(bare, column="1").texts == ["someone runs", "a dog"]
    assert load_texts(bare, column="0,1").texts == load_texts(bare).texts
    named = write("named.csv", "utterance,klass\nhow are you,greeting\n")
    assert load_texts(named, column="utterance").texts == ["how are you"]
    assert load_texts(write("s.csv", "Sentence1,sentence2,genre\na,b,x\n")).texts == ["a", "b"]
    assert load_texts(write("s.csv", "sentence1,sentence2,score\na,b,1\n"), column="1").texts == ["b"]
    refused(bare, "holds numbers", column="2")
    refused(bare, "no column 'text'", "no header was recognised", "a man runs", column="text")
    refused(write("n.csv", "1,2\n3,4\n"), "no column holds text")


@pytest.mark.parametrize(
    ("content", "columns"),
    [
        ("review,stars\nFine.,4\nBad.,0\n", "'0', '1' (no header was recognised; the first row is: review, stars)"),
        ("body,author,date\nFine.,Ann,2020-01-02\n", "the first row is: body, author, date)"),
        ("a man,a dog\na cat,a hen\n", "the first row is: a man, a dog)"),
        ("a man,a dog,1,x\na cat,a hen,2,y\n", "the first row is: a man, a dog, 1, x)"),
        ("title,author\nFine.,Ann\n", "the columns are 'title', 'author'."),
    ],
)
def test_several_columns_of_text_in_a_csv_are_not_mixed(write, content: str, columns: str) -> None:
    path = write("a.csv", content)
    said = refused(path, "several columns hold text", columns, "--column NAME")
    assert ("by position" in said) == ("no header" in said)
    assert load_texts(path, column="0").texts[-1] == content.splitlines()[-1].split(",")[0]


def test_a_csv_without_a_known_header_is_read_as_data_and_the_report_says_so(write) -> None:
    pairs, one = write("pairs.csv", "a man,someone,4.5\na cat,a dog,1\n"), write("one.csv", "review\nFine.\n")
    note = "no header was recognised, {} read, and the first row is taken as data"
    assert str(load_texts(pairs).report).endswith(f"left out); {note.format('columns 0 and 1 are')}")
    assert str(load_texts(one).report).endswith(f"left out); {note.format('column 0 is')}")
    both = str(load_texts([one, pairs, ["a text"]]).report)
    assert both.startswith("3 sources: 7 texts from 5 rows")
    assert both.endswith(f"; {one}: {note.format('column 0 is')}; {pairs}: {note.format('columns 0 and 1 are')}")
    named = load_texts(one, column="review")
    assert (named.texts, "header" in str(named.report)) == (["Fine."], False)


def test_names_of_columns_match_whatever_their_case(write, tmp_path: Path) -> None:
    assert load_texts(write("a.csv", "Text,Author,Url\nFine.,Ann,x\n")).texts == ["Fine."]
    assert load_texts(write("a.csv", "TEXT,text\nno,yes\n")).texts == ["yes"]
    assert load_texts(write("a.csv", "Review,Stars\nFine.,x\n"), column="review").texts == ["Fine."]
    refused(write("a.csv", "TEXT,Text,n\na,b,1\n"), "several columns")
    assert load_texts(write("a.jsonl", '{"Text": "Fine.", "by": "Ann"}\n')).texts == ["Fine."]
    assert load_texts(parquet(tmp_path, {"Text": ["Fine."], "by": ["Ann"]})).texts == ["Fine."]
    labelled = load_labelled(parquet(tmp_path, {"Text": ["a", "b"], "Label": [1, 0]}))
    assert (labelled.texts, labelled.labels) == (["a", "b"], [1, 0])
    corpus = write("c.jsonl", '{"ID": "1", "Title": "Cats", "Text": "purr"}\n')
    assert load_retrieval(corpus, corpus, write("q.txt", "1 0 1 1\n")).corpus == ["Cats purr"]


@pytest.mark.parametrize(
    ("name", "content", "parted"),
    [
        ("a.csv", "id;text\n1;hello, you\n2;bye\n", "semicolons"),
        ("a.csv", "1;hello\n2;bye\n", "semicolons"),
        ("a.csv", "1\thello\n2\tbye\n", "tabs"),
        ("a.tsv", "id|text\n1|hello|\n", "bars"),
    ],
)
def test_another_delimiter_is_named(write, name: str, content: str, parted: str) -> None:
    refused(write(name, content), f"{name}, line 1", f"parted by {parted}", "write the file anew")


@pytest.mark.parametrize(
    "content",
    [
        '"id"\t"text"\n"1"\t"Fine."\n',
        'id\ttext\n1\t"He said ""no""."\n2\tYes.\n3\t"A ""b"" c"\n',
        'n\t"text"\n1\t"a"\n2\t"b"\n',
    ],
)
def test_a_quoted_tsv_is_refused(write, content: str) -> None:
    refused(write("a.tsv", content), "a.tsv, line 1", "read unquoted", ".csv or .jsonl")


def test_quotes_in_a_tsv_are_part_of_the_text(write) -> None:
    texts = ['"No," he said.', '"Quoted."', 'An inch: 1"']
    assert load_texts(write("a.tsv", "text\n" + "\n".join(texts))).texts == texts
    assert load_texts(write("a.tsv", '"Quoted."\n')).texts == ['"Quoted."']


@pytest.mark.parametrize("content", ["text\na; b\nc; d\n", "a; b\nc\n", "a; b\n", "a|b,1\nc|d,2\n"])
def test_texts_with_a_semicolon_are_texts(write, content: str) -> None:
    assert len(load_texts(write("a.csv", content))) == content.count("\n") - content.startswith("text")


def test_an_unknown_column_gets_a_suggestion(write) -> None:
    path = write("a.jsonl", '{"sentence": "x", "title": "y"}\n')
    refused(path, "'sentence', 'title'", "several columns")
    refused(path, "no column 'sentense'", "Did you mean sentence?", column="sentense")
    assert load_texts(path, column="sentence, title").texts == ["x", "y"]
    assert load_texts(write("b.jsonl", '{"id": 1, "body": "z"}\n')).texts == ["z"]
    refused(write("c.jsonl", '{"text": "x"}\n'), "no column 'sentense'", "the columns are 'text'", column="sentense")
    assert load_texts([write("d.txt", "x\n"), write("e.jsonl", '{"a": "y", "text": "z"}\n')], column="a").texts == [
        "x",
        "y",
    ]


def test_a_column_of_what_has_none_is_refused(write) -> None:
    lines = write("d.txt", "x\n")
    refused(lines, "d.txt has no columns, and 'body' was asked for", column="body")
    refused(["a text", "and another"], "list of texts has no columns", column="body")
    assert load_texts(lines, column="text").texts == ["x"]


# Data sets


def test_a_data_set_in_memory_is_read_like_a_file() -> None:
    import datasets

    features = datasets.Features({"Text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    data = datasets.Dataset.from_dict({"Text": ["fine", " ", "good", "fine"], "label": [1, 0, 1, 0]}, features=features)
    found = load_texts(data.with_format("torch"))
    assert (found.texts, found.report.rows) == (["fine", "good"], 4)
    assert load_texts([data, ["bye"]]).texts == load_texts((data, ["bye"])).texts == ["fine", "good", "bye"]
    assert load_labelled(data, data).labels == [1, 1, 0]
    refused(datasets.Dataset.from_dict({"a": ["x"], "b": ["y"]}), "several columns", "'a', 'b'")
    refused(datasets.Dataset.from_dict({"text": ["x", None]}), "Dataset, row 2", "null")


@pytest.mark.usefixtures("unchecked")
def test_data_sets_that_are_no_table_are_refused() -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": ["x"]})
    refused(datasets.DatasetDict(train=data), "not from DatasetDict", "Name one of its parts")
    refused(data.to_iterable_dataset(), "not from IterableDataset", 'Take its column: [row["text"] for row in data]')
    refused((text for text in "ab"), "not from generator", "list(...)")
    refused(datasets.Dataset.from_dict({"n": [1, 2]}), "no column holds text; the columns are 'n'")


def test_a_saved_data_set_is_read_and_the_folder_of_its_splits_names_them(tmp_path: Path) -> None:
    import datasets

    data = datasets.Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]})
    datasets.DatasetDict(train=data).save_to_disk(tmp_path / "saved")
    assert load_texts(tmp_path / "saved" / "train").texts == load_texts((str(tmp_path / "saved/train"),)).texts
    assert load_texts(tmp_path / "saved" / "train").report.sources[0].source == str(tmp_path / "saved" / "train")
    refused(tmp_path / "saved", "holds the splits of a data set", f"name one: {tmp_path}/saved/train")
    assert load_texts([str(tmp_path / "saved" / "train")]).texts == load_texts(tmp_path / "saved" / "train").texts
    (tmp_path / "saved" / "train" / "dataset_info.json").write_text("{")
    refused(tmp_path / "saved" / "train", "cannot be read as a data set")


def test_the_name_of_a_file_in_a_list_is_no_text(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write("array.json", "[]")
    (tmp_path / "arrows").mkdir()
    refused(["array.json"], "'array.json' is the name of a file", ".jsonl")
    refused(["arrows"], "'arrows' is the name of a folder", "arrows/*.parquet")
    assert load_texts(["arrows", "bows", ".", "/"]).texts == ["arrows", "bows", ".", "/"]
    assert load_texts(["a text", "array.json"]).texts == ["a text", "array.json"]


def test_long_texts_without_a_space_take_no_time() -> None:
    texts = ["\u96ea" * 50_000 + f"\n{number}" for number in range(20)]
    before = time.perf_counter()
    assert load_texts(texts).texts == texts
    assert time.perf_counter() - before < 1


def test_what_is_no_name_of_a_file_is_said_to_be_none(tmp_path: Path) -> None:
    refused("x" * 300, "is no name of a file. Texts themselves are given as a list")
    refused(str(tmp_path / "a text"), "does not exist", "Texts themselves are given as a list")
    with pytest.raises(DataError) as error:
        load_texts(str(tmp_path / "texts.json"))
    assert "list" not in str(error.value)


def test_columns_by_position_leave_the_first_row_a_row(write) -> None:
    pairs = write("pairs.csv", "a man,a dog,1\na cat,a hen,2\n")
    assert load_texts(pairs, column="0,1").texts == ["a man", "a dog", "a cat", "a hen"]
    labelled = load_labelled(write("labels.csv", "great,1\nbad,0\nfine,1\n"), text="0", label="1")
    assert (labelled.texts, labelled.labels) == (["great", "bad", "fine"], [1, 0, 1])
    scored = load_pairs(write("scored.csv", "2,a man,a dog\n4,a cat,a hen\n"), columns=("1", "2", "0"))
    assert (scored.sentence1, scored.score) == (["a man", "a cat"], [2.0, 4.0])
    assert load_texts(write("pandas.csv", "0,1\na man,1\na cat,2\n"), column="0").texts == ["a man", "a cat"]


@pytest.mark.parametrize(
    "content",
    ["Question; what is this?\nAnother text\n", "I came; I saw\nHe ran; she hid\n", "Title | My page\nOther | page\n"],
)
def test_prose_with_marks_in_one_column_is_read(write, content: str) -> None:
    assert load_texts(write("prose.csv", content)).texts == content.splitlines()


def test_one_doubled_quote_in_a_tsv_is_a_text(write) -> None:
    path = write("a.tsv", 'text\n"An ""x"" air."\na plane\n')
    assert load_texts(path).texts == ['"An ""x"" air."', "a plane"]


def test_hub_data_sets_are_read_like_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[tuple[Any, ...]] = []
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = {"text": ["fine", "good", "fine"], "label": [1, 0, 1]}

    def load(name: str, config: str | None, **options: Any) -> datasets.Dataset:
        asked.append((name, config, options["split"]))
        if name == "org/gap":
            return datasets.Dataset.from_dict({"text": ["fine", None]})
        if config == "odd":
            raise ValueError("BuilderConfig 'odd' not found. Available: ['main']")
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert load_texts("org/name").texts == ["fine", "good"]
    assert load_texts(["org/name:main:test", "org/name::train"]).texts == ["fine", "good"]
    labelled = load_labelled("org/name")
    assert (labelled.names, labelled.labels) == (["no", "yes"], [1, 0, 1])
    assert asked[:2] == [("org/name", None, "train"), ("org/name", "main", "test")]
    refused("org/gap", "org/gap, row 2", "null")
    refused("org/name:odd", "Available")


COMMITS = {"main": "a" * 40, "v1": "b" * 40, "refs/convert/parquet": "c" * 40}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Branches of every Hub data set, to be moved; its one text names the commit, and so does its folder."""
    import datasets
    import huggingface_hub

    branches = dict(COMMITS)

    def load(name: str, config: str | None, *, split: str, revision: str | None, token: None) -> datasets.Dataset:
        commit = branches.get("offline", revision)
        columns = {"text": [f"{name} at {commit}"], "label": ["x"], "_id": ["1"]}
        columns |= {"sentence1": ["a"], "sentence2": ["b"], "score": [float("abc".index(commit[0]))]}
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "hub" / commit)
        return datasets.load_from_disk(tmp_path / "hub" / commit)

    def look_up(api: object, name: str, *, revision: str | None, timeout: float) -> SimpleNamespace:
        return SimpleNamespace(sha=branches.get(revision or "main", revision))

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", look_up)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return branches


@pytest.mark.parametrize(
    ("name", "commit", "named"),
    [
        ("org/name", "a", "org/name@{}"),
        ("org/name:main:test", "a", "org/name@{}:main:test"),
        ("org/name@v1", "b", "org/name@{}"),
        ("org/name@v1::test", "b", "org/name@{}::test"),
        ("name@refs/convert/parquet::test", "c", "name@{}::test"),
        (f"org/name@{'c' * 40}:main", "c", "org/name@{}:main"),
    ],
)
def test_a_hub_data_set_is_read_and_named_at_its_commit(hub, write, name: str, commit: str, named: str) -> None:
    found = load_texts(name)
    assert found.texts == [f"{name.split('@')[0].split(':')[0]} at {commit * 40}"]
    assert str(found.report).startswith(named.format(commit * 40) + ": 1 texts from 1 rows")
    assert found.report.sources[0].commit == commit * 40
    pairs = load_pairs(name)
    assert (pairs.score, pairs.source) == (["abc".index(commit)], named.format(commit * 40))
    with pytest.raises(DataError, match=f"{named.format(commit * 40)}: its 1 texts are of one class, 'x'"):
        load_labelled(name, name)
    task = load_retrieval(name, name, path := write("qrels.txt", "1 0 1 1\n"))
    assert task.corpus == found.texts
    assert task.source == f"{named.format(commit * 40)}, {named.format(commit * 40)}, {path}"


def test_the_commit_that_a_report_names_gives_the_same_texts_when_the_branch_has_moved(hub) -> None:
    before = load_texts(["org/name::train", "org/other@v1::train"])
    assert f"2 sources with org/name@{'a' * 40}::train, org/other@{'b' * 40}::train: 2 texts" in str(before.report)
    hub["main"] = hub["v1"] = "c" * 40
    assert load_texts(["org/name::train", "org/other@v1::train"]).texts != before.texts
    assert load_texts([source.source for source in before.report.sources]).texts == before.texts


def test_a_revision_is_of_the_data_sets_that_name_none(hub) -> None:
    found = load_texts(["org/name::train", f"org/name@{'c' * 40}::train"], revision="v1")
    assert found.texts == [f"org/name at {'b' * 40}", f"org/name at {'c' * 40}"]


def test_another_commit_than_the_one_asked_for_is_refused(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub["offline"] = "b" * 40
    with pytest.raises(ResourceError, match=f"commit {'b' * 40}, and {'a' * 40} was asked for"):
        load_texts("org/name")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ResourceError, match=f"name org/name@{'b' * 40}"):
        load_texts(f"org/name@{'a' * 40}")
    for name in ("org/name", "org/name@v1", f"org/name@{'b' * 40}"):
        assert load_texts(name).report.sources[0].source == f"org/name@{'b' * 40}"


def test_a_file_with_an_at_sign_is_a_file(write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org").mkdir()
    write("org/name@v1.txt", "one\n")
    assert load_texts("org/name@v1.txt").texts == ["one"]
    assert load_texts(["a/b@c", "me@org/name"]).texts == ["a/b@c", "me@org/name"]
    names = ["org/name@v1.txt", "org/name@v1:main:test", "n@v1::test", "org/name", "org/name@", "overlap@10 >= 0.6"]
    assert [*map(sources.without_revision, names)] == [
        "org/name@v1.txt",
        "org/name:main:test",
        "n::test",
        "org/name",
        "org/name@",
        "overlap@10 >= 0.6",
    ]


def test_no_hub_for_a_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ResourceError, match="could not be reached"):
        load_texts("org/name")


# Pairs


def test_pairs_with_and_without_a_header(write) -> None:
    for content in ("sentence1,sentence2,score\na,b,4.5\nc,d,0\n", "a,b,4.5\nc,d,0\n", "a,b,4.5\nc,d,0\n ,d,\n"):
        pairs = load_pairs(write("a.csv", content))
        assert (pairs.sentence1, pairs.sentence2, pairs.score) == (["a", "c"], ["b", "d"], [4.5, 0.0])
    assert pairs.empty == 1
    path = write("a.jsonl", '{"q": "a", "d": "b", "s": 1}\n')
    assert load_pairs(path, columns=("q", "d", "s")).score == [1.0]
    assert len(load_pairs(write("a.csv", "a,b,1\nc,d,2\n"), limit=1)) == 1


def test_what_is_left_out_is_said_where_the_source_is_named(write) -> None:
    found = load_pairs(write("a.csv", "a,b,1\n,d,2\ne,f,3\n"))
    assert (found.empty, found.source.endswith("a.csv (1 empty left out)")) == (1, True)
    assert load_pairs(write("b.csv", "a,b,1\n")).source.endswith("b.csv")
    assert EvaluationData(pairs={"a": found}).sources() == {"a": found.source}


@pytest.mark.parametrize("name", ["score", "similarity_score", "label"])
def test_a_score_is_found_by_each_of_its_names(
    write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import datasets

    rows = {"sentence1": ["a", "b"], "sentence2": ["c", "d"], name: [4.5, 0.0], "genre": ["news", "news"]}
    lines = (json.dumps(dict(zip(rows, row, strict=True))) for row in zip(*rows.values(), strict=True))
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: datasets.Dataset.from_dict(rows))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in (write("a.jsonl", "\n".join(lines)), parquet(tmp_path, rows), "org/sts"):
        pairs = load_pairs(source)
        assert (pairs.sentence1, pairs.sentence2, pairs.score) == (["a", "b"], ["c", "d"], [4.5, 0.0])


@pytest.mark.parametrize("score", ["", "x", "nan", "inf", "1_000", "1,5"])
def test_a_score_has_to_be_a_finite_number(write, score: str) -> None:
    with pytest.raises(DataError, match=r"a\.csv, line 2"):
        load_pairs(write("a.csv", f'a,b,1.0\nc,d,"{score}"\n'))


@pytest.mark.parametrize("score", ["null", "true", "[1]", "NaN", "1e999", '"x"'])
def test_a_json_score_has_to_be_a_finite_number(write, score: str) -> None:
    row = '{"sentence1": "a", "sentence2": "b", "score": %s}\n'
    with pytest.raises(DataError, match="line 2, column 'score': a finite number"):
        load_pairs(write("a.jsonl", row % 1 + row % score))


def test_pairs_need_three_columns_and_a_row(write) -> None:
    with pytest.raises(DataError, match="no column 'score'"):
        load_pairs(write("a.csv", "sentence1,sentence2\na,b\n"))
    with pytest.raises(DataError, match="no pair"):
        load_pairs(write("a.csv", "sentence1,sentence2,score\n,b,1\n"))
    with pytest.raises(DataError, match="several"):
        load_pairs(str(write("a.csv", "a,b,1\n").with_name("*")) if write("b.csv", "a,b,1\n") else "")


# Retrieval


CORPUS = '{"_id": "d1", "title": "Cats", "text": "They purr."}\n{"_id": "d2", "text": "Dogs bark."}\n{"_id": "d3", "text": " "}\n'
QUERIES = '{"id": 1, "text": "who purrs"}\n{"id": "2", "text": "who barks"}\n'


@pytest.mark.parametrize(
    "qrels",
    [
        "1 0 d1 2\n1 0 d9 1\n7 0 d1 1\n2 Q0 d2 -1\n",
        "query-id\tcorpus-id\tscore\n1\td1\t2\n1\td9\t1\n7\td1\t1\n2\td2\t0\n",
        "query-id\tcorpus-id\tscore\n1\td1\t2.0\n1\td9\t1.0\n7\td1\t1.0\n2\td2\t-1.00\n",
    ],
)
def test_retrieval_from_trec_and_beir(write, qrels: str) -> None:
    found = load_retrieval(write("c.jsonl.gz", CORPUS), write("q.jsonl", QUERIES), write("qrels.tsv", qrels))
    assert (found.corpus_ids, found.corpus) == (["d1", "d2"], ["Cats They purr.", "Dogs bark."])
    assert (found.query_ids, found.queries) == (["1", "2"], ["who purrs", "who barks"])
    assert found.qrels == {"1": {"d1": 2}, "2": {"d2": 0}}
    assert (found.unknown, found.empty) == (2, 1)
    assert found.source.endswith("qrels.tsv (1 empty and 2 judgements of unknown ids left out)")


@pytest.mark.parametrize(
    ("qrels", "words"),
    [
        ("1 0 d1\n", "line 1: expected"),
        ("1 0 d1 high\n", "line 1: expected"),
        ("1 0 d1 1.5\n", "line 1: expected"),
        ("1 0 d1 1\n1 0 d1 2\n", "line 2: 'd1' has grade 2 for query '1', and 1"),
        ("1 0 x 1\n", "Do the files belong together"),
        ("", "none of its 0 judgements"),
    ],
)
def test_judgements_that_cannot_be_used(write, qrels: str, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_retrieval(write("c.jsonl", CORPUS), write("q.jsonl", QUERIES), write("qrels.txt", qrels))


def test_judgements_are_a_file(write, tmp_path: Path) -> None:
    for path, why in ((tmp_path, "is a folder"), (tmp_path / "qrels.tsv", r"qrels\.tsv does not exist")):
        with pytest.raises(DataError, match=why):
            load_retrieval(write("c.jsonl", CORPUS), write("q.jsonl", QUERIES), path)


def test_an_id_given_twice_is_refused(write) -> None:
    with pytest.raises(DataError, match=r"line 2, column 'id': the id '1' was given before, in line 1"):
        load_retrieval(
            write("c.jsonl", '{"id": "1", "text": "a"}\n{"id": 1, "text": "b"}\n'), write("q.jsonl", QUERIES), "x"
        )


# Labels


def test_labels_are_numbered_by_the_sorted_names_of_train(write) -> None:
    train = write("train.csv", "text,category\na,zebra\nb,ant\n ,ant\nc,zebra\n")
    found = load_labelled(train, write("test.csv", "text,category\nd,ant\n"))
    assert (found.names, found.labels, found.texts, found.empty) == (["ant", "zebra"], [1, 0, 1], ["a", "b", "c"], 1)
    assert found.test is not None
    assert (found.test.labels, found.test.names, len(found.test)) == ([0], ["ant", "zebra"], 1)
    assert found.sources() == f"{train} (1 empty left out), {train.with_name('test.csv')}"


def test_numbers_are_sorted_as_numbers(write) -> None:
    rows = "".join(json.dumps({"text": "x", "label": label}) + "\n" for label in (10, 9, 2))
    assert load_labelled(write("a.jsonl", rows)).names == ["2", "9", "10"]


def test_labels_that_cannot_be_used(write) -> None:
    train = write("train.csv", "text,intent\na,greeting\nb,farewell\n")
    with pytest.raises(DataError, match=r"test\.csv, line 3, .*'greting' does not occur in .* Did you mean greeting\?"):
        load_labelled(train, write("test.csv", "text,intent\na,greeting\nb,greting\n"))
    with pytest.raises(DataError, match="line 2, column 'intent': the label is empty"):
        load_labelled(write("a.csv", "text,intent\na,\n"))
    with pytest.raises(DataError, match="no column 'label' or 'category' or 'intent'"):
        load_labelled(write("a.csv", "text,klass\na,b\n"))
    with pytest.raises(DataError, match="its 2 texts are of one class, 'greeting'; a set has two or more"):
        load_labelled(write("a.csv", "text,intent\na,greeting\nb,greeting\n"))


# Anything at all


@few
@given(st.binary(max_size=300), st.sampled_from(["a.txt", "a.csv", "a.tsv", "a.jsonl", "a.parquet", "a.csv.gz"]))
def test_any_bytes_give_texts_or_a_data_error(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    try:
        texts = load_texts(tmp_path / name).texts
    except DistillError as error:
        message = str(error)
        assert str(tmp_path) in message
    else:
        assert texts
        assert all(text.strip() and text.encode() and "\0" not in text for text in texts)


@few
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["text", "id"]), st.none() | st.floats() | st.text(max_size=5)), max_size=6
    )
)
def test_any_objects_give_texts_or_a_data_error(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for load in (load_texts, load_pairs, load_labelled, lambda path: load_retrieval(path, path, path)):
        try:
            load(path)
        except DataError as error:
            message = str(error)
            assert "a.jsonl" in message


@few
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=6))
def test_every_sound_text_survives_each_format(tmp_path: Path, texts: list[str]) -> None:
    sheet = io.StringIO()
    csv.writer(sheet).writerows([["text", "n"], *([text, "1"] for text in texts)])
    (tmp_path / "a.csv").write_bytes(sheet.getvalue().encode())
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected = list(dict.fromkeys(text for text in texts if text.strip()))
    for source in (tmp_path / "a.csv", tmp_path / "a.jsonl", texts, parquet(tmp_path, {"text": texts})):
        if expected:
            assert load_texts(source).texts == expected
        else:
            refused(source, "no text to use")


# The real files


@pytest.mark.parametrize(
    ("name", "rows", "first"),
    [
        ("stsb-en-train.csv.gz", 5749, "A plane is taking off."),
        ("stsb-en-dev.csv", 1500, "A man with a hard hat is dancing."),
        ("banking77-train.csv", 10003, "I am still waiting on my card?"),
        ("banking77-test.csv", 3080, None),
        ("cacm-docs.jsonl.gz", 3204, None),
        ("cacm-queries.jsonl", 64, None),
        ("oewn-glosses.jsonl.gz", 107530, None),
        ("oewn-examples.txt.gz", 50024, "able to swim"),
        ("wiki-sentences.txt.gz", 14750, None),
    ],
)
def test_real_texts(real, name: str, rows: int, first: str | None) -> None:
    found = load_texts(real(name))
    assert found.report.rows == rows
    assert first is None or found.texts[0] == first


def test_real_pairs(real) -> None:
    assert (len(load_pairs(real("stsb-en-train.csv.gz"))), len(load_pairs(real("stsb-en-dev.csv")))) == (5749, 1500)


def test_real_labels(real) -> None:
    found = load_labelled(real("banking77-train.csv"), real("banking77-test.csv"))
    assert (len(found), len(found.names), set(found.labels)) == (10003, 77, set(range(77)))
    assert found.test is not None
    assert len(found.test) == 3080


def test_real_retrieval(real) -> None:
    found = load_retrieval(real("cacm-docs.jsonl.gz"), real("cacm-queries.jsonl"), real("cacm-qrels.txt"))
    assert (len(found.corpus), len(found.queries), len(found.qrels)) == (3204, 64, 52)
