"""A library's error in one short line, for a message that adds what to do about it."""


def first_line(error: Exception, most: int = 200) -> str:
    """The first line of an error's text, of at most `most` characters; its class without a text."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:most]
