"""One thin `main` for each command of ./launch.sh. Only another command imports a command.

Libraries announce themselves in a dozen warnings while they are imported, and the lines that matter
would drown in them. So importing a command silences them; importing the rest of loop/ does not.
Errors still come through, and what this project has to say it prints.
"""

import logging

logging.disable(logging.WARNING)
