"""A hand-written fine-tuning loop: QLoRA under DeepSpeed ZeRO-3, from doctor-patient dialogues to SOAP notes."""

import logging

# Libraries announce themselves in a dozen warnings while they are imported; the lines of a run that matter would drown in them.
# Errors still come through, and what this project has to say it prints.
logging.disable(logging.WARNING)
