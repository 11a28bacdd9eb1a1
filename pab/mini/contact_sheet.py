"""``python -m pab.mini.contact_sheet``: draw a page of captioned pictures, twins side by side.

Use the page to check by eye that a person can answer the queries.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from pab.core.config import CommandParser
from pab.core.errors import InputError, run_cli
from pab.core.files import atomic_path, existing_file

COLUMN, MARGIN, TEXT_HEIGHT, FONT_SIZE = 300, 10, 118, 12  # pixels
CHARACTERS_A_LINE = 47


def main(argv: list[str] | None = None) -> None:
    """Draw the page for a part of the mini data."""
    parser = CommandParser(
        prog="python -m pab.mini.contact_sheet",
        description="Pictures of the mini data with their captions, twins side by side.",
        allow_abbrev=False,
    )
    parser.add_argument("--data", type=Path, default=Path("data/mini"))
    parser.add_argument("--split", choices=("test", "train", "ucc"), default="test")
    parser.add_argument("--count", type=int, default=24, help="pictures on the page")
    parser.add_argument("--start", type=int, default=0, help="first line of the annotation")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("output/contact.png"))
    args = parser.parse_args(argv)
    if args.count < 1 or args.columns < 1 or args.start < 0:
        raise InputError("--count, --columns, --start", "expected positive numbers")

    name = {"test": "test/attr.json", "train": "train_attr/attr_0.json", "ucc": "test/ucc.json"}
    path = existing_file(
        args.data / "annotation" / name[args.split], "annotations of the mini data"
    )
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    chosen = _with_twins(lines, args.start, args.count)
    with atomic_path(args.out) as temporary:
        _page(args.data, chosen, args.columns).save(temporary, "PNG")
    print(f"{len(chosen)} pictures on {args.out}")


def _with_twins(lines: list[dict[str, Any]], start: int, count: int) -> list[dict[str, Any]]:
    """Return about ``count`` lines from ``start`` on, each followed by its twin."""
    by_id = {line["image_id"]: line for line in lines}
    chosen: dict[str, dict[str, Any]] = {}
    for line in lines[start:]:
        if len(chosen) >= count:
            break
        chosen.setdefault(line["image_id"], line)
        twin = line.get("hard_i_id")
        if twin is not None:
            chosen.setdefault(twin, by_id[twin])
    return list(chosen.values())


def _page(root: Path, lines: list[dict[str, Any]], columns: int) -> Any:
    from PIL import Image, ImageDraw, ImageFont  # after parsing, so that --help is quick

    font = ImageFont.load_default(FONT_SIZE)
    rows = -(-len(lines) // columns)
    cell_height = COLUMN + TEXT_HEIGHT
    page = Image.new("RGB", (columns * (COLUMN + MARGIN), rows * (cell_height + MARGIN)), "white")
    draw = ImageDraw.Draw(page)
    for number, line in enumerate(lines):
        row, column = divmod(number, columns)
        x, y = column * (COLUMN + MARGIN), row * (cell_height + MARGIN)
        with Image.open(root / line["image"]) as picture:
            page.paste(picture.convert("RGB").resize((COLUMN, COLUMN)), (x, y))
        caption = line["caption"] if isinstance(line["caption"], str) else line["caption"][0]
        label = f"{line['image_id']}  {line.get('normal') or line.get('anomaly') or ''}"
        text = "\n".join([label, *textwrap.wrap(caption, CHARACTERS_A_LINE)])
        draw.multiline_text((x + 2, y + COLUMN + 2), text, fill="black", font=font, spacing=2)
    return page


if __name__ == "__main__":
    run_cli(main)
