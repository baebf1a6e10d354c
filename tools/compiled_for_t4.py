"""Show that the kernels of `fitcast.step.compiled` compile for a T4 (sm_75), on any CUDA GPU.

    python tools/compiled_for_t4.py OUT.json

Runs each compiled function on small tensors here, takes the kernels that Inductor gave to Triton
(its own intermediate form, which names no card), and compiles each for sm_75, down to machine code.
What it does not show: speed on a T4, and that Inductor would choose the same tiles there.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def run_each() -> None:
    """Every compiled function once, in float16, as a T4 computes."""
    import torch

    from fitcast.step import compiled

    def half(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.float16)

    gate, up, grad = (half(1, 256, 1024) for _ in range(3))
    compiled.swiglu(gate, up)
    compiled.swiglu_gradients(grad, gate, up)
    compiled.turn(half(1, 4, 256, 128), half(1, 1, 256, 64), half(1, 1, 256, 64))
    compiled.loss_and_gradient(half(256, 4096), torch.arange(256, device="cuda"))


def for_sm_75(cache: Path) -> dict[str, Any]:
    """Bytes of machine code for sm_75 by kernel, or the error."""
    import triton
    from triton.backends.compiler import GPUTarget

    found: dict[str, Any] = {}
    for path in sorted(cache.rglob("*.ttir")):
        try:
            kernel = triton.compile(str(path), target=GPUTarget("cuda", 75, 32))
            found[path.stem] = {"cubin_bytes": len(kernel.asm["cubin"])}
        except Exception as error:
            found[path.stem] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return found


def versions() -> dict[str, str]:
    """Of who writes the kernels and who compiles them."""
    import torch
    import triton

    return {"torch": torch.__version__, "triton": triton.__version__}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = f"{folder}/triton"
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"
        os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # in this process, into this cache
        run_each()
        found = for_sm_75(Path(folder))
    import torch  # after the folders of its compilers are set

    record = {"protocol": __doc__, "gpu": torch.cuda.get_device_name(0), "versions": versions(),
              "date": datetime.date.today().isoformat(), "kernels": found}  # fmt: skip
    Path(sys.argv[1]).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    for name, what in found.items():
        print(name, what)


if __name__ == "__main__":
    main()
