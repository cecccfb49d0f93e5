"""One thin `main` for each command of ./launch.sh. Nothing imports a command but another command.

Libraries announce themselves in a dozen warnings while they are imported; the lines of a run that matter would drown in them. So importing
a command silences them, and importing the rest of loop/ does not. Errors still come through, and what this project has to say it prints.
"""

import logging

logging.disable(logging.WARNING)
