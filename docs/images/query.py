"""Draw the README's figure: one query and its best images after fusion.

    bash scripts/demo.sh && python docs/images/query.py

The right image has a green frame, the twin (same person and scene, another action) an orange one.
"""

from __future__ import annotations

import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pab.data.annotations import read_retrieval
from pab.data.images import load_image
from pab.ranking import top_k
from pab.scores import load_scores

ROOT = Path(__file__).resolve().parents[2]
MASKED = ROOT / "data/mini/name-masked_test-set"
SCORES = ROOT / "output/demo/score_fused.pt"
OUT = Path(__file__).with_name("query.png")
ROW = 2  # row of the drawn query in the score file
IMAGES, SIDE, GAP, MARGIN = 5, 208, 28, 24  # number of images; the others in pixels
FRAME = 6
LETTERS_PER_LINE = 128
INK, PAPER, RIGHT, TWIN, OTHER = "#1b1f24", "#ffffff", "#2da44e", "#d4741a", "#d0d7de"


def draw() -> Image.Image:
    """Draw the query's caption above its best images, each with rank and score."""
    retrieval = read_retrieval(MASKED / "query.json", answers=MASKED / "answers.json")
    fused = load_scores(SCORES)
    query = next(q for q in retrieval.queries if q.query_id == fused.query_ids[ROW])
    assert retrieval.relevant is not None
    right = retrieval.relevant[query.query_id]
    columns = top_k(fused.scores[ROW : ROW + 1], IMAGES)[0].tolist()

    text = ImageFont.load_default(size=18)
    small = ImageFont.load_default(size=16)
    lines = textwrap.wrap(f"“{query.caption}”", LETTERS_PER_LINE)
    top = MARGIN + 26 * len(lines) + GAP
    size = (2 * MARGIN + IMAGES * SIDE + (IMAGES - 1) * GAP, top + SIDE + 2 * FRAME + 32 + MARGIN)
    page = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        pen.text((MARGIN, MARGIN + 26 * number), line, INK, text)
    for place, column in enumerate(columns):
        name = fused.gallery_ids[column]
        left = MARGIN + place * (SIDE + GAP)
        twin = name == retrieval.twins.get(query.query_id)
        colour = RIGHT if name in right else TWIN if twin else OTHER
        picture = load_image(MASKED / f"gallery/{name}.jpg").resize((SIDE, SIDE))
        pen.rectangle((left - FRAME, top, left + SIDE + FRAME, top + SIDE + 2 * FRAME), colour)
        page.paste(picture, (left, top + FRAME))
        label = f"{place + 1}.  {float(fused.scores[ROW, column]):.3f}"
        pen.text((left, top + SIDE + 2 * FRAME + 8), label, INK, small)
    return page


if __name__ == "__main__":
    draw().save(OUT, optimize=True)
    print(f"{OUT.relative_to(ROOT)}: {OUT.stat().st_size} bytes")
