"""Bases for machines without a model hub: fetched from elsewhere and converted once.

`./launch.sh setup` runs each module here. Nothing else imports one. As in loop/commands, importing
one silences the libraries' announcements of themselves.
"""

import logging

logging.disable(logging.WARNING)
