"""The process that looks at a foreign graph first: one line of JSON says what it found."""

import json
import resource
import sys
from pathlib import Path
from typing import Any, Final

from vtr_export.retrofit.limits import RefusedError, examine

MAX_MEMORY_BYTES: Final = 16 << 30  # protobuf's 2 GiB read, copied and checked


def main(file: Path) -> None:
    """Print facts, or why the file is refused."""
    found: dict[str, Any]
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    try:
        found = examine(file)
    except RefusedError as error:
        found = {"refused": error.message, "hint": error.hint}
    except OSError as error:
        found = {"refused": error.strerror or str(error), "hint": "give an ONNX file"}
    except (RecursionError, MemoryError) as error:
        found = {"refused": f"it is too large or too deep ({type(error).__name__})", "hint": ""}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
