"""Measure UIT's gain over LHP on the mini data: `python benchmarks/uit_fused.py --out FILE`.

For each seed, trains the mini UIT, and re-ranks the candidates of the shipped LHP on the validation
split and the test set. Also scores the test set by image-text contrast (ITC) alone. Chooses the
fusion's weight on the validation split (`ensemble.search`), and fuses the test set's scores.
"""

from __future__ import annotations

from pathlib import Path

import mini_runs as mini
import yaml
from machine import flag_parser


def main() -> None:
    args = flag_parser(
        __doc__, out=mini.PAGE, work=Path("output/uit_fused"), seeds=[16, 17, 18]
    ).parse_args()
    folder = mini.keyed_folder(args.work, mini.UIT_RECIPE.read_text())
    lhp_test = mini.score_lhp(mini.TEST, folder)
    lhp = mini.judged(lhp_test)
    rows = [mini.table_row("LHP", lhp, None)]
    for seed in args.seeds:
        out = folder / f"s{seed}"
        checkpoint = mini.train_uit(out, "--seed", str(seed))
        validation = mini.LabelledSet("val", out / "val_pairs.json")
        lhp_val = mini.score_lhp(validation, folder)
        chosen_on = {"lhp": lhp_val, "uit": mini.score_uit(checkpoint, validation, out, lhp_val)}
        weights = mini.choose_weights(validation, chosen_on, out)
        weight = yaml.safe_load(weights.read_text())["beit3_weight"]
        itc = mini.score_itc(checkpoint, mini.TEST, out)
        pair = {"lhp": lhp_test, "uit": mini.score_uit(checkpoint, mini.TEST, out, lhp_test)}
        for name, path in (
            ("UIT's ITC", itc),
            ("UIT over LHP's candidates", pair["uit"]),
            (f"LHP and UIT fused at {weight:g}", mini.fused(weights, pair, out / "fused.pt")),
        ):
            rows.append(mini.table_row(f"{name}, seed {seed}", mini.judged(path), lhp))
    seeds = " ".join(map(str, args.seeds))
    text = [
        f"Written by `python benchmarks/uit_fused.py --seeds {seeds} --out {args.out}`.",
        "UIT is trained with `configs/uit/mini.yaml` and each of these seeds (16 is that of the",
        "shipped UIT). It re-ranks the 32 best candidates of the shipped LHP. Each weight is LHP's",
        "share of the sum, chosen on the 501 validation pairs. Values are percentages on the",
        "2,000 queries of the mini test set, with 95 % bootstrap intervals; those of gains over",
        "LHP are paired. Over twin is the share of the queries with a twin whose right image ranks",
        "above the twin.",
    ]
    columns = ["scores", *mini.METRICS, "R@1 over LHP"]
    mini.write_table(args.out, "UIT fused with LHP on the mini data", text, columns, rows)


if __name__ == "__main__":
    main()
