"""Tables and folders of captioned images: same pairs as JSON lines, errors that name bad rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pab.core.errors import InputError
from pab.core.notices import forget_notices
from pab.data.annotations import read_retrieval
from pab.data.tables import TableColumns, is_captioned_folder
from pab.data.training_index import SKIPPED
from pab.data.training_set import TrainingSet
from pab.training.contrastive import symmetric_infonce
from tests.conftest import MODEL, draw

ROWS = [("a/0.jpg", "a man falls"), ("a/1.jpg", 'he said "stop", then fell'), ("a/0.jpg", "again")]
PAIRS = [
    ("a/0.jpg", "a/0#0", "a man falls"),
    ("a/1.jpg", "a/1#0", 'he said "stop", then fell'),
    ("a/0.jpg", "a/0#1", "again"),
]


def quoted(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'


def table_text(separator: str = ",", header: tuple[str, str] = ("filepath", "title")) -> str:
    rows = [header, *((image, quoted(caption)) for image, caption in ROWS)]
    return "".join(separator.join(row) + "\n" for row in rows)


def write_images(root: Path) -> None:
    for image, _ in ROWS:
        draw(root / image, len(image), True)


def found_in(path: Path, root: Path | None = None, **options: object) -> list[tuple[str, ...]]:
    pairs = TrainingSet.open(root or path, [path] if root else None, **options)  # type: ignore[arg-type]
    return [(pair.image, pair.image_id, pair.caption) for pair in pairs]


TABLES = {
    "tabs": table_text("\t").encode(),
    "commas": table_text().encode(),
    "semicolons": table_text(";").encode(),
    "byte-order mark": b"\xef\xbb\xbf" + table_text().encode(),
    "UTF-16, as spreadsheets save it": table_text("\t").encode("utf-16"),
    "line ends of Windows": table_text().replace("\n", "\r\n").encode(),
    "blank lines": table_text().replace("\n", "\n\n").encode(),
    "further columns": table_text()
    .replace("title\n", "title,split\n")
    .replace('"\n', '",train\n')
    .encode(),
    "blanks in the header": table_text().replace("filepath,title", "filepath, title").encode(),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_form_of_a_table(tmp_path: Path, name: str) -> None:
    path = tmp_path / "pairs.csv"
    path.write_bytes(TABLES[name])
    assert found_in(path) == PAIRS
    found = read_retrieval(path)
    assert [(q.query_id, q.caption) for q in found.queries] == [
        ("a/0#0", "a man falls"), ("a/0#1", "again"), ("a/1#0", PAIRS[1][2]),
    ]  # fmt: skip
    assert found.relevant == {
        "a/0#0": frozenset({"a/0"}), "a/0#1": frozenset({"a/0"}), "a/1#0": frozenset({"a/1"}),
    }  # fmt: skip
    assert found.gallery is not None
    assert [image.path for image in found.gallery] == [tmp_path / "a/0.jpg", tmp_path / "a/1.jpg"]


def test_assumptions_about_a_table_are_printed_at_every_opening(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(table_text())
    for _ in range(2):
        forget_notices()
        TrainingSet.open(path)
        assert "pairs.csv: columns are separated by commas" in capsys.readouterr().err
    TrainingSet.open(path, columns=TableColumns(separator=","))
    forget_notices()
    TrainingSet.open(path, columns=TableColumns(separator=","))
    assert capsys.readouterr().err.count("columns are separated") == 0


def test_names_of_columns(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(table_text("\t", ("image", "text")))
    assert found_in(path, columns=TableColumns("image", "text")) == PAIRS
    with pytest.raises(
        InputError, match=r"line 1: expected columns 'filepath' and 'title', .*csv_"
    ):
        TrainingSet.open(path)
    path.write_text("filepath\ttitle\ttitle\na.jpg\tb\tc\n")
    with pytest.raises(InputError, match="expected every column once, found 'title' twice"):
        TrainingSet.open(path)
    path.write_text("")
    with pytest.raises(InputError, match="expected a header line"):
        read_retrieval(path)


@pytest.mark.parametrize("place", [".", "lists"])
def test_base_folder_of_image_paths(tmp_path: Path, place: str) -> None:
    """Paths are relative to the table's folder or the data root, or absolute inside the root."""
    write_images(tmp_path)
    (tmp_path / place).mkdir(exist_ok=True)
    path = tmp_path / place / "pairs.csv"
    path.write_text(table_text())
    assert found_in(path, tmp_path) == PAIRS
    path.write_text(table_text().replace("a/", f"{tmp_path}/a/"))
    assert found_in(path, tmp_path) == PAIRS
    if place == "lists":
        path.write_text(table_text().replace("a/", "../a/"))
        assert found_in(path, tmp_path) == PAIRS
        found = read_retrieval(path, image_folder=tmp_path)
        assert {query.image_id for query in found.queries} == {"a/0", "a/1"}
        with pytest.raises(InputError, match=r"found 3 bad ones .*a path that leaves it"):
            read_retrieval(path)


BAD_ROWS = {
    "no caption": ("a.jpg,\n", "line 3: field 'caption': .*an empty string"),
    "no image": (",a man\n", "line 3: field 'image': .*an empty string"),
    "nothing visible": ("a.jpg,\u200b\n", "line 3: field 'caption': .*a visible character"),
    "too many columns": ("a.jpg,a man, who falls\n", "line 3: expected 2 columns, found 3"),
    "too few columns": ("a.jpg\n", "line 3: expected 2 columns, found 1"),
    "leaves the folder": ("../a.jpg,a man\n", "line 3: field 'image': .*leaves it"),
    "absolute": ("/etc/a.jpg,a man\n", "line 3: field 'image': .*leaves it"),
    "backslashes": ("..\\b.jpg,a man\n", "line 3: field 'image': .*leaves it"),
    "text behind a quote": ('a.jpg,"a" man\n', "line 3: expected valid CSV quoting"),
    "a quote that stays open": (
        'a.jpg,"a man\nb.jpg,x\nc.jpg,y\n',
        "lines 3 to 6: expected valid",
    ),
    "other bytes than UTF-8": ("a.jpg,caf\udce9\n", "line 3: expected UTF-8 text, found byte 0xe9"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_are_named(tmp_path: Path, name: str) -> None:
    text, message = BAD_ROWS[name]
    path = tmp_path / "pairs.csv"
    whole = f"filepath,title\nz.jpg,fine\n{text}"
    if "open" not in name:
        whole += "y.jpg,fine too\n"
    else:
        whole += "d.jpg,z\n"
    path.write_bytes(whole.encode("utf-8", "surrogateescape"))
    for read in (read_retrieval, TrainingSet.open):
        with pytest.raises(InputError, match=rf"pairs.csv, {message}"):
            read(path)
    pairs = TrainingSet.open(path, skip_bad_lines=True)
    assert pairs.skipped == 1
    assert pairs[0].caption == "fine"
    assert len(pairs) == (1 if "open" in name else 2)
    pairs.write_skipped(tmp_path)
    assert len((tmp_path / SKIPPED).read_text().splitlines()) == 1


def test_the_same_name_with_two_extensions_is_refused_for_scoring(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text("filepath,title\na.jpg,x\na.png,y\n")
    with pytest.raises(InputError, match=r"line 3: .*more than their extension, found 'a.jpg' and"):
        read_retrieval(path)
    assert [pair.image for pair in TrainingSet.open(path, skip_bad_lines=True)] == ["a.jpg"]


@pytest.mark.parametrize("read", [read_retrieval, TrainingSet.open])
def test_errors_of_ids_name_the_lines_of_the_table(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('filepath,title\na.jpg,"x\ny"\n b.jpg,z\na.png,z\n')
    with pytest.raises(InputError) as error:
        read(path)
    assert "line 4: field 'image': expected an id on one line" in str(error.value)
    assert "line 5: expected images that differ in more than their extension" in str(error.value)


def test_two_tables_may_share_images(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('filepath,title\na.jpg,x\nb.jpg,"y\nz"\na.jpg,z\n')
    (tmp_path / "b.csv").write_text("filepath,title\na.jpg,v\nc.jpg,w\nb.png,y\nd.gif,y\n")
    tables = [tmp_path / "a.csv", tmp_path / "b.csv"]
    with pytest.raises(InputError) as error:
        TrainingSet.open(tmp_path, tables)
    assert "b.csv, line 4: expected images that differ in more than" in str(error.value)
    assert "b.csv, line 5: field 'image': expected" in str(error.value)
    pairs = TrainingSet.open(tmp_path, tables, skip_bad_lines=True)
    assert pairs.image_ids() == ["a#0", "b#0", "a#1", "a#2", "c#0"]
    assert pairs.identities.tolist() == [0, 1, 0, 0, 4]
    assert pairs.videos.tolist() == [0, 1, 0, 0, 2]


def test_a_table_that_is_listed_twice_is_refused(tmp_path: Path) -> None:
    for name in ("a.csv", "copy.csv"):
        (tmp_path / name).write_text("filepath,title\na.jpg,x\n")
    for other in ("a.csv", "copy.csv"):
        with pytest.raises(InputError, match=rf"{other}: expected different tables, .* a\.csv"):
            TrainingSet.open(tmp_path, [tmp_path / "a.csv", tmp_path / other])


def test_an_id_of_a_table_that_a_shard_has_names_both_lines(tmp_path: Path) -> None:
    (tmp_path / "1.json").write_text('{"image": "x.jpg", "image_id": "b#0", "caption": "x"}')
    (tmp_path / "2.csv").write_text('filepath,title\na.jpg,"x\ny"\nb.jpg,z\nc.jpg,z\n')
    (tmp_path / "3.json").write_text('{"image": "x.jpg", "image_id": "c#0", "caption": "x"}')
    shards = [tmp_path / name for name in ("1.json", "2.csv", "3.json")]
    with pytest.raises(InputError) as error:
        TrainingSet.open(tmp_path, shards)
    assert "2.csv, line 4: expected every image_id once, found 'b#0'" in str(error.value)
    assert "'b#0' already in 1.json, line 1" in str(error.value)
    assert "'c#0' already in 2.csv, line 5" in str(error.value)


def test_a_changed_table_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text(table_text())
    assert found_in(path) == PAIRS
    path.write_text(table_text() + "b.jpg,new\n")
    assert found_in(path)[3:] == [("b.jpg", "b#0", "new")]


# ---------------------------------------------------------------------------------------- folders


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "photos"
    for name in ("0", "in/1", "in/2"):
        draw(root / f"{name}.jpg", len(name), True)
        (root / f"{name}.txt").write_text(f"a man {name}\n")
    return root


def test_a_folder_of_images_with_texts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "in/1.txt").write_bytes("\ufeffa man \r\n\r\n who falls\r\n".encode())
    (folder / "README.txt").write_text("not a caption")
    expected = [
        ("0.jpg", "0#0", "a man 0"),
        ("in/1.jpg", "in/1#0", "a man who falls"),
        ("in/2.jpg", "in/2#0", "a man in/2"),
    ]
    assert found_in(folder) == expected
    found = read_retrieval(folder)
    assert [query.query_id for query in found.queries] == ["0#0", "in/1#0", "in/2#0"]
    assert found.gallery is not None
    assert all(image.path.is_file() for image in found.gallery)
    said = capsys.readouterr().err
    assert "ignored text files without an image (.bmp, .jpeg, .jpg, .png, .webp): 1" in said
    assert "captions of several lines are joined to one line each: 1" in said
    (folder / "0.txt").write_text("a woman 0")
    assert found_in(folder)[0][2] == "a woman 0"


def test_an_image_without_its_text_is_named(folder: Path) -> None:
    (folder / "in/1.txt").unlink()
    (folder / "in/2.txt").write_text(" \n")
    for read in (read_retrieval, TrainingSet.open):
        with pytest.raises(
            InputError, match=r"found 2 bad ones .*image 'in/1.jpg': expected a text"
        ):
            read(folder)
    assert found_in(folder, skip_bad_lines=True) == [("0.jpg", "0#0", "a man 0")]


def test_folders_without_captions_are_refused(tiny_data: Path, tmp_path: Path) -> None:
    assert not is_captioned_folder(tiny_data)
    assert not is_captioned_folder(tmp_path / "missing")
    assert not is_captioned_folder(tiny_data / "test")
    with pytest.raises(InputError, match="found a directory"):
        read_retrieval(tiny_data / "test")


def test_links_to_folders_and_tables_are_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(folder)
    expected = found_in(folder)
    assert found_in(tmp_path / "link") == expected
    assert len(read_retrieval(tmp_path / "link").queries) == 3
    (folder / "pairs.csv").write_text("filepath,title\n0.jpg,a man\n")
    assert found_in(tmp_path / "link/pairs.csv") == [("0.jpg", "0#0", "a man")]
    (tmp_path / "other").mkdir()
    (tmp_path / "other/pairs.csv").symlink_to(folder / "pairs.csv")
    assert found_in(tmp_path / "other/pairs.csv") == [("0.jpg", "0#0", "a man")]


def test_paths_are_resolved_again_when_images_appear_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "lists/pairs.csv"
    path.parent.mkdir()
    path.write_text("filepath,title\n0.jpg,a man\n")
    assert found_in(path, tmp_path) == [("0.jpg", "0#0", "a man")]
    draw(tmp_path / "lists/0.jpg", 0, True)
    assert found_in(path, tmp_path) == [("lists/0.jpg", "lists/0#0", "a man")]


def test_a_wrong_image_folder_is_named(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gallery").mkdir()
    with pytest.raises(InputError, match=r"image '0.jpg'.*--image_folder instead of .*gallery"):
        read_retrieval(folder, image_folder=tmp_path / "gallery")


def test_extensions_in_capitals(tmp_path: Path) -> None:
    draw(tmp_path / "A.JPG", 0, True)
    (tmp_path / "A.TXT").write_text("a man")
    assert found_in(tmp_path) == [("A.JPG", "A#0", "a man")]


def test_a_link_to_a_missing_image_is_named(folder: Path) -> None:
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    (folder / "gone.txt").write_text("a man")
    pairs = TrainingSet.open(folder)
    assert pairs.missing_images() == ["gone.jpg"]


def test_links_to_a_parent_folder_are_ignored(folder: Path) -> None:
    (folder / "in/up").symlink_to(folder)
    assert len(found_in(folder)) == 3


# -------------------------------------------------------------------------------------- end to end


def infonce_by_hand(image: Tensor, text: Tensor, scale: Tensor, identity: list[int]) -> Tensor:
    """Return InfoNCE computed per row, over its own column and the columns of its negatives."""
    logits = scale.exp() * image @ text.T
    losses = []
    for rows in (logits, logits.T):
        for i, row in enumerate(rows):
            kept = [j for j in range(len(row)) if j == i or identity[j] != identity[i]]
            losses.append(row[kept].logsumexp(0) - row[i])
    return torch.stack(losses).mean()


def test_captions_of_one_image_are_not_negatives() -> None:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(2, 5, 8, generator=generator), dim=-1)
    image, text = vectors.requires_grad_()
    scale, identity = torch.tensor(2.0), [0, 1, 0, 3, 1]
    loss = symmetric_infonce(image, text, scale, torch.tensor(identity))
    by_hand = infonce_by_hand(image, text, scale, identity)
    assert loss.item() == pytest.approx(by_hand.item())
    (gradient,) = torch.autograd.grad(loss, vectors)
    assert bool(gradient.isfinite().all())
    plain = symmetric_infonce(image, text, scale)
    assert loss.item() < plain.item()
    assert torch.equal(symmetric_infonce(image, text, scale, torch.arange(5)), plain)


@pytest.fixture
def own_table(tiny_data: Path, tmp_path: Path) -> Path:
    """Write the tiny pairs as a table and a folder; every third image has two rows in the table."""
    root = tmp_path / "own"
    lines = ["filepath,title"]
    for shard in sorted((tiny_data / "annotation/train").glob("*.json")):
        for number, line in enumerate(shard.read_text().splitlines()):
            row = json.loads(line)
            image = root / "photos" / row["image"].replace("/", "_")
            image.parent.mkdir(parents=True, exist_ok=True)
            image.write_bytes((tiny_data / row["image"]).read_bytes())
            lines.append(f"photos/{image.name},{quoted(row['caption'])}")
            if number % 3 == 0:
                lines.append(f"photos/{image.name},{quoted('Again: ' + row['caption'])}")
            image.with_suffix(".txt").write_text(row["caption"])
    path = root / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("form", ["table", "folder"])
def test_lhp_trains_validates_and_scores(
    own_table: Path, form: str, tokenizer_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from lhp.infer import main as infer
    from lhp.train import main as train
    from pab.training.run_log import read_log

    data = own_table if form == "table" else own_table.parent / "photos"
    if form == "table":
        data.write_text(data.read_text() + "photos/none.jpg,\u200b\n")
    out = tmp_path / "out"
    train([
        "--model", MODEL, "--input_size", "64", "--data_path", str(data), "--batch_size", "8",
        "--sentencepiece_model", str(tokenizer_file), "--output_dir", str(out), "--epochs", "1",
        "--val_pairs", "6", "--num_workers", "0", "--dtype", "fp32", "--device", "cpu",
        "--warmup_steps", "1", "--cache_dir", str(tmp_path / "cache"), "--skip_bad_lines",
    ])  # fmt: skip
    assert (out / SKIPPED).exists() == (form == "table")
    (figures,) = read_log(out / "log.jsonl", "val")
    assert 0 <= figures["R@1"] <= 100
    capsys.readouterr()
    infer([
        "--model", MODEL, "--checkpoint", str(out / "checkpoint-final.pth"),
        "--tokenizer", str(tokenizer_file), "--annotation", str(out / "val_pairs.json"),
        "--image_folder", str(data.parent if form == "table" else data), "--num_workers", "0",
        "--device", "cpu", "--save_score", "none", "--output_file", "none", "--input_size", "64",
    ])  # fmt: skip
    printed = capsys.readouterr().out.splitlines()[1].split()
    assert printed[2] == f"{figures['R@1']:.2f}", (
        "scoring the split reproduces the R@1 of validation"
    )


def test_uit_trains_and_evaluates(
    own_table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from uit.infer import main as infer
    from uit.make_vocabulary import make_vocabulary
    from uit.run import main as run

    monkeypatch.chdir(Path(__file__).parents[1])
    captions = [pair.caption for pair in TrainingSet.open(own_table)]
    make_vocabulary(captions, tmp_path / "bert", 200)
    sizes = ["--model", "uit_debug", "--input_size", "32", "--window", "4", "--device", "cpu"]
    sizes += ["--text_encoder", str(tmp_path / "bert"), "--num_workers", "0"]
    sizes += ["--max_words", "20", "--max_text_length", "24"]
    run([
        *sizes, "--data_path", str(own_table), "--output_dir", str(tmp_path / "out"), "--bs", "6",
        "--epo", "1", "--val_pairs", "6", "--schedule", "linear", "--warmup_steps", "1",
        "--mim_block", "8", "--dtype", "fp32", "--checkpoint", "", "--no_synonyms",
    ])  # fmt: skip
    capsys.readouterr()
    infer([
        *sizes, "--checkpoint", str(tmp_path / "out/checkpoint-final.pth"), "--k_test", "5",
        "--annotation", str(own_table), "--save_score", str(tmp_path / "s.pt"),
        "--output_file", str(tmp_path / "list.txt"),
    ])  # fmt: skip
    assert capsys.readouterr().out.splitlines()[1].split()[:2] == ["all", "32"]


def test_rules_and_columns_are_flags_of_the_commands(
    own_table: Path, tmp_path: Path, refused: Callable[..., str]
) -> None:
    from pab.evaluate import main as evaluate

    own_table.write_text(own_table.read_text().replace("filepath,title", "image,text"))
    found = read_retrieval(own_table, columns=TableColumns("image", "text", ","))
    (tmp_path / "list.txt").write_text("".join(f"{q.image_id}\n" for q in found.queries))
    words = ["--predictions", str(tmp_path / "list.txt"), "--annotation", str(own_table)]
    named = ["--csv_image_key", "image", "--csv_caption_key", "text", "--csv_separator", ","]
    evaluate([*words, *named, "--json", str(tmp_path / "m.json"), "--same_caption_counts"])
    figures = json.loads((tmp_path / "m.json").read_text())
    assert figures["relevance"] == "same_caption"
    assert figures["groups"]["all"]["R@1"] == 100
    assert "--csv_image_key" in refused(evaluate, words)
    assert "one character" in refused(evaluate, [*words, "--csv_separator", "ab"])


def test_outputs_name_the_rule_of_relevance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    from ensemble.run import main as fuse
    from pab.compare import main as compare
    from pab.scores import ScoreFile, load_scores, save_scores
    from uit.run import main as run

    table = tmp_path / "pairs.csv"
    table.write_text("filepath,title\na.jpg,same\nb.jpg,same\n")
    scores = ScoreFile(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), ["a#0", "b#0"], ["a", "b"])
    save_scores(tmp_path / "s.pt", scores)
    words = ["--beit3_score", str(tmp_path / "s.pt"), "--annotation", str(table), "--top_k", "2"]
    words += ["--output_file", str(tmp_path / "list.txt"), "--save_score", str(tmp_path / "f.pt")]
    for flags, rule, first in (
        ([], "image_id", "50.00"), (["--same_caption_counts"], "same_caption", "100.00"),
    ):  # fmt: skip
        capsys.readouterr()
        fuse([*words, *flags])
        assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["all", "2", first]
        assert load_scores(tmp_path / "f.pt").meta["relevance"] == rule
        lists = [str(tmp_path / "list.txt")] * 2
        compare([*lists, "--annotation", str(table), "--json", str(tmp_path / "c.json"), *flags])
        assert json.loads((tmp_path / "c.json").read_text())["relevance"] == rule
    assert "needs --evaluate" in refused(run, ["--same_caption_counts", "--device", "cpu"])
