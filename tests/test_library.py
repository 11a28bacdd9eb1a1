"""The package as a library: public functions, dependencies, wheel, and commands in any folder."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement

import pab
from pab.core.errors import InputError
from pab.core.resources import CONFIGS, config_path
from pab.data.annotations import read_retrieval
from pab.ranking import write_ranked_list
from pab.scores import ScoreFile, load_scores, save_scores

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("pab", "lhp", "uit", "ensemble")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PAGE = ROOT / "docs/library.md"
QUERIES, IMAGES = [f"q{n:02d}" for n in range(10)], [f"G{n:02d}" for n in range(10)]


def scores_of(seed: int) -> ScoreFile:
    scores = torch.rand(10, 10, generator=torch.Generator().manual_seed(seed))
    return ScoreFile(scores, QUERIES, IMAGES, {"model": f"model {seed}"})


# --- the public functions ----------------------------------------------------------------------


def test_import_pab_loads_nothing_else() -> None:
    code = "import sys; before = {*sys.modules}; import pab; print(*{*sys.modules} - before)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = {name for name in done.stdout.split() if name.split(".")[0] == "pab"}
    loaded |= {"torch", "numpy"}.intersection(done.stdout.split())
    assert loaded == {"pab", "pab.core"}
    assert {*pab.__all__} <= {*dir(pab)}
    with pytest.raises(AttributeError, match="no attribute 'fuze'"):
        _ = pab.fuze  # type: ignore[attr-defined]


def test_evaluate_is_both_a_function_and_a_command() -> None:
    """Importing the module ``pab.evaluate`` must not hide the function of the same name."""
    code = (
        "from pab import evaluate as first\nimport pab.evaluate\nfrom pab import evaluate\n"
        "import torch\nfrom pab.scores import ScoreFile\n"
        "scores = ScoreFile(torch.ones(1, 1), ['q'], ['a'])\n"
        "found = [one(scores, {'q': 'a'}).summary()['R@1'] for one in (first, evaluate)]\n"
        "print(*found, pab.evaluate.main.__module__)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["100.0", "100.0", "pab.evaluate"]


def test_rank_breaks_ties_by_the_smaller_id_in_any_column_order() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0], [3.0, 0.0, 0.0]], dtype=torch.float16)
    assert pab.rank(scores, ["b", "c", "a"]) == [["a", "c", "b"], ["b", "a", "c"]]
    assert pab.rank(scores, ["b", "c", "a"], top_k=1) == [["a"], ["b"]]


def test_rank_accepts_a_score_file_or_its_path(tmp_path: Path) -> None:
    file = scores_of(0)
    save_scores(tmp_path / "a.pt", file)
    expected = [
        [IMAGES[i] for i in row.argsort(descending=True, stable=True)[:4]] for row in file.scores
    ]
    assert pab.rank(file, top_k=4) == pab.rank(tmp_path / "a.pt", top_k=4) == expected
    (tmp_path / "run.trec").write_text("q Q0 a 1 3 x\nq Q0 b 2 2 x\nr Q0 c 1 1 x\n")
    assert pab.rank(str(tmp_path / "run.trec")) == [["a", "b"], ["c"]]  # only listed images


def test_rank_refuses_invalid_inputs() -> None:
    scores = torch.zeros(2, 3)
    for wrong, ids, found in (
        (scores, None, "gallery_ids: expected one id per column of scores [Q, G], found none"),
        (scores, ["a", "b"], "found 2 for shape [2, 3]"),
        (scores[0], ["a", "b", "c"], "for shape [3]"),
        (scores, ["a", "b", "a"], "'a'"),
        (scores / 0, ["a", "b", "c"], "row 0"),
        (scores_of(0), IMAGES, "a score file, which has its own ids"),
        (scores.tolist(), ["a", "b", "c"], "expected a score file or its path, found list"),
        (scores.bool().numpy(), ["a", "b", "c"], "expected a score file or its path, found ndarr"),
        (scores, [0.5, 1.5, 2.5], "gallery_ids: expected a list of strings or whole numbers"),
    ):
        with pytest.raises(InputError, match=re.escape(found)):
            pab.rank(wrong, ids)
    with pytest.raises(InputError, match="top_k: must be at least 1, found 0"):
        pab.rank(scores_of(0), top_k=0)


def test_arrays_and_numbers_are_accepted(tmp_path: Path) -> None:
    file = scores_of(0)
    expected = pab.rank(file)
    learned = replace(file, scores=file.scores.clone().requires_grad_())
    assert pab.rank(learned) == expected
    for kind in (np.float32, np.float64, ">f4"):
        assert pab.rank(file.scores.numpy().astype(kind)[::-1], np.array(IMAGES)) == expected[::-1]
    labels = dict(zip(QUERIES, IMAGES, strict=False))
    total = pab.evaluate(file, labels).summary()
    assert pab.evaluate(learned, {one: np.array([name]) for one, name in labels.items()}
                        ).summary() == total  # fmt: skip
    numbered = replace(file, query_ids=[str(n) for n in range(len(QUERIES))])
    by_number = {np.int64(n) if n else n: labels[one] for n, one in enumerate(QUERIES)}
    assert pab.evaluate(numbered, by_number).summary() == total
    torch.save(file.scores, tmp_path / "bare.pt")
    ids = {"query_ids": np.array(QUERIES), "gallery_ids": np.array(IMAGES)}
    assert load_scores(tmp_path / "bare.pt", **ids).query_ids == QUERIES
    assert load_scores(tmp_path / "bare.pt", **{**ids, "query_ids": range(10)}).query_ids[0] == "0"
    fused = pab.fuse([file, learned], np.array([0.5]), query_ids=np.array(QUERIES[::-1]))
    assert torch.equal(fused.scores, pab.fuse([file, file], [0.5]).scores.flip(0))
    save_scores(tmp_path / "fused.pt", fused)
    torch.load(tmp_path / "fused.pt", weights_only=True)


@pytest.mark.parametrize(
    ("labels", "found"),
    [
        ({"0": "a", 0: "b"}, "query 0: expected every query once"),
        ({"0": None}, "query '0': expected a list of strings or whole numbers as ids, found None"),
        ({0.5: "a"}, "query 0.5: expected a list of strings or whole numbers as ids, found 0.5"),
    ],
)
def test_invalid_labels_are_refused(labels: Any, found: str) -> None:
    with pytest.raises(InputError, match=re.escape(f"annotation, {found}")):
        pab.evaluate(scores_of(0), labels)


def test_fuse_is_the_published_rule_and_aligns_rows_by_id(tmp_path: Path) -> None:
    first, second, third = (scores_of(seed) for seed in range(3))
    turned = ScoreFile(second.scores.flip(0), QUERIES[::-1], IMAGES, second.meta)
    save_scores(tmp_path / "second.pt", turned)
    parts = [(f.scores - f.scores.min()) / (f.scores.max() - f.scores.min())
             for f in (first, second, third)]  # fmt: skip
    expected = 0.8 * (0.3 * parts[0] + 0.7 * parts[1]) + (1 - 0.8) * parts[2]
    fused = pab.fuse([first, tmp_path / "second.pt", third], weights=[0.3, 0.8])
    torch.testing.assert_close(fused.scores, expected, rtol=0, atol=1e-6)
    assert (fused.query_ids, fused.gallery_ids) == (QUERIES, IMAGES)
    files = [(one["file"], "sha256" in one, one["weight"]) for one in fused.meta["members"]]
    assert files == [
        ("score file 1", False, 1.0), (str(tmp_path / "second.pt"), True, 0.3),
        ("score file 3", False, 0.8),
    ]  # fmt: skip
    save_scores(tmp_path / "fused.pt", fused)
    order = pab.fuse([first, turned], [0.5], query_ids=QUERIES[::-1]).query_ids
    assert order == QUERIES[::-1]


def test_fuse_records_the_images_that_no_file_lists() -> None:
    ids = (["q"], ["a", "b", "c"])
    first = ScoreFile(torch.tensor([[0.5, 0.9, 0.4]]), *ids, {"listed": {"q": 1}})  # b
    second = ScoreFile(torch.tensor([[0.1, 0.2, 0.3]]), *ids, {"listed": {"q": 2}})  # c, b
    fused = pab.fuse([first, second], [0.5])
    assert fused.listed == {"q": 2}
    assert pab.rank(fused, top_k=3) == [["b", "c"]]
    complete = pab.fuse([first, ScoreFile(second.scores, *ids)], [0.5])
    assert complete.listed is None or complete.listed == {"q": 3}


def test_fuse_has_the_rules_of_the_command() -> None:
    files = [scores_of(0), scores_of(1)]
    total = pab.fuse(files, [0.4, 0.6], fusion="sum", scaling="minmax_query")
    row = [f.scores[0] for f in files]
    low = [(one - one.min()) / (one.max() - one.min()) for one in row]
    torch.testing.assert_close(total.scores[0], 0.4 * low[0] + 0.6 * low[1])
    places = sum(1 / (60 + 10 - f.scores.argsort(1).argsort(1)) for f in files)
    by_rank = pab.fuse(files, fusion="reciprocal_rank")
    torch.testing.assert_close(by_rank.scores, places)


def test_fuse_refuses_invalid_inputs(tmp_path: Path) -> None:
    one, other = scores_of(0), scores_of(1)
    unsorted = ScoreFile(one.scores, QUERIES, IMAGES[::-1], {})
    elsewhere = ScoreFile(one.scores, QUERIES, [f"x{name}" for name in IMAGES], {})
    for files, options, found in (
        ([], {}, "expected score files to fuse, found none"),
        ([one, other], {}, "weights: expected 1 for 2 score files and iterative fusion, found 0"),
        ([one, other], {"weights": [1.2]}, "must lie in [0, 1], found 1.2"),
        ([one, other], {"weights": [0.2, 0.2], "fusion": "sum"}, "must add up to 1, found 0.4"),
        ([one, other], {"fusion": "mean"}, "found 'mean'"),
        ([one, other], {"weights": [0.5], "scaling": "z"}, "found 'z'"),
        ([one, other], {"fusion": "reciprocal_rank", "rank_k": -1}, "found -1"),
        ([one, unsorted], {"weights": [0.5]}, "score file 2, gallery_ids: expected sorted ids"),
        ([one, elsewhere], {"weights": [0.5]}, "score file 2"),
        ([one, tmp_path / "none.pt"], {"weights": [0.5]}, "none.pt"),
        ([one, one.scores.numpy()], {"weights": [0.5]}, "score file 2: expected a score file or"),
        ([one, other], {"weights": ["x"]}, "weights: expected numbers, found 'x'"),
        (one, {}, "scores: expected a list of score files, found a single one"),
    ):
        with pytest.raises(InputError, match=re.escape(found)):
            pab.fuse(files, **options)


def test_evaluate_reads_labels_in_any_form(tiny_data: Path, tmp_path: Path) -> None:
    masked = tiny_data / "name-masked_test-set"
    query, answers = masked / "query.json", masked / "answers.json"
    file = scores_of(0)
    save_scores(tmp_path / "a.pt", file)
    labelled = read_retrieval(query, answers=answers)
    right = {one: answer["gallery"] for one, answer in json.loads(answers.read_text()).items()}
    expected = pab.evaluate(file, labelled).summary()
    assert 0 < expected["mAP"] < 100
    assert pab.evaluate(tmp_path / "a.pt", query, answers=answers).summary() == expected
    assert pab.evaluate(file, right).summary() == expected
    assert pab.evaluate(file, {one: {name} for one, name in right.items()}).summary() == expected
    gallery = masked / "gallery"
    whole = pab.evaluate(file, query, answers=answers, image_folder=gallery)
    assert whole.summary() == expected
    with pytest.raises(InputError, match="pass its answer key with --answers FILE"):
        pab.evaluate(file, query)
    with pytest.raises(InputError, match="q99"):
        pab.evaluate(file, {**right, "q99": "G00"})
    broken = ScoreFile(file.scores / 0, QUERIES, IMAGES, {})
    with pytest.raises(InputError, match="q00"):
        pab.evaluate(broken, labelled)


# --- shipped files -----------------------------------------------------------------------------


def test_a_config_is_read_from_the_working_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert config_path("configs/uit/infer.yaml") == CONFIGS / "uit/infer.yaml"
    note = "note: configs/uit/infer.yaml: not in the working directory, so "
    assert capsys.readouterr().err == f"{note}{CONFIGS / 'uit/infer.yaml'} is read\n"
    for other in ("configs/none.yaml", "uit/infer.yaml", "/configs/uit/infer.yaml"):
        assert config_path(other) == Path(other)
    own = tmp_path / "configs/uit/infer.yaml"
    own.parent.mkdir(parents=True)
    own.touch()
    assert config_path("configs/uit/infer.yaml") == Path("configs/uit/infer.yaml")
    assert capsys.readouterr().err == ""


# --- dependencies ------------------------------------------------------------------------------

DECLARED = {
    requirement.name.lower().replace("_", "-"): requirement
    for group in (
        PROJECT["project"]["dependencies"],
        *PROJECT["project"]["optional-dependencies"].values(),
    )
    for requirement in map(Requirement, group)
}
# Installed separately (requirements_blip2_lavis.txt), or imported only for type checking.
NOT_DECLARED = {"lavis", "omegaconf", "_typeshed", "pydantic_core"}


def pins(path: Path) -> dict[str, str]:
    """Map each pinned package of a requirements file to its version."""
    found = {}
    for line in path.read_text().splitlines():
        name, sign, version = line.partition("==")
        if sign and not line.startswith("#"):
            found[name.lower().replace("_", "-")] = version
    return found


def test_pins_satisfy_the_declared_ranges() -> None:
    files = [ROOT / f"requirements_{name}.txt" for name in ("lhp", "uit", "dev")]
    found = {path.name: pins(path) for path in files}
    for file, pinned in found.items():
        for name, version in pinned.items():
            assert name in DECLARED, f"{file}: {name} is not declared in pyproject.toml"
            assert version in DECLARED[name].specifier, f"{file}: {name}=={version}"
    pinned_names = {name for pinned in found.values() for name in pinned}
    assert {*DECLARED} <= pinned_names
    shared = found["requirements_lhp.txt"].keys() & found["requirements_uit.txt"].keys()
    for name in shared:
        assert found["requirements_lhp.txt"][name] == found["requirements_uit.txt"][name], (
            f"{name} has two versions"
        )


def test_every_third_party_import_is_declared() -> None:
    own = {*PACKAGES, "scripts"}
    installed = importlib.metadata.packages_distributions()
    declared = {name.split("[")[0] for name in DECLARED}
    seen = set()
    for path in (path for folder in own for path in (ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            for top in {name.split(".")[0] for name in names}:
                if top in own or top in NOT_DECLARED or top in sys.stdlib_module_names:
                    continue
                seen.add(top)
                owners = {one.lower().replace("_", "-") for one in installed.get(top, ())}
                assert owners & declared, f"{path.relative_to(ROOT)}: {top} is not declared"
    assert {"torch", "yaml", "PIL", "open_clip"} <= seen


def test_all_packages_are_listed_and_typed() -> None:
    settings = PROJECT["tool"]["setuptools"]
    found = {
        path.parent.relative_to(ROOT).as_posix().replace("/", ".")
        for package in PACKAGES
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert {*settings["packages"]} == {*found, "pab.configs"}
    assert all((ROOT / package / "py.typed").is_file() for package in PACKAGES)
    assert settings["package-dir"] == {"pab.configs": "configs"}


# --- the wheel ---------------------------------------------------------------------------------


def ten_lines() -> str:
    """Return the example of docs/library.md: at most ten lines, which the README repeats."""
    match = re.search(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert match is not None
    lines = [line for line in match[1].splitlines() if line.strip()]
    assert len(lines) <= 10
    assert match[0] in (ROOT / "README.md").read_text(), "the README has the same lines"
    return match[1]


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment with the wheel and the dependencies, but without the repository."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in (*PACKAGES, "configs"):
        leave = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=leave)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run(
        [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source],
        check=True,
    )
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv/bin/python"
    (wheel,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    # Python ignores .pth files (of an editable installation) in folders added in this way.
    site = folder / f"venv/lib/python{sysconfig.get_python_version()}/site-packages"
    (site / "dependencies.pth").write_text(
        f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n"
    )
    return python


@pytest.fixture
def elsewhere(tiny_data: Path, tmp_path: Path) -> Path:
    """A folder with the tiny data, two score files and a CLIP model."""
    for place, target in (
        ("data/mini", tiny_data), ("data/PAB", tiny_data),
        ("checkpoints/mini/clip", ROOT / "checkpoints/mini/clip"),
    ):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).symlink_to(target)
    for seed, name in enumerate(("lhp", "clip")):
        save_scores(tmp_path / f"output/demo/score_{name}.pt", scores_of(seed))
    return tmp_path


def run(python: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run the installed package in a folder, without PYTHONPATH."""
    done = subprocess.run(
        [python, *words], cwd=folder, capture_output=True, text=True, check=False,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def test_the_wheel_contains_the_files_that_commands_read(python: Path, elsewhere: Path) -> None:
    code = (
        "import pab, pab.core.resources as r, importlib.resources as files\n"
        "print(pab.__file__, r.CONFIGS)\n"
        "print(*sorted(p.relative_to(r.CONFIGS).as_posix() for p in r.CONFIGS.rglob('*.yaml')))\n"
        "for name in ('ensemble.report', 'pab.search'):\n"
        "    assert any(p.name.endswith('.j2') for p in files.files(name).joinpath('templates')"
        ".iterdir())\n"
        "for name in ('pab', 'lhp', 'uit', 'ensemble'):\n"
        "    assert files.files(name).joinpath('py.typed').is_file()\n"
    )
    places, configs = run(python, elsewhere, "-c", code).stdout.splitlines()
    site = python.parents[1].resolve()
    assert all(Path(place).resolve().is_relative_to(site) for place in places.split())
    in_checkout = (p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.yaml"))
    assert configs.split() == sorted(path.as_posix() for path in in_checkout)


def test_commands_run_from_any_folder(python: Path, elsewhere: Path) -> None:
    masked = elsewhere / "data/mini/name-masked_test-set"
    order = [json.loads(line)["query_index"] for line in (masked / "query.json").open()]
    fused = ("-m", "ensemble.run", "--config", "configs/ensemble/mini.yaml", "--uit_score", "none",
             "--blip2_score", "none", "--beit3_score", "output/demo/score_lhp.pt",
             "--clip_score", "output/demo/score_clip.pt", "--save_score", "fused.pt")  # fmt: skip
    done = run(python, elsewhere, *fused)
    assert "configs/ensemble/mini.yaml: not in the working directory, so " in done.stderr
    expected = pab.fuse([scores_of(0), scores_of(1)], weights=[0.25])
    found = load_scores(elsewhere / "fused.pt")
    assert torch.equal(found.scores, expected.scores)

    names = dict(zip(found.query_ids, pab.rank(found), strict=True))
    write_ranked_list(elsewhere / "answer.txt", [names[query_id] for query_id in order])
    done = run(python, elsewhere, "-m", "ensemble.protocol", "www25", "answer.txt")
    assert done.stdout == "answer.txt: 10 lines of distinct known names, as www25 requires\n"

    labels = ("--annotation", str(masked / "query.json"), "--answers", str(masked / "answers.json"))
    done = run(python, elsewhere, "-m", "pab.evaluate", "--score", "fused.pt", *labels)
    table = pab.evaluate(expected, masked / "query.json", answers=masked / "answers.json").table()
    assert done.stdout == f"{table}\n"


def test_the_ten_lines_of_the_readme_run(python: Path, elsewhere: Path) -> None:
    *table, last = run(python, elsewhere, "-c", ten_lines()).stdout.splitlines()
    masked = elsewhere / "data/mini/name-masked_test-set"
    fused = pab.fuse([scores_of(0), scores_of(1)], weights=[0.25])
    found = pab.evaluate(fused, masked / "query.json", answers=masked / "answers.json")
    assert table == found.table().splitlines()
    (photos,), first = (ast.literal_eval(part) for part in last.split(" | "))
    assert sorted(photos) == ["G00", "G01"]
    assert first == pab.rank(fused, top_k=3)[0]
