"""Search one's own photographs: `python -m pab.search --model lhp --image_folder DIR --query TEXT`.

Runs the model's own scoring command on the words of ``--query`` and prints the best images; flags
that this command does not know (`--checkpoint`, `--pretrained`, `--dtype`, ...) go to that command.
``--html FILE`` also writes the report's page with thumbnails.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from pab.config import CommandParser
from pab.errors import EXIT_BAD_INPUT, InputError, run_cli
from pab.files import write_text

ROOT = Path(__file__).resolve().parents[1]
# A model's scoring command. Models lie above pab and are not imported here.
COMMANDS = {
    "lhp": ("-m", "lhp.infer"),
    "clip": (str(ROOT / "scripts/clip_infer.py"),),
    "blip2": (str(ROOT / "scripts/blip2_infer.py"),),
}
REPORT = ("-m", "ensemble.report")


def run(command: tuple[str, ...], *flags: str) -> None:
    """Run a command of this project; its own words on stderr are the user's.

    Raises:
        SystemExit: it ended with an error, which it has said.
    """
    done = subprocess.run([sys.executable, *command, *flags], stdout=subprocess.PIPE, check=False)
    if done.returncode:
        sys.exit(EXIT_BAD_INPUT if done.returncode == EXIT_BAD_INPUT else 1)


def search(
    model: str, folder: Path, queries: list[str], top_k: int, html: Path | None, more: list[str]
) -> list[list[tuple[str, float]]]:
    """The best images for each query.

    Args:
        model: a key of :data:`COMMANDS`.
        folder: of the images.
        queries: descriptions.
        top_k: images a query.
        html: page to write, or None.
        more: further flags of the scoring command.

    Returns:
        For each query, (image name, score) of its ``top_k`` images, best first.
    """
    from pab.ranking import top_k as best_columns
    from pab.scores import load_scores

    with tempfile.TemporaryDirectory(prefix="pab-search-") as name:
        work = Path(name)
        annotation, scores = work / "query.json", work / "scores.pt"
        lines = [
            json.dumps({"query_index": f"{number:06}", "caption": text}, ensure_ascii=False)
            for number, text in enumerate(queries, start=1)
        ]
        write_text(annotation, "\n".join(lines) + "\n")
        data = ("--annotation", str(annotation), "--image_folder", str(folder))
        outputs = ("--save_score", str(scores), "--output_file", str(work / "list.txt"))
        run(COMMANDS[model], *data, *outputs, *more)
        found = load_scores(scores)
        if html is not None:
            run(REPORT, "--score", f"{model}={scores}", *data, "--out", str(html))
        columns = best_columns(found.scores, min(top_k, len(found.gallery_ids)))
        values = found.scores.gather(1, columns)
        return [
            [(found.gallery_ids[c], v) for c, v in zip(row, scores_of_row, strict=True)]
            for row, scores_of_row in zip(columns.tolist(), values.tolist(), strict=True)
        ]


def main(argv: list[str] | None = None) -> None:
    """Read the command line, search, print."""
    parser = CommandParser(prog="python -m pab.search", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", choices=COMMANDS, required=True, help="whose scoring command")
    parser.add_argument("--image_folder", type=Path, required=True, help="folder of images")
    parser.add_argument(
        "--query", action="append", required=True, help="what to look for; may be repeated"
    )
    parser.add_argument("--top_k", type=int, default=10, help="images a query (default: 10)")
    parser.add_argument("--html", type=Path, help="also write a page with thumbnails")
    args, more = parser.parse_known_args(argv)
    if args.top_k < 1:
        raise InputError("--top_k", f"must be at least 1, found {args.top_k}")
    found = search(args.model, args.image_folder, args.query, args.top_k, args.html, more)
    for text, images in zip(args.query, found, strict=True):
        print(text)
        for rank, (name, score) in enumerate(images, start=1):
            print(f"{rank:4}  {score:8.4f}  {name}")
    if args.html:
        print(f"page: {args.html}", file=sys.stderr)


if __name__ == "__main__":
    run_cli(main)
