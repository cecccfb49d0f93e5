"""`./launch.sh audit --config runs/NAME/config.yaml`: audits again what a run exported."""

import sys

from ..config.cli import load_config
from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from ..export.audit import AuditError, audit_run
from ..monitor.quiet import quiet_libraries


def main(argv: list[str] | None = None) -> None:
    args = sys.argv[1:] if argv is None else argv
    quiet_libraries()
    try:
        print(audit_run(load_config(args)))
    except ConfigError as error:
        exit_with_config_error(error)
    except AuditError as error:
        sys.exit(f"error: the audit failed: {error}")


if __name__ == "__main__":
    main()
