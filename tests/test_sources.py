"""Files of rows as a source of problems: pure, split by what is asked, and clear about bad rows."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import DataError
from learner.prompts.config import PromptsConfig
from learner.prompts.source import Source, open_source

Row = dict[str, Any]
Write = Callable[[Path, Sequence[Row]], Path]


def write_jsonl(folder: Path, rows: Sequence[Row]) -> Path:
    path = folder / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def write_parquet(folder: Path, rows: Sequence[Row]) -> Path:
    """Ten rows a row group."""
    path = folder / "sums.parquet"
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=10)
    return path


def write_saved(folder: Path, rows: Sequence[Row]) -> Path:
    """As `Dataset.save_to_disk` writes: Arrow's stream format, in two files."""
    path = folder / "saved"
    path.mkdir()
    half = len(rows) // 2
    schema = pa.Table.from_pylist(list(rows)).schema
    for number, part in enumerate((rows[:half], rows[half:])):
        table = pa.Table.from_pylist(list(part), schema=schema)
        with (
            (path / f"data-{number:05d}-of-00002.arrow").open("wb") as file,
            pa.ipc.new_stream(file, schema) as writer,
        ):
            writer.write_table(table)
    return path


WRITERS: dict[str, Write] = {
    "jsonl": write_jsonl,
    "parquet": write_parquet,
    "saved": write_saved,
}
SUMS = [{"prompt": f"{i}+{i}?", "answer": 2 * i, "level": i % 3} for i in range(60)]

every_kind = pytest.mark.parametrize("kind", WRITERS)


def source_of(kind: str, path: Path, seed: int = 0, **options: Any) -> Source:
    return open_source(PromptsConfig(source=kind, path=str(path), **options), seed)


def heldout(source: Source) -> list[str]:
    found: list[str] = []
    while (problem := source.heldout(len(found))) is not None:
        found.append(problem.text)
    return found


def trained(source: Source, count: int) -> list[str]:
    return [source.train(index).text for index in range(count)]


@every_kind
def test_a_source_is_pure_and_shows_every_training_row_once_an_epoch(
    kind: str, tmp_path: Path
) -> None:
    path = WRITERS[kind](tmp_path, SUMS)
    one, other = source_of(kind, path), source_of(kind, path)
    first = trained(one, 54)
    assert [other.train(index).text for index in reversed(range(54))] == first[::-1]
    assert len(set(first)) == 54
    second = [one.train(index).text for index in range(54, 108)]
    assert set(second) == set(first)
    assert second != first, "each epoch has an order of its own"
    assert trained(source_of(kind, path, seed=1), 54) != first


@every_kind
def test_a_row_is_its_question_its_answer_and_its_columns(kind: str, tmp_path: Path) -> None:
    """The answer's column too, by its own name and as it is: TRL's graders ask for it."""
    source = source_of(kind, WRITERS[kind](tmp_path, SUMS))
    problem = source.train(0)
    row = next(row for row in SUMS if row["prompt"] == problem.text)
    assert problem.gold == str(row["answer"])
    assert problem.columns == {"answer": row["answer"], "level": row["level"]}
    assert problem.id == f"{source.name}/{SUMS.index(row) + 1}"


@every_kind
def test_a_tenth_is_held_out_and_no_question_is_on_both_sides(kind: str, tmp_path: Path) -> None:
    path = WRITERS[kind](tmp_path, [*SUMS, *SUMS[::-1]])
    source = source_of(kind, path)
    held, rest = heldout(source), trained(source, 54)
    assert (len(held), len(set(rest))) == (6, 54)
    assert not set(held) & set(rest)
    assert heldout(source_of(kind, path, seed=9)) == held, "the seed does not move the border"


def test_rows_in_another_order_are_split_the_same_way(tmp_path: Path) -> None:
    there = [tmp_path / "a", tmp_path / "b"]
    for folder in there:
        folder.mkdir()
    one = source_of("jsonl", write_jsonl(there[0], SUMS))
    other = source_of("parquet", write_parquet(there[1], SUMS[::-1]))
    assert heldout(one) == heldout(other)


def test_questions_of_a_heldout_file_are_taken_out_of_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_jsonl(tmp_path, SUMS)
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in SUMS[50:]))
    source = source_of("jsonl", path, heldout_path=str(held))
    assert heldout(source) == [row["prompt"] for row in SUMS[50:]]
    assert set(trained(source, 50)) == {row["prompt"] for row in SUMS[:50]}
    assert "10 rows left out" in caplog.text


@every_kind
def test_rows_that_lack_something_or_repeat_are_left_out_counted_and_named(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = [
        {"prompt": "1+1?", "answer": None},
        {"prompt": "", "answer": 2},
        {"prompt": "2+2?", "answer": None},
    ]
    source = source_of(kind, WRITERS[kind](tmp_path, [*SUMS, *bad, *SUMS[3:5]]))
    assert set(trained(source, 54)) | set(heldout(source)) == {row["prompt"] for row in SUMS}
    assert "2 rows left out: no answer in rows 61, 63" in caplog.text
    assert "1 row left out: no prompt in row 62" in caplog.text
    assert "2 rows left out: an earlier row asks the same as rows 64, 65" in caplog.text


@every_kind
def test_rows_that_name_different_answers_to_one_question_are_all_left_out(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Which of them is right nobody knows, so a run trains on none."""
    bad = [{"prompt": "3+3?", "answer": 7, "level": 0}, {"prompt": "9+9?", "answer": 18}]
    source = source_of(kind, WRITERS[kind](tmp_path, [*SUMS, *bad]))
    asked = set(trained(source, 54)) | set(heldout(source))
    assert asked == {row["prompt"] for row in SUMS} - {"3+3?"}
    assert "2 rows left out: others ask the same and name another answer: rows 4, 61" in caplog.text
    assert "1 row left out: an earlier row asks the same as row 62" in caplog.text


@pytest.mark.parametrize("nothing", ["", "  \n", [], {}, None])
def test_an_answer_of_nothing_is_none(
    nothing: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    bad = {"prompt": "1+1?", "answer": nothing}
    rows = [{"prompt": f"{i}?", "answer": [f"{i}"]} for i in range(20)]
    source = source_of("jsonl", write_jsonl(tmp_path, [*rows, bad]))
    assert "1 row left out: no answer in row 21" in caplog.text
    assert source.train(0).gold.startswith('["')


def test_an_answer_that_is_no_number_is_none_in_a_column_of_numbers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"{i}?", "answer": i / 2 if i != 7 else float("nan")} for i in range(20)]
    source_of("parquet", write_parquet(tmp_path, rows))
    assert "1 row left out: no answer in row 8" in caplog.text


@every_kind
def test_a_column_that_no_row_has_is_one_line_with_those_there_are(
    kind: str, tmp_path: Path
) -> None:
    path = WRITERS[kind](tmp_path, SUMS)
    with pytest.raises(DataError, match=r"row 1: no column 'gold' \(there are: .*level"):
        source_of(kind, path, answer_column="gold")


@every_kind
def test_zero_and_false_are_answers(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"is {i} odd?", "answer": bool(i % 2)} for i in range(20)]
    source = source_of(kind, WRITERS[kind](tmp_path, rows))
    assert {source.train(index).gold for index in range(18)} == {"True", "False"}


@every_kind
def test_a_field_within_a_column_is_named_with_a_dot(kind: str, tmp_path: Path) -> None:
    rows = [{"q": f"{i}?", "judge": {"gold": f"{i}", "style": "rule"}} for i in range(20)]
    path = WRITERS[kind](tmp_path, rows)
    source = source_of(kind, path, prompt_column="q", answer_column="judge.gold")
    problem = source.train(0)
    assert problem.gold == problem.text.removesuffix("?")
    assert problem.columns["judge"]["style"] == "rule"


def test_dates_and_decimals_of_a_parquet_file_can_travel(tmp_path: Path) -> None:
    from common.plain import rebuilt

    when, price = datetime.date(2024, 2, 29), Decimal("1.50")
    rows = [{"prompt": f"{i}?", "answer": "a", "on": when, "price": price} for i in range(4)]
    source = source_of("parquet", write_parquet(tmp_path, rows))
    assert rebuilt(source.train(0).columns) == {"answer": "a", "on": when, "price": price}


def test_a_column_that_cannot_travel_stays_behind_and_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    took = datetime.timedelta(seconds=3)
    rows = [{"prompt": f"{i}?", "answer": "a", "image": b"\x89", "took": took} for i in range(9)]
    source = source_of("parquet", write_parquet(tmp_path, rows))
    assert [source.train(index).columns for index in range(4)] == [{"answer": "a"}] * 4
    assert [r.message.split(":")[1] for r in caplog.records] == [
        " column image is left out, no grader sees it",
        " column took is left out, no grader sees it",
    ]


def test_a_column_that_cannot_be_read_stays_behind_where_it_is_not_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pa.table({"prompt": [f"{i}?" for i in range(9)], "answer": ["a"] * 9})
    times = pa.array([i * 1000 + 1 for i in range(9)], pa.timestamp("ns"))
    pq.write_table(rows.append_column("at", times), tmp_path / "timed.parquet")
    source = source_of("parquet", tmp_path / "timed.parquet")
    assert [source.train(index).columns for index in range(4)] == [{"answer": "a"}] * 4
    assert caplog.text.count("column at is left out, no grader sees it") == 1


def test_a_column_that_is_there_twice_is_one_line(tmp_path: Path) -> None:
    one = pa.array(["1"] * 9)
    table = pa.Table.from_arrays([one, one, one], names=["prompt", "answer", "answer"])
    pq.write_table(table, tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="it has two columns 'answer': rename one"):
        source_of("parquet", tmp_path / "twice.parquet")


def test_bytes_are_read_as_text_and_where_they_are_none_the_row_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    questions = [*(f"{i}?".encode() for i in range(9)), b"\xff\xfe"]
    pq.write_table(
        pa.table({"prompt": pa.array(questions, pa.binary()), "answer": [b"1"] * 10}),
        tmp_path / "bytes.parquet",
    )
    source = source_of("parquet", tmp_path / "bytes.parquet")
    assert {*trained(source, 8), *heldout(source)} == {f"{i}?" for i in range(9)}
    assert (source.train(0).gold, source.train(0).columns) == ("1", {"answer": "1"})
    assert "1 row left out: no prompt in row 10" in caplog.text


def turn(role: str, content: Any) -> Row:
    return {"role": role, "content": content}


@every_kind
def test_a_conversation_is_asked_by_its_one_user_turn(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As verl and TRL write their data; what a row's own system message says is left out."""
    rows = [
        {"prompt": [turn("system", "Be brief."), turn("user", f"{i}?")], "answer": f"{i}"}
        for i in range(20)
    ]
    several = [turn("user", "1?"), turn("assistant", "one"), turn("user", "and 2?")]
    rows += [{"prompt": several, "answer": "2"}, {"prompt": [], "answer": "3"}]
    source = source_of(kind, WRITERS[kind](tmp_path, rows))
    assert set(trained(source, 18)) | set(heldout(source)) == {f"{i}?" for i in range(20)}
    assert "2 rows left out: no prompt in rows 21, 22" in caplog.text


def test_text_in_parts_is_one_text_and_an_image_is_no_question(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = [{"type": "text", "text": "How "}, {"type": "text", "text": "many?"}]
    rows = [{"prompt": [turn("user", f"{i}?")], "answer": "1"} for i in range(9)]
    rows += [
        {"prompt": [turn("user", parts)], "answer": "1"},
        {"prompt": [turn("user", [*parts, {"type": "image"}])], "answer": "1"},
    ]
    source = source_of("jsonl", write_jsonl(tmp_path, rows))
    assert "How many?" in {*trained(source, 9), *heldout(source)}
    assert "1 row left out: no prompt in row 11" in caplog.text


def test_a_folder_of_parquet_files_is_one_dataset(tmp_path: Path) -> None:
    for number, part in enumerate((SUMS[:30], SUMS[30:])):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_parquet(folder, part).rename(tmp_path / f"part-{number}.parquet")
    source = source_of("parquet", tmp_path)
    assert len(set(trained(source, 54)) | set(heldout(source))) == 60


def saved_with_state(folder: Path, rows: Sequence[Row]) -> Path:
    path = write_saved(folder, rows)
    files = [{"filename": file.name} for file in sorted(path.glob("*.arrow"))]
    (path / "state.json").write_text(json.dumps({"_data_files": files, "_split": "train"}))
    return path


def test_files_that_a_saved_dataset_does_not_name_are_not_read(tmp_path: Path) -> None:
    """`map` on a loaded dataset caches its results beside the data."""
    path = saved_with_state(tmp_path, SUMS)
    other = tmp_path / "other"
    other.mkdir()
    cached = write_saved(other, [{"prompt": "9+?", "answer": 0, "level": 0}] * 4)
    (cached / "data-00000-of-00002.arrow").rename(path / "cache-1f3a.arrow")
    source = source_of("saved", path)
    assert {*trained(source, 54), *heldout(source)} == {row["prompt"] for row in SUMS}


def test_a_saved_folder_of_several_datasets_is_one_line_with_their_places(tmp_path: Path) -> None:
    for split in ("test", "train"):
        (tmp_path / split).mkdir()
        saved_with_state(tmp_path / split, SUMS).rename(tmp_path / f"{split}-saved")
        (tmp_path / split).rmdir()
        (tmp_path / f"{split}-saved").rename(tmp_path / split)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    with pytest.raises(DataError, match=r"set learner\.prompts\.path to one of .*/test, .*/train"):
        source_of("saved", tmp_path)
    assert source_of("saved", tmp_path / "train").rows == 54


def test_a_list_of_files_that_is_damaged_or_lies_is_one_line(tmp_path: Path) -> None:
    path = saved_with_state(tmp_path, SUMS)
    for state, said in (
        ("{", "state.json cannot be read"),
        ('{"_data_files": []}', "the dataset is empty"),
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"cannot read the dataset .*gone"),
    ):
        (path / "state.json").write_text(state)
        with pytest.raises(DataError, match=said):
            source_of("saved", path)


def test_a_value_that_cannot_be_read_is_one_line_with_its_rows_and_column(tmp_path: Path) -> None:
    broken = pa.array([b"1?", b"\xff\xfe"] * 5, pa.binary()).cast(pa.binary()).view(pa.string())
    table = pa.table({"prompt": broken, "answer": ["1"] * 10})
    pq.write_table(table, tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"text\.parquet, rows 1 to 10, column prompt: 'utf-8'"):
        source_of("parquet", tmp_path / "text.parquet")


def test_a_file_that_begins_with_the_mark_of_utf_8_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, SUMS)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    source = source_of("jsonl", path)
    assert {*trained(source, 54), *heldout(source)} == {row["prompt"] for row in SUMS}


def test_rows_of_a_parquet_file_are_not_held_in_memory(tmp_path: Path) -> None:
    """Thirty megabytes of text that does not compress; a few of them are allocated."""
    import random

    draw = random.Random(0)
    rows = [{"prompt": f"{draw.randbytes(5000).hex()}", "answer": "a"} for _ in range(3000)]
    path = write_parquet(tmp_path, rows)
    del rows
    before = pa.total_allocated_bytes()
    source = source_of("parquet", path)
    assert len(source.train(7).text) == 10_000
    assert pa.total_allocated_bytes() - before < 3_000_000


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"prompt": "1", "answer": "1"}\nnot json\n', "row 2: not a JSON object"),
        ('{"prompt": "1", "answer": "1"}\n\n[1]\n', "row 3: not a JSON object"),
        ('{"prompt": "", "answer": ""}\n', r"row 1: nothing in column 'prompt'"),
        (
            '{"prompt": "1", "answer": ' + "[" * 10_000 + "]" * 10_000 + "}",
            "row 1: not a JSON object",
        ),
        ("[{\n", "row 1: not a JSON object .* one object a line"),
        ("\ud800", "row 1: not a JSON object|not UTF-8"),
        ("", "the dataset is empty"),
        ('{"prompt": "1", "answer": "1"}\n', "too few rows"),
    ],
)
def test_a_damaged_or_empty_file_is_refused_with_the_place(
    content: str, said: str, tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(content, errors="surrogatepass")
    with pytest.raises(DataError, match=said):
        source_of("jsonl", path)


@every_kind
def test_a_file_that_is_not_there_is_one_line_that_names_the_key(kind: str) -> None:
    with pytest.raises(DataError, match=r"/nowhere.* set learner\.prompts\.path"):
        source_of(kind, Path("/nowhere"))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path, SUMS)
    for kind in ("parquet", "saved"):
        with pytest.raises(DataError, match="cannot read the dataset"):
            source_of(kind, path)
