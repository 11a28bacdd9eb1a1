"""No command writes over a file that it reads; the check comes before any other work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ensemble.report.page import main as report
from lhp.infer import main as lhp_infer
from pab.compare import main as compare
from pab.core.errors import InputError
from pab.core.outputs import check_inputs_are_kept, check_outputs
from pab.evaluate import main as evaluate
from pab.export_weights import main as export_weights
from pab.scores import main as scores
from scripts.rerank_infer import main as rerank_infer
from uit.infer import main as uit_infer

Main = Callable[[list[str]], None]

# Name -> command, words with FILE as both an input and an output, named output, named input.
CASES: dict[str, tuple[Main, str, str, str]] = {
    "evaluate: queries": (
        evaluate, "--score s.pt --annotation a.json --queries FILE --json FILE",
        "json", "--queries",
    ),
    "evaluate: order": (
        evaluate, "--predictions p.txt --annotation a.json --query_order FILE --json FILE",
        "json", "--query_order",
    ),
    "evaluate: run": (
        evaluate, "--score FILE.run --annotation a.json --trec FILE", "trec", "--score",
    ),
    "evaluate: qrels": (
        evaluate, "--score s.pt --annotation FILE.qrels --trec FILE", "trec", "--annotation",
    ),
    "compare: order": (
        compare, "a.txt b.txt --answers k.json --query_order FILE --json FILE",
        "json", "--query_order",
    ),
    "scores import: source": (scores, "import FILE --out FILE", "out", "the argument file"),
    "scores import: queries": (
        scores, "import s.npy --queries FILE --out FILE", "out", "--queries",
    ),
    "scores merge": (scores, "merge a.pt FILE --out FILE", "out", "the argument files"),
    "export_weights": (export_weights, "FILE --out FILE", "out", "the argument checkpoint"),
    "report": (
        report, "--score a=s.pt --score b=FILE --annotation a.json --out FILE", "out", "--score",
    ),
    "scoring": (
        lhp_infer, "--annotation FILE --save_score FILE", "save_score", "--annotation",
    ),
    "scoring: config": (lhp_infer, "--config FILE --output_file FILE", "output_file", "--config"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_inputs_are_not_overwritten(name: str, tmp_path: Path) -> None:
    main, words, output, source = CASES[name]
    files = [tmp_path / name for name in ("file", "file.run", "file.qrels")]
    for path in files:
        path.write_text("top_k: 3\n")
    with pytest.raises(InputError) as error:
        main(words.replace("FILE", str(files[0])).split())
    assert str(error.value).startswith(f"--{output}: {files[0]}")
    assert f"is the file of {source}: it would be overwritten" in str(error.value)
    assert [path.read_text() for path in files] == ["top_k: 3\n"] * 3
    assert sorted(tmp_path.iterdir()) == sorted(files)


@pytest.mark.parametrize("main", [uit_infer, rerank_infer])
def test_candidates_are_not_overwritten(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default output paths are checked too."""
    monkeypatch.chdir(tmp_path)
    name = {uit_infer: "uit", rerank_infer: "rerank"}[main]
    path = tmp_path / f"sims_score/score_{name}_reproduce.pt"
    path.parent.mkdir()
    path.write_text("scores")
    with pytest.raises(InputError, match="is the file of --candidates: it would be overwritten"):
        main(["--candidates", str(path)])
    assert path.read_text() == "scores"


@pytest.mark.parametrize(
    "value", ["{}", "uit={}", "uit:{}", "uit:{}:0.5", ["a.pt", "uit:{}"], ("{}",)]
)
def test_paths_are_found_in_settings(
    value: str | list[str] | tuple[str, ...], tmp_path: Path
) -> None:
    path = tmp_path / "a:b=c.pt"
    path.write_text("x")
    texts = value if isinstance(value, str) else type(value)(one.format(path) for one in value)
    setting = texts.format(path) if isinstance(texts, str) else texts
    with pytest.raises(InputError, match=r"--out: .* is the file of --member"):
        check_inputs_are_kept({"out": str(path)}, {"--member": setting})


def test_two_outputs_in_one_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for other in ("link/f", "real/../link/f", "real/./f"):
        with pytest.raises(InputError, match=r"--output_file: .* is also --save_score"):
            check_outputs({"output_file": tmp_path / "real/f", "save_score": tmp_path / other})
    (tmp_path / "f").symlink_to("real/f")  # is replaced, not followed
    check_outputs({"output_file": tmp_path / "real/f", "save_score": tmp_path / "f"})


def test_other_outputs_are_allowed(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    inputs = {"--score": str(path), "--top_k": 3, "--text": "a\0b", "--empty": "", "--none": None}
    check_inputs_are_kept({"out": path}, inputs)  # does not exist: nothing is overwritten
    path.write_text("x")
    check_inputs_are_kept({"out": path, "json": None, "number": 3}, {**inputs, "--score": "t.pt"})
