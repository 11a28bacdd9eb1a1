"""Re-ranking with a vision-language model: `scripts/rerank_infer.py`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import ExifTags, Image
from torch import Tensor

from pab.data.annotations import read_retrieval
from pab.data.images import list_gallery, load_image
from pab.encoders.st import extra
from pab.encoders.st.pair_inputs import PROMPT, PairModel
from pab.encoders.st.rerank import RerankConfig
from pab.encoders.st.reranker import LibraryPairModel
from pab.ranking import top_k
from pab.scores import ScoreFile, load_scores
from scripts.rerank_infer import main
from tests.kill_and_rerank import kill_after, scored_pairs
from tests.small_reranker import make_candidates, make_reranker, rerank_words
from tests.test_processes import run_in

K = 4
BACKENDS = ("transformers", "sentence_transformers")
Refused, Scored, Words = Callable[..., str], Callable[..., ScoreFile], Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small reranker."""
    return make_reranker(tmp_path_factory.mktemp("vlm") / "reranker")


@pytest.fixture(scope="module")
def candidates(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return random scores that select the candidates."""
    return make_candidates(tiny_data, tmp_path_factory.mktemp("scores") / "first.pt")


@pytest.fixture
def words(folder: Path, tiny_data: Path, candidates: Path, tmp_path: Path) -> Words:
    """Return a function that makes a command line."""

    def made(name: str = "scores", **settings: Any) -> list[str]:
        given = {
            "save_score": tmp_path / f"{name}.pt", "feature_cache_dir": tmp_path / f"{name}_cache",
            **settings,
        }  # fmt: skip
        return rerank_words(folder, tiny_data, candidates, **given)

    return made


@pytest.fixture
def scored(words: Words, tmp_path: Path) -> Scored:
    """Return a function that re-ranks and reads the score file."""

    def run(name: str = "scores", **settings: Any) -> ScoreFile:
        main(words(name, **settings))
        return load_scores(tmp_path / f"{name}.pt", mmap=False)

    return run


@pytest.fixture
def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that collects the number of pairs in each scored batch."""
    counts: list[int] = []
    original = PairModel.scores

    def counted(self: PairModel, inputs: dict[str, Tensor]) -> Tensor:
        counts.append(len(inputs["input_ids"]))
        return original(self, inputs)

    monkeypatch.setattr(PairModel, "scores", counted)
    return counts


def copied_gallery(data: Path, folder: Path) -> Path:
    """Return a copy of the gallery that a test may change."""
    return Path(shutil.copytree(data / "name-masked_test-set/gallery", folder / "gallery"))


def one_by_one(folder: Path, data: Path, chosen: Tensor, prompt: str = PROMPT) -> Tensor:
    """Score each candidate by a forward pass of its own, float32 [Q, K]."""
    masked = data / "name-masked_test-set"
    queries, images = (
        read_retrieval(masked / "query.json").queries,
        list_gallery(masked / "gallery"),
    )
    model = PairModel.open(folder, prompt=prompt)
    found = torch.empty(chosen.shape)
    with torch.inference_mode():
        for row, columns in enumerate(chosen.tolist()):
            for place, column in enumerate(columns):
                picture = load_image(images[column].path)
                inputs = model.inputs([queries[row].caption], [picture])
                found[row, place] = model.scores(inputs)
    return found


@pytest.mark.parametrize("backend", BACKENDS)
def test_candidates_get_the_scores_of_a_plain_forward_pass(
    folder: Path, tiny_data: Path, candidates: Path, scored: Scored, backend: str
) -> None:
    found = scored(backend=backend)
    chosen = top_k(load_scores(candidates).scores, K)
    wanted = one_by_one(folder, tiny_data, chosen)
    assert wanted.std() > 0.01
    torch.testing.assert_close(found.scores.gather(1, chosen), wanted, rtol=0, atol=1e-4)
    others = found.scores.scatter(1, chosen, -torch.inf).amax(dim=1)
    assert (others < found.scores.gather(1, chosen).amin(dim=1)).all()
    tokenizer = PairModel.open(folder).processor.tokenizer
    assert found.meta["yes_token_id"] == tokenizer.convert_tokens_to_ids("yes")
    assert found.meta["no_token_id"] == tokenizer.convert_tokens_to_ids("no")
    assert found.meta["prompt"] == PROMPT
    assert found.meta["k_test"] == K
    assert found.meta["backend"] == backend


def test_both_backends_agree_without_the_librarys_settings(
    folder: Path, tmp_path: Path, scored: Scored
) -> None:
    """The library would take such a folder for a classifier."""
    plain = shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns("*modules*"))
    ours, theirs = (
        scored(name, model=plain, backend=name)
        for name in ("transformers", "sentence_transformers")
    )
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_ids_that_the_folder_lacks_come_from_the_tokenizer(
    folder: Path, tmp_path: Path, scored: Scored, backend: str
) -> None:
    """A published folder names a wrong path for the module with the token ids."""
    lacking = Path(shutil.copytree(folder, tmp_path / "lacking"))
    modules = json.loads((lacking / "modules.json").read_text())
    modules[1]["path"] = "wrong"
    (lacking / "modules.json").write_text(json.dumps(modules))
    found = scored("found", model=lacking, backend=backend)
    assert torch.equal(found.scores, scored("whole", backend=backend).scores)
    given = scored("given", model=lacking, backend=backend, yes_token="no", no_token="yes")
    assert given.meta["yes_token_id"] == found.meta["no_token_id"]


def test_both_backends_agree_on_a_template_without_pair_roles(
    folder: Path, tmp_path: Path, scored: Scored
) -> None:
    """The library rejects pairs with such a template, so each pair becomes a single message."""
    plain = shutil.copytree(folder, tmp_path / "plain")
    template = (plain / "chat_template.jinja").read_text()
    only_user = template.replace(
        "{%- for message in messages -%}\n",
        "{%- for message in messages if message.role == 'user' -%}\n",
    )
    assert only_user != template
    (plain / "chat_template.jinja").write_text(only_user)
    ours, theirs = (
        scored(name, model=plain, backend=name)
        for name in ("transformers", "sentence_transformers")
    )
    assert ours.meta["pair_roles"] is theirs.meta["pair_roles"] is False
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)
    assert not torch.equal(ours.scores, scored("roles").scores)


@pytest.mark.parametrize("settings", [{"batch_size": 1}, {"batch_size": 16, "num_workers": 2}])
def test_scores_do_not_depend_on_batches_and_workers(
    scored: Scored, settings: dict[str, Any]
) -> None:
    torch.testing.assert_close(
        scored("a").scores, scored("b", **settings).scores, rtol=0, atol=1e-5
    )


def test_another_instruction_changes_the_scores(
    folder: Path,
    tiny_data: Path,
    candidates: Path,
    scored: Scored,
    tmp_path: Path,
) -> None:
    """The flag and the file give the same scores; an empty string means no instruction."""
    (tmp_path / "prompt.txt").write_text("Find the person.\n")
    chosen = top_k(load_scores(candidates).scores, K)
    found = scored("flag", prompt="Find the person.")
    wanted = one_by_one(folder, tiny_data, chosen, "Find the person.")
    torch.testing.assert_close(found.scores.gather(1, chosen), wanted, rtol=0, atol=1e-4)
    file = scored("file", prompt_file=tmp_path / "prompt.txt")
    assert torch.equal(file.scores, found.scores)
    assert file.meta == found.meta
    none = scored("none", prompt="")
    wanted = one_by_one(folder, tiny_data, chosen, "")
    torch.testing.assert_close(none.scores.gather(1, chosen), wanted, rtol=0, atol=1e-4)
    assert not torch.equal(none.scores, scored("default").scores)


def test_a_second_run_scores_only_new_pairs(
    scored: Scored, batch_sizes: list[int], tmp_path: Path, tiny_data: Path
) -> None:
    """The cache identifies a pair by its model, prompt, image and caption."""
    cache = tmp_path / "cache"
    first = scored("first", feature_cache_dir=cache)
    pairs = len(first.query_ids) * K
    assert sum(batch_sizes) == pairs
    again = scored("again", feature_cache_dir=cache)
    assert sum(batch_sizes) == pairs
    assert torch.equal(again.scores, first.scores)
    more = scored("more", feature_cache_dir=cache, k_test=K + 1)
    assert sum(batch_sizes) == pairs + len(first.query_ids)
    chosen = first.scores > first.scores.amin(dim=1, keepdim=True)
    torch.testing.assert_close(more.scores[chosen], first.scores[chosen], rtol=0, atol=1e-5)
    scored("prompt", feature_cache_dir=cache, prompt="Another.")
    assert sum(batch_sizes) == 2 * pairs + len(first.query_ids)
    changed = copied_gallery(tiny_data, tmp_path) / "G00.jpg"
    Image.new("RGB", (80, 60), (9, 9, 200)).save(changed)
    before = sum(batch_sizes)
    scored("changed", feature_cache_dir=cache, image_folder=tmp_path / "gallery")
    column = first.gallery_ids.index("G00")
    assert sum(batch_sizes) - before == int(chosen[:, column].sum()) > 0


def test_equal_sizes_share_a_batch(
    scored: Scored,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tiny_data: Path,
) -> None:
    """The largest images come first; at most one batch has images of two sizes."""
    gallery = copied_gallery(tiny_data, tmp_path)
    for image in sorted(gallery.iterdir())[::2]:
        Image.open(image).resize((40, 90)).save(image)
    grids: list[list[Any]] = []
    original = PairModel.scores

    def watched(self: PairModel, inputs: dict[str, Tensor]) -> Tensor:
        grids.append(inputs["image_grid_thw"].prod(dim=1).tolist())
        return original(self, inputs)

    monkeypatch.setattr(PairModel, "scores", watched)
    scored(image_folder=gallery)
    sizes = [size for batch in grids for size in batch]
    assert len(set(sizes)) == 2
    assert sizes == sorted(sizes, reverse=True)
    assert sum(len(set(batch)) > 1 for batch in grids) <= 1


def test_exif_orientation_is_not_applied(scored: Scored, tmp_path: Path, tiny_data: Path) -> None:
    """Every member reads the stored pixels; transformers' own image loader would rotate them."""
    found = []
    for orientation in (1, 6):
        gallery = tmp_path / f"gallery{orientation}"
        gallery.mkdir()
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        for path in (tiny_data / "name-masked_test-set/gallery").iterdir():
            Image.open(path).save(gallery / f"{path.stem}.png", exif=exif)
        found.append(scored(f"exif{orientation}", image_folder=gallery).scores)
    assert torch.equal(*found)


def test_parts_are_merged_to_the_whole(
    scored: Scored, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from pab.scores import main as scores_main

    whole = scored("whole")
    parts = [scored(f"part{n}", part=f"{n}/3") for n in (1, 2, 3)]
    assert [len(part.query_ids) for part in parts] == [3, 3, 4]
    files = [str(tmp_path / f"part{n}.pt") for n in (3, 1, 2)]
    scores_main(["merge", *files, "--out", str(tmp_path / "merged.pt")])
    merged = load_scores(tmp_path / "merged.pt")
    assert (merged.query_ids, merged.gallery_ids) == (whole.query_ids, whole.gallery_ids)
    torch.testing.assert_close(merged.scores, whole.scores, rtol=0, atol=1e-5)
    assert merged.meta == whole.meta


def test_a_part_has_its_own_default_file() -> None:
    config = RerankConfig(candidates="a.pt", part="3/8").with_outputs()
    assert config.save_score == "sims_score/score_rerank_3of8_reproduce.pt"
    assert config.output_file is None
    whole = RerankConfig(candidates="a.pt").with_outputs()
    assert whole.save_score == "sims_score/score_rerank_reproduce.pt"
    assert whole.output_file == "predictions/score_rerank_reproduce.txt"


def test_bf16_scores_do_not_tie(folder: Path, tiny_data: Path) -> None:
    """The last product is computed in float32: bf16 logits from 8 to 16 have steps of 0.06."""
    images = list_gallery(tiny_data / "name-masked_test-set/gallery")
    pictures = [load_image(image.path) for image in images]
    for kind in (PairModel, LibraryPairModel):
        model = kind.open(folder, dtype=torch.bfloat16)
        with torch.inference_mode():
            found = model.scores(model.inputs(["a man"] * len(pictures), pictures))
        assert found.dtype == torch.float32
        assert not torch.equal(found, found.bfloat16().float())


@pytest.mark.slow
def test_a_killed_run_scores_at_most_one_batch_again(
    scored: Scored, words: Words, batch_sizes: list[int], tmp_path: Path
) -> None:
    """`python -m tests.kill_and_rerank` kills a run ten times."""
    whole = scored("whole")
    pairs = sum(batch_sizes)
    log = tmp_path / "killed.log"
    begun = kill_after(words("killed"), log, batches=4, delay=0.03)
    batch_sizes.clear()
    killed = scored("killed")
    assert 0 < sum(batch_sizes) < pairs, "the killed run has stored nothing"
    assert sum(scored_pairs(log)) + sum(batch_sizes) - pairs <= max(scored_pairs(log)), begun
    assert (tmp_path / "killed.pt").read_bytes() == (tmp_path / "whole.pt").read_bytes()
    assert torch.equal(killed.scores, whole.scores)


def rerank_in_group(words: list[str], _: Path) -> dict[str, Any]:
    """Re-rank in a process of a group; the command leaves the group."""
    main(words)
    return {}


@pytest.mark.distributed
@pytest.mark.slow
def test_two_processes_score_as_one(scored: Scored, words: Words, tmp_path: Path) -> None:
    """The division of the batches among the processes does not depend on the backend."""
    one = scored("one")
    run_in(2, partial(rerank_in_group, words("two")), tmp_path)
    two = load_scores(tmp_path / "two.pt")
    assert torch.equal(one.scores, two.scores)
    assert one.meta == two.meta


# --------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"yes_token": " yes"}, "--yes_token: expected the text of one token, found ' yes'"),
        ({"no_token": "no way"}, "--no_token: expected the text of one token, found 'no way'"),
        ({"prompt_file": "missing.txt"}, "missing.txt: expected a text file with the instruction"),
        ({"prompt": "a", "prompt_file": "b"}, "--prompt_file: contradicts --prompt"),
        ({"part": "4/3"}, "--part: expected I/N with I from 1 to N, such as 3/8, found '4/3'"),
        ({"part": "1/11"}, "--part: expected at most one part per query (10), found 11"),
        ({"model": "missing"}, "--model: missing is neither a folder"),
        ({"candidates": "missing.pt"}, "missing.pt: expected"),
        ({"k_test": 0}, "k_test"),
    ],
)
def test_bad_settings_give_one_line(
    words: Words, refused: Refused, monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    settings: dict[str, Any], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in refused(main, words(**settings))
    assert not (tmp_path / "scores.pt").exists()


def test_missing_candidates_are_named(words: Words, refused: Refused) -> None:
    without = words()
    place = without.index("--candidates")
    assert "--candidates: expected a score file" in refused(
        main, without[:place] + without[place + 2 :]
    )


def test_an_empty_prompt_file_is_refused(words: Words, refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    line = refused(main, words(prompt_file=tmp_path / "empty.txt"))
    assert "empty.txt: expected an instruction, found no text" in line


@pytest.mark.parametrize("num_workers", [0, 2])
def test_images_that_cannot_be_processed_are_named_before_scoring(
    words: Words, refused: Refused, tiny_data: Path, tmp_path: Path,
    batch_sizes: list[int], num_workers: int,
) -> None:  # fmt: skip
    """One file is damaged, and one image has a shape that the model's processor rejects."""
    gallery = copied_gallery(tiny_data, tmp_path)
    cut = gallery / "G03.jpg"
    cut.write_bytes(cut.read_bytes()[:600])
    Image.new("RGB", (3, 900)).save(gallery / "G05.jpg")
    line = refused(main, words(image_folder=gallery, k_test=10, num_workers=num_workers))
    assert "2 of 10 images: cannot be read" in line
    assert "G03.jpg (" in line
    assert "G05.jpg (3 x 900 pixels, which the model's processor rejects: " in line
    assert batch_sizes == []


def test_a_control_token_in_a_caption_is_named(
    words: Words, refused: Refused, tiny_data: Path, tmp_path: Path
) -> None:
    """The token would move the image to another place in the text."""
    lines = (tiny_data / "name-masked_test-set/query.json").read_text().splitlines()
    first = json.loads(lines[0])
    first["caption"] = "A man <|image_pad|> walks."
    (tmp_path / "query.json").write_text("\n".join([json.dumps(first), *lines[1:]]))
    line = refused(main, words(annotation=tmp_path / "query.json"))
    assert "contains '<|image_pad|>', a control token of the model" in line


def test_without_the_extra_the_command_says_what_to_install(
    words: Words, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(extra, "import_module", missing)
    line = refused(main, words(backend="sentence_transformers"))
    assert 'run python -m pip install "person-anomaly-retrieval[vlm]"' in line
    main(words(backend="transformers"))  # needs only what is always installed


def test_a_model_without_an_image_processor_is_refused(
    words: Words, refused: Refused, folder: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "processor_config.json").unlink()
    assert str(copy) in refused(main, words(model=copy))
