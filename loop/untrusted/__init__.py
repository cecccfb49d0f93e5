"""What strangers wrote is read here within limits: a base's files and its chat template."""
