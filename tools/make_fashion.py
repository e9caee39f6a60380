"""Make the packaged `fashion` data: a class-balanced part of Fashion-MNIST.

    python tools/make_fashion.py [FOLDER WITH THE FOUR ORIGINAL FILES]

Takes the first 1,000 training and the first 200 test pictures of each of the 10 classes, in the
order of the original files, and writes them in the original format. The same input always gives
the same bytes.
"""

from __future__ import annotations

import gzip
import sys
from pathlib import Path

import numpy as np

from trilemma.data.named import read_idx

SOURCE = Path(sys.argv[1] if len(sys.argv) > 1 else "/usr/share/datasets/fashion-mnist")
TARGET = Path(__file__).parents[1] / "src/trilemma/data/files"

LICENSE = """\
fashion-*-ubyte.gz are a class-balanced part of Fashion-MNIST (Xiao, Rasul, Vollgraf 2017,
"Fashion-MNIST: a Novel Image Dataset for Benchmarking Machine Learning Algorithms"),
https://github.com/zalandoresearch/fashion-mnist, selected by tools/make_fashion.py.

The MIT License (MIT)

Copyright (c) 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM,
DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT
OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write uint8 `array` as a gzipped idx file, without a date in it."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.tobytes(), compresslevel=9, mtime=0))


for prefix, name, count in (("train", "train", 1000), ("t10k", "t10k", 200)):
    images = read_idx(SOURCE / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(SOURCE / f"{prefix}-labels-idx1-ubyte.gz")
    first = np.concatenate([np.flatnonzero(labels == k)[:count] for k in range(10)])
    chosen = np.sort(first)
    write_idx(TARGET / f"fashion-{name}-images-idx3-ubyte.gz", images[chosen])
    write_idx(TARGET / f"fashion-{name}-labels-idx1-ubyte.gz", labels[chosen])
(TARGET / "LICENSE-fashion.txt").write_text(LICENSE)
