"""Few labels on texts, from scratch and from pretrained encoders: a table in Markdown.

    python bench/text.py --corpus FOLDER --data FOLDER --encoder FOLDER --out table.md

Pretrains a small BERT on the corpus, then trains on 100 labels of each class of SST-2, SUBJ and MR
(`sst2/{train,val,test}.csv`, `subj/all.csv`, `mr/all.csv` below --data), over seeds: from scratch,
and from that BERT and another encoder a probe, fine-tuning, and a probe before fine-tuning.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

SETS = {"SST-2": "sst2", "SUBJ": "subj/all.csv", "MR": "mr/all.csv"}
PLANS = {"probe": "linear_probe", "fine-tune": "finetune", "LP-FT": "lp_ft"}
PROBE = ["trainer.max_epochs=30", "optimizer.lr=0.001"]  # as the probe of lp_ft
Job = tuple[str, str, str, list[str]]
"""Name, backbone, plan, overrides."""


def run(job: Job) -> tuple[str, float]:
    import graft

    name, backbone, plan, overrides = job
    done = graft.finetune("text_csv", backbone=backbone, plan=plan, overrides=overrides)
    return name, 100 * done.metrics["test/acc"]


def pretrain(corpus: Path, logs: Path, own: list[str]) -> tuple[dict[str, float], Path]:
    import graft

    overrides = ["experiment=pretrain_bert", f"data.root={corpus}", "logger=csv", *own]
    done = graft.finetune("text_corpus", backbone="bert", overrides=overrides, logs=logs)
    return done.metrics, Path(done.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--encoder", type=Path, required=True, help="a folder of transformers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--logs", type=Path, default=Path("logs/text"))
    parser.add_argument("--run", type=Path, help="a run of pretrain_bert, in place of a new one")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--shots", type=int, default=100)
    parser.add_argument("--pretrain", nargs="*", default=[], help="overrides of pretraining")
    parser.add_argument("overrides", nargs="*", help="of every run: trainer=gpu")
    given = parser.parse_args()
    lines = []
    if given.run is None:
        metrics, given.run = pretrain(given.corpus, given.logs, [*given.overrides, *given.pretrain])
        lines += [f"pretraining: {given.run}", ""]
        lines += [f"- {name} {value:.4f}" for name, value in metrics.items()] + [""]
        given.out.write_text("\n".join(lines))
    encoders = {
        "small BERT": ([f"backbone.weights={given.run}"], "optimizer.lr=0.0003"),
        given.encoder.name: ([f"backbone.model={given.encoder}"], "optimizer.lr=0.0001"),
    }
    jobs: list[Job] = []
    for name, place in SETS.items():
        common = [
            "experiment=text_finetune", f"data.root={given.data / place}", "logger=csv",
            f"data.shots_per_class={given.shots}", "data.batch_size=16",
            f"paths.logs={given.logs}", *given.overrides,
        ]  # fmt: skip
        for seed in range(given.seeds):
            own = [*common, f"seed={seed}"]
            scratch = [*own, f"backbone.tokenizer={given.run}", "optimizer.lr=0.0003"]
            jobs.append(
                (f"{name}|scratch", "bert", "finetune", [*scratch, "trainer.max_epochs=10"])
            )
            for encoder, (chosen, lr) in encoders.items():
                for row, plan in PLANS.items():
                    more = PROBE if row == "probe" else [lr, "trainer.max_epochs=10"]
                    key = f"{name}|{encoder}, {row}"
                    jobs.append((key, "huggingface", plan, [*own, *chosen, *more]))
    scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with multiprocessing.get_context("spawn").Pool(given.jobs) as pool:
        for key, score in pool.imap_unordered(run, jobs):
            name, row = key.split("|")
            scores[row][name].append(score)
    lines += [f"| {given.shots} labels a class | {' | '.join(SETS)} |", "|---" * 4 + "|"]
    for row in sorted(scores, key=lambda row: (row != "scratch", row)):
        lines.append(f"| {row} | {' | '.join(_cell(scores[row][name]) for name in SETS)} |")
    given.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def _cell(values: list[float]) -> str:
    spread = f" ± {stdev(values):.1f}" if len(values) > 1 else ""
    return f"{mean(values):.1f}{spread}"


if __name__ == "__main__":
    main()
