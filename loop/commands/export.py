"""`./launch.sh export`: a checkpoint as an adapter, a model as GGUF, a folder to the hub."""

import argparse
import signal
import sys
from pathlib import Path

from safetensors import SafetensorError

from ..config.schema import ConfigError
from ..distributed.exit import OutputLost, exit_with_config_error
from ..export.audit import AuditError
from ..export.from_checkpoint import export_checkpoint
from ..export.hub import files_to_push, push_to_hub
from ..gguf.writer import KINDS, export_gguf
from ..monitor.quiet import quiet_libraries


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch.sh export",
        description="Write what a run would have exported at a checkpoint; write a model as GGUF; "
        "push a folder to the hub.",
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", help="runs/NAME/checkpoints/step-000200, best or newest")
    which.add_argument("--model", help="instead: an adapter's folder, or a merged or full model's")
    parser.add_argument("--out", help="the folder to write, new or empty")
    parser.add_argument("--gguf", choices=KINDS, help="write the model as a GGUF file")
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload the folder to the hub")
    parser.add_argument("--public", action="store_true", help="for everybody to read")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    return parser.parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Raises ConfigError for options that do not go together."""
    writes = bool(args.checkpoint or args.gguf)
    if args.checkpoint and args.gguf:
        raise ConfigError(
            "--gguf: takes a whole model: merge the checkpoint, and name it by --model"
        )
    if writes and not args.out:
        raise ConfigError("--out: name the folder to write, new or empty")
    if args.out and not writes:
        raise ConfigError("--out: nothing is written: add --gguf, or only --push")
    if not writes and not args.push:
        raise ConfigError(f"--model {args.model}: add --gguf, or --push OWNER/NAME")
    if (args.public or args.dry_run) and not args.push:
        raise ConfigError("--public and --dry-run: are for --push OWNER/NAME")


def run(args: argparse.Namespace) -> None:
    """Does what the options say. Raises ConfigError and AuditError."""
    check_arguments(args)
    folder = Path(args.out or args.model)
    if args.checkpoint:
        folder, step = export_checkpoint(args.checkpoint, args.out)
        print(f"exported the weights of step {step}: {folder}")
    if args.gguf:
        print(f"written and read back: {export_gguf(args.model, args.out, args.gguf)}")
    if args.push:
        push_folder(folder, args)


def push_folder(folder: Path, args: argparse.Namespace) -> None:
    """Uploads the folder, or says what would be uploaded."""
    for upload in files_to_push(folder, args.push):
        print(f"{upload.size:>15,}  {upload.name}")
    whose = "public" if args.public else "private"
    if args.dry_run:
        print(f"dry run: nothing was uploaded to {args.push} ({whose})")
    else:
        print(f"pushed to {push_to_hub(folder, args.push, args.public)} ({whose})")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    quiet_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args)
    except ConfigError as error:
        exit_with_config_error(error)
    except AuditError as error:
        sys.exit(f"error: the audit failed: {error}; nothing is left at {args.out}")
    except OutputLost:
        raise
    except (OSError, SafetensorError) as error:
        sys.exit(f"error: --out {args.out}: {error}; nothing is left there")
    except KeyboardInterrupt:
        sys.exit(f"stopped; nothing is left at {args.out}")


if __name__ == "__main__":
    main()
