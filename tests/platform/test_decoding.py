"""Types that several threads use for the first time at once."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys, threading, types
from lmweb.decoding import convert, decode_json

sys.setswitchinterval(1e-6)
numbers = range(20)
source = "import msgspec\\nfrom typing import Annotated\\n"
source += "".join(f"class B{i}(msgspec.Struct):\\n    x: 'Annotated[int, msgspec.Meta(ge=0)]' = 0\\n" for i in numbers)
source += "class A(msgspec.Struct):\\n" + "".join(f"    f{i}: 'B{i} | None' = None\\n" for i in numbers)
for turn in range(40):
    module = sys.modules[f"made{turn}"] = types.ModuleType(f"made{turn}")
    exec(source, module.__dict__)
    begin = threading.Barrier(8)

    def use() -> None:
        begin.wait()
        assert convert({"f3": {"x": 1}}, module.A).f3.x == decode_json(b'{"f3": {"x": 1}}', module.A).f3.x == 1

    threads = [threading.Thread(target=use) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
"""


def test_types_are_first_used_by_many_threads_at_once() -> None:
    """Found as a segmentation fault of the web process: its first requests came at the same moment."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=False, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
