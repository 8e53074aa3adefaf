"""Backbone of a run's best checkpoint as safetensors: `save_backbone.py RUN OUT.safetensors`.

The file loads as `backbone.weights=OUT.safetensors`. It is how the weights that travel with this
package were written.
"""

import argparse
from pathlib import Path

from safetensors.torch import save_file

from graft.models.weights import read_file

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    best = sorted((arguments.run / "checkpoints").glob("*/best.ckpt"))
    if not best:
        parser.error(f"{arguments.run} holds no checkpoints/<stage>/best.ckpt")
    newest = max(best, key=lambda path: path.stat().st_mtime)
    state = {
        key.removeprefix("backbone."): value.contiguous()
        for key, value in read_file(newest)["state_dict"].items()
        if key.startswith("backbone.")
    }
    save_file(state, arguments.out)
    print(f"{arguments.out}: {len(state)} tensors from {newest}")
