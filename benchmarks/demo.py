"""The demo's figures: recall on held-out combinations after three minutes of training, over several seeds.

    python benchmarks/demo.py [--seeds 3] [--minutes 3] [--precision auto fp32]

Each row is a run of its own process. `steal` is the share of CPU time that the hypervisor took away during
the run; rows above 10 % are marked and left out of the medians.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from statistics import median

from machine import MARK, STEAL_LIMIT, cpu_times, steal_since

HELDOUT, TRAIN = "sample:emoji/heldout", "sample:emoji/train"


def run(seed: int, minutes: float, precision: str) -> dict[str, float | str | int]:
    """One training run and its evaluation."""
    clipkit = [sys.executable, "-m", "clipkit"]
    before = cpu_times()
    with tempfile.TemporaryDirectory() as folder:
        options = ["--seed", str(seed), "--max-minutes", str(minutes), "--precision", precision]
        train = [*clipkit, "train", "clip-emoji", *options, "--run", f"{folder}/run", "--json"]
        evaluate = [*clipkit, "evaluate", f"{folder}/run/model", "--data", HELDOUT, "--gallery", TRAIN]
        outputs = [
            json.loads(
                subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            )
            for command in (train, [*evaluate, "--no-untrained", "--json"])
        ]
    steal = steal_since(before)
    trained, figures = outputs[0], outputs[1]["heldout"]
    return {
        "seed": seed,
        "precision": trained["precision"],
        "seconds": trained["seconds"],
        "pairs/s": trained["pairs_per_second"],
        **{f"t2i@{k}": figures["text_to_image"][f"recall@{k}"] for k in (1, 5, 10)},
        **{f"i2t@{k}": figures["image_to_text"][f"recall@{k}"] for k in (1, 5, 10)},
        "steal": round(steal, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--precision", nargs="+", default=["auto"])
    args = parser.parse_args()
    rows: list[dict[str, float | str | int]] = []
    for seed in range(args.seeds):
        for precision in args.precision:
            rows.append(run(seed, args.minutes, precision))
            if len(rows) == 1:
                print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
            mark = f" {MARK}" if float(rows[-1]["steal"]) > STEAL_LIMIT else ""
            print("| " + " | ".join(str(value) for value in rows[-1].values()) + f"{mark} |", flush=True)
    for precision in dict.fromkeys(row["precision"] for row in rows):
        kept = [row for row in rows if row["precision"] == precision and float(row["steal"]) <= STEAL_LIMIT]
        for name in ("t2i@1", "t2i@10") if kept else ():
            value = median(float(row[name]) for row in kept)
            print(f"median {name}, {precision}: {value:.3f} ({len(kept)} runs)")


if __name__ == "__main__":
    main()
