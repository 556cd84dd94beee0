"""Peak memory and speed of reading a large pool: `python tests/benchmarks/pool_memory.py [ROWS]`.

The source is Fashion-MNIST repeated under new ids, 1,000,000 rows unless told otherwise, in one file of row groups of 100,000.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tasks.core.settings import shared_data

READ = """
import re, sys, time
from pathlib import Path
from tasks.pool.read import Config, read_pool
began, cpu = time.perf_counter(), time.process_time()
figures = read_pool(Config(source=sys.argv[1]), Path(sys.argv[2]))
wall, cpu = time.perf_counter() - began, time.process_time() - cpu
print(figures)
peak = int(re.search(r"VmHWM:\\s+([0-9]+)", Path("/proc/self/status").read_text())[1]) / 1024
print(f"{figures['rows'] / wall:,.0f} rows/s, {wall:.1f} s, {cpu:.1f} s of CPU, peak {peak:,.0f} MB")
"""


def main(rows: int) -> None:
    table = pq.read_table(shared_data() / "fashion_mnist" / "train.parquet", columns=["image", "label"])
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "large.parquet")
        schema = pa.schema([("sample_id", pa.string()), *table.schema]).with_metadata(table.schema.metadata)
        with pq.ParquetWriter(source, schema, compression="zstd") as out:
            for at in range(0, rows, 100_000):
                n = min(100_000, rows - at)
                some = pa.concat_tables([table, table]).slice(0, n)
                out.write_table(some.add_column(0, "sample_id", [[f"big-{at + i:08d}" for i in range(n)]]).cast(schema), row_group_size=n)
        del table
        root = Path(__file__).resolve().parents[2]
        subprocess.run([sys.executable, "-c", READ, str(source), str(Path(folder, "pool"))], cwd=root, check=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000)
