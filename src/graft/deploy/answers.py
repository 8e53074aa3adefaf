"""What a model's outputs and its description say to a client, by names."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from numpy.typing import NDArray

from graft.deploy.predict import NOT_FINITE
from graft.deploy.spec import Spec

PUBLIC = ("run", "stage", "git_commit", "versions", "data", "metrics")  # of a model's provenance


def described(spec: Spec, outputs: NDArray[np.float32], top: int) -> dict[str, Any]:
    """What one row of a model's outputs says, by names."""
    if not np.isfinite(outputs).all():
        return {"error": NOT_FINITE}
    values = [float(value) for value in outputs]
    if spec.output_kind == "numbers":
        return {"numbers": dict(zip(spec.classes, values, strict=True))}
    order = np.argsort(-outputs, kind="stable")[:top]
    listed = [{"class": spec.classes[i], "probability": values[i]} for i in order]
    if spec.output_kind == "labels":
        named = zip(spec.classes, values, strict=True)
        return {"labels": [name for name, value in named if value > 0.5], "top": listed}
    return {**listed[0], "top": listed}


def metadata(spec: Spec) -> dict[str, Any]:
    """The spec in plain values, without what tells of the machine that it comes from."""
    values: dict[str, Any] = json.loads(spec.to_json(), parse_constant=lambda _: None)  # no NaN
    origin = values["provenance"]
    return {**values, "provenance": {key: origin[key] for key in PUBLIC if key in origin}}
