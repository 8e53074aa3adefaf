"""`make demo`: 50 labelled digits, with the pretrained backbone and with the same from scratch."""

import time

from hydra import compose, initialize_config_dir

from graft.config.resolved import CONFIGS, check
from graft.runs.entry import entry
from graft.runs.run import run


def accuracy(name: str, *more: str) -> float:
    overrides = ["experiment=quickstart", f"name={name}", *more]  # the name is in graft compare
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = check(compose("train", overrides))
    return 100 * run(config, overrides, {"experiment": "quickstart"})["test/acc"]


def main() -> None:
    started = time.perf_counter()
    print("1 of 2: ResNet-20 pretrained on CIFAR-10, moved to 50 labelled digits\n", flush=True)
    pretrained = accuracy("pretrained")
    print("\n2 of 2: the same network and recipe, from random weights\n", flush=True)
    scratch = accuracy("from_scratch", "backbone.weights=null")
    print(
        f"\nTest accuracy with 50 labelled digits:  pretrained {pretrained:.1f} %   "
        f"from scratch {scratch:.1f} %   ({time.perf_counter() - started:.0f} s)"
    )


if __name__ == "__main__":
    entry(main)  # errors and signals as `graft train` has them
