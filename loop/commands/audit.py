"""Whether what a run hands out is what was trained: the files against the gathered weights, and the loss in a process that only knows PEFT.

Under ZeRO-3 an adapter is easily saved empty (trl#4416, DeepSpeed#7900), and nobody sees it: PEFT loads what is there and only warns.
`./launch.sh audit --config runs/NAME/config.yaml` looks again, whenever one likes.
"""

import sys

from ..config.cli import load_config
from ..config.schema import ConfigError
from ..distributed.exit import exit_with_config_error
from ..export.audit import AuditError, audit_run
from ..monitor.quiet import quiet_libraries


def main(argv: list[str] | None = None) -> None:
    """`audit --config runs/NAME/config.yaml`"""

    quiet_libraries()
    try:
        print(audit_run(load_config(sys.argv[1:] if argv is None else argv)))
    except ConfigError as error:
        exit_with_config_error(error)
    except AuditError as error:
        sys.exit(f"error: the audit failed: {error}")


if __name__ == "__main__":
    main()
