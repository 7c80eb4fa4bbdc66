"""The service model of the embedded KMS: botocore's, reduced to what validation reads.

python tests/kms/test_shapes.py       writes streamcrypt/kms/model.json anew from the installed botocore
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import botocore
import botocore.loaders

from streamcrypt.kms import shapes

MODEL = Path(shapes.__file__).with_name("model.json")
USED = frozenset({"type", "members", "required", "max", "min", "enum", "pattern", "member", "key", "value"})


def reduced() -> dict[str, Any]:
    """The installed model: operations with the names of their shapes, and these shapes' constraints."""
    model = botocore.loaders.Loader().load_service_model("kms", "service-2", "2014-11-01")
    operations = {
        name: {side: {"shape": found[side]["shape"]} for side in ("input", "output") if side in found}
        for name, found in model["operations"].items()
    }
    kept: dict[str, Any] = {}

    def keep(name: str) -> None:
        if name in kept:
            return
        shape = kept[name] = {key: value for key, value in model["shapes"][name].items() if key in USED}
        for part in ("member", "key", "value"):
            if part in shape:
                shape[part] = {"shape": shape[part]["shape"]}
                keep(shape[part]["shape"])
        if "members" in shape:
            shape["members"] = {key: {"shape": ref["shape"]} for key, ref in shape["members"].items()}
            for ref in shape["members"].values():
                keep(ref["shape"])

    for found in operations.values():
        for side in found.values():
            keep(side["shape"])
    return {"botocore": botocore.__version__, "operations": operations, "shapes": dict(sorted(kept.items()))}


def test_the_model_is_botocore_s() -> None:
    ours, theirs = json.loads(MODEL.read_text()), reduced()
    if ours["botocore"] == theirs["botocore"]:
        assert ours == theirs
        return
    # Another version of botocore may know more, but what both know is the same.
    assert ours["operations"].keys() <= theirs["operations"].keys()
    for name, operation in ours["operations"].items():
        assert theirs["operations"][name] == operation
        members = ours["shapes"][operation["input"]["shape"]]["members"]
        assert members.items() <= theirs["shapes"][operation["input"]["shape"]]["members"].items(), name


if __name__ == "__main__":
    MODEL.write_text(json.dumps(reduced(), separators=(",", ":")).replace('},"', '},\n"') + "\n")
