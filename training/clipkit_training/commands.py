"""The commands `clipkit train`, `clipkit evaluate` and `clipkit demo`."""

import argparse
import os
import time
from pathlib import Path
from typing import Any

from clipkit.cli import Command
from clipkit.cli.output import print_json, print_table, progress
from clipkit.errors import ConfigError


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file or the name of a recipe that ships")
    parser.add_argument(
        "--run", "--run-dir", type=Path, metavar="DIR", help="run folder (default: runs/RECIPE-TIME)"
    )
    parser.add_argument("--resume", action="store_true", help="continue the run in --run")
    parser.add_argument("--model", type=Path, metavar="DIR", help="model folder (default: RUN/model)")
    parser.add_argument("--options", action="store_true", help="list every field of the recipe and stop")
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _train(args: argparse.Namespace) -> int | None:
    from clipkit_training.recipe import load_recipe
    from clipkit_training.run import CONFIG, train_recipe
    from clipkit_training.world import world_from_environment

    if args.options:
        load_recipe(args.recipe, ["--help"])
    if args.resume and args.run is None:
        raise ConfigError("--resume continues a run folder", hint="name it: --run DIR")
    recipe = load_recipe(args.recipe, args.rest)
    with world_from_environment(recipe.device) as world:
        now = time.localtime(world.agree(int(time.time())))
        run = args.run or Path("runs") / f"{Path(args.recipe).stem}-{time.strftime('%Y%m%d-%H%M%S', now)}"
        # torchrun starts all ranks again with the same words when one has failed (--max-restarts)
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0 and (run / CONFIG).is_file()
        resume = args.resume or world.gather(again)[0]
        result = train_recipe(recipe, run, world, resume=resume, model_folder=args.model)
        if world.main:
            if args.json:
                print_json({"run": str(run), **result})
            else:
                print_table([[key, _short(value)] for key, value in result.items()], ["trained", ""])
    return None


train = Command(
    help="train a model from a recipe",
    examples="""  clipkit train clip-emoji --max-minutes 3
  clipkit train clip-emoji --data.train my/shards --data.heldout my/heldout --run runs/mine
  clipkit train runs/mine/config.yaml --run runs/mine --resume
  torchrun --nproc-per-node 2 -m clipkit_training clip-emoji --run-dir runs/two

(torchrun takes --run for an option of its own: say --run-dir there.)

Any field of the recipe can be set, such as --optim.lr 3e-4 or --data.batch-size 512:
  clipkit train clip-emoji --options""",
    arguments=_train_arguments,
    run=_train,
    passthrough=True,
)


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="RUN_OR_MODEL", help="a run or model folder, open_clip:NAME/TAG or hf:NAME"
    )
    parser.add_argument(
        "--data",
        default=[],
        action="append",
        metavar="PATH",
        help="held-out shards, or files of sentences (default: the run's)",
    )
    parser.add_argument(
        "--gallery", default=[], action="append", metavar="PATH", help="shards that widen the gallery"
    )
    parser.add_argument(
        "--zero-shot", metavar="FIELD", help="metadata field to measure zero-shot accuracy on"
    )
    parser.add_argument(
        "--train-data",
        default=[],
        action="append",
        metavar="PATH",
        help="encoders: shards that neighbours and probes learn from (default: the run's)",
    )
    parser.add_argument(
        "--label", metavar="FIELD", help="encoders: metadata field that names the class (default: the run's)"
    )
    parser.add_argument(
        "--k",
        type=int,
        nargs="+",
        default=[],
        metavar="K",
        help="encoders: numbers of neighbours (default: 200, or 20 where classes are smaller)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.07,
        metavar="T",
        help="encoders: neighbours vote with exp(cosine / T) (default: 0.07)",
    )
    parser.add_argument(
        "--probe",
        choices=["logistic", "sgd"],
        default="logistic",
        help="encoders: what finds the linear figures: logistic regression, or SGD with MoCo's numbers, "
        "100 epochs at rate 30 (default: logistic)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        default=[],
        metavar="SEED",
        help="encoders: seeds of the folds of graphs' SVM and of --finetune; of several, mean and standard "
        "deviation are given (default: the run's seed)",
    )
    parser.add_argument(
        "--sts",
        action="append",
        default=[],
        metavar="FILE",
        help="sentence encoders: a .tsv, .csv or .jsonl with sentence1, sentence2, score",
    )
    parser.add_argument(
        "--wording",
        metavar="FIELD",
        help="sentence encoders: metadata field with another wording to look for, such as a translation "
        "(default: the run's first data.more_captions)",
    )
    parser.add_argument(
        "--finetune",
        type=int,
        nargs="+",
        choices=range(1, 101),
        default=[],
        metavar="PERCENT",
        help="encoders: also fine-tune on so many per cent of the labels",
    )
    parser.add_argument(
        "--untrained",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="also judge the model with random weights (models trained here only)",
    )
    parser.add_argument(
        "--device", default="auto", help="for example cpu or cuda (default: a GPU if there is one)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as one line of JSON")


def _evaluate(args: argparse.Namespace) -> int | None:
    from clipkit_training.evaluate import evaluate_model
    from clipkit_training.judge.encoders import encoder_table, find_run, is_encoder, judge_encoder
    from clipkit_training.recipe import load_recipe
    from clipkit_training.run import CONFIG

    if args.label or is_encoder(args.model):
        with progress("evaluating") as bar:
            result = judge_encoder(
                args.model,
                data=args.data,
                train_data=args.train_data,
                label=args.label,
                shares=args.finetune,
                ks=args.k,
                temperature=args.temperature,
                probe=args.probe,
                seeds=args.seeds,
                pairs=args.sts,
                wording=args.wording,
                baselines=args.untrained,
                device=args.device,
                advance=bar.advance,
            )
        if args.json:
            print_json(result)
        else:
            print_table(*encoder_table(result))
        return None
    model, run = find_run(args.model)
    heldout = load_recipe(str(run / CONFIG)).data.heldout if run and not args.data else None
    data = args.data or ([heldout] if heldout else [])
    if not data:
        raise ConfigError(f"{args.model}: give --data, the shards to query with")
    with progress("evaluating") as bar:
        result = evaluate_model(
            model,
            data,
            gallery=args.gallery,
            untrained=args.untrained,
            zero_shot_field=args.zero_shot,
            device=args.device,
            advance=bar.advance,
        )
    if args.json:
        print_json(result)
    else:
        print_figures(result)
    return None


evaluate = Command(
    help="measure what a model is worth: retrieval and zero-shot accuracy, or neighbours and probes",
    examples="""  clipkit evaluate runs/simclr
  clipkit evaluate runs/simclr --label script --finetune 1 10 --json
  clipkit evaluate runs/graphcl --seeds 0 1 2 3 4
  clipkit evaluate demo/model --data sample:emoji/heldout --gallery sample:emoji/train
  clipkit evaluate open_clip:ViT-B-32/laion2b_s34b_b79k --data my/shards --json""",
    arguments=_evaluate_arguments,
    run=_evaluate,
)


def print_figures(result: dict[str, Any]) -> None:
    """The figures of `evaluate_model` as a table."""
    sets = {name: result[name] for name in ("heldout", "seen") if name in result}
    sets |= {f"{name}, untrained": figures for name, figures in result.get("untrained", {}).items()}
    rows = [
        [
            name,
            direction.replace("_", " "),
            *(figures[direction][f"recall@{k}"] for k in (1, 5, 10)),
            figures["queries"],
            figures["gallery"],
        ]
        for name, figures in sets.items()
        for direction in ("text_to_image", "image_to_text")
    ]
    print_table(rows, ["pairs", "direction", "recall@1", "recall@5", "recall@10", "queries", "gallery"])


def _demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), metavar="DIR", help="folder for all artifacts (demo)"
    )
    parser.add_argument("--minutes", type=float, default=3.0, metavar="M", help="training budget (3)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of weights, order and pictures (0)")
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to serve on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="port to serve on (8000)")
    parser.add_argument(
        "--serve", action=argparse.BooleanOptionalAction, default=True, help="serve at the end"
    )
    parser.add_argument("--json", action="store_true", help="print the result as one line of JSON")


def _demo(args: argparse.Namespace) -> int | None:
    from clipkit_training.demo import run_demo, serve_command

    result = run_demo(
        args.out, minutes=args.minutes, seed=args.seed, address=(args.host, args.port) if args.serve else None
    )
    if args.json:
        print_json(result)
    else:
        print_figures(result)
    if args.serve:
        command = serve_command(args.out, args.host, args.port)
        os.execv(command[0], command)
    return None


demo = Command(
    help="the whole path on the sample shards: train, evaluate, embed, index, serve",
    examples="""  clipkit demo
  clipkit demo --out demo --minutes 1 --no-serve --json""",
    arguments=_demo_arguments,
    run=_demo,
)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items()) or "none"
    return str(value)
