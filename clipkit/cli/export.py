"""`clipkit export`: write a model's image tower as other libraries load it."""

import argparse
from pathlib import Path

from clipkit.cli import Command
from clipkit.cli.output import print_json, print_table

TARGETS = ("timm", "torchvision", "detection")  # as in clipkit.export, which imports torch


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="model or run folder, of an encoder or of an image-text model"
    )
    parser.add_argument(
        "--to", required=True, choices=TARGETS, help="who loads it: timm, torchvision or its detectors"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        metavar="PATH",
        help="a new folder (weights, config.json, card), or a file NAME.safetensors",
    )
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def _run(args: argparse.Namespace) -> None:
    from clipkit.export import export_backbone
    from clipkit.files import model_folder, read_manifest
    from clipkit.models import load_encoder

    encoder = load_encoder(args.model)
    source = {"model": args.model}
    if Path(args.model).is_dir():
        source |= read_manifest(model_folder(args.model), "model", verify=False).get("training", {})
        source.pop("shards", None)  # digests, many of them: the model folder has them
    report = export_backbone(encoder, args.to, args.out, source=source)
    if args.json:
        print_json(report)
        return
    print_table([(name, str(value)) for name, value in report.items()], ("exported", ""))


command = Command(
    help="write a model's image tower for timm, torchvision or its detectors",
    examples=(
        "  clipkit export runs/mine/model --to timm --out mine-timm\n"
        "  clipkit export runs/mine/model --to detection --out mine-detection\n"
        "  clipkit export runs/mine/model --to torchvision --out mine.safetensors --json"
    ),
    arguments=_arguments,
    run=_run,
)
