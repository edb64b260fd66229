"""DeepSpeed's conversion of a checkpoint into a universal one, timed without the imports.

    python -m benchmarks.peers.universal REQUEST

REQUEST is JSON: input (folder of one tag), output, extract_workers, merge_workers. Prints the seconds as
its last line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from argparse import Namespace

os.environ["DS_ACCELERATOR"] = "cpu"

from deepspeed.checkpoint import ds_to_universal


def main() -> None:
    request = json.loads(sys.argv[1])
    arguments = Namespace(
        input_folder=request["input"],
        output_folder=request["output"],
        num_extract_workers=request["extract_workers"],
        num_merge_workers=request["merge_workers"],
        keep_temp_folder=False,
        strict=True,
        inject_missing_state=True,
    )
    began = time.perf_counter()
    ds_to_universal.main(arguments)
    print(time.perf_counter() - began)


if __name__ == "__main__":
    main()
