"""Measure each member on the mini data: `python benchmarks/members.py --out docs/members.md`.

Scores the validation pairs and the mini test set with the four shipped models in the published
order. Chooses the fusion's weights on the validation pairs (`ensemble.search`), and fuses the test
set's scores with these weights, adding one member at a time.

`--embedder` and `--reranker` are folders of vision-language models that were trained with
`configs/vlm/mini_embedder.yaml` and `mini_reranker.yaml`. The embedder is measured alone. The
reranker re-ranks the fused list; depth, prior, tau and slack are chosen on the validation pairs.
"""

from __future__ import annotations

from pathlib import Path

import mini_runs as mini
import vlm_chain
import yaml
from machine import flag_parser

from ensemble.search import WEIGHT_FLAGS

NAMES = {"lhp": "LHP", "uit": "UIT", "blip2": "BLIP-2", "clip": "CLIP"}


def main() -> None:
    args = flag_parser(
        __doc__,
        out=mini.PAGE,
        work=Path("output/members"),
        weights=(None, "also write the chosen weights to this file (.yaml)"),
        embedder=(None, "folder of a small late-interaction embedder"),
        reranker=(None, "folder of a small reranker"),
    ).parse_args()
    folder = mini.shipped_folder(args.work)
    validation = mini.validation_set(folder)
    on_validation = mini.score_shipped(validation, folder)
    weights = mini.choose_weights(validation, on_validation, folder, args.weights)
    chosen = yaml.safe_load(weights.read_text())

    members = mini.score_shipped(mini.TEST, folder)
    alone = {name: mini.judged(path) for name, path in members.items()}
    rows = [mini.table_row(f"{NAMES[name]} alone", found, None) for name, found in alone.items()]
    order, before = list(members), alone["lhp"]
    for count in range(2, len(order) + 1):
        some = {name: members[name] for name in order[:count]}
        found = mini.judged(mini.fused(weights, some, folder / f"fused_{count}.pt"))
        keep = chosen[WEIGHT_FLAGS[order[count - 1]]]
        rows.append(mini.table_row(f"+ {NAMES[order[count - 1]]}, weight {keep:g}", found, before))
        before = found
    own = folder / "vlm"
    if args.embedder:
        found = mini.judged(vlm_chain.score_late(args.embedder, mini.TEST, own))
        rows.append(mini.table_row("Qwen3-VL, late interaction, alone", found, None))
    if args.reranker:
        lists = {
            validation: mini.fused(weights, on_validation, own / "fused_val.pt"),
            mini.TEST: folder / f"fused_{len(order)}.pt",
        }
        pairs = {
            labelled: vlm_chain.score_reranker(args.reranker, labelled, own, candidates)
            for labelled, candidates in lists.items()
        }
        chain = vlm_chain.choose_chain(validation, on_validation, pairs[validation], own)
        for name, found in vlm_chain.stages(chain, members, pairs[mini.TEST], own):
            rows.append(mini.table_row(name, found, before))
            before = found
    text = [
        f"Written by `python benchmarks/members.py --out {args.out}`. The four shipped mini models",
        "are evaluated alone, then fused one after the other in the published order. UIT re-ranks",
        "LHP's 32 candidates. Each weight is the weight kept by the running sum, chosen on the 501",
        "validation pairs. Values are percentages on the 2,000 queries of the mini test set, with",
        "95 % bootstrap intervals; those of gains over the previous step are paired. Over twin is",
        "the share of the queries with a twin whose right image ranks above the twin.",
    ]
    if args.embedder or args.reranker:
        text += [
            "",
            "The Qwen3-VL models have 3 million parameters, are trained from random weights",
            "([recipes](vlm.md#small-models-on-the-mini-data)), and are not shipped. The reranker",
            f"scores the first {vlm_chain.K} images of the fused list; its settings are chosen on",
            "the validation pairs.",
        ]
    columns = ["scores", *mini.METRICS, "R@1 over the previous step"]
    mini.write_table(args.out, "Members and fusion steps on the mini data", text, columns, rows)


if __name__ == "__main__":
    main()
