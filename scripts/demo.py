"""`make demo`: 100 labelled digits, with the pretrained backbone and with the same from scratch."""

import time

from hydra import compose, initialize_config_dir

from graft.config import CONFIGS, check
from graft.train import run


def accuracy(*overrides: str) -> float:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = check(compose("train", ["experiment=quickstart", *overrides]))
    return 100 * run(config, list(overrides), {"experiment": "quickstart"})["test/acc"]


if __name__ == "__main__":
    started = time.perf_counter()
    print("1 of 2: ResNet-20 pretrained on CIFAR-10, moved to 100 labelled digits\n", flush=True)
    pretrained = accuracy()
    print("\n2 of 2: the same network and recipe, from random weights\n", flush=True)
    scratch = accuracy("backbone.weights=null")
    print(
        f"\nTest accuracy with 100 labelled digits:  pretrained {pretrained:.1f} %   "
        f"from scratch {scratch:.1f} %   ({time.perf_counter() - started:.0f} s)"
    )
