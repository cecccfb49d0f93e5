"""`./launch.sh merge --adapter DIR --out DIR`: an adapter folded into its base."""

import argparse
import resource
import signal
import sys

from safetensors import SafetensorError

from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from ..distributed.world import on_gpu
from ..export.audit import AuditError
from ..export.compare import compare_ways
from ..export.from_checkpoint import adapter_of_checkpoint
from ..export.merge import WAYS, merge
from ..monitor.quiet import quiet_libraries


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.sh merge", description="Fold an adapter into its base."
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", help="a run's adapter/ folder")
    which.add_argument("--checkpoint", help="instead: runs/NAME/checkpoints/step-000200 or best")
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    parser.add_argument("--base", help="the base, where it is not the one the adapter names")
    parser.add_argument(
        "--into",
        choices=WAYS,
        default="16bit",
        help="the base as published, or its dequantised NF4 weights",
    )
    parser.add_argument(
        "--report",
        metavar="CONFIG",
        help="a run's config.yaml: merge both ways, to OUT/16bit and OUT/nf4, and measure on its "
        "data",
    )
    parser.add_argument(
        "--split", choices=["valid", "test"], default="valid", help="of that data (default: valid)"
    )
    parser.add_argument(
        "--notes", type=int, default=16, help="how many notes to write and compare (default: 16)"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> str:
    """Merges as asked; returns what to print."""
    if args.checkpoint:
        with adapter_of_checkpoint(args.checkpoint) as adapter:
            return merge_adapter(adapter, args)
    return merge_adapter(args.adapter, args)


def merge_adapter(adapter: str, args: argparse.Namespace) -> str:
    """Merges an adapter's folder as asked; returns what to print."""
    device = "cuda:0" if on_gpu() else "cpu"
    if args.report:
        return compare_ways(
            adapter, args.out, args.base, args.report, args.split, args.notes, device
        )
    folder = merge(adapter, args.out, args.base, args.into, device)
    return f"merged into {args.into}: {folder}"


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        done = run(args)
    except (ConfigError, AuditError) as error:
        exit_with_config_error(error)
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: --out {args.out}: {error}; nothing is left there")
    except KeyboardInterrupt:
        sys.exit(f"stopped; nothing is left at {args.out}")
    print(done)
    peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"peak memory of this process {peak_gib:.2f} GiB")


if __name__ == "__main__":
    main()
