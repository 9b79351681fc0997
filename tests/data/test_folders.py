"""Folders of pictures, registries of LLaMA-Factory, streams kept on disk, and digests of all that rows name."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from data.processors import picture
from data.test_sources import content, inline, png
from pydantic import ValidationError

from tarsia.core.errors import DataError
from tarsia.data import PICTURE, Source, hub, read
from tarsia.data import sources as sources_module

ROWS = [{"file_name": f"{i}.png", "question": f"which {i}?", "answer": f"the {i}th"} for i in range(3)]


def as_csv(rows: list[dict[str, str]], path: Path) -> None:
    lines = [",".join(rows[0]), *(",".join(f'"{v}"' for v in row.values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")


def as_jsonl(rows: list[dict[str, str]], path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def as_parquet(rows: list[dict[str, str]], path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {"csv": as_csv, "jsonl": as_jsonl, "parquet": as_parquet}


def pictures(folder: Path, names: tuple[str, ...] = ("0.png", "1.png", "2.png")) -> Path:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))
    return folder


@pytest.mark.parametrize("kind", WRITERS)
def test_a_folder_of_pictures_with_a_table(kind: str, tmp_path: Path) -> None:
    WRITERS[kind](ROWS, pictures(tmp_path) / f"metadata.{kind}")
    rows = read(Source(path=str(tmp_path)))
    assert [row.messages[0].parts for row in rows] == [(PICTURE, f"which {i}?") for i in range(3)]
    assert [row.pictures[0].load().tobytes() for row in rows] == [picture(shade=i).tobytes() for i in range(3)]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_the_table_is_the_one_that_datasets_reads(tmp_path: Path) -> None:
    """`datasets`' own imagefolder is the oracle."""
    as_csv(ROWS, pictures(tmp_path) / "metadata.csv")
    theirs = datasets.load_dataset("imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "c"))
    ours = read(Source(path=str(tmp_path)))
    found = sorted((row["question"], row["answer"], row["image"].convert("RGB").tobytes()) for row in theirs)
    wanted = sorted((r.messages[0].text, r.messages[1].text, r.pictures[0].load().tobytes()) for r in ours)
    assert found == wanted
    del theirs
    gc.collect()  # the file that `datasets` leaves open is closed here, not in another test


def test_a_tree_of_pictures_has_its_folders_as_labels(tmp_path: Path) -> None:
    pictures(tmp_path, ("train/cat/b.png", "train/dog/a.JPG", "train/cat/a.png", "train/cat/notes.txt"))
    source = Source(path=str(tmp_path), split="train", columns={"answer": "label"}, fill={"question": "what?"})
    rows = read(source)
    assert [(r.messages[0].parts, r.messages[1].text) for r in rows] == [
        ((PICTURE, "what?"), "cat"), ((PICTURE, "what?"), "cat"), ((PICTURE, "what?"), "dog")
    ]  # fmt: skip
    assert [p.name.rpartition("/")[2] for r in rows for p in r.pictures] == ["a.png", "b.png", "a.JPG"]
    with pytest.raises(DataError, match="names columns that are there"):
        read(Source(path=str(tmp_path), split="train", fill={"label": "x"}))[0]
    with pytest.raises(DataError, match="without pictures"):
        read(Source(path=str(tmp_path), split="test"))
    as_csv(ROWS, tmp_path / "metadata.csv")
    as_jsonl(ROWS, tmp_path / "metadata.jsonl")
    with pytest.raises(DataError, match="several tables"):
        read(Source(path=str(tmp_path)))


def registry(folder: Path, **entries: object) -> str:
    (folder / "dataset_info.json").write_text(json.dumps(entries))
    return str(folder / "dataset_info.json")


TAGS = {"role_tag": "who", "content_tag": "says", "user_tag": "USER", "assistant_tag": "MODEL"}
COLUMNS = {"messages": "talk", "images": "pics", "system": "sys"}


def test_an_entry_of_a_registry_names_columns_and_tags(tmp_path: Path) -> None:
    talk = [{"who": "USER", "says": "<image>what?"}, {"who": "MODEL", "says": "a cat"}]
    rows = [{"talk": talk, "pics": ["a.png"], "sys": "be kind"}] * 4
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    entry = {
        "file_name": "rows.json", "formatting": "sharegpt", "columns": COLUMNS, "tags": TAGS,
        "num_samples": 3, "ranking": False,
    }  # fmt: skip
    found = read(Source(path=registry(tmp_path, mine=entry), entry="mine"))
    assert (len(found), found[2].source) == (3, "mine")
    assert [(m.role, m.parts) for m in found[0].messages] == [
        ("system", ("be kind",)), ("user", (PICTURE, "what?")), ("assistant", ("a cat",))
    ]  # fmt: skip
    assert found[0].pictures[0].content == tmp_path / "a.png"


def test_an_entry_that_says_nothing_is_alpaca_with_its_usual_columns(tmp_path: Path) -> None:
    row = {"instruction": "add", "input": "2 and 2", "output": "4", "history": [["hi", "hello"]], "system": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    found = read(Source(path=registry(tmp_path, mine={"file_name": "rows.jsonl"}), entry="mine"))
    assert [m.text for m in found[0].messages] == ["hi", "hello", "add\n2 and 2", "4"]


@pytest.mark.parametrize(
    "entry, says",
    [
        ({"file_name": "rows.json", "ranking": True}, "not built in"),
        ({"script_url": "x"}, "not built in"),
        ({"formatting": "sharegpt"}, "names no file"),
        ({"file_name": "rows.json", "hf_hub_url": "a/b"}, "names no file and no hub id, or both"),
        ({"file_name": "rows.json", "formatting": "chatml"}, "format or the columns"),
        ({"file_name": "rows.json", "columns": {"chosen": "a"}}, "format or the columns"),
        ({"file_name": "rows.json", "columns": ["a"]}, "format or the columns"),
        ({"file_name": "rows.json", "formatting": "sharegpt", "tags": {"critic_tag": "c"}}, "tags of the entry"),
        ({"file_name": "rows.json", "num_samples": "all"}, "num_samples"),
        ({"file_name": "rows.json", "subset": 4}, "split or subset"),
        ({"file_name": "no.json"}, "is missing"),
        ({"file_name": "rows.json", "formatting": "sharegpt"}, "column of messages is not there"),
        ({"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "talk"}}, "the entry's tags"),
        (
            {"file_name": "rows.json", "formatting": "sharegpt", "columns": {"messages": "talk"}, "tags": {
                "role_tag": "who", "content_tag": "says"}},
            "of a speaker",
        ),
        (7, "no such entry"),
    ],
)  # fmt: skip
def test_an_entry_that_is_not_understood_is_refused(entry: object, says: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"talk": [{"who": "USER", "says": "q"}]}]))
    with pytest.raises(DataError, match=says):
        read(Source(path=registry(tmp_path, mine=entry), entry="mine"))[0]
    with pytest.raises(DataError, match="can not be read"):
        read(Source(path=str(tmp_path / "none.json"), entry="mine"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"path": "hub:a/b", "streaming": True}, {"path": "a.jsonl", "streaming": True, "limit": 4},
        {"path": "a.jsonl", "subset": "x"}, {"path": "a.json", "entry": "x", "columns": {"answer": "a"}},
        {"path": "hub:a/b", "entry": "x"}, {"path": "a.jsonl", "revision": "main"},
    ],
)  # fmt: skip
def test_options_that_do_not_go_together(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Source.model_validate(wrong)


class Cut(Exception):
    """Somebody pulled the plug."""


@pytest.fixture
def stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """A hub whose rows come from memory; the list has the number of every row that was asked for."""
    asked: list[int] = []
    rows = inline() * 100

    def one_by_one() -> Iterator[dict[str, object]]:
        for i, row in enumerate(rows):
            asked.append(i)
            if len(asked) in CUTS:
                raise CUTS[len(asked)]
            yield row

    def load_dataset(path: str, split: str, streaming: bool, revision: str | None = None) -> Any:
        assert (path, split, streaming, revision) == ("a/b", "train", True, "c0ffee")
        features = datasets.Dataset.from_list(rows[:7]).cast_column("images", datasets.List(datasets.Image())).features
        return datasets.IterableDataset.from_generator(one_by_one, features=features)

    CUTS.clear()
    monkeypatch.setenv("TARSIA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "PART_ROWS", 16)
    monkeypatch.setattr(hub, "_commit", lambda path, revision: "c0ffee")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield asked
    CUTS.clear()


CUTS: dict[int, Exception] = {}


def test_a_stream_is_the_first_rows_of_the_hub_and_is_read_once(stream: list[int], tmp_path: Path) -> None:
    rows = read(Source(path="hub:a/b", streaming=True, limit=50, name="a"))
    (tmp_path / "a.parquet").write_bytes(b"")
    pq.write_table(pa.Table.from_pylist(inline()), tmp_path / "a.parquet")
    wanted = read(Source(path=str(tmp_path / "a.parquet")))
    assert len(rows) == 50
    assert [content(rows[i])[:2] for i in range(50)] == [content(wanted[i % 7])[:2] for i in range(50)]
    count, digest = len(stream), rows.digest()
    assert count <= 50 + 16
    again = read(Source(path="hub:a/b", streaming=True, limit=50, name="a"))
    assert (len(stream), again.digest()) == (count, digest)


def test_a_stream_that_is_cut_off_goes_on_and_is_the_same(stream: list[int], tmp_path: Path, monkeypatch: Any) -> None:
    source = Source(path="hub:a/b", streaming=True, limit=50)
    whole = read(source).digest()
    monkeypatch.setenv("TARSIA_CACHE", str(tmp_path / "other"))
    stream.clear()
    CUTS[40] = ConnectionError("gone")
    with pytest.raises(DataError, match="broke off: gone"):
        read(source)
    assert len(list((tmp_path / "other").rglob("part-*.parquet"))) == 2
    CUTS.clear()
    assert read(source).digest() == whole
    part = next((tmp_path / "other").rglob("part-000001.parquet"))
    pq.write_table(pq.read_table(part).slice(0, 3), part)
    with pytest.raises(DataError, match="damaged on disk"):
        read(source)


def test_a_stream_shorter_than_its_limit_is_whole(stream: list[int]) -> None:
    assert len(read(Source(path="hub:a/b", streaming=True, limit=10_000))) == 700


def test_a_digest_covers_the_pictures_that_rows_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path / "shots")
    path = tmp_path / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"question": "q", "answer": "a", "image": f"shots/{i}.png"}) + "\n" for i in range(3))
    )
    source = Source(path=str(path))
    first = read(source).digest()
    assert read(source).digest() == first
    (tmp_path / "shots" / "1.png").write_bytes(png(7))
    changed = read(source).digest()
    assert changed != first
    monkeypatch.setattr(sources_module, "_HASHED_BYTES", 10)
    by_size = read(source).digest()
    same_size = bytearray((tmp_path / "shots" / "1.png").read_bytes())
    same_size[-1] ^= 1
    (tmp_path / "shots" / "1.png").write_bytes(bytes(same_size))
    assert read(source).digest() == by_size  # the stated limit
    (tmp_path / "shots" / "1.png").write_bytes(bytes(same_size) + b"x")
    assert read(source).digest() != by_size
    (tmp_path / "shots" / "1.png").unlink()
    with pytest.raises(DataError, match="row 1 of rows is missing"):
        read(source).digest()


def test_a_digest_of_a_table_with_its_pictures_inside_reads_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = pa.schema([("question", pa.string()), ("answer", pa.string()), ("image", pa.binary())])
    inside = [{"question": "q", "answer": "a", "image": png(0)}] * 3
    pq.write_table(pa.Table.from_pylist(inside, schema=kinds), tmp_path / "in.parquet")
    pq.write_table(pa.Table.from_pylist([r | {"image": "0.png"} for r in inside]), tmp_path / "out.parquet")
    pictures(tmp_path)
    outside = read(Source(path=str(tmp_path / "out.parquet"))).digest()
    (tmp_path / "0.png").write_bytes(png(5))
    assert read(Source(path=str(tmp_path / "out.parquet"))).digest() != outside
    monkeypatch.setattr(sources_module, "read_row", None)
    assert read(Source(path=str(tmp_path / "in.parquet"))).digest()
