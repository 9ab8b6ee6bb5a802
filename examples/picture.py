"""The picture of the README: a 7B Llama on an H100, plain and as memfit plans it. No GPU, no weights.

python examples/picture.py [docs/images/timeline.png]
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import memfit
from memfit.core.devices import DEVICES
from memfit.report.contents import contents
from memfit.report.page import write_picture
from memfit.report.reading import Source
from memfit.runtime.fake import fake_tensors

MEMORY = "72GiB"  # what an H100 has, less a tenth
HERE = Path(__file__).parent


def main() -> None:
    """Records one step on fake tensors, plans it, and draws both."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE.parent / "docs" / "images" / "timeline.png"
    with fake_tensors():
        job = runpy.run_path(str(HERE / "llama7b.py"))["workload"]()
        batch = next(job.batches_from(0))
        profile = memfit.profile(
            job.model, job.loss_fn, batch, optimizer=job.optimizer, device=DEVICES["h100"]
        )
    plan = memfit.find_plan(profile, memory=MEMORY)
    print(plan)
    target.parent.mkdir(parents=True, exist_ok=True)
    content = contents(Source("Llama 7B", "python examples/picture.py", plan, profile), plans=2)
    write_picture(content, target, "png", scale=1.0)


if __name__ == "__main__":
    main()
