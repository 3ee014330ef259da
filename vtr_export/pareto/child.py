"""A process that answers one question, and says how much memory it ever held."""

import json
import sys

from vtr_export.process import peak_rss_bytes
from vtr_export.runtime.artifact import Artifact


def main(words: str) -> None:
    """Print bytes."""
    given = json.loads(words)
    artifact = Artifact.load(given["artifact"], threads=given["threads"])
    artifact.generate(given["images"], given["prompt"], max_new_tokens=given["max_new_tokens"])
    print(peak_rss_bytes())


if __name__ == "__main__":
    main(sys.argv[1])
