"""`./launch.sh export --checkpoint DIR --out DIR`: a checkpoint as an adapter, or a model."""

import argparse
import signal
import sys

from safetensors import SafetensorError

from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from ..export.audit import AuditError
from ..export.from_checkpoint import export_checkpoint
from ..monitor.quiet import quiet_libraries


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.sh export", description="Write what a run would have exported at a checkpoint."
    )
    parser.add_argument(
        "--checkpoint", required=True, help="runs/NAME/checkpoints/step-000200, best or newest"
    )
    parser.add_argument("--out", required=True, help="the folder to write, new or empty")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        folder, step = export_checkpoint(args.checkpoint, args.out)
    except ConfigError as error:
        exit_with_config_error(error)
    except AuditError as error:
        sys.exit(f"error: the audit failed: {error}; nothing is left at {args.out}")
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: --out {args.out}: {error}; nothing is left there")
    except KeyboardInterrupt:
        sys.exit(f"stopped; nothing is left at {args.out}")
    print(f"exported the weights of step {step}: {folder}")


if __name__ == "__main__":
    main()
