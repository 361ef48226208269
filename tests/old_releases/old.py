"""Runs under an old release of transformers and PEFT: makes adapters as they were made then, and reads ours.

    OLD/bin/python tests/old_releases/old.py base DIRECTORY
    OLD/bin/python tests/old_releases/old.py adapter BASE DIRECTORY TARGET… [--num_labels N] [--option NAME=JSON …]
    OLD/bin/python tests/old_releases/old.py logits MODEL [--adapter DIRECTORY --num_labels N]
    OLD/bin/python tests/old_releases/old.py pipeline MODEL IMAGE

`adapter` is the recipe of the PEFT guide on image classification, with random weights instead of training, and writes
the logits that it gives into `expected.json`; `logits` and `pipeline` print JSON. Images have 16 pixels a side, or
those of `--size`. The fixtures beside this file come from it: README.md there says how.
"""

import argparse
import json
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, pipeline


def pixels(size):
    """Two images [2, 3, size, size] that every release of torch makes the same."""
    return torch.linspace(0, 60, 2 * 3 * size * size, dtype=torch.float64).sin().float().view(2, 3, size, size)


def logits(model, size):
    with torch.no_grad():
        return model.eval()(pixel_values=pixels(size)).logits.tolist()


def versions():
    return {"transformers": transformers.__version__, "peft": peft.__version__, "torch": torch.__version__}


def make_base(args):
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8
    )
    # Large weights, so that logits depend on what the attention does.
    config.initializer_range = 0.3
    ViTForImageClassification(config).save_pretrained(args.directory)


def make_adapter(args):
    model = AutoModelForImageClassification.from_pretrained(
        args.base, num_labels=args.num_labels, ignore_mismatched_sizes=True
    )
    options = {name: json.loads(value) for name, value in (option.split("=", 1) for option in args.option)}
    kinds = {name: options.pop(name) for name in ("safe_serialization",) if name in options}
    targets = args.targets[0] if options.pop("regex", False) else args.targets
    config = LoraConfig(
        **{
            "r": 2,
            "lora_alpha": 4,
            "target_modules": targets,
            "lora_dropout": 0.1,
            "bias": "none",
            "modules_to_save": ["classifier"],
        }
        | options
    )
    model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(args.directory, **kinds)
    expected = {"logits": logits(model, args.size), "versions": versions()}
    with model.disable_adapter():
        expected["logits_without"] = logits(model, args.size)
    (Path(args.directory) / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def print_logits(args):
    kwargs = {"num_labels": args.num_labels, "ignore_mismatched_sizes": True} if args.adapter else {}
    model, info = AutoModelForImageClassification.from_pretrained(args.model, output_loading_info=True, **kwargs)
    if args.adapter:
        model = PeftModel.from_pretrained(model, args.adapter)
    found = {"logits": logits(model, args.size), "versions": versions()}
    print(json.dumps(found | {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}))


def run_pipeline(args):
    print(json.dumps(pipeline("image-classification", model=args.model)(args.image)))


def main():
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("base")
    command.add_argument("directory")
    command.set_defaults(run=make_base)
    command = commands.add_parser("adapter")
    command.add_argument("base")
    command.add_argument("directory")
    command.add_argument("targets", nargs="+")
    command.add_argument("--num_labels", type=int, default=3)
    command.add_argument("--option", nargs="*", default=[])
    command.set_defaults(run=make_adapter)
    command = commands.add_parser("logits")
    command.add_argument("model")
    command.add_argument("--adapter")
    command.add_argument("--num_labels", type=int, default=3)
    command.set_defaults(run=print_logits)
    command = commands.add_parser("pipeline")
    command.add_argument("model")
    command.add_argument("image")
    command.set_defaults(run=run_pipeline)
    for command in commands.choices.values():
        command.add_argument("--size", type=int, default=16)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
