"""The adapter folded into its base: an ordinary model folder, `./launch.sh merge --adapter DIR --out DIR`."""

import argparse
from pathlib import Path

import torch

from .cli import exit_with_config_error
from .config import ConfigError
from .model import attach_adapter, load_base, load_tokenizer, read_adapter


@torch.no_grad()
def merge(adapter: str, out: str, base: str | None = None, into: str = "16bit") -> Path:
    """Writes W + B A scale into every adapted matrix and saves the whole model with its tokenizer to `out`, in bf16.

    into="16bit" merges into the base as published; into="nf4" into the dequantised 4-bit base, the one that the adapter was
    trained against (peft#2105): the first is another model by the quantisation error, the second by one rounding to bf16.
    Raises ConfigError for folders that are not what they should be."""
    trained = read_adapter(adapter)
    if Path(out).is_file() or (Path(out).is_dir() and any(Path(out).iterdir())):
        raise ConfigError(f"--out {out}: is there already and is not an empty folder")
    base, revision = base or trained["base"], trained["revision"]
    model = load_base(base, torch.bfloat16, "cpu", revision=revision, quantized=into == "nf4", double_quant=trained["double_quant"])
    if into == "nf4":
        model = model.dequantize(dtype=torch.bfloat16)
    merged = attach_adapter(model, adapter).merge_and_unload(safe_merge=True)
    merged.save_pretrained(out)
    load_tokenizer(base, revision).save_pretrained(out)
    return Path(out)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="launch.sh merge", description="Fold an adapter into its base.")
    parser.add_argument("--adapter", required=True, help="a run's adapter/ folder")
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    parser.add_argument("--base", help="the base, where it is not the one the adapter names")
    parser.add_argument("--into", choices=["16bit", "nf4"], default="16bit", help="the base as published, or its dequantised NF4 weights")
    args = parser.parse_args(argv)
    from .monitor import quiet_libraries

    quiet_libraries()
    try:
        print(f"merged into {args.into}: {merge(args.adapter, args.out, args.base, args.into)}")
    except ConfigError as error:
        exit_with_config_error(error)


if __name__ == "__main__":
    main()
