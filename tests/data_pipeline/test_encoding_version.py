"""A change of the code that encodes is a decision: does it change what is encoded?"""

import ast
import hashlib
from pathlib import Path

from data_pipeline.encoding import ENCODING_VERSION

ROOT = Path(__file__).resolve().parents[2]
DECIDING = [
    "data_pipeline/buckets.py", "data_pipeline/encoding.py", "data_pipeline/pictures.py", "model/conditioner.py",
    "vae/autoencoder.py", "vae/layers.py", "vae/tiling.py",
]  # fmt: skip
"""Files that decide what a picture and a caption become."""
KNOWN = (1, "9736958c1b3f497a")
"""ENCODING_VERSION, and the hash of the code that has it."""


def code_hash() -> str:
    """Hash of the code without comments, docstrings and annotations."""
    digest = hashlib.blake2b(digest_size=8)
    for name in DECIDING:
        tree = ast.parse((ROOT / name).read_text())
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [x for x in body if not (isinstance(x, ast.Expr) and isinstance(x.value, ast.Constant))]
        digest.update(f"{name} {ast.unparse(tree)}".encode())
    return digest.hexdigest()


def test_whoever_changes_how_data_are_encoded_says_so():
    assert (ENCODING_VERSION, code_hash()) == KNOWN, (
        "the code that encodes has changed. If it gives other latents or hidden states, raise ENCODING_VERSION; "
        f"in both cases put ({ENCODING_VERSION}, {code_hash()!r}) into KNOWN"
    )
