"""YAML as a configuration needs it: texts, numbers, true, false, null, lists, mappings with keys.

YAML can also say dates, times of day, octal numbers, Python objects, keys that are no text, the
same key twice, and by aliases a few lines can stand for gigabytes or for themselves. A date is a
text here, and each of the others is one line of error.
"""

import errno
import re
import stat
from pathlib import Path
from typing import Any

import yaml

MOST_NODES = 10_000  # with every alias written out
MOST_BYTES = 2**20
MOST_DIGITS = 300
MERGE = "tag:yaml.org,2002:merge"  # of a key `<<`
OTHER_BASE = re.compile(r"[-+]?(0[0-7_]+$|[0-9_]+:)")  # octal, and base 60, as in times of day


class PlainLoader(yaml.SafeLoader):
    """A YAML 1.1 loader without tags and dates, whose mappings have each key once, as a text."""

    def fetch_tag(self):
        raise yaml.scanner.ScannerError(
            None, None, "a tag (!...) has no place here", self.get_mark()
        )

    def construct_mapping(self, node, deep=False):
        merged: dict[str, Any] = {}
        own: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == MERGE:
                for source in reversed(_merge_sources(value_node)):  # the first one counts
                    merged |= self.construct_object(source, deep=True)
                continue
            if key_node.tag != "tag:yaml.org,2002:str":
                raise _error(key_node, "a key is not a text; put it into quotes")
            key = self.construct_object(key_node)
            if key in own:
                raise _error(key_node, f"the key {key[:60]!r} is there twice")
            own[key] = self.construct_object(value_node, deep=True)
        return merged | own

    def construct_yaml_int(self, node):
        _check_digits(node)
        return super().construct_yaml_int(node)

    def construct_yaml_float(self, node):
        _check_digits(node)
        return super().construct_yaml_float(node)

    def construct_yaml_map(self, node):
        yield self.construct_mapping(node)


PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_yaml_int)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_yaml_float)
PlainLoader.add_constructor("tag:yaml.org,2002:map", PlainLoader.construct_yaml_map)
PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def read_small_file(path: Path) -> str:
    """The text of a file of at most MOST_BYTES.

    Raises OSError, also for a pipe or a device, which may never end; UnicodeDecodeError.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise OSError(errno.EINVAL, "is not a file")
    if about.st_size > MOST_BYTES:
        raise OSError(errno.EFBIG, f"larger than {MOST_BYTES:,} bytes")
    return path.read_text("utf-8-sig")


def read_yaml(text: str) -> Any:
    """What a YAML text holds. Raises yaml.YAMLError, whose `problem` does not quote the text."""
    if len(text) > MOST_BYTES:
        raise yaml.MarkedYAMLError(problem=f"longer than {MOST_BYTES:,} characters")
    loader = PlainLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, set())
        return loader.construct_document(node)
    except (RecursionError, ValueError, TypeError) as error:
        raise yaml.MarkedYAMLError(
            problem=f"nested too deeply, or no value ({type(error).__name__})"
        ) from error
    finally:
        loader.dispose()


def _count(node: yaml.Node, sizes: dict[int, int], open_nodes: set[int]) -> int:
    """The nodes below one, each alias written out. Raises YAMLError above MOST_NODES."""
    if id(node) in open_nodes:
        raise _error(node, "an alias stands for itself")
    if id(node) not in sizes:
        open_nodes.add(id(node))
        size = 1
        if isinstance(node, yaml.SequenceNode):
            size += sum(_count(child, sizes, open_nodes) for child in node.value)
        elif isinstance(node, yaml.MappingNode):
            for pair in node.value:
                size += sum(_count(child, sizes, open_nodes) for child in pair)
        open_nodes.remove(id(node))
        sizes[id(node)] = size
        if size > MOST_NODES:
            raise _error(node, f"more than {MOST_NODES:,} values, aliases written out")
    return sizes[id(node)]


def _merge_sources(node: yaml.Node) -> list[yaml.Node]:
    """The mappings of `<<: *other` or `<<: [*one, *other]`. Raises YAMLError for anything else."""
    sources = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not all(isinstance(source, yaml.MappingNode) for source in sources):
        raise _error(node, "<< takes a mapping, or a list of them")
    return sources


def _check_digits(node: yaml.ScalarNode) -> None:
    """Raises YAMLError for a number that is another one than it looks, or has too many digits."""
    if len(node.value) > MOST_DIGITS:
        raise _error(node, "a number of too many digits")
    if OTHER_BASE.match(node.value):
        raise _error(node, "YAML takes 1:30 as 90 and 010 as 8: write plain digits, or quotes")


def _error(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)
