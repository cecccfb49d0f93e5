"""`./launch.sh audit --config runs/NAME/config.yaml`: audits again what a run exported.

With `--checkpoint DIR` it audits a checkpoint instead.
"""

import sys

from ..config.cli import load_config, take_options
from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from ..export.audit import AuditError, audit_run
from ..export.from_checkpoint import audit_checkpoint
from ..monitor.quiet import quiet_libraries


def main(argv: list[str] | None = None) -> None:
    args = list(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    try:
        checkpoint = take_options(args, {"--checkpoint": None})["--checkpoint"]
        if checkpoint and args:
            raise ConfigError(
                f"{args[0]}: not with --checkpoint, whose run says all that is needed; leave it out"
            )
        print(audit_checkpoint(checkpoint) if checkpoint else audit_run(load_config(args)))
    except ConfigError as error:
        exit_with_config_error(error)
    except AuditError as error:
        sys.exit(f"error: the audit failed: {error}")


if __name__ == "__main__":
    main()
